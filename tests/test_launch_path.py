"""Every op through Triton's own launch path, which the interpreter has not: kernels are specialised, compiled for
sm_90, loaded and launched on a driver that does nothing (tests/stub_gpu). Which ones, and how many, stands here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="Triton's launcher and the driver are in C: needs cc"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, its own driver would be in the way"),
]

TESTS = Path(__file__).parent


def gemm(left: str, right: str, epilogue: str) -> str:
    return f"gemm_kernel({left}, {right}, {epilogue}, DTYPE)"


ROW_STATISTICS = "layer_norm_kernel"
COLUMN_SUM = "column_sum_kernel"
SUMS = [COLUMN_SUM, COLUMN_SUM]  # over rows, then of the partial sums
NORM_BACKWARD = "layer_norm_backward_kernel"
LINEAR = gemm("load_matrix", "load_matrix", "store_linear")
LINEAR_OF_NORM = gemm("load_normalised", "load_matrix", "store_linear")
FC1 = gemm("load_normalised", "load_matrix", "store_activated")
INPUT = gemm("load_matrix", "load_matrix", "store")  # the gradient of a product's input
# And of its weight, which under "auto" is a product of the library's.
WEIGHT = "weight: " + gemm("load_matrix", "load_matrix", "store")
WEIGHT_OF_NORM = "weight: " + gemm("load_matrix", "load_normalised", "store")
SCALED_INPUT = gemm("load_scaled", "load_matrix", "store")
SCALED_WEIGHT = "weight: " + gemm("load_matrix", "load_scaled", "store")
HIDDEN = gemm("load_matrix", "load_matrix", "store_activation_gradient")
SCALED_HIDDEN = gemm("load_scaled", "load_matrix", "store_activation_gradient")
ATTENTION_BACKWARD = ["attention_backward_dq_kernel", "attention_backward_dkdv_kernel"]
EMBED = gemm("load_patches", "load_matrix", "store_tokens")
PIXELS = gemm("load_matrix", "load_matrix", "store_pixels")
PATCH_WEIGHT = "weight: " + gemm("load_matrix", "load_patches", "store")
FOLD_PIXELS, UNFOLD_PIXELS = "sections_kernel(fold_pixels)", "sections_kernel(unfold_pixels)"

# A block: the gradient of its output is scaled, summed or copied where a scale, a bias or a wider stream asks for it.
COPY = "scaled_gradient_kernel"
COPY_OF_WIDE = "wide: " + COPY
FOLD, UNFOLD, UNSCALE = (f"sections_kernel({name})" for name in ("fold_rows", "unfold_columns", "unscale_rows"))
SUM_PARTS = "sections_kernel(sum_columns)"
FOLDED, GATED, STREAM, DERIVATIVE, GATED_DERIVATIVE, NORM_GRADIENT = (
    gemm("load_matrix", "load_matrix", f"store_{name}")
    for name in ("folded", "gated", "stream", "derivative", "gated_derivative", "norm_gradient")
)
BLOCK_FORWARD = [FOLD, "stream_kernel", FOLDED, "attention_kernel", STREAM, FOLDED, STREAM]
THROUGH_ATTENTION = [DERIVATIVE, NORM_GRADIENT, INPUT, *ATTENTION_BACKWARD]
BLOCK_BACKWARD = [
    *(COPY, DERIVATIVE, WEIGHT, WEIGHT, NORM_GRADIENT, WEIGHT, INPUT, *ATTENTION_BACKWARD, WEIGHT, NORM_GRADIENT),
    *(SUM_PARTS, UNFOLD),
]

# What each sample launches in its order: forward; backward with everything to train; backward with each of the named
# inputs alone to train, the others frozen.
LAUNCHES = {
    "layer_norm": {
        "forward": ["layer_norm_kernel"],
        "backward": [NORM_BACKWARD],
        "x weight bias": [NORM_BACKWARD],
    },
    "layer_norm_linear": {
        "forward": [ROW_STATISTICS, LINEAR_OF_NORM],
        "backward": [WEIGHT_OF_NORM, *SUMS, INPUT, NORM_BACKWARD],
        "x norm_weight norm_bias": [INPUT, NORM_BACKWARD],
        "weight": [WEIGHT_OF_NORM],
        "bias": [*SUMS],
    },
    "linear_residual": {
        "forward": [LINEAR],
        "backward": [SCALED_INPUT, *SUMS, SCALED_WEIGHT],
        "x": [SCALED_INPUT],
        "weight": [SCALED_WEIGHT],
        "bias": [*SUMS],
        "layer_scale": [*SUMS, SCALED_WEIGHT],
        "residual": [],
    },
    "layer_norm_mlp": {
        "forward": [ROW_STATISTICS, FC1, LINEAR],
        "backward": [HIDDEN, *SUMS, WEIGHT, WEIGHT_OF_NORM, *SUMS, INPUT, NORM_BACKWARD],
        "x norm_weight norm_bias": [HIDDEN, INPUT, NORM_BACKWARD],
        "fc1_weight": [HIDDEN, WEIGHT_OF_NORM],
        "fc1_bias": [HIDDEN, *SUMS],
        "fc2_weight": [HIDDEN, WEIGHT],  # which needs the activated tensor, made again with the gradient
        "fc2_bias": [*SUMS],
    },
    "layer_norm_mlp-residual": {
        "forward": [ROW_STATISTICS, FC1, LINEAR],
        "backward": [SCALED_HIDDEN, *SUMS, SCALED_WEIGHT, WEIGHT_OF_NORM, *SUMS, INPUT, NORM_BACKWARD],
        "x norm_weight norm_bias": [SCALED_HIDDEN, INPUT, NORM_BACKWARD],
        "fc1_weight": [SCALED_HIDDEN, WEIGHT_OF_NORM],
        "fc1_bias": [SCALED_HIDDEN, *SUMS],
        "fc2_weight": [SCALED_HIDDEN, SCALED_WEIGHT],
        "fc2_bias": [*SUMS],
        "layer_scale": [SCALED_HIDDEN, *SUMS, SCALED_WEIGHT],
        "residual": [],
    },
    "attention": {
        "forward": ["attention_kernel"],
        "backward": ATTENTION_BACKWARD,
        "qkv": ATTENTION_BACKWARD,
    },
    "attention-biased": {
        "forward": ["attention_kernel"],
        "backward": ATTENTION_BACKWARD,
        "qkv": ATTENTION_BACKWARD,
        "attn_bias": ATTENTION_BACKWARD,  # the second for nothing: its results are the gradients of k and v
    },
    "attention-rotary": {"forward": ["attention_kernel"], "backward": ATTENTION_BACKWARD, "qkv": ATTENTION_BACKWARD},
    "patch_embed": {  # of 60 pixels, which are filled up to 64
        "forward": [FOLD_PIXELS, EMBED],
        "backward": [COLUMN_SUM, PATCH_WEIGHT, UNFOLD_PIXELS, FOLD_PIXELS, PIXELS],
        "image": [FOLD_PIXELS, PIXELS],
        "weight": [PATCH_WEIGHT, UNFOLD_PIXELS],
        "bias pos_embed prefix": [COLUMN_SUM],
    },
    "patch_embed-uint8": {
        "forward": [FOLD_PIXELS, EMBED],
        "backward": [COLUMN_SUM, PATCH_WEIGHT, UNFOLD_PIXELS],
        "weight": [COLUMN_SUM, PATCH_WEIGHT, UNFOLD_PIXELS],
        "bias pos_embed prefix": [COLUMN_SUM],
    },
    "transformer_block": {
        "forward": BLOCK_FORWARD,
        "backward": BLOCK_BACKWARD,
        "x": [COPY_OF_WIDE, *THROUGH_ATTENTION, NORM_GRADIENT],
        "norm1_weight norm1_bias qkv_weight qkv_bias": [COPY_OF_WIDE, *THROUGH_ATTENTION, WEIGHT, SUM_PARTS, UNFOLD],
        "proj_weight": [COPY_OF_WIDE, DERIVATIVE, NORM_GRADIENT, WEIGHT],
        "proj_bias": [COPY_OF_WIDE, DERIVATIVE, NORM_GRADIENT, SUM_PARTS],
        "norm2_weight norm2_bias fc1_weight fc1_bias": [COPY_OF_WIDE, DERIVATIVE, WEIGHT, SUM_PARTS, UNFOLD],
        "fc2_weight": [COPY_OF_WIDE, DERIVATIVE, WEIGHT],
        "fc2_bias": [COPY, SUM_PARTS],
    },
    "transformer_block-all": {  # which has fc1 made again
        "forward": BLOCK_FORWARD,
        "backward": [COPY, FOLDED, *BLOCK_BACKWARD[1:], UNSCALE],
        "x": [COPY, FOLDED, *THROUGH_ATTENTION, NORM_GRADIENT],
        "norm1_weight norm1_bias qkv_weight qkv_bias": [COPY, FOLDED, *THROUGH_ATTENTION, WEIGHT, SUM_PARTS, UNFOLD],
        "proj_weight": [COPY, FOLDED, DERIVATIVE, NORM_GRADIENT, WEIGHT, UNSCALE],
        "proj_bias": [COPY, FOLDED, DERIVATIVE, NORM_GRADIENT, SUM_PARTS, UNSCALE],
        "norm2_weight norm2_bias fc1_weight fc1_bias": [COPY, FOLDED, DERIVATIVE, WEIGHT, SUM_PARTS, UNFOLD],
        "fc2_weight": [COPY, FOLDED, DERIVATIVE, WEIGHT, UNSCALE],
        "fc2_bias": [COPY, SUM_PARTS, UNSCALE],
        "layer_scale1": [COPY, FOLDED, DERIVATIVE, NORM_GRADIENT, WEIGHT, SUM_PARTS, UNSCALE],
        "layer_scale2": [COPY, FOLDED, DERIVATIVE, WEIGHT, SUM_PARTS, UNSCALE],
        "attn_bias": [COPY, FOLDED, *THROUGH_ATTENTION],
    },
}

LAUNCHES["transformer_block-gated"] = {
    names: [GATED_DERIVATIVE if kernel == DERIVATIVE else kernel for kernel in kernels]
    for names, kernels in LAUNCHES["transformer_block"].items()
} | {"forward": [*BLOCK_FORWARD[:5], GATED, STREAM]}

for name in ("attention_varlen", "attention_varlen-rotary"):
    LAUNCHES[name] = LAUNCHES["attention-rotary"]

# How many kernels each sample has compiled once it has run, forward and backward, at these batch sizes, one after the
# other. Triton compiles anew for an integer that is 1 or a multiple of 16, but no such integer follows from the number
# of rows. What follows from it: a sum in one part is rounded as it is stored, one in several is a sum of float32.
BATCHES = (2, 3, 16, 1, 5, 32)  # 42, 63, 336, 21, 105 and 672 rows
VARIANTS = {
    "layer_norm": [2, 2, 4, 4, 4, 4],
    "layer_norm_linear": [7, 7, 8, 9, 9, 9],
    "linear_residual": [5] * 6,
    "layer_norm_mlp": [10, 10, 11, 12, 12, 12],
    "layer_norm_mlp-residual": [12, 12, 13, 14, 14, 14],
    "attention": [3] * 6,
    "attention-biased": [3] * 6,
    "attention-rotary": [3] * 6,
    "patch_embed": [7] * 6,
    "patch_embed-uint8": [5] * 6,
    "transformer_block": [17, 17, 20, 21, 22, 22],
    "transformer_block-gated": [18, 18, 21, 22, 23, 23],
    "transformer_block-all": [18, 18, 21, 22, 23, 23],
}


@pytest.fixture(scope="session")
def triton_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture
def launch_ops(triton_cache):
    """What tests/stub_gpu/launch_ops.py, or another script there, says to these arguments."""

    def start(*arguments, script="launch_ops.py", **variables) -> dict:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        paths = [str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment |= {"PYTHONPATH": os.pathsep.join(paths), "FASTVIT_TUNING": "off"}
        environment |= {"TRITON_CACHE_DIR": str(triton_cache), **variables}
        command = [sys.executable, TESTS / "stub_gpu" / script, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return start


@pytest.mark.parametrize(
    "dtypes, product",
    [
        pytest.param("float32", "fp32", marks=pytest.mark.slow),
        pytest.param("float16", "fp16", marks=pytest.mark.slow),
        ("bfloat16", "bf16"),
        pytest.param("bfloat16 float32", "bf16", marks=pytest.mark.slow),  # weights beside a wider stream
    ],
)
def test_every_launch(dtypes, product, launch_ops, triton_cache):
    # Without LLVM's optimiser, which is a fifth of the time: `make static` compiles as a GPU would have it.
    launched = launch_ops("launches", *dtypes.split(), DISABLE_LLVM_OPT="1")
    taken = {name: table for name, table in LAUNCHES.items() if dtypes != "float16" or "block" not in name}
    assert launched.keys() == taken.keys()
    for sample, table in taken.items():
        expected = {
            name: [
                kernel.removeprefix("weight: ").removeprefix("wide: ").replace("DTYPE", product)
                for kernel in kernels
                if " " in dtypes or not kernel.startswith("wide: ")
            ]
            for names, kernels in table.items()
            for name in names.split()
        }
        assert launched[sample] == expected, sample
    compiled = list(triton_cache.rglob("*.cubin"))
    assert compiled
    for cubin in compiled:
        assert cubin.read_bytes().startswith(b"\x7fELF")
        assert "\n.target sm_90a\n" in cubin.with_suffix(".ptx").read_text()


@pytest.mark.slow
def test_under_auto_no_weight_gradient_is_a_product_of_ours(launch_ops):
    launched = launch_ops("auto", "bfloat16", "float32", DISABLE_LLVM_OPT="1")
    for sample, table in LAUNCHES.items():
        for names, kernels in table.items():
            ours = [kernel for kernel in kernels if "gemm_kernel" in kernel]
            for name in names.split():
                trained = name == "backward" or name.endswith("weight")
                most = sum(not (trained and kernel.startswith("weight: ")) for kernel in ours)
                assert sum("gemm_kernel" in kernel for kernel in launched[sample][name]) <= most, (sample, name)


def test_replayed_launches_are_handed_what_tritons_own_were(launch_ops):
    """Grid, kernel, and every argument; but where a kernel or Triton may be another, or somebody listens."""
    found = launch_ops("replays", STUB_GPU_COMPILE="no")
    programs, unknown, clashes, largest = found.pop("workspaces")
    assert (programs, unknown, clashes) == (2 * len(LAUNCHES), 0, 0) and largest > 10_000
    backward = {name: len(table["forward"]) + len(table["backward"]) for name, table in LAUNCHES.items()}
    assert {name: found.pop(name) for name in LAUNCHES} == {name: [n, n, n] for name, n in backward.items()}
    assert found.pop("by TMA") == 3 * [backward["transformer_block"]]
    assert found.pop("still alive"), "the newest Triton unloads a kernel that nobody holds"
    assert found.pop("apart") == [1, 1, 1, 1, 1, 0]
    for name in ("an address that 16 does not divide", "other tables"):
        assert found.pop(name) == [2, 2, 0, None, 0]
    others = ("a profiler", "a hook", "a knob", "a Triton that is not known", "a kernel's own hook")
    assert found == {name: [2, 2, 0, None, 2] for name in others}


def test_the_tuner_has_kernels_compiled_ahead(launch_ops, tmp_path):
    """All that it launches but a tile that cannot be compiled, which stops no other; and launches none for it."""
    found = launch_ops("tuning", DISABLE_LLVM_OPT="1", TRITON_CACHE_DIR=str(tmp_path))
    assert found["launched ahead"] == []
    assert set(found["itself"]) == {"gemm_kernel 100"} and len(found["itself"]) == 3
    assert {kernel.split()[0] for kernel in found["ahead"]} == {
        "gemm_kernel",
        "tma_kernel",
        "apply_kernel",
        "column_sum_kernel",
    }
    assert len(found["ahead"]) > 8
    *launched, _ = found["said"]
    assert len(launched) == 4 and not any("not tuned" in line for line in launched)
    assert sum("dropped GemmConfig BLOCK_M=100" in line for line in launched) == 3


def test_the_way_from_a_block_to_its_kernels(launch_ops):
    """Five hops, six the first time, and those of the first product as docs/architecture.md lists them."""
    page = (TESTS.parent / "docs" / "architecture.md").read_text()
    for ways, most in zip(launch_ops("hops", STUB_GPU_COMPILE="no"), (6, 5), strict=True):
        assert len(ways) == 7 and max(len(way) - 1 for way in ways) <= most
        listed = "\n".join(f"{hop}. {function}" for hop, function in enumerate(ways[2]))
        assert listed in page, listed


def test_a_frozen_model(launch_ops):
    """Compiled and launched for sm_90: a block is seven launches, the last one's queries and its MLP are one row's."""
    found = dict(launch_ops("frozen"))
    of_block = {
        "attn.qkv": ["layer_norm_kernel", "gemm_kernel(load_normalised, load_matrix, store_linear, bf16)"],
        "attn": ["attention_kernel"],
        "middle": ["gemm_kernel(load_matrix, load_matrix, store_linear, bf16)"],
        "": ["layer_norm_kernel", "gemm_kernel(load_normalised, load_matrix, store_activated, bf16)",
             "gemm_kernel(load_matrix, load_matrix, store_linear, bf16)"],
    }  # fmt: skip
    for i in (0, 1):
        assert {name: found[f"blocks.{i}.{name}".rstrip(".")] for name in of_block} == of_block
    assert [len(names) for names in found.values() if names] == [1, *[2, 1, 1, 3] * 2, 1, 1, 3, 1]
    assert not found["head"] and not found["blocks.2.attn[0:1]"]  # the library's, of one row


def test_a_frozen_model_on_graphs(launch_ops):
    """Batches of 3 and 4 share the graph of 4, in static buffers; a replay launches nothing by itself."""
    calls = launch_ops(script="frozen_graph.py", STUB_GPU_COMPILE="no")
    launches = 1 + 3 * 7 + 1  # patches, blocks, the last norm: all tokens are returned
    assert [captured for captured, *_ in calls] == [[4], [4], [4], [1, 4]]
    assert [shapes["logits"] for _, shapes, *_ in calls] == [[batch, 1000] for batch in (3, 4, 3, 1)]
    assert [shapes["tokens"] for _, shapes, *_ in calls] == [[batch, 5, 192] for batch in (3, 4, 3, 1)]
    assert [made for *_, made, _ in calls] == [2 * launches, 0, 0, 2 * launches]  # to compile, and to capture
    assert [replays for *_, replays in calls] == [1, 2, 3, 4]


def test_the_hosts_rows(launch_ops):
    """As many launches as the committed rows have; their times are for `make host` to compare."""
    kept = json.loads((TESTS.parent / "benchmarks" / "results" / "host.json").read_text())["rows"]
    found = launch_ops("host", STUB_GPU_COMPILE="no")
    assert [row["launches"] for row in found] == [row["launches"] for row in kept]
    assert [row["pass"] for row in found] == [row["pass"] for row in kept]
    assert all(row["ms"] > 0 for row in (*found, *kept))


def test_variants_by_batch_size(launch_ops):
    """Without a compiler behind: how often Triton would have called it."""
    assert launch_ops("variants", *BATCHES, STUB_GPU_COMPILE="no") == VARIANTS

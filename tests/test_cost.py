"""The cost model: against independent counts of FLOPs and bytes, against floors computed elsewhere, against what
Triton's launcher hands to a profiler; and the estimates keep their order."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastvit.benchmarks import roofline
from fastvit.benchmarks.cases import OPS, Case
from fastvit.benchmarks.schema import Peaks
from fastvit.kernels import attention, gemm, layer_norm, reduce
from fastvit.kernels.launch import cost
from fastvit.kernels.launch.cost import Cost, Rates
from fastvit.kernels.launch.hardware import ARCHS
from fastvit.kernels.launch.request import (
    CONFIGS,
    AttentionConfig,
    GemmConfig,
    Product,
    Request,
    RowConfig,
    Rows,
    Scores,
)
from fastvit.kernels.launch.search import search_space
from torch.utils.flop_counter import FlopCounterMode

from fastvit import ops, reference

BF16, FP32 = torch.bfloat16, torch.float32

# ---- Models ----------------------------------------------------------------------------------------------------------

# Milliseconds of the fused block's roofline at 790 TFLOP/s and 3.0 TB/s, bfloat16, from a calculation that shares no
# code with this one: model, batch, inference, training.
FLOORS = [
    ("vit_tiny_patch16_224", 1, 0.01049766, 0.03836134),
    ("vit_tiny_patch16_224", 32, 0.2192026, 0.7764962),
    ("vit_tiny_patch16_224", 256, 1.727264, 6.112879),
    ("vit_small_patch16_224", 1, 0.02802304, 0.1049339),
    ("vit_small_patch16_224", 32, 0.4600478, 1.598585),
    ("vit_small_patch16_224", 256, 3.639095, 12.59876),
    ("vit_base_patch16_224", 1, 0.08430746, 0.3230136),
    ("vit_base_patch16_224", 32, 1.527823, 4.607333),
    ("vit_base_patch16_224", 256, 12.18956, 36.66049),
    ("vit_large_patch16_224", 1, 0.2737265, 1.059846),
    ("vit_large_patch16_224", 32, 5.245315, 15.63266),
    ("vit_large_patch16_224", 256, 41.96252, 125.0613),
    ("vit_huge_patch14_224", 1, 0.5754469, 2.22836),
    ("vit_huge_patch14_224", 32, 14.01296, 41.81432),
    ("vit_huge_patch14_224", 256, 112.1037, 334.5146),
]


@pytest.mark.parametrize("model, batch, inference, training", FLOORS)
def test_floor_of_models(model, batch, inference, training):
    rates = Rates(790e12, 3.0e12)
    for mode, milliseconds in (("inference", inference), ("training", training)):
        floor = 1e3 * roofline.bound(Case(model, BF16, batch, mode), rates)
        assert floor == pytest.approx(milliseconds, rel=0.01)


MODELS = [
    "vit_tiny_patch16_224",
    "vit_base_patch16_224",
    "vit_giant_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "deit_tiny_distilled_patch16_224",
]

# In a process of its own: here fresh memory may be poisoned, which takes memory.
COUNT = """
import json, sys
import torch
from torch.utils.flop_counter import FlopCounterMode
from fastvit import create_model

# Which back end of SDPA runs, and so whether it is counted, depends on the machine.
torch.nn.functional.scaled_dot_product_attention = (
    lambda q, k, v, **options: (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v
)
found = {}
for name in sys.argv[1:]:
    with torch.device("meta"):
        model = create_model(name)
        images = torch.empty(2, 3, *model.config.img_size)
    with FlopCounterMode(display=False) as inference, torch.no_grad():
        model.eval()(images)
    with FlopCounterMode(display=False) as training:
        model.train()(images).sum().backward()
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "token" not in name}
    found[name] = [inference.get_total_flops(), training.get_total_flops(), matrices]
print(json.dumps(found))
"""


def run_script(script: str, *arguments: str, **environment: str) -> str:
    """What a script prints, run without Triton's interpreter."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = inherited | {"PYTHONPATH": str(Path(__file__).parents[1])} | environment
    command = [sys.executable, "-c", script, *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def counted() -> dict[str, list]:
    """Of each of MODELS, for two images: the FLOPs of PyTorch's products in inference and in training, and the sizes
    of its matrices."""
    return json.loads(run_script(COUNT, *MODELS))


@pytest.mark.parametrize("model", MODELS)
def test_flops_of_models(model, counted):
    inference, training, _ = counted[model]
    case = Case(model, BF16, 2)
    assert roofline.case_cost(case).flops == inference
    # PyTorch keeps the scores that the plan makes again.
    again = 2 * 2 * case.tokens**2 * case.config.embed_dim * case.config.depth
    assert roofline.case_cost(dataclasses.replace(case, mode="training")).flops == training + again


@pytest.mark.parametrize("model", MODELS)
def test_weights_of_models(model, counted):
    """Bytes are linear in the batch; what does not grow with it is the weights: read once, and in training read again
    for the gradient of their input, with float32 gradients written."""
    matrices = dict(counted[model][2])
    matrices.pop("pos_embed")
    patches = matrices.pop("patch_embed.proj.weight")
    for dtype in (BF16, FP32):
        size = dtype.itemsize
        for mode, each, of_patches in (("inference", size, size), ("training", 2 * size + 4, size + 4)):
            one, two = (roofline.case_cost(Case(model, dtype, batch, mode)).bytes for batch in (1, 2))
            assert 2 * one - two == each * sum(matrices.values()) + of_patches * patches


def test_bytes_of_activations():
    """A plain block moves 22 tensors of (tokens, embed_dim) in inference and 78 in training, in any dtype."""

    def tensors(model, mode="inference", dtype=BF16):
        one, two = (roofline.model_cost(Case(model, dtype, batch, mode)) for batch in (1, 2))
        case = Case(model, dtype, 1, mode)
        moved = {name: later.bytes - cost.bytes for (name, cost), (_, later) in zip(one, two, strict=True)}
        per_tensor = case.config.depth * case.tokens * case.config.embed_dim * dtype.itemsize
        return sum(moved[name] for name in moved if "head" not in name and "patch" not in name) / per_tensor

    assert tensors("vit_base_patch16_224") == tensors("vit_base_patch16_224", dtype=FP32) == 22
    assert tensors("vit_base_patch16_224", "training") == 78
    # SwiGLU: fc2 reads 8/3 of embed_dim; fc1 makes gate and value, twice that, which training saves.
    assert tensors("vit_giant_patch14_dinov2") == pytest.approx(14 + 2 * 8 / 3)
    assert tensors("vit_giant_patch14_dinov2", "training") == pytest.approx(42 + 14 * 8 / 3)
    assert tensors("vit_small_patch14_reg4_dinov2") == 22


def test_more_tokens_or_images_cost_more():
    for name in ("", *OPS):
        for mode in ("inference", "training"):
            costs = [
                roofline.case_cost(Case("vit_base_patch16_224", BF16, batch, mode, name, size))
                for batch, size in ((1, 224), (8, 224), (8, 384))
            ]
            for less, more in zip(costs, costs[1:], strict=False):
                assert less.bytes < more.bytes and less.flops <= more.flops
            assert costs[1].flops == pytest.approx(8 * costs[0].flops)


# ---- Ops -------------------------------------------------------------------------------------------------------------

B, N, D, H, M = 2, 21, 24, 3, 40


def draw(*shape):
    return torch.randn(shape, requires_grad=True)


def op_tensors(op: str) -> dict[str, torch.Tensor]:
    x, norm = draw(B, N, D), {"norm_weight": draw(D), "norm_bias": draw(D)}
    return {
        "patch_embed": lambda: {"image": torch.randn(B, 3, 12, 20), "weight": draw(D, 3, 4, 5), "prefix": draw(1, D)},
        "attention": lambda: {"qkv": draw(B, N, 3, H, 8)},
        "layer_norm": lambda: {"x": x, "weight": draw(D), "bias": draw(D)},
        "layer_norm_linear": lambda: {"x": x, **norm, "weight": draw(M, D), "bias": draw(M)},
        "linear_residual": lambda: {
            "x": draw(B, N, M),
            "weight": draw(D, M),
            "bias": draw(D),
            "residual": x,
        },
        "layer_norm_mlp": lambda: {
            **{"x": x, **norm, "fc1_weight": draw(M, D), "fc1_bias": draw(M)},
            **{"fc2_weight": draw(D, M), "fc2_bias": draw(D), "residual": x},
        },
    }[op]()


def op_costs(op: str) -> tuple[Cost, Cost]:
    """Forward and backward of the tensors above, in float32."""
    patches = (B, 12, 13, 60, D, 4)
    return {
        "patch_embed": (cost.patch_embed_forward(*patches), cost.patch_embed_backward(*patches)),
        "attention": (cost.attention_forward(B, N, H, 8, 4), cost.attention_backward(B, N, H, 8, 4)),
        "layer_norm": (cost.layer_norm_forward(B * N, D, 4), cost.layer_norm_backward(B * N, D, 4)),
        "layer_norm_linear": (
            cost.layer_norm_linear_forward(B * N, D, M, 4),
            cost.layer_norm_linear_backward(B * N, D, M, 4),
        ),
        "linear_residual": (
            cost.linear_residual_forward(B * N, M, D, 4),
            cost.linear_residual_backward(B * N, M, D, 4),
        ),
        "layer_norm_mlp": (
            cost.layer_norm_mlp_forward(B * N, D, M, D, 4, saved=True),
            cost.layer_norm_mlp_backward(B * N, D, M, D, 4),
        ),
    }[op]


@pytest.mark.parametrize("op", OPS)
def test_flops_of_ops(op):
    tensors = op_tensors(op)
    forward, backward = op_costs(op)
    with FlopCounterMode(display=False) as counter:
        out = getattr(reference, op)(**tensors)
    assert forward.flops == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    again = 2 * B * H * N * N * 8 if op == "attention" else 0
    assert backward.flops == counter.get_total_flops() + again


def test_bytes_of_ops():
    """Each matrix that a kernel of the plan reads or writes, listed."""
    t, s = B * N, 4
    stream, hidden, weight, embedding = t * D * s, t * M * s, M * D * s, D * 60 * s
    image, tokens, head = B * 3 * 12 * 20 * s, B * 13 * D * s, B * N * H * 8 * s
    moved = {
        # image, weight -> tokens; image, dtokens -> dweight
        "patch_embed": (image + embedding + tokens, image + tokens + embedding),
        # q, k, v -> out; q, k, v, out, dout -> dq, dk, dv
        "attention": (4 * head, 8 * head),
        # x -> y; dy, x -> dx
        "layer_norm": (2 * stream, 3 * stream),
        # x, weight -> y; (dy, x -> dweight), (dy, weight, x -> dx)
        "layer_norm_linear": (stream + weight + hidden, hidden + stream + weight + hidden + weight + 2 * stream),
        # x, weight, residual -> out; (dout, x -> dweight), (dout, weight -> dx)
        "linear_residual": (hidden + weight + 2 * stream, stream + hidden + weight + stream + weight + hidden),
        # (x, fc1 -> pre-activation, activated), (activated, fc2, x -> out); (dout, fc2, pre-activation ->
        # its gradient, activated), (dout, activated -> dfc2), (its gradient, x -> dfc1), (its gradient, fc1, x, dout
        # -> dx)
        "layer_norm_mlp": (
            (stream + weight + 2 * hidden) + (hidden + weight + 2 * stream),
            (stream + weight + 3 * hidden)
            + (stream + hidden + weight)
            + (hidden + stream + weight)
            + (hidden + weight + 3 * stream),
        ),
    }
    for op in OPS:
        assert tuple(direction.bytes for direction in op_costs(op)) == moved[op], op


def test_gradients_of_weights_are_float32():
    assert cost.weight_gradient(10, 3, 5, 2) == Cost(300, 2 * 10 * 8 + 4 * 15)
    assert cost.weight_gradient(10, 3, 5, 8).bytes == 8 * (10 * 8 + 15)


def test_cost_of_op_cases():
    """With the shapes that a model gives them."""
    rows, dim = 8 * 197, 768

    def of(op, mode="inference"):
        return roofline.op_cost(Case("vit_base_patch16_224", BF16, 8, mode, op))

    assert of("layer_norm_linear") == cost.layer_norm_linear_forward(rows, dim, 3 * dim, 2)
    assert of("linear_residual") == cost.linear_residual_forward(rows, dim, dim, 2)
    assert of("attention") == cost.attention_forward(8, 197, 12, 64, 2)
    assert of("layer_norm") == cost.layer_norm_forward(rows, dim, 2)
    assert of("patch_embed") == cost.patch_embed_forward(8, 196, 197, 768, 768, 2)
    assert of("layer_norm_mlp") == cost.layer_norm_mlp_forward(rows, dim, 4 * dim, dim, 2)
    saved = cost.layer_norm_mlp_forward(rows, dim, 4 * dim, dim, 2, saved=True)
    assert of("layer_norm_mlp", "training") == saved + cost.layer_norm_mlp_backward(rows, dim, 4 * dim, dim, 2)
    assert saved.bytes - of("layer_norm_mlp").bytes == rows * 4 * dim * 2

    case = Case("vit_base_patch16_224", BF16, 8, "training", "attention")
    slow_memory, slow_products = Rates(1e30, 1.0), Rates(1.0, 1e30)
    assert roofline.bound(case, slow_memory) == roofline.case_cost(case).bytes
    assert roofline.bound(case, slow_products) == roofline.case_cost(case).flops
    with pytest.raises(ValueError, match="whole model"):
        roofline.op_cost(Case("vit_base_patch16_224", BF16, 8))


# ---- What the device reaches -----------------------------------------------------------------------------------------


def test_rates():
    peaks = Peaks(3e12, {"bf16": 8e14})
    assert roofline.rates(peaks, "bf16") == Rates(8e14, 3e12)
    with pytest.raises(ValueError, match="'fp32'.*bf16"):
        roofline.rates(peaks, "fp32")


def test_peaks_count_what_they_time(monkeypatch):
    counted = []

    def seconds(call):
        with FlopCounterMode(display=False) as counter:
            call()
        counted.append(counter.get_total_flops())
        return [0.5, 0.25, 1e9][len(counted) % 3]  # the median counts

    monkeypatch.setattr(roofline, "_seconds", seconds)
    peaks = roofline.measure_peaks("cpu", [FP32])
    assert peaks.flops_per_s == {"fp32": counted[-1] / 0.5}
    assert counted[-1] > 0 and peaks.bytes_per_s == 2 * 2**27 / 0.5


def test_on_a_gpu_peaks_are_steady(monkeypatch):
    asked = []
    monkeypatch.setattr(roofline.timing, "steady_seconds", lambda call, device: asked.append(device) or 0.5)
    assert roofline._median_seconds(lambda: None, torch.device("cuda", 1)) == 0.5
    assert asked == [torch.device("cuda", 1)]


def test_a_busy_machine_makes_no_small_ceiling(monkeypatch):
    """It takes a core away for longer than a product of 256 lasts: what that one takes says nothing of larger ones."""
    took = cycle([0.1, 0.016, 0.1])
    monkeypatch.setattr(roofline, "_seconds", lambda call: next(took))
    assert roofline._cpu_size(FP32) == 2048
    monkeypatch.setattr(roofline, "_seconds", lambda call: 0.03)
    assert roofline._cpu_size(FP32) == 256


def test_peaks_of_this_machine():
    peaks = roofline.measure_peaks("cpu", [FP32, BF16])
    assert list(peaks.flops_per_s) == ["fp32", "bf16"]
    for rate in (peaks.bytes_per_s, *peaks.flops_per_s.values()):
        assert 1e7 < rate < 1e16


# ---- Launches --------------------------------------------------------------------------------------------------------

KERNELS = [
    gemm.gemm_kernel,
    attention.attention_kernel,
    attention.attention_backward_dq_kernel,
    attention.attention_backward_dkdv_kernel,
    layer_norm.layer_norm_kernel,
    layer_norm.layer_norm_backward_kernel,
    reduce.column_sum_kernel,
]


@contextmanager
def launches(monkeypatch):
    """What a profiler would be told of each launch in the `with` body."""
    found, original = [], type(gemm.gemm_kernel).run

    def run(kernel, *args, grid, warmup, **kwargs):
        signature = inspect.signature(kernel.fn)
        own = {name: value for name, value in kwargs.items() if name in signature.parameters}
        arguments = signature.bind(*args, **own).arguments
        # The interpreter has no use for it, and keeps it among other options.
        of_kernel = getattr(kernel, "launch_metadata", None) or kernel.kwargs["launch_metadata"]
        metadata = SimpleNamespace(name=kernel.fn.__name__)
        found.append(of_kernel(grid, metadata, arguments))
        return original(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(type(gemm.gemm_kernel), "run", run)
    yield found
    monkeypatch.undo()


def total(found: list[dict]) -> Cost:
    return sum((Cost(launch.get("flops32", 0), launch["bytes"]) for launch in found), Cost())


@pytest.mark.parametrize("op", OPS)
def test_launches(op, monkeypatch, device, triton_backend):
    """All launches of an op, forward and backward, move what it must and what the head of its file adds to that."""
    tensors = {
        name: tensor.detach().to(device).requires_grad_(tensor.requires_grad) for name, tensor in op_tensors(op).items()
    }
    if "residual" in tensors and op == "layer_norm_mlp":
        tensors["residual"] = tensors["x"]
    with launches(monkeypatch) as forward:
        out = getattr(ops, op)(**tensors)
    with launches(monkeypatch) as backward:
        out.sum().backward()
    stream, hidden, head, tokens = B * N * D * 4, B * N * M * 4, B * N * H * 8 * 4, B * 13 * D * 4
    prefix_rows = 2 * B * 60 * D
    beyond = {
        "patch_embed": (Cost(prefix_rows, D * 4), Cost(prefix_rows, tokens)),
        "attention": (Cost(), Cost(2 * 2 * B * H * N * N * 8, 4 * head)),
        "layer_norm": (Cost(), Cost()),
        "layer_norm_linear": (Cost(0, stream), Cost(0, hidden + 2 * stream)),
        "linear_residual": (Cost(), Cost(0, stream)),
        "layer_norm_mlp": (Cost(0, stream), Cost(0, stream + hidden + 2 * stream)),
    }
    # No reduction of a product is cut in parts on these shapes. The sums of the few partial sums are small beside.
    small = re.compile("(?!)" if op == "patch_embed" else r"column_sum_kernel \[rows=[2-9] ")
    for found, must, more in zip((forward, backward), op_costs(op), beyond[op], strict=True):
        assert total([launch for launch in found if not small.match(launch["name"])]) == must + more


def test_every_kernel_tells_its_cost(monkeypatch, device):
    """By the functions of `cost`, with Proton's keys, in the width of the operands."""

    def tensor(*shape, dtype=BF16):
        return torch.zeros(shape, dtype=dtype, device=device)

    found = {}
    with launches(monkeypatch) as caught:
        qkv, mask = tensor(2, 5, 3, 2, 16), torch.ones(2, 5, dtype=torch.bool, device=device)
        bias = tensor(2, 5, 5)
        out, lse = attention.attention_forward(qkv, 0.25, mask, bias)
        attention.attention_backward(out, qkv, out, lse, 0.25, mask, bias, needs_bias=True)
        x, vector = tensor(10, 32), tensor(32)
        y, mean, rstd = layer_norm.layer_norm_forward(x, vector, vector, 1e-6)
        layer_norm.layer_norm_backward(y, x, mean, rstd, vector, dresidual=x)
        reduce.column_sum(tensor(10, 32, dtype=torch.float64))
        gemm.weight_gradient(x, gemm.SCALED, (x, None, None, 1, 32), 32, BF16, wide=True)
    for launch in caught:
        found[launch["name"].split()[0]] = launch
    assert set(found) == {kernel.fn.__name__ for kernel in KERNELS}

    shape = (2, 5, 2, 16, 2)
    mask_and_bias, dbias = 2 * 5 + 2 * 5 * 5 * 2, 2 * 2 * 5 * 5 * 4
    expected = {
        "attention_kernel": (cost.attention_forward(*shape), mask_and_bias),
        "attention_backward_dq_kernel": (cost.attention_backward_dq(*shape), mask_and_bias + dbias),
        "attention_backward_dkdv_kernel": (cost.attention_backward_dkdv(*shape), mask_and_bias),
        "layer_norm_kernel": (cost.layer_norm_forward(10, 32, 2), 0),
        "layer_norm_backward_kernel": (cost.layer_norm_backward(10, 32, 2, residual=True), 0),
        "column_sum_kernel": (cost.column_sum(10, 32, 8), 0),
        "gemm_kernel": (cost.weight_gradient(10, 32, 32, 2), 0),
    }
    for name, (must, others) in expected.items():
        launch = found[name]
        assert launch["bytes"] == must.bytes + others, name
        assert {key: value for key, value in launch.items() if key.startswith("flops")} == (
            {"flops16": must.flops} if must.flops else {}
        ), name
    assert found["gemm_kernel"]["name"] == "gemm_kernel [load_matrix load_scaled store, M=32 N=32 K=10]"


LAUNCHER = """
import json, sys

import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from fastvit.kernels import gemm, layer_norm
from fastvit.kernels.launch.absent import AbsentDriver

evaluated, told = [], []
for kernel in (gemm.gemm_kernel, layer_norm.layer_norm_kernel):
    def watched(*args, original=kernel.launch_metadata):
        evaluated.append(1)
        return original(*args)
    kernel.launch_metadata = watched

triton.runtime.driver.set_active(AbsentDriver(GPUTarget("cuda", 80, 32)))
# Loading the code and running it takes a GPU; what is handed to a hook on the way does not.
CompiledKernel._init_handles = lambda self: None


def run(self):
    def launcher(gx, gy, gz, stream, function, packed, metadata, enter, leave, *args):
        if metadata is not None and enter is not None:
            enter(metadata)
    return launcher


CompiledKernel.run = property(run)


def launch():
    x, w = (torch.empty(64, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
    mean, rstd = layer_norm.row_statistics(x, 1e-6)
    source = (x, mean, rstd, w[0], w[0], 64)
    gemm.weight_gradient(w, gemm.NORMALISED, source, 64, torch.bfloat16, wide=True)


launch()
silent = len(evaluated)


def hook(metadata):
    told.append({k: v for k, v in metadata.get().items() if k not in ("function", "stream")})


hooks = triton.knobs.runtime.launch_enter_hook
if hooks is None:
    triton.knobs.runtime.launch_enter_hook = hook
else:
    hooks.add(hook)
launch()
print(json.dumps([silent, told]))
"""


def test_through_the_launcher_of_triton(tmp_path):
    """A hook is told the cost, tuples of arguments and all; with no hook nothing is worked out."""
    silent, told = json.loads(run_script(LAUNCHER, TRITON_CACHE_DIR=str(tmp_path)))
    assert silent == 0
    product = cost.weight_gradient(64, 64, 64, 2)
    assert told == [
        {"name": "layer_norm_kernel [rows=64 columns=64]", "bytes": cost.row_statistics(64, 64, 2).bytes},
        {
            "name": "gemm_kernel [load_matrix load_normalised store, M=64 N=64 K=64]",
            "bytes": product.bytes,
            "flops16": product.flops,
        },
    ]


# ---- Estimates -------------------------------------------------------------------------------------------------------


def product(shape, dtype, epilogue=gemm.INPUT_GRADIENT):
    return Request("gemm", shape, dtype, Product(gemm.MATRIX, gemm.MATRIX, epilogue, None, *[dtype] * 3))


REQUESTS = [
    (product((50432, 2304, 768), BF16), cost.gemm(50432, 2304, 768, 2)),
    (product((197, 768, 3072), BF16), cost.gemm(197, 768, 3072, 2)),
    (product((1000, 768, 768), FP32), cost.gemm(1000, 768, 768, 4)),
    (product((768, 768, 6304), BF16, gemm.SUMS), cost.weight_gradient(6304, 768, 768, 2)),
    (Request("attention_forward", (3, 197, 12, 64), BF16, Scores()), cost.attention_forward(3, 197, 12, 64, 2)),
    (Request("attention_backward_dq", (8, 257, 16, 80), BF16, Scores()), cost.attention_backward_dq(8, 257, 16, 80, 2)),
    (Request("attention_backward_dkdv", (8, 50, 3, 64), FP32, Scores()), cost.attention_backward_dkdv(8, 50, 3, 64, 4)),
    (Request("layer_norm_statistics", (1576, 768), BF16, Rows()), cost.row_statistics(1576, 768, 2)),
    (Request("layer_norm_forward", (50432, 192), BF16, Rows()), cost.layer_norm_forward(50432, 192, 2)),
    (Request("layer_norm_backward", (1576, 768), BF16, Rows()), cost.layer_norm_backward(1576, 768, 2)),
    (
        Request("layer_norm_backward", (1576, 768), BF16, Rows(residual=True)),
        cost.layer_norm_backward(1576, 768, 2, residual=True),
    ),
    (Request("column_sum", (1576, 3072), BF16, Rows()), cost.column_sum(1576, 3072, 2)),
]


@pytest.mark.parametrize("request_, must", REQUESTS, ids=lambda value: getattr(value, "key", ""))
def test_what_a_request_needs(request_, must):
    assert cost.request_cost(request_) == must


@pytest.mark.parametrize("request_, must", REQUESTS, ids=lambda value: getattr(value, "key", ""))
@pytest.mark.parametrize("arch", ARCHS.values(), ids=lambda arch: arch.name)
def test_estimates(arch, request_, must):
    """Never below the floor of the data sheet; never slower with more multiprocessors; nothing but numbers."""
    flops = arch.flops_16 if request_.dtype.itemsize <= 2 else arch.flops_32
    floor = cost.floor_seconds(must, Rates(flops, arch.bandwidth))
    for config in search_space(request_, arch, arch.sms):
        seconds = cost.request_seconds(request_, config, arch)
        assert math.isfinite(seconds) and seconds > floor
        assert seconds == cost.request_seconds(request_, config, arch, sms=arch.sms)
        by_sms = [cost.request_seconds(request_, config, arch, sms) for sms in range(8, 2 * arch.sms, 7)]
        assert by_sms == sorted(by_sms, reverse=True) and by_sms[0] > floor


def test_estimates_count_padding_waves_and_room():
    arch = ARCHS["sm_90"]
    tall = GemmConfig(128, 64, 64, 4, 3)
    wide = tall._replace(BLOCK_M=64, BLOCK_N=128)
    # 64 rows fill half of a tall tile; of many rows neither wastes any.
    assert cost.gemm_seconds(64, 65536, 768, 4, tall, arch) > 1.5 * cost.gemm_seconds(64, 65536, 768, 4, wide, arch)
    assert cost.gemm_seconds(65536, 8192, 768, 2, tall, arch) == cost.gemm_seconds(65536, 8192, 768, 2, wide, arch)
    # One tile more than the multiprocessors hold takes another round.
    full, over = (cost.gemm_seconds(128 * n, 64, 4096, 4, tall, arch) for n in (132, 133))
    assert over > 1.3 * full
    # A long sum into few tiles is better cut.
    cut = tall._replace(SPLIT_K=8)
    assert cost.gemm_seconds(768, 768, 50432, 2, cut, arch) < cost.gemm_seconds(768, 768, 50432, 2, tall, arch)
    # Blocks that fill the shared memory cannot hide each other's latency.
    thin = tall._replace(num_stages=2)
    alone, together = (cost.gemm_seconds(4096, 4096, 64, 4, thin, arch, shared) for shared in (arch.shared // 2, 0))
    assert alone >= together

    narrow = AttentionConfig(64, 32, 4, 2)
    shape = (256, 197, 12, 64, 2)
    wasteful = cost.attention_seconds(*shape, narrow._replace(BLOCK_STEP=256), arch)
    assert wasteful > cost.attention_seconds(*shape, narrow, arch)
    kernels = [cost.attention_seconds(*shape, narrow, arch, kernel) for kernel in CONFIGS if "attention" in kernel]
    assert kernels == sorted(kernels) and kernels[0] < kernels[2]

    row = RowConfig(4, 1024, 4)
    assert cost.row_seconds(50432, 1024, 2, row, arch, moves=4) > cost.row_seconds(50432, 1024, 2, row, arch, moves=2)
    few = cost.row_seconds(50432, 1024, 2, row, arch, stretches=16)
    assert few > cost.row_seconds(50432, 1024, 2, row, arch, stretches=256)

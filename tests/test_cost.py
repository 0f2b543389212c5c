"""The cost of ops and launches: against independent counts of FLOPs and bytes, and against what Triton's launcher
hands to a profiler."""

from __future__ import annotations

import inspect
import json
import re
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from fastvit.benchmarks import roofline
from fastvit.benchmarks.cases import OPS, Case
from fastvit.kernels import attention, gemm, layer_norm, reduce, tiles
from fastvit.kernels.launch import cost
from fastvit.kernels.launch.cost import Cost, Rates
from scripts import run_script
from torch.utils.flop_counter import FlopCounterMode

from fastvit import ops, reference

BF16, FP32 = torch.bfloat16, torch.float32

# ---- Ops -------------------------------------------------------------------------------------------------------------

B, N, D, H, M = 2, 21, 24, 3, 40


def draw(*shape):
    return torch.randn(shape, requires_grad=True)


def op_tensors(op: str) -> dict[str, torch.Tensor]:
    x, norm = draw(B, N, D), {"norm_weight": draw(D), "norm_bias": draw(D)}
    return {
        "patch_embed": lambda: {"image": torch.randn(B, 3, 12, 32), "weight": draw(D, 3, 4, 8), "prefix": draw(1, D)},
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
        "transformer_block": lambda: {
            **{"x": x, "norm1_weight": draw(D), "norm1_bias": draw(D), "norm2_weight": draw(D), "norm2_bias": draw(D)},
            **{"qkv_weight": draw(3 * D, D), "qkv_bias": draw(3 * D), "proj_weight": draw(D, D), "proj_bias": draw(D)},
            **{"fc1_weight": draw(M, D), "fc1_bias": draw(M), "fc2_weight": draw(D, M), "fc2_bias": draw(D)},
        },
    }[op]()


OPTIONS = {"transformer_block": {"num_heads": H}}


def op_costs(op: str) -> tuple[Cost, Cost]:
    """Forward and backward of the tensors above, in float32."""
    patches = (B, 12, 13, 96, D, 4)
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
        "transformer_block": (
            cost.layer_norm_linear_forward(B * N, D, 3 * D, 4)
            + cost.attention_forward(B, N, H, 8, 4)
            + cost.linear_residual_forward(B * N, D, D, 4)
            + cost.layer_norm_mlp_forward(B * N, D, M, D, 4, saved=True),
            cost.layer_norm_mlp_backward(B * N, D, M, D, 4)
            + cost.linear_residual_backward(B * N, D, D, 4)
            + cost.attention_backward(B, N, H, 8, 4)
            + cost.layer_norm_linear_backward(B * N, D, 3 * D, 4, residual=True),
        ),
    }[op]


@pytest.mark.parametrize("op", OPS)
def test_flops_of_ops(op):
    tensors = op_tensors(op)
    forward, backward = op_costs(op)
    with FlopCounterMode(display=False) as counter:
        out = getattr(reference, op)(**tensors, **OPTIONS.get(op, {}))
    assert forward.flops == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    again = 2 * B * H * N * N * 8 if op in ("attention", "transformer_block") else 0
    assert backward.flops == counter.get_total_flops() + again


def test_bytes_of_ops():
    """Each matrix that a kernel of the plan reads or writes, listed."""
    t, s = B * N, 4
    stream, hidden, weight, embedding = t * D * s, t * M * s, M * D * s, D * 96 * s
    image, tokens, head = B * 3 * 12 * 32 * s, B * 13 * D * s, B * N * H * 8 * s
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
    # qkv, proj and attention beside the MLP; proj's rows and attention's heads are a stream each.
    (mlp, mlp_back), square = moved["layer_norm_mlp"], D * D * s
    moved["transformer_block"] = (
        (4 * stream + 3 * square) + 4 * stream + (3 * stream + square) + mlp,
        mlp_back + (4 * stream + 2 * square) + 8 * stream + (4 * stream + 3 * square) + (6 * stream + 3 * square),
    )
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


@pytest.mark.parametrize("op", [op for op in OPS if op != "transformer_block"])  # see test_block_launches.py
def test_launches(op, monkeypatch, device, triton_backend):
    """All launches of an op, forward and backward, move what it must and what the head of its file adds to that."""
    tensors = {
        name: tensor.detach().to(device).requires_grad_(tensor.requires_grad) for name, tensor in op_tensors(op).items()
    }
    if "residual" in tensors and op == "layer_norm_mlp":
        tensors["residual"] = tensors["x"]
    with launches(monkeypatch) as forward:
        out = getattr(ops, op)(**tensors, **OPTIONS.get(op, {}))
    with launches(monkeypatch) as backward:
        out.sum().backward()
    stream, hidden, head, tokens = B * N * D * 4, B * N * M * 4, B * N * H * 8 * 4, B * 13 * D * 4
    prefix_rows = 2 * B * 96 * D
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


def test_every_kernel_tells_its_cost(monkeypatch, device, triton_backend):
    """By the functions of `cost`, with Proton's keys, in the width of the operands."""

    def tensor(*shape, dtype=BF16):
        return torch.zeros(shape, dtype=dtype, device=device)

    found = {}
    with launches(monkeypatch) as caught:
        qkv, mask = tensor(2, 5, 3, 2, 16), torch.ones(2, 5, dtype=torch.bool, device=device)
        bias = tensor(2, 5, 5)
        out, lse = attention.attention_forward(qkv, 0.25, mask, bias)
        attention.attention_backward(out, qkv, out, lse, 0.25, True, mask, bias)
        x, vector = tensor(10, 32), tensor(32)
        y, mean, rstd = layer_norm.layer_norm_forward(x, vector, vector, 1e-6)
        layer_norm.layer_norm_backward(y, x, mean, rstd, vector, vector, dresidual=x)
        reduce.column_sum(tensor(10, 32, dtype=torch.float64))
        gemm.weight_gradient(x, tiles.SCALED, (x, None, None, 1, 32), 32, BF16, wide=True)
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

from fastvit.kernels import gemm, layer_norm, tiles
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
    gemm.weight_gradient(w, tiles.NORMALISED, source, 64, torch.bfloat16, wide=True)


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

"""The least time that a case can take: its cost, by `fastvit.kernels.launch.cost`, at the rates that a device reaches.

The roofline bound of a model is that of an ideal plan, a block fused into five kernels: the sum over the plan's kernels
of the larger of their compute time and their memory time. Today's kernels move more than the plan: weights are folded
at every forward pass; a block's backward reads the gradient of its output once more, for its sums by column;
attention's backward is two kernels. So a fraction of the bound below 1 has two causes: kernels that run slowly, and
work beyond the plan.

Counted: matrix products and matrices, as `cost` says. Not counted: the optimiser, dropout, the loss.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from fastvit.kernels.launch import cost
from fastvit.kernels.launch.cost import Cost, Rates, bound_seconds

from fastvit import onednn
from fastvit.frozen.openvino_import import import_openvino, openvino_core
from fastvit.verify import SHORT

from . import timing
from .cases import Case
from .schema import Peaks

SAMPLES = 7


def model_cost(case: Case) -> list[tuple[str, Cost]]:
    """(kernel, cost) of the plan's kernels for the whole model, each taken over all blocks.

    Images are counted as bytes (uint8), the least that a model takes. The head reads the pooled tokens alone. Inference
    runs every block for every token. In training the pre-activation is saved, the image needs no gradient, and weights'
    gradients are float32.
    """
    config, size, batch, training = case.config, case.dtype.itemsize, case.batch, case.mode == "training"
    forward, backward = _block(case)
    block = forward + backward if training else forward
    kernels = [("patch embedding", cost.patch_embed_forward(*_patches(case), pixel_size=1))]
    kernels += [(name, kernel * config.depth) for name, kernel in block]
    if training:
        kernels.append(("patch embedding backward", cost.patch_embed_backward(*_patches(case), pixel_size=1)))
    if config.num_classes:
        # The two heads of a distilled model read a token each.
        head = (batch, config.embed_dim, config.num_classes, size)
        kernels.append(("LN + head", cost.layer_norm_linear_forward(*head) * (1 + config.distilled)))
        if training:
            kernels.append(("LN + head backward", cost.layer_norm_linear_backward(*head) * (1 + config.distilled)))
    return kernels


def _block(case: Case) -> tuple[list[tuple[str, Cost]], list[tuple[str, Cost]]]:
    """`model_cost` of one block, forward and backward."""
    config, size = case.config, case.dtype.itemsize
    dim, rows, training = config.embed_dim, case.batch * case.tokens, case.mode == "training"
    attention = (case.batch, case.tokens, config.num_heads, dim // config.num_heads, size)
    hidden, gated = _mlp(case)
    packed = hidden * (1 + gated)
    forward = [
        ("LN + QKV", cost.layer_norm_linear_forward(rows, dim, 3 * dim, size)),
        ("attention", cost.attention_forward(*attention)),
        ("proj + residual", cost.linear_residual_forward(rows, dim, dim, size)),
        ("LN + fc1 + activation", cost.fc1_forward(rows, dim, hidden, size, gated, saved=training)),
        ("fc2 + residual", cost.linear_residual_forward(rows, hidden, dim, size)),
    ]
    # The kernel that makes attention's dout reads its output as well, for the row sums of their product.
    delta = Cost(0.0, rows * dim * size)
    backward = [
        ("fc2 input gradient", cost.fc2_input_gradient(rows, hidden, dim, size, gated)),
        ("fc2 weight gradient", cost.weight_gradient(rows, hidden, dim, size)),
        ("fc1 weight gradient", cost.weight_gradient(rows, dim, packed, size)),
        ("fc1 + LN input gradient", cost.layer_norm_linear_input_gradient(rows, dim, packed, size, residual=True)),
        ("proj input gradient", cost.gemm(rows, dim, dim, size) + delta),
        ("proj weight gradient", cost.weight_gradient(rows, dim, dim, size)),
        ("attention backward", cost.attention_backward(*attention, delta=False)),
        ("QKV weight gradient", cost.weight_gradient(rows, dim, 3 * dim, size)),
        ("QKV + LN input gradient", cost.layer_norm_linear_input_gradient(rows, dim, 3 * dim, size, residual=True)),
    ]
    return forward, backward


def op_cost(case: Case) -> Cost:
    """What `case.op` costs as it stands in the model's blocks, forward, and in training forward and backward. Images
    are of the case's dtype. Raises ValueError for a case of a whole model."""
    forward, backward = _op_directions(case)
    return forward + backward if case.mode == "training" else forward


def case_cost(case: Case) -> Cost:
    """All of a case, of a model or of an op."""
    return sum((kernel for _, kernel in _kernels(case)), Cost())


def bound(case: Case, rates: Rates) -> float:
    """The roofline bound in seconds: of a model summed over the plan's kernels, of an op over forward and backward,
    each as if it were a single kernel."""
    return sum(bound_seconds(kernel, rates) for _, kernel in _kernels(case))


def _kernels(case: Case) -> list[tuple[str, Cost]]:
    if not case.op:
        return model_cost(case)
    forward, backward = _op_directions(case)
    return [("forward", forward), ("backward", backward)] if case.mode == "training" else [("forward", forward)]


def _op_directions(case: Case) -> tuple[Cost, Cost]:
    """The costs of `case.op`, forward and backward."""
    config, size = case.config, case.dtype.itemsize
    dim, rows, training = config.embed_dim, case.batch * case.tokens, case.mode == "training"
    if case.op == "patch_embed":
        return cost.patch_embed_forward(*_patches(case)), cost.patch_embed_backward(*_patches(case))
    if case.op == "attention":
        shape = (case.batch, case.tokens, config.num_heads, dim // config.num_heads, size)
        return cost.attention_forward(*shape), cost.attention_backward(*shape)
    if case.op == "layer_norm":
        return cost.layer_norm_forward(rows, dim, size), cost.layer_norm_backward(rows, dim, size)
    if case.op == "layer_norm_linear":
        shape = (rows, dim, 3 * dim, size)
        return cost.layer_norm_linear_forward(*shape), cost.layer_norm_linear_backward(*shape)
    if case.op == "linear_residual":
        shape = (rows, dim, dim, size)
        return cost.linear_residual_forward(*shape), cost.linear_residual_backward(*shape)
    if case.op == "layer_norm_mlp":
        hidden, gated = _mlp(case)
        shape = (rows, dim, hidden, dim, size, gated)
        return cost.layer_norm_mlp_forward(*shape, saved=training), cost.layer_norm_mlp_backward(*shape)
    if case.op == "transformer_block":
        forward, backward = (sum((kernel for _, kernel in part), Cost()) for part in _block(case))
        return forward, backward
    raise ValueError(f"{case.id} is of a whole model, expected a case of one op")


def _mlp(case: Case) -> tuple[int, bool]:
    """Columns that fc2 reads, and whether fc1 makes twice as many, gate and value."""
    config, gated = case.config, case.config.mlp == "swiglu"
    return int(config.embed_dim * config.mlp_ratio) // (1 + gated), gated


def _patches(case: Case) -> tuple[int, ...]:
    """The first arguments of `cost.patch_embed_forward`."""
    config = case.config
    rows, columns = config.grid_size
    pixels = config.in_chans * config.patch_size[0] * config.patch_size[1]
    return case.batch, rows * columns, case.tokens, pixels, config.embed_dim, case.dtype.itemsize


def rates(peaks: Peaks, dtype: str) -> Rates:
    """The measured peaks for a dtype, by its short name ("bf16"). Raises ValueError if that dtype was not measured."""
    if dtype not in peaks.flops_per_s:
        measured = ", ".join(peaks.flops_per_s)
        raise ValueError(f"dtype is {dtype!r}, expected one whose peak was measured: {measured}")
    return Rates(peaks.flops_per_s[dtype], peaks.bytes_per_s)


def measure_peaks(device: str | torch.device, dtypes: Iterable[torch.dtype]) -> Peaks:
    """Time a copy far larger than the caches, and for each dtype the product of two large square matrices.

    On a GPU 8192 x 8192, at sustained clocks (`timing.steady_seconds`), about a second each; on a CPU the median of
    several after a warm-up, of sizes that take about a second in all for a dtype on two cores, by the fastest of
    PyTorch (MKL), oneDNN and, where installed, OpenVINO. Products in float32 follow torch's present setting for them
    (TF32 or not).
    """
    device = torch.device(device)
    return Peaks(_copy_rate(device), {SHORT[dtype]: _product_rate(dtype, device) for dtype in dtypes})


def _copy_rate(device: torch.device) -> float:
    size = 1 << 30 if device.type == "cuda" else 1 << 27
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _median_seconds(lambda: target.copy_(source), device)


def _product_rate(dtype: torch.dtype, device: torch.device) -> float:
    size = 8192 if device.type == "cuda" else _cpu_size(dtype)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    calls = [lambda: torch.mm(left, right, out=out)]
    if device.type == "cpu":
        calls += _other_products(left, right)
    return 2 * size**3 / min(_median_seconds(call, device) for call in calls)


def _other_products(left: torch.Tensor, right: torch.Tensor) -> list[Callable[[], object]]:
    """The product by other libraries on a CPU, its right operand known beforehand, of those that are there."""
    calls: list[Callable[[], object]] = []
    if onednn.available(left.dtype):
        packed = onednn.pack(right)
        calls.append(lambda: onednn.linear(left, packed))
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(left.dtype)
    if precision and importlib.util.find_spec("openvino"):
        openvino = import_openvino()
        constant = openvino.op.Constant(right.float().numpy())
        images = openvino.opset13.parameter(list(left.shape), openvino.Type.f32)
        model = openvino.Model([openvino.opset13.matmul(images, constant, False, True)], [images])
        hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        request = openvino_core().compile_model(model, "CPU", hints).create_infer_request()
        given = left.float().numpy()
        calls.append(lambda: request.infer([given], share_inputs=True, share_outputs=True))
    return calls


def _cpu_size(dtype: torch.dtype, seconds: float = 0.025) -> int:
    """The smallest power of two, from 256 to 2048, whose product takes `seconds` or more. The best of a few tries
    counts: on a busy machine a single try of a small product may take that long by accident."""
    size = 256
    while size < 2048:
        left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
        if min(_samples(lambda a=left, b=right: a @ b, 3)) >= seconds:
            break
        size *= 2
    return size


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    return timing.steady_seconds(call, device) if device.type == "cuda" else statistics.median(_samples(call))


def _samples(call: Callable[[], object], count: int = SAMPLES) -> list[float]:
    call()
    return [_seconds(call) for _ in range(count)]


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began

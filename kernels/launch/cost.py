"""What the ops and their kernels cost: FLOPs and bytes from shapes alone, and a rough estimate of a launch's time.

Three things, each built on the one before:

- *Ops*, forward and backward: the least they need. FLOPs are those of the matrix products (a multiplication and an
  addition are two); the elementwise ones, which run beside them, are not counted. Bytes are of device memory: every
  matrix that a kernel of the plan reads or writes, once, with nothing kept in caches from one kernel to the next.
  Left out as small: vectors (biases, norm and scale parameters, row statistics) and the position table, which is one
  image's tokens. The plan is the fused block of five kernels, LN + QKV, attention, proj + residual, LN + fc1 +
  activation, fc2 + residual, with row statistics and LayerNorm's gradient made in the epilogues of their neighbours.
  What today's kernels move beyond it is said in the head of each kernel's file.
- *Launches*: what one launch of a kernel needs, for `triton.jit(launch_metadata=...)`, which Triton's profiler
  (Proton) reads. Triton evaluates it only when a profiler asks.
- *Estimates* of a launch's seconds with a config on an architecture. They rank candidates and promise no time: nothing
  here was measured, and caches, clocks and instruction mixes are not modelled.

Sizes are in elements, `itemsize` in bytes an element; gradients of weights are float32 (float64 for float64).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch

from .hardware import Arch
from .request import (
    MAX_PARTIALS,
    AttentionConfig,
    Config,
    GemmConfig,
    LibraryConfig,
    Prologue,
    Request,
    RowConfig,
    TmaConfig,
    ceil_div,
    split_head,
    tiling,
)
from .validity import shared_memory


@dataclass(frozen=True)
class Cost:
    """flops: of matrix products; bytes: of device memory, read and written."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Rates:
    """What a device reaches: FLOP/s in one dtype, bytes/s of device memory."""

    flops_per_s: float
    bytes_per_s: float


def bound_seconds(cost: Cost, rates: Rates) -> float:
    """The least time for `cost`: products and memory traffic overlap perfectly (the roofline, doi
    10.1145/1498765.1498785)."""
    return max(cost.flops / rates.flops_per_s, cost.bytes / rates.bytes_per_s)


def gemm(m: int, n: int, k: int, itemsize: int, extra: int = 0) -> Cost:
    """An (m, k) by (k, n) product; extra: elements that its epilogue reads or writes beside the result."""
    return Cost(2.0 * m * n * k, (m * k + k * n + m * n + extra) * itemsize)


def weight_gradient(rows: int, inputs: int, outputs: int, itemsize: int) -> Cost:
    """dy^T x over `rows` tokens, dy (rows, outputs), x (rows, inputs), the result in the accumulator's dtype."""
    return Cost(
        2.0 * rows * inputs * outputs, rows * (inputs + outputs) * itemsize + inputs * outputs * _wide(itemsize)
    )


def _wide(itemsize: int) -> int:
    return max(itemsize, 4)


# ---- The ops -----------------------------------------------------------------------------------------------------


def row_statistics(rows: int, columns: int, itemsize: int) -> Cost:
    """Mean and 1/sqrt(var + eps) of each row."""
    return Cost(0.0, rows * columns * itemsize)


def column_sum(rows: int, columns: int, itemsize: int) -> Cost:
    """Sum over rows."""
    return Cost(0.0, rows * columns * itemsize)


def layer_norm_forward(rows: int, columns: int, itemsize: int) -> Cost:
    """x read, y written."""
    return Cost(0.0, 2 * rows * columns * itemsize)


def layer_norm_backward(rows: int, columns: int, itemsize: int, residual: bool = False) -> Cost:
    """dy and x read, dx written; residual: with the gradient that is added to dx."""
    return Cost(0.0, (3 + residual) * rows * columns * itemsize)


def layer_norm_linear_forward(rows: int, inputs: int, outputs: int, itemsize: int) -> Cost:
    """linear(layer_norm(x)): one product."""
    return gemm(rows, outputs, inputs, itemsize)


def layer_norm_linear_input_gradient(
    rows: int, inputs: int, outputs: int, itemsize: int, residual: bool = False
) -> Cost:
    """The gradient of x: one product, LayerNorm's gradient in its epilogue, which reads x; residual: with the gradient
    that is added to dx."""
    return gemm(rows, inputs, outputs, itemsize, extra=(1 + residual) * rows * inputs)


def layer_norm_linear_backward(rows: int, inputs: int, outputs: int, itemsize: int, residual: bool = False) -> Cost:
    """The gradients of x and the weight: two products."""
    return layer_norm_linear_input_gradient(rows, inputs, outputs, itemsize, residual) + weight_gradient(
        rows, inputs, outputs, itemsize
    )


def linear_residual_forward(rows: int, inputs: int, outputs: int, itemsize: int, residual: bool = True) -> Cost:
    """residual + scales * linear(x): one product."""
    return gemm(rows, outputs, inputs, itemsize, extra=residual * rows * outputs)


def linear_residual_backward(rows: int, inputs: int, outputs: int, itemsize: int) -> Cost:
    """The gradients of x and the weight: two products. The residual's is dout itself."""
    return gemm(rows, inputs, outputs, itemsize) + weight_gradient(rows, inputs, outputs, itemsize)


def fc1_forward(rows: int, inputs: int, hidden: int, itemsize: int, gated: bool = False, saved: bool = False) -> Cost:
    """activation(linear(layer_norm(x))) -> (rows, hidden): one product. gated: of 2 * hidden columns, gate and value
    (SwiGLU), combined in its epilogue; saved: the pre-activation is written too."""
    outputs = (1 + gated) * hidden
    written = rows * (hidden + saved * outputs)
    return Cost(2.0 * rows * inputs * outputs, (rows * inputs + inputs * outputs + written) * itemsize)


def fc2_input_gradient(rows: int, hidden: int, outputs: int, itemsize: int, gated: bool = False) -> Cost:
    """The gradient of fc1's output: dout fc2 times the activation's derivative, from the pre-activation, with the
    activated tensor, made again, written for fc2's weight gradient. One product."""
    return gemm(rows, hidden, outputs, itemsize, extra=rows * hidden * (4 if gated else 2))


def layer_norm_mlp_forward(
    rows: int, inputs: int, hidden: int, outputs: int, itemsize: int, gated=False, saved=False, residual=True
) -> Cost:
    """residual + scales * fc2(activation(fc1(layer_norm(x)))): two products. hidden: columns that fc2 reads; gated,
    saved: see `fc1_forward`."""
    return fc1_forward(rows, inputs, hidden, itemsize, gated, saved) + linear_residual_forward(
        rows, hidden, outputs, itemsize, residual
    )


def layer_norm_mlp_backward(
    rows: int, inputs: int, hidden: int, outputs: int, itemsize: int, gated=False, residual=True
) -> Cost:
    """All gradients, from the saved pre-activation: four products."""
    return (
        fc2_input_gradient(rows, hidden, outputs, itemsize, gated)
        + weight_gradient(rows, hidden, outputs, itemsize)
        + layer_norm_linear_backward(rows, inputs, (1 + gated) * hidden, itemsize, residual)
    )


def _attention(batch: int, tokens: int, num_heads: int, head_dim: int, itemsize: int, products: int, tensors: int):
    """`products` of (tokens, tokens, head_dim) a head, `tensors` of (tokens, head_dim) a head."""
    heads = batch * num_heads
    return Cost(2.0 * products * heads * tokens**2 * head_dim, tensors * heads * tokens * head_dim * itemsize)


def attention_forward(batch: int, tokens: int, num_heads: int, head_dim: int, itemsize: int) -> Cost:
    """q, k, v read, the output written; two products."""
    return _attention(batch, tokens, num_heads, head_dim, itemsize, products=2, tensors=4)


def attention_backward(
    batch: int, tokens: int, num_heads: int, head_dim: int, itemsize: int, delta: bool = True
) -> Cost:
    """q, k, v and dout read, dq, dk, dv written, in one kernel; five products, the scores being made again. delta: the
    output is read as well, for the row sums of out * dout, which may come from the kernel that makes dout."""
    return _attention(batch, tokens, num_heads, head_dim, itemsize, products=5, tensors=7 + delta)


def attention_backward_dq(batch: int, tokens: int, num_heads: int, head_dim: int, itemsize: int) -> Cost:
    """The first of the two backward kernels: q, k, v, out, dout read, dq written; three products."""
    return _attention(batch, tokens, num_heads, head_dim, itemsize, products=3, tensors=6)


def attention_backward_dkdv(batch: int, tokens: int, num_heads: int, head_dim: int, itemsize: int) -> Cost:
    """The second: q, k, v, dout read, dk, dv written; four products."""
    return _attention(batch, tokens, num_heads, head_dim, itemsize, products=4, tensors=6)


def patch_embed_forward(
    batch: int, patches: int, tokens: int, pixels: int, embed_dim: int, itemsize: int, pixel_size: int | None = None
) -> Cost:
    """`patches` an image, of `pixels` values (C * ph * pw) each, of pixel_size bytes (None: itemsize), to `tokens` rows
    an image, prefix included: one product."""
    return _patch_product(batch, patches, tokens, pixels, embed_dim, itemsize, pixel_size, itemsize)


def patch_embed_backward(
    batch: int, patches: int, tokens: int, pixels: int, embed_dim: int, itemsize: int, pixel_size: int | None = None
) -> Cost:
    """The gradient of the weight; that of the image, which training does not need, is not in it. One product."""
    return _patch_product(batch, patches, tokens, pixels, embed_dim, itemsize, pixel_size, _wide(itemsize))


def _patch_product(batch, patches, tokens, pixels, embed_dim, itemsize, pixel_size, weight_size) -> Cost:
    image = batch * patches * pixels * (itemsize if pixel_size is None else pixel_size)
    moved = image + batch * tokens * embed_dim * itemsize + pixels * embed_dim * weight_size
    return Cost(2.0 * batch * patches * pixels * embed_dim, moved)


# ---- Launches: (grid, metadata, args) -> what Triton's profiler reads --------------------------------------------


def _matrix_bytes(*values) -> int:
    """Bytes of the tensors of two or more axes among `values`, of an expanded axis once."""
    total = 0
    for value in values:
        if isinstance(value, torch.Tensor) and value.dim() > 1:
            sizes = (size for size, stride in zip(value.shape, value.stride(), strict=True) if stride)
            total += math.prod(sizes) * value.element_size()
    return total


def _metrics(metadata, about: str, cost: Cost, itemsize: int) -> dict:
    """Proton's keys: FLOPs by the operands' width in bits, bytes; the name groups equal launches."""
    metrics = {"name": f"{metadata.name} [{about}]", "bytes": cost.bytes}
    return metrics | {f"flops{8 * itemsize}": cost.flops} if cost.flops else metrics


def gemm_launch(grid, metadata, args: dict) -> dict:
    """`launch_metadata` of `gemm.gemm_kernel`: every matrix that loaders and epilogue are given, once."""
    m, n, k = (args["tokens"] if args[size] is None else args[size] for size in "MNK")
    moved = _matrix_bytes(*args["a"], *args["b"], *args["target"])
    made_of = " ".join(args[role].__name__ for role in ("LOAD_A", "LOAD_B", "EPILOGUE"))
    cost = Cost(gemm(m, n, k, 0).flops, moved)
    return _metrics(metadata, f"{made_of}, M={m} N={n} K={k}", cost, args["DTYPE"].primitive_bitwidth // 8)


def tma_launch(grid, metadata, args: dict) -> dict:
    """`launch_metadata` of `gemm.tma_kernel`."""
    m, n, k = args["tokens"], args["N"], args["K"]
    moved = _matrix_bytes(args["a"].base, args["b"].base, *args["target"])
    made_of = f"{args['EPILOGUE'].__name__}, M={m} N={n} K={k}"
    return _metrics(metadata, made_of, Cost(gemm(m, n, k, 0).flops, moved), args["a"].base.element_size())


def apply_launch(grid, metadata, args: dict) -> dict:
    """`launch_metadata` of `twin.apply_kernel`."""
    m, n = (args["tokens"] if args[size] is None else args[size] for size in "MN")
    cost = Cost(0.0, _matrix_bytes(*args["source"], *args["target"]))
    return _metrics(metadata, f"{args['LOAD'].__name__} {args['EPILOGUE'].__name__}, M={m} N={n}", cost, 0)


def sections_launch(grid, metadata, args: dict) -> dict:
    """`launch_metadata` of `fold.sections_kernel`."""
    moved = _matrix_bytes(*(value for section in args["sections"] for value in section))
    return _metrics(metadata, args["SECTION"].__name__, Cost(0.0, moved), 0)


def _attention_launch(of_op, grid, metadata, args: dict) -> dict:
    qkv, tokens = args["qkv_ptr"], args["N"]
    heads, head_dim = qkv.shape[-2:]
    batch = ceil_div(math.prod(qkv.shape[:-3]), tokens)  # of packed sequences, as if all were as long as the longest
    others = _matrix_bytes(*args["masks"], args.get("dbias_ptr"))
    cost = of_op(batch, tokens, heads, head_dim, qkv.element_size()) + Cost(0.0, others)
    about = f"B={batch} N={tokens} H={heads} d={head_dim}"
    return _metrics(metadata, about, cost, qkv.element_size())


# `launch_metadata` of the three kernels of attention.
attention_launch = partial(_attention_launch, attention_forward)
attention_backward_dq_launch = partial(_attention_launch, attention_backward_dq)
attention_backward_dkdv_launch = partial(_attention_launch, attention_backward_dkdv)


def _rows_launch(matrices, grid, metadata, args: dict) -> dict:
    """matrices: of args, those that a row-wise kernel reads or writes."""
    x = args["x_ptr"]
    rows, columns = x.shape
    moved = sum(args[name] is not None for name in matrices) * rows * columns * x.element_size()
    return _metrics(metadata, f"rows={rows} columns={columns}", Cost(0.0, moved), x.element_size())


# `launch_metadata` of the row-wise kernels.
layer_norm_launch = partial(_rows_launch, ("x_ptr", "y_ptr"))


def stream_launch(grid, metadata, args: dict) -> dict:
    """`launch_metadata` of the small kernels of `transformer_block`."""
    rows, columns = args["rows"], args["columns"]
    moved = _matrix_bytes(args["x_ptr"], args["copy_ptr"])
    return _metrics(metadata, f"rows={rows} columns={columns}", Cost(0.0, moved), args["x_ptr"].element_size())


layer_norm_backward_launch = partial(_rows_launch, ("dy_ptr", "x_ptr", "dx_ptr", "dresidual_ptr"))
column_sum_launch = partial(_rows_launch, ("x_ptr",))


# ---- Estimates ---------------------------------------------------------------------------------------------------

# Shares of the data sheet's rates that the best code reaches: planning figures for an H100 (790 of 989 bf16 TFLOP/s,
# 3.0 of 3.35 TB/s), taken for every architecture.
REACHED_FLOPS, REACHED_BANDWIDTH = 0.8, 0.9
# Of what is reached: by the depth K of a product, for filling and draining its pipeline (the shape of Hopper's table in
# Triton's Gluon tutorial on persistent kernels), and by BLOCK_M * BLOCK_N / (BLOCK_M + BLOCK_N), products an operand
# loaded: 64x64, 64x128, 128x128, 128x192, 128x256 (a rule of thumb).
DEPTH_SHARE = ((192, 0.62), (384, 0.75), (768, 0.83), (1024, 0.85), (2048, 0.89), (4096, 0.92))
TILE_SHARE = ((32, 0.60), (42.7, 0.80), (64, 0.93), (76.8, 0.98), (85.3, 1.0))
# Of that again, where an operand is computed with between memory and the tensor cores (a rule of thumb).
TRANSFORMED_SHARE = 0.7
_BARE = Prologue("matrix", None, plain=True)
# What the library is taken to choose among.
LIBRARY_TILES = tuple(
    GemmConfig(m, n, 64, warps, 3, SPLIT_K=split)
    for m, n, warps in ((128, 256, 8), (128, 128, 8), (128, 64, 4), (64, 64, 4))
    for split in (1, 4)
)
# Softmax beside the products leaves attention this share (planning figures: 400 and 330 TFLOP/s of an H100's 790).
ATTENTION_SHARE, ATTENTION_BACKWARD_SHARE = 0.5, 0.42
# Each kernel's cost, products a tile of scores, and share.
_ATTENTION = {
    "attention_forward": (attention_forward, 2, ATTENTION_SHARE),
    "attention_backward_dq": (attention_backward_dq, 3, ATTENTION_BACKWARD_SHARE),
    "attention_backward_dkdv": (attention_backward_dkdv, 4, ATTENTION_BACKWARD_SHARE),
}
# From load to data, clock cycles (arXiv 2402.13499 has about 470 for A100 and H100).
LATENCY_CYCLES = 480
# Instructions an element of a row-wise kernel takes, load, reductions and store together (a rule of thumb).
ROW_INSTRUCTIONS = 20
# A kernel inside a replayed graph, start to start, beyond its work (a planning figure).
LAUNCH_SECONDS = 1.5e-6


def request_cost(request: Request) -> Cost:
    """What the launch that `request` states needs at least, every operand in request.dtype. A gemm's epilogue is taken
    to write one matrix and to read none."""
    itemsize = request.dtype.itemsize
    if request.kernel == "gemm":
        m, n, k = request.shape
        return weight_gradient(k, n, m, itemsize) if request.parts.epilogue.sums else gemm(m, n, k, itemsize)
    if request.kernel in _ATTENTION:
        return _ATTENTION[request.kernel][0](*request.shape, itemsize)
    rows, columns = request.shape
    return Cost(0.0, _matrices_moved(request) * rows * columns * itemsize)


def _matrices_moved(request: Request) -> int:
    """How many matrices of (rows, columns) a row-wise kernel reads or writes."""
    moves = {"layer_norm_statistics": 1, "layer_norm_forward": 2, "column_sum": 1}
    return moves.get(request.kernel, 3 + request.parts.residual)


def request_seconds(request: Request, config: Config, arch: Arch, sms: int | None = None) -> float:
    """An estimate, not a promise: seconds of the launch that `request` states, with `config`, on an otherwise idle
    `arch` of `sms` multiprocessors (None: those of `arch.gpu`), each with the rates of one of `arch.gpu`'s.

    Every operand is taken to be in request.dtype, and an epilogue to write one matrix and read none. Products of 16-bit
    operands are taken to run on tensor cores, those of wider ones in full precision without them. Whether the config is
    valid is not asked: that is `validity.why_invalid`'s.
    """
    if type(config) is LibraryConfig:
        return _library_seconds(request, arch, sms)
    programs, steps, step_seconds = _PROGRAMS[type(config)](request, config, arch)
    shared = shared_memory(config, request, arch)
    moved, later = request_cost(request).bytes, LAUNCH_SECONDS
    if getattr(config, "SPLIT_K", 1) > 1:  # partial results, which a second kernel adds
        m, n, _ = request.shape
        part = m * n * _wide(request.dtype.itemsize)
        moved += (config.SPLIT_K - 1) * part
        later += _memory_seconds((config.SPLIT_K + 1) * part, arch) + LAUNCH_SECONDS
    compute = _seconds_of_programs(programs, steps, step_seconds, config, arch, shared, sms)
    return max(compute, _memory_seconds(moved, arch)) + later


def _library_seconds(request: Request, arch: Arch, sms: int | None) -> float:
    """The library's product, by the best of its tiles, and the passes over memory before and after it."""
    product = request.parts
    m, n, k = request.shape
    bare = request._replace(parts=request.parts._replace(left=_BARE, right=_BARE))
    seconds = min(request_seconds(bare, tile, arch, sms) for tile in LIBRARY_TILES)
    as_it_is = (
        product.left.plain and product.left_dtype == request.dtype,
        product.right.plain and product.right_dtype == request.dtype,
        product.epilogue.library is not None,
    )
    stored = m * n * (2 if product.epilogue.wide and request.dtype.itemsize == 2 else 1)
    passes = [size for size, done in zip((m * k, k * n, stored), as_it_is, strict=True) if not done]
    return seconds + _memory_seconds(2 * sum(passes) * request.dtype.itemsize, arch) + len(passes) * LAUNCH_SECONDS


def _gemm_programs(request: Request, config: GemmConfig, arch: Arch) -> tuple[int, int, float]:
    """How many programs a launch has, the steps of each, and the seconds of a step on a multiprocessor."""
    m, n, k = request.shape
    depth = ceil_div(k, config.SPLIT_K)
    tiles = ceil_div(m, config.BLOCK_M) * ceil_div(n, config.BLOCK_N) * config.SPLIT_K
    intensity = config.BLOCK_M * config.BLOCK_N / (config.BLOCK_M + config.BLOCK_N)
    share = _interpolate(DEPTH_SHARE, depth) * _interpolate(TILE_SHARE, intensity)
    if request.parts.left.transforms or request.parts.right.transforms:
        share *= TRANSFORMED_SHARE
    flops = 2 * config.BLOCK_M * config.BLOCK_N * config.BLOCK_K
    return tiles, ceil_div(depth, config.BLOCK_K), flops / (share * _flops_of_sm(request.dtype.itemsize, arch))


def _attention_programs(request: Request, config: AttentionConfig, arch: Arch) -> tuple[int, int, float]:
    batch, _, num_heads, head_dim = request.shape
    _, products, share = _ATTENTION[request.kernel]
    fit = tiling(request, config)
    flops = 2 * products * fit.tiles * config.BLOCK_ROWS * sum(fit.widths) * sum(split_head(head_dim))
    step_seconds = flops / (fit.programs * fit.steps * share * _flops_of_sm(request.dtype.itemsize, arch))
    return batch * num_heads * fit.programs, fit.steps, step_seconds


def _row_programs(request: Request, config: RowConfig, arch: Arch) -> tuple[int, int, float]:
    rows, columns = request.shape
    tiles = ceil_div(rows, config.BLOCK_ROWS)
    steps = ceil_div(tiles, MAX_PARTIALS.get(request.kernel, tiles))
    moved = _matrices_moved(request) * config.BLOCK_ROWS * min(columns, config.BLOCK_D) * request.dtype.itemsize
    instructions = ROW_INSTRUCTIONS * config.BLOCK_ROWS * config.BLOCK_D
    # An SM's share of the bandwidth, and of the data sheet's FLOP/s, which count two an instruction.
    step_seconds = arch.sms * max(_memory_seconds(moved, arch), 2 * instructions / arch.flops_32)
    return ceil_div(tiles, steps) * ceil_div(columns, config.BLOCK_D), steps, step_seconds


_PROGRAMS = {
    GemmConfig: _gemm_programs,
    TmaConfig: _gemm_programs,
    AttentionConfig: _attention_programs,
    RowConfig: _row_programs,
}


def _seconds_of_programs(programs: int, steps: int, step_seconds: float, config, arch, shared: int, sms) -> float:
    """Equal programs dealt out over the multiprocessors; those that fit on one together share its rates and hide each
    other's latency, which no step of them all is shorter than, beyond what its stages prefetch."""
    resident = max(1, min(arch.shared // (shared + 1024), arch.warps // config.num_warps, arch.blocks))
    latency = LATENCY_CYCLES / arch.clock / max(1, getattr(config, "num_stages", 1) - 1)
    full, rest = divmod(ceil_div(programs, arch.sms if sms is None else sms), resident)
    waves = full * max(resident * step_seconds, latency)
    return steps * (waves + (max(rest * step_seconds, latency) if rest else 0.0))


def _flops_of_sm(itemsize: int, arch: Arch) -> float:
    return REACHED_FLOPS * (arch.flops_16 if itemsize <= 2 else arch.flops_32) / arch.sms


def _memory_seconds(moved: float, arch: Arch) -> float:
    return moved / (REACHED_BANDWIDTH * arch.bandwidth)


def _interpolate(points: tuple[tuple[float, float], ...], x: float) -> float:
    """Linear in log(x) between the points, in proportion to x below the first, the last value above the last."""
    below, share = points[0]
    if x <= below:
        return share * x / below
    for (low, share), (high, higher) in zip(points, points[1:], strict=False):
        if x <= high:
            return share + (higher - share) * math.log(x / low) / math.log(high / low)
    return points[-1][1]

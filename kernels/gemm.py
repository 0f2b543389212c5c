"""The one matrix product of the package: every GEMM is `gemm_kernel` with two loaders and an epilogue.

    out = EPILOGUE(sum over k of LOAD_A(i, k) * LOAD_B(k, j))

A prologue's load is a Triton function (i, j, source, size_i, size_j) -> tile, where `source` is the tuple of pointers
and strides that it reads; it may transform what it loads (normalise, scale, gather patches), so no transformed tensor
ever exists in memory. An epilogue's store is a Triton function (accumulator, i, j, part, target, size_i, size_j,
ACTIVATION) that finishes and stores a tile.
The reduction may be cut in `parts`, each of which stores its own float32 partial sums, added by one reduction after.
Forward products, gradients of inputs and gradients of weights differ in nothing but these.

A call must move (M K + K N + M N) * itemsize bytes; each operation's file says what it adds. `launch/cost.py` has
it all as functions.
"""

import torch
import triton
import triton.language as tl

from ._math import TRITON_DTYPES, accumulator_dtype, widen
from .launch import cost
from .launch.choice import choose
from .launch.launcher import launch as launch_kernel
from .launch.request import Config, Epilogue, GemmConfig, Product, Prologue, Request, ceil_div, uses_tf32
from .reduce import partial_sums, total


@triton.jit
def load_matrix(i, j, source, size_i, size_j):
    """A tile of a matrix (size_i, size_j), one of whose strides is 1."""
    ptr, stride_i, stride_j = source
    offset = i.to(tl.int64)[:, None] * stride_i + j.to(tl.int64)[None, :] * stride_j
    return tl.load(ptr + offset, mask=(i < size_i)[:, None] & (j < size_j)[None, :], other=0.0)


@triton.jit
def load_scaled(i, j, source, size_i, size_j):
    """A tile of tokens times a scale per sample (drop path) and one per channel (layer-scale); each may be None."""
    ptr, row_scale_ptr, column_scale_ptr, rows_per_sample, stride = source
    x = load_matrix(i, j, (ptr, stride, 1), size_i, size_j)
    if row_scale_ptr is not None:
        x = widen(x) * widen(tl.load(row_scale_ptr + i // rows_per_sample, mask=i < size_i, other=0.0))[:, None]
    if column_scale_ptr is not None:
        x = widen(x) * widen(tl.load(column_scale_ptr + j, mask=j < size_j, other=0.0))[None, :]
    return x


@triton.jit
def load_normalised(i, j, source, size_i, size_j):
    """A tile of LayerNorm(tokens), from the rows' statistics."""
    ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, stride = source
    row_ok, column_ok = i < size_i, j < size_j
    mean = tl.load(mean_ptr + i, mask=row_ok, other=0.0)
    rstd = tl.load(rstd_ptr + i, mask=row_ok, other=0.0)
    weight = tl.load(weight_ptr + j, mask=column_ok, other=0.0).to(mean.dtype)
    bias = tl.load(bias_ptr + j, mask=column_ok, other=0.0).to(mean.dtype)
    x = load_matrix(i, j, (ptr, stride, 1), size_i, size_j).to(mean.dtype)
    return (x - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]


MATRIX = Prologue("matrix", load_matrix, plain=True)
SCALED = Prologue("scaled", load_scaled, transforms=True, registers=(64, 64, 48))
NORMALISED = Prologue("normalised", load_normalised, transforms=True, registers=(48, 64, 64))


@triton.jit
def store(acc, i, j, part, target, size_i, size_j, ACTIVATION: tl.constexpr):
    """Store the tile, into partial sums number `part` when there are several."""
    (ptr,) = target
    offset = part.to(tl.int64) * size_i * size_j + i.to(tl.int64)[:, None] * size_j + j[None, :]
    tl.store(ptr + offset, acc.to(ptr.dtype.element_ty), mask=(i < size_i)[:, None] & (j < size_j)[None, :])


@triton.jit
def store_linear(acc, i, j, part, target, size_i, size_j, ACTIVATION: tl.constexpr):
    """residual + row_scale * column_scale * (acc + bias); each of the four may be None."""
    ptr, bias_ptr, column_scale_ptr, row_scale_ptr, residual_ptr, rows_per_sample, residual_stride = target
    row_ok, column_ok = i < size_i, j < size_j
    mask = row_ok[:, None] & column_ok[None, :]
    row = i.to(tl.int64)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + j, mask=column_ok, other=0.0).to(acc.dtype)[None, :]
    if column_scale_ptr is not None:
        acc *= tl.load(column_scale_ptr + j, mask=column_ok, other=0.0).to(acc.dtype)[None, :]
    if row_scale_ptr is not None:
        acc *= tl.load(row_scale_ptr + i // rows_per_sample, mask=row_ok, other=0.0).to(acc.dtype)[:, None]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + (row * residual_stride + j[None, :]), mask=mask, other=0.0).to(acc.dtype)
    tl.store(ptr + (row * size_j + j[None, :]), acc.to(ptr.dtype.element_ty), mask=mask)


INPUT_GRADIENT = Epilogue("input_gradient", store, bare=True, input_gradient=True)
SUMS = Epilogue("sums", store, bare=True, sums=True)
LINEAR = Epilogue("linear", store_linear)
LINEAR_RESIDUAL = Epilogue("linear_residual", store_linear, beside=True)


@triton.jit(launch_metadata=cost.gemm_launch, do_not_specialize=["tokens"])
def gemm_kernel(
    a,  # what LOAD_A loads from: the left operand (M, K)
    b,  # what LOAD_B loads from: the right operand (K, N)
    target,  # what EPILOGUE writes to, (M, N), and reads
    tokens,  # the M or K that is None: no kernel is compiled anew for another number of tokens
    M,
    N,
    K,
    k_per_part,
    LOAD_A: tl.constexpr,
    LOAD_B: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    rows = tokens if M is None else M
    depth = tokens if K is None else K
    # Tiles in groups of GROUP_M rows, so that programs that run together share their operands in L2.
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N)
    part = tl.program_id(0) // (tiles_m * tiles_n)
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    group = tile // (GROUP_M * tiles_n)
    group_rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    i = (group * GROUP_M + within % group_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = within // group_rows * BLOCK_N + tl.arange(0, BLOCK_N)

    k_first = part * k_per_part
    k_last = tl.minimum(k_first + k_per_part, depth)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in range(k_first, k_last, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = LOAD_A(i, k, a, rows, depth).to(DTYPE)
        right = LOAD_B(k, j, b, depth, N).to(DTYPE)
        acc = tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=ACC)
    EPILOGUE(acc, i, j, part, target, rows, N, ACTIVATION)


def _constants(request: Request, config: GemmConfig) -> dict:
    left, right, epilogue, activation, *_ = request.parts
    return dict(
        LOAD_A=left.load,
        LOAD_B=right.load,
        EPILOGUE=epilogue.store,
        ACTIVATION=activation,
        DTYPE=TRITON_DTYPES[request.dtype],
        ACC=TRITON_DTYPES[accumulator_dtype(request.dtype)],
        PRECISION="tf32" if request.tf32 else "ieee",
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        GROUP_M=config.GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def transposed(weight: torch.Tensor) -> tuple:
    """The source of `MATRIX` for the transpose of weight (O, K): right operand of a forward product."""
    return weight, 1, weight.stride(0)


def plain(matrix: torch.Tensor) -> tuple:
    """The source of `MATRIX` for a matrix with unit stride along its rows, itself."""
    return matrix, matrix.stride(0), 1


def launch(
    left: Prologue,
    a: tuple,
    right: Prologue,
    b: tuple,
    epilogue: Epilogue,
    target: tuple,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    activation: str | None = None,
    outputs: int = 1,
    config: Config | None = None,
) -> tuple[torch.Tensor, ...]:
    """Launch `gemm_kernel` over an (m, n) output with reduction k, shape being (m, n, k), operands rounded to `dtype`.

    a, b and target are what the prologues and the epilogue take, the matrix itself first. The first `outputs` of
    target's entries are the tensors that the epilogue writes, which are returned, but for None. config: the one chosen
    for the request, if not given.
    """
    m, n, k = shape
    if m == 0 or n == 0:
        return _tensors(target[:outputs])
    made_of = Product(left, right, epilogue, activation, a[0].dtype, b[0].dtype, target[0].dtype)
    request = Request("gemm", shape, dtype, made_of, uses_tf32(dtype))
    device = a[0].device
    if config is None:

        def repeat(config: Config) -> tuple[torch.Tensor, ...]:
            return launch(left, a, right, b, epilogue, target, shape, dtype, activation, outputs, config)

        config = choose(request, device, repeat)
    grid = (ceil_div(m, config.BLOCK_M) * ceil_div(n, config.BLOCK_N) * config.SPLIT_K, 1, 1)
    k_per_part = ceil_div(ceil_div(k, config.SPLIT_K), config.BLOCK_K) * config.BLOCK_K
    # The gradient of a weight sums over tokens, every other product makes a row of each.
    sizes = (k, m, n, None) if epilogue.sums else (m, None, n, k)
    launch_kernel(gemm_kernel, _constants, request, config, device, grid, (a, b, target, *sizes, k_per_part))
    return _tensors(target[:outputs])


def _tensors(values: tuple) -> tuple[torch.Tensor, ...]:
    return tuple([value for value in values if value is not None])


def weight_gradient(dy, right: Prologue, x, inputs: int, dtype: torch.dtype, wide: bool = False, config=None):
    """dy^T X, summed over tokens: dy (M, O), X (M, inputs) as loaded by `right` from `x`, rounded to `dtype`.

    Returns (O, inputs) in it, or, wide, in float32 (float64 for float64), so that what is made of it is rounded once.
    config: see `launch`.
    """
    tokens, outputs = dy.shape
    acc = accumulator_dtype(dtype)
    out_dtype = acc if wide else dtype
    if not (tokens and outputs and inputs):
        return torch.zeros(outputs, inputs, dtype=out_dtype, device=dy.device)
    shape, left = (outputs, inputs, tokens), transposed(dy)
    if config is None:
        made_of = Product(MATRIX, right, SUMS, None, dy.dtype, x[0].dtype, acc)
        request = Request("gemm", shape, dtype, made_of, uses_tf32(dtype))

        def repeat(config: Config) -> tuple[torch.Tensor, ...]:
            return (weight_gradient(dy, right, x, inputs, dtype, wide, config),)

        config = choose(request, dy.device, repeat)
    partial = partial_sums(config.SPLIT_K, (outputs, inputs), acc, out_dtype, dy.device)
    launch(MATRIX, left, right, x, SUMS, (partial,), shape, dtype, config=config)
    return total(partial, config.SPLIT_K, out_dtype)


def library_weight_gradient(dy, x, dtype: torch.dtype, wide: bool = False) -> torch.Tensor:
    """dy^T x by the library, dy (M, O) and x (M, inputs) rounded to `dtype`. Returns (O, inputs) in it, or, wide, in
    float32 (float64 for float64)."""
    left, right = dy.to(dtype).t(), x.to(dtype)
    acc = accumulator_dtype(dtype)
    if not wide or acc == dtype:
        return torch.mm(left, right)
    if left.is_cuda and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=acc)  # which PyTorch has for CUDA only
    return torch.mm(left.to(acc), right.to(acc))

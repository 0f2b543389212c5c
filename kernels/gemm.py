"""The one matrix product of the package: every GEMM is `gemm_kernel` with two loaders and an epilogue.

    out = EPILOGUE(sum over k of LOAD_A(i, k) * LOAD_B(k, j))

A loader is a Triton function (i, j, source) -> tile, where `source` is the tuple of pointers, sizes and strides that
it reads; it may transform what it loads (normalise, scale, gather patches), so no transformed tensor ever exists in
memory. An epilogue is a Triton function (accumulator, i, j, part, target, ACTIVATION) that finishes and stores a tile.
The reduction may be cut in `parts`, each of which stores its own float32 partial sums, added by one reduction after.
Forward products, gradients of inputs and gradients of weights differ in nothing but these.

A call must move (M K + K N + M N) * itemsize bytes; each operation's file says what it adds. `cost.py` has it all as
functions.
"""

import torch
import triton
import triton.language as tl

from . import configs, cost
from ._math import TRITON_DTYPES, accumulator_dtype, float32_precision, widen


@triton.jit
def load_matrix(i, j, source):
    """A tile of a matrix of (size_i, size_j) elements, one of whose strides is 1."""
    ptr, size_i, size_j, stride_i, stride_j = source
    offset = i.to(tl.int64)[:, None] * stride_i + j.to(tl.int64)[None, :] * stride_j
    return tl.load(ptr + offset, mask=(i < size_i)[:, None] & (j < size_j)[None, :], other=0.0)


@triton.jit
def load_scaled(i, j, source):
    """A tile of tokens times a scale per sample (drop path) and one per channel (layer-scale); each may be None."""
    ptr, row_scale_ptr, column_scale_ptr, rows_per_sample, size_i, size_j, stride = source
    x = load_matrix(i, j, (ptr, size_i, size_j, stride, 1))
    if row_scale_ptr is not None:
        x = widen(x) * widen(tl.load(row_scale_ptr + i // rows_per_sample, mask=i < size_i, other=0.0))[:, None]
    if column_scale_ptr is not None:
        x = widen(x) * widen(tl.load(column_scale_ptr + j, mask=j < size_j, other=0.0))[None, :]
    return x


@triton.jit
def load_normalised(i, j, source):
    """A tile of LayerNorm(tokens), from the rows' statistics."""
    ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, size_i, size_j, stride = source
    row_ok, column_ok = i < size_i, j < size_j
    mean = tl.load(mean_ptr + i, mask=row_ok, other=0.0)
    rstd = tl.load(rstd_ptr + i, mask=row_ok, other=0.0)
    weight = tl.load(weight_ptr + j, mask=column_ok, other=0.0).to(mean.dtype)
    bias = tl.load(bias_ptr + j, mask=column_ok, other=0.0).to(mean.dtype)
    x = load_matrix(i, j, (ptr, size_i, size_j, stride, 1)).to(mean.dtype)
    return (x - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]


@triton.jit
def store(acc, i, j, part, target, ACTIVATION: tl.constexpr):
    """Store the tile, into partial sums number `part` when there are several."""
    ptr, size_i, size_j = target
    offset = part.to(tl.int64) * size_i * size_j + i.to(tl.int64)[:, None] * size_j + j[None, :]
    tl.store(ptr + offset, acc.to(ptr.dtype.element_ty), mask=(i < size_i)[:, None] & (j < size_j)[None, :])


@triton.jit
def store_linear(acc, i, j, part, target, ACTIVATION: tl.constexpr):
    """residual + row_scale * column_scale * (acc + bias); each of the four may be None."""
    ptr, bias_ptr, column_scale_ptr, row_scale_ptr, residual_ptr, rows_per_sample, residual_stride, size_i, size_j = (
        target
    )
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


@triton.jit
def matmul_loop(
    acc,
    LOAD_A: tl.constexpr,
    a,
    LOAD_B: tl.constexpr,
    b,
    i,
    j,
    k_first,
    k_last,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + A[i, k_first:k_last] B[k_first:k_last, j], the operands rounded to DTYPE."""
    for start in range(k_first, k_last, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = LOAD_A(i, k, a).to(DTYPE)
        right = LOAD_B(k, j, b).to(DTYPE)
        acc = tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit(launch_metadata=cost.gemm_launch)
def gemm_kernel(
    LOAD_A: tl.constexpr,
    a,
    LOAD_B: tl.constexpr,
    b,
    EPILOGUE: tl.constexpr,
    target,
    M,
    N,
    K,
    k_per_part,
    ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Tiles in groups of GROUP_M rows, so that programs that run together share their operands in L2.
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    part = tl.program_id(0) // (tiles_m * tiles_n)
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    group = tile // (GROUP_M * tiles_n)
    group_rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    i = (group * GROUP_M + within % group_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = within // group_rows * BLOCK_N + tl.arange(0, BLOCK_N)

    k_first = part * k_per_part
    k_last = tl.minimum(k_first + k_per_part, K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    acc = matmul_loop(acc, LOAD_A, a, LOAD_B, b, i, j, k_first, k_last, DTYPE, PRECISION, BLOCK_K)
    EPILOGUE(acc, i, j, part, target, ACTIVATION)


def transposed_weight(weight):
    """The source of `gemm.load_matrix` for the transpose of weight (O, K): right operand of a forward product."""
    outputs, inputs = weight.shape
    return (weight, inputs, outputs, 1, weight.stride(0))


def plain_weight(weight):
    """The source of `gemm.load_matrix` for weight (O, K) itself: right operand of the gradient of an input."""
    return (weight, *weight.shape, weight.stride(0), 1)


def launch(
    load_a, a, load_b, b, epilogue, target, m, n, k, dtype, device, *, activation=None, traits=(), outputs=1
) -> None:
    """Launch `gemm_kernel` over an (m, n) output with reduction k, operands rounded to `dtype` (a torch dtype).

    The first `outputs` of target's entries are the tensors that the epilogue writes. traits: what the request (see
    `configs.Request`) says beside the names of loaders, epilogue and activation.
    """
    if m == 0 or n == 0:
        return

    def attempt(config):
        _launch(config, load_a, a, load_b, b, epilogue, target, m, n, k, dtype, activation)
        return tuple(tensor for tensor in target[:outputs] if tensor is not None)

    if activation is not None:
        traits = (activation, *traits)
    request = _request(load_a, a, load_b, b, epilogue, m, n, k, dtype, target[0].dtype, traits)
    configs.run(request, device, attempt)


def weight_gradient(dy, load_x, x, inputs: int, dtype, *, traits=()) -> torch.Tensor:
    """dy^T X, summed over tokens: dy (M, O), X (M, inputs) as loaded by `load_x` from `x`, rounded to `dtype`.

    Returns (O, inputs) in float32 (float64 for float64), so that what is made of it is rounded once.
    """
    tokens, outputs = dy.shape
    acc = accumulator_dtype(dtype)
    if not (tokens and outputs and inputs):
        return torch.zeros(outputs, inputs, dtype=acc, device=dy.device)
    product = (load_matrix, (dy, outputs, tokens, 1, dy.stride(0)), load_x, x, store)
    sizes = (outputs, inputs, tokens, dtype)

    def attempt(config):
        partial = torch.empty(config.SPLIT_K, outputs, inputs, dtype=acc, device=dy.device)
        _launch(config, *product, (partial, outputs, inputs), *sizes, None)
        return (partial[0] if config.SPLIT_K == 1 else partial.sum(dim=0),)

    return configs.run(_request(*product, *sizes, acc, ("partial", *traits)), dy.device, attempt)[0]


def library_weight_gradient(dy, x, dtype, wide: bool = False) -> torch.Tensor:
    """dy^T x by the library, dy (M, O) and x (M, inputs) rounded to `dtype`. Returns (O, inputs) in it, or, wide, in
    float32 (float64 for float64)."""
    left, right = dy.to(dtype).t(), x.to(dtype)
    acc = accumulator_dtype(dtype)
    if not wide or acc == dtype:
        return torch.mm(left, right)
    if left.is_cuda and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=acc)  # which PyTorch has for CUDA only
    return torch.mm(left.to(acc), right.to(acc))


def _request(load_a, a, load_b, b, epilogue, m, n, k, dtype, out_dtype, traits) -> configs.Request:
    traits = (load_a.__name__, load_b.__name__, epilogue.__name__, *traits)
    for name, other in (("left", a[0].dtype), ("right", b[0].dtype), ("out", out_dtype)):
        if other != dtype:
            traits += (f"{name}={configs.dtype_name(other)}",)
    return configs.Request("gemm", (m, n, k), dtype, traits + configs.precision_traits(dtype))


def _launch(config, load_a, a, load_b, b, epilogue, target, m, n, k, dtype, activation) -> None:
    tiles = triton.cdiv(m, config.BLOCK_M) * triton.cdiv(n, config.BLOCK_N)
    gemm_kernel[(tiles * config.SPLIT_K,)](
        load_a,
        a,
        load_b,
        b,
        epilogue,
        target,
        m,
        n,
        k,
        triton.cdiv(triton.cdiv(k, config.SPLIT_K), config.BLOCK_K) * config.BLOCK_K,
        ACTIVATION=activation,
        DTYPE=TRITON_DTYPES[dtype],
        ACC=TRITON_DTYPES[accumulator_dtype(dtype)],
        PRECISION=float32_precision(),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        GROUP_M=config.GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )

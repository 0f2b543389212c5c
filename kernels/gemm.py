"""The one matrix product of the package: every GEMM is `gemm_kernel` with two loaders and an epilogue.

    out = EPILOGUE(sum over k of LOAD_A(i, k) * LOAD_B(k, j))

Loaders and epilogues stand in `tiles`; forward products, gradients of inputs and gradients of weights differ in nothing
but these. The reduction may be cut in `parts`, each of which stores its own float32 partial sums, added by one
reduction after. A launch may be the library's instead, with the same loaders and epilogue: see `twin`.

A call must move (M K + K N + M N) * itemsize bytes; each operation's file says what it adds. `launch/cost.py` has
it all as functions.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import twin
from ._math import TRITON_DTYPES, accumulator_dtype
from .launch import cost
from .launch.choice import choose
from .launch.hardware import num_sms
from .launch.launcher import launch as launch_kernel
from .launch.request import (
    Config,
    Epilogue,
    GemmConfig,
    LibraryConfig,
    Product,
    Prologue,
    Request,
    TmaConfig,
    ceil_div,
    uses_tf32,
)
from .reduce import partial_sums, total
from .tiles import MATRIX, SUMS, transposed


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


@triton.jit
def finish(acc, m, n, target, size_i, size_j, EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, SUBTILES: tl.constexpr):
    """EPILOGUE of the tile at (m, n) in SUBTILES parts, columns after columns: it holds no more than a part at once."""
    if SUBTILES == 1:
        i, j = m + tl.arange(0, acc.shape[0]), n + tl.arange(0, acc.shape[1])
        EPILOGUE(acc, i, j, tl.program_id(1), target, size_i, size_j, ACTIVATION)
    else:
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, HALF)), (0, 2, 1)))
        finish(left, m, n, target, size_i, size_j, EPILOGUE, ACTIVATION, SUBTILES // 2)
        finish(right, m, n + HALF, target, size_i, size_j, EPILOGUE, ACTIVATION, SUBTILES // 2)


@triton.jit(launch_metadata=cost.tma_launch, do_not_specialize=["tokens"])
def tma_kernel(
    a,  # descriptor of the left operand (tokens, K), in tiles (BLOCK_M, BLOCK_K)
    b,  # descriptor of the right operand: (K, N) in tiles (BLOCK_K, BLOCK_N), or TRANSPOSED
    target,  # what EPILOGUE writes to, (tokens, N), and reads
    tokens,
    N,
    K,
    programs,
    TRANSPOSED: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(tokens, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # flatten=True would have the epilogue in the code twice.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, flatten=False):
        group = tile // (GROUP_M * tiles_n)
        group_rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        within = tile % (GROUP_M * tiles_n)
        m = (group * GROUP_M + within % group_rows) * BLOCK_M
        n = within // group_rows * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            right = b.load([n, k]).T if TRANSPOSED else b.load([k, n])
            acc = tl.dot(a.load([m, k]), right, acc)
        finish(acc, m, n, target, tokens, N, EPILOGUE, ACTIVATION, SUBTILES)


def _tma_constants(request: Request, config: TmaConfig) -> dict:
    return dict(
        TRANSPOSED=not request.parts.epilogue.input_gradient,
        EPILOGUE=request.parts.epilogue.store,
        ACTIVATION=request.parts.activation,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        GROUP_M=config.GROUP_M,
        SUBTILES=config.SUBTILES,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def as_tma_takes(source: tuple, dtype: torch.dtype, axis: int) -> bool:
    """Whether a source of MATRIX in `dtype` is a matrix that TMA can load tiles of, `axis` along its rows: rows of unit
    stride, and all of them on addresses that 16 divides."""
    matrix, *strides = source
    apart = strides[1 - axis] * dtype.itemsize
    return (
        matrix.dtype == dtype and strides[axis] == 1 and apart > 0 and apart % 16 == 0 and matrix.data_ptr() % 16 == 0
    )


def _launch_tma(request: Request, config: TmaConfig, a: tuple, b: tuple, target: tuple, tiles: int) -> None:
    m, n, k = request.shape
    device = a[0].device
    left = TensorDescriptor(a[0], [m, k], [a[1], 1], [config.BLOCK_M, config.BLOCK_K])
    if request.parts.epilogue.input_gradient:
        right = TensorDescriptor(b[0], [k, n], [b[1], 1], [config.BLOCK_K, config.BLOCK_N])
    else:
        right = TensorDescriptor(b[0], [n, k], [b[2], 1], [config.BLOCK_N, config.BLOCK_K])
    programs = min(tiles, config.PROGRAMS * num_sms(device))
    args = (left, right, target, m, n, k, programs)
    launch_kernel(tma_kernel, (programs, 1, 1), device)(*args, **_tma_constants(request, config))


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


def launch(
    left: Prologue,
    a: tuple,
    right: Prologue,
    b: tuple,
    epilogue: Epilogue,
    target: tuple,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    activation: str | int | None = None,
    outputs: int = 1,
    config: Config | None = None,
    by_tile: Callable[[int, int], tuple] | None = None,
) -> tuple[torch.Tensor, ...]:
    """A product over an (m, n) output with reduction k, shape being (m, n, k), operands rounded to `dtype`, m tokens.

    a, b and target are what the prologues and the epilogue take, the matrix itself first. The first `outputs` of
    target's entries are the tensors that the epilogue writes, which are returned, but for None. config: the one chosen
    for the request, if not given. by_tile: from the numbers of row and column tiles, further tensors for the end of
    target, which the epilogue fills tile by tile along their first axis, or None; they are returned as well.
    """
    m, n, k = shape
    if m == 0 or n == 0:
        return *_tensors(target[:outputs]), *(by_tile(0, 0) if by_tile else ())
    plain_16_bit = left is MATRIX and right is MATRIX and dtype.itemsize == 2
    axis = 1 if epilogue.input_gradient else 0
    tma = plain_16_bit and k > 0 and as_tma_takes(a, dtype, 1) and as_tma_takes(b, dtype, axis)
    made_of = Product(left, right, epilogue, activation, a[0].dtype, b[0].dtype, target[0].dtype, tma)
    request = Request("gemm", shape, dtype, made_of, uses_tf32(dtype))
    device = a[0].device
    if config is None:
        product = (left, a, right, b, epilogue)

        def repeat(config: Config) -> tuple[torch.Tensor, ...]:
            filled = launch(*product, target, shape, dtype, activation, outputs, config, by_tile)
            done = len(_tensors(target[:outputs]))
            return *filled[:done], *[partial.sum(0) for partial in filled[done:] if partial is not None]

        config = choose(request, device, repeat)
    tiles_m, tiles_n = ceil_div(m, config.BLOCK_M), ceil_div(n, config.BLOCK_N)
    partial = by_tile(tiles_m, tiles_n * config.SUBTILES) if by_tile else ()
    filled = (*target, *partial)  # `repeat` has partial sums of its own
    if type(config) is LibraryConfig:
        twin.launch(request, config, a, b, filled)
        return *_tensors(target[:outputs]), *partial
    if type(config) is TmaConfig:
        _launch_tma(request, config, a, b, filled, tiles_m * tiles_n)
        return *_tensors(target[:outputs]), *partial
    grid, all_of_k = (tiles_m * tiles_n, 1, 1), ceil_div(k, config.BLOCK_K) * config.BLOCK_K
    args = (a, b, filled, m, None, n, k, all_of_k)
    launch_kernel(gemm_kernel, grid, device)(*args, **_constants(request, config))
    return *_tensors(target[:outputs]), *partial


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
    made_of = Product(MATRIX, right, SUMS, None, dy.dtype, x[0].dtype, acc)
    request = Request("gemm", (outputs, inputs, tokens), dtype, made_of, uses_tf32(dtype))
    if config is None:

        def repeat(config: Config) -> tuple[torch.Tensor, ...]:
            return (weight_gradient(dy, right, x, inputs, dtype, wide, config),)

        config = choose(request, dy.device, repeat)
    partial = partial_sums(config.SPLIT_K, (outputs, inputs), acc, out_dtype, dy.device)
    if type(config) is LibraryConfig:
        twin.launch(request, config, transposed(dy), x, (partial,))
        return partial
    tiles = ceil_div(outputs, config.BLOCK_M) * ceil_div(inputs, config.BLOCK_N)
    k_per_part = ceil_div(ceil_div(tokens, config.SPLIT_K), config.BLOCK_K) * config.BLOCK_K
    args = (transposed(dy), x, (partial,), tokens, outputs, inputs, None, k_per_part)
    launch_kernel(gemm_kernel, (tiles * config.SPLIT_K, 1, 1), dy.device)(*args, **_constants(request, config))
    return total(partial, config.SPLIT_K, out_dtype)

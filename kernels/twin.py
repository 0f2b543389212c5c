"""A product in the library's form: torch.mm between two small kernels, made of the functions that `gemm_kernel` is.

    operands that are not plain: PROLOGUE, written to memory; of another dtype: rounded by the library
    torch.mm, or where the epilogue is a bias, torch.addmm
    the epilogue, where the library did not do all of it: EPILOGUE of the stored product

So every launch has a floor: the library and a pass or two over memory. The product between is stored in the dtype of
the operands, rounded, as PyTorch's own is, but for epilogues that need all of it.
A call must move what `gemm` must, and beyond it twice each operand that is written, and twice the product where an
epilogue follows.
"""

import contextlib

import torch
import triton
import triton.language as tl

from ._math import TRITON_DTYPES, accumulator_dtype
from .launch import cost
from .launch.launcher import launch as launch_kernel
from .launch.request import LibraryConfig, Prologue, Request, ceil_div
from .tiles import INPUT_GRADIENT, MATRIX, matrix_product, plain


@triton.jit(launch_metadata=cost.apply_launch, do_not_specialize=["tokens"])
def apply_kernel(
    source,  # what LOAD loads from: a matrix (M, N)
    target,  # what EPILOGUE writes to, (M, N), and reads
    tokens,  # the M or N that is None: no kernel is compiled anew for another number of tokens
    M,
    N,
    LOAD: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tokens if M is None else M
    columns = tokens if N is None else N
    tiles = tl.cdiv(columns, BLOCK_N)
    i = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    EPILOGUE(LOAD(i, j, source, rows, columns).to(ACC), i, j, tl.program_id(1), target, rows, columns, ACTIVATION)


def launch(request: Request, config: LibraryConfig, a: tuple, b: tuple, target: tuple) -> None:
    """The product that `request` states of what its prologues load from a and b, finished by its epilogue."""
    m, n, k = request.shape
    product = request.parts
    over_tokens = product.epilogue.sums
    x = _operand(request, config, product.left, a, (m, k), 1 if over_tokens else 0)
    y = _operand(request, config, product.right, b, (k, n), 0 if over_tokens else None)
    # An autograd.Function's forward may run under autocast, where torch.mm would round its operands.
    kind = x.device.type
    rounding = kind != "meta" and torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if rounding else contextlib.nullcontext():
        if product.epilogue.library is not None and product.epilogue.library(x, y, target):
            return
        wide = product.epilogue.wide
        stored = matrix_product(x, y, accumulator_dtype(request.dtype) if wide else request.dtype)
    del x, y
    _apply(request, config, MATRIX, plain(stored), product.epilogue.store, target, (m, n), 0)


def _operand(request: Request, config, prologue: Prologue, source: tuple, shape, axis) -> torch.Tensor:
    """What `prologue` loads of `source`, as a matrix in the products' dtype. axis: the one that counts tokens."""
    matrix, *strides = source
    if prologue is MATRIX:
        return matrix.as_strided(shape, strides).to(request.dtype)
    out = torch.empty(shape, dtype=request.dtype, device=matrix.device)
    _apply(request, config, prologue, source, INPUT_GRADIENT.store, (out,), shape, axis)
    return out


def _apply(request: Request, config, prologue, source, store, target, shape, axis: int | None) -> None:
    constants = dict(
        LOAD=prologue.load,
        EPILOGUE=store,
        ACTIVATION=request.parts.activation,
        ACC=TRITON_DTYPES[accumulator_dtype(request.dtype)],
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
    )
    rows, columns = shape
    sizes = {0: (rows, None, columns), 1: (columns, rows, None), None: (0, rows, columns)}[axis]
    grid = (ceil_div(rows, config.BLOCK_M) * ceil_div(columns, config.BLOCK_N), 1, 1)
    launch_kernel(apply_kernel, grid, source[0].device)(source, target, *sizes, **constants)

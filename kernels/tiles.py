"""What every product is put together from: prologues, which load an operand's tile, and epilogues, which finish and
store a tile of the result.

A prologue's load is a Triton function (i, j, source, size_i, size_j) -> tile, where `source` is the tuple of pointers
and strides that it reads; it may transform what it loads (normalise, scale, gather patches), so no transformed tensor
ever exists in memory. An epilogue's store is a Triton function (accumulator, i, j, part, target, size_i, size_j,
ACTIVATION) that finishes and stores a tile.
"""

import torch
import triton
import triton.language as tl

from ._math import widen
from .launch.request import Epilogue, Prologue


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


def matrix_product(x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None):
    """x y, summed in float32 (float64 for float64) and rounded once to `dtype`, which is no narrower than theirs."""
    if dtype == x.dtype:
        return torch.mm(x, y, out=out)
    if x.is_cuda and torch.version.hip is None:
        return torch.mm(x, y, out_dtype=dtype) if out is None else torch.mm(x, y, out_dtype=dtype, out=out)
    return torch.mm(x.to(dtype), y.to(dtype), out=out)  # PyTorch has the others for CUDA only


def _store_by_library(x, y, target) -> bool:
    matrix_product(x, y, target[0].dtype, out=target[0])
    return True


def _linear_by_library(x, y, target) -> bool:
    out, bias, *others, _, _ = target
    if out.dtype != x.dtype or any(other is not None for other in others):
        return False
    if bias is None:
        torch.mm(x, y, out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, y, out=out)
    return True


INPUT_GRADIENT = Epilogue("input_gradient", store, bare=True, input_gradient=True, library=_store_by_library)
SUMS = Epilogue("sums", store, bare=True, sums=True, library=_store_by_library)
LINEAR = Epilogue("linear", store_linear, library=_linear_by_library)
LINEAR_RESIDUAL = Epilogue("linear_residual", store_linear, beside=True)


def transposed(weight: torch.Tensor) -> tuple:
    """The source of `MATRIX` for the transpose of weight (O, K): right operand of a forward product."""
    return weight, 1, weight.stride(0)


def plain(matrix: torch.Tensor) -> tuple:
    """The source of `MATRIX` for a matrix with unit stride along its rows, itself."""
    return matrix, matrix.stride(0), 1

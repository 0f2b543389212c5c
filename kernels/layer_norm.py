"""LayerNorm over the last axis, forward and backward, and its row statistics alone.

Fused: mean (corrected once, so that it is exact for a constant row, whose deviations a small eps would blow up),
variance (of the deviations, not by sums of squares), normalisation, affine; backward: the gradient of
the input, the gradient that flows past the norm on a residual path added to it, and both parameter gradients.
Saved for backward: mean and 1/sqrt(var + eps), float32, one each a row. Recomputed: the normalised values.
A call must move, for M rows of D elements of size s: forward 2 M D s (the statistics alone: M D s), backward 3 M D s
(4 M D s with a residual gradient); the statistics and the float32 partials of the parameter gradients are small beside.
"""

import torch
import triton
import triton.language as tl

from . import configs, cost
from ._math import TRITON_DTYPES, accumulator_dtype

MAX_PARTIALS = 256


@triton.jit(launch_metadata=cost.layer_norm_launch)
def layer_norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,  # None: statistics only
    mean_ptr,
    rstd_ptr,
    rows,
    columns,
    stride,
    eps,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    j = tl.arange(0, BLOCK_D)
    row_ok, column_ok = i < rows, j < columns
    mask = row_ok[:, None] & column_ok[None, :]
    row = i.to(tl.int64)[:, None]
    x = tl.load(x_ptr + (row * stride + j[None, :]), mask=mask, other=0.0).to(ACC)
    mean = tl.sum(x, axis=1) / columns
    mean += tl.sum(tl.where(column_ok[None, :], x - mean[:, None], 0.0), axis=1) / columns
    centred = tl.where(column_ok[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / columns + eps)
    tl.store(mean_ptr + i, mean, mask=row_ok)
    tl.store(rstd_ptr + i, rstd, mask=row_ok)
    if y_ptr is not None:
        weight = tl.load(weight_ptr + j, mask=column_ok, other=0.0).to(ACC)
        bias = tl.load(bias_ptr + j, mask=column_ok, other=0.0).to(ACC)
        y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
        tl.store(y_ptr + (row * columns + j[None, :]), y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(launch_metadata=cost.layer_norm_backward_launch)
def layer_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    dresidual_ptr,  # None, or the gradient that reaches x past the norm
    dx_ptr,
    dweight_partial_ptr,
    dbias_partial_ptr,
    rows,
    columns,
    stride_dy,
    stride_x,
    stride_dresidual,
    rows_per_program,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    part = tl.program_id(0)
    j = tl.arange(0, BLOCK_D)
    column_ok = j < columns
    weight = tl.load(weight_ptr + j, mask=column_ok, other=0.0).to(ACC)[None, :]
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_D), ACC)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_D), ACC)
    first = part * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for start in range(first, last, BLOCK_ROWS):
        i = start + tl.arange(0, BLOCK_ROWS)
        row_ok = i < last
        mask = row_ok[:, None] & column_ok[None, :]
        row = i.to(tl.int64)[:, None]
        x = tl.load(x_ptr + (row * stride_x + j[None, :]), mask=mask, other=0.0).to(ACC)
        dy = tl.load(dy_ptr + (row * stride_dy + j[None, :]), mask=mask, other=0.0).to(ACC)
        mean = tl.load(mean_ptr + i, mask=row_ok, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + i, mask=row_ok, other=0.0)[:, None]
        normalised = tl.where(mask, (x - mean) * rstd, 0.0)
        dweight += dy * normalised
        dbias += dy
        dnormalised = dy * weight
        # dx = rstd * (dn - mean(dn) - n * mean(dn * n)): what changing mean and variance takes back.
        by_mean = (tl.sum(dnormalised, axis=1) / columns)[:, None]
        by_variance = (tl.sum(dnormalised * normalised, axis=1) / columns)[:, None]
        dx = rstd * (dnormalised - by_mean - normalised * by_variance)
        if dresidual_ptr is not None:
            dx += tl.load(dresidual_ptr + (row * stride_dresidual + j[None, :]), mask=mask, other=0.0).to(ACC)
        tl.store(dx_ptr + (row * columns + j[None, :]), dx.to(dx_ptr.dtype.element_ty), mask=mask)
    out = part.to(tl.int64) * columns + j
    tl.store(dweight_partial_ptr + out, tl.sum(dweight, axis=0), mask=column_ok)
    tl.store(dbias_partial_ptr + out, tl.sum(dbias, axis=0), mask=column_ok)


def _launch_forward(x, weight, bias, y, eps):
    rows, columns = x.shape
    acc = accumulator_dtype(x.dtype)
    mean, rstd = (torch.empty(rows, dtype=acc, device=x.device) for _ in range(2))
    if rows:

        def attempt(config):
            layer_norm_kernel[(triton.cdiv(rows, config.BLOCK_ROWS),)](
                x,
                weight,
                bias,
                y,
                mean,
                rstd,
                rows,
                columns,
                x.stride(0),
                eps,
                ACC=TRITON_DTYPES[acc],
                BLOCK_ROWS=config.BLOCK_ROWS,
                BLOCK_D=config.BLOCK_D,
                num_warps=config.num_warps,
            )
            return (mean, rstd) if y is None else (y, mean, rstd)

        kernel = "layer_norm_statistics" if y is None else "layer_norm_forward"
        traits = () if y is None or y.dtype == x.dtype else (f"out={configs.dtype_name(y.dtype)}",)
        configs.run(configs.Request(kernel, (rows, columns), x.dtype, traits), x.device, attempt)
    return mean, rstd


def row_statistics(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1/sqrt(var + eps) of each row of x (M, D): two (M,) tensors, float32 (float64 for float64)."""
    return _launch_forward(x, None, None, None, eps)


def layer_norm_forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype=None):
    """x (M, D) with unit stride along D -> y (M, D) in `dtype`, x's if not given, mean (M,), rstd (M,)."""
    y = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    mean, rstd = _launch_forward(x, weight, bias, y, eps)
    return y, mean, rstd


def layer_norm_backward(dy, x, mean, rstd, weight, dresidual=None):
    """dy (M, D), x (M, D), dresidual (M, D) or None, each with unit stride along D -> dx (M, D) in x's dtype, dweight
    (D,) and dbias (D,) in float32 (float64 for float64)."""
    rows, columns = x.shape
    acc = accumulator_dtype(x.dtype)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows == 0:
        return dx, *(torch.zeros(columns, dtype=acc, device=x.device) for _ in range(2))

    def attempt(config):
        rows_per_program = triton.cdiv(triton.cdiv(rows, MAX_PARTIALS), config.BLOCK_ROWS) * config.BLOCK_ROWS
        parts = triton.cdiv(rows, rows_per_program)
        dweight, dbias = (torch.empty(parts, columns, dtype=acc, device=x.device) for _ in range(2))
        layer_norm_backward_kernel[(parts,)](
            dy,
            x,
            mean,
            rstd,
            weight,
            dresidual,
            dx,
            dweight,
            dbias,
            rows,
            columns,
            dy.stride(0),
            x.stride(0),
            0 if dresidual is None else dresidual.stride(0),
            rows_per_program,
            ACC=TRITON_DTYPES[acc],
            BLOCK_ROWS=config.BLOCK_ROWS,
            BLOCK_D=config.BLOCK_D,
            num_warps=config.num_warps,
        )
        return dx, dweight.sum(dim=0), dbias.sum(dim=0)

    traits = () if dresidual is None else ("residual",)
    return configs.run(configs.Request("layer_norm_backward", (rows, columns), x.dtype, traits), x.device, attempt)

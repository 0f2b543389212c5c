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

from ._math import TRITON_DTYPES, accumulator_dtype
from .launch import cost
from .launch.choice import choose
from .launch.launcher import launch
from .launch.request import Request, RowConfig, Rows, ceil_div, rows_per_program
from .reduce import partial_sums, total


@triton.jit(launch_metadata=cost.layer_norm_launch, do_not_specialize=["rows"])
def layer_norm_kernel(
    x_ptr,  # (rows, columns), unit stride along the columns
    weight_ptr,  # (columns,), or None with y_ptr
    bias_ptr,  # (columns,), or None with y_ptr
    y_ptr,  # (rows, columns) contiguous, or None: statistics only
    mean_ptr,  # (rows,)
    rstd_ptr,  # (rows,)
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


@triton.jit(launch_metadata=cost.layer_norm_backward_launch, do_not_specialize=["rows", "rows_per_program"])
def layer_norm_backward_kernel(
    dy_ptr,  # (rows, columns), unit stride along the columns
    x_ptr,  # (rows, columns), unit stride along the columns
    mean_ptr,  # (rows,)
    rstd_ptr,  # (rows,)
    weight_ptr,  # (columns,)
    dresidual_ptr,  # (rows, columns), unit stride along the columns: the gradient that reaches x past the norm; or None
    dx_ptr,  # (rows, columns) contiguous
    dweight_ptr,  # (parts, columns) contiguous
    dbias_ptr,  # (parts, columns) contiguous
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
    tl.store(dweight_ptr + out, tl.sum(dweight, axis=0).to(dweight_ptr.dtype.element_ty), mask=column_ok)
    tl.store(dbias_ptr + out, tl.sum(dbias, axis=0).to(dbias_ptr.dtype.element_ty), mask=column_ok)


def _constants(request: Request, config: RowConfig) -> dict:
    acc = TRITON_DTYPES[accumulator_dtype(request.dtype)]
    return dict(ACC=acc, BLOCK_ROWS=config.BLOCK_ROWS, BLOCK_D=config.BLOCK_D, num_warps=config.num_warps)


def row_statistics(
    x: torch.Tensor, eps: float, normalised=(None, None, None), statistics=None, config: RowConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1/sqrt(var + eps) of each row of x (M, D): two (M,) tensors, float32 (float64 for float64).

    normalised: weight (D,), bias (D,) and y (M, D), which is filled with the normalised rows. statistics: the two
    tensors to fill; config: the one chosen for the request; made and chosen if not given.
    """
    rows, columns = x.shape
    acc = accumulator_dtype(x.dtype)
    weight, bias, y = normalised
    mean, rstd = statistics or [torch.empty(rows, dtype=acc, device=x.device) for _ in range(2)]
    if rows == 0:
        return mean, rstd
    kernel = "layer_norm_statistics" if y is None else "layer_norm_forward"
    request = Request(kernel, (rows, columns), x.dtype, Rows(out_dtype=None if y is None else y.dtype))
    if config is None:

        def repeat(config: RowConfig) -> tuple[torch.Tensor, ...]:
            row_statistics(x, eps, normalised, (mean, rstd), config)
            return (mean, rstd) if y is None else (y, mean, rstd)

        config = choose(request, x.device, repeat)
    grid = (ceil_div(rows, config.BLOCK_ROWS), 1, 1)
    args = (x, weight, bias, y, mean, rstd, rows, columns, x.stride(0), eps)
    launch(layer_norm_kernel, grid, x.device)(*args, **_constants(request, config))
    return mean, rstd


def layer_norm_forward(x, weight, bias, eps: float, dtype: torch.dtype | None = None):
    """x (M, D) with unit stride along D -> y (M, D) in `dtype`, x's if not given, mean (M,), rstd (M,)."""
    y = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    return y, *row_statistics(x, eps, (weight, bias, y))


def layer_norm_backward(dy, x, mean, rstd, weight, bias, dresidual=None):
    """dy (M, D), x (M, D), dresidual (M, D) or None, each with unit stride along D -> dx (M, D) in x's dtype, dweight
    (D,) and dbias (D,) in weight's and bias's, summed in float32 (float64 for float64)."""
    rows, columns = x.shape
    acc = accumulator_dtype(x.dtype)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows == 0:
        return dx, *(torch.zeros(columns, dtype=dtype, device=x.device) for dtype in (weight.dtype, bias.dtype))

    request = Request("layer_norm_backward", (rows, columns), x.dtype, Rows(residual=dresidual is not None))

    def start(config: RowConfig) -> tuple[torch.Tensor, ...]:
        stretch = rows_per_program("layer_norm_backward", rows, config.BLOCK_ROWS)
        parts = ceil_div(rows, stretch)
        # Two tensors: gradients must not share memory.
        sums = [partial_sums(parts, (columns,), acc, dtype, x.device) for dtype in (weight.dtype, bias.dtype)]
        strides = (dy.stride(0), x.stride(0), 0 if dresidual is None else dresidual.stride(0))
        matrices = (dy, x, mean, rstd, weight, dresidual, dx, *sums)
        args = (*matrices, rows, columns, *strides, stretch)
        launch(layer_norm_backward_kernel, (parts, 1, 1), x.device)(*args, **_constants(request, config))
        return dx, total(sums[0], parts, weight.dtype), total(sums[1], parts, bias.dtype)

    return start(choose(request, x.device, start))

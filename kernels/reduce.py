"""Sums over the rows of a matrix: bias and position gradients.

Fused: the per-sample scale (drop path), and the rounding of the result. Each program sums a stretch of rows in float32
and writes one row of partials; where there are several, the same kernel adds those (`total`), which is how the partial
sums of other kernels end too. No atomics, so the result never depends on the order of the programs.
A call must move rows * columns * itemsize bytes, plus the float32 partials: one row for every 32 or more, 64 at most,
and none where the columns alone occupy the GPU.
"""

import torch
import triton
import triton.language as tl

from ._math import TRITON_DTYPES, accumulator_dtype
from .launch import cost, hardware
from .launch.choice import choose
from .launch.launcher import launch
from .launch.request import Request, RowConfig, Rows, ceil_div, rows_per_program


@triton.jit(launch_metadata=cost.column_sum_launch, do_not_specialize=["rows", "rows_per_program"])
def column_sum_kernel(
    x_ptr,  # (rows, columns), unit stride along the columns
    row_scale_ptr,  # (samples,), or None
    partial_ptr,  # (parts, columns) contiguous
    rows,
    columns,
    stride,
    rows_per_sample,
    rows_per_program,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    part = tl.program_id(1)
    j = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), ACC)
    first = part * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for start in range(first, last, BLOCK_ROWS):
        i = start + tl.arange(0, BLOCK_ROWS)
        x = tl.load(
            x_ptr + (i.to(tl.int64)[:, None] * stride + j[None, :]),
            mask=(i < last)[:, None] & (j < columns)[None, :],
            other=0.0,
        ).to(ACC)
        if row_scale_ptr is not None:
            x *= tl.load(row_scale_ptr + i // rows_per_sample, mask=i < last, other=0.0).to(ACC)[:, None]
        total += x
    sums = tl.sum(total, axis=0).to(partial_ptr.dtype.element_ty)
    tl.store(partial_ptr + part.to(tl.int64) * columns + j, sums, mask=j < columns)


def _constants(request: Request, config: RowConfig) -> dict:
    return dict(
        ACC=TRITON_DTYPES[accumulator_dtype(request.dtype)],
        BLOCK_ROWS=config.BLOCK_ROWS,
        BLOCK_COLUMNS=config.BLOCK_D,
        num_warps=config.num_warps,
    )


def rows_per_sample(rows: int, row_scale: torch.Tensor | None) -> int:
    """How many rows of a matrix share a scale; 1 where there is none, or there are no rows."""
    return rows // len(row_scale) if rows and row_scale is not None else 1


def column_sum(x, row_scale=None, dtype: torch.dtype | None = None):
    """Sum over rows of x (rows, columns), row i times row_scale[i // (rows / samples)], in float32 (float64 for
    float64). Returns (columns,) rounded to `dtype`, if that is not None."""
    rows, columns = x.shape
    acc = accumulator_dtype(x.dtype)
    dtype = dtype or acc
    if rows == 0:
        return torch.zeros(columns, dtype=dtype, device=x.device)
    request = Request("column_sum", (rows, columns), x.dtype, Rows())

    def start(config: RowConfig) -> tuple[torch.Tensor, ...]:
        # Columns that occupy the whole GPU leave no partial sums.
        enough = ceil_div(columns, config.BLOCK_D) >= hardware.num_sms(x.device)
        stretch = rows if enough else rows_per_program("column_sum", rows, config.BLOCK_ROWS)
        parts = ceil_div(rows, stretch)
        partial = partial_sums(parts, (columns,), acc, dtype, x.device)
        _launch(x, row_scale, partial, stretch, request, config)
        return (total(partial, parts, dtype),)

    return start(choose(request, x.device, start))[0]


def partial_sums(parts: int, shape: tuple[int, ...], acc: torch.dtype, dtype: torch.dtype, device) -> torch.Tensor:
    """Room for `parts` partial sums (parts, *shape) in `acc`, which `total` is to add up and to round to `dtype`; where
    there is one, it is the total, rounded as it is stored."""
    if parts == 1:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.empty(parts, *shape, dtype=acc, device=device)


def total(partial: torch.Tensor, parts: int, dtype: torch.dtype) -> torch.Tensor:
    """The sum of `partial_sums`, rounded to `dtype`."""
    if parts == 1:
        return partial
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    if out.numel():
        x = partial.view(parts, -1)
        request = Request("column_sum", tuple(x.shape), x.dtype, Rows())
        _launch(x, None, out, parts, request, choose(request, x.device))
    return out


def _launch(x, row_scale, partial, stretch: int, request: Request, config: RowConfig) -> None:
    """Sum each stretch of `stretch` rows of x (rows, columns) into a row of `partial`."""
    rows, columns = x.shape
    grid = (ceil_div(columns, config.BLOCK_D), ceil_div(rows, stretch), 1)
    args = (x, row_scale, partial, rows, columns, x.stride(0), rows_per_sample(rows, row_scale), stretch)
    launch(column_sum_kernel, grid, x.device)(*args, **_constants(request, config))

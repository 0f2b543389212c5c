"""Sums over the rows of a matrix: bias and position gradients.

Fused: the per-sample scale (drop path). Each program sums a stretch of rows in float32 and writes one row of
partials; one reduction adds those. No atomics, so the result never depends on the order of the programs.
A call must move rows * columns * itemsize bytes, plus the float32 partials: one row for every 32 or more, 64 at most.
"""

import torch
import triton
import triton.language as tl

from . import configs, cost
from ._math import TRITON_DTYPES, accumulator_dtype

MAX_PARTIALS = 64


@triton.jit(launch_metadata=cost.column_sum_launch)
def column_sum_kernel(
    x_ptr,
    row_scale_ptr,  # None, or one scale per sample
    partial_ptr,
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
    tl.store(partial_ptr + part.to(tl.int64) * columns + j, tl.sum(total, axis=0), mask=j < columns)


def rows_per_sample(rows: int, row_scale: torch.Tensor | None) -> int:
    """How many rows of a matrix share a scale; 1 where there is none, or there are no rows."""
    return rows // len(row_scale) if rows and row_scale is not None else 1


def column_sum(x: torch.Tensor, row_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Sum over rows of x (rows, columns), row i times row_scale[i // (rows / samples)]. Returns (columns,) float32
    (float64 for float64)."""
    rows, columns = x.shape
    acc = accumulator_dtype(x.dtype)
    if rows == 0:
        return torch.zeros(columns, dtype=acc, device=x.device)

    def attempt(config):
        rows_per_program = triton.cdiv(triton.cdiv(rows, MAX_PARTIALS), config.BLOCK_ROWS) * config.BLOCK_ROWS
        parts = triton.cdiv(rows, rows_per_program)
        partial = torch.empty(parts, columns, dtype=acc, device=x.device)
        column_sum_kernel[(triton.cdiv(columns, config.BLOCK_D), parts)](
            x,
            row_scale,
            partial,
            rows,
            columns,
            x.stride(0),
            rows_per_sample(rows, row_scale),
            rows_per_program,
            ACC=TRITON_DTYPES[acc],
            BLOCK_ROWS=config.BLOCK_ROWS,
            BLOCK_COLUMNS=config.BLOCK_D,
            num_warps=config.num_warps,
        )
        return (partial.sum(dim=0),)

    return configs.run(configs.Request("column_sum", (rows, columns), x.dtype), x.device, attempt)[0]

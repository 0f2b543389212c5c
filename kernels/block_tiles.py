"""What a block's products end in, and the two small kernels beside them: the rows' statistics, the LayerNorm folded
into a product, the residual stream, and the gradients of these. `transformer_block` says what is for what.
"""

import triton
import triton.language as tl

from ._math import activate, activate_with_gradient, before_norm
from .launch import cost
from .launch.request import Epilogue

GROUP = tl.constexpr(64)  # how many columns a row's partial statistics are of


# ---------------------------------------------------------------------------------------------------------------------
# Row statistics


@triton.jit
def store_statistics(x, i, j, stats_ptr, size_i, size_j):
    """Of each row and group of columns of the tile x, the sum and the squared deviations from the group's own mean, in
    stats (2, groups, size_i)."""
    WITHIN: tl.constexpr = x.shape[1] // GROUP
    column_ok = j < size_j
    ok = tl.reshape(column_ok, (WITHIN, GROUP))[None, :, :]
    x = tl.reshape(tl.where(column_ok[None, :], x, 0.0), (x.shape[0], WITHIN, GROUP))
    count = tl.sum(tl.reshape(column_ok, (WITHIN, GROUP)).to(x.dtype), axis=1)
    sums = tl.sum(x, axis=2)
    apart = tl.where(ok, x - (sums / tl.maximum(count, 1.0)[None, :])[:, :, None], 0.0)
    group = tl.min(j, axis=0) // GROUP + tl.arange(0, WITHIN)
    groups = tl.cdiv(size_j, GROUP)
    offset = group.to(tl.int64)[None, :] * size_i + i[:, None]
    mask = (i < size_i)[:, None] & (group < groups)[None, :]
    tl.store(stats_ptr + offset, sums, mask=mask)
    tl.store(stats_ptr + (groups.to(tl.int64) * size_i + offset), tl.sum(apart * apart, axis=2), mask=mask)


@triton.jit
def load_statistics(stats_ptr, i, rows, columns, eps):
    """mean and 1/sqrt(var + eps) of rows i, from what `store_statistics` left (doi 10.2307/2683386)."""
    row_ok = i < rows
    groups = tl.cdiv(columns, GROUP)
    sums_ptr = stats_ptr + i
    mean = tl.load(sums_ptr, mask=row_ok, other=0.0)
    for _ in range(1, groups):
        sums_ptr += rows
        mean += tl.load(sums_ptr, mask=row_ok, other=0.0)
    mean /= columns
    sums_ptr, squares_ptr = stats_ptr + i, stats_ptr + (groups.to(tl.int64) * rows + i)
    squares = tl.zeros_like(mean)
    for group in range(groups):
        count = tl.minimum(columns - group * GROUP, GROUP)
        apart = tl.load(sums_ptr, mask=row_ok, other=0.0) / count - mean
        squares += tl.load(squares_ptr, mask=row_ok, other=0.0) + count * apart * apart
        sums_ptr += rows
        squares_ptr += rows
    return mean, 1.0 / tl.sqrt(squares / columns + eps)


@triton.jit(launch_metadata=cost.stream_launch, do_not_specialize=["rows"])
def stream_kernel(
    x_ptr,  # (rows, columns), unit stride along the columns
    copy_ptr,  # (rows, columns) contiguous: x less its row's mean; or None
    centre_ptr,  # (rows,): that mean; or None
    stats_ptr,  # (2, groups, rows)
    rows,
    columns,
    stride,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What the first of a row of blocks needs: the rows' statistics and, of a wide stream, the copy."""
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    j = tl.arange(0, BLOCK_D)
    column_ok = j < columns
    mask = (i < rows)[:, None] & column_ok[None, :]
    x = tl.load(x_ptr + (i.to(tl.int64)[:, None] * stride + j[None, :]), mask=mask, other=0.0).to(ACC)
    if copy_ptr is not None:
        centre = tl.sum(x, axis=1) / columns
        x -= centre[:, None]
        tl.store(centre_ptr + i, centre, mask=i < rows)
        out = copy_ptr + (i.to(tl.int64)[:, None] * columns + j[None, :])
        tl.store(out, x.to(copy_ptr.dtype.element_ty), mask=mask)
    store_statistics(x, i, j, stats_ptr, rows, columns)


@triton.jit(launch_metadata=cost.stream_launch, do_not_specialize=["rows"])
def scaled_gradient_kernel(
    x_ptr,  # (rows, columns), unit stride along the columns
    copy_ptr,  # (rows, columns) contiguous: row_scale * x; or None
    row_scale_ptr,  # (samples,), or None
    by_column_ptr,  # (parts, columns): its sums over BLOCK_ROWS rows each; or None
    rows,
    columns,
    stride,
    rows_per_sample,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The gradient of the block's output, scaled and rounded as products read it, and its sums by column."""
    part = tl.program_id(0)
    i = part * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    j = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (i < rows)[:, None] & (j < columns)[None, :]
    row, column = i.to(tl.int64)[:, None], j.to(tl.int64)[None, :]
    x = tl.load(x_ptr + (row * stride + column), mask=mask, other=0.0).to(ACC)
    if row_scale_ptr is not None:
        x *= tl.load(row_scale_ptr + i // rows_per_sample, mask=i < rows, other=0.0).to(ACC)[:, None]
    if copy_ptr is not None:
        tl.store(copy_ptr + (row * columns + column), x.to(copy_ptr.dtype.element_ty), mask=mask)
    if by_column_ptr is not None:
        tl.store(by_column_ptr + part.to(tl.int64) * columns + j, tl.sum(x, axis=0), mask=j < columns)


# ---------------------------------------------------------------------------------------------------------------------
# Epilogues


@triton.jit
def after_norm(acc, i, j, target, size_i, size_j):
    """rstd * (acc - mean * colsum) + bias, stored where wanted. The tiles of the first columns store the rows'
    statistics, where wanted."""
    _, kept_ptr, mean_ptr, rstd_ptr, centre_ptr, before_ptr, stats_ptr, colsum_ptr, bias_ptr, columns, eps = target
    row_ok, column_ok = i < size_i, j < size_j
    mask = row_ok[:, None] & column_ok[None, :]
    offset = i.to(tl.int64)[:, None] * size_j + j[None, :]
    mean, rstd = load_statistics(stats_ptr, i, size_i, columns, eps)
    first = row_ok & (tl.min(j, axis=0) == 0)
    if mean_ptr is not None:
        tl.store(mean_ptr + i, mean, mask=first)
        tl.store(rstd_ptr + i, rstd, mask=first)
    if centre_ptr is not None:
        tl.store(centre_ptr + i, mean + tl.load(before_ptr + i, mask=first, other=0.0), mask=first)
    colsum = tl.load(colsum_ptr + j, mask=column_ok, other=0.0)
    bias = tl.load(bias_ptr + j, mask=column_ok, other=0.0)
    y = (acc - mean[:, None] * colsum[None, :]) * rstd[:, None] + bias[None, :]
    if kept_ptr is not None:
        tl.store(kept_ptr + offset, y.to(kept_ptr.dtype.element_ty), mask=mask)
    return y


@triton.jit
def store_folded(acc, i, j, part, target, size_i, size_j, ACTIVATION: tl.constexpr):
    """rstd * (acc - mean * colsum) + bias, then the activation, if any, with what it is of stored too where wanted."""
    ptr = target[0]
    y = after_norm(acc, i, j, target, size_i, size_j)
    if ACTIVATION is not None:
        y = activate(y, ACTIVATION, ptr.dtype.element_ty)
    mask = (i < size_i)[:, None] & (j < size_j)[None, :]
    tl.store(ptr + (i.to(tl.int64)[:, None] * size_j + j[None, :]), y.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_gated(acc, i, j, part, target, size_i, size_j, ACTIVATION: tl.constexpr):
    """As `store_folded`, columns being gates and values in turns, of which it stores ACTIVATION(gate) * value."""
    ptr = target[0]
    y = after_norm(acc, i, j, target, size_i, size_j)
    PAIRS: tl.constexpr = acc.shape[1] // 2
    gate, value = tl.split(tl.reshape(y, (acc.shape[0], PAIRS, 2)))
    columns = size_j // 2
    j = tl.multiple_of(tl.min(j, axis=0) // 2, PAIRS) + tl.arange(0, PAIRS)
    hidden = activate(gate, ACTIVATION, ptr.dtype.element_ty) * value
    mask = (i < size_i)[:, None] & (j < columns)[None, :]
    tl.store(ptr + (i.to(tl.int64)[:, None] * columns + j[None, :]), hidden.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_stream(acc, i, j, part, target, size_i, size_j, ACTIVATION: tl.constexpr):
    """residual + scales * (acc + bias), the statistics of what is stored, and where the products want a copy, that
    less `centre`, whose statistics they are then."""
    (
        ptr,
        copy_ptr,
        stats_ptr,
        bias_ptr,
        column_scale_ptr,
        row_scale_ptr,
        residual_ptr,
        centre_ptr,
        rows_per_sample,
        stride,
    ) = target
    row_ok, column_ok = i < size_i, j < size_j
    mask = row_ok[:, None] & column_ok[None, :]
    row = i.to(tl.int64)[:, None]
    offset = row * size_j + j[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + j, mask=column_ok, other=0.0).to(acc.dtype)[None, :]
    if column_scale_ptr is not None:
        acc *= tl.load(column_scale_ptr + j, mask=column_ok, other=0.0).to(acc.dtype)[None, :]
    if row_scale_ptr is not None:
        acc *= tl.load(row_scale_ptr + i // rows_per_sample, mask=row_ok, other=0.0).to(acc.dtype)[:, None]
    acc += tl.load(residual_ptr + (row * stride + j[None, :]), mask=mask, other=0.0).to(acc.dtype)
    stored = acc.to(ptr.dtype.element_ty)
    tl.store(ptr + offset, stored, mask=mask)
    x = stored.to(acc.dtype)
    if copy_ptr is not None:
        x -= tl.load(centre_ptr + i, mask=row_ok, other=0.0)[:, None]
        tl.store(copy_ptr + offset, x.to(copy_ptr.dtype.element_ty), mask=mask)
    store_statistics(x, i, j, stats_ptr, size_i, size_j)


@triton.jit
def store_before_norm(dy, y, i, j, target, size_i, size_j):
    """Of dy, the gradient of y, what `before_norm` makes."""
    s_ptr, _, _, mean_ptr, rstd_ptr, colsum_ptr, bias_ptr, by_row_ptr, by_column_ptr = target
    row_ok, column_ok = i < size_i, j < size_j
    mean = tl.load(mean_ptr + i, mask=row_ok, other=0.0)
    rstd = tl.load(rstd_ptr + i, mask=row_ok, other=0.0)
    colsum = tl.load(colsum_ptr + j, mask=column_ok, other=0.0)
    bias = tl.load(bias_ptr + j, mask=column_ok, other=0.0)
    s, by_colsum, by_y, total, t = before_norm(dy, y, mean, rstd, colsum, bias, s_ptr.dtype.element_ty)
    offset = i.to(tl.int64)[:, None] * size_j + j[None, :]
    tl.store(s_ptr + offset, s, mask=row_ok[:, None] & column_ok[None, :])
    row = tl.min(j, axis=0).to(tl.int64) // dy.shape[1] * 2 * size_i + i
    tl.store(by_row_ptr + row, by_colsum, mask=row_ok)
    tl.store(by_row_ptr + (row + size_i), by_y, mask=row_ok)
    column = tl.min(i, axis=0).to(tl.int64) // dy.shape[0] * 2 * size_j + j
    tl.store(by_column_ptr + column, total, mask=column_ok)
    tl.store(by_column_ptr + (column + size_j), t, mask=column_ok)


@triton.jit
def store_derivative(acc, i, j, part, target, size_i, size_j, ACTIVATION: tl.constexpr):
    """dy = acc * ACTIVATION'(y), of which is stored what `before_norm` makes, and the activated tensor again."""
    activated_ptr, y_ptr = target[1], target[2]
    mask = (i < size_i)[:, None] & (j < size_j)[None, :]
    offset = i.to(tl.int64)[:, None] * size_j + j[None, :]
    y = tl.load(y_ptr + offset, mask=mask, other=0.0).to(acc.dtype)
    activated, derivative = activate_with_gradient(y, ACTIVATION, activated_ptr.dtype.element_ty)
    tl.store(activated_ptr + offset, activated.to(activated_ptr.dtype.element_ty), mask=mask)
    store_before_norm(acc * derivative, y, i, j, target, size_i, size_j)


@triton.jit
def store_gated_derivative(acc, i, j, part, target, size_i, size_j, ACTIVATION: tl.constexpr):
    """As `store_derivative`, y's columns being gates and values in turns, two for each of acc's: the gradient of
    ACTIVATION(gate) * value."""
    activated_ptr, y_ptr = target[1], target[2]
    ROWS: tl.constexpr = acc.shape[0]
    PAIRS: tl.constexpr = acc.shape[1]
    row_ok, row, columns = (i < size_i)[:, None], i.to(tl.int64)[:, None], 2 * size_j
    both = tl.multiple_of(2 * tl.min(j, axis=0), 2 * PAIRS) + tl.arange(0, 2 * PAIRS)
    mask = row_ok & (both < columns)[None, :]
    y = tl.load(y_ptr + (row * columns + both[None, :]), mask=mask, other=0.0).to(acc.dtype)
    gate, value = tl.split(tl.reshape(y, (ROWS, PAIRS, 2)))
    activated, derivative = activate_with_gradient(gate, ACTIVATION, activated_ptr.dtype.element_ty)
    hidden = (activated * value).to(activated_ptr.dtype.element_ty)
    tl.store(activated_ptr + (row * size_j + j[None, :]), hidden, mask=row_ok & (j < size_j)[None, :])
    dy = tl.reshape(tl.join(acc * value * derivative, acc * activated), (ROWS, 2 * PAIRS))
    store_before_norm(dy, y, i, both, target, size_i, columns)


@triton.jit
def store_norm_gradient(acc, i, j, part, target, size_i, size_j, ACTIVATION: tl.constexpr):
    """acc = s W' -> the gradient of the norm's input plus the residual's; where the next products want it scaled or
    rounded, a copy; and of that the sums by column."""
    (
        dx_ptr,
        copy_ptr,
        x_ptr,
        mean_ptr,
        rstd_ptr,
        by_row_ptr,
        residual_ptr,
        row_scale_ptr,
        rows_per_sample,
        parts,
        stride,
        by_column_ptr,
    ) = target
    row_ok, column_ok = i < size_i, j < size_j
    mask = row_ok[:, None] & column_ok[None, :]
    row = i.to(tl.int64)[:, None]
    offset = row * size_j + j[None, :]
    sums_ptr = by_row_ptr + i
    by_colsum = tl.load(sums_ptr, mask=row_ok, other=0.0)
    by_y = tl.load(sums_ptr + size_i, mask=row_ok, other=0.0)
    for _ in range(1, parts):
        sums_ptr += 2 * size_i
        by_colsum += tl.load(sums_ptr, mask=row_ok, other=0.0)
        by_y += tl.load(sums_ptr + size_i, mask=row_ok, other=0.0)
    by_colsum /= size_j
    by_y /= size_j
    mean = tl.load(mean_ptr + i, mask=row_ok, other=0.0)
    rstd = tl.load(rstd_ptr + i, mask=row_ok, other=0.0)
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(acc.dtype)
    normalised = (x - mean[:, None]) * rstd[:, None]
    dx = acc - rstd[:, None] * (by_colsum[:, None] + normalised * by_y[:, None])
    dx += tl.load(residual_ptr + (row * stride + j[None, :]), mask=mask, other=0.0).to(acc.dtype)
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if row_scale_ptr is not None:
        dx *= tl.load(row_scale_ptr + i // rows_per_sample, mask=row_ok, other=0.0).to(acc.dtype)[:, None]
    if copy_ptr is not None:
        tl.store(copy_ptr + offset, dx.to(copy_ptr.dtype.element_ty), mask=mask)
    if by_column_ptr is not None:
        column = tl.min(i, axis=0).to(tl.int64) // acc.shape[0] * size_j + j
        tl.store(by_column_ptr + column, tl.sum(tl.where(mask, dx, 0.0), axis=0), mask=column_ok)


@triton.jit
def store_with_delta(acc, i, j, part, target, size_i, size_j, HEAD_DIM: tl.constexpr):
    """The gradient of attention's output, and its product with the output summed by head: (B, H, padded_tokens)."""
    ptr, delta_ptr, out_ptr, tokens, padded_tokens, heads = target
    WITHIN: tl.constexpr = acc.shape[1] // HEAD_DIM
    row_ok = i < size_i
    mask = row_ok[:, None] & (j < size_j)[None, :]
    offset = i.to(tl.int64)[:, None] * size_j + j[None, :]
    dout = acc.to(ptr.dtype.element_ty)
    tl.store(ptr + offset, dout, mask=mask)
    out = tl.load(out_ptr + offset, mask=mask, other=0.0).to(acc.dtype)
    delta = tl.sum(tl.reshape(dout.to(acc.dtype) * out, (acc.shape[0], WITHIN, HEAD_DIM)), axis=2)
    head = tl.min(j, axis=0) // HEAD_DIM + tl.arange(0, WITHIN)
    row = ((i // tokens).to(tl.int64) * heads)[:, None] + head[None, :]
    where = row * padded_tokens + (i % tokens)[:, None]
    tl.store(delta_ptr + where, delta, mask=row_ok[:, None] & (head < heads)[None, :])


FOLDED = Epilogue("folded", store_folded, wide=True)
FOLDED_ACTIVATED = Epilogue("folded_activated", store_folded, wide=True)
FOLDED_KEPT = Epilogue("folded_kept", store_folded, beside=True, wide=True)
GATED = Epilogue("gated", store_gated, wide=True)
GATED_KEPT = Epilogue("gated_kept", store_gated, beside=True, wide=True)
STREAM = Epilogue("stream", store_stream, beside=True, columns=64)
STREAM_AND_COPY = Epilogue("stream_and_copy", store_stream, tiles=3, columns=64)
DERIVATIVE = Epilogue("derivative", store_derivative, tiles=3, input_gradient=True)
GATED_DERIVATIVE = Epilogue("gated_derivative", store_gated_derivative, tiles=6, input_gradient=True)
NORM_GRADIENT = Epilogue("norm_gradient", store_norm_gradient, tiles=3, input_gradient=True)
WITH_DELTA = Epilogue("with_delta", store_with_delta, beside=True, input_gradient=True, columns=64)

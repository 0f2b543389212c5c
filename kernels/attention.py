"""Multi-head self-attention in the flash style (arXiv 2205.14135, 2307.08691), forward and backward.

Fused: scores, scale, additive bias, key padding mask, online softmax and the product with v, reading q, k and v by
strides from the packed (B, N, 3, H, d) and writing (B, N, H * d); no score matrix exists in memory, nothing is
transposed or copied. Backward: two kernels, one a query tile for dq (and the gradient of the bias where wanted), one a
key tile for dk and dv, each written once, straight into the packed gradient: deterministic, no atomics.
Saved for backward: qkv, the output and the log-sum-exp of each row (in base 2, float32; +inf for a query that may
attend to no key, whose output is 0). Recomputed: the scores and probabilities, once in each backward kernel.
A call must move, for B H N d elements a head tensor of size s: forward 4 s each, backward 8 s each; the gradient of a
bias adds B H N N float32. The two backward kernels move 12 s each, and make seven products where one would make five.

Head dims that are no power of two are split into two parts, the largest power of two and the rest padded to 16 or
more (72 = 64 + 16, 80 = 64 + 16, 96 = 64 + 32), instead of padding the whole to the next power of two.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._math import TRITON_DTYPES, accumulator_dtype, before_norm, widen
from .launch import cost
from .launch.choice import choose
from .launch.launcher import launch as launch_kernel
from .launch.request import AttentionConfig, Request, Scores, ceil_div, split_head, uses_tf32

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_part(ptr, row, row_ok, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    d = FIRST + tl.arange(0, WIDTH)
    mask = row_ok[:, None] & (d < HEAD_DIM)[None, :]
    return tl.load(ptr + (row[:, None] + d[None, :]), mask=mask, other=0.0)


@triton.jit
def load_head(ptr, row, row_ok, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Rows of one head at offsets `row`, as parts of D0 and D1 columns; the first part twice when D1 is 0."""
    first = load_part(ptr, row, row_ok, 0, D0, HEAD_DIM)
    second = first
    if D1 > 0:
        second = load_part(ptr, row, row_ok, D0, D1, HEAD_DIM)
    return first, second


@triton.jit
def store_head(ptr, row, row_ok, first, second, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    d = tl.arange(0, D0)
    mask = row_ok[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(ptr + (row[:, None] + d[None, :]), first.to(ptr.dtype.element_ty), mask=mask)
    if D1 > 0:
        d = D0 + tl.arange(0, D1)
        mask = row_ok[:, None] & (d < HEAD_DIM)[None, :]
        tl.store(ptr + (row[:, None] + d[None, :]), second.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def product(a0, a1, b0, b1, D1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over the head's dimension."""
    out = tl.dot(a0, tl.trans(b0), input_precision=PRECISION, out_dtype=ACC)
    if D1 > 0:
        out = tl.dot(a1, tl.trans(b1), out, input_precision=PRECISION, out_dtype=ACC)
    return out


@triton.jit
def accumulate(p, x0, x1, acc0, acc1, D1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """acc + p x, p rounded to x's dtype."""
    p = p.to(x0.dtype)
    acc0 = tl.dot(p, x0, acc0, input_precision=PRECISION, out_dtype=ACC)
    if D1 > 0:
        acc1 = tl.dot(p, x1, acc1, input_precision=PRECISION, out_dtype=ACC)
    return acc0, acc1


@triton.jit
def head_pointers(qkv_ptr, strides, batch, head):
    """Where q, k and v of a head start."""
    q_ptr = qkv_ptr + batch * strides[0] + head * strides[3]
    k_ptr = q_ptr + strides[2]
    return q_ptr, k_ptr, k_ptr + strides[2]  # strides[2] * 2 could overflow 32 bits


@triton.jit
def key_allowed(n, N, mask_ptr, strides, batch):
    allowed = n < N
    if mask_ptr is not None:
        offset = batch * strides[0] + n.to(tl.int64) * strides[1]
        allowed = allowed & (tl.load(mask_ptr + offset, mask=n < N, other=0) != 0)
    return allowed


@triton.jit
def add_bias(scores, bias_ptr, strides, batch, head, m, n, N):
    """scores, in base 2, plus the bias of queries m and keys n, one a column, the other a row."""
    if bias_ptr is not None:
        offset = batch * strides[0] + head * strides[1] + m.to(tl.int64) * strides[2] + n.to(tl.int64) * strides[3]
        scores += tl.load(bias_ptr + offset, mask=(m < N) & (n < N), other=0.0).to(scores.dtype) * LOG2_E
    return scores


@triton.jit
def before_norm_part(
    dy,
    y,
    norm,
    which,
    head,
    H,
    row,
    row_ok,
    tile,
    COLUMNS,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """`before_norm` of columns FIRST and on of a head of q, k or v (`which`: 0, 1, 2), its sums by column stored as
    number `tile` of COLUMNS, after those of the ones before. Returns s and the sums by row."""
    mean_ptr, rstd_ptr, colsum_ptr, bias_ptr, _, by_column_ptr, before, _ = norm
    d = FIRST + tl.arange(0, WIDTH)
    column_ok = d < HEAD_DIM
    column = (which * H + head) * HEAD_DIM + d
    mean = tl.load(mean_ptr + row, mask=row_ok, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=row_ok, other=0.0)
    colsum = tl.load(colsum_ptr + column, mask=column_ok, other=0.0)
    bias = tl.load(bias_ptr + column, mask=column_ok, other=0.0)
    s, by_colsum, by_y, total, t = before_norm(dy, y.to(dy.dtype), mean, rstd, colsum, bias, y.dtype)
    out = by_column_ptr + (tile.to(tl.int64) * 2 * COLUMNS + (column - before))
    tl.store(out, total, mask=column_ok)
    tl.store(out + COLUMNS, t, mask=column_ok)
    return s, by_colsum, by_y


@triton.jit
def before_norm_head(
    dy0,
    dy1,
    y0,
    y1,
    norm,
    which,
    head,
    H,
    row,
    row_ok,
    tile,
    COLUMNS,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
):
    """`before_norm_part` of a whole head."""
    s0, by_colsum, by_y = before_norm_part(dy0, y0, norm, which, head, H, row, row_ok, tile, COLUMNS, 0, D0, HEAD_DIM)
    s1 = s0
    if D1 > 0:
        s1, more_by_colsum, more_by_y = before_norm_part(
            dy1, y1, norm, which, head, H, row, row_ok, tile, COLUMNS, D0, D1, HEAD_DIM
        )
        by_colsum += more_by_colsum
        by_y += more_by_y
    return s0, s1, by_colsum, by_y


@triton.jit
def store_by_row(by_colsum, by_y, norm, number, row, row_ok):
    """The sums by row, as partial sums number `number`."""
    _, _, _, _, by_row_ptr, _, _, rows = norm
    out = by_row_ptr + (number.to(tl.int64) * 2 * rows + row)
    tl.store(out, by_colsum, mask=row_ok)
    tl.store(out + rows, by_y, mask=row_ok)


@triton.jit(launch_metadata=cost.attention_launch)
def attention_kernel(
    qkv_ptr,  # (B, N, 3, H, HEAD_DIM) by strides, unit stride along HEAD_DIM
    out_ptr,  # (B, N, H * HEAD_DIM) contiguous
    lse_ptr,  # (B, H, N) contiguous
    mask_ptr,  # (B, N) bytes by strides, or None
    bias_ptr,  # (B, H, N, N) by strides, or None
    N,
    H,
    scale,
    strides,  # of qkv's first four axes
    mask_strides,
    bias_strides,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """softmax(q k^T * scale) v of a tile of queries of one head, and its log-sum-exp."""
    tiles = tl.cdiv(N, BLOCK_M)
    head = tl.program_id(0) // tiles
    batch, head_in_batch = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q_ptr, k_ptr, v_ptr = head_pointers(qkv_ptr, strides, batch, head_in_batch)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = m < N
    q0, q1 = load_head(q_ptr, m.to(tl.int64) * strides[1], row_ok, HEAD_DIM, D0, D1)

    largest = tl.full((BLOCK_M,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    acc0 = tl.zeros((BLOCK_M, D0), ACC)
    acc1 = acc0
    if D1 > 0:
        acc1 = tl.zeros((BLOCK_M, D1), ACC)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k0, k1 = load_head(k_ptr, n.to(tl.int64) * strides[1], n < N, HEAD_DIM, D0, D1)
        v0, v1 = load_head(v_ptr, n.to(tl.int64) * strides[1], n < N, HEAD_DIM, D0, D1)
        scores = product(q0, q1, k0, k1, D1, ACC, PRECISION) * (scale * LOG2_E)
        scores = add_bias(scores, bias_ptr, bias_strides, batch, head_in_batch, m[:, None], n[None, :], N)
        allowed = key_allowed(n, N, mask_ptr, mask_strides, batch)
        scores = tl.where(allowed[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        shift = larger
        if mask_ptr is not None or bias_ptr is not None:
            shift = tl.where(larger == float("-inf"), 0.0, larger)  # no key so far: avoid -inf - -inf
        p = tl.exp2(scores - shift[:, None])
        correction = tl.exp2(largest - shift)
        total = total * correction + tl.sum(p, axis=1)
        acc0 = acc0 * correction[:, None]
        if D1 > 0:
            acc1 = acc1 * correction[:, None]
        acc0, acc1 = accumulate(p, v0, v1, acc0, acc1, D1, ACC, PRECISION)
        largest = larger

    safe_total = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("inf"), largest + tl.log2(safe_total))
    tl.store(lse_ptr + head.to(tl.int64) * N + m, lse, mask=row_ok)
    out_row = (batch * N + m) * (H * HEAD_DIM) + head_in_batch * HEAD_DIM
    acc0 = acc0 / safe_total[:, None]
    if D1 > 0:
        acc1 = acc1 / safe_total[:, None]
    store_head(out_ptr, out_row, row_ok, acc0, acc1, HEAD_DIM, D0, D1)


@triton.jit(launch_metadata=cost.attention_backward_dq_launch)
def attention_backward_dq_kernel(
    qkv_ptr,  # (B, N, 3, H, HEAD_DIM) by strides, unit stride along HEAD_DIM
    out_ptr,  # (B, N, H * HEAD_DIM) contiguous, or None where delta is given
    dout_ptr,  # (B, N, H * HEAD_DIM) by strides, unit stride along the last axis
    lse_ptr,  # (B, H, N) contiguous
    delta_ptr,  # (B, H, N) contiguous, rowsum(out * dout): written here for the other backward kernel, if not given
    dqkv_ptr,  # (B, N, 3, H, HEAD_DIM) contiguous, of which q's part is written
    norm,  # of the norm before qkv what `before_norm_part` and `store_by_row` take, or None
    dbias_ptr,  # (B, H, N, N) contiguous, or None
    mask_ptr,  # (B, N) bytes by strides, or None
    bias_ptr,  # (B, H, N, N) by strides, or None
    N,
    H,
    scale,
    strides,  # of qkv's first four axes
    dout_strides,  # of dout's first two
    mask_strides,
    bias_strides,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq of a tile of queries of one head, or rstd * dq with the sums that the norm before qkv needs."""
    tiles = tl.cdiv(N, BLOCK_M)
    head = tl.program_id(0) // tiles
    batch, head_in_batch = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q_ptr, k_ptr, v_ptr = head_pointers(qkv_ptr, strides, batch, head_in_batch)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = m < N
    m_wide = m.to(tl.int64)
    out_row = (batch * N + m) * (H * HEAD_DIM) + head_in_batch * HEAD_DIM
    dout_row = batch * dout_strides[0] + m_wide * dout_strides[1] + head_in_batch * HEAD_DIM

    q0, q1 = load_head(q_ptr, m_wide * strides[1], row_ok, HEAD_DIM, D0, D1)
    dout0, dout1 = load_head(dout_ptr, dout_row, row_ok, HEAD_DIM, D0, D1)
    lse = tl.load(lse_ptr + head.to(tl.int64) * N + m, mask=row_ok, other=0.0)
    if out_ptr is None:
        delta = tl.load(delta_ptr + head.to(tl.int64) * N + m, mask=row_ok, other=0.0)
    else:
        out0, out1 = load_head(out_ptr, out_row, row_ok, HEAD_DIM, D0, D1)
        delta = tl.sum(widen(out0) * widen(dout0), axis=1)
        if D1 > 0:
            delta += tl.sum(widen(out1) * widen(dout1), axis=1)
        tl.store(delta_ptr + head.to(tl.int64) * N + m, delta, mask=row_ok)

    dq0 = tl.zeros((BLOCK_M, D0), ACC)
    dq1 = dq0
    if D1 > 0:
        dq1 = tl.zeros((BLOCK_M, D1), ACC)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k0, k1 = load_head(k_ptr, n.to(tl.int64) * strides[1], n < N, HEAD_DIM, D0, D1)
        v0, v1 = load_head(v_ptr, n.to(tl.int64) * strides[1], n < N, HEAD_DIM, D0, D1)
        scores = product(q0, q1, k0, k1, D1, ACC, PRECISION) * (scale * LOG2_E)
        scores = add_bias(scores, bias_ptr, bias_strides, batch, head_in_batch, m[:, None], n[None, :], N)
        allowed = key_allowed(n, N, mask_ptr, mask_strides, batch)
        p = tl.where(allowed[None, :], tl.exp2(scores - lse[:, None]), 0.0)
        dscores = p * (product(dout0, dout1, v0, v1, D1, ACC, PRECISION) - delta[:, None])
        if dbias_ptr is not None:
            offset = (head.to(tl.int64) * N + m_wide)[:, None] * N + n[None, :]
            tile = row_ok[:, None] & (n < N)[None, :]
            tl.store(dbias_ptr + offset, dscores.to(dbias_ptr.dtype.element_ty), mask=tile)
        dq0, dq1 = accumulate(dscores, k0, k1, dq0, dq1, D1, ACC, PRECISION)

    dq0, dq1 = dq0 * scale, dq1 * scale
    if norm is not None:
        where = (head_in_batch, H, batch * N + m, row_ok, batch * tiles + tl.program_id(0) % tiles, H * HEAD_DIM)
        dq0, dq1, by_colsum, by_y = before_norm_head(dq0, dq1, q0, q1, norm, 0, *where, HEAD_DIM, D0, D1)
        store_by_row(by_colsum, by_y, norm, head_in_batch, batch * N + m, row_ok)
    dq_row = (batch * N + m) * (3 * H * HEAD_DIM) + head_in_batch * HEAD_DIM
    store_head(dqkv_ptr, dq_row, row_ok, dq0, dq1, HEAD_DIM, D0, D1)


@triton.jit(launch_metadata=cost.attention_backward_dkdv_launch)
def attention_backward_dkdv_kernel(
    qkv_ptr,  # (B, N, 3, H, HEAD_DIM) by strides, unit stride along HEAD_DIM
    dout_ptr,  # (B, N, H * HEAD_DIM) by strides, unit stride along the last axis
    lse_ptr,  # (B, H, N) contiguous
    delta_ptr,  # (B, H, N) contiguous, rowsum(out * dout)
    dqkv_ptr,  # (B, N, 3, H, HEAD_DIM) contiguous, of which k's and v's parts are written
    norm,  # of the norm before qkv what `before_norm_part` and `store_by_row` take, or None
    mask_ptr,  # (B, N) bytes by strides, or None
    bias_ptr,  # (B, H, N, N) by strides, or None
    N,
    H,
    scale,
    strides,  # of qkv's first four axes
    dout_strides,  # of dout's first two
    mask_strides,
    bias_strides,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of a tile of keys of one head, or rstd times these with the sums that the norm before qkv needs."""
    tiles = tl.cdiv(N, BLOCK_N)
    head = tl.program_id(0) // tiles
    batch, head_in_batch = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q_ptr, k_ptr, v_ptr = head_pointers(qkv_ptr, strides, batch, head_in_batch)
    dout_ptr += batch * dout_strides[0] + head_in_batch * HEAD_DIM
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = n < N
    n_wide = n.to(tl.int64)
    allowed = key_allowed(n, N, mask_ptr, mask_strides, batch)
    k0, k1 = load_head(k_ptr, n_wide * strides[1], row_ok, HEAD_DIM, D0, D1)
    v0, v1 = load_head(v_ptr, n_wide * strides[1], row_ok, HEAD_DIM, D0, D1)

    dk0 = tl.zeros((BLOCK_N, D0), ACC)
    dv0 = tl.zeros((BLOCK_N, D0), ACC)
    dk1 = dk0
    dv1 = dv0
    if D1 > 0:
        dk1 = tl.zeros((BLOCK_N, D1), ACC)
        dv1 = tl.zeros((BLOCK_N, D1), ACC)
    # Query rows past the end load as zeros in q, dout, lse and delta, and so add nothing.
    for start in range(0, N, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        m_ok = m < N
        m_wide = m.to(tl.int64)
        q0, q1 = load_head(q_ptr, m_wide * strides[1], m_ok, HEAD_DIM, D0, D1)
        dout0, dout1 = load_head(dout_ptr, m_wide * dout_strides[1], m_ok, HEAD_DIM, D0, D1)
        lse = tl.load(lse_ptr + head.to(tl.int64) * N + m, mask=m_ok, other=0.0)
        delta = tl.load(delta_ptr + head.to(tl.int64) * N + m, mask=m_ok, other=0.0)
        scores = product(k0, k1, q0, q1, D1, ACC, PRECISION) * (scale * LOG2_E)
        scores = add_bias(scores, bias_ptr, bias_strides, batch, head_in_batch, m[None, :], n[:, None], N)
        p = tl.where(allowed[:, None], tl.exp2(scores - lse[None, :]), 0.0)
        dv0, dv1 = accumulate(p, dout0, dout1, dv0, dv1, D1, ACC, PRECISION)
        dscores = p * (product(v0, v1, dout0, dout1, D1, ACC, PRECISION) - delta[None, :])
        dk0, dk1 = accumulate(dscores, q0, q1, dk0, dk1, D1, ACC, PRECISION)

    dk0, dk1 = dk0 * scale, dk1 * scale
    if norm is not None:
        where = (head_in_batch, H, batch * N + n, row_ok, batch * tiles + tl.program_id(0) % tiles, 2 * H * HEAD_DIM)
        dk0, dk1, by_colsum, by_y = before_norm_head(dk0, dk1, k0, k1, norm, 1, *where, HEAD_DIM, D0, D1)
        dv0, dv1, more_by_colsum, more_by_y = before_norm_head(dv0, dv1, v0, v1, norm, 2, *where, HEAD_DIM, D0, D1)
        store_by_row(by_colsum + more_by_colsum, by_y + more_by_y, norm, H + head_in_batch, batch * N + n, row_ok)
    dk_row = (batch * N + n) * (3 * H * HEAD_DIM) + (H + head_in_batch) * HEAD_DIM
    store_head(dqkv_ptr, dk_row, row_ok, dk0, dk1, HEAD_DIM, D0, D1)
    store_head(dqkv_ptr, dk_row + H * HEAD_DIM, row_ok, dv0, dv1, HEAD_DIM, D0, D1)


def _constants(request: Request, config: AttentionConfig) -> dict:
    # A program of dk and dv has rows of keys, and steps over queries.
    by_key = request.kernel == "attention_backward_dkdv"
    head_dim = request.shape[-1]
    d0, d1 = split_head(head_dim)
    return dict(
        HEAD_DIM=head_dim,
        D0=d0,
        D1=d1,
        ACC=TRITON_DTYPES[accumulator_dtype(request.dtype)],
        PRECISION="tf32" if request.tf32 else "ieee",
        BLOCK_M=config.BLOCK_STEP if by_key else config.BLOCK_ROWS,
        BLOCK_N=config.BLOCK_ROWS if by_key else config.BLOCK_STEP,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _mask_arguments(qkv, key_padding_mask, attn_bias):
    """Pointers and strides of mask and bias, the bias broadcast to (B, H, N, N)."""
    batch, tokens, _, heads, _ = qkv.shape
    mask = None if key_padding_mask is None else key_padding_mask.view(torch.uint8)
    bias = None if attn_bias is None else attn_bias.expand(batch, heads, tokens, tokens)
    mask_strides = (0, 0) if mask is None else mask.stride()
    # An axis of one is not stepped along: 0, as for one that is broadcast, so that no kernel is compiled for it.
    steps = [0] * 4 if bias is None else [0 if n == 1 else bias.stride(i) for i, n in enumerate(bias.shape)]
    return mask, bias, (mask_strides, tuple(steps))


def launch(kernel, name: str, qkv, scores: Scores, args, written, config=None, by_tile=None):
    """Launch a kernel of attention over rows of `qkv`, with the config chosen for it if none is given. by_tile: from
    the number of tiles a head, (tensors filled tile by tile along their first axis, the arguments in place of args).
    Returns `written`, what else it fills, and those tensors."""
    batch, tokens, _, heads, head_dim = qkv.shape
    request = Request(name, (batch, tokens, heads, head_dim), qkv.dtype, scores, uses_tf32(qkv.dtype))
    if config is None:

        def repeat(config: AttentionConfig) -> tuple[torch.Tensor, ...]:
            filled = launch(kernel, name, qkv, scores, args, written, config, by_tile)
            return *written, *[tensor.sum(0) for tensor in filled[len(written) :]]

        config = choose(request, qkv.device, repeat)
    tiles = ceil_div(tokens, config.BLOCK_ROWS)
    partial = ()
    if by_tile is not None:
        partial, args = by_tile(tiles)
    launch_kernel(kernel, (tiles * batch * heads, 1, 1), qkv.device)(*args, **_constants(request, config))
    return *written, *partial


def attention_forward(qkv, scale: float, key_padding_mask=None, attn_bias=None):
    """qkv (B, N, 3, H, d) with unit stride along d, key_padding_mask (B, N) bool, attn_bias broadcastable to
    (B, H, N, N) -> out (B, N, H * d) in qkv's dtype, lse (B, H, N) in base 2, float32 (float64 for float64)."""
    given, written = forward(qkv, scale, key_padding_mask, attn_bias)
    if qkv.numel():
        launch(*given)
    return written


def forward(qkv, scale: float, key_padding_mask=None, attn_bias=None):
    """What `launch` takes for `attention_forward`, and the memory of what it returns."""
    batch, tokens, _, heads, head_dim = qkv.shape
    out = torch.empty(batch, tokens, heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(batch, heads, tokens, dtype=accumulator_dtype(qkv.dtype), device=qkv.device)
    mask, bias, strides = _mask_arguments(qkv, key_padding_mask, attn_bias)
    sizes = (tokens, heads, scale, qkv.stride()[:4], *strides)
    scores = Scores(mask is not None, None if bias is None else bias.dtype)
    args = (qkv, out, lse, mask, bias, *sizes)
    return (attention_kernel, "attention_forward", qkv, scores, args, (out, lse)), (out, lse)


class BeforeNorm(NamedTuple):
    """What makes qkv = linear(layer_norm(x)) of a norm's rows: mean and rstd (B * N,); colsum and bias (3 * H * d,) of
    the layer that it is folded into (see `transformer_block`)."""

    mean: torch.Tensor
    rstd: torch.Tensor
    colsum: torch.Tensor
    bias: torch.Tensor


class NormSums(NamedTuple):
    """Of the gradient of qkv, summed by `_math.before_norm`: by_row (2 H, 2, B * N), one for each head of q, one of k
    and v together; by_column of q (tiles, 2, H * d), of k and v (tiles, 2, 2 * H * d)."""

    by_row: torch.Tensor
    of_q: torch.Tensor
    of_kv: torch.Tensor


def attention_backward(
    dout, qkv, out, lse, scale: float, key_padding_mask=None, attn_bias=None, needs_bias=False, delta=None, norm=None
):
    """Gradients of `attention_forward` for dout (B, N, H * d) with unit stride along the last axis.

    delta (B, H, N): the sums of out * dout over each head, if they are known. norm: a BeforeNorm; what is returned in
    place of dqkv is then rstd * dqkv. Returns dqkv (B, N, 3, H, d) contiguous in qkv's dtype; the gradient of the
    broadcast bias (B, H, N, N) in float32 (float64 for float64), or None when needs_bias is False; and with a norm its
    NormSums, else None.
    """
    batch, tokens, _, heads, _ = qkv.shape
    acc = accumulator_dtype(qkv.dtype)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dbias = torch.empty(batch, heads, tokens, tokens, dtype=acc, device=qkv.device) if needs_bias else None
    sums = None
    if dqkv.numel():
        out, delta = (out, torch.empty_like(lse)) if delta is None else (None, delta)
        by_row = None if norm is None else torch.empty(2 * heads, 2, batch * tokens, dtype=acc, device=qkv.device)
        mask, bias, strides = _mask_arguments(qkv, key_padding_mask, attn_bias)
        sizes = (tokens, heads, scale, qkv.stride()[:4], dout.stride()[:2], *strides)
        scores = Scores(mask is not None, None if bias is None else bias.dtype, needs_bias, norm is not None)

        def with_sums(columns: int, first: int, before: tuple, after: tuple, tiles: int):
            """Room for the sums by column of `columns` of qkv from the `first` on, and a kernel's arguments."""
            by_column = torch.empty(batch * tiles, 2, columns, dtype=acc, device=qkv.device)
            return (by_column,), (*before, (*norm, by_row, by_column, first, batch * tokens), *after)

        def run(kernel, name: str, scores: Scores, columns: int, first: int, before: tuple, after: tuple, written):
            by_tile = None if norm is None else partial(with_sums, columns, first, before, after)
            return launch(kernel, name, qkv, scores, (*before, None, *after), written, by_tile=by_tile)

        width = heads * qkv.shape[4]
        written = tuple([tensor for tensor in (dqkv[:, :, 0], delta, dbias) if tensor is not None])
        before, after = (qkv, out, dout, lse, delta, dqkv), (dbias, mask, bias, *sizes)
        *_, of_q = run(attention_backward_dq_kernel, "attention_backward_dq", scores, width, 0, before, after, written)
        scores = scores._replace(bias_gradient=False)
        before, after, written = (qkv, dout, lse, delta, dqkv), (mask, bias, *sizes), (dqkv[:, :, 1:],)
        *_, of_kv = run(
            attention_backward_dkdv_kernel, "attention_backward_dkdv", scores, 2 * width, width, before, after, written
        )
        sums = None if norm is None else NormSums(by_row, of_q, of_kv)
    return dqkv, dbias, sums

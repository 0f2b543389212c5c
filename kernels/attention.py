"""Multi-head self-attention in the flash style (arXiv 2205.14135, 2307.08691), forward and backward.

Fused: scores, scale, additive bias, key padding mask, online softmax and the product with v, reading q, k and v by
strides from the packed (B, N, 3, H, d) and writing (B, N, H * d); no score matrix exists in memory, nothing is
transposed or copied. Backward: two kernels, one a query tile for dq (and the gradient of the bias where wanted), one a
key tile for dk and dv, each written once, straight into the packed gradient: deterministic, no atomics.
Saved for backward: qkv, the output and the log-sum-exp of each row (in base 2, float32; +inf for a query that may
attend to no key, whose output is 0). Recomputed: the scores and probabilities, once in each backward kernel.
A call must move, for B H N d elements a head tensor of size s: forward 4 s each, backward 8 s each; the gradient of a
bias adds B H N N float32. The two backward kernels move 12 s each, and make seven products where one would make five.

A program of the forward pass either keeps all keys and values of a head on chip and goes through its queries, tile
after tile, which reads everything once, or has one tile of queries and goes through the keys. On chip the tiles of keys
fit: 197 are 128, 64 and 16. Where the sequence is a class token and whole tiles (257, 577, 1025), its first key starts
each softmax and its first query does without matrix products, so that nothing is padded.

What was tried and dropped: docs/kernels.md.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._math import TRITON_DTYPES, accumulator_dtype, before_norm
from .launch import cost
from .launch.choice import choose
from .launch.launcher import launch as launch_kernel
from .launch.request import MAX_STEP, AttentionConfig, Request, Scores, ceil_div, split_head, tiling, uses_tf32

LOG2_E = tl.constexpr(1.4426950408889634)
PADDING = tl.constexpr(MAX_STEP)  # of a row of numbers a token, at most


@triton.constexpr_function
def before(widths, i):
    """Where part number i starts."""
    return sum(widths[:i])


@triton.jit
def load_head(ptr, tokens, stride, token_ok, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows of a head, in parts of PARTS columns; token_ok: of which tokens, None for all."""
    head = ()
    for i in tl.static_range(len(PARTS)):
        d = before(PARTS, i) + tl.arange(0, PARTS[i])
        mask = (d < HEAD_DIM)[None, :]
        if token_ok is not None:
            mask = mask & token_ok[:, None]
        head += (tl.load(ptr + ((tokens.to(tl.int64) * stride)[:, None] + d[None, :]), mask=mask, other=0.0),)
    return head


@triton.jit
def load_keys(pointers, n, n_ok, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Keys n of a head, and their values."""
    _, k_ptr, v_ptr, stride = pointers
    return load_head(k_ptr, n, stride, n_ok, PARTS, HEAD_DIM), load_head(v_ptr, n, stride, n_ok, PARTS, HEAD_DIM)


@triton.jit
def store_head(ptr, tokens, stride, token_ok, head, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr):
    for i in tl.static_range(len(PARTS)):
        d = before(PARTS, i) + tl.arange(0, PARTS[i])
        mask = token_ok[:, None] & (d < HEAD_DIM)[None, :]
        offset = (tokens.to(tl.int64) * stride)[:, None] + d[None, :]
        tl.store(ptr + offset, head[i].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def zeros(like, ACC: tl.constexpr):
    """0 in ACC, in parts as those of `like`."""
    head = ()
    for i in tl.static_range(len(like)):
        head += (tl.zeros_like(like[i].to(ACC)),)
    return head


@triton.jit
def times(head, factor):
    out = ()
    for i in tl.static_range(len(head)):
        out += (head[i] * factor,)
    return out


@triton.jit
def where(token_ok, head):
    """0 in the rows of tokens that are not there."""
    out = ()
    for i in tl.static_range(len(head)):
        out += (tl.where(token_ok[:, None], head[i], 0.0),)
    return out


@triton.jit
def product(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over the head's dimension."""
    out = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION, out_dtype=ACC)
    for i in tl.static_range(1, len(a)):
        out = tl.dot(a[i], tl.trans(b[i]), out, input_precision=PRECISION, out_dtype=ACC)
    return out


@triton.jit
def row_product(a, b, ACC: tl.constexpr):
    """a * b summed over the head's dimension, row by row."""
    out = tl.sum(a[0].to(ACC) * b[0].to(ACC), axis=1)
    for i in tl.static_range(1, len(a)):
        out += tl.sum(a[i].to(ACC) * b[i].to(ACC), axis=1)
    return out


@triton.jit
def accumulate(p, x, acc, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """acc + p x, p rounded to x's dtype; acc None: p x."""
    out = ()
    for i in tl.static_range(len(x)):
        if acc is None:
            out += (tl.dot(p.to(x[i].dtype), x[i], input_precision=PRECISION, out_dtype=ACC),)
        else:
            out += (tl.dot(p.to(x[i].dtype), x[i], acc[i], input_precision=PRECISION, out_dtype=ACC),)
    return out


@triton.jit
def head_pointers(qkv_ptr, strides, batch, head, UNIT: tl.constexpr):
    """Where q, k and v of a head start, and how far apart their tokens are."""
    q_ptr = qkv_ptr + (batch * UNIT * strides[0] + head * UNIT * strides[3])
    step = tl.cast(strides[2], tl.int64) * UNIT
    return q_ptr, q_ptr + step, q_ptr + step + step, tl.cast(strides[1], tl.int64) * UNIT


@triton.jit
def key_allowed(n, scoring):
    """Which of keys n there are, and are not masked."""
    masks, batch, _, N, _ = scoring
    mask_ptr, strides, _, _ = masks
    allowed = n < N
    if mask_ptr is not None:
        offset = batch * strides[0] + n.to(tl.int64) * strides[1]
        allowed = allowed & (tl.load(mask_ptr + offset, mask=n < N, other=0) != 0)
    return allowed


@triton.jit
def add_bias(scores, m, n, scoring):
    """Scores of queries m and keys n, one a column, the other a row, with their bias, and by what they are to be
    multiplied for base 2: 1 where that is done."""
    masks, batch, head, N, to_base_2 = scoring
    _, _, bias_ptr, strides = masks
    if bias_ptr is None:
        return scores, to_base_2
    else:
        offset = batch * strides[0] + head * strides[1] + m.to(tl.int64) * strides[2] + n.to(tl.int64) * strides[3]
        bias = tl.load(bias_ptr + offset, mask=(m < N) & (n < N), other=0.0)
        return scores * to_base_2 + bias.to(scores.dtype) * LOG2_E, 1.0


@triton.jit
def before_norm_head(
    dy, y, norm, which, head, H, row, row_ok, tile, COLUMNS, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """`before_norm` of a head of q, k or v (`which`: 0, 1, 2), its sums by column stored as number `tile` of COLUMNS,
    after those of the ones before. Returns s and the sums by row."""
    mean_ptr, rstd_ptr, colsum_ptr, bias_ptr, _, by_column_ptr, earlier, _ = norm
    mean = tl.load(mean_ptr + row, mask=row_ok, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=row_ok, other=0.0)
    head_s = ()
    by_colsum = tl.zeros_like(mean)
    by_y = by_colsum
    for i in tl.static_range(len(PARTS)):
        d = before(PARTS, i) + tl.arange(0, PARTS[i])
        column_ok = d < HEAD_DIM
        column = (which * H + head) * HEAD_DIM + d
        colsum = tl.load(colsum_ptr + column, mask=column_ok, other=0.0)
        bias = tl.load(bias_ptr + column, mask=column_ok, other=0.0)
        wide = y[i].to(dy[i].dtype)
        s, part_by_colsum, part_by_y, total, t = before_norm(dy[i], wide, mean, rstd, colsum, bias, y[i].dtype)
        head_s += (s,)
        by_colsum += part_by_colsum
        by_y += part_by_y
        out = by_column_ptr + (tile.to(tl.int64) * 2 * COLUMNS + (column - earlier))
        tl.store(out, total, mask=column_ok)
        tl.store(out + COLUMNS, t, mask=column_ok)
    return head_s, by_colsum, by_y


@triton.jit
def store_by_row(by_colsum, by_y, norm, number, row, row_ok):
    """The sums by row, as partial sums number `number`."""
    _, _, _, _, by_row_ptr, _, _, rows = norm
    out = by_row_ptr + (number.to(tl.int64) * 2 * rows + row)
    tl.store(out, by_colsum, mask=row_ok)
    tl.store(out + rows, by_y, mask=row_ok)


# Online softmax. A state is of some queries and the keys that they have seen: the largest score in base 2, the sum of
# the exponentials, and the sum of these times v. `pointers`: of q, k and v of a head, and how far apart its tokens are.
# `scoring`: the masks (see `attention_kernel`), batch, head, N, and what makes scores base 2.


@triton.jit
def attend(q, k, v, state, m, n, scoring, RAGGED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """The state of queries m after keys n, and before them `state`, None for no key. RAGGED: n goes beyond the last."""
    masks, _, _, _, _ = scoring
    scores, factor = add_bias(product(q, k, ACC, PRECISION), m[:, None], n[None, :], scoring)
    if RAGGED or masks[0] is not None:
        scores = tl.where(key_allowed(n, scoring)[None, :], scores, float("-inf"))
    larger = tl.max(scores, axis=1) * factor
    if state is not None:
        larger = tl.maximum(state[0], larger)
    shift = larger
    if masks[0] is not None or masks[2] is not None:
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # no key so far: avoid -inf - -inf
    p = tl.exp2(scores * factor - shift[:, None])
    total = tl.sum(p, axis=1)
    if state is None:
        return larger, total, accumulate(p, v, None, ACC, PRECISION)
    else:
        correction = tl.exp2(state[0] - shift)
        acc = times(state[2], correction[:, None])
        return larger, state[1] * correction + total, accumulate(p, v, acc, ACC, PRECISION)


@triton.jit
def attend_key(q, k, v, to_base_2, ACC: tl.constexpr):
    """The state after a single key."""
    acc = ()
    for i in tl.static_range(len(v)):
        acc += (v[i].to(ACC) + tl.zeros_like(q[i].to(ACC)),)
    score = row_product(q, k, ACC) * to_base_2
    return score, tl.zeros_like(score) + 1.0, acc


@triton.jit
def attend_one(q, k, v, state, n, scoring, ACC: tl.constexpr):
    """`attend` for a single query, without matrix products."""
    _, _, _, N, to_base_2 = scoring
    scores = tl.where(n < N, row_product(q, k, ACC) * to_base_2, float("-inf"))
    larger = tl.maximum(state[0], tl.max(scores, axis=0))
    p = tl.exp2(scores - larger)
    correction = tl.exp2(state[0] - larger)
    acc = ()
    for i in tl.static_range(len(v)):
        acc += (state[2][i] * correction[:, None] + tl.sum(p[:, None] * v[i].to(ACC), axis=0)[None, :],)
    return larger, state[1] * correction + tl.sum(p, axis=0), acc


@triton.jit
def first_query(pointers, scoring, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, ACC: tl.constexpr):
    """The first query of a head, and its state after the first key."""
    q_ptr, _, _, stride = pointers
    n = tl.arange(0, 1)
    q = load_head(q_ptr, n, stride, None, PARTS, HEAD_DIM)
    k, v = load_keys(pointers, n, None, PARTS, HEAD_DIM)
    return q, attend_key(q, k, v, scoring[4], ACC)


@triton.jit
def store_attended(state, out_ptr, lse_ptr, m, H, ok, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Output and log-sum-exp of queries m, from their state after all keys."""
    largest, total, acc = state
    safe_total = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("inf"), largest + tl.log2(safe_total))
    tl.store(lse_ptr + m, lse, mask=ok)
    store_head(out_ptr, m, H * HEAD_DIM, ok, times(acc, (1.0 / safe_total)[:, None]), PARTS, HEAD_DIM)


@triton.jit
def attend_tile(
    pointers,
    out_ptr,
    lse_ptr,
    keys,
    values,
    m,
    H,
    scoring,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTHS: tl.constexpr,
    PEELED: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """`attention_kernel` of queries m. keys, values: all of the head tile by tile, or empty: they are loaded."""
    q_ptr, _, _, stride = pointers
    _, _, _, N, to_base_2 = scoring
    q = load_head(q_ptr, m, stride, m < N, PARTS, HEAD_DIM)
    state = None
    if PEELED:
        first_k, first_v = load_keys(pointers, tl.arange(0, 1), None, PARTS, HEAD_DIM)
        state = attend_key(q, first_k, first_v, to_base_2, ACC)
    if len(keys) == 0:
        if not PEELED:
            nothing = tl.zeros_like(m.to(ACC))
            state = nothing - float("inf"), nothing, zeros(q, ACC)
        for begin in range(PEELED, N, BLOCK_N):
            n = begin + tl.arange(0, BLOCK_N)
            k, v = load_keys(pointers, n, n < N if RAGGED else None, PARTS, HEAD_DIM)
            state = attend(q, k, v, state, m, n, scoring, RAGGED, ACC, PRECISION)
    else:
        for i in tl.static_range(len(WIDTHS)):
            last = i == len(WIDTHS) - 1
            n_of_tile = PEELED + before(WIDTHS, i) + tl.arange(0, WIDTHS[i])
            state = attend(q, keys[i], values[i], state, m, n_of_tile, scoring, RAGGED and last, ACC, PRECISION)
    store_attended(state, out_ptr, lse_ptr, m, H, m < N, PARTS, HEAD_DIM)


@triton.jit(launch_metadata=cost.attention_launch)
def attention_kernel(
    qkv_ptr,  # (B, N, 3, H, HEAD_DIM) by strides, unit stride along HEAD_DIM
    out_ptr,  # (B, N, H * HEAD_DIM) contiguous
    lse_ptr,  # (B, H, PADDED) contiguous, 0 after N
    masks,  # a key padding mask (B, N) in bytes or None, its strides, a bias (B, H, N, N) or None, its strides
    N,
    PADDED,
    H,
    scale,
    strides,  # of qkv's first four axes, in UNITs
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,  # of queries a program
    WIDTHS: tl.constexpr,  # with several TILES, of the tiles of keys
    PEELED: tl.constexpr,  # how many of the first tokens are taken apart: 0 or 1
    RAGGED: tl.constexpr,  # whether the last tile of keys is wider than what is left
):
    """softmax(q k^T * scale) v of some tiles of queries of one head, and its log-sum-exp."""
    programs = tl.cdiv(N - PEELED, BLOCK_M * TILES)
    if PEELED and TILES == 1:
        programs += 1  # number 0, for the first query
    head, number = tl.program_id(0) // programs, tl.program_id(0) % programs
    batch, head_in_batch = (head // H).to(tl.int64), (head % H).to(tl.int64)
    pointers = head_pointers(qkv_ptr, strides, batch, head_in_batch, UNIT)
    out_ptr += batch * N * (H * HEAD_DIM) + head_in_batch * HEAD_DIM
    lse_ptr += head.to(tl.int64) * PADDED
    scoring = (masks, batch, head_in_batch, N, scale * LOG2_E)
    # What is behind the last query counts for nothing, but an operator's results have to be the same every time.
    behind = N + tl.arange(0, PADDING)
    tl.store(lse_ptr + behind, tl.zeros((PADDING,), ACC), mask=(behind < PADDED) & (number == 0))

    keys, values = (), ()
    if TILES > 1:
        if PEELED:
            first_q, first = first_query(pointers, scoring, PARTS, HEAD_DIM, ACC)
        for i in tl.static_range(len(WIDTHS)):
            n = PEELED + before(WIDTHS, i) + tl.arange(0, WIDTHS[i])
            k, v = load_keys(pointers, n, n < N, PARTS, HEAD_DIM)
            keys, values = keys + (k,), values + (v,)
            if PEELED:
                first = attend_one(first_q, k, v, first, n, scoring, ACC)
        if PEELED:
            m = tl.arange(0, 1)
            store_attended(first, out_ptr, lse_ptr, m, H, m + number == 0, PARTS, HEAD_DIM)
        begin = PEELED + number * (BLOCK_M * TILES)
        for start in tl.range(begin, tl.minimum(begin + BLOCK_M * TILES, N), BLOCK_M, disable_licm=True):
            tile = (pointers, out_ptr, lse_ptr, keys, values, start + tl.arange(0, BLOCK_M), H, scoring)
            attend_tile(*tile, HEAD_DIM, PARTS, ACC, PRECISION, BLOCK_N, WIDTHS, PEELED, RAGGED)
    else:
        if PEELED:  # noqa: SIM102, known at compile time
            if number == 0:
                first_q, first = first_query(pointers, scoring, PARTS, HEAD_DIM, ACC)
                for start in range(1, N, BLOCK_N):
                    n = start + tl.arange(0, BLOCK_N)
                    k, v = load_keys(pointers, n, n < N, PARTS, HEAD_DIM)
                    first = attend_one(first_q, k, v, first, n, scoring, ACC)
                n = tl.arange(0, 1)
                store_attended(first, out_ptr, lse_ptr, n, H, n == 0, PARTS, HEAD_DIM)
                return
        m = (number - PEELED) * BLOCK_M + PEELED + tl.arange(0, BLOCK_M)
        tile = (pointers, out_ptr, lse_ptr, keys, values, m, H, scoring)
        attend_tile(*tile, HEAD_DIM, PARTS, ACC, PRECISION, BLOCK_N, WIDTHS, PEELED, RAGGED)


@triton.jit(launch_metadata=cost.attention_backward_dq_launch)
def attention_backward_dq_kernel(
    qkv_ptr,  # (B, N, 3, H, HEAD_DIM) by strides, unit stride along HEAD_DIM
    out_ptr,  # (B, N, H * HEAD_DIM) contiguous, or None where delta is given
    dout_ptr,  # (B, N, H * HEAD_DIM) by strides, unit stride along the last axis
    lse_ptr,  # (B, H, PADDED) contiguous
    delta_ptr,  # (B, H, PADDED) contiguous, rowsum(out * dout): written here for the other kernel, if not given
    dqkv_ptr,  # (B, N, 3, H, HEAD_DIM) contiguous, of which q's part is written
    norm,  # of the norm before qkv what `before_norm_head` and `store_by_row` take, or None
    dbias_ptr,  # (B, H, N, N) contiguous, or None
    masks,  # see `attention_kernel`
    N,
    PADDED,
    H,
    scale,
    strides,  # of qkv's first four axes, in UNITs
    dout_strides,  # of dout's first two, in UNITs
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RAGGED: tl.constexpr,  # whether the last tile of keys is wider than what is left
):
    """dq of a tile of queries of one head, or rstd * dq with the sums that the norm before qkv needs."""
    tiles = tl.cdiv(N, BLOCK_M)
    head = tl.program_id(0) // tiles
    batch, head_in_batch = (head // H).to(tl.int64), (head % H).to(tl.int64)
    pointers = head_pointers(qkv_ptr, strides, batch, head_in_batch, UNIT)
    q_ptr, _, _, stride = pointers
    columns = head_in_batch * HEAD_DIM
    dout_ptr += batch * UNIT * dout_strides[0] + columns
    lse_ptr += head.to(tl.int64) * PADDED
    delta_ptr += head.to(tl.int64) * PADDED
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = m < N

    q = load_head(q_ptr, m, stride, row_ok, PARTS, HEAD_DIM)
    dout = load_head(dout_ptr, m, tl.cast(dout_strides[1], tl.int64) * UNIT, row_ok, PARTS, HEAD_DIM)
    lse = tl.load(lse_ptr + m, mask=row_ok, other=0.0)
    if out_ptr is None:
        delta = tl.load(delta_ptr + m, mask=row_ok, other=0.0)
    else:
        out_ptr += batch * N * (H * HEAD_DIM) + columns
        delta = row_product(load_head(out_ptr, m, H * HEAD_DIM, row_ok, PARTS, HEAD_DIM), dout, ACC)
        tl.store(delta_ptr + m, delta, mask=row_ok)
    if dbias_ptr is not None:
        dbias_ptr += head.to(tl.int64) * N * N

    scoring = (masks, batch, head_in_batch, N, scale * LOG2_E)
    dq = zeros(q, ACC)
    for begin in range(0, N, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        k, v = load_keys(pointers, n, n < N if RAGGED else None, PARTS, HEAD_DIM)
        scores, factor = add_bias(product(q, k, ACC, PRECISION), m[:, None], n[None, :], scoring)
        p = tl.exp2(scores * factor - lse[:, None])
        if RAGGED or masks[0] is not None:
            p = tl.where(key_allowed(n, scoring)[None, :], p, 0.0)
        dscores = p * (product(dout, v, ACC, PRECISION) - delta[:, None])
        if dbias_ptr is not None:
            offset = m.to(tl.int64)[:, None] * N + n[None, :]
            tile = row_ok[:, None] & (n < N)[None, :]
            tl.store(dbias_ptr + offset, dscores.to(dbias_ptr.dtype.element_ty), mask=tile)
        dq = accumulate(dscores, k, dq, ACC, PRECISION)

    dq = times(dq, scale)
    if norm is not None:
        tile = batch * tiles + tl.program_id(0) % tiles
        dq, by_colsum, by_y = before_norm_head(
            dq, q, norm, 0, head_in_batch, H, batch * N + m, row_ok, tile, H * HEAD_DIM, PARTS, HEAD_DIM
        )
        store_by_row(by_colsum, by_y, norm, head_in_batch, batch * N + m, row_ok)
    dq_ptr = dqkv_ptr + batch * N * (3 * H * HEAD_DIM) + columns
    store_head(dq_ptr, m, 3 * H * HEAD_DIM, row_ok, dq, PARTS, HEAD_DIM)


@triton.jit(launch_metadata=cost.attention_backward_dkdv_launch)
def attention_backward_dkdv_kernel(
    qkv_ptr,  # (B, N, 3, H, HEAD_DIM) by strides, unit stride along HEAD_DIM
    dout_ptr,  # (B, N, H * HEAD_DIM) by strides, unit stride along the last axis
    lse_ptr,  # (B, H, PADDED) contiguous
    delta_ptr,  # (B, H, PADDED) contiguous, rowsum(out * dout)
    dqkv_ptr,  # (B, N, 3, H, HEAD_DIM) contiguous, of which k's and v's parts are written
    norm,  # of the norm before qkv what `before_norm_head` and `store_by_row` take, or None
    masks,  # see `attention_kernel`
    N,
    PADDED,
    H,
    scale,
    strides,  # of qkv's first four axes, in UNITs
    dout_strides,  # of dout's first two, in UNITs
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of a tile of keys of one head, or rstd times these with the sums that the norm before qkv needs."""
    tiles = tl.cdiv(N, BLOCK_N)
    head = tl.program_id(0) // tiles
    batch, head_in_batch = (head // H).to(tl.int64), (head % H).to(tl.int64)
    pointers = head_pointers(qkv_ptr, strides, batch, head_in_batch, UNIT)
    q_ptr, _, _, stride = pointers
    columns = head_in_batch * HEAD_DIM
    dout_ptr += batch * UNIT * dout_strides[0] + columns
    dout_stride = tl.cast(dout_strides[1], tl.int64) * UNIT
    lse_ptr += head.to(tl.int64) * PADDED
    delta_ptr += head.to(tl.int64) * PADDED
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = n < N
    scoring = (masks, batch, head_in_batch, N, scale * LOG2_E)
    k, v = load_keys(pointers, n, row_ok, PARTS, HEAD_DIM)
    if masks[0] is not None:
        allowed = key_allowed(n, scoring)

    dk, dv = zeros(k, ACC), zeros(v, ACC)
    for begin in range(0, N, BLOCK_M):
        m = begin + tl.arange(0, BLOCK_M)
        q = load_head(q_ptr, m, stride, m < N, PARTS, HEAD_DIM)
        dout = load_head(dout_ptr, m, dout_stride, m < N, PARTS, HEAD_DIM)
        # Without a mask, so that they load wide: there is memory behind the last query, whose probabilities are 0.
        lse = tl.where(m < N, tl.load(lse_ptr + m), float("inf"))
        delta = tl.where(m < N, tl.load(delta_ptr + m), 0.0)
        scores, factor = add_bias(product(k, q, ACC, PRECISION), m[None, :], n[:, None], scoring)
        p = tl.exp2(scores * factor - lse[None, :])
        if masks[0] is not None:
            p = tl.where(allowed[:, None], p, 0.0)
        dv = accumulate(p, dout, dv, ACC, PRECISION)
        dscores = p * (product(v, dout, ACC, PRECISION) - delta[None, :])
        dk = accumulate(dscores, q, dk, ACC, PRECISION)

    dk = times(dk, scale)
    if norm is not None:
        tile = batch * tiles + tl.program_id(0) % tiles
        at = (head_in_batch, H, batch * N + n, row_ok, tile, 2 * H * HEAD_DIM)
        # What there is of keys beyond the last would count in the sums by column.
        dk, by_colsum, by_y = before_norm_head(where(row_ok, dk), k, norm, 1, *at, PARTS, HEAD_DIM)
        dv, more_by_colsum, more_by_y = before_norm_head(where(row_ok, dv), v, norm, 2, *at, PARTS, HEAD_DIM)
        store_by_row(by_colsum + more_by_colsum, by_y + more_by_y, norm, H + head_in_batch, batch * N + n, row_ok)
    dk_ptr = dqkv_ptr + batch * N * (3 * H * HEAD_DIM) + (H * HEAD_DIM + columns)
    store_head(dk_ptr, n, 3 * H * HEAD_DIM, row_ok, dk, PARTS, HEAD_DIM)
    store_head(dk_ptr + H * HEAD_DIM, n, 3 * H * HEAD_DIM, row_ok, dv, PARTS, HEAD_DIM)


def _constants(request: Request, config: AttentionConfig) -> dict:
    # A program of dk and dv has rows of keys, and steps over queries.
    by_key = request.kernel == "attention_backward_dkdv"
    head_dim = request.shape[-1]
    constants = dict(
        HEAD_DIM=head_dim,
        PARTS=split_head(head_dim),
        ACC=TRITON_DTYPES[accumulator_dtype(request.dtype)],
        PRECISION="tf32" if request.tf32 else "ieee",
        BLOCK_M=config.BLOCK_STEP if by_key else config.BLOCK_ROWS,
        BLOCK_N=config.BLOCK_ROWS if by_key else config.BLOCK_STEP,
    )
    if not by_key:
        fit = tiling(request, config)
        if request.kernel == "attention_forward":
            widths = fit.widths if config.ROW_TILES > 1 else ()
            constants |= dict(TILES=config.ROW_TILES, WIDTHS=widths, PEELED=int(fit.peeled))
        constants |= dict(RAGGED=fit.ragged)
    return constants | dict(num_warps=config.num_warps, num_stages=config.num_stages)


def _masks(qkv, key_padding_mask, attn_bias) -> tuple:
    """`attention_kernel`'s masks: the bias broadcast to (B, H, N, N)."""
    batch, tokens, _, heads, _ = qkv.shape
    mask = None if key_padding_mask is None else key_padding_mask.view(torch.uint8)
    bias = None if attn_bias is None else attn_bias.expand(batch, heads, tokens, tokens)
    mask_strides = (0, 0) if mask is None else mask.stride()
    # An axis of one is not stepped along: 0, as for one that is broadcast, so that no kernel is compiled for it.
    steps = [0] * 4 if bias is None else [0 if n == 1 else bias.stride(i) for i, n in enumerate(bias.shape)]
    return mask, mask_strides, bias, tuple(steps)


def _in_units(*strides: tuple[int, ...]) -> tuple:
    """Strides in multiples of 8 elements, if all are that, and 8; else as they are, and 1. Of a number Triton is told
    only whether it is a multiple of 16, and a head of 72 columns starts at multiples of 8."""
    unit = 1 if any([stride % 8 for axes in strides for stride in axes]) else 8
    return *[tuple([stride // unit for stride in axes]) for axes in strides], unit


def padded(tokens: int) -> int:
    """How long a head's row of numbers a token is in memory: every row starts aligned, and any tile may be loaded."""
    return ceil_div(tokens, MAX_STEP) * MAX_STEP


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
    programs = tiling(request, config).programs
    partial = ()
    if by_tile is not None:
        partial, args = by_tile(programs)
    launch_kernel(kernel, (programs * batch * heads, 1, 1), qkv.device)(*args, **_constants(request, config))
    return *written, *partial


def attention_forward(qkv, scale: float, key_padding_mask=None, attn_bias=None):
    """qkv (B, N, 3, H, d) with unit stride along d, key_padding_mask (B, N) bool, attn_bias broadcastable to
    (B, H, N, N) -> out (B, N, H * d) in qkv's dtype, lse (B, H, padded(N)) in base 2, float32 (float64 for float64)."""
    given, made = forward(qkv, scale, key_padding_mask, attn_bias)
    if qkv.numel():
        launch(*given)
    return made


def forward(qkv, scale: float, key_padding_mask=None, attn_bias=None):
    """What `launch` takes for `attention_forward`, and the memory of what it returns."""
    batch, tokens, _, heads, head_dim = qkv.shape
    out = torch.empty(batch, tokens, heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(batch, heads, padded(tokens), dtype=accumulator_dtype(qkv.dtype), device=qkv.device)
    masks = _masks(qkv, key_padding_mask, attn_bias)
    scores = Scores(masks[0] is not None, None if attn_bias is None else attn_bias.dtype)
    args = (qkv, out, lse, masks, tokens, padded(tokens), heads, scale, *_in_units(qkv.stride()[:4]))
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

    delta (B, H, padded(N)): the sums of out * dout over each head, if they are known. norm: a BeforeNorm; what is
    returned in place of dqkv is then rstd * dqkv. Returns dqkv (B, N, 3, H, d) contiguous in qkv's dtype; the gradient
    of the broadcast bias (B, H, N, N) in float32 (float64 for float64), or None when needs_bias is False; and with a
    norm its NormSums, else None.
    """
    batch, tokens, _, heads, _ = qkv.shape
    acc = accumulator_dtype(qkv.dtype)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dbias = torch.empty(batch, heads, tokens, tokens, dtype=acc, device=qkv.device) if needs_bias else None
    sums = None
    if dqkv.numel():
        out, delta = (out, torch.empty_like(lse)) if delta is None else (None, delta)
        by_row = None if norm is None else torch.empty(2 * heads, 2, batch * tokens, dtype=acc, device=qkv.device)
        masks = _masks(qkv, key_padding_mask, attn_bias)
        sizes = (tokens, padded(tokens), heads, scale, *_in_units(qkv.stride()[:4], dout.stride()[:2]))
        bias = None if attn_bias is None else attn_bias.dtype
        scores = Scores(key_padding_mask is not None, bias, needs_bias, norm is not None)

        def with_sums(columns: int, first: int, before: tuple, after: tuple, tiles: int):
            """Room for the sums by column of `columns` of qkv from the `first` on, and a kernel's arguments."""
            by_column = torch.empty(batch * tiles, 2, columns, dtype=acc, device=qkv.device)
            return (by_column,), (*before, (*norm, by_row, by_column, first, batch * tokens), *after)

        def run(kernel, name: str, scores: Scores, columns: int, first: int, before: tuple, after: tuple, written):
            by_tile = None if norm is None else partial(with_sums, columns, first, before, after)
            return launch(kernel, name, qkv, scores, (*before, None, *after), written, by_tile=by_tile)

        width = heads * qkv.shape[4]
        written = [dqkv[:, :, 0]]
        if out is not None:
            written.append(delta[..., :tokens])
        if needs_bias:
            written.append(dbias)
        before, after = (qkv, out, dout, lse, delta, dqkv), (dbias, masks, *sizes)
        *_, of_q = run(attention_backward_dq_kernel, "attention_backward_dq", scores, width, 0, before, after, written)
        scores = scores._replace(bias_gradient=False)
        before, after, written = (qkv, dout, lse, delta, dqkv), (masks, *sizes), (dqkv[:, :, 1:],)
        *_, of_kv = run(
            attention_backward_dkdv_kernel, "attention_backward_dkdv", scores, 2 * width, width, before, after, written
        )
        sums = None if norm is None else NormSums(by_row, of_q, of_kv)
    return dqkv, dbias, sums

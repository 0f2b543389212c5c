"""Multi-head self-attention in the flash style (arXiv 2205.14135, 2307.08691), forward and backward.

Fused: scores, scale, additive bias, key padding mask, online softmax and the product with v, reading q, k and v by
strides from the packed (B, N, 3, H, d) and writing (B, N, H * d); no score matrix exists in memory, nothing is
transposed or copied. Fused too, where asked for: rotary position embedding of q and k as they are loaded, dropout,
queries of the first tokens alone, and sequences of different lengths without padding. Backward: two kernels, one a
query tile for dq (and the gradient of the bias where wanted), one a key tile for dk and dv, each written once, straight
into the packed gradient: deterministic, no atomics.
Saved for backward: qkv, the output and the log-sum-exp of each row (in base 2, float32; +inf for a query that may
attend to no key, whose output is 0). Recomputed: the scores and probabilities, and dropout's mask from its seed, once
in each backward kernel.
A call must move, for B H N d elements a head tensor of size s: forward 4 s each, backward 8 s each; the gradient of a
bias adds B H M N float32 for M queries. The two backward kernels move 12 s each, and make seven products where one
would make five.

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
from .heads import (
    accumulate,
    before,
    column_numbers,
    load_by_pairs,
    load_head,
    load_rotated,
    product,
    rotate,
    row_product,
    store_by_pairs,
    store_head,
    times,
    where,
    zero_rows,
    zeros,
)
from .launch import cost
from .launch.choice import choose
from .launch.launcher import launch as launch_kernel
from .launch.request import MAX_STEP, AttentionConfig, Request, Scores, ceil_div, tiling, uses_tf32

LOG2_E = tl.constexpr(1.4426950408889634)
PADDING = tl.constexpr(MAX_STEP)


@triton.jit
def sequence(packed, N, M, number):
    """Of sequence `number`: which one of a batch it is; where its tokens begin there; how many there are, and how many
    of these ask. Sequences of one length are a batch; those that are packed are one of it."""
    if packed is None:
        return number, 0, N, M
    else:
        cu_ptr, total = packed
        begin = tl.maximum(tl.load(cu_ptr + number), 0).to(tl.int64)
        length = tl.minimum(tl.load(cu_ptr + number + 1), total) - begin
        length = tl.minimum(tl.maximum(length, 0), N).to(tl.int32)  # nobody may have looked at what is in there
        return number * 0, begin, length, length


@triton.jit
def head_pointers(qkv_ptr, strides, batch, begin, head, UNIT: tl.constexpr):
    """Where q, k and v of a head start, and how far apart its tokens are."""
    stride = tl.cast(strides[1], tl.int64) * UNIT
    q_ptr = qkv_ptr + (batch * UNIT * strides[0] + begin * stride + head * UNIT * strides[3])
    step = tl.cast(strides[2], tl.int64) * UNIT
    return q_ptr, q_ptr + step, q_ptr + step + step, stride


@triton.jit
def rope_of(rope, batch, begin, N):
    """`attention_kernel`'s rope as `heads` has it, of a sequence of N tokens."""
    cos_ptr, sin_ptr, tables, first = rope
    offset = batch * tables[0] + begin * tables[1]
    return cos_ptr + offset, sin_ptr + offset, tables[1], tables[2], first, N


@triton.jit
def load_keys(pointers, n, n_ok, HEAD_DIM: tl.constexpr, NEIGHBOURS: tl.constexpr, ACC: tl.constexpr):
    """Keys n of a head, and their values."""
    _, k_ptr, v_ptr, stride, rope = pointers
    k = load_rotated(k_ptr, n, stride, n_ok, rope, HEAD_DIM, NEIGHBOURS, ACC)
    return k, load_head(v_ptr, n, stride, n_ok, HEAD_DIM)


@triton.jit
def key_allowed(n, scoring):
    """Which of keys n there are, and are not masked."""
    masks, batch, _, N, _, _ = scoring
    mask_ptr, strides, _, _, _ = masks
    allowed = n < N
    if mask_ptr is not None:
        offset = batch * strides[0] + n.to(tl.int64) * strides[1]
        allowed = allowed & (tl.load(mask_ptr + offset, mask=n < N, other=0) != 0)
    return allowed


@triton.jit
def add_bias(scores, m, n, scoring):
    """Scores of queries m and keys n, one a column, the other a row, with their bias, and by what they are to be
    multiplied for base 2: 1 where that is done."""
    masks, batch, head, N, M, to_base_2 = scoring
    _, _, bias_ptr, strides, _ = masks
    if bias_ptr is None:
        return scores, to_base_2
    else:
        offset = batch * strides[0] + head * strides[1] + m.to(tl.int64) * strides[2] + n.to(tl.int64) * strides[3]
        bias = tl.load(bias_ptr + offset, mask=(m < M) & (n < N), other=0.0)
        return scores * to_base_2 + bias.to(scores.dtype) * LOG2_E, 1.0


@triton.jit
def kept(m, n, scoring):
    """Dropout's factors of the probabilities of queries m and keys n, one a column, the other a row: 0, or 1 over the
    rate that is kept. The random numbers are those of a counter (Philox, doi 10.1145/2063384.2063405), so that they are
    the same in the backward pass, in whatever tiles."""
    masks, batch, head, _, _, _ = scoring
    _, _, _, _, dropout = masks
    if dropout is None:
        return 1.0
    else:
        seed_ptr, rate = dropout
        m, n = tl.broadcast(m, n)
        zero = m * 0
        random, _, _, _ = tl.philox(tl.load(seed_ptr), n, m, zero + head.to(tl.int32), zero + batch.to(tl.int32))
        return tl.where(tl.uint_to_uniform_float(random) < rate, 0.0, 1.0 / (1.0 - rate))


@triton.jit
def before_norm_head(
    dy, y, norm, which, head, H, row, row_ok, tile, COLUMNS, rope, HEAD_DIM: tl.constexpr, NEIGHBOURS: tl.constexpr
):
    """`before_norm` of a head of q, k or v (`which`: 0, 1, 2), held by pairs where there is a rope, its sums by column
    stored as number `tile` of COLUMNS, after those of the ones before. Returns s and the sums by row."""
    mean_ptr, rstd_ptr, colsum_ptr, bias_ptr, _, by_column_ptr, earlier, _ = norm
    mean = tl.load(mean_ptr + row, mask=row_ok, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=row_ok, other=0.0)
    head_s = ()
    by_colsum = tl.zeros_like(mean)
    by_y = by_colsum
    for i in tl.static_range(len(dy)):
        d, column_ok = column_numbers(i, rope, HEAD_DIM, NEIGHBOURS)
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
# the exponentials, and the sum of these times v. `pointers`: what `head_pointers` returns, and a rope or None.
# `scoring`: the masks (see `attention_kernel`), the sequence's number, head, N, M, and what makes scores base 2.


@triton.jit
def attend(q, k, v, state, m, n, scoring, RAGGED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """The state of queries m after keys n, and before them `state`, None for no key. RAGGED: n goes beyond the last."""
    masks, _, _, _, _, _ = scoring
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
    p *= kept(m[:, None], n[None, :], scoring)
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
        acc += (tl.broadcast_to(v[i].to(ACC), (q[0].shape[0], v[i].shape[1])),)
    score = row_product(q, k, ACC) * to_base_2
    return score, tl.zeros_like(score) + 1.0, acc


@triton.jit
def attend_one(q, k, v, state, n, scoring, ACC: tl.constexpr):
    """`attend` for a single query, without matrix products."""
    _, _, _, N, _, to_base_2 = scoring
    scores = tl.where(n < N, row_product(q, k, ACC) * to_base_2, float("-inf"))
    larger = tl.maximum(state[0], tl.max(scores, axis=0))
    p = tl.exp2(scores - larger)
    correction = tl.exp2(state[0] - larger)
    acc = ()
    for i in tl.static_range(len(v)):
        acc += (state[2][i] * correction[:, None] + tl.sum(p[:, None] * v[i].to(ACC), axis=0)[None, :],)
    return larger, state[1] * correction + tl.sum(p, axis=0), acc


@triton.jit
def first_query(pointers, scoring, HEAD_DIM: tl.constexpr, NEIGHBOURS: tl.constexpr, ACC: tl.constexpr):
    """The first query of a head, and its state after the first key."""
    q_ptr, _, _, stride, rope = pointers
    n = tl.arange(0, 1)
    q = load_rotated(q_ptr, n, stride, None, rope, HEAD_DIM, NEIGHBOURS, ACC)
    k, v = load_keys(pointers, n, None, HEAD_DIM, NEIGHBOURS, ACC)
    return q, attend_key(q, k, v, scoring[5], ACC)


@triton.jit
def store_attended(state, out_ptr, lse_ptr, m, H, ok, HEAD_DIM: tl.constexpr):
    """Output and log-sum-exp of queries m, from their state after all keys."""
    largest, total, acc = state
    safe_total = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("inf"), largest + tl.log2(safe_total))
    tl.store(lse_ptr + m, lse, mask=ok)
    store_head(out_ptr, m, H * HEAD_DIM, ok, times(acc, (1.0 / safe_total)[:, None]), HEAD_DIM)


@triton.jit
def attend_tile(
    pointers,
    out_ptr,
    lse_ptr,
    keys,
    values,
    m,
    M,
    H,
    scoring,
    HEAD_DIM: tl.constexpr,
    NEIGHBOURS: tl.constexpr,  # of a rope, see `heads`
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTHS: tl.constexpr,
    PEELED: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """`attention_kernel` of queries m. keys, values: all of the head tile by tile, or empty: they are loaded."""
    q_ptr, _, _, stride, rope = pointers
    _, _, _, N, _, to_base_2 = scoring
    q = load_rotated(q_ptr, m, stride, m < M, rope, HEAD_DIM, NEIGHBOURS, ACC)
    state = None
    if PEELED:
        first_k, first_v = load_keys(pointers, tl.arange(0, 1), None, HEAD_DIM, NEIGHBOURS, ACC)
        state = attend_key(q, first_k, first_v, to_base_2, ACC)
    if len(keys) == 0:
        if not PEELED:
            nothing = tl.zeros_like(m.to(ACC))
            state = nothing - float("inf"), nothing, zero_rows(m, HEAD_DIM, ACC)
        for begin in range(PEELED, N, BLOCK_N):
            n = begin + tl.arange(0, BLOCK_N)
            k, v = load_keys(pointers, n, n < N if RAGGED else None, HEAD_DIM, NEIGHBOURS, ACC)
            state = attend(q, k, v, state, m, n, scoring, RAGGED, ACC, PRECISION)
    else:
        for i in tl.static_range(len(WIDTHS)):
            last = i == len(WIDTHS) - 1
            n_of_tile = PEELED + before(WIDTHS, i) + tl.arange(0, WIDTHS[i])
            state = attend(q, keys[i], values[i], state, m, n_of_tile, scoring, RAGGED and last, ACC, PRECISION)
    store_attended(state, out_ptr, lse_ptr, m, H, m < M, HEAD_DIM)


@triton.jit(launch_metadata=cost.attention_launch)
def attention_kernel(
    qkv_ptr,  # (B, N, 3, H, HEAD_DIM) by strides, unit stride along HEAD_DIM
    out_ptr,  # (B, M, H * HEAD_DIM) contiguous
    lse_ptr,  # (B, H, PADDED) contiguous, 0 after M
    # A key padding mask (B, N) in bytes or None, its strides, a bias (B, H, M, N) or None, its strides, and dropout's
    # seed and rate or None.
    masks,
    # None, or cos and sin (B, tokens from `first` on, HEAD_DIM / 2), their strides, and `first`.
    rope,
    # None, or of sequences one after the other, a batch of one: where each begins and the last ends, and how many
    # tokens there are in all. N is then how many a sequence has at most.
    packed,
    N,
    M,  # how many tokens, the first ones, ask
    PADDED,
    H,
    scale,
    strides,  # of qkv's first four axes, in UNITs
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NEIGHBOURS: tl.constexpr,  # of a rope, see `heads`
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
    programs = tl.cdiv(M - PEELED, BLOCK_M * TILES)
    if PEELED and TILES == 1:
        programs += 1  # number 0, for the first query
    head, number = tl.program_id(0) // programs, tl.program_id(0) % programs
    nth, head_in_batch = (head // H).to(tl.int64), (head % H).to(tl.int64)
    batch, begin, N, M = sequence(packed, N, M, nth)
    q_ptr, k_ptr, v_ptr, stride = head_pointers(qkv_ptr, strides, batch, begin, head_in_batch, UNIT)
    if rope is not None:  # None is nothing that a function of Triton 3.6 can return
        rope = rope_of(rope, batch, begin, N)
    pointers = (q_ptr, k_ptr, v_ptr, stride, rope)
    out_ptr += (batch * M + begin) * (H * HEAD_DIM) + head_in_batch * HEAD_DIM
    lse_ptr += head.to(tl.int64) * PADDED
    scoring = (masks, nth, head_in_batch, N, M, scale * LOG2_E)
    # What is behind the last query counts for nothing, but an operator's results have to be the same every time.
    if number == 0:
        for start in range(M, PADDED, PADDING):
            behind = start + tl.arange(0, PADDING)
            tl.store(lse_ptr + behind, tl.zeros((PADDING,), ACC), mask=behind < PADDED)

    keys, values = (), ()
    if TILES > 1:
        if PEELED:
            first_q, first = first_query(pointers, scoring, HEAD_DIM, NEIGHBOURS, ACC)
        for i in tl.static_range(len(WIDTHS)):
            n = PEELED + before(WIDTHS, i) + tl.arange(0, WIDTHS[i])
            k, v = load_keys(pointers, n, n < N, HEAD_DIM, NEIGHBOURS, ACC)
            keys, values = keys + (k,), values + (v,)
            if PEELED:
                first = attend_one(first_q, k, v, first, n, scoring, ACC)
        if PEELED:
            m = tl.arange(0, 1)
            store_attended(first, out_ptr, lse_ptr, m, H, m + number == 0, HEAD_DIM)
        start_of_all = PEELED + number * (BLOCK_M * TILES)
        end = tl.minimum(start_of_all + BLOCK_M * TILES, M)
        for start in tl.range(start_of_all, end, BLOCK_M, disable_licm=True):
            tile = (pointers, out_ptr, lse_ptr, keys, values, start + tl.arange(0, BLOCK_M), M, H, scoring)
            attend_tile(*tile, HEAD_DIM, NEIGHBOURS, ACC, PRECISION, BLOCK_N, WIDTHS, PEELED, RAGGED)
    else:
        if PEELED:  # noqa: SIM102, known at compile time
            if number == 0:
                first_q, first = first_query(pointers, scoring, HEAD_DIM, NEIGHBOURS, ACC)
                for start in range(1, N, BLOCK_N):
                    n = start + tl.arange(0, BLOCK_N)
                    k, v = load_keys(pointers, n, n < N, HEAD_DIM, NEIGHBOURS, ACC)
                    first = attend_one(first_q, k, v, first, n, scoring, ACC)
                n = tl.arange(0, 1)
                store_attended(first, out_ptr, lse_ptr, n, H, n == 0, HEAD_DIM)
                return
        if packed is not None:  # noqa: SIM102, known at compile time
            if number * BLOCK_M >= M:
                return
        m = (number - PEELED) * BLOCK_M + PEELED + tl.arange(0, BLOCK_M)
        tile = (pointers, out_ptr, lse_ptr, keys, values, m, M, H, scoring)
        attend_tile(*tile, HEAD_DIM, NEIGHBOURS, ACC, PRECISION, BLOCK_N, WIDTHS, PEELED, RAGGED)


@triton.jit(launch_metadata=cost.attention_backward_dq_launch)
def attention_backward_dq_kernel(
    qkv_ptr,  # (B, N, 3, H, HEAD_DIM) by strides, unit stride along HEAD_DIM
    out_ptr,  # (B, M, H * HEAD_DIM) contiguous, or None where delta is given
    dout_ptr,  # (B, M, H * HEAD_DIM) by strides, unit stride along the last axis
    lse_ptr,  # (B, H, PADDED) contiguous
    delta_ptr,  # (B, H, PADDED) contiguous, rowsum(out * dout): written here for the other kernel, if not given
    dqkv_ptr,  # (B, N, 3, H, HEAD_DIM) contiguous, of which q's part is written
    norm,  # of the norm before qkv what `before_norm_head` and `store_by_row` take, or None
    dbias_ptr,  # (B, H, M, N) contiguous, or None
    masks,  # see `attention_kernel`, as for rope, packed, N and M
    rope,
    packed,
    N,
    M,
    PADDED,
    H,
    scale,
    strides,  # of qkv's first four axes, in UNITs
    dout_strides,  # of dout's first two, in UNITs
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NEIGHBOURS: tl.constexpr,  # of a rope, see `heads`
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RAGGED: tl.constexpr,  # whether the last tile of keys is wider than what is left
    FEW: tl.constexpr,  # whether M is less than N
):
    """dq of a tile of queries of one head, or rstd * dq with the sums that the norm before qkv needs."""
    tiles = tl.cdiv(N, BLOCK_M)
    head, number = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    nth, head_in_batch = (head // H).to(tl.int64), (head % H).to(tl.int64)
    batch, begin, N, M = sequence(packed, N, M, nth)
    if packed is not None:  # noqa: SIM102, known at compile time
        if number * BLOCK_M >= N:
            return
    q_ptr, k_ptr, v_ptr, stride = head_pointers(qkv_ptr, strides, batch, begin, head_in_batch, UNIT)
    if rope is not None:
        rope = rope_of(rope, batch, begin, N)
    pointers = (q_ptr, k_ptr, v_ptr, stride, rope)
    columns = head_in_batch * HEAD_DIM
    dout_stride = tl.cast(dout_strides[1], tl.int64) * UNIT
    dout_ptr += batch * UNIT * dout_strides[0] + begin * dout_stride + columns
    lse_ptr += head.to(tl.int64) * PADDED
    delta_ptr += head.to(tl.int64) * PADDED
    m = number * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = m < M

    q = load_rotated(q_ptr, m, stride, row_ok, rope, HEAD_DIM, NEIGHBOURS, ACC)
    dout = load_head(dout_ptr, m, dout_stride, row_ok, HEAD_DIM)
    lse = tl.load(lse_ptr + m, mask=row_ok, other=0.0)
    if out_ptr is None:
        delta = tl.load(delta_ptr + m, mask=row_ok, other=0.0)
    else:
        out_ptr += (batch * M + begin) * (H * HEAD_DIM) + columns
        delta = row_product(load_head(out_ptr, m, H * HEAD_DIM, row_ok, HEAD_DIM), dout, ACC)
        tl.store(delta_ptr + m, delta, mask=row_ok)
    if dbias_ptr is not None:
        dbias_ptr += head.to(tl.int64) * M * N

    scoring = (masks, nth, head_in_batch, N, M, scale * LOG2_E)
    dq = zeros(q, ACC)
    end = tl.where(number * BLOCK_M < M, N, 0) if FEW else N  # of a tile that does not ask dq is 0
    for start in range(0, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k, v = load_keys(pointers, n, n < N if RAGGED else None, HEAD_DIM, NEIGHBOURS, ACC)
        scores, factor = add_bias(product(q, k, ACC, PRECISION), m[:, None], n[None, :], scoring)
        p = tl.exp2(scores * factor - lse[:, None])
        if RAGGED or masks[0] is not None:
            p = tl.where(key_allowed(n, scoring)[None, :], p, 0.0)
        dp = product(dout, v, ACC, PRECISION) * kept(m[:, None], n[None, :], scoring)
        dscores = p * (dp - delta[:, None])
        if dbias_ptr is not None:
            offset = m.to(tl.int64)[:, None] * N + n[None, :]
            tile = row_ok[:, None] & (n < N)[None, :]
            tl.store(dbias_ptr + offset, dscores.to(dbias_ptr.dtype.element_ty), mask=tile)
        dq = accumulate(dscores, k, dq, ACC, PRECISION)

    dq = rotate(times(dq, scale), m, rope, HEAD_DIM, ACC, BACK=True)
    if norm is not None:
        if rope is not None:
            q = load_by_pairs(q_ptr, m, stride, row_ok, rope, HEAD_DIM, NEIGHBOURS)
        at = (head_in_batch, H, nth * N + m, row_ok, nth * tiles + number, H * HEAD_DIM)
        dq, by_colsum, by_y = before_norm_head(dq, q, norm, 0, *at, rope, HEAD_DIM, NEIGHBOURS)
        store_by_row(by_colsum, by_y, norm, head_in_batch, nth * N + m, row_ok)
    dq_ptr = dqkv_ptr + (batch * N + begin) * (3 * H * HEAD_DIM) + columns
    store_by_pairs(dq_ptr, m, 3 * H * HEAD_DIM, m < N, dq, rope, HEAD_DIM, NEIGHBOURS)


@triton.jit(launch_metadata=cost.attention_backward_dkdv_launch)
def attention_backward_dkdv_kernel(
    qkv_ptr,  # (B, N, 3, H, HEAD_DIM) by strides, unit stride along HEAD_DIM
    dout_ptr,  # (B, M, H * HEAD_DIM) by strides, unit stride along the last axis
    lse_ptr,  # (B, H, PADDED) contiguous
    delta_ptr,  # (B, H, PADDED) contiguous, rowsum(out * dout)
    dqkv_ptr,  # (B, N, 3, H, HEAD_DIM) contiguous, of which k's and v's parts are written
    norm,  # of the norm before qkv what `before_norm_head` and `store_by_row` take, or None
    masks,  # see `attention_kernel`, as for rope, packed, N and M
    rope,
    packed,
    N,
    M,
    PADDED,
    H,
    scale,
    strides,  # of qkv's first four axes, in UNITs
    dout_strides,  # of dout's first two, in UNITs
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NEIGHBOURS: tl.constexpr,  # of a rope, see `heads`
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of a tile of keys of one head, or rstd times these with the sums that the norm before qkv needs."""
    tiles = tl.cdiv(N, BLOCK_N)
    head, number = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    nth, head_in_batch = (head // H).to(tl.int64), (head % H).to(tl.int64)
    batch, begin, N, M = sequence(packed, N, M, nth)
    if packed is not None:  # noqa: SIM102, known at compile time
        if number * BLOCK_N >= N:
            return
    q_ptr, k_ptr, v_ptr, stride = head_pointers(qkv_ptr, strides, batch, begin, head_in_batch, UNIT)
    if rope is not None:
        rope = rope_of(rope, batch, begin, N)
    pointers = (q_ptr, k_ptr, v_ptr, stride, rope)
    columns = head_in_batch * HEAD_DIM
    dout_stride = tl.cast(dout_strides[1], tl.int64) * UNIT
    dout_ptr += batch * UNIT * dout_strides[0] + begin * dout_stride + columns
    lse_ptr += head.to(tl.int64) * PADDED
    delta_ptr += head.to(tl.int64) * PADDED
    n = number * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = n < N
    scoring = (masks, nth, head_in_batch, N, M, scale * LOG2_E)
    k, v = load_keys(pointers, n, row_ok, HEAD_DIM, NEIGHBOURS, ACC)
    if masks[0] is not None:
        allowed = key_allowed(n, scoring)

    dk, dv = zeros(k, ACC), zeros(v, ACC)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        q = load_rotated(q_ptr, m, stride, m < M, rope, HEAD_DIM, NEIGHBOURS, ACC)
        dout = load_head(dout_ptr, m, dout_stride, m < M, HEAD_DIM)
        # Without a mask, so that they load wide: there is memory behind the last query, whose probabilities are 0.
        lse = tl.where(m < M, tl.load(lse_ptr + m), float("inf"))
        delta = tl.where(m < M, tl.load(delta_ptr + m), 0.0)
        scores, factor = add_bias(product(k, q, ACC, PRECISION), m[None, :], n[:, None], scoring)
        p = tl.exp2(scores * factor - lse[None, :])
        if masks[0] is not None:
            p = tl.where(allowed[:, None], p, 0.0)
        keep = kept(m[None, :], n[:, None], scoring)
        dv = accumulate(p * keep, dout, dv, ACC, PRECISION)
        dscores = p * (product(v, dout, ACC, PRECISION) * keep - delta[None, :])
        dk = accumulate(dscores, q, dk, ACC, PRECISION)

    dk = rotate(times(dk, scale), n, rope, HEAD_DIM, ACC, BACK=True)
    if norm is not None:
        if rope is not None:
            k = load_by_pairs(k_ptr, n, stride, row_ok, rope, HEAD_DIM, NEIGHBOURS)
        at = (head_in_batch, H, nth * N + n, row_ok, nth * tiles + number, 2 * H * HEAD_DIM)
        # What there is of keys beyond the last would count in the sums by column.
        dk, by_colsum, by_y = before_norm_head(where(row_ok, dk), k, norm, 1, *at, rope, HEAD_DIM, NEIGHBOURS)
        dv, more_by_colsum, more_by_y = before_norm_head(where(row_ok, dv), v, norm, 2, *at, None, HEAD_DIM, NEIGHBOURS)
        store_by_row(by_colsum + more_by_colsum, by_y + more_by_y, norm, H + head_in_batch, nth * N + n, row_ok)
    dk_ptr = dqkv_ptr + (batch * N + begin) * (3 * H * HEAD_DIM) + (H * HEAD_DIM + columns)
    store_by_pairs(dk_ptr, n, 3 * H * HEAD_DIM, row_ok, dk, rope, HEAD_DIM, NEIGHBOURS)
    store_head(dk_ptr + H * HEAD_DIM, n, 3 * H * HEAD_DIM, row_ok, dv, HEAD_DIM)


class Options(NamedTuple):
    """What attention takes beside qkv and its scale: see `fastvit.ops.attention`, and of cu_seqlens and max_seqlen
    `attention_varlen`, whose qkv is a batch of one without that axis. seed: of dropout, a tensor of one integer."""

    key_padding_mask: torch.Tensor | None = None
    attn_bias: torch.Tensor | None = None
    dropout_p: float = 0.0
    seed: torch.Tensor | None = None
    rope_cos: torch.Tensor | None = None
    rope_sin: torch.Tensor | None = None
    rope_interleaved: bool = False
    num_queries: int | None = None
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int = 0


class _Call(NamedTuple):
    """What the kernels are told of qkv and Options: for the choice of a config; as arguments, rope and packed as
    `attention_kernel` takes them; and how many queries there are of a sequence, at most."""

    shape: tuple[int, int, int, int]
    scores: Scores
    masks: tuple
    rope: tuple | None
    packed: tuple | None
    queries: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """N, M, PADDED and H."""
        _, tokens, heads, _ = self.shape
        return tokens, self.queries, padded(self.queries), heads


def _call(qkv, options: Options) -> _Call:
    batch, tokens, heads, head_dim = _dims(qkv)
    queries = tokens if options.num_queries is None else options.num_queries
    mask, bias = options.key_padding_mask, options.attn_bias
    mask = None if mask is None else mask.view(torch.uint8)
    mask_strides = (0, 0) if mask is None else mask.stride()
    dropout = None if options.seed is None else (options.seed, options.dropout_p)
    scores = Scores(mask is not None, None if bias is None else bias.dtype, dropout=dropout is not None)
    steps = [0] * 4
    if bias is not None:
        bias = bias.expand(batch, heads, queries, tokens)
        # An axis of one is not stepped along: 0, as for one that is broadcast, so that no kernel is compiled for it.
        steps = [0 if n == 1 else bias.stride(i) for i, n in enumerate(bias.shape)]
    rope = packed = kind = None
    if options.rope_cos is not None:
        cos, sin, kind = options.rope_cos, options.rope_sin, "neighbours" if options.rope_interleaved else "halves"
        strides = (0 if cos.dim() == 2 or cos.shape[0] == 1 else cos.stride(0), *cos.stride()[-2:])
        rope = (cos, sin, strides, tokens - cos.shape[-2])
    asked = queries if queries < tokens else 0
    if options.cu_seqlens is not None:
        packed = (options.cu_seqlens, tokens)
        batch, tokens = options.cu_seqlens.shape[0] - 1, options.max_seqlen
        queries = tokens
    shape = (batch, tokens, heads, head_dim)
    scores = scores._replace(rope=kind, packed=packed is not None, queries=asked)
    return _Call(shape, scores, (mask, mask_strides, bias, tuple(steps), dropout), rope, packed, queries)


def _dims(qkv) -> tuple[int, int, int, int]:
    """B, N, H and d; packed sequences are a batch of one."""
    *tokens, _, heads, head_dim = qkv.shape
    return (tokens[0] if len(tokens) == 2 else 1), tokens[-1], heads, head_dim


def _strides(tensor, axes: int) -> tuple[int, ...]:
    """The strides of all but the last axis, of which a batch has so many."""
    strides = tensor.stride()[:-1]
    return strides if len(strides) == axes else (0, *strides)


def _constants(request: Request, config: AttentionConfig) -> dict:
    # A program of dk and dv has rows of keys, and steps over queries.
    by_key = request.kernel == "attention_backward_dkdv"
    constants = dict(
        HEAD_DIM=request.shape[-1],
        NEIGHBOURS=request.parts.rope == "neighbours",
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
        else:
            constants |= dict(FEW=request.parts.queries > 0)
        constants |= dict(RAGGED=fit.ragged)
    return constants | dict(num_warps=config.num_warps, num_stages=config.num_stages)


def _in_units(*strides: tuple[int, ...]) -> tuple:
    """Strides in multiples of 8 elements, if all are that, and 8; else as they are, and 1. Of a number Triton is told
    only whether it is a multiple of 16, and a head of 72 columns starts at multiples of 8."""
    unit = 1 if any([stride % 8 for axes in strides for stride in axes]) else 8
    return *[tuple([stride // unit for stride in axes]) for axes in strides], unit


def padded(tokens: int) -> int:
    """How long a head's row of numbers a token is in memory: every row starts aligned, and any tile may be loaded."""
    return ceil_div(tokens, MAX_STEP) * MAX_STEP


def launch(kernel, name: str, call: _Call, qkv, args, written, config=None, by_tile=None):
    """Launch a kernel of attention over rows of `qkv`, with the config chosen for it if none is given. by_tile: from
    the number of tiles a head, (tensors filled tile by tile along their first axis, the arguments in place of args).
    Returns `written`, what else it fills, and those tensors."""
    request = Request(name, call.shape, qkv.dtype, call.scores, uses_tf32(qkv.dtype))
    if config is None:

        def repeat(config: AttentionConfig) -> tuple[torch.Tensor, ...]:
            filled = launch(kernel, name, call, qkv, args, written, config, by_tile)
            return *written, *[tensor.sum(0) for tensor in filled[len(written) :]]

        config = choose(request, qkv.device, repeat)
    programs = tiling(request, config).programs
    partial = ()
    if by_tile is not None:
        partial, args = by_tile(programs)
    batch, _, heads, _ = call.shape
    launch_kernel(kernel, (programs * batch * heads, 1, 1), qkv.device)(*args, **_constants(request, config))
    return *written, *partial


def attention_forward(qkv, scale: float, *options):
    """qkv (B, N, 3, H, d), or (N, 3, H, d) of packed sequences, with unit stride along d, and Options -> out in qkv's
    dtype, lse in base 2 in float32 (float64 for float64), of `result_shapes`."""
    given, made = forward(qkv, scale, Options(*options))
    if qkv.numel():
        launch(*given)
    return made


def result_shapes(qkv, options: Options) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of out and lse."""
    batch, tokens, heads, head_dim = _dims(qkv)
    queries = tokens if options.num_queries is None else options.num_queries
    out = (*qkv.shape[:-4], queries, heads * head_dim)
    if options.cu_seqlens is not None:
        batch, queries = options.cu_seqlens.shape[0] - 1, options.max_seqlen
    return out, (batch, heads, padded(queries))


def forward(qkv, scale: float, options: Options):
    """What `launch` takes for `attention_forward`, and the memory of what it returns."""
    call = _call(qkv, options)
    out_shape, lse_shape = result_shapes(qkv, options)
    # Packed tokens may be in no sequence.
    made = torch.empty if call.packed is None else torch.zeros
    out = made(out_shape, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(lse_shape, dtype=accumulator_dtype(qkv.dtype), device=qkv.device)
    args = (qkv, out, lse, call.masks, call.rope, call.packed, *call.sizes, scale, *_in_units(_strides(qkv, 4)))
    return (attention_kernel, "attention_forward", call, qkv, args, (out, lse)), (out, lse)


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


def attention_backward(dout, qkv, out, lse, scale: float, needs_bias: bool, *options):
    """`backward` with Options, of qkv and the bias alone."""
    dqkv, dbias, _ = backward(dout, qkv, out, lse, scale, Options(*options), needs_bias)
    return dqkv, dbias


def backward(dout, qkv, out, lse, scale: float, options: Options, needs_bias=False, delta=None, norm=None):
    """Gradients of `attention_forward` for dout, of out's shape with unit stride along the last axis.

    delta, as large as lse: the sums of out * dout over each head, if they are known. norm: a BeforeNorm; what is
    returned in place of dqkv is then rstd * dqkv. Returns dqkv, of qkv's shape and dtype, contiguous; the gradient
    of the broadcast bias (B, H, M, N) in float32 (float64 for float64), or None when needs_bias is False; and with a
    norm its NormSums, else None.
    """
    batch, tokens, heads, head_dim = _dims(qkv)
    acc = accumulator_dtype(qkv.dtype)
    call = _call(qkv, options)
    dqkv = (torch.empty if call.packed is None else torch.zeros)(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dbias = torch.empty(batch, heads, call.queries, tokens, dtype=acc, device=qkv.device) if needs_bias else None
    sums = None
    if dqkv.numel():
        out, delta = (out, torch.empty_like(lse)) if delta is None else (None, delta)
        by_row = None if norm is None else torch.empty(2 * heads, 2, batch * tokens, dtype=acc, device=qkv.device)
        how = (call.masks, call.rope, call.packed, *call.sizes, scale)
        how = (*how, *_in_units(_strides(qkv, 4), _strides(dout, 2)))
        call = call._replace(scores=call.scores._replace(before_norm=norm is not None))

        def with_sums(columns: int, first: int, before: tuple, after: tuple, tiles: int):
            """Room for the sums by column of `columns` of qkv from the `first` on, and a kernel's arguments."""
            by_column = torch.empty(batch * tiles, 2, columns, dtype=acc, device=qkv.device)
            return (by_column,), (*before, (*norm, by_row, by_column, first, batch * tokens), *after)

        def run(kernel, name: str, call: _Call, columns: int, first: int, before: tuple, after: tuple, written):
            by_tile = None if norm is None else partial(with_sums, columns, first, before, after)
            return launch(kernel, name, call, qkv, (*before, None, *after), written, by_tile=by_tile)

        width = heads * head_dim
        written = [dqkv.select(-3, 0)]
        if out is not None and call.packed is None:
            written.append(delta[..., : call.queries])
        if needs_bias:
            written.append(dbias)
        first = call._replace(scores=call.scores._replace(bias_gradient=needs_bias))
        before, after = (qkv, out, dout, lse, delta, dqkv), (dbias, *how)
        *_, of_q = run(attention_backward_dq_kernel, "attention_backward_dq", first, width, 0, before, after, written)
        before, written = (qkv, dout, lse, delta, dqkv), (dqkv.narrow(-3, 1, 2),)
        *_, of_kv = run(
            attention_backward_dkdv_kernel, "attention_backward_dkdv", call, 2 * width, width, before, how, written
        )
        sums = None if norm is None else NormSums(by_row, of_q, of_kv)
    return dqkv, dbias, sums

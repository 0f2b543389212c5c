"""A tile of rows of an attention head, held as a tuple of parts of its columns whose widths are powers of two: loading,
storing, rotating, and the products of two such tiles."""

import triton
import triton.language as tl

from .launch.request import split_head


@triton.constexpr_function
def before(widths, i):
    """Where part number i starts."""
    return sum(widths[:i])


@triton.jit
def load_columns(ptr, tokens, stride, token_ok, columns, column_ok):
    """A tile of these columns of rows `tokens`; token_ok: of which there are, None for all."""
    mask = column_ok[None, :]
    if token_ok is not None:
        mask = mask & token_ok[:, None]
    return tl.load(ptr + ((tokens.to(tl.int64) * stride)[:, None] + columns[None, :]), mask=mask, other=0.0)


@triton.jit
def store_columns(ptr, tokens, stride, token_ok, columns, column_ok, tile):
    offset = (tokens.to(tl.int64) * stride)[:, None] + columns[None, :]
    tl.store(ptr + offset, tile.to(ptr.dtype.element_ty), mask=token_ok[:, None] & column_ok[None, :])


@triton.jit
def load_head(ptr, tokens, stride, token_ok, HEAD_DIM: tl.constexpr):
    """Rows of a head; token_ok: of which tokens, None for all."""
    PARTS: tl.constexpr = split_head(HEAD_DIM)
    head = ()
    for i in tl.static_range(len(PARTS)):
        d = before(PARTS, i) + tl.arange(0, PARTS[i])
        head += (load_columns(ptr, tokens, stride, token_ok, d, d < HEAD_DIM),)
    return head


@triton.jit
def store_head(ptr, tokens, stride, token_ok, head, HEAD_DIM: tl.constexpr):
    PARTS: tl.constexpr = split_head(HEAD_DIM)
    for i in tl.static_range(len(PARTS)):
        d = before(PARTS, i) + tl.arange(0, PARTS[i])
        store_columns(ptr, tokens, stride, token_ok, d, d < HEAD_DIM, head[i])


# Rotary position embedding (arXiv 2104.09864): each pair of columns (x, y) of a query or a key becomes
# (x cos - y sin, y cos + x sin). Such a head is held by pairs: the x of all, in parts, and then the y, since scores do
# not depend on the order of columns. `rope`: None, where a head is held as it is; or cos and sin, by token and pair, of
# the sequence at hand, their strides, the first token that they are for, and the one behind the last. NEIGHBOURS:
# whether a pair's columns are; else y comes half a head after x.


@triton.jit
def column_numbers(i, rope, HEAD_DIM: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """The columns of part number i of a head, and which of them there are."""
    if rope is None:
        PARTS: tl.constexpr = split_head(HEAD_DIM)
        d = before(PARTS, i) + tl.arange(0, PARTS[i])
        return d, d < HEAD_DIM
    else:
        PAIRS: tl.constexpr = HEAD_DIM // 2
        PARTS_OF_PAIRS: tl.constexpr = split_head(PAIRS)
        COUNT: tl.constexpr = len(PARTS_OF_PAIRS)
        pair = before(PARTS_OF_PAIRS, i % COUNT) + tl.arange(0, PARTS_OF_PAIRS[i % COUNT])
        if NEIGHBOURS:
            return 2 * pair + i // COUNT, pair < PAIRS
        else:
            return pair + PAIRS * (i // COUNT), pair < PAIRS


@triton.jit
def load_by_pairs(ptr, tokens, stride, token_ok, rope, HEAD_DIM: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """`load_head`, held by pairs where there is a rope."""
    if rope is None:
        return load_head(ptr, tokens, stride, token_ok, HEAD_DIM)
    else:
        PARTS: tl.constexpr = split_head(HEAD_DIM // 2)
        head_x, head_y = (), ()
        for i in tl.static_range(len(PARTS)):
            if NEIGHBOURS:
                d = 2 * before(PARTS, i) + tl.arange(0, 2 * PARTS[i])
                both = load_columns(ptr, tokens, stride, token_ok, d, d < HEAD_DIM)
                x, y = tl.split(tl.reshape(both, (tokens.shape[0], PARTS[i], 2)))
            else:
                d, d_ok = column_numbers(i, rope, HEAD_DIM, NEIGHBOURS)
                x = load_columns(ptr, tokens, stride, token_ok, d, d_ok)
                d, d_ok = column_numbers(i + len(PARTS), rope, HEAD_DIM, NEIGHBOURS)
                y = load_columns(ptr, tokens, stride, token_ok, d, d_ok)
            head_x += (x,)
            head_y += (y,)
        return head_x + head_y


@triton.jit
def store_by_pairs(ptr, tokens, stride, token_ok, head, rope, HEAD_DIM: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """`store_head` of what is held as `load_by_pairs` returns it."""
    if rope is None:
        store_head(ptr, tokens, stride, token_ok, head, HEAD_DIM)
    else:
        PARTS: tl.constexpr = split_head(HEAD_DIM // 2)
        for i in tl.static_range(len(PARTS)):
            x, y = head[i], head[i + len(PARTS)]
            if NEIGHBOURS:
                d = 2 * before(PARTS, i) + tl.arange(0, 2 * PARTS[i])
                both = tl.reshape(tl.join(x, y), (tokens.shape[0], 2 * PARTS[i]))
                store_columns(ptr, tokens, stride, token_ok, d, d < HEAD_DIM, both)
            else:
                d, d_ok = column_numbers(i, rope, HEAD_DIM, NEIGHBOURS)
                store_columns(ptr, tokens, stride, token_ok, d, d_ok, x)
                d, d_ok = column_numbers(i + len(PARTS), rope, HEAD_DIM, NEIGHBOURS)
                store_columns(ptr, tokens, stride, token_ok, d, d_ok, y)


@triton.jit
def rotate(head, tokens, rope, HEAD_DIM: tl.constexpr, ACC: tl.constexpr, BACK: tl.constexpr):
    """A head that is held by pairs, rotated in ACC, or BACK, which its gradient is; as it is without a rope."""
    if rope is None:
        return head
    else:
        cos_ptr, sin_ptr, stride, column_stride, first, end = rope
        PAIRS: tl.constexpr = HEAD_DIM // 2
        PARTS: tl.constexpr = split_head(PAIRS)
        # Loads that differ in their hint to the cache are two, and so the compiler does not hold what the first one
        # brought, in registers, until the second.
        HINT: tl.constexpr = "" if BACK else "evict_last"
        token_ok = (tokens >= first) & (tokens < end)
        head_x, head_y = (), ()
        for i in tl.static_range(len(PARTS)):
            pair = before(PARTS, i) + tl.arange(0, PARTS[i])
            offset = ((tokens - first).to(tl.int64) * stride)[:, None] + (pair.to(tl.int64) * column_stride)[None, :]
            mask = token_ok[:, None] & (pair < PAIRS)[None, :]
            cos = tl.load(cos_ptr + offset, mask=mask, other=1.0, eviction_policy=HINT).to(ACC)
            sin = tl.load(sin_ptr + offset, mask=mask, other=0.0, eviction_policy=HINT).to(ACC)
            x, y = head[i].to(ACC), head[i + len(PARTS)].to(ACC)
            if BACK:
                head_x += (x * cos + y * sin,)
                head_y += (y * cos - x * sin,)
            else:
                head_x += ((x * cos - y * sin).to(head[i].dtype),)
                head_y += ((y * cos + x * sin).to(head[i].dtype),)
        return head_x + head_y


@triton.jit
def load_rotated(
    ptr, tokens, stride, token_ok, rope, HEAD_DIM: tl.constexpr, NEIGHBOURS: tl.constexpr, ACC: tl.constexpr
):
    """`load_by_pairs`, rotated where there is a rope."""
    head = load_by_pairs(ptr, tokens, stride, token_ok, rope, HEAD_DIM, NEIGHBOURS)
    return rotate(head, tokens, rope, HEAD_DIM, ACC, BACK=False)


@triton.jit
def zeros(like, ACC: tl.constexpr):
    """0 in ACC, in parts as those of `like`."""
    head = ()
    for i in tl.static_range(len(like)):
        head += (tl.zeros_like(like[i].to(ACC)),)
    return head


@triton.jit
def zero_rows(rows, HEAD_DIM: tl.constexpr, ACC: tl.constexpr):
    """0 in ACC, in the parts of a head, as many rows as `rows` has."""
    PARTS: tl.constexpr = split_head(HEAD_DIM)
    head = ()
    for i in tl.static_range(len(PARTS)):
        head += (tl.full((rows.shape[0], PARTS[i]), 0.0, ACC),)
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

"""Patch embedding: patches, flatten, linear projection, bias, position table, prefix tokens; forward and backward.

One GEMM whose rows are the tokens of the output, prefix rows included. Fused: the gather of the patches as the GEMM
loads its tile (no im2col tensor, no convolution); bias, positions and prefix rows in the epilogue, which writes
straight into the token sequence, and on demand the partial statistics of its rows, for the first block. In backward the
gather again for the gradient of the weight (by the library, see `twin`, a copy of the patches), and a scatter in the
epilogue for the gradient of the image: patches do not overlap, so each pixel is written once.
A patch is flattened in the order that its pixels have in memory: rows of one channel, or of channels_last images all
channels of a pixel, then the next; the weight is brought into that order, which is a copy of its own size.
The normalisation (pixel - mean) / std is made in the load of floats. That of bytes is in the weight and the bias
(`fold_pixels`): the load makes (pixel - 128) / 128 of them, exactly, and the weight is rounded once, with its gain. So
the error is at most that of a normalised image rounded to the same dtype.
Saved for backward: the image as it came. Recomputed: the gathered patches, and the weight in their order.
A call must move, beyond the weight and the positions, for B images of C * H * W pixels of size p and T tokens of D
channels of size s: forward and backward B (C H W p + T D s) each, and as much again for the gradient of the image.
These kernels move B T D s more backward: the sum for bias, positions and prefix reads dtokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import gemm, reduce
from ._math import accumulator_dtype, widen
from .block_tiles import GROUP, store_statistics
from .fold import FOLD
from .fold import launch as launch_sections
from .launch.request import Epilogue, Prologue, ceil_div
from .tiles import MATRIX, plain, transposed


@triton.jit
def pixel_offsets(
    i,
    j,
    tokens,
    prefix,
    across,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    UNIT: tl.constexpr,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
):
    """Offset of the pixel that token i has at index j of its flattened patch, as one part by row and one by column; and
    which rows and columns have one. The strides but the last are in units of UNIT."""
    patch = i % tokens - prefix
    y, x = patch // across * PH, patch % across * PW
    row = ((i // tokens).to(tl.int64) * stride_b + y.to(tl.int64) * stride_h) * UNIT + x.to(tl.int64) * stride_w
    channel, y, x = j // (PH * PW), j // PW % PH, j % PW
    column = (channel.to(tl.int64) * stride_c + y.to(tl.int64) * stride_h) * UNIT + x.to(tl.int64) * stride_w
    return row, column, patch >= 0, j < C * PH * PW


@triton.jit
def load_patches(i, j, source, size_i, size_j):
    """A tile of flattened patches. Floats as they are, or normalised as (pixel + offset) * gain; bytes as (pixel - 128)
    / 128, which 8 bits hold. Prefix tokens, and what is beyond a patch, have 0, or are bytes NOTHING."""
    ptr, gain_ptr, offset_ptr, NOTHING, tokens, prefix, across, b, c, h, w, UNIT, C, PH, PW = source
    row, column, row_ok, column_ok = pixel_offsets(i, j, tokens, prefix, across, b, c, h, w, UNIT, C, PH, PW)
    mask = ((i < size_i) & row_ok)[:, None] & column_ok[None, :]
    pixels = ptr + (row[:, None] + column[None, :])
    if ptr.dtype.element_ty == tl.uint8:
        # 256 + pixel / 128, by its bits: GPUs convert integers at a fraction of the rate of additions.
        bits = tl.load(pixels, mask=mask, other=NOTHING).to(tl.int32) << 8 | 0x43800000
        return bits.to(tl.float32, bitcast=True) - 257.0
    else:
        pixels = tl.load(pixels, mask=mask, other=0.0)
        if gain_ptr is not None:
            gain = tl.load(gain_ptr + j, mask=column_ok, other=0.0)
            offset = tl.load(offset_ptr + j, mask=column_ok, other=0.0)
            pixels = tl.where(mask, (pixels.to(gain.dtype) + offset[None, :]) * gain[None, :], 0.0)
        return pixels


@triton.jit
def store_tokens(acc, i, j, part, target, size_i, size_j, ACTIVATION: tl.constexpr):
    """Patch rows: acc + bias + position. Prefix rows: the prefix, + position where the table has rows for them. And the
    statistics of what is stored, where wanted."""
    ptr, stats_ptr, bias_ptr, position_ptr, prefix_ptr, tokens, prefix, first_position = target
    row_ok, column_ok = i < size_i, j < size_j
    token = i % tokens
    is_patch = token >= prefix
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + j, mask=column_ok, other=0.0).to(acc.dtype)[None, :]
    if prefix_ptr is not None:
        rows = prefix_ptr + token.to(tl.int64)[:, None] * size_j + j[None, :]
        prefix_mask = (row_ok & (token < prefix))[:, None] & column_ok[None, :]
        acc = tl.where(is_patch[:, None], acc, widen(tl.load(rows, mask=prefix_mask, other=0.0)))
    if position_ptr is not None:
        rows = position_ptr + (token - first_position).to(tl.int64)[:, None] * size_j + j[None, :]
        position_mask = (row_ok & (token >= first_position))[:, None] & column_ok[None, :]
        acc += widen(tl.load(rows, mask=position_mask, other=0.0))
    out, stored = ptr + i.to(tl.int64)[:, None] * size_j + j[None, :], acc.to(ptr.dtype.element_ty)
    tl.store(out, stored, mask=row_ok[:, None] & column_ok[None, :])
    if stats_ptr is not None:
        store_statistics(stored.to(acc.dtype), i, j, stats_ptr, size_i, size_j)


@triton.jit
def store_pixels(acc, i, j, part, target, size_i, size_j, ACTIVATION: tl.constexpr):
    """Scatter the gradient of flattened patches into the image's, times the gain of each column."""
    ptr, gain_ptr, tokens, prefix, across, b, c, h, w, UNIT, C, PH, PW = target
    row, column, row_ok, column_ok = pixel_offsets(i, j, tokens, prefix, across, b, c, h, w, UNIT, C, PH, PW)
    if gain_ptr is not None:
        acc *= tl.load(gain_ptr + j, mask=column_ok, other=0.0)[None, :]
    out = ptr + (row[:, None] + column[None, :])
    mask = ((i < size_i) & row_ok)[:, None] & column_ok[None, :]
    tl.store(out, acc.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def fold_pixels(layer, block, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """A projection as `load_patches` loads pixels, BLOCK_ROWS rows at a time: columns with `inner` channels innermost,
    padded with zeros to `width`, times gain; the bias plus the rounded weights times offset, which leaves of their
    rounding what it makes of normalised pixels."""
    rows, columns, width, inner, w_ptr, bias_ptr, gain_ptr, offset_ptr, out_ptr, out_bias_ptr = layer
    i = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_ok, row = i < rows, i.to(tl.int64)[:, None]
    bias = tl.zeros((BLOCK_ROWS,), ACC)
    for first in range(0, width, BLOCK_COLUMNS):
        j = first + tl.arange(0, BLOCK_COLUMNS)
        column_ok = j < columns
        own = j % inner * (columns // inner) + j // inner
        mask = row_ok[:, None] & column_ok[None, :]
        w = tl.load(w_ptr + (row * columns + own[None, :]), mask=mask, other=0.0).to(ACC)
        if gain_ptr is not None:
            w *= tl.load(gain_ptr + j, mask=column_ok, other=0.0)[None, :]
        w = w.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (row * width + j[None, :]), w, mask=row_ok[:, None] & (j < width)[None, :])
        if offset_ptr is not None:
            bias += tl.sum(w.to(ACC) * tl.load(offset_ptr + j, mask=column_ok, other=0.0)[None, :], axis=1)
    if out_bias_ptr is not None:
        if bias_ptr is not None:
            bias += tl.load(bias_ptr + i, mask=row_ok, other=0.0).to(ACC)
        tl.store(out_bias_ptr + i, bias, mask=row_ok)


@triton.jit
def unfold_pixels(layer, block, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """The gradient of a projection from the product G of the tokens' gradient with pixels as they were loaded,
    BLOCK_ROWS rows at a time: dW = (G + db offset) gain, in the weight's own order."""
    rows, columns, width, inner, g_ptr, dbias_ptr, gain_ptr, offset_ptr, dw_ptr = layer
    i = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_ok, row = i < rows, i.to(tl.int64)[:, None]
    for first in range(0, columns, BLOCK_COLUMNS):
        own = first + tl.arange(0, BLOCK_COLUMNS)
        column_ok = own < columns
        j = own % (columns // inner) * inner + own // (columns // inner)
        mask = row_ok[:, None] & column_ok[None, :]
        g = tl.load(g_ptr + (row * width + j[None, :]), mask=mask, other=0.0)
        if gain_ptr is not None:
            db = tl.load(dbias_ptr + i, mask=row_ok, other=0.0)
            offset = tl.load(offset_ptr + j, mask=column_ok, other=0.0)
            gain = tl.load(gain_ptr + j, mask=column_ok, other=0.0)
            g = (g + db[:, None] * offset[None, :]) * gain[None, :]
        tl.store(dw_ptr + (row * columns + own[None, :]), g.to(dw_ptr.dtype.element_ty), mask=mask)


# What bytes are where there is no pixel. Black costs nothing to load, and forward nobody reads what is made of it; in a
# gradient's sum over tokens it would count, where the middle does not.
BLACK, MIDDLE = tl.constexpr(0), tl.constexpr(128)

# Patches in runs of neighbouring pixels of which a load takes 4 bytes or more, as asynchronous copies do; all others.
PATCHES = Prologue("patches", load_patches)
GATHERED_PATCHES = Prologue("gathered_patches", load_patches, gathers=True)
TOKENS = Epilogue("tokens", store_tokens, columns=GROUP.value)  # one, so that what is tuned is for both
PIXELS = Epilogue("pixels", store_pixels, scatters=True, input_gradient=True)
SCATTERED_PIXELS = Epilogue("scattered_pixels", store_pixels, scatters=True, gathers=True, input_gradient=True)


class Patches(NamedTuple):
    """How the patches of an image lie in memory. image (B, C, H, W), or with channels innermost (B, 1, H, W * C), and
    `inner` of these, else 1; geometry: the last arguments of `pixel_offsets`, first the tokens of an image; width: so
    many bytes side by side a load may take."""

    image: torch.Tensor
    inner: int
    geometry: tuple
    width: int

    @property
    def load(self) -> Prologue:
        """What loads them."""
        return PATCHES if self.width >= 4 else GATHERED_PATCHES

    @property
    def store(self) -> Epilogue:
        """What stores their gradient."""
        return PIXELS if self.width >= 4 else SCATTERED_PIXELS


def patches_of(image: torch.Tensor, patch_size: Sequence[int], prefix: int) -> Patches:
    """The patches of image (B, C, H, W), of any strides, after `prefix` tokens an image."""
    (_, channels, height, width), (patch_height, patch_width) = image.shape, patch_size
    across = width // patch_width
    tokens = prefix + height // patch_height * across
    inner = channels if image.stride(1) == 1 and image.stride(3) == channels else 1
    if inner > 1:
        image = image.permute(0, 2, 3, 1).flatten(2).unsqueeze(1)
        patch_width *= channels
    *strides, stride_w = image.stride()
    together = math.gcd(16, patch_width, *strides) if stride_w == 1 else 1
    # Of a number that it is given Triton knows only whether 16 divides it.
    unit = together if together < 16 else 1
    # The patch's size as compile-time constants: the divisions by it become shifts or multiplications, and the
    # compiler sees how many neighbouring pixels one load can take.
    sizes = [tl.constexpr(size) for size in (unit, image.shape[1], patch_height, patch_width)]
    geometry = (tokens, prefix, across, *[stride // unit for stride in strides], stride_w, *sizes)
    aligned = image.data_ptr() % 16 == 0
    return Patches(image, inner, geometry, min(16, image.element_size() * (together if aligned else 1)))


@functools.lru_cache(maxsize=64)
def _normalisation(
    mean, std, is_integer: bool, weight_shape: tuple, inner: int, dtype: torch.dtype, device: torch.device
):
    """Gain and offset (C * ph * pw,) by column of (pixel + offset) * gain, which is (pixel - mean) / std of pixels as
    `load_patches` loads them, bytes being pixels / 255; None twice where nothing is to be done. Kept, because a copy to
    the GPU at every call would wait for it (and cannot be captured in a CUDA graph: run once before)."""
    if mean is None and std is None and not is_integer:
        return None, None
    _, channels, *patch_size = weight_shape
    mean = torch.tensor(mean or [0.0] * channels, dtype=torch.float64, device="cpu")
    std = torch.tensor(std or [1.0] * channels, dtype=torch.float64, device="cpu")
    by_channel = (128 / 255 / std, 1 - 255 / 128 * mean) if is_integer else (1 / std, -mean)
    area = math.prod(patch_size)
    by_column = [values.repeat(area) if inner > 1 else values.repeat_interleave(area) for values in by_channel]
    return tuple([values.to(device, dtype) for values in by_column])


def _normalisations(patches: Patches, weight, mean, std, dtype: torch.dtype) -> tuple[tuple, tuple]:
    """`_normalisation` for the load of pixels, and for folding into the weight: None twice in one of them."""
    as_tuple = [None if values is None else tuple(values) for values in (mean, std)]
    is_integer = not patches.image.is_floating_point()
    how = (is_integer, tuple(weight.shape), patches.inner, accumulator_dtype(dtype), patches.image.device)
    found, nothing = _normalisation(*as_tuple, *how), (None, None)
    return (nothing, found) if is_integer else (found, nothing)


def _is_rearranged(weight, inner: int, folded: tuple) -> bool:
    """Whether a product takes something else than the rows of weight (D, C, ph, pw)."""
    return inner > 1 or folded[0] is not None or weight[0].numel() % 16 != 0


def _projection(weight, bias, inner: int, folded: tuple, dtype: torch.dtype):
    """weight (D, C, ph, pw) and bias (D,) as products in `dtype` take them: see `fold_pixels`."""
    rows, columns = len(weight), weight[0].numel()
    if not _is_rearranged(weight, inner, folded) and weight.dtype == dtype:
        return weight.view(rows, columns), bias
    acc, width = accumulator_dtype(dtype), ceil_div(columns, 16) * 16
    flat, made = torch.empty(rows, width, dtype=dtype, device=weight.device), None
    if folded[0] is not None:
        made = torch.empty(rows, dtype=acc, device=weight.device)
    layer = (rows, columns, width, inner, weight, bias, *folded, flat, made)
    launch_sections(fold_pixels, [layer], FOLD.BLOCK_ROWS, FOLD, acc, weight.device)
    return flat, bias if made is None else made


def patch_embed_forward(
    image, weight, bias, pos_embed, prefix, mean, std, dtype: torch.dtype, out_dtype: torch.dtype, statistics: bool
):
    """image (B, C, H, W) of any strides, weight (D, C, ph, pw), bias (D,), pos_embed (N, D) or (P + N, D), prefix
    (P, D), mean and std C floats each, the last five None where absent -> tokens (B, P + N, D) in out_dtype, by a
    product in dtype; and, or None, the partial statistics of their rows (2, groups, B * (P + N)): see
    `block_tiles.store_statistics`."""
    prefix_rows = 0 if prefix is None else len(prefix)
    patches = patches_of(image, weight.shape[2:], prefix_rows)
    in_load, folded = _normalisations(patches, weight, mean, std, dtype)
    flat, bias = _projection(weight, bias, patches.inner, folded, dtype)
    batch, tokens, (embed_dim, width) = len(image), patches.geometry[0], flat.shape
    out = torch.empty(batch, tokens, embed_dim, dtype=out_dtype, device=image.device)
    first_position = 0 if pos_embed is None else tokens - len(pos_embed)
    source = (patches.image, *in_load, BLACK, *patches.geometry)
    stats = None
    if statistics:
        groups = ceil_div(embed_dim, GROUP.value)
        stats = torch.empty(2, groups, batch * tokens, dtype=accumulator_dtype(out_dtype), device=image.device)
    target = (out, stats, bias, pos_embed, prefix, tokens, prefix_rows, first_position)
    shape = (batch * tokens, embed_dim, width)
    gemm.launch(patches.load, source, MATRIX, transposed(flat), TOKENS, target, shape, dtype, outputs=2)
    return out, stats


def patch_embed_backward(dtokens, image, weight, prefix_rows: int, mean, std, dtype: torch.dtype, needs):
    """Gradients of `patch_embed_forward` for contiguous dtokens (B, P + N, D).

    needs: four bools, for the four results, None where not needed: dimage in image's dtype and layout; dweight
    (D, C, ph, pw) in weight's dtype, or dtype's accumulator; in float32 (float64) the bias's gradient (D,); and the sum
    of dtokens over the batch, (P + N, D), of which the gradients of positions and prefix are parts.
    """
    needs_image, needs_weight, needs_bias, needs_sum = needs
    batch, tokens, embed_dim = dtokens.shape
    rows = dtokens.view(batch * tokens, embed_dim)
    patches = patches_of(image, weight.shape[2:], prefix_rows)
    in_load, folded = _normalisations(patches, weight, mean, std, dtype)
    dimage = dweight = dbias = by_token = None
    by_channel = needs_bias or (needs_weight and folded[0] is not None)
    if by_channel or needs_sum:
        by_token = reduce.column_sum(dtokens.view(batch, tokens * embed_dim)).view(tokens, embed_dim)
        dbias = by_token[prefix_rows:].sum(dim=0) if by_channel else None
    if needs_weight:
        columns, changed = weight[0].numel(), _is_rearranged(weight, patches.inner, folded)
        width, wide = ceil_div(columns, 16) * 16, changed or weight.dtype != dtype
        source = (patches.image, *in_load, MIDDLE, *patches.geometry)
        product = gemm.weight_gradient(rows, patches.load, source, width, dtype, wide)
        dweight = torch.empty_like(weight) if changed else product.view(weight.shape)
        if changed:
            layer = (embed_dim, columns, width, patches.inner, product, dbias, *folded, dweight)
            launch_sections(unfold_pixels, [layer], FOLD.BLOCK_ROWS, FOLD, product.dtype, weight.device)
    if needs_image:
        dimage = torch.empty_like(image)
        written = patches_of(dimage, weight.shape[2:], prefix_rows)
        (gain, _), folded = _normalisations(written, weight, mean, std, dtype)
        flat, _ = _projection(weight, None, written.inner, folded, dtype)
        target = (written.image, gain, *written.geometry)
        shape = (batch * tokens, flat.shape[1], embed_dim)
        gemm.launch(MATRIX, plain(rows), MATRIX, plain(flat), written.store, target, shape, dtype)
    return dimage, dweight, dbias if needs_bias else None, by_token if needs_sum else None

"""Patch embedding: patches, flatten, linear projection, bias, position table, prefix tokens; forward and backward.

One GEMM whose rows are the tokens of the output, prefix rows included. Fused: the gather of the patches as the GEMM
loads its tile (no im2col tensor, no convolution), the scaling of uint8 pixels and the mean/std normalisation in that
load; bias, positions and prefix rows in the epilogue, which writes straight into the token sequence. In backward the
gather again for the gradient of the weight (by the library, see `twin`, a copy of the patches), and a scatter in the
epilogue for the gradient of the image: patches do not overlap, so each pixel is written once.
Saved for backward: the image as it came. Recomputed: the gathered and normalised patches.
A call must move, beyond the weight and the positions, for B images of C * H * W pixels of size p and T tokens of D
channels of size s: forward and backward B (C H W p + T D s) each, and as much again for the gradient of the image.
These kernels move B T D s more backward: the sum for bias, positions and prefix reads dtokens.
"""

import functools

import torch
import triton
import triton.language as tl

from . import gemm, reduce
from ._math import accumulator_dtype, widen
from .launch.request import Epilogue, Prologue
from .tiles import MATRIX, plain, transposed


@triton.jit
def pixel_offsets(
    i,
    j,
    tokens,
    prefix,
    patches_across,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    PH: tl.constexpr,
    PW: tl.constexpr,
):
    """Offset of the pixel that token i has at index j of its flattened patch, as one part by row and one by column;
    the image's channel by column; and the token's index among the patches (negative for a prefix row)."""
    patch = i % tokens - prefix
    y, x = patch // patches_across * PH, patch % patches_across * PW
    row = (i // tokens).to(tl.int64) * stride_b + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    channel = j // (PH * PW)
    y, x = j // PW % PH, j % PW
    column = channel.to(tl.int64) * stride_c + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    return row, column, channel, patch


@triton.jit
def load_patches(i, j, source, size_i, size_j):
    """A tile of flattened patches, pixel * gain + shift per channel; rows of zeros for the prefix tokens."""
    ptr, gain_ptr, shift_ptr, tokens, prefix, across, stride_b, stride_c, stride_h, stride_w, PH, PW = source
    row, column, channel, patch = pixel_offsets(
        i, j, tokens, prefix, across, stride_b, stride_c, stride_h, stride_w, PH, PW
    )
    row_ok, column_ok = (i < size_i) & (patch >= 0), j < size_j
    mask = row_ok[:, None] & column_ok[None, :]
    pixels = tl.load(ptr + (row[:, None] + column[None, :]), mask=mask, other=0)
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + channel, mask=column_ok, other=0.0)
        shift = tl.load(shift_ptr + channel, mask=column_ok, other=0.0)
        pixels = tl.where(mask, pixels.to(gain.dtype) * gain[None, :] + shift[None, :], 0.0)
    return pixels


@triton.jit
def store_tokens(acc, i, j, part, target, size_i, size_j, ACTIVATION: tl.constexpr):
    """Patch rows: acc + bias + position. Prefix rows: the prefix, + position where the table has rows for them."""
    ptr, bias_ptr, position_ptr, prefix_ptr, tokens, prefix, first_position = target
    row_ok, column_ok = i < size_i, j < size_j
    token = i % tokens
    is_patch = token >= prefix
    if bias_ptr is not None:
        acc += widen(tl.load(bias_ptr + j, mask=column_ok, other=0.0))[None, :]
    if prefix_ptr is not None:
        rows = prefix_ptr + token.to(tl.int64)[:, None] * size_j + j[None, :]
        prefix_mask = (row_ok & (token < prefix))[:, None] & column_ok[None, :]
        acc = tl.where(is_patch[:, None], acc, widen(tl.load(rows, mask=prefix_mask, other=0.0)))
    if position_ptr is not None:
        rows = position_ptr + (token - first_position).to(tl.int64)[:, None] * size_j + j[None, :]
        position_mask = (row_ok & (token >= first_position))[:, None] & column_ok[None, :]
        acc += widen(tl.load(rows, mask=position_mask, other=0.0))
    out = ptr + i.to(tl.int64)[:, None] * size_j + j[None, :]
    tl.store(out, acc.to(ptr.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


@triton.jit
def store_pixels(acc, i, j, part, target, size_i, size_j, ACTIVATION: tl.constexpr):
    """Scatter the gradient of flattened patches into the image's, times the gain per channel."""
    ptr, gain_ptr, tokens, prefix, across, stride_b, stride_c, stride_h, stride_w, PH, PW = target
    row, column, channel, patch = pixel_offsets(
        i, j, tokens, prefix, across, stride_b, stride_c, stride_h, stride_w, PH, PW
    )
    row_ok, column_ok = (i < size_i) & (patch >= 0), j < size_j
    if gain_ptr is not None:
        acc *= tl.load(gain_ptr + channel, mask=column_ok, other=0.0)[None, :]
    out = ptr + (row[:, None] + column[None, :])
    tl.store(out, acc.to(ptr.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


# Patches in runs of neighbouring pixels that a load of 16 bytes takes, and all others.
PATCHES = Prologue("patches", load_patches)
GATHERED_PATCHES = Prologue("gathered_patches", load_patches, gathers=True)
TOKENS = Epilogue("tokens", store_tokens)
PIXELS = Epilogue("pixels", store_pixels, scatters=True, input_gradient=True)
SCATTERED_PIXELS = Epilogue("scattered_pixels", store_pixels, scatters=True, gathers=True, input_gradient=True)


def _geometry(image, patch_height: int, patch_width: int, prefix: int):
    """The last nine arguments of `pixel_offsets`; the first of them is the number of tokens of one image."""
    _, _, height, width = image.shape
    across = width // patch_width
    tokens = prefix + height // patch_height * across
    # The patch's size as compile-time constants: the divisions by it become shifts or multiplications, and the
    # compiler sees how many neighbouring pixels one load can take.
    size = (tl.constexpr(patch_height), tl.constexpr(patch_width))
    return (tokens, prefix, across, *image.stride(), *size)


def _access(image: torch.Tensor, patch_width: int) -> tuple[Prologue, Epilogue]:
    """How patches are loaded, and their gradient stored: one by one where runs of neighbouring pixels are too short for
    16 bytes, or are bytes, which must be converted in registers."""
    short = image.stride(3) != 1 or patch_width * image.element_size() % 16 != 0 or not image.is_floating_point()
    return (GATHERED_PATCHES, SCATTERED_PIXELS) if short else (PATCHES, PIXELS)


@functools.lru_cache(maxsize=64)
def _gain_and_shift(mean, std, channels: int, is_integer: bool, dtype: torch.dtype, device: torch.device):
    """(pixel / 255 - mean) / std as pixel * gain + shift: two (C,) tensors, or None twice where nothing is to be done.
    Kept, because a copy to the GPU at every call would wait for it (and cannot be captured in a CUDA graph: run once
    before)."""
    if mean is None and std is None and not is_integer:
        return None, None
    mean = torch.tensor(mean or [0.0] * channels, dtype=torch.float64, device="cpu")
    std = torch.tensor(std or [1.0] * channels, dtype=torch.float64, device="cpu")
    gain = 1 / (std * (255 if is_integer else 1))
    return gain.to(device, dtype), (-mean / std).to(device, dtype)


def _normalisation(image, weight, mean, std):
    acc = accumulator_dtype(weight.dtype)
    as_tuple = [None if values is None else tuple(values) for values in (mean, std)]
    return _gain_and_shift(*as_tuple, image.shape[1], not image.is_floating_point(), acc, image.device)


def patch_embed_forward(image, weight, bias, pos_embed, prefix, mean, std, out_dtype: torch.dtype):
    """image (B, C, H, W) of any strides, weight (D, C, ph, pw), bias (D,), pos_embed (N, D) or (P + N, D), prefix
    (P, D), mean and std C floats each, the last five None where absent -> tokens (B, P + N, D) in out_dtype."""
    batch = image.shape[0]
    embed_dim, _, *patch_size = weight.shape
    prefix_rows = 0 if prefix is None else prefix.shape[0]
    geometry = _geometry(image, *patch_size, prefix_rows)
    tokens = geometry[0]
    flat = weight.reshape(embed_dim, -1)
    out = torch.empty(batch, tokens, embed_dim, dtype=out_dtype, device=image.device)
    first_position = 0 if pos_embed is None else tokens - pos_embed.shape[0]
    patches = (image, *_normalisation(image, weight, mean, std), *geometry)
    target = (out, bias, pos_embed, prefix, tokens, prefix_rows, first_position)
    shape = (batch * tokens, embed_dim, flat.shape[1])
    load, _ = _access(image, patch_size[1])
    gemm.launch(load, patches, MATRIX, transposed(flat), TOKENS, target, shape, weight.dtype)
    return out


def patch_embed_backward(dtokens, image, weight, prefix_rows: int, mean, std, needs):
    """Gradients of `patch_embed_forward` for contiguous dtokens (B, P + N, D).

    needs: three bools, for the three results, None where not needed: dimage in image's dtype and layout; dweight
    (D, C, ph, pw) in weight's dtype; the sum of dtokens over the batch, (P + N, D) in float32 (float64), of which the
    gradients of bias, positions and prefix are parts.
    """
    needs_image, needs_weight, needs_sum = needs
    batch, tokens, embed_dim = dtokens.shape
    patch_size = weight.shape[2:]
    flat = weight.reshape(embed_dim, -1)
    pixels = flat.shape[1]
    dtokens_rows = dtokens.view(batch * tokens, embed_dim)
    gain, shift = _normalisation(image, weight, mean, std)
    dimage = dweight = by_token = None
    load, store = _access(image, patch_size[1])
    if needs_weight:
        source = (image, gain, shift, *_geometry(image, *patch_size, prefix_rows))
        dweight = gemm.weight_gradient(dtokens_rows, load, source, pixels, weight.dtype).view(weight.shape)
    if needs_image:
        dimage = torch.empty_like(image)
        target = (dimage, gain, *_geometry(dimage, *patch_size, prefix_rows))
        shape = (batch * tokens, pixels, embed_dim)
        gemm.launch(MATRIX, plain(dtokens_rows), MATRIX, plain(flat), store, target, shape, weight.dtype)
    if needs_sum:
        by_token = reduce.column_sum(dtokens.view(batch, tokens * embed_dim)).view(tokens, embed_dim)
    return dimage, dweight, by_token

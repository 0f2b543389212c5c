"""What a block does to weights and to their gradients: the norm and the scales folded in, and taken out again.

Forward, `fold`, one launch for any number of linear layers: the LayerNorm before a layer goes into its weight and bias,
    linear(layer_norm(x)) = rstd * (x W'^T - mean * colsum) + b',  W' = gamma * W, colsum = rowsum(W'), b' = b + W beta,
and a layer-scale after it, W' = scale * W, b' = scale * b, but not in float16, whose range weights times 1e-5 leave:
there it is the epilogue's. W' is rounded to the products' dtype, which takes autocast's copy along, and colsum is of
the rounded W', or the two would not cancel.
Backward, two launches for all layers of a block: `sum_parts` adds partial sums that the other kernels left, `unfold`
turns the product G = s^T x into the gradients of weight, norm, layer-scale and bias.
A call must move each weight twice (`fold`), and G, the weight and its gradient (`unfold`); float32 sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._math import TRITON_DTYPES, accumulator_dtype
from .launch import cost
from .launch.launcher import launch as launch_kernel
from .launch.request import RowConfig, ceil_div

# Nothing here is worth a choice: together under a hundredth of a block.
FOLD, SUM, UNFOLD = RowConfig(16, 128, 8), RowConfig(32, 64, 4), RowConfig(64, 32, 4)


class Layer(NamedTuple):
    """A linear layer: weight (O, K), bias (O,); norm_weight, norm_bias (K,) of the LayerNorm before it; scale (O,) of
    the layer-scale after it. All but weight may be None. parts: 2 where its first rows are gates and the others values:
    folded, it has a gate and its value in turns."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    norm_weight: torch.Tensor | None = None
    norm_bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    parts: int = 1


def leaves_scale(dtype: torch.dtype) -> bool:
    """Whether `fold` leaves a layer-scale out of weights in `dtype`."""
    return dtype == torch.float16


class Folded(NamedTuple):
    """weight (O, K) in the products' dtype; bias (O,) and colsum (O,), float32 (float64 for float64), where there is a
    norm; else the bias that there was, or None, scaled."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    colsum: torch.Tensor | None


@triton.jit
def row_of(i, rows, parts):
    """Which of a layer's rows the folded one's row i is."""
    return i % parts * (rows // parts) + i // parts


@triton.jit
def fold_rows(layer, block, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """The norm before a layer and the scale after it folded into its weight, BLOCK_ROWS rows at a time."""
    rows, columns, w_ptr, bias_ptr, gain_ptr, shift_ptr, scale_ptr, parts, out_ptr, out_bias_ptr, colsum_ptr = layer
    i = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_ok, row = i < rows, row_of(i, rows, parts)
    scale = tl.full((BLOCK_ROWS,), 1.0, ACC)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + row, mask=row_ok, other=0.0).to(ACC)
    colsum, bias = tl.zeros((BLOCK_ROWS,), ACC), tl.zeros((BLOCK_ROWS,), ACC)
    for first in range(0, columns, BLOCK_COLUMNS):
        j = first + tl.arange(0, BLOCK_COLUMNS)
        mask = row_ok[:, None] & (j < columns)[None, :]
        w = tl.load(w_ptr + (row.to(tl.int64)[:, None] * columns + j[None, :]), mask=mask, other=0.0).to(ACC)
        if shift_ptr is not None:
            bias += tl.sum(w * tl.load(shift_ptr + j, mask=j < columns, other=0.0).to(ACC)[None, :], axis=1)
        if gain_ptr is not None:
            w *= tl.load(gain_ptr + j, mask=j < columns, other=0.0).to(ACC)[None, :]
        w = (w * scale[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (i.to(tl.int64)[:, None] * columns + j[None, :]), w, mask=mask)
        colsum += tl.sum(w.to(ACC), axis=1)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + row, mask=row_ok, other=0.0).to(ACC)
    if out_bias_ptr is not None:
        tl.store(out_bias_ptr + i, bias * scale, mask=row_ok)
    if colsum_ptr is not None:
        tl.store(colsum_ptr + i, colsum, mask=row_ok)


@triton.jit
def sum_columns(section, block, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """Partial sums added up, BLOCK_COLUMNS columns at a time."""
    columns, rows, stride, partial_ptr, first, out_ptr, out_first = section
    j = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), ACC)
    for start in range(0, rows, BLOCK_ROWS):
        i = start + tl.arange(0, BLOCK_ROWS)
        mask = (i < rows)[:, None] & (j < columns)[None, :]
        total += tl.load(partial_ptr + (i.to(tl.int64)[:, None] * stride + (first + j)[None, :]), mask=mask, other=0.0)
    tl.store(out_ptr + (out_first + j), tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=j < columns)


@triton.jit
def unfold_columns(layer, block, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """The gradients of a layer and the norm before it, BLOCK_COLUMNS columns at a time. dW = (G - t) gamma + db beta;
    of gamma and beta, the sums over rows of (G - t) W and db W."""
    columns, rows, parts, g_ptr, w_ptr, gain_ptr, shift_ptr, sums_ptr, dw_ptr, dbias_ptr, dgain_ptr, dshift_ptr = layer
    j = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_ok = j < columns
    gain = tl.load(gain_ptr + j, mask=column_ok, other=0.0).to(ACC)[None, :]
    shift = tl.load(shift_ptr + j, mask=column_ok, other=0.0).to(ACC)[None, :]
    dgain, dshift = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), ACC), tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), ACC)
    for first in range(0, rows, BLOCK_ROWS):
        i = first + tl.arange(0, BLOCK_ROWS)
        row_ok, row = i < rows, row_of(i, rows, parts)
        offset = row.to(tl.int64)[:, None] * columns + j[None, :]
        mask = row_ok[:, None] & column_ok[None, :]
        db = tl.load(sums_ptr + i, mask=row_ok, other=0.0)
        g = tl.load(g_ptr + (i.to(tl.int64)[:, None] * columns + j[None, :]), mask=mask, other=0.0).to(ACC)
        g -= tl.load(sums_ptr + rows + i, mask=row_ok, other=0.0)[:, None]
        if dbias_ptr is not None:
            tl.store(dbias_ptr + row, db.to(dbias_ptr.dtype.element_ty), mask=row_ok & (block == 0))
        w = tl.load(w_ptr + offset, mask=mask, other=0.0).to(ACC)
        if dw_ptr is not None:
            tl.store(dw_ptr + offset, (g * gain + db[:, None] * shift).to(dw_ptr.dtype.element_ty), mask=mask)
        dgain += g * w
        dshift += db[:, None] * w
    if dgain_ptr is not None:
        tl.store(dgain_ptr + j, tl.sum(dgain, axis=0).to(dgain_ptr.dtype.element_ty), mask=column_ok)
        tl.store(dshift_ptr + j, tl.sum(dshift, axis=0).to(dshift_ptr.dtype.element_ty), mask=column_ok)


@triton.jit
def unscale_rows(layer, block, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """The gradients of a layer and of the scale after it, BLOCK_ROWS rows at a time. dW = scale G, db = scale r; of the
    scale, the sum over columns of G W, and bias r; r being the sum over tokens of the scaled output's gradient."""
    rows, columns, g_ptr, w_ptr, bias_ptr, scale_ptr, total_ptr, dw_ptr, dbias_ptr, dscale_ptr = layer
    i = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_ok = i < rows
    scale = tl.load(scale_ptr + i, mask=row_ok, other=0.0).to(ACC)
    dscale = tl.zeros((BLOCK_ROWS,), ACC)
    if g_ptr is not None:
        for first in range(0, columns, BLOCK_COLUMNS):
            j = first + tl.arange(0, BLOCK_COLUMNS)
            offset = i.to(tl.int64)[:, None] * columns + j[None, :]
            mask = row_ok[:, None] & (j < columns)[None, :]
            g = tl.load(g_ptr + offset, mask=mask, other=0.0).to(ACC)
            dscale += tl.sum(g * tl.load(w_ptr + offset, mask=mask, other=0.0).to(ACC), axis=1)
            if dw_ptr is not None:
                tl.store(dw_ptr + offset, (g * scale[:, None]).to(dw_ptr.dtype.element_ty), mask=mask)
    if total_ptr is not None:
        total = tl.load(total_ptr + i, mask=row_ok, other=0.0).to(ACC)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + i, (scale * total).to(dbias_ptr.dtype.element_ty), mask=row_ok)
        if bias_ptr is not None:
            dscale += total * tl.load(bias_ptr + i, mask=row_ok, other=0.0).to(ACC)
    if dscale_ptr is not None:
        tl.store(dscale_ptr + i, dscale.to(dscale_ptr.dtype.element_ty), mask=row_ok)


@triton.jit(launch_metadata=cost.sections_launch)
def sections_kernel(
    sections,  # each what SECTION takes, first the size that programs take BLOCK of
    COUNT: tl.constexpr,
    SECTION: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    block = tl.program_id(0)
    for number in tl.static_range(COUNT):
        blocks = tl.cdiv(sections[number][0], BLOCK)
        if (block >= 0) & (block < blocks):
            SECTION(sections[number], block, BLOCK_ROWS, BLOCK_COLUMNS, ACC)
        block -= blocks


def launch(function, sections: list[tuple], block: int, config: RowConfig, acc: torch.dtype, device) -> None:
    """Launch `function` on sections, programs of `block` of each one's size."""

    constants = dict(
        COUNT=len(sections),
        SECTION=function,
        BLOCK=block,
        ACC=TRITON_DTYPES[acc],
        BLOCK_ROWS=config.BLOCK_ROWS,
        BLOCK_COLUMNS=config.BLOCK_D,
        num_warps=config.num_warps,
    )
    grid = (sum(ceil_div(section[0], block) for section in sections), 1, 1)
    launch_kernel(sections_kernel, grid, device)(tuple(sections), **constants)


def fold(layers: Sequence[Layer], dtype: torch.dtype) -> tuple[list[Folded], tuple | None]:
    """Memory for each layer with its norm and layer-scale folded into its weight, rounded to `dtype`, and what `launch`
    takes to fill it: None where there is nothing to do. A layer that is as products take it is returned as it came."""
    acc = accumulator_dtype(dtype)
    found, sections = [], []
    for layer in layers:
        if leaves_scale(dtype):
            layer = layer._replace(scale=None)
        weight, bias, norm_weight, norm_bias, scale, parts = layer
        if parts == 1 and norm_weight is None and scale is None and weight.dtype == dtype:
            found.append(Folded(weight, bias, None))
            continue
        rows = weight.shape[0]
        changed = norm_weight is not None or (bias is not None and scale is not None)
        folded = Folded(
            torch.empty(weight.shape, dtype=dtype, device=weight.device),
            torch.empty(rows, dtype=acc, device=weight.device) if changed else bias,
            torch.empty(rows, dtype=acc, device=weight.device) if norm_weight is not None else None,
        )
        found.append(folded)
        written = (folded.weight, folded.bias if changed else None, folded.colsum)
        sections.append((*weight.shape, *layer, *written))
    return found, (fold_rows, sections, FOLD.BLOCK_ROWS, FOLD, acc, layers[0].weight.device) if sections else None


def sum_parts(parts: list[tuple[torch.Tensor, int, int, torch.Tensor, int]]) -> None:
    """Each (partial, first, columns, out, out_first): out[out_first + j] = sum over i of partial[i][first + j], j to
    `columns`, the rows of the contiguous partial, float32 (float64), and out, of any dtype, taken as flat."""
    if parts:
        sections = [
            (columns, len(partial), partial.stride(0), partial, first, out, out_first)
            for partial, first, columns, out, out_first in parts
        ]
        partial = parts[0][0]
        launch(sum_columns, sections, SUM.BLOCK_D, SUM, partial.dtype, partial.device)


class Unfolding(NamedTuple):
    """One layer after a norm: product (O, K) = s^T x; sums (2, O), over tokens, of dy and of s * mean; whether the
    gradients of the weight, the bias and the norm are needed."""

    layer: Layer
    product: torch.Tensor
    sums: torch.Tensor
    needs_weight: bool
    needs_bias: bool
    needs_norm: bool


def unfold(layers: list[Unfolding]) -> list[tuple[torch.Tensor | None, ...]]:
    """The gradients of weight, bias, norm_weight and norm_bias of each layer in their dtypes, None where not needed."""
    found, sections = [], []
    for (weight, bias, norm_weight, norm_bias, _, parts), product, sums, *needs in layers:
        needs = (*needs, needs[2])
        likes = (weight, bias, norm_weight, norm_bias)
        gradients = tuple([torch.empty_like(x) if need else None for x, need in zip(likes, needs, strict=True)])
        found.append(gradients)
        sections.append((*weight.shape[::-1], parts, product, weight, norm_weight, norm_bias, sums, *gradients))
    if sections:
        first = layers[0]
        launch(unfold_columns, sections, UNFOLD.BLOCK_D, UNFOLD, first.sums.dtype, first.sums.device)
    return found


def unscale(layers: list[tuple]) -> list[tuple[torch.Tensor | None, ...]]:
    """The gradients of a Layer with a scale after it, each given as (layer, product (O, K) of its output's gradient
    before the scale with its input, that gradient's sum (O,) over tokens, whether weight, bias and scale need theirs):
    of weight, bias, None, None and scale."""
    found, sections = [], []
    for (weight, bias, _, _, scale, _), product, total, needs_weight, needs_bias, needs_scale in layers:
        dweight = torch.empty_like(weight) if needs_weight else None
        dbias = torch.empty_like(bias) if needs_bias else None
        dscale = torch.empty_like(scale) if needs_scale else None
        found.append((dweight, dbias, None, None, dscale))
        sections.append((*weight.shape, product, weight, bias, scale, total, dweight, dbias, dscale))
    if sections:
        scale = layers[0][0].scale
        launch(unscale_rows, sections, FOLD.BLOCK_ROWS, FOLD, accumulator_dtype(scale.dtype), scale.device)
    return found

"""A pre-norm transformer block, forward and backward, as few launches as its data flow allows (arXiv 2010.11929):

    x1 = x + drop_path1 * scale1 * proj(attention(qkv(norm1(x))))
    out = x1 + drop_path2 * scale2 * fc2(activation(fc1(norm2(x1))))

or, gated (arXiv 2002.05202), of activation(gate) * value, [gate; value] being fc1(norm2(x1)); the folded weight has a
gate's row and its value's in turns, so that one tile has both.
Fused, forward: each LayerNorm into the product after it (`fold`), whose main loop reads x as it is; bias, activation,
drop path and residual into epilogues; the rows' statistics into the epilogue that writes the rows, as sums of groups of
columns, which the next product adds up. Where the residual stream is wider than the products, the same epilogue writes
a copy for them, less what was the row's mean before the branch: a LayerNorm cannot see that, and rounding what is left
costs no more than rounding the normalised row.
Fused, backward: the activation's derivative, LayerNorm's gradient, the residual's gradient, attention's row sums and
every sum over tokens into the epilogues of the products that make them. With s = rstd * dy, of a product y after a
norm, dx = s W' - rstd * (mean_D(dy colsum) + normalised * mean_D(dy (y - b'))), and dW' = s^T x - sum(s * mean).
Saved for backward: what the products read (x, x1 or their copies), qkv, attention's output and log-sum-exp, the
pre-activation, mean and rstd of each norm's rows: 10 D elements a token for an MLP of 4 D; of a wider stream x itself
as well, for second derivatives; and the folded weights. Recomputed: the activated tensor, attention's probabilities;
on demand the pre-activation, by fc1's product once more: 6 D elements are left, and x1's partial statistics.
A call must move, for M tokens of D channels, H hidden, elements of size s, beyond the weights: forward
M (14 D + 2 H) s, and M H s more where a backward pass may come; backward M (33 D + 6 H) s, of which the gradients of
weights read M (8 D + 2 H) s. Attention's kernels are 4 D and 11 D of these. Gated, with 2 H outputs of fc1, it is one H
more where a backward pass may come, and 4 H more backward, one of them for a weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import attention, gemm
from ._math import TRITON_DTYPES, accumulator_dtype
from .block_tiles import (
    DERIVATIVE,
    FOLDED,
    FOLDED_ACTIVATED,
    FOLDED_KEPT,
    GATED,
    GATED_DERIVATIVE,
    GATED_KEPT,
    GROUP,
    NORM_GRADIENT,
    STREAM,
    STREAM_AND_COPY,
    WITH_DELTA,
    scaled_gradient_kernel,
    stream_kernel,
)
from .fold import Folded, Layer, Unfolding, fold, leaves_scale, sum_parts, unfold, unscale
from .fold import launch as launch_sections
from .launch.launcher import launch as launch_kernel
from .launch.request import ceil_div, next_power_of_2
from .reduce import rows_per_sample
from .tiles import INPUT_GRADIENT, MATRIX, plain, transposed

DELTA_HEAD_DIMS = (16, 32, 64)  # heads that fill every tile of a product


class Stream(NamedTuple):
    """The residual stream between two blocks, beside x (M, D) itself. copy (M, D): what products read, x less centre
    (M,), where x is wider than they are; else None, twice. stats (2, groups, M): see `store_statistics`."""

    copy: torch.Tensor | None
    centre: torch.Tensor | None
    stats: torch.Tensor


class Weights(NamedTuple):
    """The linear layers of a block: `Layer`s as they are, or `Folded`."""

    qkv: Layer | Folded
    proj: Layer | Folded
    fc1: Layer | Folded
    fc2: Layer | Folded


class Saved(NamedTuple):
    """What the backward pass needs of the forward's: x and x1 as the products read them, (M, D); the mean and rstd (M,)
    of their rows; qkv (B, N, 3, H, d), out (B, N, D) and lse (B, H, padded(N)) of attention; preactivation (M, hidden),
    or to make it again stats2, x1's (see `Stream`)."""

    x: torch.Tensor
    mean1: torch.Tensor
    rstd1: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    x1: torch.Tensor
    mean2: torch.Tensor
    rstd2: torch.Tensor
    preactivation: torch.Tensor | None
    stats2: torch.Tensor | None


def groups_of(columns: int) -> int:
    """How many groups of columns the partial statistics of a row are of."""
    return ceil_div(columns, GROUP.value)


def _empty(x: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype or accumulator_dtype(x.dtype), device=x.device)


def reads_copy(stream: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether products in `dtype` read a copy of a residual stream of dtype `stream`."""
    return stream != dtype or dtype.itemsize > 2


def stream_of(x: torch.Tensor, dtype: torch.dtype) -> Stream:
    """What the first of the blocks needs beside x (M, D), for products in `dtype`: one small launch."""
    rows, columns = x.shape
    stats = _empty(x, 2, groups_of(columns), rows)
    copy = centre = None
    if reads_copy(x.dtype, dtype):
        copy, centre = _empty(x, rows, columns, dtype=dtype), _empty(x, rows)
    block = max(GROUP.value, next_power_of_2(columns))
    block_rows = max(1, 4096 // block)
    constants = dict(ACC=TRITON_DTYPES[accumulator_dtype(x.dtype)], BLOCK_ROWS=block_rows, BLOCK_D=block, num_warps=4)
    if rows:
        args = (x, copy, centre, stats, rows, columns, x.stride(0))
        launch_kernel(stream_kernel, (ceil_div(rows, block_rows), 1, 1), x.device)(*args, **constants)
    return Stream(copy, centre, stats)


def _folded_product(
    operand,
    stream: Stream,
    layer: Folded,
    eps: float,
    activation: str | None = None,
    gated: bool = False,
    train: bool = False,
    keep: bool = False,
):
    """What `gemm.launch` takes for activation(linear(layer_norm(operand))), and the memory of what it writes: the
    result (M, O), or gated (M, O / 2); keep: what the activation is of, else None; train: mean and rstd of the rows,
    else None; and where they have a centre, that of the stream that is added to them next, or None."""
    rows, inputs = operand.shape
    weight, device = layer.weight, operand.device
    outputs = weight.shape[0]
    y = torch.empty(rows, outputs // 2 if gated else outputs, dtype=weight.dtype, device=device)
    kept = torch.empty(rows, outputs, dtype=weight.dtype, device=device) if keep else None
    mean = torch.empty(rows, dtype=layer.colsum.dtype, device=device) if train else None
    rstd = torch.empty_like(mean) if train else None
    centre = None if stream.centre is None else _empty(operand, rows)
    written = (y, kept, mean, rstd, centre)
    read = (stream.centre, stream.stats, layer.colsum, layer.bias, inputs, eps)
    if gated:
        epilogue = GATED_KEPT if keep else GATED
    else:
        epilogue = FOLDED if activation is None else FOLDED_KEPT if keep else FOLDED_ACTIVATED
    product = (MATRIX, plain(operand), MATRIX, transposed(weight), epilogue, (*written, *read))
    return (*product, (rows, outputs, inputs), y.dtype, activation, 5), written


def _stream_product(operand: torch.Tensor, layer: Folded, layer_scale, residual: torch.Tensor, centre, drop_path_scale):
    """What `gemm.launch` takes for residual + scales * linear(operand), the memory of the result (M, D), and the Stream
    that it leaves. layer_scale: where `layer` does not have it."""
    rows, inputs = operand.shape
    outputs, dtype = layer.weight.shape[0], layer.weight.dtype
    x = torch.empty(rows, outputs, dtype=residual.dtype, device=residual.device)
    copy = None if centre is None else _empty(residual, rows, outputs, dtype=dtype)
    stats = _empty(residual, 2, groups_of(outputs), rows)
    scale = layer_scale if leaves_scale(dtype) else None
    read = (layer.bias, scale, drop_path_scale, residual, centre)
    target = (x, copy, stats, *read, rows_per_sample(rows, drop_path_scale), residual.stride(0))
    epilogue = STREAM if copy is None else STREAM_AND_COPY
    product = (MATRIX, plain(operand), MATRIX, transposed(layer.weight), epilogue, target)
    return (*product, (rows, outputs, inputs), dtype, None, 3), x, Stream(copy, centre, stats)


class Needs(NamedTuple):
    """Which gradients of a block are needed: of x; of each layer's weight, its bias, the norm before it or the scale
    after it; of the bias of attention."""

    x: bool
    qkv: tuple[bool, bool, bool]
    proj: tuple[bool, bool, bool]
    fc1: tuple[bool, bool, bool]
    fc2: tuple[bool, bool, bool]
    attn_bias: bool

    @property
    def attention(self) -> bool:
        """Whether the gradient has to pass attention."""
        return self.x or any(self.qkv) or self.attn_bias

    @property
    def first_half(self) -> bool:
        """Whether the gradient has to pass the MLP."""
        return self.attention or any(self.proj)


def _scaled_gradient(dout: torch.Tensor, drop_path_scale, dtype: torch.dtype, sums: bool):
    """drop path * dout (M, D) in `dtype`, which is dout itself where that changes nothing, and its partial sums
    (parts, D) over tokens where wanted."""
    rows, columns = dout.shape
    copied = dout.dtype != dtype or drop_path_scale is not None
    if not (copied or sums):
        return dout, None
    copy = _empty(dout, rows, columns, dtype=dtype) if copied else None
    parts = ceil_div(rows, 64)
    partial = _empty(dout, parts, columns) if sums else None
    constants = dict(ACC=TRITON_DTYPES[accumulator_dtype(dout.dtype)], BLOCK_ROWS=64, BLOCK_COLUMNS=64, num_warps=4)
    grid = (parts, ceil_div(columns, 64), 1)
    args = (dout, copy, drop_path_scale, partial, rows, columns, dout.stride(0), rows_per_sample(rows, drop_path_scale))
    launch_kernel(scaled_gradient_kernel, grid, dout.device)(*args, **constants)
    return dout if copy is None else copy, partial


def _norm_gradient(s, layer: Folded, x, mean, rstd, by_row, residual, drop_path_scale, copied: bool, sums: bool):
    """The gradient of a norm's input (M, D) from s (M, O) of the product after it, plus the residual's (M, D), in the
    residual's dtype; drop path * it in the products' dtype, or itself if not copied; and its partial sums (parts, D)
    over tokens, or None."""
    rows, outputs = s.shape
    dim = x.shape[1]
    dx = _empty(x, rows, dim, dtype=residual.dtype)
    copy = _empty(x, rows, dim, dtype=s.dtype) if copied else None
    parts = by_row.shape[0]
    read = (x, mean, rstd, by_row, residual, drop_path_scale, rows_per_sample(rows, drop_path_scale))
    target = (dx, copy, *read, parts, residual.stride(0))
    product = (MATRIX, plain(s), MATRIX, plain(layer.weight), NORM_GRADIENT, target)

    def by_tile(tiles_m: int, tiles_n: int) -> tuple:
        return (_empty(x, tiles_m, dim) if sums else None,)

    *_, partial = gemm.launch(*product, (rows, dim, outputs), s.dtype, outputs=2, by_tile=by_tile)
    return dx, dx if copy is None else copy, partial


def _derivative(r, layer: Folded, y, mean, rstd, folded: Folded, activation: str):
    """s = rstd * dy of y = fc1(norm2(x1)) (M, outputs), from r (M, D), the gradient of fc2's output; what fc2 reads
    (M, hidden); and dy's sums by row (parts, 2, M) and by column (parts, 2, outputs): see `_math.before_norm`."""
    rows, outputs = y.shape
    hidden = layer.weight.shape[1]
    s, activated = torch.empty_like(y), _empty(y, rows, hidden, dtype=y.dtype)
    target = (s, activated, y, mean, rstd, folded.colsum, folded.bias)
    epilogue = DERIVATIVE if hidden == outputs else GATED_DERIVATIVE
    product = (MATRIX, plain(r), MATRIX, plain(layer.weight), epilogue, target)

    def by_tile(tiles_m: int, tiles_n: int) -> tuple:
        return _empty(y, tiles_n, 2, rows), _empty(y, tiles_m, 2, outputs)

    shape = (rows, hidden, r.shape[1])
    return gemm.launch(*product, shape, y.dtype, activation, outputs=2, by_tile=by_tile)


def _attention_gradient(r, layer: Folded, out, heads: int):
    """The gradient of attention's output (M, D) from r (M, D), that of proj's; and its sums with the output by head
    (B, H, padded(N)), or None where heads do not fill whole tiles."""
    batch, tokens, dim = out.shape
    dout = _empty(out, batch * tokens, dim, dtype=out.dtype)
    product = (MATRIX, plain(r), MATRIX, plain(layer.weight))
    shape = (batch * tokens, dim, r.shape[1])
    head_dim = dim // heads
    if head_dim not in DELTA_HEAD_DIMS:
        gemm.launch(*product, INPUT_GRADIENT, (dout,), shape, dout.dtype)
        return dout.view(out.shape), None
    delta = _empty(out, batch, heads, attention.padded(tokens))
    target = (dout, delta, out, tokens, delta.shape[2], heads)
    gemm.launch(*product, WITH_DELTA, target, shape, dout.dtype, head_dim, outputs=2)
    return dout.view(out.shape), delta


def _weight_product(dy, x, layer: Layer):
    """dy^T x (O, K) of dy (M, O), x (M, K): the gradient of `layer`'s weight in its dtype, or float32 (float64) where
    something is still to be made of it."""
    wide = layer.norm_weight is not None or layer.scale is not None or layer.weight.dtype != x.dtype
    return gemm.weight_gradient(dy, MATRIX, plain(x), x.shape[1], x.dtype, wide)


class LayerGradients(NamedTuple):
    """Of a `Layer`, each in its dtype, or None."""

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    norm_weight: torch.Tensor | None = None
    norm_bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None


def block_backward(
    dout: torch.Tensor,
    saved: Saved,
    layers: Weights,
    folded: Weights,
    scale: float,
    eps2: float,
    activation: str,
    options: attention.Options,
    drop_path_scales: tuple[torch.Tensor | None, torch.Tensor | None],
    needs: Needs,
) -> tuple[torch.Tensor | None, list[LayerGradients], torch.Tensor | None]:
    """The gradients of the forward pass for dout (M, D): of x in dout's dtype, of each of the four layers, and of the
    broadcast attn_bias (B, H, N, N) in float32 (float64); None for each that is not needed.

    layers: as they are; folded: as the forward pass had them; options: attention's.
    """
    batch, tokens, _, heads, _ = saved.qkv.shape
    dtype, rows = saved.qkv.dtype, batch * tokens
    products, sums, dx, dbias = {}, {}, None, None

    r, sums["fc2"] = _scaled_gradient(dout, drop_path_scales[1], dtype, any(needs.fc2[1:]))
    if needs.first_half or any(needs.fc1) or needs.fc2[0] or needs.fc2[2]:
        norm2, y = (saved.mean2, saved.rstd2), saved.preactivation
        if y is None:
            product, _ = _folded_product(saved.x1, Stream(None, None, saved.stats2), folded.fc1, eps2)
            y, *_ = gemm.launch(*product)
        s, activated, by_row, sums["fc1"] = _derivative(r, folded.fc2, y, *norm2, folded.fc1, activation)
        del y
        if needs.fc2[0] or needs.fc2[2]:
            products["fc2"] = _weight_product(r, activated, layers.fc2)
        del activated, r
        if any(needs.fc1):
            products["fc1"] = _weight_product(s, saved.x1, layers.fc1)
        if needs.first_half:
            copied = dout.dtype != dtype or drop_path_scales[0] is not None
            how = (drop_path_scales[0], copied, any(needs.proj[1:]))
            dx1, r, sums["proj"] = _norm_gradient(s, folded.fc1, saved.x1, *norm2, by_row, dout, *how)
        del s
    if needs.proj[0] or needs.proj[2]:
        products["proj"] = _weight_product(r, saved.out.view(rows, -1), layers.proj)
    if needs.attention:
        dattention, delta = _attention_gradient(r, folded.proj, saved.out, heads)
        norm1 = (saved.mean1, saved.rstd1)
        norm = attention.BeforeNorm(*norm1, folded.qkv.colsum, folded.qkv.bias)
        how = (options, needs.attn_bias, delta, norm)
        s, dbias, by_head = attention.backward(dattention, saved.qkv, saved.out, saved.lse, scale, *how)
        s = s.view(rows, -1)
        if any(needs.qkv):
            products["qkv"] = _weight_product(s, saved.x, layers.qkv)
            sums["qkv"] = by_head
        if needs.x:
            dx, _, _ = _norm_gradient(s, folded.qkv, saved.x, *norm1, by_head.by_row, dx1, None, False, False)
    return dx, _layer_gradients(layers, needs, products, sums), dbias


def _layer_gradients(layers: Weights, needs: Needs, products: dict, sums: dict) -> list[LayerGradients]:
    """The gradients of the four layers from the products and partial sums over tokens: three small launches at most."""
    pending, totals = [], {}
    for name in Weights._fields:
        layer, needed = getattr(layers, name), getattr(needs, name)
        if not any(needed):
            continue
        if layer.norm_weight is not None:
            outputs = layer.weight.shape[0]
            total = totals[name] = _empty(products[name], 2, outputs)
            if name == "fc1":
                pending.append((sums[name], 0, 2 * outputs, total, 0))
                continue
            _, of_q, of_kv = sums[name]
            width = outputs // 3
            for k in range(2):
                pending.append((of_q, k * width, width, total, k * outputs))
                pending.append((of_kv, 2 * k * width, 2 * width, total, k * outputs + width))
        elif any(needed[1:]):
            as_it_is = layer.scale is None and layer.bias is not None
            total = totals[name] = _empty(
                sums[name], layer.weight.shape[0], dtype=layer.bias.dtype if as_it_is else None
            )
            pending.append((sums[name], 0, len(total), total, 0))
    sum_parts(pending)
    with_norm = [name for name in ("qkv", "fc1") if name in totals]
    found = dict.fromkeys(Weights._fields, LayerGradients())
    unfolded = unfold([Unfolding(getattr(layers, n), products[n], totals[n], *getattr(needs, n)) for n in with_norm])
    for name, gradients in zip(with_norm, unfolded, strict=True):
        found[name] = LayerGradients(*gradients)
    scaled = [name for name in ("proj", "fc2") if getattr(layers, name).scale is not None and any(getattr(needs, name))]
    unscaled = unscale([(getattr(layers, n), products.get(n), totals.get(n), *getattr(needs, n)) for n in scaled])
    for name, gradients in zip(scaled, unscaled, strict=True):
        found[name] = LayerGradients(*gradients)
    for name in ("proj", "fc2"):
        if name not in scaled and any(getattr(needs, name)):
            found[name] = LayerGradients(products.get(name), totals.get(name))
    return [found[name] for name in Weights._fields]


# ---------------------------------------------------------------------------------------------------------------------
# As operators: tensors in, tensors out


def _layers(parameters: tuple, layer_scales: tuple) -> Weights:
    """The four layers of the twelve parameters, in the order of a block's state_dict, and its two layer-scales. One
    whose fc1 has twice the rows that fc2 has columns is gated."""
    norm1_weight, norm1_bias, *first, norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = parameters
    qkv_weight, qkv_bias, proj_weight, proj_bias = first
    return Weights(
        Layer(qkv_weight, qkv_bias, norm1_weight, norm1_bias),
        Layer(proj_weight, proj_bias, scale=layer_scales[0]),
        Layer(fc1_weight, fc1_bias, norm2_weight, norm2_bias, parts=fc1_weight.shape[0] // fc2_weight.shape[1]),
        Layer(fc2_weight, fc2_bias, scale=layer_scales[1]),
    )


def _options(key_padding_mask, attn_bias, rope_cos, rope_sin, rope_interleaved: bool) -> attention.Options:
    rope = {"rope_cos": rope_cos, "rope_sin": rope_sin, "rope_interleaved": rope_interleaved}
    return attention.Options(key_padding_mask, attn_bias, **rope)


def transformer_block_forward(x, copy, centre, stats, *others) -> tuple[torch.Tensor | None, ...]:
    """x (B, N, D) contiguous; copy, centre, stats: its `Stream`, or None thrice; twelve parameters; two layer-scales
    (D,), two drop-path scales (B,), key_padding_mask, attn_bias, rope_cos and rope_sin or None; rope_interleaved,
    num_heads, scale, eps1, eps2, activation, recompute_fc1, keep, and the products' dtype. Returns the block's output
    (B, N, D); its Stream; where there was none, what products read of x, if that is not x; what `Saved` has after x;
    and the four `Folded` layers' weight, bias and colsum, None where they are what came. What is only for a backward
    pass is None unless keep is set."""
    *parameters, scale1, scale2, drop1, drop2 = others[:16]
    num_heads, scale, eps1, eps2, activation, recompute_fc1, keep, dtype = others[21:]
    batch, tokens, dim = x.shape
    layers = _layers(parameters, (scale1, scale2))
    folded, to_fold = fold(layers, dtype)
    if to_fold is not None:
        launch_sections(*to_fold)
    folded = Weights(*folded)
    rows = x.view(batch * tokens, dim)
    stream = stream_of(rows, dtype) if stats is None else Stream(copy, centre, stats)

    read = rows if stream.copy is None else stream.copy
    product, (qkv, _, *norm1, centre) = _folded_product(read, stream, folded.qkv, eps1, train=keep)
    gemm.launch(*product)
    qkv = qkv.view(batch, tokens, 3, num_heads, dim // num_heads)
    given, (mixed, lse) = attention.forward(qkv, scale, _options(*others[16:21]))
    if rows.numel():
        attention.launch(*given)
    product, x1, stream1 = _stream_product(mixed.view(rows.shape), folded.proj, scale1, rows, centre, drop1)
    gemm.launch(*product)
    read1 = x1 if stream1.copy is None else stream1.copy
    keeps_hidden = keep and not recompute_fc1
    gated = layers.fc1.parts == 2
    product, made = _folded_product(read1, stream1, folded.fc1, eps2, activation, gated, keep, keeps_hidden)
    hidden, kept, *norm2, centre = made
    gemm.launch(*product)
    product, out, after = _stream_product(hidden, folded.fc2, scale2, x1, centre, drop2)
    gemm.launch(*product)

    out = out.view(x.shape)
    if not keep:
        return out, *after, *[None] * 23
    folded_anew = [
        value if value is not given else None
        for of_layer, layer in zip(folded, layers, strict=True)
        for value, given in zip(of_layer, (layer.weight, layer.bias, None), strict=True)
    ]
    saved = (*norm1, qkv, mixed, lse, read1, *norm2, kept, None if keeps_hidden else stream1.stats)
    return out, *after, stream.copy if stats is None else None, *saved, *folded_anew


def transformer_block_backward(dout, read, *others) -> tuple[torch.Tensor | None, ...]:
    """dout (B, N, D); read: what products read of x (B * N, D); what `transformer_block_forward` returned from mean1
    on; what it took from the parameters to rope_interleaved; scale, eps2 and activation; needs: bools for x, the twelve
    parameters, the two layer-scales and attn_bias. Returns their gradients, that of attn_bias broadcast; None where not
    needed."""
    saved, made, given = Saved(read, *others[:10]), others[10:22], others[22:43]
    scale, eps2, activation, needs = others[43:]
    *parameters, scale1, scale2, drop1, drop2 = given[:16]
    options = _options(*given[16:])
    if dout.numel() == 0:
        likes = (dout, *parameters, scale1, scale2, options.attn_bias)
        return tuple([torch.zeros_like(like) if need else None for like, need in zip(likes, needs, strict=True)])
    layers = _layers(parameters, (scale1, scale2))
    folded = []
    for number, layer in enumerate(layers):
        weight, bias, colsum = made[3 * number : 3 * number + 3]
        folded.append(Folded(layer.weight if weight is None else weight, layer.bias if bias is None else bias, colsum))
    x, n1w, n1b, qkv, qkv_b, proj, proj_b, n2w, n2b, fc1, fc1_b, fc2, fc2_b, ls1, ls2, bias = needs
    needed = Needs(x, (qkv, qkv_b, n1w or n1b), (proj, proj_b, ls1), (fc1, fc1_b, n2w or n2b), (fc2, fc2_b, ls2), bias)
    how = (scale, eps2, activation, options, (drop1, drop2), needed)
    dx, (of_qkv, of_proj, of_fc1, of_fc2), dbias = block_backward(
        dout.flatten(0, 1), saved, layers, Weights(*folded), *how
    )
    return (
        None if dx is None else dx.view(dout.shape),
        *(of_qkv.norm_weight, of_qkv.norm_bias, of_qkv.weight, of_qkv.bias, of_proj.weight, of_proj.bias),
        *(of_fc1.norm_weight, of_fc1.norm_bias, of_fc1.weight, of_fc1.bias, of_fc2.weight, of_fc2.bias),
        *(of_proj.scale, of_fc2.scale, dbias),
    )

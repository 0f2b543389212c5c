"""The calls whose kernels the static report compiles: every launcher, on meta tensors of real models' sizes."""

from __future__ import annotations

from functools import partial

import torch
from fastvit.kernels import (
    attention,
    layer_norm,
    layer_norm_linear,
    layer_norm_mlp,
    linear_residual,
    patch_embed,
    transformer_block,
)

from fastvit.examples import BLOCK_SCALES, LONGER, ROPE, SCALES, TABLES, Draw, tensors

from .compile import Case

BATCH = 64


def _attention(tokens, heads, head_dim, dtype, *also, batch=BATCH, **options):
    """also: which of the optional tensors there are; options: others of `attention.Options`."""
    sizes = {"batch": batch, "tokens": tokens, "heads": heads, "head_dim": head_dim}
    made = tensors("attention", Draw(dtype, "meta", dtypes=dict.fromkeys(ROPE, torch.float32)), also, **sizes)
    _attend(made.pop("qkv"), attention.Options(**made, **options))


def _attention_varlen(sequences, heads, head_dim, dtype):
    made = tensors("attention_varlen", Draw(dtype, "meta"), sequences=sequences, heads=heads, head_dim=head_dim)
    _attend(made.pop("qkv"), attention.Options(**made, max_seqlen=LONGER * (sequences - 1)))


def _attend(qkv, options):
    scale = qkv.shape[-1] ** -0.5
    out, lse = attention.attention_forward(qkv, scale, *options)
    attention.attention_backward(out, qkv, out, lse, scale, options.attn_bias is not None, *options)


def whole_block(
    tokens,
    dim,
    dtype,
    stream=None,
    scaled=False,
    batch=BATCH,
    backward=True,
    activation="gelu",
    hidden=None,
    rope=False,
):
    """A block as one op: forward, the first of a row and a later one, and backward. stream: the dtype of x and of the
    parameters, as under autocast. backward=False: forward only, with nothing kept. hidden: of a gated MLP. rope: with a
    rotary embedding of all tokens but the first."""
    stream = stream or dtype
    sizes = {"batch": batch, "tokens": tokens, "dim": dim, "heads": dim // 64, "hidden": hidden or 4 * dim}
    sizes["gated"] = hidden is not None
    x, *given = tensors("transformer_block", Draw(stream, "meta"), BLOCK_SCALES if scaled else (), **sizes).values()
    given += [None] * (18 - len(given))
    given += [Draw(torch.float32, "meta")(name, tokens - 1, 32) if rope else None for name in ROPE] + [False]
    how = (dim // 64, 0.125, 1e-6, 1e-6, activation, False)
    forward = transformer_block.transformer_block_forward
    out, *handed = forward(x, None, None, None, *given, *how, False, dtype)[:4]
    if backward:
        _, _, _, _, _, *saved = forward(x, *handed, *given, *how, True, dtype)
        read = x.flatten(0, 1) if handed[0] is None else handed[0]
        needs = [True] * 13 + [scaled] * 2 + [False]
        transformer_block.transformer_block_backward(out, read, *saved, *given, 0.125, 1e-6, activation, needs)


def _block(tokens, dim, dtype, stream=None, scaled=False, activation="gelu", batch=BATCH):
    """Everything of a block but attention; stream: the dtype of the residual stream; scaled: with layer-scale and drop
    path."""

    def rows(op, *wide, **sizes):
        """The op's, in the order of its signature, rows in two dimensions; wide: what has the stream's dtype."""
        draw = Draw(dtype, "meta", dtypes=dict.fromkeys(wide, stream or dtype))
        made = tensors(op, draw, batch=batch, tokens=tokens, dim=dim, **sizes)
        return [tensor.flatten(0, 1) if name in ("x", "residual") else tensor for name, tensor in made.items()]

    normalised = ("x", "norm_weight", "norm_bias")
    also = SCALES if scaled else ()

    x, *norm, weight, bias = rows("layer_norm_linear", *normalised, out=3 * dim)
    layer_norm.layer_norm_forward(x, *norm, 1e-6)
    qkv, mean, rstd = layer_norm_linear.layer_norm_linear_forward(x, *norm, weight, bias, 1e-6)
    layer_norm_linear.layer_norm_linear_backward(qkv, x, mean, rstd, *norm, weight, (True,) * 3)

    inner, weight, bias, x, *scales = rows("linear_residual", "residual", out=dim, also=also)
    scales = scales or [None, None]
    out = linear_residual.linear_residual_forward(inner, weight, bias, x, *scales, x.dtype)
    linear_residual.linear_residual_backward(out, inner, weight, bias, *scales, (True, True, True, scaled))

    x, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias, residual, *scales = rows(
        "layer_norm_mlp", *normalised, "residual", hidden=4 * dim, also=["residual", *also]
    )
    norm, scales = (norm_weight, norm_bias), scales or [None, None]
    for keep in (False, True):
        out, mean, rstd, preactivation = layer_norm_mlp.layer_norm_mlp_forward(
            x, *norm, fc1, fc1_bias, fc2, fc2_bias, None, *scales, True, 1e-6, activation, keep, x.dtype
        )
    needs = (True,) * 5 + (scaled,)
    layer_norm_mlp.layer_norm_mlp_backward(
        out, x, mean, rstd, preactivation, *norm, fc1, fc2, fc2_bias, *scales, activation, True, needs
    )


def _patch_embed(size, patch, dim, dtype, image_dtype=None, channels_last=False, prefix=1, batch=BATCH):
    draw = Draw(dtype, "meta", dtypes={"image": image_dtype or dtype}, channels_last=channels_last)
    sizes = {"batch": batch, "size": (size, size), "patch": (patch, patch), "dim": dim, "prefix": prefix}
    image, weight, *rest = tensors("patch_embed", draw, TABLES, **sizes).values()
    # Each image dtype is normalised as the models do it: uint8 in the kernel, floats before.
    normalisation = [(0.5,) * 3, (0.5,) * 3] if image_dtype == torch.uint8 else [None, None]
    out = patch_embed.patch_embed_forward(image, weight, *rest, *normalisation, dtype, dtype, dtype.itemsize == 2)[0]
    needs_image = image.is_floating_point()
    patch_embed.patch_embed_backward(out, image, weight, prefix, *normalisation, dtype, (needs_image, *[True] * 3))


def cases() -> list[Case]:
    """Every kernel, at the sizes, dtypes and layouts that change its code."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    uint8 = torch.uint8
    listed = [
        Case("block S/16 bf16", lambda: _block(197, 384, bf16)),
        Case("block B/16 bf16", lambda: _block(197, 768, bf16), candidates=True),
        Case("block L/16 bf16", lambda: _block(197, 1024, bf16)),
        Case("block B/16 bf16, batch 1", lambda: _block(197, 768, bf16, batch=1)),
        Case("block B/16 bf16, float32 stream, scaled", lambda: _block(197, 768, bf16, stream=fp32, scaled=True)),
        Case("block B/16 fp16, scaled", lambda: _block(197, 768, fp16, scaled=True)),
        Case("block B/16 fp32", lambda: _block(197, 768, fp32, scaled=True)),
        Case("patch embedding B/16 bf16", lambda: _patch_embed(224, 16, 768, bf16)),
        Case("patch embedding B/16 bf16, uint8", lambda: _patch_embed(224, 16, 768, bf16, uint8)),
        Case(
            "patch embedding B/16 bf16, uint8 channels_last",
            lambda: _patch_embed(224, 16, 768, bf16, uint8, channels_last=True),
        ),
        Case("patch embedding B/16 bf16, channels_last", lambda: _patch_embed(224, 16, 768, bf16, channels_last=True)),
        Case("patch embedding B/32 bf16, float32 image", lambda: _patch_embed(224, 32, 768, bf16, fp32)),
        Case("patch embedding B/8 bf16", lambda: _patch_embed(224, 8, 768, bf16)),
        Case("patch embedding L/14 fp16", lambda: _patch_embed(224, 14, 1024, fp16)),
        Case("patch embedding L/14 bf16, 518 pixels", lambda: _patch_embed(518, 14, 1024, bf16, batch=8)),
        Case("patch embedding L/14 bf16, uint8", lambda: _patch_embed(224, 14, 1024, bf16, uint8)),
        Case("patch embedding L/14 bf16, channels_last", lambda: _patch_embed(224, 14, 1024, bf16, channels_last=True)),
        Case("patch embedding B/16 fp32", lambda: _patch_embed(224, 16, 768, fp32)),
    ]
    listed += [
        Case("whole block S/16 bf16", lambda: whole_block(197, 384, bf16)),
        Case("whole block B/16 bf16", lambda: whole_block(197, 768, bf16), candidates=True),
        Case("whole block B/16 bf16, batch 1", lambda: whole_block(197, 768, bf16, batch=1)),
        Case("whole block B/16 bf16 of float32, scaled", lambda: whole_block(197, 768, bf16, fp32, scaled=True)),
        Case("whole block L/16 bf16, scaled", lambda: whole_block(197, 1024, bf16, scaled=True)),
        Case("whole block B/16 fp16, scaled", lambda: whole_block(197, 768, fp16, scaled=True, backward=False)),
        Case("whole block g/14 bf16, gated", lambda: whole_block(257, 1536, bf16, activation="silu", hidden=4096)),
        Case("whole block B/16 fp32", lambda: whole_block(197, 768, fp32, scaled=True)),
        Case("whole block B/16 bf16, rotary", lambda: whole_block(201, 768, bf16, rope=True)),
    ]
    for name in ("gelu_tanh", "quick_gelu", "silu"):
        listed.append(Case(f"block S/16 bf16, {name}", lambda name=name: _block(197, 384, bf16, activation=name)))
        whole = partial(whole_block, 197, 768, bf16, activation=name)
        listed.append(Case(f"whole block B/16 bf16, {name}", whole))
    for width in (16, 32, 48, 64, 72, 80, 88, 96, 104, 112, 128):
        call = lambda width=width: _attention(197, 12, width, bf16)  # noqa: E731
        listed.append(Case(f"attention d={width} bf16", call, candidates=width == 64))
    for width in (64, 80, 128):
        masked = lambda width=width: _attention(197, 12, width, bf16, "key_padding_mask", "attn_bias")  # noqa: E731
        listed.append(Case(f"attention d={width} bf16, masked", masked))
        listed.append(Case(f"attention d={width} fp32", lambda width=width: _attention(197, 12, width, fp32)))
    # A class token before whole tiles; keys that do not fit on chip; so few heads that each tile gets a program.
    listed.append(Case("attention d=64 fp16, 257 tokens", lambda: _attention(257, 16, 64, fp16)))
    listed.append(Case("attention d=80 bf16, 257 tokens", lambda: _attention(257, 16, 80, bf16)))
    listed.append(Case("attention d=64 bf16, 577 tokens", lambda: _attention(577, 12, 64, bf16)))
    listed.append(Case("attention d=64 bf16, batch 1", lambda: _attention(197, 12, 64, bf16, batch=1)))
    listed.append(Case("attention d=96 bf16, batch 1", lambda: _attention(197, 12, 96, bf16, batch=1)))
    listed.append(Case("attention d=80 bf16, 320 tokens", lambda: _attention(320, 16, 80, bf16)))
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    listed.append(Case("attention d=64 bf16, dropout", lambda: _attention(197, 12, 64, bf16, seed=seed)))
    for width in (64, 128):
        for label, neighbours in (("halves", False), ("neighbours", True)):
            rope = partial(_attention, 201, 12, width, bf16, *ROPE, rope_interleaved=neighbours)
            listed.append(Case(f"attention d={width} bf16, rotary {label}", rope))
        listed.append(Case(f"attention d={width} bf16, packed", partial(_attention_varlen, 30, 12, width, bf16)))
    listed.append(Case("attention d=64 bf16, a query", lambda: _attention(197, 12, 64, bf16, num_queries=1)))
    return listed

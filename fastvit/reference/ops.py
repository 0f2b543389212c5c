"""Each op of fastvit as a few lines of plain PyTorch, in any floating dtype, differentiable by autograd.

Sizes: B images, C channels, N tokens, P prefix tokens, D embed_dim, H heads of width d, K = C * ph * pw.
Where `x` is wider than the weights (a float32 residual stream beside bfloat16 weights, as under autocast) the
normalisation runs in x's dtype, the matrix product in the weights', and a residual sum in the wider of the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "gelu": F.gelu,  # exact: x * Phi(x)
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # OpenAI's CLIP
    "silu": F.silu,
}


def patch_embed(
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pos_embed: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> torch.Tensor:
    """Patches, flatten, linear projection, position table, prefix tokens (arXiv 2010.11929, section 3.1, eq. 1).

    image (B, C, H, W), float or uint8 (taken as pixel / 255); weight (D, C, ph, pw); bias (D,); pos_embed (N, D), or
    (P + N, D) when the prefix rows have positions too; prefix (P, D); mean, std: one float per channel, applied to
    the image first as (image - mean) / std. Returns (B, P + N, D) in the widest dtype of weight, pos_embed and prefix.
    """
    embed_dim, channels, ph, pw = weight.shape
    image = normalised_pixels(image, weight.dtype, mean, std)
    batch, _, height, width = image.shape
    patches = image.reshape(batch, channels, height // ph, ph, width // pw, pw)
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, C * ph * pw)
    tokens = F.linear(patches, weight.flatten(1), bias)

    return assemble_tokens(tokens, pos_embed, prefix)


def normalised_pixels(
    image: torch.Tensor, dtype: torch.dtype, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> torch.Tensor:
    """image (B, C, H, W), float or uint8 (taken as pixel / 255), as (image - mean) / std, in float32 and rounded to
    dtype."""
    if not image.is_floating_point():
        image = image.to(torch.promote_types(dtype, torch.float32)) / 255
    if mean is not None or std is not None:
        channels, wide = image.shape[1], torch.promote_types(image.dtype, torch.float32)
        mean = torch.tensor([0.0] * channels if mean is None else mean, dtype=wide, device=image.device)
        std = torch.tensor([1.0] * channels if std is None else std, dtype=wide, device=image.device)
        image = (image.to(wide) - mean[:, None, None]) / std[:, None, None]
    return image.to(dtype)


def assemble_tokens(
    tokens: torch.Tensor, pos_embed: torch.Tensor | None = None, prefix: torch.Tensor | None = None
) -> torch.Tensor:
    """Prefix rows before the patch tokens (B, N, D), positions added to the patches alone or, where the table
    has rows for them, to the prefix too. Returns (B, P + N, D)."""
    on_patches = pos_embed is not None and pos_embed.shape[0] == tokens.shape[1]
    if on_patches:
        tokens = tokens + pos_embed
    if prefix is not None:
        tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    return tokens if on_patches or pos_embed is None else tokens + pos_embed


def attention(
    qkv: torch.Tensor,
    *,
    scale: float | None = None,
    key_padding_mask: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rope_cos: torch.Tensor | None = None,
    rope_sin: torch.Tensor | None = None,
    rope_interleaved: bool = False,
    num_queries: int | None = None,
) -> torch.Tensor:
    """Multi-head self-attention: softmax(q k^T * scale + bias) v (arXiv 1706.03762, eq. 1).

    qkv (B, N, 3, H, d); scale defaults to d ** -0.5; key_padding_mask (B, N) bool, True = attend; attn_bias,
    added to the scaled scores, broadcastable to (B, H, M, N). A query that may attend to no key gets zeros.
    rope_cos, rope_sin, rope_interleaved: of `rotate`, applied to q and k. num_queries: M, of which only the first so
    many tokens ask; N for None. dropout_p: of the probabilities. Returns (B, M, H * d).
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, d)
    if rope_cos is not None:
        q, k = (rotate(x, rope_cos, rope_sin, rope_interleaved) for x in (q, k))
    q = q[:, :, :num_queries]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    probabilities = F.dropout(attention_probabilities(q, k, scale, key_padding_mask, attn_bias), dropout_p)
    return (probabilities @ v).transpose(1, 2).flatten(2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864, eq. 34) of the last R tokens of x (B, H, N, d).

    cos, sin (R, d / 2) or (B, R, d / 2): of each pair of columns (a, b), which becomes (a cos - b sin, b cos + a sin).
    b is d / 2 columns after a (DINOv3), or the next one, where interleaved (EVA-02). Computed in the wider dtype of x
    and cos, returned in x's.
    """
    prefix, x = x.tensor_split([x.shape[2] - cos.shape[-2]], dim=2)
    cos, sin = (angle if angle.dim() == 2 else angle[:, None] for angle in (cos, sin))
    pairs = x.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    where = -1 if interleaved else -2
    a, b = pairs.unbind(where)
    rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=where).flatten(-2)
    return torch.cat([prefix, rotated.to(x.dtype)], dim=2)


def attention_varlen(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    max_seqlen: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    rope_cos: torch.Tensor | None = None,
    rope_sin: torch.Tensor | None = None,
    rope_interleaved: bool = False,
) -> torch.Tensor:
    """`attention` of sequences of different lengths, one after the other, each by itself.

    qkv (T, 3, H, d); cu_seqlens (S + 1,) integers: sequence i is of tokens cu_seqlens[i] to cu_seqlens[i + 1];
    max_seqlen has no use here; rope_cos, rope_sin (T, d / 2). Returns (T, H * d).
    """
    bounds = cu_seqlens.tolist()
    if len(bounds) == 1:
        return qkv[:, 0].flatten(1)
    outs = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        rope = [None if angle is None else angle[begin:end] for angle in (rope_cos, rope_sin)]
        outs.append(
            attention(
                qkv[None, begin:end],
                scale=scale,
                dropout_p=dropout_p,
                rope_cos=rope[0],
                rope_sin=rope[1],
                rope_interleaved=rope_interleaved,
            )[0]
        )
    return torch.cat(outs)


def attention_probabilities(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    key_padding_mask: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale + bias) over the keys, of q and k (B, H, N, d); zeros for a query that may attend to none.
    Returns (B, H, N, N)."""
    scores = q @ k.transpose(-2, -1) * scale
    if attn_bias is not None:
        scores = scores + attn_bias
    if key_padding_mask is not None:
        scores = scores.masked_fill(~key_padding_mask[:, None, None, :], float("-inf"))
    alive = (scores != float("-inf")).any(dim=-1, keepdim=True)
    return torch.where(alive, scores, 0).softmax(dim=-1) * alive


def transformer_block(
    x: torch.Tensor,
    norm1_weight: torch.Tensor,
    norm1_bias: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor | None,
    norm2_weight: torch.Tensor,
    norm2_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    *,
    num_heads: int,
    scale: float | None = None,
    eps1: float = 1e-6,
    eps2: float = 1e-6,
    activation: str = "gelu",
    layer_scale1: torch.Tensor | None = None,
    layer_scale2: torch.Tensor | None = None,
    drop_path_scale1: torch.Tensor | None = None,
    drop_path_scale2: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    rope_cos: torch.Tensor | None = None,
    rope_sin: torch.Tensor | None = None,
    rope_interleaved: bool = False,
    recompute_fc1: bool = False,
) -> torch.Tensor:
    """A pre-norm transformer block (arXiv 2010.11929, eqs. 2 and 3): x (B, N, D) -> (B, N, D).

    x1 = x + drop_path_scale1 * layer_scale1 * proj(attention(qkv(norm1(x)))), out = x1 + drop_path_scale2 *
    layer_scale2 * fc2(activation(fc1(norm2(x1)))), or with an fc1_weight of (2 M, D), `gate` in place of activation;
    what the single ops say holds of their arguments. recompute_fc1 is the kernels' own matter, and changes no number.
    """
    batch, tokens, dim = x.shape
    qkv = layer_norm_linear(x, norm1_weight, norm1_bias, qkv_weight, qkv_bias, eps=eps1)
    heads = qkv.view(batch, tokens, 3, num_heads, dim // num_heads)
    rope = {"rope_cos": rope_cos, "rope_sin": rope_sin, "rope_interleaved": rope_interleaved}
    mixed = attention(heads, scale=scale, key_padding_mask=key_padding_mask, attn_bias=attn_bias, **rope)
    scales = {"layer_scale": layer_scale1, "drop_path_scale": drop_path_scale1}
    x = linear_residual(mixed, proj_weight, proj_bias, x, **scales)
    scales = {"layer_scale": layer_scale2, "drop_path_scale": drop_path_scale2}
    if is_gated(fc1_weight, fc2_weight):
        packed = layer_norm_linear(x, norm2_weight, norm2_bias, fc1_weight, fc1_bias, eps=eps2)
        return linear_residual(gate(packed, activation), fc2_weight, fc2_bias, x, **scales)
    layers = (norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return layer_norm_mlp(x, *layers, eps=eps2, activation=activation, residual=x, **scales)


def is_gated(fc1_weight: torch.Tensor, fc2_weight: torch.Tensor) -> bool:
    """Whether an MLP's first layer makes a gate and a value for each of the second one's inputs."""
    return fc1_weight.shape[0] == 2 * fc2_weight.shape[1] > 0


def gate(packed: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * value of packed (..., 2 M), the gates first (arXiv 2002.05202) -> (..., M)."""
    gates, values = packed.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gates) * values


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis (arXiv 1607.06450). x (..., D) -> (..., D)."""
    if x.dtype == weight.dtype == bias.dtype:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), bias.dtype)
    return F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps).to(x.dtype)


def _linear(x, weight, bias):
    return F.linear(x if x.dtype == weight.dtype else x.to(weight.dtype), weight, bias)


def layer_norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> torch.Tensor:
    """linear(layer_norm(x)). x (..., D), weight (O, D), bias (O,) -> (..., O) in weight's dtype."""
    return _linear(layer_norm(x, norm_weight, norm_bias, eps), weight, bias)


def linear_residual(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    *,
    layer_scale: torch.Tensor | None = None,
    drop_path_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + drop_path_scale * layer_scale * linear(x).

    x (B, ..., K), weight (O, K), bias (O,) or None, residual (B, ..., O); layer_scale (O,) (arXiv 2103.17239);
    drop_path_scale (B,): 0 for the dropped samples, 1 / keep_prob for the kept ones (arXiv 1603.09382).
    Returns (B, ..., O) in the wider of residual's and weight's dtype.
    """
    return add_branch(_linear(x, weight, bias), residual, layer_scale, drop_path_scale)


def add_branch(branch, residual, layer_scale=None, drop_path_scale=None):
    """residual + drop_path_scale * layer_scale * branch, as `linear_residual` has them."""
    if layer_scale is not None:
        branch = branch * layer_scale.to(branch.dtype)
    if drop_path_scale is not None:
        branch = branch * drop_path_scale.to(branch.dtype).reshape(-1, *[1] * (branch.dim() - 1))
    return residual + branch


def layer_norm_mlp(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    *,
    eps: float = 1e-6,
    activation: str = "gelu",
    residual: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
    drop_path_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """fc2(activation(fc1(layer_norm(x)))), scaled and added to the residual as in `linear_residual` when there is one.

    x (B, ..., D); fc1_weight (M, D), fc2_weight (O, M), biases (M,), (O,) or None; activation one of
    "gelu" (exact), "gelu_tanh", "quick_gelu", "silu". Returns (B, ..., O).
    """
    hidden = ACTIVATIONS[activation](layer_norm_linear(x, norm_weight, norm_bias, fc1_weight, fc1_bias, eps=eps))
    if residual is None:
        residual = hidden.new_zeros(())
    return linear_residual(
        hidden, fc2_weight, fc2_bias, residual, layer_scale=layer_scale, drop_path_scale=drop_path_scale
    )

"""Multi-head self-attention."""

from __future__ import annotations

import torch
from torch import nn

from fastvit import ops

from .layers import check_input, check_positive, check_rate, dropout_active, refuse_scripting, traced


def masks(
    attn_mask: torch.Tensor | None, is_causal: bool, batch: int, num_heads: int, tokens: int, like: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(key_padding_mask, attn_bias) of `fastvit.ops.attention` for timm's mask arguments, the bias where it has to be
    made in the dtype and on the device of `like`. Raises as `Attention.forward` says."""
    if attn_mask is None:
        if not is_causal:
            return None, None
        allowed = torch.ones(tokens, tokens, dtype=torch.bool, device=like.device).tril()
    elif is_causal:
        raise ValueError("attn_mask came together with is_causal=True, expected only one of them")
    else:
        if not isinstance(attn_mask, torch.Tensor):
            raise TypeError(f"attn_mask is a {type(attn_mask).__name__}, expected a torch.Tensor or None")
        full = (batch, num_heads, tokens, tokens)
        sizes = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
        if attn_mask.dim() > 4 or any(size not in (1, want) for size, want in zip(sizes, full, strict=True)):
            raise ValueError(f"attn_mask has shape {tuple(attn_mask.shape)}, expected one broadcastable to {full}")
        if attn_mask.dtype != torch.bool:
            if not attn_mask.is_floating_point():
                raise TypeError(f"attn_mask has dtype {attn_mask.dtype}, expected bool or floating point")
            return None, attn_mask
        if sizes == (batch, 1, 1, tokens):  # who may be attended to does not depend on who asks
            return attn_mask.reshape(batch, tokens), None
        allowed = attn_mask
    return None, torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill_(~allowed, float("-inf"))


Rope = tuple[torch.Tensor, torch.Tensor]  # cos and sin (R, d / 2), of the last R tokens


def operands(
    qkv: torch.Tensor,
    num_heads: int,
    scale: float,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    dropout_p: float,
    rope: Rope | None = None,
) -> dict:
    """What `fastvit.ops.attention` takes for packed rows (B, N, 3 * H * d), timm's mask arguments and a rope."""
    batch, tokens, width = qkv.shape
    key_padding_mask, attn_bias = masks(attn_mask, is_causal, batch, num_heads, tokens, qkv)
    heads = qkv.view(batch, tokens, 3, num_heads, width // (3 * num_heads))
    found = dict(qkv=heads, scale=scale, key_padding_mask=key_padding_mask, attn_bias=attn_bias, dropout_p=dropout_p)
    return found if rope is None else found | {"rope_cos": rope[0], "rope_sin": rope[1]}


@torch.fx.wrap
def attend(
    qkv: torch.Tensor,
    num_heads: int,
    scale: float,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    dropout_p: float,
    rope: Rope | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale + mask) v of packed rows: qkv (B, N, 3 * H * d) -> (B, N, H * d). One node of a graph that
    torch.fx traces, so that its masks are looked at, and its back end is chosen, when the graph runs."""
    return ops.attention(**operands(qkv, num_heads, scale, attn_mask, is_causal, dropout_p, rope))


class Attention(nn.Module):
    """Multi-head self-attention with packed q, k, v (arXiv 2010.11929, appendix A), a drop-in for timm's `Attention`.

    Parameters: qkv.weight (3 * H * d, D), rows in the order q, k, v; qkv.bias with `qkv_bias`; proj.weight
    (dim_out, H * d); proj.bias with `proj_bias`. H is num_heads, d is `attn_head_dim` or dim / num_heads.
    attn_drop: dropout rate of the attention probabilities, which the attention op applies itself, so that the
    `attn_drop` module only holds the rate and is never called; proj_drop: of the output. norm_layer is accepted for
    timm's sake and has no use without qk_norm or scale_norm.

    Raises ValueError for sizes that are no positive integers, rates that are none, a num_heads that does not divide
    dim, and for qk_norm, scale_norm and gated, which it has not.
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, value in (("qk_norm", qk_norm), ("scale_norm", scale_norm), ("gated", gated)):
            if value:
                raise ValueError(f"{name} is {value}, but fastvit.nn.Attention supports only {name}=False")
        check_positive("dim", dim)
        check_positive("num_heads", num_heads)
        for name, value in (("attn_head_dim", attn_head_dim), ("dim_out", dim_out)):
            if value is not None:
                check_positive(name, value)
        for name, value in (("attn_drop", attn_drop), ("proj_drop", proj_drop)):
            check_rate(name, value)
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}, expected a divisor of dim, {dim}")
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads if attn_head_dim is None else attn_head_dim
        self.scale = self.head_dim**-0.5
        attn_dim = num_heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * attn_dim, bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(attn_dim, dim if dim_out is None else dim_out, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def dropout_p(self) -> float:
        """The rate that the op applies in attn_drop's stead. Raises TypeError for a module it cannot stand in for."""
        drop = self._modules["attn_drop"]
        if type(drop) not in (nn.Dropout, nn.Identity):
            raise TypeError(f"attn_drop is {type(drop).__name__}, expected nn.Dropout or nn.Identity")
        return drop.p if type(drop) is nn.Dropout and dropout_active(drop) else 0.0

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        rope: Rope | None = None,
    ) -> torch.Tensor:
        """x (B, N, D) -> (B, N, dim_out).

        attn_mask, broadcastable to (B, H, N, N): bool, True = attend, or floating point, added to the scaled scores.
        is_causal: token i attends to tokens 0 to i. rope: cos and sin (R, d / 2) of a rotary position embedding of the
        last R tokens, as `fastvit.reference.rotate` has it, columns paired with those d / 2 further on. Raises
        ValueError for a wrong shape or both masks at once, and TypeError for no tensor or one of another dtype.
        """
        if not traced(x):
            check_input(x, self.dim)
        mixed = attend(self.qkv(x), self.num_heads, self.scale, attn_mask, is_causal, self.dropout_p(), rope)
        return self.proj_drop(self.proj(mixed))

"""The pre-norm transformer block."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from fastvit import dispatch, ops

from .attention import Attention, Rope, masks, operands
from .layers import (
    DROP_PATH,
    DROPOUT,
    FUSED_ACTIVATION,
    LAYER_NORM,
    LAYER_SCALE,
    LINEAR,
    DropPath,
    LayerScale,
    activation_name,
    branch_scales,
    build_layer_norm,
    can_fuse,
    check_input,
    check_positive,
    check_rate,
    dropout_active,
    is_integer,
    is_number,
    norm_complete,
    refuse_scripting,
    submodules,
    timm_layer,
    traced,
    vit_layer_norm,
    weights,
)
from .mlp import Mlp, SwiGLU


def _ours(argument: str, layer, replaced: dict[str, type]) -> type:
    """Our class for `layer`, which is one of ours or, by timm's names, one that ours stand in for.

    timm hands its own classes to every block_fn, so these have to be accepted. Raises TypeError for any other class,
    whose forward pass the block could not honour in its fused form.
    """
    for timm_name, our_class in replaced.items():
        if layer is our_class or (layer is not None and layer is timm_layer(timm_name)):
            return our_class
    names = ", ".join(f"fastvit.nn.{c.__name__} or timm.layers.{name}" for name, c in replaced.items())
    raise TypeError(f"{argument} is {layer!r}, expected {names}")


def block_indices(indices: int | Iterable[int] | None, depth: int, name: str = "indices") -> list[int]:
    """Numbers, from 0, of the chosen ones of `depth` blocks: all for None, the last n for an int, else those given,
    negative ones from the end. Raises ValueError for numbers that there are not, TypeError for anything else."""
    if indices is None:
        return list(range(depth))
    if is_integer(indices):
        if not 0 < indices <= depth:
            raise ValueError(f"{name} is {indices}, expected a number of blocks from 1 to {depth}")
        return list(range(depth - indices, depth))
    numbers = list(indices) if isinstance(indices, Iterable) else [None]
    if not all(is_integer(number) for number in numbers):
        raise TypeError(f"{name} is {indices!r}, expected None, a number of blocks, or block numbers")
    if not numbers or not all(-depth <= number < depth for number in numbers):
        raise ValueError(f"{name} is {indices}, expected block numbers from {-depth} to {depth - 1}")
    return [number % depth for number in numbers]


class Block(nn.Module):
    """Pre-norm transformer block (arXiv 2010.11929, eqs. 2 and 3), a drop-in for timm's `Block`:

        x = x + drop_path1(ls1(attn(norm1(x))))
        x = x + drop_path2(ls2(mlp(norm2(x))))

    Both run as one op wherever the kernels may; elsewhere each line runs on ops of its own (LayerNorm + linear;
    attention; linear + scales + residual; LayerNorm + MLP + scales + residual). Either is done as long as no one could
    tell it from calling the submodules, as `layers.can_fuse` defines that; where a submodule has hooks or was replaced,
    dropout after a linear layer is active, or torch.fx traces, the line calls its submodules.

    Parameters: norm1, attn.qkv, attn.proj, ls1.gamma, norm2, mlp.fc1, mlp.fc2, ls2.gamma, the `ls*` only where
    init_values, their first value, is given. mlp_layer is Mlp or SwiGLU; timm's own Attention, Mlp and SwiGLUPacked
    are taken to mean ours. depth, which timm passes, means nothing to the attention here. Set `recompute_fc1` to have
    the kernels keep less for a backward pass, see `ops.transformer_block`. Raises TypeError for other layer classes,
    ValueError for sizes and rates that are none, and for what the layers do not have (qk_norm, scale_attn_norm,
    scale_mlp_norm).
    """

    __prepare_scriptable__ = refuse_scripting
    recompute_fc1 = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer=nn.GELU,
        norm_layer=vit_layer_norm,
        mlp_layer=Mlp,
        attn_layer=Attention,
        depth: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if scale_mlp_norm:
            raise ValueError("scale_mlp_norm is True, but fastvit.nn.Block supports only scale_mlp_norm=False")
        check_positive("dim", dim)
        if not is_number(mlp_ratio) or mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio is {mlp_ratio!r}, expected a positive number")
        check_rate("drop_path", drop_path)
        attn_class = _ours("attn_layer", attn_layer, {"Attention": Attention})
        mlp_class = _ours("mlp_layer", mlp_layer, {"Mlp": Mlp, "SwiGLUPacked": SwiGLU})

        self.dim = dim
        self.norm1 = build_layer_norm(norm_layer, dim, **dd)
        self.attn = attn_class(
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            scale_norm=scale_attn_norm,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            **dd,
        )
        self.ls1 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()

        self.norm2 = build_layer_norm(norm_layer, dim, **dd)
        self.mlp = mlp_class(dim, int(dim * mlp_ratio), act_layer=act_layer, bias=proj_bias, drop=proj_drop, **dd)
        self.ls2 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def can_fuse_attention(self) -> bool:
        """Whether the first line runs on fused ops."""
        norm, attn, layer_scale, drop_path, *_ = submodules(self, _PARTS)
        if type(attn) is not Attention:
            return False
        qkv, proj, proj_drop = submodules(attn, _ATTENTION_PARTS)
        modules = (attn, norm, qkv, proj, proj_drop, layer_scale, drop_path)
        return can_fuse(modules, _ATTENTION_ROLES) and norm_complete(norm) and not dropout_active(proj_drop)

    def can_fuse_mlp(self) -> bool:
        """Whether the second line runs on fused ops."""
        *_, norm, mlp, layer_scale, drop_path = submodules(self, _PARTS)
        return can_fuse((mlp, norm, layer_scale, drop_path), _MLP_ROLES) and norm_complete(norm) and mlp.can_fuse()

    def can_fuse_block(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> bool:
        """Whether both lines run as one op on x, that is, `can_fuse_attention`, `can_fuse_mlp`, and what it takes."""
        norm1, attn, ls1, drop_path1, norm2, mlp, ls2, drop_path2 = submodules(self, _PARTS)
        if type(attn) is not Attention or type(mlp) not in (Mlp, SwiGLU):
            return False
        qkv, proj, proj_drop = submodules(attn, _ATTENTION_PARTS)
        fc1, act, fc2, drop1, drop2 = submodules(mlp, (*_MLP_PARTS, "drop1", "drop2"))
        first = (attn, norm1, qkv, proj, proj_drop, ls1, drop_path1)
        return (
            can_fuse((*first, mlp, norm2, ls2, drop_path2, fc1, fc2, drop1, drop2, act), _BLOCK_ROLES)
            and norm_complete(norm1)
            and norm_complete(norm2)
            and not (dropout_active(proj_drop) or dropout_active(drop1) or dropout_active(drop2) or attn.dropout_p())
            and attn.num_heads * attn.head_dim == self.dim
            and ops.takes_block(
                x,
                weights(qkv, proj, fc1, fc2)[::2],
                lambda: [*weights(norm1, qkv, proj, norm2, fc1, fc2), *self.parameters(), attn_mask],
            )
        )

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        rope: Rope | None = None,
    ) -> torch.Tensor:
        """x (B, N, D) -> (B, N, D). For attn_mask, is_causal and rope, and what they raise, see `Attention.forward`."""
        tracing = traced(x)
        if not tracing:
            check_input(x, self.dim)
        norm1, attn, ls1, drop_path1, norm2, mlp, ls2, drop_path2 = submodules(self, _PARTS)
        if not tracing and dispatch.may_fuse_blocks(x) and self.can_fuse_block(x, attn_mask):
            batch, tokens, _ = x.shape
            key_padding_mask, attn_bias = masks(attn_mask, is_causal, batch, attn.num_heads, tokens, x)
            qkv, proj, _ = submodules(attn, _ATTENTION_PARTS)
            fc1, act, fc2 = submodules(mlp, _MLP_PARTS)
            scales1, scales2 = branch_scales(ls1, drop_path1, x), branch_scales(ls2, drop_path2, x)
            return ops.transformer_block(
                x,
                *weights(norm1, qkv, proj, norm2, fc1, fc2),
                num_heads=attn.num_heads,
                scale=attn.scale,
                eps1=norm1.eps,
                eps2=norm2.eps,
                activation=activation_name(act),
                key_padding_mask=key_padding_mask,
                attn_bias=attn_bias,
                layer_scale1=scales1["layer_scale"],
                layer_scale2=scales2["layer_scale"],
                drop_path_scale1=scales1["drop_path_scale"],
                drop_path_scale2=scales2["drop_path_scale"],
                rope_cos=None if rope is None else rope[0],
                rope_sin=None if rope is None else rope[1],
                recompute_fc1=self.recompute_fc1,
            )
        if not tracing and self.can_fuse_attention():
            qkv, proj, _ = submodules(attn, _ATTENTION_PARTS)
            packed = ops.layer_norm_linear(x, *weights(norm1, qkv), eps=norm1.eps)
            mixed = ops.attention(
                **operands(packed, attn.num_heads, attn.scale, attn_mask, is_causal, attn.dropout_p(), rope)
            )
            x = ops.linear_residual(mixed, *weights(proj), x, **branch_scales(ls1, drop_path1, x))
        else:
            how = {} if rope is None else {"rope": rope}  # other attention layers need not have one
            x = x + drop_path1(ls1(attn(norm1(x), attn_mask=attn_mask, is_causal=is_causal, **how)))
        if tracing or not self.can_fuse_mlp():
            return x + drop_path2(ls2(mlp(norm2(x))))
        fc1, act, fc2 = submodules(mlp, _MLP_PARTS)
        scales = branch_scales(ls2, drop_path2, x)
        if type(mlp) is SwiGLU:
            gated = mlp.gate(ops.layer_norm_linear(x, *weights(norm2, fc1), eps=norm2.eps))
            return ops.linear_residual(gated, *weights(fc2), x, **scales)
        how = {"eps": norm2.eps, "activation": activation_name(act)}
        return ops.layer_norm_mlp(x, *weights(norm2, fc1, fc2), residual=x, **how, **scales)


_PARTS = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
_ATTENTION_PARTS = ("qkv", "proj", "proj_drop")
_MLP_PARTS = ("fc1", "act", "fc2")
_ATTENTION_ROLES = ((Attention,), LAYER_NORM, LINEAR, LINEAR, DROPOUT, LAYER_SCALE, DROP_PATH)
_MLP_ROLES = ((Mlp, SwiGLU), LAYER_NORM, LAYER_SCALE, DROP_PATH)
_BLOCK_ROLES = (*_ATTENTION_ROLES, *_MLP_ROLES, LINEAR, LINEAR, DROPOUT, DROPOUT, FUSED_ACTIVATION)

"""timm's VisionTransformer as ours: its config read off its modules, its tensors shared."""

from __future__ import annotations

import torch
from torch import nn

from fastvit.dropin.layouts import activation_of
from fastvit.dropin.swap import original_class
from fastvit.models.config import ViTConfig
from fastvit.models.vision_transformer import VisionTransformer

from .serving import check_serves


def as_ours(model: nn.Module) -> VisionTransformer | None:
    """A timm VisionTransformer or VisionTransformerDistilled as ours; None for another class. Raises ValueError, naming
    what it is, for one that does what ours has not."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer as Timm

    if type(model) not in (Timm, VisionTransformerDistilled):
        return None
    _check(model)
    with torch.device("meta"):
        ours = VisionTransformer(_config(model, type(model) is VisionTransformerDistilled))
    theirs = dict(model.named_modules())
    for name, module in ours.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = getattr(theirs.get(name), "eps", module.eps)
    wanted, given = ours.state_dict(), model.state_dict()
    differ = sorted(
        name
        for name in wanted.keys() | given.keys()
        if getattr(wanted.get(name), "shape", 0) != getattr(given.get(name), "shape", 1)
    )
    if differ:
        raise ValueError(f"model and fastvit's differ in parameters: {', '.join(differ[:3])}")
    ours.load_state_dict({name: tensor.detach() for name, tensor in given.items()}, assign=True)
    return ours.train(model.training)


def _config(model: nn.Module, distilled: bool) -> ViTConfig:
    from timm.layers import GluMlp  # timm's SwiGLUPacked is one whose gate comes first

    block, patch_embed = model.blocks[0], model.patch_embed
    pretrained = getattr(model, "pretrained_cfg", None) or {}
    swiglu, channels = isinstance(block.mlp, GluMlp), patch_embed.proj.in_channels
    return ViTConfig(
        img_size=tuple(patch_embed.img_size),
        patch_size=tuple(patch_embed.patch_size),
        in_chans=channels,
        num_classes=model.num_classes,
        global_pool=model.global_pool,
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / model.embed_dim,
        mlp="swiglu" if swiglu else "mlp",
        activation=_activation(block.mlp.act),
        qkv_bias=block.attn.qkv.bias is not None,
        init_values=None if isinstance(block.ls1, nn.Identity) else 1.0,
        class_token=model.cls_token is not None,
        reg_tokens=0 if model.reg_token is None else model.reg_token.shape[1],
        no_embed_class=model.no_embed_class,
        distilled=distilled,
        pre_norm=isinstance(model.norm_pre, nn.LayerNorm),
        final_norm=not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
        fc_norm=None if distilled else not isinstance(model.fc_norm, nn.Identity),
        dynamic_img_size=model.dynamic_img_size,
        dynamic_img_pad=bool(patch_embed.dynamic_img_pad),
        norm_eps=block.norm1.eps,
        **{name: tuple(pretrained[name]) for name in ("mean", "std") if len(pretrained.get(name) or ()) == channels},
    )


def _activation(act: nn.Module) -> str:
    found = activation_of(act)
    if found is None:
        raise ValueError(f"model.blocks.0.mlp.act is a {type(act).__name__}, which a frozen model has no step for")
    return found


def _check(model: nn.Module) -> None:
    """Raise ValueError for what `check_serves` refuses, and modules that ours has not."""
    from timm import layers
    from timm.models import vision_transformer as source

    nothing = ("patch_embed.norm", "q_norm", "k_norm", "attn.norm", "mlp.norm")
    plain = {
        *(nn.Identity, nn.Linear, nn.Conv2d, nn.Dropout, nn.LayerNorm, nn.Sequential, nn.GELU, nn.SiLU),
        *(layers.LayerNorm, layers.Mlp, layers.GluMlp, layers.PatchEmbed, layers.DropPath, layers.LayerScale),
        *(layers.PatchDropout, layers.QuickGELU, layers.GELU, layers.GELUTanh, type(model)),
        *(source.Block, source.Attention, source.LayerScale, layers.AttentionPoolLatent),
    }
    check_serves(model)
    for name, module in model.named_modules():
        where = f"model.{name}" if name else "model"
        if (original_class(module) or type(module)) not in plain or (
            name.endswith(nothing) and not isinstance(module, nn.Identity)
        ):
            raise ValueError(f"{where} is a {type(module).__name__}, which a frozen model has no step for")
        if isinstance(module, layers.GluMlp) and (module.gate_last or not isinstance(module.act, nn.SiLU)):
            raise ValueError(f"{where} gates its first half, or not by SiLU, which a frozen model has no step for")
    pool = model.attn_pool
    plain_pool = pool is None or (pool.latent_len == 1 and pool.pool == "token" and pool.pos_embed is None)
    if not plain_pool or getattr(model, "pool_include_prefix", False):
        raise ValueError("model pools its prefix too, or by several queries, which a frozen model has no step for")
    heads = {layer.num_heads for layer in [block.attn for block in model.blocks] + ([] if pool is None else [pool])}
    if len(heads) > 1:
        raise ValueError("model has layers of different numbers of heads, expected one number")

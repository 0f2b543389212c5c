"""torchvision's VisionTransformer."""

from __future__ import annotations

from functools import partial

from torch import nn

from fastvit import torchvision_shim
from fastvit.models.formats import from_timm

from . import Built
from ._common import copy_into


def unfit(peer, case, config, device) -> str | None:
    for name, needed in (
        *(("class_token", True), ("distilled", False), ("reg_tokens", 0), ("no_embed_class", False)),
        *(("global_pool", "token"), ("norm_after_pool", False), ("final_norm", True)),
        *(("mlp", "mlp"), ("activation", "gelu"), ("qkv_bias", True), ("init_values", None), ("in_chans", 3)),
    ):
        if getattr(config, name) != needed:
            return f"has only {name}={needed!r}, the model has {getattr(config, name)!r}"
    if not config.num_classes:
        return "has no model without a classifier"
    if len({*config.img_size}) > 1 or len({*config.patch_size}) > 1:
        return "has square images and patches only"
    return None


def build(peer, case, ours, inputs) -> Built:
    torchvision_shim.install()
    from torchvision.models import VisionTransformer

    config, state = ours.config, from_timm(ours.state_dict(), "torchvision", ours.config)
    make = partial(
        VisionTransformer,
        image_size=config.img_size[0],
        patch_size=config.patch_size[0],
        num_layers=config.depth,
        num_heads=config.num_heads,
        hidden_dim=config.embed_dim,
        mlp_dim=ours.blocks[0].mlp.fc1.out_features,
        num_classes=config.num_classes,
        norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
    )
    return Built(copy_into(ours, make, state))

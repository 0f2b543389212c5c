"""timm's VisionTransformer: eager in the case's dtype or under autocast, or compiled."""

from __future__ import annotations

from functools import partial

import torch

from fastvit import torchvision_shim

from . import Built
from ._common import compiled, copy_into

_FIELDS = (
    *("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "num_heads"),
    *("mlp_ratio", "qkv_bias", "init_values", "class_token", "reg_tokens", "no_embed_class", "final_norm", "fc_norm"),
)


def build(peer, case, ours, inputs) -> Built:
    torchvision_shim.install()
    from timm.layers import LayerNorm, Mlp, SwiGLUPacked
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    config = ours.config
    arguments = {name: getattr(config, name) for name in _FIELDS} | {
        "act_layer": config.activation,
        "mlp_layer": {"mlp": Mlp, "swiglu": SwiGLUPacked}[config.mlp],
        "norm_layer": partial(LayerNorm, eps=config.norm_eps),
    }
    make = partial(VisionTransformerDistilled if config.distilled else VisionTransformer, **arguments)
    if peer.name == "timm amp":
        model = copy_into(ours, make, ours.state_dict(), torch.float32)
        return Built(_autocast(model, case.dtype), "float32 weights, cast in every call by autocast")
    model = copy_into(ours, make, ours.state_dict())
    if peer.name == "timm compiled":
        return Built(compiled(model))
    if peer.name == "timm compiled freezing":
        return Built(compiled(model, options={"freezing": True}))
    if peer.name == "timm max-autotune":
        return Built(compiled(model, "max-autotune"), opaque=True)
    return Built(model)


def _autocast(model, dtype):
    device_type = next(model.parameters()).device.type

    def call(images):
        with torch.autocast(device_type, dtype):
            return model(images)

    return call

"""Small models of every kind that can be frozen, images, and what the unfrozen model makes of them."""

from __future__ import annotations

import torch

import fastvit
from fastvit import VisionTransformer, ViTConfig
from fastvit.verify import randomise

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
VARIANTS = {
    "plain": {},
    "average": {"global_pool": "avg"},
    "average of normed": {"global_pool": "avg", "fc_norm": False},
    "maximum": {"global_pool": "max", "fc_norm": False},
    "both": {"global_pool": "avgmax", "class_token": False},
    "no pool": {"global_pool": ""},
    "layer scale": {"init_values": 0.1},
    "registers": {"reg_tokens": 2, "no_embed_class": True},
    "no qkv bias": {"qkv_bias": False},
    "distilled": {"distilled": True},
    "swiglu": {"mlp": "swiglu", "activation": "silu"},
    "quick gelu": {"activation": "quick_gelu"},
    "tanh gelu": {"activation": "gelu_tanh"},
    "silu": {"activation": "silu"},
    "headless": {"num_classes": 0},
    "no final norm": {"final_norm": False},
    "any size": {"dynamic_img_size": True},
    "padded": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "one channel": {"in_chans": 1},
    "not square": {"img_size": (32, 48), "patch_size": (8, 4)},
    "norm before the blocks": {"pre_norm": True, "norm_eps": 1e-5},
    "attention pool": {"global_pool": "map", "class_token": False},
    "attention pool beside a class token": {"global_pool": "map", "num_classes": 0},
    "rotary": {"rope_temperature": 100.0, "reg_tokens": 2, "dynamic_img_size": True, "qkv_bias": False},
    "blocks of one head of 12": {"embed_dim": 12, "num_heads": 1},
}
EXACT = 2e-6  # float32 outputs of 3 small blocks, relative rms


def model_of(name: str = "plain", **changes) -> VisionTransformer:
    model = VisionTransformer(ViTConfig(**{**SMALL, **VARIANTS[name], **changes})).eval()
    randomise(model, 0)
    return model


def images_of(model, batch: int = 3, size: tuple[int, int] | None = None) -> dict[str, torch.Tensor]:
    """Normalised images, and pixels."""
    shape = (batch, model.config.in_chans, *(size or model.config.img_size))
    return {"float": torch.randn(shape), "uint8": torch.randint(256, shape, dtype=torch.uint8)}


@torch.inference_mode()
def outputs_of(model, images) -> dict[str, torch.Tensor]:
    with fastvit.use_backend("torch"):
        tokens = model.forward_features(images)
        return {
            "logits": model(images),
            "features": model.forward_head(tokens, pre_logits=True),
            "tokens": tokens,
        }

"""The truth: every op and the whole Vision Transformer in plain PyTorch. Imports nothing of the rest of fastvit."""

from .ops import (
    attention,
    attention_varlen,
    layer_norm,
    layer_norm_linear,
    layer_norm_mlp,
    linear_residual,
    patch_embed,
    transformer_block,
)
from .vit import vision_transformer

__all__ = [
    "attention",
    "attention_varlen",
    "layer_norm",
    "layer_norm_linear",
    "layer_norm_mlp",
    "linear_residual",
    "patch_embed",
    "transformer_block",
    "vision_transformer",
]

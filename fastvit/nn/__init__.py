"""Drop-in modules for Vision Transformers, with timm's parameter names, shapes, initialisation and signatures.

The modules hold parameters and decide what is fused; the work is done by `fastvit.ops`.
"""

from .attention import Attention
from .attention_pool import AttentionPoolLatent
from .block import Block
from .layers import DropPath, LayerScale, QuickGELU
from .mlp import LayerNormMLP, Mlp, SwiGLU
from .patch_embed import PatchEmbed

__all__ = [
    "Attention",
    "AttentionPoolLatent",
    "Block",
    "DropPath",
    "LayerNormMLP",
    "LayerScale",
    "Mlp",
    "PatchEmbed",
    "QuickGELU",
    "SwiGLU",
]

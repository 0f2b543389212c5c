"""Models of timm, torchvision and transformers on fastvit's kernels, as they are: `accelerate` and `restore`."""

from .accelerate import Entry, Summary, accelerate, restore
from .attention_interface import register_attention

__all__ = ["Entry", "Summary", "accelerate", "register_attention", "restore"]

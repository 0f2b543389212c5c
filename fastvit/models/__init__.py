"""Whole models: their configuration, the table of known ones, the module itself and its weights."""

from .config import ViTConfig
from .registry import create_model, list_models
from .vision_transformer import VisionTransformer
from .weights import load_checkpoint

__all__ = ["ViTConfig", "VisionTransformer", "create_model", "list_models", "load_checkpoint"]

"""Whole models: their configuration, the table of known ones, the module itself and its weights."""

from .config import ViTConfig
from .loading import load_checkpoint
from .registry import create_model, list_models
from .vision_transformer import VisionTransformer

__all__ = ["ViTConfig", "VisionTransformer", "create_model", "list_models", "load_checkpoint"]

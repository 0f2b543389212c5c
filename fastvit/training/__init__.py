"""Training a ViT, as `fastvit train` does it: recipes, data, the loop. Every name is imported on first use."""

from __future__ import annotations

import importlib

_PUBLIC = {"RECIPES": "recipes", "Recipe": "recipes", "find": "data", "NotFinite": "loop", "Settings": "loop"}
_PUBLIC |= {"Trainer": "loop", "processes": "loop"}

__all__ = [*_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"fastvit.training.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'fastvit.training' has no attribute {name!r}")

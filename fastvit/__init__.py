"""fastvit: custom Triton kernels for Vision Transformers.

Importing this package touches no device, imports neither Triton nor any model library and changes no global
state; every public name is imported on first use.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "create_model": "fastvit.models",
    "list_models": "fastvit.models",
    "load_checkpoint": "fastvit.models",
    "ViTConfig": "fastvit.models",
    "VisionTransformer": "fastvit.models",
    "use_backend": "fastvit.dispatch",
    "explain": "fastvit.ops",
    "attention_maps": "fastvit.maps",
    "accelerate": "fastvit.dropin",
    "restore": "fastvit.dropin",
    "parity_report": "fastvit.parity",
    "freeze": "fastvit.frozen",
    "load_frozen": "fastvit.frozen",
}
_SUBMODULES = ("kernels", "models", "nn", "ops", "reference")

__all__ = ["__version__", *_PUBLIC, *_SUBMODULES]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"fastvit.{name}")
    raise AttributeError(f"module 'fastvit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

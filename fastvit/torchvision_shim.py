"""A torchvision built for CUDA, importable beside a torch built without."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

import torch

_OPERATORS = ("nms", "qnms")
_library: torch.library.Library | None = None  # the operators live as long as it does


def install() -> None:
    """Make `import torchvision` work, and of timm and transformers, which import it; call before any of them.

    Beside a torch for the CPU, a torchvision for CUDA cannot load its native library, and its Python modules then fail
    for want of two detection operators that nothing here uses: declaring them is enough, those of them that nobody else
    has declared. Does nothing elsewhere, and nothing on a second call.
    """
    global _library
    spec = importlib.util.find_spec("torchvision")
    if spec is None or torch.version.cuda or torch.version.hip or not _missing():
        return
    with contextlib.suppress(OSError):
        for native in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(native))
    if missing := _missing():
        _library = torch.library.Library("torchvision", "FRAGMENT")  # "DEF" is for one library of a process
        for name in missing:
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _missing() -> list[str]:
    return [name for name in _OPERATORS if not hasattr(torch.ops.torchvision, name)]

"""A torchvision built for CUDA, importable beside a torch built without."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_library: torch.library.Library | None = None  # the operators live as long as it does


def install() -> None:
    """Make `import torchvision` work, and of timm and transformers, which import it; call before any of them.

    Beside a torch for the CPU, a torchvision for CUDA cannot load its native library, and its Python modules then fail
    for want of two detection operators that nothing here uses: declaring them is enough. Does nothing elsewhere, and
    nothing on a second call.
    """
    global _library
    spec = importlib.util.find_spec("torchvision")
    if _library is not None or spec is None or torch.version.cuda or torch.version.hip:
        return
    try:
        for native in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(native))
    except OSError:
        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

"""What fastvit is compared with: the same network, by name, with the same weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

import fastvit
from fastvit.verify import reference_options


def _reference(model: torch.nn.Module, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    state, options = model.state_dict(), reference_options(model.config)
    return lambda images: fastvit.reference.vision_transformer(images, state, **options)


def _timm(model: torch.nn.Module, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    weights, config = next(model.parameters()), model.config
    peer = _import_timm().create_model(name, num_classes=config.num_classes, img_size=config.img_size).eval()
    peer.load_state_dict(model.state_dict())
    return peer.to(weights.device, weights.dtype)


def _import_timm():
    """timm, also where torchvision was built for CUDA and torch for the CPU.

    timm imports torchvision, which then stops at a detection operator that nothing here uses: declaring it is enough.
    """
    try:
        import timm
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _import_timm.library = library  # its declarations live as long as it does
        import timm
    return timm


# Each takes our model (on its device, in its dtype, evaluation mode) and its name; gives images -> logits.
PEERS: dict[str, Callable] = {"timm": _timm, "reference": _reference}

"""The calls of ops that a model makes: what is worth tuning."""

from __future__ import annotations

import torch

from . import dispatch
from .models.config import ViTConfig
from .models.vision_transformer import VisionTransformer
from .tune import Call

MODES = ("inference", "training")


def calls_of(config: ViTConfig, batch: int, dtype: torch.dtype, mode: str) -> list[Call]:
    """Every distinct call of an op that a model of `config` makes in a forward pass, found by running it without
    memory. mode: "inference" or "training". Raises ValueError for another mode."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
    with torch.device("meta"):
        model = VisionTransformer(config).to(dtype).train(mode == "training")
        images = torch.empty(batch, config.in_chans, *_pair(config.img_size), dtype=dtype)
    found: dict[str, Call] = {}
    with (
        dispatch.watching(lambda op, args: found.setdefault(op.key(args), Call.like(op, args))),
        dispatch.use_backend("torch"),
        torch.set_grad_enabled(mode == "training"),
    ):
        model(images)
    return list(found.values())


def _pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)

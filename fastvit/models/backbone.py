"""The model as a backbone: the maps of chosen blocks, and what a detection or segmentation head reads about them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class FeatureInfo(list):
    """Facts of every block of a backbone, a dict each, and of those in `out_indices`: timm's `FeatureInfo`."""

    def __init__(self, info: Sequence[dict], out_indices: Sequence[int]):
        super().__init__(info)
        for index, facts in enumerate(self):
            facts.setdefault("index", index)
        self.out_indices = tuple(out_indices)

    @property
    def info(self) -> list[dict]:
        """The dicts, under timm's name."""
        return self

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> object:
        """`key` of the block numbered idx, or a list: of the blocks in idx, or for None of those in out_indices."""
        if isinstance(idx, int):
            return self[idx][key]
        return [self[index][key] for index in (self.out_indices if idx is None else idx)]

    def get_dicts(self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None) -> dict | list[dict]:
        """As `get`, with a dict of `keys`, or of all of them for None, for each block."""
        if isinstance(idx, int):
            return self[idx] if keys is None else {key: self[idx][key] for key in keys}
        return [self.get_dicts(keys, index) for index in (self.out_indices if idx is None else idx)]

    def channels(self, idx: int | Sequence[int] | None = None) -> int | list[int]:
        """Channels of the maps; idx as `get` has it."""
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> int | list[int]:
        """Pixels of the image per pixel of the maps; idx as `get` has it."""
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> str | list[str]:
        """Names of the modules that give the maps; idx as `get` has it."""
        return self.get("module", idx)


class FeatureGetterNet(nn.Module):
    """A VisionTransformer as a backbone, like timm's class of that name: images to maps (B, D, rows, columns).

    The maps are the outputs of the blocks `out_indices`, the last n for an int, negative numbers from the end, in the
    order of the blocks and without the final norm. The model itself is cut behind the last of them and loses its norm
    and head. `feature_info` says what the maps are.
    """

    def __init__(self, model: nn.Module, out_indices: int | Sequence[int] = 3):
        super().__init__()
        self.out_indices = sorted(set(model.prune_intermediate_layers(out_indices, prune_norm=True)))
        self.feature_info = FeatureInfo(model.feature_info, self.out_indices)
        self.in_chans = model.in_chans
        left_out = ("num_classes", "classifier")
        self.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in left_out}
        self.default_cfg = self.pretrained_cfg
        self.model = model

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x (B, C, H, W) -> one map (B, D, rows, columns) for each of out_indices."""
        return self.model.forward_intermediates(x, self.out_indices, intermediates_only=True)

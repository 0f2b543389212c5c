"""What can be measured, made from the model registry: whole models, and single ops at the shapes that models give them.

A `Case` is one combination of model, image size, dtype, batch and mode; with `op` set, that op at the shapes that it
has in the model's blocks. All facts about a model come from the registry.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import torch

from fastvit.models.config import ViTConfig
from fastvit.models.registry import model_entry
from fastvit.verify import SHORT

MODES = ("inference", "training")
OPS = (
    *("patch_embed", "attention", "layer_norm", "layer_norm_linear", "linear_residual", "layer_norm_mlp"),
    "transformer_block",
)


@dataclass(frozen=True)
class Case:
    """One thing to measure. img_size: pixels, None for the model's own; mode: "inference" (forward) or "training"
    (forward and backward, without the optimiser); op: one of OPS, or "" for the whole model.

    Raises ValueError for an unknown model, op, mode or size.
    """

    model: str
    dtype: torch.dtype
    batch: int
    mode: str = "inference"
    op: str = ""
    img_size: int | None = None

    def __post_init__(self):
        self.config  # noqa: B018 - raises for what is not there
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}, expected one of {', '.join(MODES)}")
        if self.op and self.op not in OPS:
            raise ValueError(f"unknown op {self.op!r}, expected one of {', '.join(OPS)}")
        if self.dtype not in SHORT:
            raise ValueError(f"dtype is {self.dtype}, expected one of {', '.join(map(str, SHORT))}")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}, expected at least 1")

    @cached_property
    def config(self) -> ViTConfig:
        config = model_entry(self.model).config
        return config if self.img_size is None else replace(config, img_size=self.img_size)

    @property
    def tokens(self) -> int:
        rows, columns = self.config.grid_size
        return rows * columns + self.config.num_prefix_tokens

    @property
    def id(self) -> str:
        """A unique name, by which results are matched."""
        size = "" if self.img_size is None else f"@{self.img_size}"
        parts = [f"{self.model}{size}", SHORT[self.dtype], f"b{self.batch}", self.mode]
        return "/".join([*parts, self.op] if self.op else parts)


def combine(
    models: Iterable[str],
    dtypes: Iterable[torch.dtype],
    batches: Iterable[int],
    modes: Iterable[str] = ("inference",),
    ops: Iterable[str] = ("",),
    img_sizes: Iterable[int | None] = (None,),
) -> Iterator[Case]:
    """Every combination, cases of one model and dtype side by side."""
    for model, img_size, dtype, mode, op, batch in product(models, img_sizes, dtypes, modes, ops, batches):
        yield Case(model, dtype, batch, mode, op, img_size)

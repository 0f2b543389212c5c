"""fastvit's model as the runtimes that take a graph are given it."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator

import torch

import fastvit


@contextlib.contextmanager
def exportable(case, ours: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple[torch.nn.Module, torch.Tensor]]:
    """A copy of `ours` on the CPU and in `dtype`, with images of the case's batch; in the body it exports as PyTorch's
    own operators, and without the exporters' many warnings."""
    model = copy.deepcopy(ours).cpu().to(dtype).eval()
    images = torch.zeros(case.batch, ours.config.in_chans, *ours.config.img_size, dtype=dtype)
    with fastvit.use_backend("torch"), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield model, images

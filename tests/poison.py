"""Memory that nothing wrote reads as NaN."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch.utils._device import _device_constructors


@contextlib.contextmanager
def poison_empty():
    """Inside the `with` body, fill what `torch.empty` and its kin return with NaN, or the largest integer.

    A kernel that reads memory that nothing wrote then shows it in its result.
    """

    def poisoned(make):
        @functools.wraps(make)
        def wrapper(*args, **kwargs):
            tensor = make(*args, **kwargs)
            with torch.no_grad():
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
                elif tensor.dtype != torch.bool and not tensor.is_complex():
                    tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return wrapper

    # `with torch.device("meta")` knows what makes tensors by a list that is made once: of the originals, not of ours,
    # or every tensor on "meta" would be real, and filled.
    _device_constructors()
    places = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]
    originals = [(owner, name, getattr(owner, name)) for owner, name in places]
    for owner, name, original in originals:
        setattr(owner, name, poisoned(original))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)

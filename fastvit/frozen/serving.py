"""What keeps a model, ours or another library's, from being served as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fastvit.nn.layers import dropout_active, forward_is_its_classes

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Whose hooks transformers leaves behind once it was asked for hidden states: they change nothing.
_RECORDERS = "transformers.utils.output_capturing"


def check_serves(model: nn.Module) -> None:
    """Raise ValueError, naming the module, for a model in training mode, with hooks, with active dropout, or with a
    `forward` that is not its class's: what nobody would call any more."""
    if model.training:
        raise ValueError("model is in training mode, expected model.eval()")
    for name, module in model.named_modules():
        where = f"model.{name}" if name else "model"
        hooks = [hook for kind in _HOOKS for hook in getattr(module, kind).values()]
        if any(getattr(hook, "__module__", None) != _RECORDERS for hook in hooks):
            raise ValueError(f"{where} has hooks, which a frozen model would not call; remove them first")
        if not forward_is_its_classes(module):
            raise ValueError(f"{where} has a forward of its own, which a frozen model would not call")
        if isinstance(module, nn.modules.dropout._DropoutNd) and dropout_active(module):
            raise ValueError(f"{where} is active dropout, expected model.eval()")


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """In the body nothing is recorded, and the caller's autocast does not reach in."""
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        yield

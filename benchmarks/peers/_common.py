"""What the adapters share: copies of weights, compilation, arguments of ops that others do not have."""

from __future__ import annotations

import types
from collections.abc import Callable

import torch


def copy_into(ours: torch.nn.Module, make: Callable[[], torch.nn.Module], state: dict, dtype=None) -> torch.nn.Module:
    """`make()` with a copy of the weights in `state`, on the device and in the mode and dtype (or `dtype`) of `ours`.

    Raises RuntimeError, listing them, for tensors that do not fit.
    """
    weights = next(ours.parameters())
    with weights.device:  # a large model is initialised where that is quick
        peer = make()
    peer.load_state_dict(state)
    return peer.to(weights.device, dtype or weights.dtype).train(ours.training)


def compiled(function: Callable, mode: str | None = None, options: dict | None = None) -> Callable:
    """`function` under torch.compile for the shapes it is called with, whole or not at all.

    Dynamo keeps what it compiled by the code that it was called with: a code of its own a call of this keeps the many
    cases of a run from reaching its limit of recompilations, after which it would silently run eagerly.
    """

    def call(*args, **kwargs):
        return function(*args, **kwargs)

    own = types.FunctionType(call.__code__.replace(), call.__globals__, "call", closure=call.__closure__)
    return torch.compile(own, mode=mode, options=options, dynamic=False, fullgraph=True)


def check_known(peer: str, inputs: dict, *known: str) -> None:
    """Raise ValueError for arguments of an op, other than None, that the peer has not."""
    unknown = [name for name, value in inputs.items() if value is not None and name not in known]
    if unknown:
        raise ValueError(f"{peer}: has no {', '.join(unknown)}")


def add_residual(branch: torch.Tensor, residual=None, layer_scale=None) -> torch.Tensor:
    """residual + layer_scale * branch, of those that are there, for a peer that ends before."""
    if layer_scale is not None:
        branch = branch * layer_scale
    return branch if residual is None else residual + branch

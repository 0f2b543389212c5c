"""When a result is accurate: its error against the truth is at most so many times plain PyTorch's in the same dtype.

The truth is the same formula in float64 on inputs already rounded to that dtype (`fastvit.reference`, or a peer's own
model). Errors are relative rms errors over whole tensors: the output, and the gradient of every input and parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

# How many times plain PyTorch's own error ours may be, by the dtype computed in; the order is that of verifying.
FACTOR = {torch.bfloat16: 1.5, torch.float32: 2.0, torch.float16: 1.5}


def precise(arguments: Mapping) -> dict:
    """The arguments of a call with the same values in float64, each tensor once: a residual that is x stays x."""
    memo = {}

    def double(value):
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            return value
        if id(value) not in memo:
            memo[id(value)] = value.detach().double().requires_grad_(value.requires_grad)
        return memo[id(value)]

    return {name: double(value) for name, value in arguments.items()}


def results(out: torch.Tensor, arguments: Mapping, upstream: Callable[[torch.Size], torch.Tensor]) -> dict:
    """What is compared of a call: "out", and "d <name>" of each argument that requires a gradient (of a tensor that
    comes twice once), where upstream(its shape) is the gradient of the output."""
    wanted = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            wanted.setdefault(id(value), (f"d {name}", value))
    found = {"out": out.detach().clone()}  # the next call may overwrite it
    if wanted:
        names, leaves = zip(*wanted.values(), strict=True)
        found |= zip(names, torch.autograd.grad(out, leaves, upstream(out.shape).to(out.dtype)), strict=True)
    return found


def relative_rms(got: torch.Tensor, truth: torch.Tensor) -> float:
    """||got - truth|| / ||truth|| in float64; the plain rms of `got` where the truth is zero throughout."""
    got, truth = got.detach().double(), truth.detach().double()
    norm = torch.linalg.vector_norm(truth)
    if norm == 0:
        return torch.linalg.vector_norm(got).item() / math.sqrt(max(1, got.numel()))
    return (torch.linalg.vector_norm(got - truth) / norm).item()


def rounding(dtype: torch.dtype) -> float:
    """The most that one correct rounding to `dtype` costs: eps / sqrt(12) rms, uniform in half a unit in the last
    place. No kernel that stores that dtype does better, and the ratio of two such errors is luck."""
    return torch.finfo(dtype).eps / math.sqrt(12)


def floor(dtype: torch.dtype) -> float:
    """The error below which a tensor stored in `dtype` is never called wrong, whatever plain PyTorch's is: that of one
    rounding. In float32 the sums themselves round too, in an order that is the kernel's own: one eps."""
    return torch.finfo(dtype).eps if dtype in (torch.float32, torch.float64) else rounding(dtype)


def limit(dtype: torch.dtype, plain_error: float, least: float | None = None) -> float:
    """The most that an error in `dtype` may be where plain PyTorch's is `plain_error`; never less than `least`, the
    floor of `dtype` if not said. NaN, which no error is within, where plain PyTorch's is NaN."""
    return max(FACTOR[dtype] * plain_error, floor(dtype) if least is None else least)


def excess(error: float, limit: float) -> float:
    """How many times its limit an error is: infinite where it is not finite."""
    return error / limit if math.isfinite(error) else math.inf

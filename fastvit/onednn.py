"""oneDNN's linear layers on a CPU. PyTorch has them, but multiplies float32 by MKL wherever it does not compile, which
is slower on AMD. They are PyTorch's own operators, and may change with it: `available` tries them before they are used.
"""

from __future__ import annotations

import functools
import time

import torch
import torch.nn.functional as F

# What can be fused into a product: oneDNN's name and algorithm of each activation.
ACTIVATIONS = {None: ("none", None), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", None)}
GAIN = 1.05  # by which it must be faster than PyTorch's own to take its place


@functools.cache
def available(dtype: torch.dtype) -> bool:
    """Whether these layers are there for a dtype, and compute what PyTorch's do."""
    with torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.inference_mode():
        x, weight, bias = torch.ones(3, 8, dtype=dtype), torch.eye(16, 8, dtype=dtype), torch.ones(16, dtype=dtype)
        want, other = F.linear(x, weight, bias), torch.ones(3, 16, dtype=dtype)
        try:
            found = linear(x, pack(weight), bias, "gelu"), linear(x, weight, bias, residual=other)
        except (RuntimeError, AttributeError, TypeError):
            return False
        return all(torch.allclose(a, b, atol=1e-2) for a, b in zip(found, (F.gelu(want), want + other), strict=True))


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A weight (O, K) as oneDNN reads it fastest, for `linear` and nothing else; `to_dense` gives it back."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def linear(x, weight, bias=None, activation=None, residual=None) -> torch.Tensor:
    """x W^T + bias, then the activation, a key of ACTIVATIONS, or the residual, in one pass. x (..., K), weight (O, K)
    as it is or packed, bias (O,), residual (..., O), all of one dtype."""
    if residual is None or activation is not None:
        name, algorithm = ACTIVATIONS[activation]
        y = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, name, [], algorithm)
        return y if residual is None else residual + y
    return torch.ops.mkldnn._linear_pointwise.binary(x.contiguous(), residual.contiguous(), weight, bias, "add")


@functools.cache
def speedup() -> float:
    """How many times as fast as PyTorch's own it multiplies float32 here, weights as they are; 0 where it is not
    available. Measured once, in a tenth of a second."""
    if not available(torch.float32):
        return 0.0
    best = {F.linear: float("inf"), linear: float("inf")}
    with torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.inference_mode():
        x, weight = torch.ones(256, 768), torch.ones(1536, 768)
        for _ in range(9):
            for run in best:
                start = time.perf_counter()
                run(x, weight)
                best[run] = min(best[run], time.perf_counter() - start)
    return best[F.linear] / best[linear]

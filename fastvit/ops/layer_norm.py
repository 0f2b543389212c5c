"""LayerNorm as an op; see `fastvit.reference.layer_norm` for the formula and `fastvit.kernels.layer_norm`."""

from __future__ import annotations

from functools import partial

import torch

from fastvit import dispatch, reference
from fastvit.dispatch import Op

from . import _common
from ._common import Operator, dense, launchers, or_none, rows, shaped, statistics_dtype

MAX_COLUMNS = 8192  # the kernels hold whole rows in registers


def _fake_forward(x, weight, bias, eps):
    statistics = x.new_empty(x.shape[0], dtype=statistics_dtype(x))
    return x.new_empty(x.shape), statistics, torch.empty_like(statistics)


def _backward(dy, x, mean, rstd, weight, bias):
    kernels = launchers("layer_norm")
    return _common.gradients(kernels.layer_norm_backward(dy, x, mean, rstd, weight, bias), (x, weight, bias))


def _fake_backward(dy, x, mean, rstd, weight, bias):
    return _common.fake_gradients(dy, (x, weight, bias), (True, True, True))


FORWARD = Operator(
    "layer_norm",
    "layer_norm_forward(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    _fake_forward,
)
BACKWARD = Operator(
    "layer_norm",
    "layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    _backward,
)


class LayerNormFunction(torch.autograd.Function):
    """layer_norm on the kernels: (x (..., D), weight (D,), bias (D,), eps) -> (..., D)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, mean, rstd = FORWARD.of(x, weight, bias)(rows(x), weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.eps = eps
        return shaped(y, *x.shape)

    @staticmethod
    def backward(ctx, dy):
        x, mean, rstd, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if _common.differentiating_again(dy):
            norm = partial(reference.layer_norm, eps=ctx.eps)
            return *_common.again_differentiable(norm, (x, weight, bias), needs, dy), None
        dx, dweight, dbias = BACKWARD.of(dy, x, weight, bias)(rows(dy), rows(x), mean, rstd, weight, bias)
        return *or_none((dx.view(dy.shape), dweight, dbias), needs), None


def check_norm(op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> None:
    """Raise ValueError unless x, norm weight and norm bias fit together, and eps is one; TypeError for no number."""
    _common.check_number(op, "eps", eps, positive=True)
    if x.dim() < 2:
        raise ValueError(f"{op}: x must have at least 2 dimensions, (..., D), got shape {tuple(x.shape)}")
    _common.check_shape(op, "norm weight", weight, x.shape[-1:], "(D,)")
    _common.check_shape(op, "norm bias", bias, x.shape[-1:], "(D,)")


def unsupported_norm(x: torch.Tensor) -> list[str]:
    """Why the kernels cannot normalise rows of x."""
    reasons = []
    if x.shape[-1] > MAX_COLUMNS:
        reasons.append(f"rows of {x.shape[-1]} elements, and the kernels hold at most {MAX_COLUMNS}")
    if x.shape[-1] == 0:
        reasons.append("rows of no elements")
    return reasons


def _check(x, weight, bias, eps):
    _common.check_tensors("layer_norm", x=x, weight=weight, bias=bias)
    check_norm("layer_norm", x, weight, bias, eps)


def _unsupported(x, weight, bias, eps):
    return [
        *dispatch.missing_requirements(x),
        *_common.unsupported_dtypes(x.dtype, weight.dtype, bias.dtype),
        *unsupported_norm(x),
    ]


def _as_autocast(x):
    """torch's table for CUDA: norms run in float32 and return it."""
    return x.float() if dispatch.autocasting(x) and dispatch.autocast_device(x) == "cuda" else x


def _torch(x, weight, bias, eps):
    return reference.layer_norm(_as_autocast(x), weight, bias, eps)


def _prepare(x, weight, bias, eps):
    return _as_autocast(x), dense(weight), dense(bias), float(eps)


OP = Op("layer_norm", _check, _unsupported, _torch, LayerNormFunction, _prepare)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """LayerNorm over the last axis (arXiv 1607.06450): (x - mean) / sqrt(var + eps) * weight + bias.

    x (..., D) of any strides, weight and bias (D,), floating-point; statistics in float32. Returns (..., D) in x's
    dtype (float32 under CUDA autocast, as torch's own). On the kernels a constant row gives exactly the bias. The
    variance has to be a float32 number: where |x| reaches about 1e18 its squares overflow, and such a row comes out as
    the bias or as NaN, as torch's own does, which of them being up to the back end. Raises TypeError for a dtype or an
    eps that is no number, ValueError for a shape, device or eps that does not fit, before any launch.
    """
    run, args = dispatch.choose(OP, (x, weight, bias, eps))
    return run(*args)

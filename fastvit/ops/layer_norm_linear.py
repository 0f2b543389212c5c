"""linear(layer_norm(x)) as one op; see `fastvit.reference.layer_norm_linear` and
`fastvit.kernels.layer_norm_linear`."""

from __future__ import annotations

from functools import partial

import torch

from fastvit import dispatch, onednn, reference
from fastvit.dispatch import Op

from . import _common
from ._common import Operator, dense, launchers, or_none, rows, shaped, statistics_dtype
from .layer_norm import check_norm, unsupported_norm


def _fake_forward(x, norm_weight, norm_bias, weight, bias, eps):
    statistics = x.new_empty(x.shape[0], dtype=statistics_dtype(x))
    return weight.new_empty(x.shape[0], weight.shape[0]), statistics, torch.empty_like(statistics)


def _backward(dy, x, mean, rstd, norm_weight, norm_bias, weight, bias, needs):
    launch = launchers("layer_norm_linear").layer_norm_linear_backward
    grads = launch(dy, x, mean, rstd, norm_weight, norm_bias, weight, needs)
    return _common.gradients(grads, (x, norm_weight, norm_bias, weight, bias))


def _fake_backward(dy, x, mean, rstd, norm_weight, norm_bias, weight, bias, needs):
    return _common.fake_gradients(dy, (x, norm_weight, norm_bias, weight, bias), (needs[0], needs[0], *needs))


FORWARD = Operator(
    "layer_norm_linear",
    "layer_norm_linear_forward(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_forward,
)
BACKWARD = Operator(
    "layer_norm_linear",
    "layer_norm_linear_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor norm_weight, Tensor norm_bias,"
    " Tensor weight, Tensor? bias, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    _backward,
)


class LayerNormLinearFunction(torch.autograd.Function):
    """layer_norm_linear on the kernels: (x (..., D), norm_weight, norm_bias, weight (O, D), bias, eps) ->
    (..., O)."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight, bias, eps):
        y, mean, rstd = FORWARD.of(x, norm_weight, norm_bias, weight, bias)(
            rows(x), norm_weight, norm_bias, weight, bias, eps
        )
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, weight, bias)
        ctx.eps = eps
        return shaped(y, *x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, dy):
        x, mean, rstd, *parameters = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        if _common.differentiating_again(dy):
            function = partial(reference.layer_norm_linear, eps=ctx.eps)
            return *_common.again_differentiable(function, (x, *parameters), needs, dy), None
        needed = [any(needs[:3]), *needs[3:]]
        dx, *grads = BACKWARD.of(dy, x, *parameters)(rows(dy), rows(x), mean, rstd, *parameters, needed)
        dx = dx.view(x.shape) if needs[0] else dx
        return *or_none((dx, *grads), needs), None


def _check(x, norm_weight, norm_bias, weight, bias, eps):
    name = "layer_norm_linear"
    _common.check_tensors(name, ("bias",), x=x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias)
    check_norm(name, x, norm_weight, norm_bias, eps)
    _common.check_matrix(name, "weight", weight, "(O, D)", inputs=x.shape[-1])
    _common.check_shape(name, "bias", bias, weight.shape[:1], "(O,)")
    _common.check_operands(name, x, weight=weight, bias=bias)


def _unsupported(x, norm_weight, norm_bias, weight, bias, eps):
    return [
        *dispatch.missing_requirements(x),
        *_common.unsupported_dtypes(x.dtype, norm_weight.dtype, norm_bias.dtype, _common.compute_dtype(x, weight)),
        *unsupported_norm(x),
    ]


def _torch(x, norm_weight, norm_bias, weight, bias, eps):
    return reference.layer_norm_linear(x, norm_weight, norm_bias, weight, bias, eps=eps)


def _onednn(x, norm_weight, norm_bias, weight, bias, eps):
    return onednn.linear(reference.layer_norm(x, norm_weight, norm_bias, eps), weight, bias)


def _prepare(x, norm_weight, norm_bias, weight, bias, eps):
    weight, bias = _common.cast(x, weight, bias)
    return x, dense(norm_weight), dense(norm_bias), dense(weight), dense(bias), float(eps)


def _product(x, norm_weight, norm_bias, weight, bias, eps):
    return _common.compute_dtype(x, weight)


OP = Op("layer_norm_linear", _check, _unsupported, _torch, LayerNormLinearFunction, _prepare, _product, onednn=_onednn)


def layer_norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> torch.Tensor:
    """linear(layer_norm(x)) without a normalised tensor in memory.

    x (..., D) of any strides, in weight's dtype or wider (a float32 residual stream beside bfloat16 weights);
    norm_weight and norm_bias (D,); weight (O, D); bias (O,) or None. Returns (..., O) in weight's dtype, or in
    autocast's when it is on. Statistics and sums in float32; the normalised values are rounded once, to weight's
    dtype. Raises TypeError for a dtype, ValueError for a shape or device that does not fit, before any launch.
    """
    run, args = dispatch.choose(OP, (x, norm_weight, norm_bias, weight, bias, eps))
    return run(*args)

"""residual + drop_path_scale * layer_scale * linear(x) as one op; see `fastvit.reference.linear_residual` and
`fastvit.kernels.linear_residual`."""

from __future__ import annotations

import torch

from fastvit import dispatch, onednn, reference
from fastvit.dispatch import Op

from . import _common
from ._common import Operator, dense, launchers, or_none, rows, shaped


def sum_dtype(residual: torch.Tensor | None, weight: torch.Tensor) -> torch.dtype:
    """The dtype of residual + branch, the branch in weight's dtype."""
    return weight.dtype if residual is None else torch.promote_types(residual.dtype, weight.dtype)


def _fake_forward(x, weight, bias, residual, layer_scale, drop_path_scale, out_dtype):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype)


def _backward(dout, x, weight, bias, layer_scale, drop_path_scale, needs):
    launch = launchers("linear_residual").linear_residual_backward
    grads = launch(dout, x, weight, bias, layer_scale, drop_path_scale, needs)
    return _common.gradients(grads, (x, weight, bias, layer_scale))


def _fake_backward(dout, x, weight, bias, layer_scale, drop_path_scale, needs):
    return _common.fake_gradients(dout, (x, weight, bias, layer_scale), needs)


FORWARD = Operator(
    "linear_residual",
    "linear_residual_forward(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? layer_scale,"
    " Tensor? drop_path_scale, ScalarType out_dtype) -> Tensor",
    _fake_forward,
)
BACKWARD = Operator(
    "linear_residual",
    "linear_residual_backward(Tensor dout, Tensor x, Tensor weight, Tensor? bias, Tensor? layer_scale,"
    " Tensor? drop_path_scale, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    _backward,
)


class LinearResidualFunction(torch.autograd.Function):
    """linear_residual on the kernels: (x (..., K), weight (O, K), bias, residual (..., O), layer_scale (O,),
    drop_path_scale (B,)) -> (..., O)."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, layer_scale, drop_path_scale):
        scales, out_dtype = (layer_scale, drop_path_scale), sum_dtype(residual, weight)
        launch = FORWARD.of(x, weight, bias, residual, *scales)
        out = launch(rows(x), weight, bias, rows(residual), *scales, out_dtype)
        ctx.save_for_backward(x, weight, bias, layer_scale, drop_path_scale)
        ctx.residual_dtype = residual.dtype
        return shaped(out, *residual.shape)

    @staticmethod
    def backward(ctx, dout):
        x, *saved = ctx.saved_tensors
        weight, bias, layer_scale, drop_path_scale = saved
        needs_x, needs_weight, needs_bias, needs_residual, needs_layer_scale, *_ = ctx.needs_input_grad
        needs = (needs_x, needs_weight, needs_bias, needs_layer_scale)
        if _common.differentiating_again(dout):

            def branch(x, weight, bias, layer_scale):
                scales = {"layer_scale": layer_scale, "drop_path_scale": drop_path_scale}
                return reference.linear_residual(x, weight, bias, weight.new_zeros(()), **scales)

            grads = _common.again_differentiable(branch, (x, weight, bias, layer_scale), needs, dout)
        else:
            grads = BACKWARD.of(dout, x, *saved)(rows(dout), rows(x), *saved, needs)
            grads = or_none(grads, needs)
        dx, dweight, dbias, dlayer_scale = grads
        dx = dx.view(x.shape) if needs_x else None
        dresidual = dout.to(ctx.residual_dtype) if needs_residual else None
        return dx, dweight, dbias, dresidual, dlayer_scale, None


def _check(x, weight, bias, residual, layer_scale, drop_path_scale):
    name = "linear_residual"
    _common.check_tensors(
        name,
        ("bias", "layer_scale", "drop_path_scale"),
        x=x,
        weight=weight,
        bias=bias,
        residual=residual,
        layer_scale=layer_scale,
        drop_path_scale=drop_path_scale,
    )
    if x.dim() < 2:
        raise ValueError(f"{name}: x must have at least 2 dimensions, (B, ..., K), got shape {tuple(x.shape)}")
    _common.check_matrix(name, "weight", weight, "(O, K)", inputs=x.shape[-1])
    outputs = weight.shape[0]
    _common.check_shape(name, "bias", bias, (outputs,), "(O,)")
    _common.check_shape(name, "residual", residual, (*x.shape[:-1], outputs), "(B, ..., O)")
    _common.check_scales(name, x, outputs, layer_scale, drop_path_scale)
    _common.check_operands(name, x, weight=weight, bias=bias)


def _unsupported(x, weight, bias, residual, layer_scale, drop_path_scale):
    return [
        *dispatch.missing_requirements(x),
        *_common.unsupported_dtypes(x.dtype, residual.dtype, _common.compute_dtype(x, weight)),
    ]


def _torch(x, weight, bias, residual, layer_scale, drop_path_scale):
    return reference.linear_residual(
        x, weight, bias, residual, layer_scale=layer_scale, drop_path_scale=drop_path_scale
    )


def by_onednn(x, weight, bias, residual, layer_scale, drop_path_scale):
    """The op by oneDNN, with a residual or without one."""
    if layer_scale is None and drop_path_scale is None and residual is not None:
        return onednn.linear(x, weight, bias, residual=residual)
    branch = onednn.linear(x, weight, bias)
    return reference.ops.add_branch(
        branch, branch.new_zeros(()) if residual is None else residual, layer_scale, drop_path_scale
    )


def _prepare(x, weight, bias, residual, layer_scale, drop_path_scale):
    weight, bias = _common.cast(x, weight, bias)
    return x, dense(weight), dense(bias), residual, dense(layer_scale), dense(drop_path_scale)


def _product(x, weight, bias, residual, layer_scale, drop_path_scale):
    return _common.compute_dtype(x, weight)


OP = Op("linear_residual", _check, _unsupported, _torch, LinearResidualFunction, _prepare, _product, onednn=by_onednn)


def linear_residual(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    *,
    layer_scale: torch.Tensor | None = None,
    drop_path_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + drop_path_scale * layer_scale * linear(x), in one GEMM.

    x (B, ..., K) of any strides, in weight's dtype or wider; weight (O, K); bias (O,) or None; residual (B, ..., O);
    layer_scale (O,) (arXiv 2103.17239); drop_path_scale (B,), 0 for dropped samples and 1 / keep_prob for the others
    (arXiv 1603.09382), not differentiable. Returns (B, ..., O) in the wider dtype of residual and weight (autocast's
    when it is on). Everything after the product is in float32 and rounded once. Raises TypeError for a dtype,
    ValueError for a shape or device that does not fit, before any launch.
    """
    run, args = dispatch.choose(OP, (x, weight, bias, residual, layer_scale, drop_path_scale))
    return run(*args)

"""residual + drop_path_scale * layer_scale * linear(x) as one op; see `fastvit.reference.linear_residual` and
`fastvit.kernels.linear_residual`."""

import torch

from fastvit import dispatch, reference

from . import _common
from ._common import Op, dense, on_device_of, or_none, rows


def residual_dtype(residual: torch.Tensor | None, weight: torch.Tensor) -> torch.dtype:
    """The dtype of residual + branch, the branch in weight's dtype."""
    return weight.dtype if residual is None else torch.promote_types(residual.dtype, weight.dtype)


@torch.library.custom_op("fastvit::linear_residual_forward", mutates_args=())
def linear_residual_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    layer_scale: torch.Tensor | None,
    drop_path_scale: torch.Tensor | None,
) -> torch.Tensor:
    from fastvit.kernels import linear_residual as kernels

    with on_device_of(x):
        return kernels.linear_residual_forward(
            x, weight, bias, residual, layer_scale, drop_path_scale, residual_dtype(residual, weight)
        )


@linear_residual_forward.register_fake
def _(x, weight, bias, residual, layer_scale, drop_path_scale):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=residual_dtype(residual, weight))


@torch.library.custom_op("fastvit::linear_residual_backward", mutates_args=())
def linear_residual_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    drop_path_scale: torch.Tensor | None,
    by_library: bool,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    needs_layer_scale: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from fastvit.kernels import linear_residual as kernels

    needs = (needs_x, needs_weight, needs_bias, needs_layer_scale)
    with on_device_of(x):
        grads = kernels.linear_residual_backward(dout, x, weight, bias, layer_scale, drop_path_scale, needs, by_library)
        return _common.gradients(grads, (x, weight, bias, layer_scale))


@linear_residual_backward.register_fake
def _(
    dout,
    x,
    weight,
    bias,
    layer_scale,
    drop_path_scale,
    by_library,
    needs_x,
    needs_weight,
    needs_bias,
    needs_layer_scale,
):
    needed = (needs_x, needs_weight, needs_bias, needs_layer_scale)
    return _common.fake_gradients((x, weight, bias, layer_scale), needed)


class LinearResidualFunction(torch.autograd.Function):
    """linear_residual on the kernels: (x (..., K), weight (O, K), bias, residual (..., O), layer_scale (O,),
    drop_path_scale (B,), by_library) -> (..., O). by_library: the gradient of weight by torch.mm."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, layer_scale, drop_path_scale, by_library=False):
        out = linear_residual_forward(rows(x), weight, bias, rows(residual), layer_scale, drop_path_scale)
        ctx.save_for_backward(x, weight, bias, layer_scale, drop_path_scale)
        ctx.residual_dtype, ctx.by_library = residual.dtype, by_library
        return out.view(residual.shape)

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
            grads = linear_residual_backward(rows(dout), rows(x), *saved, ctx.by_library, *needs)
            grads = or_none(grads, needs)
        dx, dweight, dbias, dlayer_scale = grads
        dx = dx.view(x.shape) if needs_x else None
        dresidual = dout.to(ctx.residual_dtype) if needs_residual else None
        return dx, dweight, dbias, dresidual, dlayer_scale, None, None


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


def _triton(x, weight, bias, residual, layer_scale, drop_path_scale, by_library=False):
    weight, bias = _common.cast(x, weight, bias)
    return LinearResidualFunction.apply(
        x, dense(weight), dense(bias), residual, dense(layer_scale), dense(drop_path_scale), by_library
    )


def _product(x, weight, bias, residual, layer_scale, drop_path_scale):
    return _common.compute_dtype(x, weight), (weight,)


OP = Op("linear_residual", _check, _unsupported, _torch, _triton, _product)


def linear_residual(x, weight, bias, residual, *, layer_scale=None, drop_path_scale=None):
    """residual + drop_path_scale * layer_scale * linear(x), in one GEMM.

    x (B, ..., K) of any strides, in weight's dtype or wider; weight (O, K); bias (O,) or None; residual (B, ..., O);
    layer_scale (O,) (arXiv 2103.17239); drop_path_scale (B,), 0 for dropped samples and 1 / keep_prob for the others
    (arXiv 1603.09382), not differentiable. Returns (B, ..., O) in the wider dtype of residual and weight (autocast's
    when it is on). Everything after the product is in float32 and rounded once. Raises TypeError for a dtype,
    ValueError for a shape or device that does not fit, before any launch.
    """
    return OP(x, weight, bias, residual, layer_scale, drop_path_scale)

"""residual + drop_path_scale * layer_scale * fc2(activation(fc1(layer_norm(x)))) as one op; see
`fastvit.reference.layer_norm_mlp` and `fastvit.kernels.layer_norm_mlp`."""

import torch

from fastvit import dispatch, reference

from . import _common
from ._common import Op, dense, on_device_of, or_none, rows, statistics_dtype
from .layer_norm import check_norm, unsupported_norm
from .linear_residual import residual_dtype

ACTIVATIONS = tuple(sorted(reference.ops.ACTIVATIONS))


@torch.library.custom_op("fastvit::layer_norm_mlp_forward", mutates_args=())
def layer_norm_mlp_forward(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    drop_path_scale: torch.Tensor | None,
    residual_is_x: bool,
    eps: float,
    activation: str,
    keep_preactivation: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from fastvit.kernels import layer_norm_mlp as kernels

    added = x if residual_is_x else residual
    with on_device_of(x):
        out, mean, rstd, preactivation = kernels.layer_norm_mlp_forward(
            x,
            norm_weight,
            norm_bias,
            fc1_weight,
            fc1_bias,
            fc2_weight,
            fc2_bias,
            added,
            layer_scale,
            drop_path_scale,
            eps,
            activation,
            residual_dtype(added, fc2_weight),
            keep_preactivation,
        )
        return out, mean, rstd, fc1_weight.new_empty(0, 0) if preactivation is None else preactivation


@layer_norm_mlp_forward.register_fake
def _(
    x,
    norm_weight,
    norm_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    residual,
    layer_scale,
    drop_path_scale,
    residual_is_x,
    eps,
    activation,
    keep_preactivation,
):
    tokens, hidden = x.shape[0], fc1_weight.shape[0]
    out = x.new_empty(tokens, fc2_weight.shape[0], dtype=residual_dtype(x if residual_is_x else residual, fc2_weight))
    statistics = x.new_empty(tokens, dtype=statistics_dtype(x))
    kept = (tokens, hidden) if keep_preactivation else (0, 0)
    return out, statistics, torch.empty_like(statistics), fc1_weight.new_empty(kept)


@torch.library.custom_op("fastvit::layer_norm_mlp_backward", mutates_args=())
def layer_norm_mlp_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    preactivation: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    drop_path_scale: torch.Tensor | None,
    eps: float,
    activation: str,
    residual_is_x: bool,
    by_library: bool,
    needs: list[bool],
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    from fastvit.kernels import layer_norm_mlp as kernels

    with on_device_of(x):
        grads = kernels.layer_norm_mlp_backward(
            dout,
            x,
            mean,
            rstd,
            preactivation,
            norm_weight,
            norm_bias,
            fc1_weight,
            fc2_weight,
            fc2_bias,
            layer_scale,
            drop_path_scale,
            eps,
            activation,
            residual_is_x,
            needs,
            by_library,
        )
        likes = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale)
        return _common.gradients(grads, likes)


@layer_norm_mlp_backward.register_fake
def _(
    dout,
    x,
    mean,
    rstd,
    preactivation,
    norm_weight,
    norm_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    layer_scale,
    drop_path_scale,
    eps,
    activation,
    residual_is_x,
    by_library,
    needs,
):
    likes = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale)
    return _common.fake_gradients(likes, (needs[0], needs[0], *needs))


class LayerNormMLPFunction(torch.autograd.Function):
    """layer_norm_mlp on the kernels: (x (B, ..., D), norm_weight, norm_bias, fc1_weight (M, D), fc1_bias, fc2_weight
    (O, M), fc2_bias, residual (B, ..., O) or None, layer_scale (O,), drop_path_scale (B,), residual_is_x, eps,
    activation, keep_preactivation, by_library) -> (B, ..., O).

    residual_is_x: the residual is x itself, and `residual` is None; the sum of both gradients of x is then fused.
    keep_preactivation: a backward pass may come. by_library: the gradients of the weights by torch.mm.
    """

    @staticmethod
    def forward(
        ctx,
        x,
        norm_weight,
        norm_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        residual,
        layer_scale,
        drop_path_scale,
        residual_is_x,
        eps,
        activation,
        keep_preactivation,
        by_library=False,
    ):
        out, mean, rstd, preactivation = layer_norm_mlp_forward(
            rows(x),
            norm_weight,
            norm_bias,
            fc1_weight,
            fc1_bias,
            fc2_weight,
            fc2_bias,
            None if residual is None else rows(residual),
            layer_scale,
            drop_path_scale,
            residual_is_x,
            eps,
            activation,
            keep_preactivation,
        )
        ctx.save_for_backward(
            x,
            mean,
            rstd,
            preactivation,
            norm_weight,
            norm_bias,
            fc1_weight,
            fc1_bias,
            fc2_weight,
            fc2_bias,
            layer_scale,
            drop_path_scale,
        )
        ctx.eps, ctx.activation, ctx.residual_is_x, ctx.by_library = eps, activation, residual_is_x, by_library
        ctx.residual_dtype = None if residual is None else residual.dtype
        return out.view(*x.shape[:-1], fc2_weight.shape[0])

    @staticmethod
    def backward(ctx, dout):
        by_input = ctx.needs_input_grad
        needed = (*by_input[:7], by_input[8])
        x, *saved = ctx.saved_tensors
        _, _, _, *parameters, layer_scale, drop_path_scale = saved
        if _common.differentiating_again(dout):

            def mlp(x, *parameters_and_scale):
                *parameters, layer_scale = parameters_and_scale
                return reference.layer_norm_mlp(
                    x,
                    *parameters,
                    eps=ctx.eps,
                    activation=ctx.activation,
                    residual=x if ctx.residual_is_x else None,
                    layer_scale=layer_scale,
                    drop_path_scale=drop_path_scale,
                )

            grads = _common.again_differentiable(mlp, (x, *parameters, layer_scale), needed, dout)
        else:
            how = (ctx.eps, ctx.activation, ctx.residual_is_x, ctx.by_library, [any(needed[:3]), *needed[3:]])
            grads = layer_norm_mlp_backward(rows(dout), rows(x), *saved, *how)
            grads = or_none(grads, needed)
        dx, *first, dlayer_scale = grads
        dx = dx.view(x.shape) if needed[0] else None
        dresidual = dout.to(ctx.residual_dtype) if by_input[7] else None
        return dx, *first, dresidual, dlayer_scale, *[None] * 6


def _check(
    x,
    norm_weight,
    norm_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    eps,
    activation,
    residual,
    layer_scale,
    drop_path_scale,
):
    name = "layer_norm_mlp"
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: unknown activation {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    _common.check_tensors(
        name,
        ("fc1_bias", "fc2_bias", "residual", "layer_scale", "drop_path_scale"),
        x=x,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        fc1_weight=fc1_weight,
        fc1_bias=fc1_bias,
        fc2_weight=fc2_weight,
        fc2_bias=fc2_bias,
        residual=residual,
        layer_scale=layer_scale,
        drop_path_scale=drop_path_scale,
    )
    check_norm(name, x, norm_weight, norm_bias, eps)
    _common.check_matrix(name, "fc1_weight", fc1_weight, "(M, D)", inputs=x.shape[-1])
    hidden = fc1_weight.shape[0]
    _common.check_matrix(name, "fc2_weight", fc2_weight, "(O, M)", inputs=hidden)
    outputs = fc2_weight.shape[0]
    _common.check_shape(name, "fc1_bias", fc1_bias, (hidden,), "(M,)")
    _common.check_shape(name, "fc2_bias", fc2_bias, (outputs,), "(O,)")
    _common.check_shape(name, "residual", residual, (*x.shape[:-1], outputs), "(B, ..., O)")
    _common.check_scales(name, x, outputs, layer_scale, drop_path_scale)
    _common.check_operands(name, x, fc1_weight=fc1_weight, fc1_bias=fc1_bias, fc2_weight=fc2_weight, fc2_bias=fc2_bias)


def _unsupported(
    x,
    norm_weight,
    norm_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    eps,
    activation,
    residual,
    layer_scale,
    drop_path_scale,
):
    dtypes = [x.dtype, norm_weight.dtype, norm_bias.dtype, _common.compute_dtype(x, fc1_weight)]
    if residual is not None:
        dtypes.append(residual.dtype)
    return [
        *dispatch.missing_requirements(x),
        *_common.unsupported_dtypes(*dtypes),
        *unsupported_norm(x),
    ]


def _torch(
    x,
    norm_weight,
    norm_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    eps,
    activation,
    residual,
    layer_scale,
    drop_path_scale,
):
    return reference.layer_norm_mlp(
        x,
        norm_weight,
        norm_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        eps=eps,
        activation=activation,
        residual=residual,
        layer_scale=layer_scale,
        drop_path_scale=drop_path_scale,
    )


def _triton(
    x,
    norm_weight,
    norm_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    eps,
    activation,
    residual,
    layer_scale,
    drop_path_scale,
    by_library=False,
):
    keep = _common.needs_grad(
        x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, layer_scale
    )
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = _common.cast(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    residual_is_x = residual is x
    return LayerNormMLPFunction.apply(
        x,
        dense(norm_weight),
        dense(norm_bias),
        dense(fc1_weight),
        dense(fc1_bias),
        dense(fc2_weight),
        dense(fc2_bias),
        None if residual_is_x else residual,
        dense(layer_scale),
        dense(drop_path_scale),
        residual_is_x,
        eps,
        activation,
        keep,
        by_library,
    )


def _product(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, *others):
    return _common.compute_dtype(x, fc1_weight), (fc1_weight, fc2_weight)


OP = Op("layer_norm_mlp", _check, _unsupported, _torch, _triton, _product)


def layer_norm_mlp(
    x,
    norm_weight,
    norm_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    *,
    eps=1e-6,
    activation="gelu",
    residual=None,
    layer_scale=None,
    drop_path_scale=None,
):
    """residual + drop_path_scale * layer_scale * fc2(activation(fc1(layer_norm(x)))), in two GEMMs.

    x (B, ..., D) of any strides, in the weights' dtype or wider; norm_weight, norm_bias (D,); fc1_weight (M, D),
    fc2_weight (O, M), one dtype; biases (M,) and (O,), or None; activation "gelu" (exact, arXiv 1606.08415),
    "gelu_tanh", "quick_gelu" or "silu"; residual None or (B, ..., O), fused in backward too when it is x itself;
    layer_scale (O,), drop_path_scale (B,) as in `linear_residual`. Returns (B, ..., O) in the wider dtype of residual
    and weights (autocast's when it is on). Keeps the pre-activation for backward and works out the rest again. Raises
    TypeError for a dtype, ValueError for a shape, name or device that does not fit, before any launch.
    """
    return OP(
        x,
        norm_weight,
        norm_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        eps,
        activation,
        residual,
        layer_scale,
        drop_path_scale,
    )

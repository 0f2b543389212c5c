"""residual + drop_path_scale * layer_scale * fc2(activation(fc1(layer_norm(x)))) as one op; see
`fastvit.reference.layer_norm_mlp` and `fastvit.kernels.layer_norm_mlp`."""

from __future__ import annotations

import torch

from fastvit import dispatch, onednn, reference
from fastvit.dispatch import Op

from . import _common
from ._common import Operator, dense, launchers, or_none, rows, shaped, statistics_dtype
from .layer_norm import check_norm, unsupported_norm
from .linear_residual import by_onednn, sum_dtype

ACTIVATIONS = tuple(sorted(reference.ops.ACTIVATIONS))


def _fake_forward(x, *others):
    _, _, fc1_weight, _, fc2_weight, *_, keep_preactivation, out_dtype = others
    tokens, hidden = x.shape[0], fc1_weight.shape[0]
    out = x.new_empty(tokens, fc2_weight.shape[0], dtype=out_dtype)
    statistics = x.new_empty(tokens, dtype=statistics_dtype(x))
    kept = fc1_weight.new_empty((tokens, hidden)) if keep_preactivation else x.new_empty(0)
    return out, statistics, torch.empty_like(statistics), kept


def _backward(dout, x, mean, rstd, preactivation, *others):
    norm_weight, norm_bias, fc1_weight, fc1_bias, *second, activation, residual_is_x, needs = others
    fc2_weight, fc2_bias, layer_scale, _ = second
    saved = (dout, x, mean, rstd, preactivation, norm_weight, norm_bias, fc1_weight, *second)
    launch = launchers("layer_norm_mlp").layer_norm_mlp_backward
    grads = launch(*saved, activation, residual_is_x, needs)
    likes = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale)
    return _common.gradients(grads, likes)


def _fake_backward(dout, x, mean, rstd, preactivation, *others):
    *parameters, layer_scale, _, _, _, needs = others
    return _common.fake_gradients(dout, (x, *parameters, layer_scale), (needs[0], needs[0], *needs))


_PARAMETERS = (
    "Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias"
)
FORWARD = Operator(
    "layer_norm_mlp",
    f"layer_norm_mlp_forward(Tensor x, {_PARAMETERS}, Tensor? residual, Tensor? layer_scale, Tensor? drop_path_scale,"
    " bool residual_is_x, float eps, str activation, bool keep_preactivation,"
    " ScalarType out_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
)
BACKWARD = Operator(
    "layer_norm_mlp",
    f"layer_norm_mlp_backward(Tensor dout, Tensor x, Tensor mean, Tensor rstd, Tensor preactivation, {_PARAMETERS},"
    " Tensor? layer_scale, Tensor? drop_path_scale, str activation, bool residual_is_x,"
    " bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    _backward,
)


class LayerNormMLPFunction(torch.autograd.Function):
    """layer_norm_mlp on the kernels: (x (B, ..., D), norm_weight, norm_bias, fc1_weight (M, D), fc1_bias, fc2_weight
    (O, M), fc2_bias, residual (B, ..., O) or None, layer_scale (O,), drop_path_scale (B,), residual_is_x, eps,
    activation, keep_preactivation) -> (B, ..., O).

    residual_is_x: the residual is x itself, and `residual` is None; the sum of both gradients of x is then fused.
    keep_preactivation: a backward pass may come.
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
    ):
        parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        added = (None if residual is None else rows(residual), layer_scale, drop_path_scale, residual_is_x)
        out_dtype = sum_dtype(x if residual_is_x else residual, fc2_weight)
        how = (eps, activation, keep_preactivation, out_dtype)
        launch = FORWARD.of(x, *parameters, residual, layer_scale, drop_path_scale)
        out, mean, rstd, preactivation = launch(rows(x), *parameters, *added, *how)
        ctx.save_for_backward(x, mean, rstd, preactivation, *parameters, layer_scale, drop_path_scale)
        ctx.eps, ctx.activation, ctx.residual_is_x = eps, activation, residual_is_x
        ctx.residual_dtype = None if residual is None else residual.dtype
        return shaped(out, *x.shape[:-1], out.shape[-1])

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
            how = (ctx.activation, ctx.residual_is_x, [any(needed[:3]), *needed[3:]])
            grads = or_none(BACKWARD.of(dout, x, *saved)(rows(dout), rows(x), *saved, *how), needed)
        dx, *first, dlayer_scale = grads
        dx = dx.view(x.shape) if needed[0] else None
        dresidual = dout.to(ctx.residual_dtype) if by_input[7] else None
        return dx, *first, dresidual, dlayer_scale, *[None] * 5


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


def _unsupported(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps, activation, residual, *_):
    dtypes = [x.dtype, norm_weight.dtype, norm_bias.dtype, _common.compute_dtype(x, fc1_weight)]
    if residual is not None:
        dtypes.append(residual.dtype)
    return [
        *dispatch.missing_requirements(x),
        *_common.unsupported_dtypes(*dtypes),
        *unsupported_norm(x),
    ]


def _torch(*args):
    return reference.layer_norm_mlp(**dict(zip(OP.parameters, args, strict=True)))


def _onednn(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps, activation, *added):
    normalised = reference.layer_norm(x, norm_weight, norm_bias, eps)
    fused = activation if activation in onednn.ACTIVATIONS else None
    hidden = onednn.linear(normalised, fc1_weight, fc1_bias, fused)
    hidden = hidden if fused else reference.ops.ACTIVATIONS[activation](hidden)
    return by_onednn(hidden, fc2_weight, fc2_bias, *added)


def _prepare(x, *others):
    norm_weight, norm_bias, *layers, eps, activation, residual, layer_scale, drop_path_scale = others
    keep = dispatch.needs_grad(x, norm_weight, norm_bias, *layers, residual, layer_scale)
    parameters = [dense(parameter) for parameter in (norm_weight, norm_bias, *_common.cast(x, *layers))]
    residual_is_x = residual is x
    scales = (dense(layer_scale), dense(drop_path_scale))
    how = (residual_is_x, float(eps), activation, keep)
    return x, *parameters, None if residual_is_x else residual, *scales, *how


def _product(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, *others):
    return _common.compute_dtype(x, fc1_weight)


OP = Op("layer_norm_mlp", _check, _unsupported, _torch, LayerNormMLPFunction, _prepare, _product, onednn=_onednn)


def layer_norm_mlp(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    *,
    eps: float = 1e-6,
    activation: str = "gelu",
    residual: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
    drop_path_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + drop_path_scale * layer_scale * fc2(activation(fc1(layer_norm(x)))), in two GEMMs.

    x (B, ..., D) of any strides, in the weights' dtype or wider; norm_weight, norm_bias (D,); fc1_weight (M, D),
    fc2_weight (O, M), one dtype; biases (M,) and (O,), or None; activation "gelu" (exact, arXiv 1606.08415),
    "gelu_tanh", "quick_gelu" or "silu"; residual None or (B, ..., O), fused in backward too when it is x itself;
    layer_scale (O,), drop_path_scale (B,) as in `linear_residual`. Returns (B, ..., O) in the wider dtype of residual
    and weights (autocast's when it is on). Keeps the pre-activation for backward and works out the rest again. Raises
    TypeError for a dtype, ValueError for a shape, name or device that does not fit, before any launch.
    """
    layers = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    run, args = dispatch.choose(OP, (x, *layers, eps, activation, residual, layer_scale, drop_path_scale))
    return run(*args)

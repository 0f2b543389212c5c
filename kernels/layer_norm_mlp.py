"""residual + drop_path_scale * layer_scale * fc2(activation(fc1(layer_norm(x)))), forward and backward.

Two GEMMs (after the row statistics). Fused: the normalisation as fc1 loads x; bias and activation in fc1's epilogue;
bias, scales and residual in fc2's. In backward: the scales as the gradient of the activated tensor loads dout, the
activation's derivative in that GEMM's epilogue, the normalisation in the gradient of fc1's weight, and the residual's
gradient in the norm's.
Saved for backward: x, mean, rstd and the pre-activation fc1(layer_norm(x)). Recomputed: the normalised values, and the
activated tensor, by the very kernel that needs the pre-activation for the derivative.
A call must move, beyond the weights, for M rows, D inputs, H hidden, O outputs of size s: forward
M (D + 2 H + 2 O) s, plus M H s when the pre-activation is saved; backward M (2 O + 6 H + 3 D) s, one D more when the
residual is x. These kernels move more: forward M D s, for the row statistics; backward M (O + H + 2 D) s, for the two
bias sums, and for the gradient of the normalised tensor, written and read.
"""

import torch
import triton
import triton.language as tl

from . import gemm, layer_norm
from ._math import activate, activate_with_gradient
from .launch.request import Epilogue
from .layer_norm_linear import layer_norm_linear_backward
from .linear_residual import linear_parameter_gradients, residual_product, scaled_operand
from .tiles import MATRIX, NORMALISED, plain, transposed


@triton.jit
def store_activated(acc, i, j, part, target, size_i, size_j, ACTIVATION: tl.constexpr):
    """ACTIVATION(acc + bias), and acc + bias itself where wanted."""
    activated_ptr, preactivation_ptr, bias_ptr = target
    offset = i.to(tl.int64)[:, None] * size_j + j[None, :]
    mask = (i < size_i)[:, None] & (j < size_j)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + j, mask=j < size_j, other=0.0).to(acc.dtype)[None, :]
    if preactivation_ptr is not None:
        tl.store(preactivation_ptr + offset, acc.to(preactivation_ptr.dtype.element_ty), mask=mask)
    activated = activate(acc, ACTIVATION, activated_ptr.dtype.element_ty)
    tl.store(activated_ptr + offset, activated.to(activated_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_activation_gradient(acc, i, j, part, target, size_i, size_j, ACTIVATION: tl.constexpr):
    """acc * ACTIVATION'(preactivation), and the activated tensor, made again, for the gradient of fc2's weight."""
    dpreactivation_ptr, activated_ptr, preactivation_ptr = target
    offset = i.to(tl.int64)[:, None] * size_j + j[None, :]
    mask = (i < size_i)[:, None] & (j < size_j)[None, :]
    preactivation = tl.load(preactivation_ptr + offset, mask=mask, other=0.0).to(acc.dtype)
    activated, derivative = activate_with_gradient(preactivation, ACTIVATION, activated_ptr.dtype.element_ty)
    tl.store(dpreactivation_ptr + offset, (acc * derivative).to(dpreactivation_ptr.dtype.element_ty), mask=mask)
    tl.store(activated_ptr + offset, activated.to(activated_ptr.dtype.element_ty), mask=mask)


ACTIVATED = Epilogue("activated", store_activated, beside=True)
ACTIVATED_AND_KEPT = Epilogue("activated_and_kept", store_activated, beside=True)
ACTIVATION_GRADIENT = Epilogue("activation_gradient", store_activation_gradient, tiles=3, input_gradient=True)


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
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x (M, D), fc1_weight (H, D), fc2_weight (O, H), residual (M, O) or, if it is x itself, None; the other optional
    ones None where absent -> out (M, O) in out_dtype, mean (M,), rstd (M,), preactivation (M, H) or None."""
    rows, inputs = x.shape
    hidden, dtype = fc1_weight.shape[0], fc1_weight.dtype
    mean, rstd = layer_norm.row_statistics(x, eps)
    activated = torch.empty(rows, hidden, dtype=dtype, device=x.device)
    preactivation = torch.empty_like(activated) if keep_preactivation else None
    normalised = (x, mean, rstd, norm_weight, norm_bias, x.stride(0))
    epilogue = ACTIVATED_AND_KEPT if keep_preactivation else ACTIVATED
    target = (activated, preactivation, fc1_bias)
    product = (NORMALISED, normalised, MATRIX, transposed(fc1_weight), epilogue, target)
    gemm.launch(*product, (rows, hidden, inputs), dtype, activation, outputs=2)
    added = x if residual_is_x else residual
    product = residual_product(activated, fc2_weight, fc2_bias, added, layer_scale, drop_path_scale, out_dtype)
    (out,) = gemm.launch(*product)
    return out, mean, rstd, preactivation


def layer_norm_mlp_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    preactivation: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    drop_path_scale: torch.Tensor | None,
    activation: str,
    residual_is_x: bool,
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of `layer_norm_mlp_forward` for dout (M, O); residual_is_x: dout is added to the gradient of x.

    needs: six bools, for the input and norm parameters, fc1's weight and bias, fc2's weight and bias, layer_scale.
    Returns dx in x's dtype, dnorm_weight, dnorm_bias, dfc1_weight, dfc1_bias as `layer_norm_linear_backward` does,
    dfc2_weight, dfc2_bias, dlayer_scale as `linear_parameter_gradients` does; None for each that is not needed.
    """
    needs_fc1, needs_fc2 = needs[:3], needs[3:]
    if not any((*needs_fc1, needs_fc2[0], needs_fc2[2])):
        # Nothing needs the hidden tensors, and the pre-activation stands in for the activated one unread.
        return *[None] * 5, *linear_parameter_gradients(
            dout, preactivation, fc2_weight, fc2_bias, layer_scale, drop_path_scale, needs_fc2
        )
    rows, hidden = preactivation.shape
    dpreactivation, activated = torch.empty_like(preactivation), torch.empty_like(preactivation)
    scaled = scaled_operand(dout, drop_path_scale, layer_scale)
    target = (dpreactivation, activated, preactivation)
    product = (*scaled, MATRIX, plain(fc2_weight), ACTIVATION_GRADIENT, target)
    gemm.launch(*product, (rows, hidden, dout.shape[1]), fc2_weight.dtype, activation, outputs=2)
    fc2_gradients = linear_parameter_gradients(
        dout, activated, fc2_weight, fc2_bias, layer_scale, drop_path_scale, needs_fc2
    )
    del activated
    norm = (x, mean, rstd, norm_weight, norm_bias)
    dresidual = dout if residual_is_x else None
    fc1_gradients = layer_norm_linear_backward(dpreactivation, *norm, fc1_weight, needs_fc1, dresidual)
    return *fc1_gradients, *fc2_gradients

"""linear(layer_norm(x)), forward and backward.

Fused: the normalisation happens as the GEMM loads its tile of x, and the bias in its epilogue; the normalised tensor
never exists in memory, neither in the forward nor in the gradient of the weight (but where the library makes the
product, see `twin`).
Saved for backward: x itself, mean and rstd (float32, one each a row). Recomputed: the normalised values.
A call must move, beyond the weights, for M rows, D inputs, O outputs of size s: forward M (D + O) s; backward
M (2 O + 3 D) s, one D more with a residual's gradient. These kernels move more: forward M D s, for x is read once more
for its statistics; backward M (O + 2 D) s, for the bias sum reads dy, and the gradient of the normalised tensor is
written and read.
"""

import torch

from . import gemm, layer_norm, reduce
from .tiles import INPUT_GRADIENT, LINEAR, MATRIX, NORMALISED, plain, transposed


def layer_norm_linear_forward(x, norm_weight, norm_bias, weight, bias, eps: float):
    """x (M, D), weight (O, D), bias (O,) or None -> y (M, O) in weight's dtype, mean (M,), rstd (M,)."""
    rows, inputs = x.shape
    outputs = weight.shape[0]
    mean, rstd = layer_norm.row_statistics(x, eps)
    y = torch.empty(rows, outputs, dtype=weight.dtype, device=x.device)
    normalised = (x, mean, rstd, norm_weight, norm_bias, x.stride(0))
    target = (y, bias, None, None, None, 1, 0)
    shape = (rows, outputs, inputs)
    gemm.launch(NORMALISED, normalised, MATRIX, transposed(weight), LINEAR, target, shape, weight.dtype)
    return y, mean, rstd


def layer_norm_linear_backward(dy, x, mean, rstd, norm_weight, norm_bias, weight, needs, dresidual=None):
    """Gradients of `layer_norm_linear_forward` for dy (M, O).

    needs: three bools: the input and norm parameters, the weight, the bias; None for each that is not needed.
    dresidual (M, D): added to the gradient of x. Returns dx (M, D) in x's dtype, dnorm_weight, dnorm_bias in
    their parameters' dtypes, dweight and dbias in weight's, all sums made in float32 (float64 for float64).
    """
    needs_norm, needs_weight, needs_bias = needs
    rows, outputs = dy.shape
    inputs = x.shape[1]
    dx = dnorm_weight = dnorm_bias = dweight = dbias = None
    if needs_weight:
        source = (x, mean, rstd, norm_weight, norm_bias, x.stride(0))
        dweight = gemm.weight_gradient(dy, NORMALISED, source, inputs, weight.dtype)
    if needs_bias:
        dbias = reduce.column_sum(dy, dtype=weight.dtype)
    if needs_norm:
        dnormalised = torch.empty(rows, inputs, dtype=weight.dtype, device=x.device)
        shape = (rows, inputs, outputs)
        gemm.launch(MATRIX, plain(dy), MATRIX, plain(weight), INPUT_GRADIENT, (dnormalised,), shape, weight.dtype)
        dx, dnorm_weight, dnorm_bias = layer_norm.layer_norm_backward(
            dnormalised, x, mean, rstd, norm_weight, norm_bias, dresidual
        )
    return dx, dnorm_weight, dnorm_bias, dweight, dbias

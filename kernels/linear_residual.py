"""residual + drop_path_scale * layer_scale * linear(x), forward and backward.

Fused: bias, both scales and the residual sum in the GEMM's epilogue; in backward the scales as the GEMMs load their
tiles, so the scaled gradient never exists in memory (by the library, see `twin`, it does).
Saved for backward: x only. Recomputed: nothing; the gradient of layer_scale, sum over tokens of dout * linear(x), comes
from the unscaled gradient G = dout^T x of the weight as rowsum(weight * G) + bias * sum(dout), so linear(x) is not
needed again.
A call must move, beyond the weights, for M rows, K inputs, O outputs of size s: forward M (K + 2 O) s, backward
M (2 O + 2 K) s (the gradient of the residual is dout itself). These kernels move M O s more backward: the bias sum
reads dout.
"""

import torch

from . import gemm, reduce
from .tiles import INPUT_GRADIENT, LINEAR, LINEAR_RESIDUAL, MATRIX, SCALED, plain, transposed


def scaled_operand(x, row_scale, column_scale):
    """The prologue, and its source, of x (M, K) times a scale per sample and one per channel; each may be None."""
    if row_scale is None and column_scale is None:
        return MATRIX, plain(x)
    return SCALED, (x, row_scale, column_scale, reduce.rows_per_sample(len(x), row_scale), x.stride(0))


def residual_product(x, weight, bias, residual, layer_scale, drop_path_scale, out_dtype: torch.dtype):
    """What `gemm.launch` takes for `linear_residual_forward`, the output's memory included."""
    rows, inputs = x.shape
    outputs = weight.shape[0]
    out = torch.empty(rows, outputs, dtype=out_dtype, device=x.device)
    epilogue, stride = (LINEAR, 0) if residual is None else (LINEAR_RESIDUAL, residual.stride(0))
    rows_per_sample = reduce.rows_per_sample(rows, drop_path_scale)
    target = (out, bias, layer_scale, drop_path_scale, residual, rows_per_sample, stride)
    return MATRIX, plain(x), MATRIX, transposed(weight), epilogue, target, (rows, outputs, inputs), weight.dtype


def linear_residual_forward(x, weight, bias, residual, layer_scale, drop_path_scale, out_dtype: torch.dtype):
    """x (M, K), weight (O, K), bias (O,), residual (M, O), layer_scale (O,), drop_path_scale (B,), bias and the scales
    None where absent -> (M, O) in out_dtype."""
    product = residual_product(x, weight, bias, residual, layer_scale, drop_path_scale, out_dtype)
    return gemm.launch(*product)[0]


def linear_parameter_gradients(dout, x, weight, bias, layer_scale, drop_path_scale, needs):
    """Gradients of weight, bias and layer_scale for dout (M, O) and x (M, K), None where not needed.

    needs: three bools. Returns dweight (O, K), dbias (O,), dlayer_scale (O,), in weight's dtype, or with a layer_scale
    in float32 (float64 for float64).
    """
    needs_weight, needs_bias, needs_layer_scale = needs
    dweight = dbias = dlayer_scale = None
    # What layer_scale is still to scale down, by 1e-5 perhaps, may be out of float16's range.
    wide = layer_scale is not None
    if needs_bias or needs_layer_scale:
        dbias = reduce.column_sum(dout, drop_path_scale, None if wide else weight.dtype)
    if needs_weight or needs_layer_scale:
        operand = scaled_operand(x, drop_path_scale, None)
        dweight = gemm.weight_gradient(dout, *operand, x.shape[1], weight.dtype, wide)
    if needs_layer_scale:
        dlayer_scale = (weight * dweight).sum(dim=1)
        if bias is not None:
            dlayer_scale += bias * dbias
    if layer_scale is not None:
        dweight = None if dweight is None else dweight * layer_scale[:, None]
        dbias = None if dbias is None else dbias * layer_scale
    return dweight if needs_weight else None, dbias if needs_bias else None, dlayer_scale


def linear_residual_backward(dout, x, weight, bias, layer_scale, drop_path_scale, needs):
    """Gradients of `linear_residual_forward` for dout (M, O); that of the residual is dout.

    needs: four bools, for x, weight, bias, layer_scale. Returns dx (M, K) in x's dtype, and the parameters' gradients
    as `linear_parameter_gradients` does; None for each that is not needed.
    """
    needs_x, *needs_parameters = needs
    dx = None
    if needs_x:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        scaled = scaled_operand(dout, drop_path_scale, layer_scale)
        shape = (*x.shape, weight.shape[0])
        gemm.launch(*scaled, MATRIX, plain(weight), INPUT_GRADIENT, (dx,), shape, weight.dtype)
    return dx, *linear_parameter_gradients(dout, x, weight, bias, layer_scale, drop_path_scale, needs_parameters)

"""residual + drop_path_scale * layer_scale * linear(x), forward and backward.

Fused: bias, both scales and the residual sum in the GEMM's epilogue; in backward the scales as the GEMMs load their
tiles, so the scaled gradient never exists in memory (by_library, the one scaled by drop path does: 2 M O s more).
Saved for backward: x only. Recomputed: nothing; the gradient of layer_scale, sum over tokens of dout * linear(x), comes
from the unscaled gradient G = dout^T x of the weight as rowsum(weight * G) + bias * sum(dout), so linear(x) is not
needed again.
A call must move, beyond the weights, for M rows, K inputs, O outputs of size s: forward M (K + 2 O) s, backward
M (2 O + 2 K) s (the gradient of the residual is dout itself). These kernels move M O s more backward: the bias sum
reads dout.
"""

import torch

from . import gemm, reduce
from .gemm import plain_weight, store_linear, transposed_weight


def scaled_operand(x, row_scale, column_scale):
    """The loader, and its source, of x (M, K) times a scale per sample and one per channel; each may be None."""
    if row_scale is None and column_scale is None:
        return gemm.load_matrix, (x, *x.shape, x.stride(0), 1)
    rows_per_sample = reduce.rows_per_sample(len(x), row_scale)
    return gemm.load_scaled, (x, row_scale, column_scale, rows_per_sample, *x.shape, x.stride(0))


def linear_residual_forward(x, weight, bias, residual, layer_scale, drop_path_scale, out_dtype):
    """x (M, K), weight (O, K), bias (O,), residual (M, O), layer_scale (O,), drop_path_scale (B,), the last four None
    where absent -> (M, O) in out_dtype."""
    rows, inputs = x.shape
    outputs = weight.shape[0]
    out = torch.empty(rows, outputs, dtype=out_dtype, device=x.device)
    gemm.launch(
        gemm.load_matrix,
        (x, rows, inputs, x.stride(0), 1),
        gemm.load_matrix,
        transposed_weight(weight),
        store_linear,
        (
            out,
            bias,
            layer_scale,
            drop_path_scale,
            residual,
            reduce.rows_per_sample(rows, drop_path_scale),
            0 if residual is None else residual.stride(0),
            rows,
            outputs,
        ),
        rows,
        outputs,
        inputs,
        weight.dtype,
        x.device,
        traits=() if residual is None else ("residual",),
    )
    return out


def linear_parameter_gradients(dout, x, weight, bias, layer_scale, drop_path_scale, needs, by_library: bool):
    """Gradients of weight, bias and layer_scale for dout (M, O) and x (M, K), None where not needed.

    needs: three bools. by_library: that of the weight by the library's product. Returns dweight (O, K), dbias (O,),
    dlayer_scale (O,) in float32 (float64 for float64), dweight in weight's dtype by_library without a layer_scale.
    """
    needs_weight, needs_bias, needs_layer_scale = needs
    dweight = dbias = dlayer_scale = None
    if needs_bias or needs_layer_scale:
        dbias = reduce.column_sum(dout, drop_path_scale)
    if by_library and (needs_weight or needs_layer_scale):
        scaled = dout
        if drop_path_scale is not None and len(dout):
            by_sample = dout.unflatten(0, (len(drop_path_scale), -1))
            scaled = torch.mul(by_sample, drop_path_scale[:, None, None], out=torch.empty_like(by_sample)).flatten(0, 1)
        # What layer_scale is still to scale down, by 1e-5 perhaps, may be out of float16's range.
        dweight = gemm.library_weight_gradient(scaled, x, weight.dtype, wide=layer_scale is not None)
    elif needs_weight or needs_layer_scale:
        dweight = gemm.weight_gradient(dout, *scaled_operand(x, drop_path_scale, None), x.shape[1], weight.dtype)
    if needs_layer_scale:
        dlayer_scale = (weight * dweight).sum(dim=1)
        if bias is not None:
            dlayer_scale += bias * dbias
    if layer_scale is not None:
        dweight = None if dweight is None else dweight * layer_scale[:, None]
        dbias = None if dbias is None else dbias * layer_scale
    return dweight if needs_weight else None, dbias if needs_bias else None, dlayer_scale


def linear_residual_backward(dout, x, weight, bias, layer_scale, drop_path_scale, needs, by_library: bool = False):
    """Gradients of `linear_residual_forward` for dout (M, O); that of the residual is dout.

    needs: four bools, for x, weight, bias, layer_scale. Returns dx (M, K) in x's dtype, and the parameters' gradients
    as `linear_parameter_gradients` does; None for each that is not needed.
    """
    needs_x, *needs_parameters = needs
    rows, inputs = x.shape
    dx = None
    if needs_x:
        dx = torch.empty(rows, inputs, dtype=x.dtype, device=x.device)
        gemm.launch(
            *scaled_operand(dout, drop_path_scale, layer_scale),
            gemm.load_matrix,
            plain_weight(weight),
            gemm.store,
            (dx, rows, inputs),
            rows,
            inputs,
            weight.shape[0],
            weight.dtype,
            x.device,
        )
    return dx, *linear_parameter_gradients(
        dout, x, weight, bias, layer_scale, drop_path_scale, needs_parameters, by_library
    )

"""Activations and their derivatives, and how torch's dtypes map to Triton's, shared by the kernels."""

import torch
import triton
import triton.language as tl

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 (gradient checks in the interpreter), float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def float32_precision() -> str:
    """`tl.dot`'s input_precision for float32, by torch's own switch for matrix products, set by whichever of its
    names."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def widen(x):
    """x in the dtype that sums are kept in: float64 for float64, float32 for everything else."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of that name; the names are the reference's."""
    if ACTIVATION == "gelu":  # x * Phi(x), exact (arXiv 1606.08415)
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        inner, _ = sigmoid_argument(x, ACTIVATION)
        return x * tl.sigmoid(inner)


@triton.jit
def activate_with_gradient(x, ACTIVATION: tl.constexpr):
    """`activate` and its derivative, which share the costly part."""
    if ACTIVATION == "gelu":  # Phi(x) + x * phi(x)
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:  # x * s(u(x)): s + x * s * (1 - s) * u'(x)
        inner, slope = sigmoid_argument(x, ACTIVATION)
        s = tl.sigmoid(inner)
        return x * s, s + x * s * (1.0 - s) * slope


@triton.jit
def sigmoid_argument(x, ACTIVATION: tl.constexpr):
    """u(x) and u'(x) of the activations of the form x * sigmoid(u(x))."""
    if ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(t)) = sigmoid(2t) with t = sqrt(2 / pi) * (x + 0.044715 x^3); libdevice's tanh is not in the
        # interpreter.
        return (
            1.5957691216057308 * (x + 0.044715 * x * x * x),
            1.5957691216057308 * (1.0 + 0.134145 * x * x),
        )
    elif ACTIVATION == "quick_gelu":  # OpenAI's CLIP
        return 1.702 * x, 1.702
    else:
        tl.static_assert(ACTIVATION == "silu", "unknown activation")
        return x, 1.0


@triton.jit
def before_norm(dy, y, mean, rstd, colsum, bias, DTYPE: tl.constexpr):
    """What the backward of y = linear(layer_norm(x)) takes of the tile dy: s = rstd * dy, rounded; by row the sums of
    dy * colsum and dy * (y - bias); by column those of dy and of s * mean."""
    s = (dy * rstd[:, None]).to(DTYPE)
    by_colsum = tl.sum(dy * colsum[None, :], axis=1)
    by_y = tl.sum(dy * (y - bias[None, :]), axis=1)
    return s, by_colsum, by_y, tl.sum(dy, axis=0), tl.sum(s.to(dy.dtype) * mean[:, None], axis=0)

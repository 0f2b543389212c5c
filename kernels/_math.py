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
def activate(x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """The activation of that name, for a result that is rounded to DTYPE; the names are the reference's."""
    if ACTIVATION == "gelu":  # x * Phi(x), exact (arXiv 1606.08415)
        if DTYPE.primitive_bitwidth == 16:
            distance, tail = normal_tail(x)
            return tl.maximum(x, 0.0) - distance * tail
        else:
            return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        inner, _ = sigmoid_argument(x, ACTIVATION)
        return x * tl.sigmoid(inner)


@triton.jit
def activate_with_gradient(x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """`activate` and its derivative, which share the costly part."""
    if ACTIVATION == "gelu":  # Phi(x) + x * phi(x)
        if DTYPE.primitive_bitwidth == 16:
            distance, tail = normal_tail(x)
            beyond = tail * hazard(distance)
            return tl.maximum(x, 0.0) - distance * tail, tl.where(x > 0.0, 1.0 + beyond, -beyond)
        else:
            cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
            return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:  # x * s(u(x)): s + x * s * (1 - s) * u'(x)
        inner, slope = sigmoid_argument(x, ACTIVATION)
        s = tl.sigmoid(inner)
        return x * s, s + x * s * (1.0 - s) * slope


# The two polynomials have the least largest error on 0 <= u <= 6.5, relative to what they are for. With them GELU is
# within 0.02 units in the last place of a float16 (0.002 of a bfloat16) of exact, also in the negative tail, where
# 0.5 x (1 + erf(x / sqrt(2))) in float32 loses all digits to 1 + erf; beyond 6.5 it is off by 3e-10 at most. It takes
# 11 instructions an element in code for sm_90, one of them an exponential; with the erf of CUDA's library, 32.


@triton.jit
def normal_tail(x):
    """u = |x|, at most 6.5, and Phi(-u) = 2^p(u), p being a polynomial."""
    # Without propagate_nan a GPU takes 6.5 for NaN.
    u = tl.minimum(tl.abs(x), 6.5, propagate_nan=tl.PropagateNan.ALL)
    p = -1.7577771e-06 * u + 5.9936592e-05
    p = p * u - 9.163630e-04
    p = p * u + 8.4473854e-03
    p = p * u - 5.3824503e-02
    p = p * u - 4.5861572e-01
    p = p * u - 1.1511801e00
    p = p * u - 1.0000038e00
    return u, tl.exp2(p)


@triton.jit
def hazard(u):
    """u phi(u) / Phi(-u) - 1, as a polynomial: GELU'(-u) = -Phi(-u) * that."""
    h = 8.832019e-06 * u - 2.5631339e-04
    h = h * u + 3.2381965e-03
    h = h * u - 2.3684932e-02
    h = h * u + 1.1247289e-01
    h = h * u + 6.3526672e-01
    h = h * u + 7.9809844e-01
    return h * u - 1.0000061e00


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

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
    """`tl.dot`'s input_precision for float32, by torch's own switch: "highest" means full precision, else TF32 will do."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@triton.jit
def widen(x):
    """x in the dtype that sums are kept in: float64 for float64, float32 for everything else."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def gelu(x):
    """x * Phi(x), exact (arXiv 1606.08415)."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_gradient(x):
    """Phi(x) + x * phi(x)."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


# tanh(u) = 2 * sigmoid(2u) - 1, so 0.5 * (1 + tanh(u)) = sigmoid(2u); libdevice's tanh is not in the interpreter.
@triton.jit
def gelu_tanh(x):
    """0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def gelu_tanh_gradient(x):
    s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)


@triton.jit
def quick_gelu(x):
    """x * sigmoid(1.702 x), the GELU of OpenAI's CLIP."""
    return x * tl.sigmoid(1.702 * x)


@triton.jit
def quick_gelu_gradient(x):
    s = tl.sigmoid(1.702 * x)
    return s + 1.702 * x * s * (1.0 - s)


@triton.jit
def silu(x):
    """x * sigmoid(x)."""
    return x * tl.sigmoid(x)


@triton.jit
def silu_gradient(x):
    s = tl.sigmoid(x)
    return s + x * s * (1.0 - s)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of that name; the names are the reference's."""
    if ACTIVATION == "gelu":
        return gelu(x)
    elif ACTIVATION == "gelu_tanh":
        return gelu_tanh(x)
    elif ACTIVATION == "quick_gelu":
        return quick_gelu(x)
    else:
        tl.static_assert(ACTIVATION == "silu", "unknown activation")
        return silu(x)


@triton.jit
def activation_gradient(x, ACTIVATION: tl.constexpr):
    """The derivative of `activate`."""
    if ACTIVATION == "gelu":
        return gelu_gradient(x)
    elif ACTIVATION == "gelu_tanh":
        return gelu_tanh_gradient(x)
    elif ACTIVATION == "quick_gelu":
        return quick_gelu_gradient(x)
    else:
        tl.static_assert(ACTIVATION == "silu", "unknown activation")
        return silu_gradient(x)

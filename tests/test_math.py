"""The kernels' own mathematics, on every number there is."""

import math

import pytest
import torch
import triton
import triton.language as tl
from fastvit.kernels._math import activate, activate_with_gradient

from fastvit import reference


@triton.jit
def activations_kernel(x_ptr, y_ptr, beside_ptr, derivative_ptr, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    i = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, activate(x, ACTIVATION, DTYPE))
    y, derivative = activate_with_gradient(x, ACTIVATION, DTYPE)
    tl.store(beside_ptr + i, y)
    tl.store(derivative_ptr + i, derivative)


def activations(x: torch.Tensor, activation: str, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation of each of x in float32, and its derivative, for a result in `dtype`."""
    y, beside, derivative = (torch.empty_like(x) for _ in range(3))
    activations_kernel[(x.numel() // 1024,)](x, y, beside, derivative, activation, dtype)
    assert torch.equal(y.nan_to_num(7), beside.nan_to_num(7))
    return y, derivative


def every_number(dtype: torch.dtype) -> torch.Tensor:
    """All 65536 numbers of a 16-bit dtype in float32, NaN and the infinities among them."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()


def gelu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """GELU and its derivative in float64, with no cancellation."""
    x = x.double()
    cdf = 0.5 * torch.special.erfc(-x / math.sqrt(2))
    return x * cdf, cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def unit(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance between two neighbours in `dtype` at float64 values."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(value.abs().clamp(min=info.smallest_normal))
    return info.eps * torch.exp2((exponent - 1).double())


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.002), (torch.float16, 0.02)], ids=["bfloat16", "float16"])
def test_gelu_for_16_bit_results_is_exact_but_for_a_fiftieth_of_a_rounding(dtype, limit):
    x = every_number(dtype)
    x = torch.cat([x, x * 1.003])  # not only numbers that are rounded already
    x = x[: len(x) // 1024 * 1024]
    y, derivative = activations(x, "gelu", tl.float16 if dtype == torch.float16 else tl.bfloat16)
    true, true_derivative = gelu(x)
    near = x.abs() <= 6.5
    assert ((y - true).abs() / unit(true, dtype))[near].max() <= limit
    far = x.isfinite() & ~near
    assert (y - true)[far].abs().max() <= 3e-10
    assert (derivative - true_derivative)[near].abs().max() <= 6e-6
    assert (derivative - true_derivative)[far].abs().max() <= 2e-9


def test_gelu_keeps_nan_and_infinity():
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0] + [1.0] * 1019)
    for dtype in (tl.float16, tl.float32):
        y, derivative = activations(x, "gelu", dtype)
        assert y[0].isnan() and derivative[0].isnan()
        assert y[1] == math.inf
        if dtype == tl.float16:  # where float32's formula, as PyTorch's, has NaN for -inf
            assert abs(y[2]) < 1e-9 and derivative[1] == 1 and abs(derivative[2]) < 1e-8
        assert y[3] == 0 and y[4] == 0


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "silu"])
def test_activations_for_float32_results(activation):
    x = torch.linspace(-12, 12, 8192)
    y, derivative = activations(x, activation, tl.float32)
    wide = x.double().requires_grad_()
    true = reference.ops.ACTIVATIONS[activation](wide)
    (true_derivative,) = torch.autograd.grad(true.sum(), wide)
    rounding = torch.finfo(torch.float32).eps * x.abs().clamp(min=1)
    assert ((y - true).abs() / rounding).max() <= 4
    assert ((derivative - true_derivative).abs() / rounding).max() <= 4

"""layer_norm beyond the contract: extreme rows, eps, sums over many rows, bad input."""

import pytest
import torch
from samples import bad_call

import fastvit
from fastvit import ops, reference
from fastvit.accuracy import FACTOR, relative_rms

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.mark.parametrize("dim", [1, 3, 64, 100, 768, 1536])
def test_row_lengths(dim, device):
    x = (3 + torch.randn(13, dim, device=device)).requires_grad_()
    weight, bias = torch.randn(dim, device=device), torch.randn(dim, device=device)
    out, truth = ops.layer_norm(x, weight, bias), reference.layer_norm(x.double(), weight.double(), bias.double())
    assert relative_rms(out, truth) < 2e-6
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, x, upstream)
    (expected,) = torch.autograd.grad(truth, x, upstream.double())
    assert (grad - expected).norm() <= 2e-6 * upstream.norm() * weight.norm()


@pytest.mark.parametrize("mean", [0.0, 8.0, 1000.0])
def test_statistics_survive_a_large_mean(mean, device):
    x = torch.randn(64, 192, device=device) + mean
    one, zero = torch.ones(192, device=device), torch.zeros(192, device=device)
    truth = reference.layer_norm(x.double(), one.double(), zero.double())
    plain = relative_rms(reference.layer_norm(x, one, zero), truth)
    assert relative_rms(ops.layer_norm(x, one, zero), truth) <= FACTOR[torch.float32] * plain


@pytest.mark.parametrize("value", [0.1, pytest.param(3.3, marks=pytest.mark.slow), 1e10, 1e17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_constant_rows_give_the_bias(value, dtype, device):
    """A mean that is off by one rounding, over sqrt(1e-12), would be a value of its own."""
    for dim in (64, 192, 768, 1000):
        x = torch.full((3, dim), value, dtype=dtype, device=device)
        weight, bias = torch.ones(dim, device=device, dtype=dtype), torch.randn(dim, device=device).to(dtype)
        assert torch.equal(ops.layer_norm(x, weight, bias, 1e-12), bias.expand(3, dim))
        if device == "cpu":  # what PyTorch does on a GPU is its own affair
            with fastvit.use_backend("torch"):
                assert torch.equal(ops.layer_norm(x, weight, bias, 1e-12), bias.expand(3, dim))
        eye = torch.eye(dim, device=device, dtype=dtype)
        assert torch.equal(ops.layer_norm_linear(x, weight, bias, eye, eps=1e-12), bias.expand(3, dim))


@pytest.mark.parametrize("noise", [1e-7, 1e-6, 1e-3])
def test_nearly_constant_rows(noise, device):
    x = 3.3 * (1 + noise * torch.randn(16, 768, device=device))
    one, zero = torch.ones(768, device=device), torch.zeros(768, device=device)
    truth = reference.layer_norm(x.double(), one.double(), zero.double(), 1e-12)
    plain = relative_rms(reference.layer_norm(x, one, zero, 1e-12), truth)
    assert relative_rms(ops.layer_norm(x, one, zero, 1e-12), truth) <= FACTOR[torch.float32] * plain


@pytest.mark.parametrize("size", [1e-20, 1e10, 1e16])
def test_both_back_ends_agree_from_the_smallest_to_the_largest_values(size, device):
    """Up to where squares overflow float32."""
    x = size * torch.randn(16, 768, device=device)
    one, zero = torch.ones(768, device=device), torch.zeros(768, device=device)
    truth = reference.layer_norm(x.double(), one.double(), zero.double(), 1e-12)
    for backend in ("torch", "triton"):
        with fastvit.use_backend(backend):
            out = ops.layer_norm(x, one, zero, 1e-12)
        assert (out - truth).norm() <= 1e-6 * truth.norm()


def test_eps_is_the_one_asked_for(device):
    x = 1e-3 * torch.randn(7, 64, device=device)
    one, zero = torch.ones(64, device=device), torch.zeros(64, device=device)
    eye = torch.eye(64, device=device)
    for eps in (1e-12, 1e-6, 1e-5):
        truth = reference.layer_norm(x.double(), one.double(), zero.double(), eps)
        assert relative_rms(ops.layer_norm(x, one, zero, eps), truth) < 1e-6
        assert relative_rms(ops.layer_norm_linear(x, one, zero, eye, eps=eps), truth) < 1e-6


def test_rows_too_long_for_the_kernels_run_in_torch(device):
    x = torch.randn(2, 8200, device=device)
    one = torch.ones(8200, device=device)
    assert "at most 8192" in str(fastvit.explain("layer_norm", x, one, one))
    with fastvit.use_backend("auto"):
        assert torch.equal(ops.layer_norm(x, one, one), reference.layer_norm(x, one, one))


def test_parameter_gradients_of_many_rows(device):
    """Several rows a program, and several programs."""
    x = (3 + torch.randn(600, 1100, device=device)).requires_grad_()
    weight = torch.randn(1100, device=device, requires_grad=True)
    bias = torch.randn(1100, device=device, requires_grad=True)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    upstream = torch.randn_like(x)
    got = torch.autograd.grad(ops.layer_norm(x, weight, bias), (x, weight, bias), upstream)
    expected = torch.autograd.grad(reference.layer_norm(*wide), wide, upstream.double())
    for value, truth in zip(got, expected, strict=True):
        assert relative_rms(value, truth) < 1e-5


def test_column_sum_of_many_rows(device):
    from fastvit.kernels.reduce import column_sum

    x, scale = torch.randn(4200, 130, device=device), torch.randn(3, device=device)
    truth = (x.double().view(3, 1400, 130) * scale.double()[:, None, None]).sum(dim=(0, 1))
    assert relative_rms(column_sum(x, scale), truth) < 1e-6


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": torch.zeros(25)}, ValueError, r"norm weight must have shape \(D,\) = \(24,\), got"),
        ({"x": torch.zeros(24)}, ValueError, "at least 2 dimensions"),
        ({"x": torch.zeros(2, 24, dtype=torch.int64)}, TypeError, "x must have a floating-point dtype"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        bad_call("layer_norm", changes)

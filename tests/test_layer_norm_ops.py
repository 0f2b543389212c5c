"""layer_norm, layer_norm_linear, linear_residual and layer_norm_mlp beyond the contract."""

import inspect

import pytest
import samples
import torch
from samples import SAMPLES, gradients, results

import fastvit
from fastvit import ops, reference
from fastvit.accuracy import FACTOR, limit, relative_rms
from fastvit.reference.ops import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("triton_backend")
BY_NAME = {sample.name: sample for sample in SAMPLES}


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


@pytest.mark.parametrize("value", [0.1, 3.3, 1e10, 1e17])
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


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_are_the_ones_asked_for(activation, device):
    """Each differs from the others by far more than its own error: a mixed-up name would show."""
    sample = BY_NAME["layer_norm_mlp"]
    tensors = sample.tensors(device=device)
    wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    out, truth = (
        module.layer_norm_mlp(**t, activation=activation) for module, t in ((ops, tensors), (reference, wide))
    )
    assert relative_rms(out, truth) < 1e-6
    upstream = torch.randn_like(out)
    expected = gradients(truth, wide, upstream.double())
    for name, grad in gradients(out, tensors, upstream).items():
        assert relative_rms(grad, expected[name]) < 1e-5, name
    for other in set(ACTIVATIONS) - {activation}:
        assert relative_rms(reference.layer_norm_mlp(**wide, activation=other), truth) > 1e-5


def test_residual_that_is_x_gets_one_fused_gradient(device):
    tensors = BY_NAME["layer_norm_mlp"].tensors(device=device)
    wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    out = ops.layer_norm_mlp(**tensors, residual=tensors["x"])
    truth = reference.layer_norm_mlp(**wide, residual=wide["x"])
    assert relative_rms(out, truth) < 1e-6
    upstream = torch.randn_like(out)
    got, expected = gradients(out, tensors, upstream), gradients(truth, wide, upstream.double())
    for name in got:
        assert relative_rms(got[name], expected[name]) < 1e-5, name
    # Shown as another tensor, the same residual gets its gradient by itself.
    other = tensors["x"].detach().clone().requires_grad_()
    out = ops.layer_norm_mlp(**tensors, residual=other)
    dx, dresidual = torch.autograd.grad(out, [tensors["x"], other], upstream)
    assert torch.equal(dresidual, upstream)
    assert relative_rms(dx + dresidual, expected["x"]) < 1e-5


@pytest.mark.parametrize("name", ["layer_norm_linear", "linear_residual", "layer_norm_mlp-residual"])
def test_float32_stream_beside_bfloat16_weights(name, device):
    """x and residual in float32, weights in bfloat16: the stream stays float32, and errors are plain PyTorch's."""
    sample = BY_NAME[name]
    tensors = sample.tensors(device=device)
    for key in tensors:
        if key not in ("x", "residual", "norm_weight", "norm_bias", "drop_path_scale"):
            tensors[key] = tensors[key].detach().bfloat16().requires_grad_()
    wide = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in tensors.items()}
    out, plain, truth = sample.run(tensors), sample.run(tensors, reference), sample.run(wide, reference)
    assert out.dtype == plain.dtype == (torch.bfloat16 if name == "layer_norm_linear" else torch.float32)
    assert relative_rms(out, truth) <= FACTOR[torch.bfloat16] * relative_rms(plain, truth)
    upstream = torch.randn_like(out)
    got, by_torch = gradients(out, tensors, upstream), gradients(plain, tensors, upstream)
    expected = gradients(truth, wide, upstream.double())
    for key, grad in got.items():
        assert grad.dtype == tensors[key].dtype
        most = limit(torch.bfloat16, relative_rms(by_torch[key], expected[key]), 1e-7)
        assert relative_rms(grad, expected[key]) <= most, key


@pytest.mark.parametrize("name", ["layer_norm_linear", "linear_residual", "layer_norm_mlp-residual"])
def test_many_tiles(name, device, monkeypatch):
    """More row tiles than a group of them, several column tiles, weight gradients summed in parts."""
    for size, value in (("N", 301), ("D", 66), ("M", 70)):
        monkeypatch.setattr(samples, size, value)
    tensors = BY_NAME[name].tensors(device=device)
    wide = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in tensors.items()}
    got, truth = results(BY_NAME[name], tensors), results(BY_NAME[name], wide, reference)
    for key, value in got.items():
        assert relative_rms(value, truth[key]) < 1e-5, key


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


@pytest.mark.parametrize("trained", [True, False])
def test_pre_activation_is_kept_only_for_a_backward_pass(trained, device, monkeypatch):
    kept = []
    operator = inspect.getmodule(ops.layer_norm_mlp).FORWARD
    forward = operator.of(torch.empty(0, device=device))
    monkeypatch.setattr(operator, "of", lambda tensor: lambda *args: kept.append(forward(*args)) or kept[-1])
    with torch.set_grad_enabled(trained):
        BY_NAME["layer_norm_mlp"].run(BY_NAME["layer_norm_mlp"].tensors(device=device))
    assert (kept[0][3] is not None) == trained


def test_residual_that_is_x_beside_a_strided_output_gradient(device):
    tensors = BY_NAME["layer_norm_mlp"].tensors(device=device)
    out = ops.layer_norm_mlp(**tensors, residual=tensors["x"])
    wide = torch.randn(*out.shape[:-1], 2 * out.shape[-1], device=device)[..., : out.shape[-1]]
    expected = gradients(out, tensors, wide.contiguous())
    out = ops.layer_norm_mlp(**tensors, residual=tensors["x"])
    for name, value in gradients(out, tensors, wide).items():
        assert torch.equal(value, expected[name]), name


def test_float32_residual_that_is_x_keeps_its_dtype(device):
    tensors = BY_NAME["layer_norm_mlp"].tensors(torch.bfloat16, device)
    tensors["x"] = tensors["x"].detach().float().requires_grad_()
    out = ops.layer_norm_mlp(**tensors, residual=tensors["x"])
    compiled = torch.compile(ops.layer_norm_mlp, fullgraph=True, backend="aot_eager")
    assert out.dtype == compiled(**tensors, residual=tensors["x"]).dtype == torch.float32
    assert out.dtype == reference.layer_norm_mlp(**tensors, residual=tensors["x"]).dtype


@pytest.mark.parametrize("size", ["M", "N"])
def test_empty_axes(size, device, monkeypatch):
    """No hidden channels, no tokens: results of the right shape, and what remains of the formula."""
    monkeypatch.setattr(samples, size, 0)
    for sample in (BY_NAME["layer_norm_linear"], BY_NAME["linear_residual"], BY_NAME["layer_norm_mlp-residual"]):
        tensors = sample.tensors(device=device)
        got, plain = results(sample, tensors), results(sample, tensors, reference)
        for key, value in plain.items():
            torch.testing.assert_close(got[key], value, msg=f"{sample} {key}")


def test_dropped_samples_pass_through(device):
    tensors = BY_NAME["linear_residual"].tensors(device=device)
    out = BY_NAME["linear_residual"].run(tensors)
    assert torch.equal(out[1], tensors["residual"][1])
    assert not torch.equal(out[0], tensors["residual"][0])


def bad(name, changes):
    sample = BY_NAME[name]
    tensors = {key: tensor.detach() for key, tensor in sample.tensors().items()}
    options = {**sample.options, **{k: v for k, v in changes.items() if not isinstance(v, torch.Tensor)}}
    tensors.update({k: v for k, v in changes.items() if isinstance(v, torch.Tensor)})
    return getattr(ops, sample.op)(**tensors, **options)


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("layer_norm", {"weight": torch.zeros(25)}, ValueError, r"norm weight must have shape \(D,\) = \(24,\), got"),
        ("layer_norm", {"x": torch.zeros(24)}, ValueError, "at least 2 dimensions"),
        ("layer_norm", {"x": torch.zeros(2, 24, dtype=torch.int64)}, TypeError, "x must have a floating-point dtype"),
        ("layer_norm_linear", {"weight": torch.zeros(40, 25)}, ValueError, r"weight must have shape \(O, D\) with 24"),
        ("layer_norm_linear", {"bias": torch.zeros(41)}, ValueError, r"bias must have shape \(O,\) = \(40,\)"),
        (
            "layer_norm_linear",
            {"x": torch.zeros(2, 24).bfloat16()},
            TypeError,
            "x is torch.bfloat16, but weight is torch",
        ),
        (
            "layer_norm_linear",
            {"bias": torch.zeros(40).half()},
            TypeError,
            "bias is torch.float16, but weight is torch",
        ),
        ("linear_residual", {"residual": torch.zeros(2, 21, 25)}, ValueError, "residual must have shape"),
        ("linear_residual", {"layer_scale": torch.zeros(25)}, ValueError, "layer_scale must have shape"),
        ("linear_residual", {"drop_path_scale": torch.zeros(3)}, ValueError, r"drop_path_scale must have shape \(B,\)"),
        ("linear_residual", {"drop_path_scale": torch.ones(2, requires_grad=True)}, ValueError, "not differentiable"),
        ("layer_norm_mlp", {"fc2_weight": torch.zeros(24, 41)}, ValueError, r"fc2_weight must have shape \(O, M\)"),
        (
            "layer_norm_mlp",
            {"fc2_weight": torch.zeros(24, 40).half()},
            TypeError,
            "fc2_weight is torch.float16, but fc1",
        ),
        (
            "layer_norm_mlp",
            {"activation": "relu"},
            ValueError,
            "unknown activation 'relu', expected one of gelu, gelu_tanh",
        ),
    ],
)
def test_bad_input(name, changes, error, message):
    with pytest.raises(error, match=message):
        bad(name, changes)

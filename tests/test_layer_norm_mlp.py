"""layer_norm_mlp beyond the contract, and what holds of layer_norm_linear and linear_residual, its parts, too."""

import inspect

import pytest
import samples
import torch
from samples import BY_NAME, bad_call, gradients, results

from fastvit import ops, reference
from fastvit.accuracy import FACTOR, limit, relative_rms
from fastvit.reference.ops import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("triton_backend")


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


@pytest.mark.parametrize("trained", [True, False])
def test_pre_activation_is_kept_only_for_a_backward_pass(trained, device, monkeypatch):
    kept = []
    operator = inspect.getmodule(ops.layer_norm_mlp).FORWARD
    forward = operator.of(torch.empty(0, device=device))
    monkeypatch.setattr(operator, "of", lambda *tensors: lambda *args: kept.append(forward(*args)) or kept[-1])
    with torch.set_grad_enabled(trained):
        BY_NAME["layer_norm_mlp"].run(BY_NAME["layer_norm_mlp"].tensors(device=device))
    assert (kept[0][3] is not None) == trained


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


@pytest.mark.parametrize("size", ["M", "N"])
def test_empty_axes(size, device, monkeypatch):
    """No hidden channels, no tokens: results of the right shape, and what remains of the formula."""
    monkeypatch.setattr(samples, size, 0)
    for sample in (BY_NAME["layer_norm_linear"], BY_NAME["linear_residual"], BY_NAME["layer_norm_mlp-residual"]):
        tensors = sample.tensors(device=device)
        got, plain = results(sample, tensors), results(sample, tensors, reference)
        for key, value in plain.items():
            torch.testing.assert_close(got[key], value, msg=f"{sample} {key}")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fc2_weight": torch.zeros(24, 41)}, ValueError, r"fc2_weight must have shape \(O, M\)"),
        ({"fc2_weight": torch.zeros(24, 40).half()}, TypeError, "fc2_weight is torch.float16, but fc1"),
        ({"activation": "relu"}, ValueError, "unknown activation 'relu', expected one of gelu, gelu_tanh"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        bad_call("layer_norm_mlp", changes)

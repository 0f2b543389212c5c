"""oneDNN's linear layers under the ops, on a CPU in inference mode."""

from __future__ import annotations

import math

import pytest
import torch

import fastvit
from fastvit import accuracy, dispatch, onednn, reference


@pytest.fixture(autouse=True)
def pays(monkeypatch):
    """As on a machine where it is faster."""
    if not onednn.available(torch.float32):
        pytest.skip("PyTorch has no oneDNN here")
    monkeypatch.setattr(onednn, "speedup", lambda: 2.0)
    monkeypatch.setattr(dispatch, "_requested", "auto")
    dispatch.forget()
    yield
    dispatch.forget()


def arguments(op: str, rows=(2, 5), dtype=torch.float32, **more) -> dict:
    def of(*shape):
        return torch.randn(*shape).to(dtype)

    norm = {"x": of(*rows, 12), "norm_weight": of(12), "norm_bias": of(12)}
    return {
        "layer_norm_linear": norm | {"weight": of(20, 12), "bias": of(20)},
        "linear_residual": {"x": of(*rows, 12), "weight": of(20, 12), "bias": of(20), "residual": of(*rows, 20)},
        "layer_norm_mlp": norm | {"fc1_weight": of(24, 12), "fc1_bias": of(24), "fc2_weight": of(12, 24),
                                  "fc2_bias": of(12), "residual": norm["x"]},
    }[op] | more  # fmt: skip


OPS = ("layer_norm_linear", "linear_residual", "layer_norm_mlp")
MORE = {
    "as it is": (OPS, {}),
    "no bias": (OPS[:2], {"bias": None}),
    "layer scale": (OPS[1:], {"layer_scale": torch.linspace(0.5, 2, 20)}),
    "drop path": (OPS[1:], {"drop_path_scale": torch.tensor([0.0, 2.0])}),
    "no residual": (OPS[2:], {"residual": None}),
    "quick gelu": (OPS[2:], {"activation": "quick_gelu"}),
    "tanh gelu": (OPS[2:], {"activation": "gelu_tanh"}),
    "silu": (OPS[2:], {"activation": "silu"}),
}


@pytest.mark.parametrize("op, more", [(op, name) for name, (ops, _) in MORE.items() for op in ops])
def test_results(op, more):
    given = arguments(op, **MORE[more][1])
    if "layer_scale" in given and op == "layer_norm_mlp":
        given["layer_scale"] = given["layer_scale"][:12]
    with torch.inference_mode():
        args = dispatch.OPS[op].parameters
        ways = dict.fromkeys(args) | {"eps": 1e-6, "activation": "gelu"} | given
        found = dispatch.OPS[op].explain(*[ways[name] for name in args])
        assert found.candidate == "onednn" and found.backend == "torch"
        assert found.evidence == ("oneDNN multiplies float32 2.00 times as fast as PyTorch's own product here",)
        got = getattr(fastvit.ops, op)(**given)
    precise = accuracy.precise(given)
    truth = getattr(reference, op)(**precise)
    plain = accuracy.relative_rms(getattr(reference, op)(**given), truth)
    assert accuracy.relative_rms(got, truth) <= accuracy.limit(torch.float32, plain)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(1, 1), (3,), (2, 3, 4)])
def test_strides_and_shapes(op, shape):
    given = arguments(op, shape)
    strided = {
        name: value.repeat_interleave(2, -1)[..., ::2] if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
    }
    with torch.inference_mode():
        got = getattr(fastvit.ops, op)(**strided)
    want = getattr(reference, op)(**given)
    assert got.shape == want.shape and accuracy.relative_rms(got, want) < 1e-6


def ran(given: dict, op: str = "layer_norm_linear") -> str:
    """What a call ran on, by the function that dispatch chose."""
    found = []
    chosen = dispatch.OPS[op]
    args = dict.fromkeys(chosen.parameters) | {"eps": 1e-6, "activation": "gelu"} | given
    run, _ = dispatch.choose(chosen, tuple(args[name] for name in chosen.parameters))
    found.append("onednn" if run is chosen.onednn else "torch" if run is chosen.torch else "other")
    return found[0]


def test_only_where_it_was_asked_for():
    """In inference mode, in float32, under "auto", on plain tensors; and what is remembered does not leak."""
    given = arguments("layer_norm_linear")
    for _ in range(2):
        with torch.inference_mode():
            assert ran(given) == "onednn"
        assert ran(given) == "torch"
        with torch.no_grad():
            assert ran(given) == "torch"
    with torch.inference_mode():
        with fastvit.use_backend("torch"):
            assert ran(given) == "torch"
        with torch.autocast("cpu", torch.bfloat16):
            assert ran(given) == "torch"
        assert ran(arguments("layer_norm_linear", dtype=torch.float64)) == "torch"
        assert ran(arguments("layer_norm_linear", rows=(0, 5))) == "torch"


def test_not_where_it_is_slower(monkeypatch):
    monkeypatch.setattr(onednn, "speedup", lambda: 1.01)
    with torch.inference_mode():
        assert ran(arguments("layer_norm_linear")) == "torch"


def test_numbers_to_the_bit_with_the_switch():
    model = fastvit.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = model(images)
    with torch.inference_mode():
        by_onednn = model(images)
        with fastvit.use_backend("torch"):
            assert torch.equal(model(images), want)
    assert accuracy.relative_rms(by_onednn, want) < 2e-6


def test_measured_speed(monkeypatch):
    monkeypatch.undo()
    speed = onednn.speedup()
    assert math.isfinite(speed) and 0.05 < speed < 50 and onednn.speedup() == speed


@pytest.mark.parametrize("error", [RuntimeError, AttributeError])
def test_operators_that_changed(monkeypatch, error):
    """What PyTorch takes away, or makes compute something else, is not used."""

    def raising(*_):
        raise error("gone")

    onednn.available.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(onednn, "pack", raising)
            assert not onednn.available(torch.float32)
        onednn.available.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(onednn, "ACTIVATIONS", onednn.ACTIVATIONS | {"gelu": ("none", None)})
            assert not onednn.available(torch.float32)
    finally:
        onednn.available.cache_clear()


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize("activation", onednn.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights(rows, activation, dtype):
    """One layout serves any number of rows, and gives the weight back to the bit."""
    if not onednn.available(dtype):
        pytest.skip("without AVX-512 oneDNN has no packed bfloat16 weights")
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((rows, 40), (24, 40), (24,)))
    packed = onednn.pack(weight)
    assert torch.equal(packed.to_dense(), weight)
    got = onednn.linear(x, packed, bias, activation)
    truth = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    truth = truth if activation is None else reference.ops.ACTIVATIONS[activation](truth)
    assert accuracy.relative_rms(got, truth) < 3 * accuracy.floor(dtype)

"""What every op refuses, and how clearly: see "The contract of an op" in docs/architecture.md."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from samples import SAMPLES, every_op

import fastvit
from fastvit import examples, ops

pytestmark = pytest.mark.usefixtures("triton_backend")


@every_op
def test_all_reasons_are_given(sample):
    """Asked for kernels that cannot run, an op lists every reason, and `explain` lists the same."""
    tensors = sample.tensors(device="meta")
    explanation = fastvit.explain(sample.op, **tensors, **sample.options)
    assert explanation.backend == "torch"
    assert any("meta" in reason for reason in explanation.reasons)
    with pytest.raises(RuntimeError) as error:
        sample.run(tensors)
    for reason in explanation.reasons:
        assert reason in str(error.value)


@every_op
def test_mixed_devices_are_refused(sample):
    tensors = sample.tensors()
    last = [name for name in tensors if name not in ("x", "qkv", "image")][-1:]
    if not last:
        pytest.skip("one tensor cannot be on two devices")
    (last,) = last
    tensors[last] = tensors[last].to("meta")
    with pytest.raises(ValueError, match=f"{last.removeprefix('norm_')} is on meta"):
        sample.run(tensors)


@every_op
def test_none_for_a_required_tensor_is_refused(sample):
    optional = {"bias", "residual", "layer_scale", "drop_path_scale", "key_padding_mask", "attn_bias"}
    optional |= {"fc1_bias", "fc2_bias", "pos_embed", "prefix", "qkv_bias", "proj_bias", *examples.BLOCK_SCALES}
    optional |= {"rope_cos", "rope_sin"}
    optional -= {"bias"} if sample.op == "layer_norm" else {"residual"} if sample.op == "linear_residual" else set()
    for name in sample.tensors():
        tensors = {**sample.tensors(), name: None}
        if name in optional:
            if name == "prefix":
                tensors["pos_embed"] = None  # which may have rows for it
            if name in examples.ROPE:
                tensors |= dict.fromkeys(examples.ROPE)  # come together
            sample.run(tensors)
        else:
            for backend in ("torch", "triton"):
                with fastvit.use_backend(backend), pytest.raises(TypeError, match=f"{name} must be .*, got NoneType"):
                    sample.run(tensors)


BAD_NUMBERS = [
    (None, TypeError, "None"),
    ("1e-6", TypeError, "'1e-6'"),
    (True, TypeError, "True"),
    (torch.tensor(1e-6), TypeError, "tensor"),
    (float("nan"), ValueError, "nan"),
    (float("inf"), ValueError, "inf"),
    (0, ValueError, "0"),
    (-1e-6, ValueError, "-1e-06"),
]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("value, error, got", BAD_NUMBERS, ids=[str(row[0]) for row in BAD_NUMBERS])
def test_what_is_no_number_is_refused(value, error, got, backend):
    """eps of every norm; the scale and dropout of attention, where None is the default, and 0 is a number; std."""
    with fastvit.use_backend(backend):
        for sample in SAMPLES:
            tensors = sample.tensors()
            if sample.op.startswith("layer_norm"):
                name, arguments = "eps", {"eps": value}
            elif sample.op == "attention" and (value or value is None):
                name = "scale" if value is not None and value != -1e-6 else "dropout_p"
                arguments = {name: value}
            elif sample.op == "patch_embed":
                name, arguments = "std", {"std": (0.5, 0.5, value)}
            else:
                continue
            with pytest.raises(error, match=f"{sample.op}: {name} must be .*got {got}"):
                getattr(ops, sample.op)(**tensors, **{**sample.options, **arguments})


def test_numpys_numbers_are_numbers(device):
    x, one = torch.randn(2, 8, device=device), torch.ones(8, device=device)
    assert torch.equal(
        ops.layer_norm(x, one, one, np.float32(1e-5)), ops.layer_norm(x, one, one, float(np.float32(1e-5)))
    )


@every_op
def test_integer_weights_are_refused(sample):
    tensors = sample.tensors()
    name = next((name for name in tensors if "weight" in name), "qkv")
    tensors[name] = tensors[name].detach().int()
    with pytest.raises(TypeError, match="floating-point"):
        sample.run(tensors)

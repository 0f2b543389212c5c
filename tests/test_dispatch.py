"""Which back end runs an op, and what it says of it."""

import os
import subprocess
import sys
import types

import pytest
import torch

import fastvit
from fastvit import dispatch, ops


def test_auto_takes_torch_on_the_cpu():
    x, weight = torch.randn(2, 8), torch.ones(8)
    explanation = fastvit.explain("layer_norm", x, weight, weight)
    assert explanation.backend == "torch"
    assert "CPU" in explanation.reasons[0]


def test_the_back_end_is_restored_even_after_an_error():
    with pytest.raises(ZeroDivisionError), fastvit.use_backend("triton"):
        assert dispatch.requested_backend() == "triton"
        with fastvit.use_backend("torch"):
            assert dispatch.requested_backend() == "torch"
        assert dispatch.requested_backend() == "triton"
        raise ZeroDivisionError
    assert dispatch.requested_backend() == "auto"


def test_a_back_end_that_is_not_asked_for_in_a_with_body_stands():
    try:
        fastvit.use_backend("torch")
        assert dispatch.requested_backend() == "torch"
        with fastvit.use_backend("triton"):
            assert dispatch.requested_backend() == "triton"
        assert dispatch.requested_backend() == "torch"
    finally:
        fastvit.use_backend("auto")
    assert dispatch.requested_backend() == "auto"


def test_a_back_end_for_a_function():
    @fastvit.use_backend("torch")
    def asked():
        return dispatch.requested_backend()

    assert dispatch.requested_backend() == "auto"
    with fastvit.use_backend("triton"):
        assert asked() == "torch"
        assert dispatch.requested_backend() == "triton"


def test_unknown_names_are_refused():
    with (
        pytest.raises(ValueError, match="unknown back end 'cuda', expected one of auto, triton, torch"),
        fastvit.use_backend("cuda"),
    ):
        pass
    with pytest.raises(
        ValueError, match="unknown op 'softmax', expected one of attention, attention_varlen, layer_norm"
    ):
        fastvit.explain("softmax", torch.zeros(1))


def test_explain_checks_arguments_as_the_op_does():
    with pytest.raises(ValueError, match="norm weight must have shape"):
        fastvit.explain("layer_norm", torch.zeros(2, 8), torch.zeros(7), torch.zeros(8))


def run(code, **environment):
    kept = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "FASTVIT_BACKEND")}
    return subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True, check=False
    )


def test_backend_from_the_environment():
    code = "import fastvit.dispatch as d; print(d.requested_backend())"
    assert run(code, FASTVIT_BACKEND="torch").stdout.strip() == "torch"
    assert "FASTVIT_BACKEND: unknown back end 'gpu'" in run(code, FASTVIT_BACKEND="gpu").stderr


def test_triton_without_gpu_or_interpreter_is_one_clear_error():
    code = (
        "import torch, fastvit\n"
        "with fastvit.use_backend('triton'): fastvit.ops.layer_norm(torch.ones(2, 8), torch.ones(8), torch.ones(8))"
    )
    error = run(code).stderr.strip().splitlines()[-1]
    assert error.startswith("RuntimeError: back end 'triton' was asked for, but layer_norm cannot run on it: ")
    assert "TRITON_INTERPRET is not set" in error


def test_the_interpreter_needs_its_variable_alone():
    """Its numbers are the repaired ones: in bfloat16, stock, they are not."""
    code = (
        "import torch, fastvit\n"
        "x = torch.randn(4, 64).bfloat16(); one = torch.ones(64).bfloat16()\n"
        "want = fastvit.ops.layer_norm(x, one, one)\n"
        "with fastvit.use_backend('triton'): got = fastvit.ops.layer_norm(x, one, one)\n"
        "print((got.float() - want.float()).abs().max().item() <= 2**-6)"
    )
    done = run(code, TRITON_INTERPRET="1")
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize(("major", "reasons"), [(7, 1), (8, 0), (9, 0)])
def test_gpus_before_ampere_are_a_reason(major, reasons, monkeypatch):
    properties = types.SimpleNamespace(major=major, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    found = dispatch.missing_requirements(types.SimpleNamespace(device=torch.device("cuda:0")))
    assert found == ["compute capability 7.5, and the kernels need 8.0"][:reasons]


def test_no_triton_is_a_reason_not_a_crash(monkeypatch):
    monkeypatch.setattr(dispatch, "_has_triton", False)
    x, weight = torch.randn(2, 8), torch.ones(8)
    assert "Triton is not installed" in fastvit.explain("layer_norm", x, weight, weight).reasons
    assert torch.equal(ops.layer_norm(x, weight, weight), fastvit.reference.layer_norm(x, weight, weight))
    with fastvit.use_backend("triton"), pytest.raises(RuntimeError, match="Triton is not installed"):
        ops.layer_norm(x, weight, weight)


def test_a_decision_is_made_once_for_calls_that_are_alike(monkeypatch):
    decided, decide = [], dispatch._decide
    monkeypatch.setattr(dispatch, "_decide", lambda op, args: decided.append(op.name) or decide(op, args))
    x, one, trained = torch.randn(4, 8), torch.ones(8), torch.ones(8, requires_grad=True)
    weight, other = torch.randn(8, 8), torch.randn(4, 8)
    image, patches, rows = torch.randn(1, 1, 2, 4), torch.randn(8, 1, 2, 2), torch.randn(2, 8)

    def under(context, *args, **kwargs):
        with context:
            ops.layer_norm(*args, **kwargs)

    different = [
        lambda: ops.layer_norm(x, one, one),
        lambda: ops.layer_norm(x[:3], one, one),
        lambda: ops.layer_norm(x.double(), one, one),
        lambda: ops.layer_norm(x, one.double(), one),
        lambda: ops.layer_norm(other.T.contiguous().T, one, one),
        lambda: ops.layer_norm(x.to("meta"), one.to("meta"), one.to("meta")),
        lambda: ops.layer_norm(x, trained, one),
        lambda: ops.layer_norm(x, one, trained),
        lambda: under(torch.no_grad(), x, one, one),
        lambda: under(torch.autocast("cpu", torch.bfloat16), x, one, one),
        lambda: under(torch.autocast("cpu", torch.float16), x, one, one),
        lambda: torch.func.vmap(lambda x: ops.layer_norm(x, one, one))(x[None]),
        lambda: ops.layer_norm(x, one, one, 1.0),
        lambda: ops.layer_norm(x, one, one, 1),
        lambda: ops.linear_residual(x, weight, None, x),
        lambda: ops.linear_residual(x, weight, None, other),
        lambda: ops.linear_residual(x, weight, one, other),
        lambda: ops.patch_embed(image, patches, pos_embed=rows),
        lambda: ops.patch_embed(image, patches, prefix=rows),
    ]
    for count, call in enumerate(different, 1):
        call()
        call()
        assert len(decided) == count
    with pytest.raises(TypeError, match="eps must be a number, got True"):
        ops.layer_norm(x, one, one, True)
    with fastvit.use_backend("torch"):  # what decisions follow has changed
        different[0]()
    different[0]()
    assert len(decided) == len(different) + 3
    monkeypatch.setattr(dispatch, "REMEMBERED", 2)
    for call in different:
        call()
    assert len(dispatch._decisions) <= 2

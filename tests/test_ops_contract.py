"""What every op promises, held for all of them: see "The contract of an op" in docs/architecture.md."""

from __future__ import annotations

import functools
import inspect
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from fastvit.kernels import gemm
from samples import BATCHED, SAMPLES, B, D, gradients, results
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastvit
from fastvit import accuracy, dispatch, ops, reference
from fastvit.accuracy import relative_rms
from fastvit.dispatch import LIBRARY_GRADIENTS, interpreting

pytestmark = pytest.mark.usefixtures("triton_backend")
every_op = pytest.mark.parametrize("sample", SAMPLES, ids=str)
HALF = [torch.bfloat16, torch.float16]


def in_float64(sample, tensors):
    """The truth for these tensors: the reference in float64."""
    return results(sample, accuracy.precise(tensors), reference)


def assert_as_good_as_torch(sample, tensors, got, dtype):
    """Each tensor's error against float64 is within the limit of `dtype`, which is one rounding at least."""
    truth, plain = in_float64(sample, tensors), results(sample, tensors, reference)
    for name, value in got.items():
        assert value.dtype == plain[name].dtype, name
        assert value.shape == truth[name].shape, name
        limit = accuracy.limit(dtype, relative_rms(plain[name], truth[name]), accuracy.rounding(value.dtype))
        assert relative_rms(value, truth[name]) <= limit, name


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_matches_reference(sample, dtype, device):
    tensors = sample.tensors(dtype, device)
    assert_as_good_as_torch(sample, tensors, results(sample, tensors), dtype)


@every_op
def test_same_call_as_reference(sample):
    assert str(inspect.signature(getattr(ops, sample.op))) == str(inspect.signature(getattr(reference, sample.op)))


@every_op
@pytest.mark.skipif(not interpreting(), reason="float64 runs in the interpreter only")
def test_gradcheck(sample):
    tensors = sample.tensors(torch.float64)
    names = [name for name, tensor in tensors.items() if tensor.requires_grad]

    def function(*values):
        return sample.run({**tensors, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(function, [tensors[name] for name in names], fast_mode=True)


@every_op
@pytest.mark.parametrize("trained", ["all", "one", "none"])
def test_custom_ops_pass_opcheck(sample, trained, device, monkeypatch):
    """In float32 with all tensors trained; in bfloat16 beside a wider stream with one; in bfloat16 with none."""
    calls = []
    module = inspect.getmodule(getattr(ops, sample.op))
    for found in (module.FORWARD, module.BACKWARD):
        noted = lambda *args, op=found.operator: calls.append((op, args)) or op(*args)  # noqa: E731
        monkeypatch.setattr(found, "of", lambda *tensors, noted=noted: noted)
    tensors = sample.tensors(torch.float32 if trained == "all" else torch.bfloat16, device)
    if trained == "one":
        tensors = {n: t.detach().float() if n in ("x", "pos_embed") else t for n, t in tensors.items()}
    if trained != "all":
        last = [n for n, t in tensors.items() if t.requires_grad][-1]
        tensors = {n: t.detach().requires_grad_(trained == "one" and n == last) for n, t in tensors.items()}
    out = sample.run(tensors)
    if trained != "none":
        gradients(out, tensors, torch.ones_like(out))
    assert len(calls) == (1 if trained == "none" else 2)
    for op, args in calls:
        args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
        torch.library.opcheck(op, args)


class Wrapper(torch.Tensor):
    """As libraries have them that quantise or shard: not every one has its numbers where a tensor has them."""


@every_op
def test_launchers_are_called_straight_with_plain_tensors_only(sample, device, monkeypatch):
    module = inspect.getmodule(getattr(ops, sample.op))
    called = []
    for found in (module.FORWARD, module.BACKWARD):
        monkeypatch.setattr(found, "operator", lambda *a, op=found.operator, n=found.name: called.append(n) or op(*a))
    tensors = sample.tensors(device=device)
    expected = results(sample, tensors)
    assert called == []
    name = next(name for name in tensors if name.endswith(("weight", "qkv")))
    wrapped = tensors[name].detach().as_subclass(Wrapper).requires_grad_(tensors[name].requires_grad)
    for key, value in results(sample, {**tensors, name: wrapped}).items():
        assert torch.equal(value.as_subclass(torch.Tensor), expected[key]), key
    assert called == [module.FORWARD.name, module.BACKWARD.name]


@every_op
def test_compiles_to_one_graph(sample, device):
    torch.compiler.reset()  # the samples share one function, and its compiled forms would add up to torch's limit
    tensors = sample.tensors(device=device)
    compiled = torch.compile(sample.run, fullgraph=True, backend="aot_eager")
    expected = results(sample, tensors)
    out = compiled(tensors)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    got = {"out": out, **gradients(out, tensors, upstream)}
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@every_op
@pytest.mark.skipif(not interpreting(), reason="float64 runs in the interpreter only")
def test_gradients_can_be_differentiated_again(sample):
    """Also through what the tensors were made of: all of one number, and the last of the first, too."""
    tensors = sample.tensors(torch.float64)
    upstream = torch.randn(sample.run(tensors).shape, dtype=torch.float64, requires_grad=True)

    def second(module):
        shared = torch.ones((), dtype=torch.float64, requires_grad=True)
        made = {name: t * shared if t.requires_grad else t for name, t in tensors.items()}
        names = [name for name, t in tensors.items() if t.requires_grad]
        if len(names) > 1:
            made[names[-1]] = made[names[-1]] + made[names[0]].square().mean()
        leaves = [t for t in tensors.values() if t.requires_grad]
        first = torch.autograd.grad(sample.run(made, module), leaves, upstream, create_graph=True)
        loss = sum(g.square().sum() for g in first)
        return [*first, *torch.autograd.grad(loss, [shared, upstream, *leaves], materialize_grads=True)]

    torch.testing.assert_close(second(ops), second(reference))


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.op in ("linear_residual", "layer_norm_mlp")], ids=str)
def test_a_residual_alone_can_be_differentiated_again(sample, device):
    tensors = {name: tensor.detach() for name, tensor in sample.tensors(device=device).items()}
    tensors["residual"] = torch.randn(*tensors["x"].shape[:-1], D, device=device, requires_grad=True)
    out = sample.run(tensors)
    (first,) = torch.autograd.grad(out.square().sum(), tensors["residual"], create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), tensors["residual"])
    torch.testing.assert_close(second, torch.full_like(second, 2))


@every_op
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(sample, use_reentrant, device):
    tensors = sample.tensors(device=device)
    names, values = zip(*tensors.items(), strict=True)
    expected = results(sample, tensors)
    out = checkpoint(lambda *v: sample.run(dict(zip(names, v, strict=True))), *values, use_reentrant=use_reentrant)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    out.backward(upstream)
    for name, value in expected.items():
        assert torch.equal(out if name == "out" else tensors[name].grad, value), name


@every_op
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's, of its own operators
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # PyTorch's own, in forward mode
def test_gradients_of_a_batch_of_upstream_gradients(sample, device):
    """torch.autograd.grad(is_grads_batched=True), on which jacobian(vectorize=True) stands."""
    tensors = sample.tensors(device=device)
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    out = sample.run(tensors)
    upstreams = torch.randn(3, *out.shape, device=device)
    got = torch.autograd.grad(out, leaves, upstreams, is_grads_batched=True, retain_graph=True)
    assert not any(gradient.requires_grad for gradient in got)
    by_vmap = torch.func.vmap(lambda v: torch.autograd.grad(out, leaves, v, retain_graph=True))(upstreams)
    torch.testing.assert_close(by_vmap, got, rtol=1e-3, atol=1e-4)
    with forward_ad.dual_level():  # gradients are linear in the upstream one
        dual = forward_ad.make_dual(upstreams[0], upstreams[1])
        forward = [forward_ad.unpack_dual(g) for g in torch.autograd.grad(out, leaves, dual, retain_graph=True)]
        for (primal, tangent), (first, second, _) in zip(forward, got, strict=True):
            torch.testing.assert_close((primal, tangent), (first, second), rtol=1e-3, atol=1e-4)
    for i, upstream in enumerate(upstreams):
        expected = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
        torch.testing.assert_close([g[i] for g in got], list(expected), rtol=1e-3, atol=1e-4)


def transformed(sample, tensors, module):
    """Results of torch.func's transforms, of the op in `module`."""
    name = next(name for name, tensor in tensors.items() if tensor.requires_grad)
    tensors = {n: t.detach() for n, t in tensors.items()}
    rest = {n: t for n, t in tensors.items() if n != name}

    def loss(value):
        return sample.run({**rest, name: value}, module).square().sum()

    values = torch.stack([tensors[name], tensors[name] + 0.1])
    tangent = torch.ones_like(tensors[name])
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(tensors[name], tangent))).tangent
    return {
        "grad": torch.func.grad(loss)(tensors[name]),
        "vmap": torch.func.vmap(loss)(values),
        "per sample": torch.func.vmap(torch.func.grad(loss))(values),
        "jvp": torch.func.jvp(loss, (tensors[name],), (tangent,))[1],
        "dual": dual,
        "hvp": torch.func.jvp(torch.func.grad(loss), (tensors[name],), (tangent,))[1],
    }


@every_op
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # PyTorch's own, in forward mode
def test_transforms_run_in_torch(sample, device, monkeypatch):
    """grad, vmap, jvp and their compositions, where "auto" would take the kernels; `explain` says so."""
    monkeypatch.setattr(dispatch, "torch_without_question", lambda device_type: None)
    tensors = sample.tensors(device=device)
    with fastvit.use_backend("auto"):
        got = transformed(sample, tensors, ops)
    torch.testing.assert_close(got, transformed(sample, tensors, reference), rtol=1e-3, atol=1e-3)
    said = []

    def watched(x):
        said.append(fastvit.explain(sample.op, **{**tensors, name: x}, **sample.options))
        return x.sum()

    name = next(iter(tensors))
    torch.func.vmap(watched)(torch.stack([tensors[name].detach()] * 2))
    assert said[0].backend == "torch" and "torch.func transform" in said[0].reasons[0]
    with pytest.raises(RuntimeError, match="a torch.func transform or forward-mode"):
        torch.func.vmap(lambda x: sample.run({**tensors, name: x}))(torch.stack([tensors[name].detach()] * 2))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("bias", [None, torch.float32, "same"], ids=str)
def test_attention_keeps_its_accuracy_where_torch_stands_in(dtype, bias, device):
    """In half precision, scores beyond float16 and a float32 bias included: transforms and differentiating twice."""
    qkv = (3 * torch.randn(1, 37, 3, 2, 64, device=device)).to(dtype)
    qkv[..., 0] = 40
    if bias is not None:
        bias = torch.randn(37, 37, device=device).to(dtype if bias == "same" else bias)

    def run(qkv, module=ops):
        wide = bias if bias is None or qkv.dtype != torch.float64 else bias.double()
        return module.attention(qkv, attn_bias=wide)

    upstream = torch.randn(1, 37, 128, device=device).to(dtype)
    leaf, wide = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    truth = run(wide, reference)
    (want,) = torch.autograd.grad(truth, wide, upstream.double())
    (bar,) = torch.autograd.grad(run(leaf), leaf, upstream)
    limit = accuracy.FACTOR[dtype] * relative_rms(bar, want)
    for create_graph in (False, True):
        assert relative_rms(torch.autograd.grad(run(leaf), leaf, upstream, create_graph=create_graph)[0], want) <= limit
    with fastvit.use_backend("torch"):
        got = torch.func.vjp(run, qkv)[1](upstream)[0]
        batched = torch.func.vmap(run)(qkv[None])[0]
    assert relative_rms(got, want) <= limit
    assert relative_rms(batched, truth) <= accuracy.FACTOR[dtype] * relative_rms(run(qkv), truth)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_is_not_a_number_is_not_hidden(backend, device):
    """A NaN among the keys makes every row that attends to it NaN; so does one in the bias."""
    qkv = torch.randn(1, 21, 3, 1, 16, device=device)
    bias = torch.zeros(21, 21, device=device)
    unknown = qkv.clone()
    unknown[0, 3, 1] = float("nan")
    for module, query, value in ((ops, unknown, 0.0), (reference, unknown, 0.0), (ops, qkv, float("nan"))):
        with fastvit.use_backend(backend):
            assert module.attention(query, attn_bias=bias + value).isnan().all()
            assert module.attention(unknown).isnan().all()


@pytest.mark.skipif(not interpreting(), reason="a GPU has no such limit")
def test_threads_take_turns_in_the_interpreter(device):
    samples = [sample for sample in SAMPLES if sample.op in ("attention", "layer_norm_mlp")]
    tensors = [sample.tensors(device=device) for sample in samples]
    expected = [results(sample, t) for sample, t in zip(samples, tensors, strict=True)]

    def repeat(_):
        return [results(sample, t) for _ in range(3) for sample, t in zip(samples, tensors, strict=True)]

    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(repeat, range(3)):
            for got, want in zip(found, expected * 3, strict=True):
                assert all(torch.equal(got[name], value) for name, value in want.items())


WITH_WEIGHTS = [sample for sample in SAMPLES if sample.op not in ("layer_norm", "attention")]


@pytest.mark.parametrize("sample", WITH_WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("batch", [0, B])
def test_weight_gradients_by_the_library(sample, dtype, batch, device, monkeypatch):
    """As accurate as the rest, without a launch of ours for them."""
    tensors = sample.tensors(dtype, device)
    for name in BATCHED:
        if name in tensors:
            tensors[name] = tensors[name].detach()[:batch].requires_grad_(tensors[name].requires_grad)
    monkeypatch.setattr(gemm, "weight_gradient", None)
    by_library = functools.partial(ops.run_candidate, sample.op, LIBRARY_GRADIENTS)
    got = results(sample, tensors, types.SimpleNamespace(**{sample.op: by_library}))
    if batch:
        assert_as_good_as_torch(sample, tensors, got, dtype)
    else:
        assert not any(value.any() for value in got.values())


def test_weight_gradients_by_the_library_before_a_small_layer_scale(device):
    """In float16 what layer_scale has still to scale down may be out of range."""
    x, weight = torch.randn(512, 64, device=device).half(), torch.randn(32, 64, device=device).half()
    residual, bias = torch.zeros(512, 32, device=device).half(), torch.zeros(32, device=device).half()
    layer_scale = torch.full((32,), 1e-4, device=device).half()
    leaves = [weight.requires_grad_(), layer_scale.requires_grad_()]
    upstream = (1000 * (1 + x[:, :32])).half()
    found = []
    for run in (functools.partial(ops.run_candidate, "linear_residual", LIBRARY_GRADIENTS), ops.linear_residual):
        out = run(x, weight, bias, residual, layer_scale=layer_scale)
        found.append(torch.autograd.grad(out, leaves, upstream))
    assert found[0][0].isfinite().all()
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_what_auto_takes_where_nothing_was_measured(sample, device, monkeypatch):
    """float32 products are PyTorch's and weight gradients torch.mm's, and `explain` says why; "triton" insists."""
    monkeypatch.setattr(dispatch, "torch_without_question", lambda device_type: None)
    library = []
    original = gemm.library_weight_gradient
    monkeypatch.setattr(gemm, "library_weight_gradient", lambda *a, **k: library.append(1) or original(*a, **k))
    has_weights = sample in WITH_WEIGHTS
    for dtype in (torch.float32, torch.bfloat16):
        tensors = sample.tensors(dtype, device)
        with fastvit.use_backend("auto"):
            found = fastvit.explain(sample.op, **tensors, **sample.options)
            out = sample.run(tensors)
            gradients(out, tensors, torch.ones_like(out))
            with torch.no_grad():
                inference = fastvit.explain(sample.op, **tensors, **sample.options).candidate
        if sample.op == "layer_norm":
            want = ("triton", "triton", False)
        elif dtype == torch.float32:
            want = ("torch", "torch", False)
        else:
            want = ("triton + torch.mm" if has_weights else "triton", "triton", has_weights)
        assert (found.candidate, inference, bool(library)) == want
        assert (found.backend == "torch") == (found.candidate == "torch")
        if found.candidate != "triton":
            assert "no measurement says" in found.reasons[0]
        ours = "Function" in type(out.grad_fn).__name__
        assert ours == (found.backend == "triton")
        assert fastvit.explain(sample.op, **tensors, **sample.options).candidate == "triton"
        del library[:]
        gradients(sample.run(tensors), tensors, torch.ones_like(out))
        assert not library


@every_op
def test_backward_is_deterministic(sample, device):
    tensors = sample.tensors(torch.bfloat16, device)
    first, second = results(sample, tensors), results(sample, tensors)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@every_op
@pytest.mark.parametrize("batch", [0, 1])
def test_batch_of_none_and_of_one(sample, batch, device):
    tensors = sample.tensors(device=device)
    for name in BATCHED:
        if name in tensors:
            tensors[name] = tensors[name].detach()[:batch].requires_grad_(tensors[name].requires_grad)
    got = results(sample, tensors)
    if batch:
        assert_as_good_as_torch(sample, tensors, got, torch.float32)
    for name, tensor in tensors.items():
        if name in got:
            assert got[name].shape == tensor.shape
            assert batch or not got[name].any(), name


@every_op
def test_strided_inputs_and_gradients(sample, device):
    """Every other element of a buffer twice as long, along every axis; an output gradient of zero strides."""
    tensors = sample.tensors(device=device)
    expected_upstream = torch.randn(sample.run(tensors).shape[-1]).to(device)
    expected = results(sample, tensors, upstream=expected_upstream.expand(sample.run(tensors).shape).contiguous())
    strided = {}
    for name, tensor in tensors.items():
        buffer = torch.zeros([2 * size for size in tensor.shape], dtype=tensor.dtype, device=device)
        view = buffer[tuple(slice(None, None, 2) for _ in tensor.shape)]
        view.copy_(tensor.detach())
        strided[name] = view.requires_grad_(tensor.requires_grad)
    got = results(sample, strided, upstream=expected_upstream.expand(sample.run(tensors).shape))
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@every_op
def test_rows_of_wider_tensors(sample, device):
    """Everything a slice of columns: unit strides along the last axis, row strides that are not the width."""

    def sliced(tensor):
        view = torch.zeros(*tensor.shape[:-1], 3 * tensor.shape[-1], dtype=tensor.dtype, device=device)
        view = view[..., : tensor.shape[-1]]
        return view.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)

    tensors = sample.tensors(device=device)
    upstream = torch.randn(sample.run(tensors).shape, device=device)
    expected = results(sample, tensors, upstream=upstream)
    got = results(sample, {name: sliced(tensor) for name, tensor in tensors.items()}, upstream=sliced(upstream))
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@every_op
def test_expanded_inputs(sample, device):
    """One sample shown B times with a batch stride of 0."""
    tensors = sample.tensors(device=device)
    batched = next(name for name in ("x", "qkv", "image") if name in tensors)
    tensors[batched] = tensors[batched].detach()[:1].expand_as(tensors[batched])
    tensors[batched].requires_grad_(tensors[batched].is_floating_point())
    whole = {**tensors, batched: tensors[batched].detach().clone().requires_grad_(tensors[batched].requires_grad)}
    got, expected = results(sample, tensors), results(sample, whole)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@every_op
def test_autocast_follows_torch(sample, device):
    """float32 tensors under bfloat16 autocast: the reference's dtypes, and errors as small."""
    tensors = sample.tensors(device=device)
    with torch.autocast(device, torch.bfloat16):
        plain = results(sample, tensors, reference)
        got = results(sample, tensors)
    truth = in_float64(sample, tensors)
    for name, value in got.items():
        assert value.dtype == plain[name].dtype, name
        plain_error = relative_rms(plain[name], truth[name])
        limit = accuracy.limit(torch.bfloat16, plain_error, accuracy.floor(torch.float32))
        assert relative_rms(value, truth[name]) <= limit, name


@every_op
def test_each_tensor_trained_alone_gets_its_gradient(sample, device):
    tensors = sample.tensors(device=device)
    expected = results(sample, tensors)
    for name in [name for name, tensor in tensors.items() if tensor.requires_grad]:
        alone = {n: t.detach().requires_grad_(n == name) for n, t in tensors.items()}
        assert torch.equal(results(sample, alone)[name], expected[name]), name


@every_op
def test_frozen_tensors_cost_nothing(sample, device, monkeypatch):
    """With only the last bias to train, fewer products and sums run than with everything."""
    from fastvit.kernels import gemm, reduce

    if sample.op in ("layer_norm", "attention"):
        pytest.skip("one set of launches makes all of its gradients")
    launches = []
    for module, name in ((gemm, "launch"), (gemm, "weight_gradient"), (reduce, "column_sum")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, original=original, **k: launches.append(1) or original(*a, **k))

    def backward(trained):
        tensors = sample.tensors(device=device)
        for name, tensor in tensors.items():
            tensor.requires_grad_(tensor.requires_grad and name in trained)
        out = sample.run(tensors)
        launches.clear()
        gradients(out, tensors, torch.ones_like(out))
        return len(launches)

    names = [name for name, tensor in sample.tensors().items() if tensor.requires_grad]
    last_bias = [name for name in names if "bias" in name][-1:]
    assert backward(last_bias) == 1
    assert backward(names) > 1


@every_op
def test_explain_names_the_back_end(sample, device):
    tensors = sample.tensors(device=device)
    explanation = fastvit.explain(sample.op, **tensors, **sample.options)
    assert (explanation.backend, explanation.reasons) == ("triton", ())
    with fastvit.use_backend("torch"):
        explanation = fastvit.explain(sample.op, **tensors, **sample.options)
    assert explanation.backend == "torch"
    assert "asked for" in str(explanation)


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
    optional = (optional | {"fc1_bias", "fc2_bias", "pos_embed", "prefix"}) - (
        {"bias"} if sample.op == "layer_norm" else {"residual"} if sample.op == "linear_residual" else set()
    )
    for name in sample.tensors():
        tensors = {**sample.tensors(), name: None}
        if name in optional:
            if name == "prefix":
                tensors["pos_embed"] = None  # which may have rows for it
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


@every_op
def test_float32_products_may_use_tf32_when_torch_allows_it(sample, device):
    if sample.op == "layer_norm":
        pytest.skip("has no product")
    tensors = sample.tensors(device=device)
    exact = sample.run(tensors)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        rounded = sample.run(tensors)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert torch.equal(sample.run(tensors), exact)
    assert 1e-5 < relative_rms(rounded, exact) < 1e-2


@pytest.mark.skipif(not interpreting(), reason="needs a few GB of lazily allocated memory, which a GPU does not have")
class TestBeyond32Bits:
    """Views whose last element lies past 2**31: an int32 offset would wrap."""

    def view(self, shape, dtype=torch.bfloat16):
        stride = 2**31 // (shape[0] - 1) + 64
        rest = shape[1:]
        inner = [int(np.prod(rest[i + 1 :])) for i in range(len(rest))]
        elements = (shape[0] - 1) * stride + int(np.prod(rest))
        # numpy's zeros are mapped when touched: a few pages of these GBs ever are.
        buffer = torch.from_numpy(np.zeros(elements * dtype.itemsize, np.uint8)).view(dtype)
        view = buffer.as_strided(shape, (stride, *inner))
        view.copy_(torch.randn(shape) if dtype.is_floating_point else torch.randint(0, 256, shape))
        return view

    @pytest.mark.parametrize("name", ["layer_norm", "layer_norm_linear", "linear_residual", "layer_norm_mlp"])
    def test_rows(self, name):
        sample = next(s for s in SAMPLES if s.name == name)
        tensors = sample.tensors(torch.bfloat16)
        shape = (3, tensors["x"].shape[-1])
        tensors["x"] = self.view(shape).requires_grad_()
        for extra, size in (("residual", 3), ("drop_path_scale", 3)):
            if extra in tensors:
                tail = tensors[extra].shape[1:] if extra == "drop_path_scale" else tensors[extra].shape[2:]
                tensors[extra] = torch.rand(size, *tail).to(tensors[extra].dtype)
                tensors[extra].requires_grad_(extra == "residual")
        dense = {**tensors, "x": tensors["x"].detach().clone(memory_format=torch.contiguous_format).requires_grad_()}
        got, expected = results(sample, tensors), results(sample, dense)
        for key, value in expected.items():
            assert torch.equal(got[key], value), key

    @pytest.mark.parametrize("far", ["residual", "output gradient"])
    @pytest.mark.parametrize("name", ["layer_norm", "layer_norm_linear", "linear_residual", "layer_norm_mlp-residual"])
    def test_rows_of_the_rest(self, name, far):
        sample = next(s for s in SAMPLES if s.name == name)
        tensors = sample.tensors(torch.bfloat16)
        if far == "residual" and "residual" not in tensors:
            pytest.skip("takes no residual")
        tensors["x"] = torch.randn(3, tensors["x"].shape[-1]).bfloat16().requires_grad_()
        if "residual" in tensors:
            tensors["residual"] = torch.randn(3, tensors["residual"].shape[-1]).bfloat16().requires_grad_()
            tensors["drop_path_scale"] = torch.rand(3)
        upstream = torch.randn(sample.run(tensors).shape).bfloat16()
        expected = results(sample, tensors, upstream=upstream)
        view = self.view((3, upstream.shape[-1]))
        if far == "residual":
            tensors["residual"] = view.copy_(tensors["residual"].detach()).requires_grad_()
        else:
            upstream = view.copy_(upstream)
        for key, value in results(sample, tensors, upstream=upstream).items():
            assert torch.equal(value, expected[key]), key

    @pytest.mark.parametrize("axis", range(4), ids=["batch", "token", "qkv", "head"])
    def test_attention(self, axis):
        """The far axis of qkv is each in turn; token and batch also of the output gradient."""
        qkv = self.view((3, *[size for i, size in enumerate((2, 5, 3, 2, 16)) if i != axis])).movedim(0, axis)
        dense = qkv.clone(memory_format=torch.contiguous_format).requires_grad_()
        far = qkv.requires_grad_()
        out, expected = ops.attention(far), ops.attention(dense)
        assert torch.equal(out, expected)
        upstream = torch.randn(out.shape).bfloat16()
        (expected_grad,) = torch.autograd.grad(expected, dense, upstream)
        if axis < 2:
            upstream = self.view((3, *upstream.movedim(axis, 0).shape[1:])).movedim(0, axis).copy_(upstream)
        assert torch.equal(torch.autograd.grad(out, far, upstream)[0], expected_grad)

    @pytest.mark.parametrize("axis", range(4), ids=["batch", "head", "query", "key"])
    def test_attention_bias(self, axis):
        bias = self.view((3, 3, 3, 3)).movedim(0, axis).requires_grad_()
        dense = bias.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        qkv = torch.randn(3, 3, 3, 3, 16).bfloat16().requires_grad_()
        upstream = torch.randn(3, 3, 48).bfloat16()
        out, expected = ops.attention(qkv, attn_bias=bias), ops.attention(qkv, attn_bias=dense)
        assert torch.equal(out, expected)
        got = torch.autograd.grad(out, (qkv, bias), upstream)
        for value, want in zip(got, torch.autograd.grad(expected, (qkv, dense), upstream), strict=True):
            assert torch.equal(value, want)

    @pytest.mark.parametrize("axis", range(4), ids=["batch", "channel", "row", "column"])
    def test_patch_embed(self, axis):
        image = self.view((3, 3, 3, 3), torch.uint8).movedim(0, axis)
        size = 1 if axis < 2 else 3
        weight = torch.randn(24, 3, size, size, requires_grad=True)
        out, expected = ops.patch_embed(image, weight), ops.patch_embed(image.contiguous(), weight)
        assert torch.equal(out, expected)
        upstream = torch.randn_like(out)
        (got,), (want,) = (torch.autograd.grad(o, weight, upstream) for o in (out, expected))
        assert torch.equal(got, want)

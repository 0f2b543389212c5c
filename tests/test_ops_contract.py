"""What every op promises, held for all of them: see "The contract of an op" in docs/architecture.md."""

from __future__ import annotations

import contextlib
import inspect
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from fastvit.kernels import gemm, twin
from fastvit.kernels.launch import choice, hardware, launcher
from fastvit.kernels.launch.request import TmaConfig
from fastvit.kernels.launch.search import search_space
from samples import BATCHED, HALF, SAMPLES, B, every_op, every_op_one_block, gradients, results
from torch.utils.checkpoint import checkpoint

import fastvit
from fastvit import accuracy, dispatch, ops, reference
from fastvit.accuracy import relative_rms
from fastvit.dispatch import interpreting

pytestmark = pytest.mark.usefixtures("triton_backend")


def in_float64(sample, tensors):
    """The truth for these tensors: the reference in float64."""
    return results(sample, accuracy.precise(tensors), reference)


def with_dtypes(samples):
    """Parametrizes sample and dtype: every one that the kernels take, which is not a block in float16."""
    pairs = [(sample, dtype) for sample in samples for dtype in (torch.float32, *HALF)]
    taken = [pair for pair in pairs if (pair[0].op, pair[1]) != ("transformer_block", torch.float16)]
    return pytest.mark.parametrize("sample, dtype", taken, ids=str)


def assert_as_good_as_torch(sample, tensors, got, dtype):
    """Each tensor's error against float64 is within the limit of `dtype`, which is one rounding at least."""
    truth, plain = in_float64(sample, tensors), results(sample, tensors, reference)
    for name, value in got.items():
        assert value.dtype == plain[name].dtype, name
        assert value.shape == truth[name].shape, name
        limit = accuracy.limit(dtype, relative_rms(plain[name], truth[name]), accuracy.rounding(value.dtype))
        assert relative_rms(value, truth[name]) <= limit, name


@with_dtypes(SAMPLES)
def test_matches_reference(sample, dtype, device):
    tensors = sample.tensors(dtype, device)
    assert_as_good_as_torch(sample, tensors, results(sample, tensors), dtype)


@every_op
def test_same_call_as_reference(sample):
    assert str(inspect.signature(getattr(ops, sample.op))) == str(inspect.signature(getattr(reference, sample.op)))


@every_op_one_block
@pytest.mark.skipif(not interpreting(), reason="float64 runs in the interpreter only")
def test_gradcheck(sample):
    tensors = sample.tensors(torch.float64)
    names = [name for name, tensor in tensors.items() if tensor.requires_grad]

    def function(*values):
        return sample.run({**tensors, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(function, [tensors[name] for name in names], fast_mode=True)


@every_op_one_block
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
def test_gradients_share_no_memory(sample, device):
    """So that they may be accumulated, clipped and scaled in place."""
    tensors = sample.tensors(device=device)
    out = sample.run(tensors)
    if "pos_embed" in tensors:  # positions of the prefix rows, too: one sum holds both gradients
        tensors["pos_embed"] = torch.randn(*out.shape[1:], device=device, requires_grad=True)
        out = sample.run(tensors)
    found = torch.autograd.grad(out.square().sum(), [tensor for tensor in tensors.values() if tensor.requires_grad])
    assert len({grad.untyped_storage().data_ptr() for grad in found}) == len(found)
    for grad in found:
        grad.add_(1)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_what_memory_does_not_hold_as_it_is(device):
    """A view that is negative only when it is read; weights that are sparse."""
    x, one, zero = torch.randn(5, 24, device=device), torch.ones(24, device=device), torch.zeros(24, device=device)
    torch.testing.assert_close(ops.layer_norm(torch._neg_view(x), one, zero), ops.layer_norm(-x, one, zero))
    weight = torch.randn(8, 24, device=device)
    with fastvit.use_backend("torch"):
        got = ops.layer_norm_linear(x, one, zero, weight.to_sparse_csr())
    torch.testing.assert_close(got, reference.layer_norm_linear(x, one, zero, weight))


def test_each_norm_parameter_has_its_gradient_in_its_own_dtype(device):
    """A bfloat16 weight beside a float32 bias does not round the bias's sum."""
    x = torch.randn(3001, 24, device=device).bfloat16()
    weight = torch.ones(24, device=device).bfloat16().requires_grad_()
    bias = torch.zeros(24, device=device, requires_grad=True)
    out = ops.layer_norm(x, weight, bias)
    (dbias,) = torch.autograd.grad(out, [bias], torch.ones_like(out))
    assert dbias.dtype == torch.float32 and (dbias == 3001).all()


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


WITH_WEIGHTS = [sample for sample in SAMPLES if sample.op not in ("layer_norm", "attention", "attention_varlen")]


@with_dtypes(WITH_WEIGHTS)
@pytest.mark.parametrize("batch", [0, B])
def test_products_by_the_library(sample, dtype, batch, device, monkeypatch):
    """As accurate as the rest, without a product of ours."""
    tensors = sample.tensors(dtype, device)
    for name in BATCHED:
        if name in tensors:
            tensors[name] = tensors[name].detach()[:batch].requires_grad_(tensors[name].requires_grad)
    monkeypatch.setattr(gemm, "gemm_kernel", None)
    with choice.by_library():
        got = results(sample, tensors)
    if batch:
        assert_as_good_as_torch(sample, tensors, got, dtype)
    else:
        assert not any(value.any() for value in got.values())


BY_TMA = [sample for sample in WITH_WEIGHTS if sample.op != "patch_embed"]


@pytest.mark.parametrize("sample", BY_TMA, ids=str)
@pytest.mark.parametrize(
    "config", [TmaConfig(64, 64, 16, 4, 2, SUBTILES=1), TmaConfig(16, 256, 32, 4, 2, 2, SUBTILES=4)]
)
def test_products_by_tma(sample, config, device, monkeypatch):
    """Of tiles that TMA loads, finished in parts: as accurate as the rest. A GPU takes a tile that fits it."""
    arch = hardware.current_arch()
    if not (interpreting() or arch.has_tma):
        pytest.skip(f"{arch.name} has no loop over tiles that TMA loads")
    launched, original = [], gemm._launch_tma
    monkeypatch.setattr(
        gemm, "_launch_tma", lambda request, *rest: launched.append(request) or original(request, *rest)
    )
    tensors = sample.tensors(torch.bfloat16)

    def forced(request):
        if not getattr(request.parts, "tma", False):
            return None
        fitting = [tile for tile in search_space(request, arch, 132) if tile.__class__ is TmaConfig]
        return config if interpreting() else min(fitting, key=lambda tile: tile.SUBTILES != config.SUBTILES)

    with choice.forcing(forced):
        assert_as_good_as_torch(sample, tensors, results(sample, tensors), torch.bfloat16)
    epilogues = {request.parts.epilogue.name for request in launched}
    hidden = {
        "transformer_block": {"folded_kept", "derivative"},
        "transformer_block-gated": {"gated_kept", "gated_derivative"},
        "transformer_block-all": {"folded_activated", "derivative"},  # which has fc1 made again
    }
    if sample.name in hidden:
        assert {"folded", "stream", "norm_gradient"} | hidden[sample.name] <= epilogues
    assert epilogues


def test_the_library_rounds_nothing_that_a_small_layer_scale_has_still_to_scale(device):
    """In float16 it may be out of range."""
    x, weight = torch.randn(512, 64, device=device).half(), torch.randn(32, 64, device=device).half()
    residual, bias = torch.zeros(512, 32, device=device).half(), torch.zeros(32, device=device).half()
    layer_scale = torch.full((32,), 1e-4, device=device).half()
    leaves = [weight.requires_grad_(), layer_scale.requires_grad_()]
    upstream = (1000 * (1 + x[:, :32])).half()
    found = []
    for form in (choice.by_library(), contextlib.nullcontext()):
        with form:
            out = ops.linear_residual(x, weight, bias, residual, layer_scale=layer_scale)
            found.append(torch.autograd.grad(out, leaves, upstream))
    assert found[0][0].isfinite().all()
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_what_auto_takes_where_nothing_was_measured(sample, device, monkeypatch):
    """float32 products are PyTorch's, and `explain` says why; weight gradients are the library's; "triton" insists."""
    monkeypatch.setattr(dispatch, "torch_without_question", lambda device_type: None)
    library, original = [], twin.launch
    monkeypatch.setattr(twin, "launch", lambda request, *a: library.append(request) or original(request, *a))
    for dtype in (torch.float32, torch.bfloat16):
        tensors = sample.tensors(dtype, device)
        with fastvit.use_backend("auto"):
            found = fastvit.explain(sample.op, **tensors, **sample.options)
            out = sample.run(tensors)
            gradients(out, tensors, torch.ones_like(out))
        wide = dtype == torch.float32 and sample.op != "layer_norm"
        assert (found.candidate, found.backend) == (("torch", "torch") if wide else ("triton", "triton"))
        assert any(request.parts.epilogue.sums for request in library) == (sample in WITH_WEIGHTS and not wide)
        if wide:
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
    if sample.op == "attention_varlen":
        pytest.skip("it has no batch: test_attention_varlen.py has none and one sequence")
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
def test_the_output_may_be_changed_in_place(sample, device):
    """But where backward reads it, as PyTorch's own attention does. On a GPU the third pass is a replay."""
    tensors = sample.tensors(device=device)
    for _ in range(3):
        out = sample.run(tensors)
        expected = 2 * out.detach()
        assert torch.equal(out.mul_(2), expected)
        needed = contextlib.nullcontext()
        if sample.op.startswith("attention"):
            needed = pytest.raises(RuntimeError, match="modified by an inplace operation")
        with needed:
            for name, gradient in gradients(out, tensors, torch.ones_like(out)).items():
                assert gradient.isfinite().all(), name


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

    if sample not in WITH_WEIGHTS:
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
    last_bias = [name for name in names if name.endswith("bias") and name != "attn_bias"][-1:]
    # A block's needs no product, and sums of its own.
    assert backward(last_bias) == (0 if sample.op == "transformer_block" else 1)
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
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_explain_lists_the_launches(sample, gradient, autocast, device, monkeypatch):
    """As many as the call makes, forward and backward, those with a choice by their key; and makes none."""
    tensors = sample.tensors(device=device)
    if not gradient:
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    made, keys = [], []
    # Of every thread: on a GPU backward passes have their own.
    monkeypatch.setattr(launcher, "here", SimpleNamespace(recorder=lambda kernel, *_: made.append(kernel)))
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        launches = fastvit.explain(sample.op, **tensors, **sample.options).launches
        assert not made
        with choice.watching(lambda request, repeat: keys.append(request.key)):
            out = sample.run(tensors)
            if gradient:
                gradients(out, tensors, torch.ones_like(out))
    assert len(launches) == len(made)
    listed = [line.partition(":")[0] for line in launches if "Config(" in line]
    assert [key for key in listed if key in keys] == keys
    if any(key.startswith("gemm") for key in keys):
        assert any("bfloat16" in key for key in listed) == autocast
    with fastvit.use_backend("torch"):
        assert fastvit.explain(sample.op, **tensors, **sample.options).launches == ()


def test_explain_lists_what_is_the_librarys(device, monkeypatch):
    """Gradients of weights, where nothing was measured; and none of a call that keeps no gradient."""
    monkeypatch.setattr(dispatch, "torch_without_question", lambda device_type: None)
    sample = next(sample for sample in SAMPLES if sample.op == "transformer_block")
    tensors = sample.tensors(torch.bfloat16, device)
    with fastvit.use_backend("auto"):
        found = fastvit.explain(sample.op, **tensors, **sample.options)
        with torch.inference_mode():
            forward = fastvit.explain(sample.op, **tensors, **sample.options)
    assert sum("sums" in line and line.endswith(": the library") for line in found.launches) == 4
    assert not any("sums" in line for line in forward.launches)
    assert f"\n  launch: {found.launches[-1]}" in str(found)


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

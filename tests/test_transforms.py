"""Every op under torch.func transforms, and differentiated twice (point 3 of its contract in docs/architecture.md)."""

from __future__ import annotations

import pytest
import torch
from samples import HALF, SAMPLES, D, every_op
from torch.autograd import forward_ad

import fastvit
from fastvit import accuracy, dispatch, ops, reference
from fastvit.accuracy import relative_rms
from fastvit.dispatch import interpreting

pytestmark = pytest.mark.usefixtures("triton_backend")


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

"""Users' stories of the kernels under what PyTorch does with a model."""

from __future__ import annotations

import copy
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from pairs import BACKENDS, SMALL, close, gradients, on_kernels, pair, randomised, timm
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastvit
from fastvit import dispatch
from fastvit.accuracy import FACTOR, relative_rms


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """ "auto" takes the kernels for tensors on the CPU too, as it does for those on a GPU."""
    monkeypatch.setattr(dispatch, "torch_without_question", lambda device_type: None)


@on_kernels
@pytest.mark.usefixtures("triton_backend")
def test_threads_of_a_service_share_a_model(images):
    """No false fault, no mixed-up answer."""
    model, peer = pair()

    def answer(image):
        with torch.inference_mode():
            return model(image[None])[0]

    with ThreadPoolExecutor(3) as pool:
        close(torch.stack(list(pool.map(answer, images))), peer(images))


@on_kernels
@pytest.mark.usefixtures("as_on_a_gpu")
def test_gradients_of_each_sample_and_an_ensemble(images):
    """torch.func, where an ordinary call of the same model takes the kernels."""
    from torch.func import functional_call, grad, jvp, stack_module_state, vmap

    model, peer = pair()
    labels = torch.tensor([1, 4, 0])
    norm = model.norm
    assert fastvit.explain("layer_norm", torch.randn(2, 48), norm.weight, norm.bias).backend == "triton"

    def loss(parameters, image, label):
        return F.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    for i in range(3):
        peer.zero_grad()
        F.cross_entropy(peer(images[i : i + 1]), labels[i : i + 1]).backward()
        close({name: value[i] for name, value in found.items()}, gradients(peer))

    others = [pair() for _ in range(2)]
    stacked = stack_module_state([ours for ours, _ in others])
    outputs = vmap(lambda state: functional_call(model, state, (images,)))(stacked)
    close(outputs, torch.stack([theirs(images) for _, theirs in others]))

    step = 1e-3 * torch.randn_like(images)
    value, change = jvp(model, (images,), (step,))
    close(value + change, peer(images + step), atol=1e-3)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_gradient_penalty(backend, images):
    """Second derivatives, on every back end. PyTorch's fused attention has none: it is told to take another."""
    model, peer = pair()
    results = []
    with fastvit.use_backend(backend), sdpa_kernel(SDPBackend.MATH):
        for each in (model, peer):
            leaf = images.clone().requires_grad_()
            (slope,) = torch.autograd.grad(each(leaf).sum(), leaf, create_graph=True)
            slope.square().mean().backward()
            results.append((leaf.grad, each.blocks[0].attn.qkv.weight.grad))
    close(*results)


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing", "ignore::DeprecationWarning")
def test_features_of_a_timm_model_with_our_blocks(images):
    """torch.fx sees into them; scripting says in one sentence what to do."""
    arguments = {**SMALL, "drop_path_rate": 0.1}
    peer = randomised(timm.create_model("deit3_small_patch16_224", **arguments))
    model = timm.create_model("deit3_small_patch16_224", block_fn=fastvit.nn.Block, **arguments).eval()
    model.load_state_dict(peer.state_dict())
    nodes = ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.mlp.fc1", "blocks.1", "head"]
    got, want = (timm.models.create_feature_extractor(each, nodes)(images) for each in (model, peer))
    close(got, want)
    with pytest.raises(RuntimeError, match="torch.jit.script cannot compile fastvit.nn.Block, .* use torch.compile"):
        torch.jit.script(model)


@pytest.mark.parametrize("backend", BACKENDS)
def test_black_borders_under_a_tiny_eps(backend):
    """Tokens without any variance are the bias, with transformers' 1e-12 too."""
    norm = randomised(nn.LayerNorm(48, eps=1e-12))
    x = torch.randn(2, 5, 48)
    x[0, 2], x[1] = 0.1, 3e3
    with fastvit.use_backend(backend):
        out = fastvit.ops.layer_norm(x, norm.weight, norm.bias, norm.eps)
    assert torch.equal(out[0, 2], norm.bias) and torch.equal(out[1], norm.bias.expand(5, -1))
    close(out, norm(x))


@on_kernels
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "every other"])
def test_half_precision_is_as_accurate_in_every_layout(layout):
    """A bfloat16 block's output and gradient against float64, beside timm's block in bfloat16."""
    block = randomised(fastvit.nn.Block(64, 2, qkv_bias=True))
    peer = timm.models.vision_transformer.Block(64, 2, qkv_bias=True).eval()
    peer.load_state_dict(block.state_dict())
    x = torch.randn(2, 40, 64).bfloat16()
    laid_out = {
        "contiguous": x,
        "channels last": x.reshape(2, 5, 8, 64).permute(0, 3, 1, 2).flatten(2).transpose(1, 2),
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "every other": torch.stack([x, -x], 2).flatten(1, 2)[:, ::2],
    }[layout]
    assert torch.equal(laid_out, x)

    def result(module, x):
        x = x.detach().requires_grad_()
        out = module(x)
        return out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])

    truth = result(copy.deepcopy(peer).double(), x.double())
    ours, theirs = (result(module.bfloat16(), laid_out) for module in (block, peer))
    for got, other, true in zip(ours, theirs, truth, strict=True):
        assert relative_rms(got, true) <= FACTOR[torch.bfloat16] * relative_rms(other, true)


def test_what_auto_takes_on_a_gpu(monkeypatch):
    """Asked with tensors that only claim to be on one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    properties = types.SimpleNamespace(major=9, minor=0, name="Imaginary GPU", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setenv("FASTVIT_TUNING", "off")

    def asked(dtype, backend="auto"):
        make = {"device": "cuda", "dtype": dtype, "requires_grad": True}
        x, norm, weight = torch.empty(2, 8, 64, **make), torch.empty(64, **make), torch.empty(32, 64, **make)
        with fastvit.use_backend(backend):
            return fastvit.explain("layer_norm_linear", x, norm, norm, weight, None)

    with FakeTensorMode():
        single, half = asked(torch.float32), asked(torch.bfloat16)
        assert single.backend == "torch" and "measurement" in single.reasons[0] and "float32" in single.reasons[0]
        assert half.backend == half.candidate == "triton" and half.reasons == ()
        for dtype in (torch.float32, torch.bfloat16):
            assert asked(dtype, "triton").candidate == "triton"

"""`fastvit.accelerate` and `fastvit.restore`: what of a model stays, what is swapped, and when its own code runs."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from dropin_models import (
    BY_NAME,
    SMALL,
    every_family,
    first,
    images,
    one_of_each,
    randomise,
    timm,
    torchvision,
    transformers,
)
from torch import nn

import fastvit
from fastvit import dispatch

VIT, TORCHVISION, DINOV2 = BY_NAME["timm ViT"], BY_NAME["torchvision ViT"], BY_NAME["transformers Dinov2"]


def ops_of(run) -> list[str]:
    """The ops that `run()` calls on the kernels."""
    calls = []
    with fastvit.use_backend("triton"), dispatch.watching(lambda op, args: calls.append(op.name)):
        run()
    return calls


BLOCKS = ["transformer_block", "transformer_block"]


def assert_its_own(family, model, other, **arguments):
    """`model`, accelerated, gives on the kernels what `other`, the same and not accelerated, gives without them."""
    torch.manual_seed(7)
    want = family.run(other, images(), **arguments)
    with fastvit.use_backend("triton"):
        torch.manual_seed(7)
        got = family.run(model, images(), **arguments)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def pair(family, **how):
    """A model that is accelerated but for its patch projection, and one that is not."""
    model, other = family.model(), family.model()
    fastvit.accelerate(model, **({"modules": ("block",)} | how))
    return model, other


# --------------------------------------------------------------------------------------------------------------------
# What stays


@every_family
@torch.no_grad()
def test_a_model_stays_what_it_is_and_comes_back(family):
    model = family.model()
    classes = [type(module) for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    text, before = repr(model), family.run(model, images())
    summary = fastvit.accelerate(model)
    assert summary.model is model and len(summary.swapped) == 3 and not summary.left_alone

    assert repr(model) == text
    assert all(isinstance(module, cls) for module, cls in zip(model.modules(), classes, strict=True))
    assert tensors == [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert list(model.state_dict()) == list(state)
    assert [*model.state_dict()._metadata] == [*family.model().state_dict()._metadata]
    # On a CPU it is the library's own code that runs.
    torch.testing.assert_close(family.run(model, images()), before, rtol=0, atol=0)

    assert fastvit.restore(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert len(ops_of(lambda: family.run(model, images()))) == 0
    torch.testing.assert_close(family.run(model, images()), before, rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


@one_of_each
@torch.no_grad()
def test_two_models_of_the_same_classes(family):
    model, other = pair(family)
    assert ops_of(lambda: family.run(other, images())) == []
    assert ops_of(lambda: family.run(model, images())) == BLOCKS
    fastvit.accelerate(other, modules=("block",))
    assert type(next(other.children())) is type(next(model.children()))
    fastvit.restore(other)
    assert ops_of(lambda: family.run(model, images())) == BLOCKS


@one_of_each
@torch.no_grad()
def test_copies_and_pickles(family):
    model = family.model()
    summary = fastvit.accelerate(model, inplace=False, modules=("block",))
    assert ops_of(lambda: family.run(model, images())) == []
    again = copy.deepcopy(summary.model)
    assert {id(p) for p in again.parameters()}.isdisjoint(id(p) for p in summary.model.parameters())
    for accelerated in (summary.model, again):
        assert ops_of(lambda accelerated=accelerated: family.run(accelerated, images())) == BLOCKS
    next(again.parameters()).zero_()
    torch.testing.assert_close(family.run(summary.model, images()), family.run(model, images()), rtol=0, atol=0)

    file = io.BytesIO()
    torch.save(summary.model.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True))
    loaded = pickle.loads(pickle.dumps(summary.model))  # by the library's own classes
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
    torch.testing.assert_close(family.run(loaded, images()), family.run(model, images()), rtol=0, atol=0)


def _add_one(module, args, output):
    output[..., :3] += 1


@one_of_each
@torch.no_grad()
def test_hooks_are_called_wherever_they_are(family):
    """Those of the blocks beside the kernels, those in a block in their stead."""
    model, other = pair(family)
    blocks = [(name, m) for name, m in model.named_modules() if fastvit.dropin.swap.swapped_kind(m) == "block"]
    (name, block), seen = blocks[1], []
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output))
    assert ops_of(lambda: family.run(model, images())) == BLOCKS and len(seen) == 1
    handle.remove()
    changing = [which.get_submodule(blocks[0][0]).register_forward_hook(_add_one) for which in (model, other)]
    with torch.inference_mode():  # in which nobody counts changes, and statistics may not be handed on
        with fastvit.use_backend("triton"):
            got = family.run(model, images())
        torch.testing.assert_close(got, family.run(other, images()), rtol=1e-4, atol=1e-4)
    for handle in changing:
        handle.remove()
    for inner in [inner for inner, _ in block.named_modules() if inner]:
        seen = []
        handle = block.get_submodule(inner).register_forward_hook(lambda *args, seen=seen: seen.append(args))
        ran = ops_of(lambda: family.run(model, images()))
        reference = other.get_submodule(f"{name}.{inner}").register_forward_hook(lambda *args: None)
        called = []
        reference.remove()
        reference = other.get_submodule(f"{name}.{inner}").register_forward_hook(lambda *args, c=called: c.append(1))
        family.run(other, images())
        assert ran == BLOCKS[:1] and len(seen) == len(called), inner
        handle.remove()
        reference.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert ops_of(lambda: family.run(model, images())) == []
    handle.remove()
    assert ops_of(lambda: family.run(model, images())) == BLOCKS


# --------------------------------------------------------------------------------------------------------------------
# When a module's own code runs


@one_of_each
def test_what_somebody_put_in_a_block_is_called(family):
    model, other = pair(family)
    for changed in (model, other):
        blocks = [m for m in changed.modules() if type(m).__name__ in ("Block", "EncoderBlock", "Dinov2Layer")]
        names = [name for name, m in blocks[0].named_modules() if type(m) is nn.Linear]
        block, (path, _, leaf) = blocks[0], names[-1].rpartition(".")

        class Doubled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        linear = block.get_submodule(names[-1])
        doubled = Doubled(linear.in_features, linear.out_features)
        doubled.load_state_dict(linear.state_dict())
        setattr(block.get_submodule(path), leaf, doubled)
        blocks[1].get_submodule(names[-1]).forward = lambda x, m=linear: 3 * F.linear(x, m.weight, m.bias)
    assert ops_of(lambda: family.run(model, images())) == []
    assert_its_own(family, model, other)


@pytest.mark.parametrize("rates", [{"proj_drop_rate": 0.5}, {"attn_drop_rate": 0.5}], ids=str)
def test_active_dropout_is_timms_own(rates):
    model, other = (VIT.model(**rates).train() for _ in range(2))
    fastvit.accelerate(model, modules=("block", "attention", "mlp"))
    assert ops_of(lambda: VIT.run(model, images())) == []
    assert_its_own(VIT, model, other)
    assert ops_of(lambda: VIT.run(model.eval(), images())) == BLOCKS


@pytest.mark.parametrize("rate", ["attention_dropout", "dropout"])
def test_active_dropout_is_torchvisions_own(rate):
    model = TORCHVISION.model(**{rate: 0.5}).train()
    fastvit.accelerate(model, modules=("block",))
    assert ops_of(lambda: TORCHVISION.run(model, images())) == []
    assert ops_of(lambda: TORCHVISION.run(model.eval(), images())) == BLOCKS


@pytest.mark.parametrize("name", ["transformers ViT", "transformers CLIP vision"])
def test_active_dropout_is_transformers_own(name):
    family = BY_NAME[name]
    rate = "attention_dropout" if "CLIP" in name else "attention_probs_dropout_prob"
    model, other = (family.model(**{rate: 0.5}).train() for _ in range(2))
    fastvit.accelerate(model, modules=("block",))
    assert ops_of(lambda: family.run(model, images())) == []
    assert_its_own(family, model, other)


@pytest.mark.parametrize("name", ["timm DINOv2", "transformers Dinov2"])
def test_drop_path_draws_as_the_library(name):
    """The same seed drops the same samples."""
    family = BY_NAME[name]
    rate = {"drop_path_rate": 0.5}
    model, other = (family.model(**rate).train() for _ in range(2))
    fastvit.accelerate(model, modules=("block",))
    results = {}
    for backend, which in (("torch", other), ("triton", model)):
        torch.manual_seed(3)
        with fastvit.use_backend(backend):
            results[backend] = family.run(which, images(6))
    kept = family.run(other.eval(), images(6))
    for name, value in results["torch"].items():
        assert (value - kept[name]).abs().max() > 1e-2
        torch.testing.assert_close(results["triton"][name], value, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_masks_of_timm():
    model, other = pair(VIT)
    for mask in (
        {"attn_mask": torch.rand(2, 1, 1, 17) < 0.7},
        {"attn_mask": torch.randn(17, 17)},
        {"is_causal": True},
    ):
        mask.get("attn_mask", torch.ones(1))[..., 0] = 1
        with fastvit.use_backend("triton"):
            got = model.forward_features(images(), **mask)
        torch.testing.assert_close(got, other.forward_features(images(), **mask), rtol=1e-4, atol=1e-4)
        assert ops_of(lambda mask=mask: model.forward_features(images(), **mask)) == BLOCKS
    wrong = torch.zeros(3, 17, 5)
    with pytest.raises(RuntimeError) as theirs:
        other.forward_features(images(), attn_mask=wrong)
    with fastvit.use_backend("triton"), pytest.raises(RuntimeError) as ours:
        model.forward_features(images(), attn_mask=wrong)
    assert str(ours.value) == str(theirs.value)


@torch.no_grad()
def test_masks_of_transformers():
    model, other = pair(DINOV2)
    mask = torch.rand(2, 17) < 0.7
    mask[:, 0] = True
    for implementation in ("sdpa", "eager"):
        for which in (model, other):
            which.set_attn_implementation(implementation)
        for given in (mask, mask[:, None, None].expand(2, 1, 17, 17), torch.randn(2, 1, 17, 17)):
            with fastvit.use_backend("triton"):
                got = model(images(), attention_mask=given).last_hidden_state
            want = other(images(), attention_mask=given).last_hidden_state
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            added = implementation == "eager" and given.dim() == 4 and given.dtype == torch.bool
            assert ops_of(lambda given=given: model(images(), attention_mask=given)) == ([] if added else BLOCKS)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name.endswith((" ViT", "Dinov2", "3ViT", "CLIP vision")) else pytest.mark.slow)
        for name in BY_NAME
        if name.startswith("transformers") and "SwiGLU" not in name
    ],
)
@torch.no_grad()
def test_recorded_outputs_of_transformers(name):
    """Hidden states beside the kernels; attention probabilities, which the kernels never hold, in their stead; and the
    hooks that this leaves behind in the model, for good, stand in nobody's way."""
    family = BY_NAME[name]
    model, other = pair(family)
    for which in (model, other):
        which.set_attn_implementation("eager")
    with fastvit.use_backend("triton"):
        got = family.run(model, images(), output_hidden_states=True)
    want = family.run(other, images(), output_hidden_states=True)
    assert got.keys() == want.keys() and "hidden_states.2" in got
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert ops_of(lambda: family.run(model, images(), output_hidden_states=True)) == BLOCKS
    assert ops_of(lambda: family.run(model, images(), output_attentions=True)) == []
    assert_its_own(family, model, other, output_attentions=True)
    assert "attentions.1" in family.run(model, images(), output_attentions=True)
    assert ops_of(lambda: family.run(model, images())) == BLOCKS
    for which in (model, other):
        which.config.output_attentions = True  # of which the layers are not told
    assert_its_own(family, model, other)
    assert "attentions.1" in family.run(model, images())


@torch.no_grad()
def test_a_forward_of_its_own():
    """A block's that somebody put there is the one that runs; its class's, which transformers 4 leaves there, is not in
    the way of the ops, nor of the way back."""
    model, other = VIT.model(), VIT.model()
    for which in (model, other):
        which.blocks[0].forward = lambda x, **_: 2 * x
    entries = fastvit.accelerate(model, modules=("block",)).left_alone
    assert [(entry.name, entry.reason) for entry in entries] == [("blocks.0", "it has a forward of its own")]
    with fastvit.use_backend("triton"):
        got = VIT.run(model, images())
    torch.testing.assert_close(got, VIT.run(other, images()), rtol=1e-4, atol=1e-4)

    model, other = pair(DINOV2)
    for block in model.encoder.layer:
        block.attention.forward, block.forward = block.attention.forward, block.forward
    assert ops_of(lambda: DINOV2.run(model, images())) == BLOCKS
    assert ops_of(lambda: DINOV2.run(fastvit.restore(model), images())) == []
    for block in other.encoder.layer:
        block.forward = block.forward
    fastvit.accelerate(other, modules=("block",))
    assert ops_of(lambda: DINOV2.run(other, images())) == BLOCKS
    assert ops_of(lambda: DINOV2.run(copy.deepcopy(other), images())) == BLOCKS


@torch.no_grad()
def test_what_else_transformers_layers_are_asked_for():
    """Causal attention by an argument that goes on to it; probabilities of attention that is swapped alone."""
    model, other = pair(DINOV2)
    with_mask = DINOV2.run(other, images(), is_causal=True)
    assert (first(with_mask) - first(DINOV2.run(other, images()))).abs().max() > 1e-2
    assert_its_own(DINOV2, model, other, is_causal=True)
    assert ops_of(lambda: DINOV2.run(model, images(), is_causal=False)) == BLOCKS

    model = DINOV2.model()
    fastvit.accelerate(model, modules=("attention",))
    assert ops_of(lambda: DINOV2.run(model, images(), output_hidden_states=True)) == ["attention"] * 2
    for which in (model, other):
        which.set_attn_implementation("eager")
    assert_its_own(DINOV2, model, other, output_attentions=True)
    for which in (model, other):
        which.config.output_attentions = True  # of which the layers are not told
    assert_its_own(DINOV2, model, other)


@torch.no_grad()
def test_an_attention_of_someones_own():
    def uniform(module, query, key, value, attention_mask, **kwargs):
        return value.mean(2, keepdim=True).expand_as(value).transpose(1, 2), None

    transformers.AttentionInterface.register("uniform", uniform)
    model, other = pair(DINOV2)
    for which in (model, other):
        which.set_attn_implementation("uniform")
    assert ops_of(lambda: DINOV2.run(model, images())) == []
    assert_its_own(DINOV2, model, other)
    entries = fastvit.accelerate(other).left_alone
    assert {entry.reason for entry in entries if entry.kind == "block"} == {
        "of its attention: its attn_implementation is 'uniform'"
    }


@torch.no_grad()
def test_inputs_that_the_kernels_do_not_take():
    """Images that the library refuses are refused by the library; what only the kernels do not take runs without."""
    model, other = pair(VIT, modules=("patch_embed", "block"))
    for wrong in (torch.randn(2, 3, 40, 32), torch.randn(2, 1, 32, 32), images().double(), images().to(torch.uint8)):
        errors = []
        for which in (other, model):
            with fastvit.use_backend("triton"), pytest.raises((RuntimeError, AssertionError)) as error:
                which(wrong)
            errors.append(str(error.value))
        assert errors[0] == errors[1]
    model, other = pair(DINOV2, modules=("patch_embed", "block"))
    for size in ((36, 32), (32, 44)):  # of which a convolution leaves out the edge
        uneven = torch.randn(2, 3, *size)
        assert ops_of(lambda uneven=uneven: model(uneven)) == BLOCKS
        with fastvit.use_backend("triton"):
            torch.testing.assert_close(DINOV2.run(model, uneven), DINOV2.run(other, uneven), rtol=1e-4, atol=1e-4)
    wide = VIT.model(img_size=32, embed_dim=288, num_heads=1)
    fastvit.accelerate(wide)
    want = wide(images())
    with fastvit.use_backend("triton"), pytest.raises(RuntimeError, match="head dimension 288"):
        wide(images())
    torch.testing.assert_close(wide(images()), want, rtol=0, atol=0)


@one_of_each
@torch.no_grad()
def test_what_dispatch_leaves_to_pytorch_is_the_librarys(family, monkeypatch):
    """As float32 on a GPU is, to the bit."""
    model, other = pair(family, modules=("patch_embed", "block"))
    monkeypatch.setattr(dispatch, "choose", lambda op, args: (op.torch, args))
    convolve, convolved = nn.Conv2d.forward, []
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: convolved.append(x.shape) or convolve(self, x))
    for dtype in (torch.float32, torch.bfloat16):
        want = family.run(other.to(dtype), images(dtype=dtype))
        with fastvit.use_backend("triton"):
            torch.testing.assert_close(family.run(model.to(dtype), images(dtype=dtype)), want, rtol=0, atol=0)
    assert len(convolved) == 4


@torch.no_grad()
def test_tensors_of_somebodys_class_are_the_librarys():
    class Named(torch.Tensor):
        pass

    model, other = pair(VIT, modules=("patch_embed", "block"))
    x = images().as_subclass(Named)
    assert ops_of(lambda: model(x)) == []
    with fastvit.use_backend("triton"):
        torch.testing.assert_close(model(x), other(x), rtol=0, atol=0)


def test_autocast():
    model, other = pair(VIT, modules=("patch_embed", "block"))
    with torch.no_grad():
        truth = copy.deepcopy(other).double()(images().double())
        with torch.autocast("cpu", torch.bfloat16):
            want = other(images())
            with fastvit.use_backend("triton"):
                got = model(images())
    assert got.dtype == want.dtype
    errors = [fastvit.accuracy.relative_rms(out, truth) for out in (got, want)]
    assert errors[0] <= 1.5 * errors[1]


def test_float16_where_a_backward_pass_may_come():
    """Its gradients may leave the range, so that the block has to be the library's own."""
    model = VIT.model().half()
    fastvit.accelerate(model, modules=("block",))
    assert ops_of(lambda: VIT.run(model, images().half())) == []
    with torch.no_grad():
        assert ops_of(lambda: VIT.run(model, images().half())) == BLOCKS


@torch.no_grad()
def test_blocks_in_a_row_hand_on_their_statistics(monkeypatch):
    taken = []
    take = fastvit.ops.transformer_block.__globals__["Carry"].take

    def noted(self, x, dtype):
        stream = take(self, x, dtype)
        taken.append(stream[2] is not None)
        return stream

    monkeypatch.setattr(fastvit.ops.transformer_block.__globals__["Carry"], "take", noted)
    for family in (VIT, TORCHVISION):
        model, other = pair(family)
        with fastvit.use_backend("triton"):
            got = family.run(model, images())
        torch.testing.assert_close(got, family.run(other, images()), rtol=1e-4, atol=1e-4)
        assert taken == [False, True]
        taken.clear()


@pytest.mark.parametrize("modules", [("block",), ("attention",)], ids=str)
def test_attention_maps_of_an_accelerated_model(modules):
    model, other = pair(VIT, modules=modules)
    with fastvit.use_backend("triton"):
        got = fastvit.attention_maps(model, images())
    torch.testing.assert_close(got, fastvit.attention_maps(other, images()), rtol=1e-4, atol=1e-5)


def test_a_whole_model_takes_less_than_half_a_second():
    model = timm.create_model("vit_base_patch16_224", device="meta")
    fastvit.accelerate(VIT.model())  # what only the first call does
    start = time.perf_counter()
    fastvit.accelerate(model, strict=True)
    assert time.perf_counter() - start < 0.5


@torch.no_grad()
def test_an_accelerated_model_freezes_as_it_was():
    model = VIT.model()
    want = fastvit.freeze(model, runtime="torch")(images())
    fastvit.accelerate(model)
    torch.testing.assert_close(fastvit.freeze(model, runtime="torch")(images()), want, rtol=0, atol=0)
    assert len(fastvit.accelerate(model).left_alone) == 3  # and it still is


def test_gradient_checkpointing():
    """timm's and transformers' own, around blocks on the kernels."""
    for family in (VIT, DINOV2):
        gradients = []
        for accelerated in (False, True):
            model = family.model().train()
            if accelerated:
                fastvit.accelerate(model)
            if family is VIT:
                model.set_grad_checkpointing()
            else:
                model.gradient_checkpointing_enable()
            with fastvit.use_backend("triton" if accelerated else "torch"):
                next(iter(family.run(model, images()).values())).square().sum().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------------------------------------------------
# What is swapped


def summary_of(model, **how):
    return {entry.name: (entry.kind, entry.swapped, entry.reason) for entry in fastvit.accelerate(model, **how).entries}


@pytest.mark.parametrize("name", ["timm ViT", "torchvision ViT", "transformers ViT", "transformers CLIP vision"])
@torch.no_grad()
def test_single_modules(name):
    """Each kind alone, and attention beside the MLP, give the model's numbers."""
    family = BY_NAME[name]
    want = family.run(family.model(), images())
    for kinds, ops in (
        (("patch_embed",), ["patch_embed"]),
        (("attention",), ["attention", "attention"]),
        (("mlp",), ["layer_norm_mlp", "layer_norm_mlp"]),
        (("mlp", "attention"), ["attention", "layer_norm_mlp"] * 2),
    ):
        model = family.model()
        summary = fastvit.accelerate(model, modules=kinds)
        assert {entry.kind for entry in summary.swapped} == set(kinds) and not summary.left_alone
        assert ops_of(lambda model=model: family.run(model, images())) == ops
        with fastvit.use_backend("triton"):
            torch.testing.assert_close(family.run(model, images()), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(family.run(model, images()), want, rtol=0, atol=0)


@pytest.mark.parametrize("block", ["ResPostBlock", "ParallelScalingBlock", "ParallelThingsBlock"])
@torch.no_grad()
def test_blocks_that_are_not_known_keep_their_own_way(block):
    cls = getattr(timm.models.vision_transformer, block)
    model, other = (VIT.model(block_fn=cls) for _ in range(2))
    found = summary_of(model)
    ops = ops_of(lambda: VIT.run(model, images()))
    if block == "ResPostBlock":
        assert found["blocks.0"] == ("block", False, "fastvit does not know its forward pass")
    if block != "ParallelScalingBlock":
        assert ops.count("attention") == sum(kind == "attention" for kind, _, _ in found.values()) >= 2
    with fastvit.use_backend("triton"):
        torch.testing.assert_close(VIT.run(model, images()), VIT.run(other, images()), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_block_whose_attention_is_not_plain_has_its_mlp_swapped():
    for options, reason in (
        ({"qk_norm": True}, "its q_norm is a LayerNorm, expected nn.Identity"),
        ({"scale_attn_norm": True}, "its norm is a LayerNorm, expected nn.Identity"),
    ):
        model, other = (VIT.model(**options) for _ in range(2))
        found = summary_of(model, modules=("block", "mlp", "attention"))
        assert found["blocks.0"] == ("block", False, reason)
        assert found["blocks.0.mlp"] == ("mlp", True, "")
        assert found["blocks.0.attn"] == ("attention", False, reason)
        with fastvit.use_backend("triton"):
            torch.testing.assert_close(VIT.run(model, images()), VIT.run(other, images()), rtol=1e-4, atol=1e-4)


def test_what_a_block_may_have_that_the_ops_have_not():
    reasons = {
        "its mlp": (
            "timm ViT",
            {"mlp_layer": timm.layers.GatedMlp},
            "fastvit does not know the forward pass of its mlp, a GatedMlp",
        ),
        "its act": ("timm ViT", {"act_layer": "relu"}, "its activation is a ReLU, which the ops have not"),
        "its norm": (
            "timm ViT",
            {"norm_layer": "rmsnorm"},
            "its norm1 is a RmsNorm, expected a LayerNorm with weight and bias",
        ),
        "act of transformers": (
            "transformers ViT",
            {"hidden_act": "gelu_new"},
            "its activation is a NewGELUActivation, which the ops have not",
        ),
        "gelu by formula": (
            "transformers ViT",
            {"hidden_act": "gelu_python"},
            "its activation is a GELUActivation, which the ops have not",
        ),
        "differential attention": (
            "timm ViT",
            {"attn_layer": "diff"},
            "fastvit does not know the forward pass of its attn, a DiffAttention",
        ),
        "gates last": (
            "timm ViT",
            {"mlp_layer": timm.layers.GluMlp},
            "of its mlp: its gates come last",
        ),
    }
    for what, (name, options, reason) in reasons.items():
        blocks = [e for e in fastvit.accelerate(BY_NAME[name].model(**options)).entries if e.kind == "block"]
        assert {(entry.swapped, entry.reason) for entry in blocks} == {(False, reason)}, what


def assert_the_same(model, other, ops):
    """On the kernels `model`, by these ops, gives what `other` gives."""
    assert ops_of(lambda: VIT.run(model, images())) == ops
    with fastvit.use_backend("triton"):
        torch.testing.assert_close(VIT.run(model, images()), VIT.run(other, images()), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_options_of_timms_layers():
    """That change what a block computes, or how: its gates, its scale, its LayerNorm."""
    model, other = (VIT.model(mlp_layer=timm.layers.SwiGLU) for _ in range(2))
    fastvit.accelerate(model, modules=("block",), strict=True)
    assert_the_same(model, other, BLOCKS)

    for fused, scaled in ((True, False), (False, True)):  # SDPA's own scale, or the attribute
        model, other = pair(VIT)
        plain = VIT.run(model, images())["out"]
        for which in (model, other):
            for block in which.blocks:
                block.attn.fused_attn, block.attn.scale = fused, 0.05
        assert (VIT.run(other, images())["out"] - plain).abs().max().gt(1e-3) == scaled
        assert_the_same(model, other, BLOCKS)

    model = VIT.model()
    for block in model.blocks:
        block.attn = timm.layers.Attention(48, 3, qkv_bias=True, gated=True)
    found = summary_of(model, modules=("block", "attention"))
    assert found["blocks.0"] == ("block", False, "of its attn: its output is gated")
    assert found["blocks.0.attn"] == ("attention", False, "its output is gated")

    timm.layers.set_fast_norm(True)
    try:
        model = VIT.model()
    finally:
        timm.layers.set_fast_norm(False)
    assert not any(swapped for _, swapped, _ in summary_of(model, modules=("block",)).values())


def test_drop_path_that_does_not_scale_what_it_keeps():
    model, other = (VIT.model(drop_path_rate=0.5).train() for _ in range(2))
    for which in (model, other):
        for block in which.blocks[1:]:
            block.drop_path1.scale_by_keep = block.drop_path2.scale_by_keep = False
    fastvit.accelerate(model, modules=("block",))
    torch.manual_seed(3)
    want = other(images(6))
    torch.manual_seed(3)
    with fastvit.use_backend("triton"):
        torch.testing.assert_close(model(images(6)), want, rtol=1e-4, atol=1e-4)


def test_packing_layers_of_which_some_have_a_bias():
    layers = [nn.Linear(4, 5), nn.Linear(4, 5, bias=False), nn.Linear(4, 5)]
    weight, bias = fastvit.dropin.plans.packed(layers)
    x = torch.randn(2, 4)
    torch.testing.assert_close(F.linear(x, weight, bias), torch.cat([layer(x) for layer in layers], -1))
    F.linear(x, weight, bias).sum().backward()
    assert all(p.grad is not None for layer in layers for p in layer.parameters())


def test_attention_that_is_no_self_attention_of_a_block():
    """That of SigLIP's pooling head asks with other queries than it has keys; grouped heads share keys."""
    found = summary_of(BY_NAME["transformers SigLIP vision"].model(), modules=("attention",))
    assert [*found] == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
    model = DINOV2.model()
    attention = model.encoder.layer[0].attention
    attention.k_proj, attention.v_proj = nn.Linear(48, 16), nn.Linear(48, 16)
    found = summary_of(model, modules=("block", "attention"))
    assert found["encoder.layer.0"] == ("block", False, "its attention's width is not its own")
    reason = "its queries, keys and values have not all as many heads"
    assert found["encoder.layer.0.attention"] == ("attention", False, reason)


class Louder(timm.models.vision_transformer.Block):
    def forward(self, x, attn_mask=None, is_causal=False):
        return 2 * super().forward(x, attn_mask, is_causal)


class Named(timm.models.vision_transformer.Block):
    """Of another name, and of the same forward pass."""


def test_a_class_is_known_by_its_forward_pass_and_not_by_its_name(monkeypatch):
    for cls, known in ((Louder, False), (Named, True)):
        found = summary_of(VIT.model(block_fn=cls), modules=("block",))
        assert [swapped for _, swapped, _ in found.values()] == [known] * 2

    def forward(self, x, attn_mask=None, is_causal=False):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm1(x))))
        return x

    monkeypatch.setattr(timm.models.vision_transformer.Block, "forward", forward)
    assert not any(swapped for _, swapped, _ in summary_of(VIT.model(), modules=("block",)).values())
    monkeypatch.undo()
    known = timm.models.vision_transformer.Block.forward
    monkeypatch.setattr(timm.models.vision_transformer.Block, "forward", functools.wraps(known)(lambda *args: 0))
    assert not any(swapped for _, swapped, _ in summary_of(VIT.model(), modules=("block",)).values())
    monkeypatch.undo()
    monkeypatch.setattr(timm.models.vision_transformer.Block, "__call__", lambda self, x: x, raising=False)
    assert not any(swapped for _, swapped, _ in summary_of(VIT.model(), modules=("block",)).values())
    monkeypatch.undo()
    source = sys.modules[DINOV2.model().__module__]
    for name, other in (("eager_attention_forward", lambda *args: 0), ("ALL_ATTENTION_FUNCTIONS", {})):
        monkeypatch.setattr(source, name, other)
        assert not any(swapped for _, swapped, _ in summary_of(DINOV2.model(), modules=("block",)).values()), name
        monkeypatch.undo()
    assert all(swapped for _, swapped, _ in summary_of(DINOV2.model(), modules=("block",)).values())
    monkeypatch.setattr(timm.layers.attention, "maybe_add_mask", lambda scores, mask: scores)
    assert not any(swapped for _, swapped, _ in summary_of(VIT.model(), modules=("block",)).values())


COPIED = '''
import torch
from torch import nn
{more}
class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(dim, 2 * dim), QuickGELU(), nn.Dropout(0.)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(2 * dim, dim), nn.Dropout(0.)

    def forward(self, x):
        """As others write it."""
        x = self.fc1(x)  # up
        x = self.act(x)
        x = self.drop1(x)
        x = self.norm(x)
        x = self.fc2(x)
        x = self.drop2(x)
        return x

def quick_gelu(x: torch.Tensor, inplace: bool = False):
    return x * torch.sigmoid({factor} * x)

class QuickGELU(nn.Module):
    def forward(self, input):
        return quick_gelu(input)
'''


@pytest.mark.parametrize(
    "factor, more, known", [(1.702, "", True), (1.7, "", False), (1.702, "import types as torch", False)]
)
def test_code_that_was_copied(tmp_path, monkeypatch, factor, more, known):
    """It is known where all that it says, and all that it calls, is what the library says."""
    name = f"copied_{abs(hash((factor, more)))}"
    text = COPIED.format(factor=factor, more="")
    (tmp_path / f"{name}.py").write_text(text + ("\nimport types as torch\n" if more else ""))
    monkeypatch.syspath_prepend(tmp_path)
    copied = __import__(name)
    model = VIT.model()
    for block in model.blocks:
        block.mlp = copied.Mlp(48)
    found = fastvit.accelerate(randomise(model), modules=("block",))
    assert [entry.swapped for entry in found.entries] == [known] * 2
    if known:
        assert "quick_gelu" in found.entries[0].options
        with torch.no_grad():
            want = VIT.run(model, images())
            with fastvit.use_backend("triton"):
                torch.testing.assert_close(VIT.run(model, images()), want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_angles_of_each_head_are_left_to_the_library():
    model, other = (
        randomise(timm.create_model("vit_small_patch16_rope_mixed_224", **SMALL | {"num_classes": 10})).eval()
        for _ in range(2)
    )
    other.load_state_dict(model.state_dict())
    fastvit.accelerate(model, modules=("block",), strict=True)
    assert ops_of(lambda: model(images())) == []
    torch.testing.assert_close(model(images()), other(images()), rtol=0, atol=0)


def test_models_that_have_nothing_to_swap():
    models = {
        torchvision.models.resnet18(): None,
        transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=8)): None,
        timm.create_model("beit_base_patch16_224", depth=1, embed_dim=48, num_heads=3): "takes relative positions",
        timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24): "does not know its forward pass",
    }
    for model, reason in models.items():
        classes = [type(module) for module in model.modules()]
        summary = fastvit.accelerate(model, modules=("block", "mlp"))
        assert [type(module) for module in model.modules()] == classes and not summary.swapped
        if reason is None:
            assert str(summary) == f"{type(model).__name__}: nothing swapped; it has no module that fastvit knows"
        else:
            assert reason in str(summary), summary
        with pytest.raises(ValueError, match="strict is True, but model is not wholly taken:\n"):
            fastvit.accelerate(model, modules=("block", "mlp"), strict=True)


def test_the_text_tower_of_clip_is_left_alone():
    text = {
        "vocab_size": 20,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    vision = {**text, "image_size": 32, "patch_size": 8}
    del vision["vocab_size"]
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    found = summary_of(model, modules=("block",))
    reason = "of its self_attn: it is of a model of text, which may attend causally"
    assert found == {
        "text_model.encoder.layers.0": ("block", False, reason),
        "vision_model.encoder.layers.0": ("block", True, ""),
    }


def test_a_model_that_is_accelerated_already():
    model = VIT.model()
    fastvit.accelerate(model)
    classes = [type(module) for module in model.modules()]
    found = summary_of(model)
    assert found == {
        name: (kind, False, "it is accelerated already")
        for name, kind in (("patch_embed.proj", "patch_embed"), ("blocks.0", "block"), ("blocks.1", "block"))
    }
    assert [type(module) for module in model.modules()] == classes


def test_quantised_weights():
    dynamic = torch.ao.quantization.quantize_dynamic(VIT.model(), {nn.Linear})
    found = summary_of(dynamic, modules=("block",))
    assert all(not swapped and "expected nn.Linear" in reason for _, swapped, reason in found.values()) and found

    class Quantised(torch.Tensor):
        pass

    model = VIT.model()
    linear = model.blocks[0].mlp.fc1
    model.blocks[1].mlp.fc1.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised))
    found = summary_of(model, modules=("block",))
    assert found["blocks.0"] == ("block", True, "")
    assert found["blocks.1"] == ("block", False, "it holds Quantised, quantised or distributed")
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised))  # afterwards
    assert ops_of(lambda: VIT.run(model, images())) == []


def test_a_model_without_memory():
    """It is accelerated before its weights come."""
    model = timm.create_model("vit_tiny_patch16_224", **SMALL, num_classes=10, device="meta").eval()
    assert len(fastvit.accelerate(model).swapped) == 3
    assert model(images().to("meta")).shape == (2, 10)
    model.load_state_dict(VIT.model().state_dict(), assign=True)
    assert ops_of(lambda: VIT.run(model, images())) == ["patch_embed", *BLOCKS]


def test_a_block_alone_and_a_model_in_a_module():
    block = VIT.model().blocks[0]
    (entry,) = fastvit.accelerate(block).entries
    assert (entry.name, entry.kind, entry.swapped) == ("the model itself", "block", True)
    assert ops_of(lambda: block(torch.randn(2, 5, 48))) == ["transformer_block"]
    assert type(fastvit.restore(block)) is timm.models.vision_transformer.Block
    ours = fastvit.create_model("vit_tiny_patch16_224", **SMALL)
    assert {entry.reason for entry in fastvit.accelerate(ours, modules=("block",)).entries} == {"it is fastvit's own"}
    outer = nn.ModuleDict({"a": VIT.model(), "b": DINOV2.model()})
    assert len(fastvit.accelerate(outer).swapped) == 6


def test_the_summary():
    model = BY_NAME["timm DINOv2 with registers"].model(drop_path_rate=0.1)
    text = str(fastvit.accelerate(model))
    assert text.splitlines()[0] == "VisionTransformer: 3 modules swapped, 0 left alone"
    assert "reg_token: 4 registers" in text
    assert "pos_embed: 16 learned positions, 0 of them for other tokens than patches" in text
    for other, rows in (("timm DeiT, distilled", 2), ("transformers ViT", 1), ("transformers SigLIP vision", 0)):
        lines = fastvit.accelerate(BY_NAME[other].model()).options
        assert any(f"{rows} of them for other tokens than patches" in line for line in lines), other
    assert "3 heads of 16, eps 1e-06, gelu, qkv bias, layer-scale, drop path 0.1" in text
    assert "blocks.0 " in text and "timm.models.vision_transformer.Block" in text
    assert "blocks.0 to blocks.1 (2)" in str(fastvit.accelerate(VIT.model()))


def test_wrong_arguments():
    for wrong in ("block", ("blocks",), (), None, 3, [nn.Linear]):
        model = VIT.model()
        with pytest.raises(ValueError, match="modules is .*, expected some of patch_embed, attention, mlp, block"):
            fastvit.accelerate(model, modules=wrong)
    for function in (fastvit.accelerate, fastvit.restore):
        with pytest.raises(TypeError, match="model is a str, expected a torch.nn.Module"):
            function("vit_tiny_patch16_224")
    model = VIT.model(act_layer="relu")
    with pytest.raises(ValueError, match="blocks.1: its activation is a ReLU, which the ops have not"):
        fastvit.accelerate(model, modules=("block",), strict=True)
    assert type(model.blocks[0]) is timm.models.vision_transformer.Block
    assert fastvit.restore(model) is model


def test_restoring_what_somebody_else_changed_since():
    model = VIT.model()
    fastvit.accelerate(model)
    block = model.blocks[1]
    block.__class__ = type("Wrapped", (type(block),), {})
    with pytest.raises(ValueError, match="model.blocks.1 is a Wrapped now"):
        fastvit.restore(model)
    assert ops_of(lambda: VIT.run(model, images())) == ["patch_embed", *BLOCKS]

"""What code written for timm reads and calls of a model, held against timm's own model of the same weights."""

from __future__ import annotations

import inspect

import pytest
import torch
from timm_pairs import DISTILLED, NAME, REGISTERS, SMALL, close, pair
from torch import nn

import fastvit
from fastvit.models.registry import MODELS

timm = pytest.importorskip("timm")


METHODS = ("forward", "forward_features", "forward_head", "forward_intermediates", "pool", "set_input_size")
METHODS += ("get_intermediate_layers", "prune_intermediate_layers", "reset_classifier", "group_matcher")


@pytest.mark.parametrize("method", METHODS)
def test_arguments_are_timms(method):
    ours, theirs = (
        inspect.signature(getattr(cls, method)).parameters.values()
        for cls in (fastvit.VisionTransformer, timm.models.VisionTransformer)
    )
    positional = [(p.name, p.default) for p in ours if p.kind is not p.KEYWORD_ONLY]
    own = [("masks", None)] if method in ("forward", "forward_features") else []
    assert positional == [(p.name, p.default) for p in theirs] + own


VALUES = ("embed_dim", "num_features", "head_hidden_size", "num_classes", "in_chans", "global_pool", "num_reg_tokens")
VALUES += ("num_prefix_tokens", "has_class_token", "no_embed_class", "pool_include_prefix", "dynamic_img_size")
VALUES += ("grad_checkpointing", "attn_pool", "feature_info")


MODULES = ("patch_embed", "pos_drop", "patch_drop", "norm_pre", "blocks", "norm", "fc_norm", "head_drop", "head")


@pytest.mark.parametrize(
    "name, overrides",
    [
        (NAME, {}),
        (NAME, {"global_pool": "avg", "class_token": False, "reg_tokens": 2, "in_chans": 1, "dynamic_img_size": True}),
        (DISTILLED, {}),
        (REGISTERS, {}),
    ],
)
def test_attributes_are_timms(name, overrides):
    model, peer = pair(name, **overrides)
    for attribute in VALUES:
        assert getattr(model, attribute) == getattr(peer, attribute), attribute
    for attribute in MODULES:
        ours, theirs = (type(getattr(m, attribute)).__name__ for m in (model, peer))
        assert ours == theirs, attribute
    for attribute in ("cls_token", "reg_token", "pos_embed"):
        ours, theirs = (getattr(m, attribute) for m in (model, peer))
        assert (ours is None) == (theirs is None)
    assert model.patch_embed.grid_size == peer.patch_embed.grid_size
    assert model.no_weight_decay() == peer.no_weight_decay()


@pytest.mark.parametrize("name", [NAME, REGISTERS, "vit_giant_patch14_reg4_dinov2"])
def test_init_weights_draws_what_timms_draws(name):
    """In memory that nothing wrote, and over weights; but not what the constructor has drawn already."""
    states = []
    for library in (fastvit, timm):
        model = library.create_model(name, **SMALL, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        for needs_reset in (True, False):
            torch.manual_seed(3)
            model.init_weights(needs_reset=needs_reset)
            states.append({key: tensor.clone() for key, tensor in model.state_dict().items()})
    torch.testing.assert_close(states[:2], states[2:], rtol=0, atol=0)
    model = fastvit.create_model(NAME, **SMALL, mask_token=True, device="meta").to_empty(device="cpu")
    model.init_weights()
    assert not model.mask_token.any()


@pytest.mark.parametrize("name", [NAME, REGISTERS, DISTILLED])
def test_a_patch_embedding_that_someone_watches(name):
    """Fused, called plainly and by timm's steps: the same numbers, with positions, masks and pixels in uint8."""
    images, masks = torch.randn(2, 3, 32, 32), torch.rand(2, 16) < 0.5
    if name != DISTILLED:
        model, peer = pair(name)
        close(model._pos_embed(model.patch_embed(images)), peer._pos_embed(peer.patch_embed(images)))
    model = fastvit.create_model(name, **SMALL, dynamic_img_size=True, mask_token=True).eval()
    pixels = torch.randint(256, (2, 3, 48, 24), dtype=torch.uint8)
    want = model(images, masks=masks), model(pixels)
    seen = []
    model.patch_embed.register_forward_hook(lambda module, arguments, output: seen.append((arguments, output)))
    close((model(images, masks=masks), model(pixels)), want)
    ((first,), tokens), ((second,), _) = seen
    assert torch.equal(first, images) and tokens.shape == (2, 16, 48)
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.config.mean, model.config.std))
    close(second, (pixels / 255 - mean) / std)
    with pytest.raises(TypeError, match="image is a NoneType"):
        model(None)
    with pytest.raises(ValueError, match="_pos_embed cannot tell the grid"):
        model._pos_embed(tokens)


@pytest.mark.parametrize("pool", ["", "token", "avg", "max", "avgmax", None])
def test_pool(pool):
    model, peer = pair()
    tokens = torch.randn(2, 17, 48)
    assert torch.equal(model.pool(tokens, pool), peer.pool(tokens, pool))
    with pytest.raises(ValueError, match="pool_type is 'prr', expected one of"):
        model.pool(tokens, "prr")
    with pytest.raises(ValueError, match="pool_type is 'map', but the model was built for 'token'"):
        model.pool(tokens, "map")


def test_a_pool_of_attention():
    model, peer = pair("vit_base_patch16_siglip_224")
    images = torch.randn(2, 3, 32, 32)
    close(model(images), peer(images))
    for pre_logits in (False, True):
        tokens = model.forward_features(images)
        close(model.forward_head(tokens, pre_logits), peer.forward_head(tokens, pre_logits))
    with pytest.raises(ValueError, match="pool_type is 'avg', but the model was built for 'map'"):
        model.pool(tokens, "avg")
    for each in (model, peer):
        each.reset_classifier(7)
        assert each.attn_pool is not None
        each.reset_classifier(0, "avg")
        assert each.attn_pool is None
    close(model(images), peer(images))
    assert list(model.state_dict()) == list(peer.state_dict())
    with pytest.raises(ValueError, match="num_heads is 5, expected a divisor of in_features, 48"):
        fastvit.nn.AttentionPoolLatent(48, num_heads=5)


def test_modules_put_where_timm_has_them_are_called():
    model, called = fastvit.create_model(NAME, **SMALL).eval(), []
    images = torch.randn(2, 3, 32, 32)
    model.norm_pre = nn.LayerNorm(48)
    close(model.embed(images).mean(-1), torch.zeros(2, 17))
    for name in ("norm_pre", "patch_drop", "pos_drop", "blocks"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    model(images)
    assert called == ["pos_drop", "patch_drop", "norm_pre", "blocks"]


@pytest.mark.parametrize("name", [NAME, "vit_giant_patch14_reg4_dinov2", DISTILLED])
def test_created_on_a_device_and_in_a_dtype(name):
    with torch.device("meta"):  # what is not built where it was asked for would land here
        model = fastvit.create_model(name, **SMALL, device="cpu", dtype=torch.bfloat16, mask_token=True)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", torch.bfloat16)}
    assert {p.device.type for p in fastvit.create_model(name, device="meta").parameters()} == {"meta"}
    # Rounded in 16 bits, timm's draws put one weight in 500 at 2 or -2, a hundred standard deviations out.
    assert max(block.attn.qkv.weight.abs().max() for block in model.blocks) < 0.2
    torch.manual_seed(5)
    want = fastvit.create_model(name, **SMALL)
    torch.manual_seed(5)
    got = fastvit.create_model(name, **SMALL, device="cpu", dtype=torch.float32)
    torch.testing.assert_close(dict(got.state_dict()), dict(want.state_dict()), rtol=0, atol=0)


def test_wrong_dtypes_are_refused():
    for dtype in ("bfloat16", torch.int8, 16):
        with pytest.raises(TypeError, match="dtype is .*expected a floating-point torch.dtype"):
            fastvit.create_model(NAME, dtype=dtype)


def test_none_leaves_a_field_as_it_is():
    """As in timm, whose scripts hand on every argument that nobody gave."""
    config = fastvit.create_model(REGISTERS, init_values=None, img_size=None, num_classes=None, device="meta").config
    assert config == MODELS[REGISTERS].config


def test_names_with_timms_tags():
    """Every tag that timm has of our names, with the facts about its weights and their images."""
    for name, entry in MODELS.items():
        default = timm.models.get_pretrained_cfg(name).tag
        assert fastvit.models.registry.model_entry(f"{name}.{default}") is entry
        for full in timm.list_pretrained(f"{name}.*"):
            facts, found = timm.models.get_pretrained_cfg(full), fastvit.models.registry.model_entry(full)
            assert found.tag == facts.tag and found.hub_id == facts.hf_hub_id, full
            for field in ("num_classes", "mean", "std", "crop_pct", "crop_mode", "interpolation"):
                assert getattr(found.config, field) == getattr(facts, field), (full, field)
            assert found.config.img_size == tuple(facts.input_size[1:])
    model = fastvit.create_model("vit_base_patch16_224.augreg_in21k", device="meta")
    assert model.pretrained_cfg["architecture"] == "vit_base_patch16_224" and model.num_classes == 21843
    assert model.pretrained_cfg["hf_hub_id"] == "timm/vit_base_patch16_224.augreg_in21k"
    with pytest.raises(
        ValueError, match="expected no tag of vit_base_patch16_384 or one of augreg_in21k_ft_in1k, orig"
    ):
        fastvit.create_model("vit_base_patch16_384.augreg_in21k")
    with pytest.raises(ValueError, match="no weights of vit_huge_patch14_224.untrained"):
        fastvit.create_model("vit_huge_patch14_224.untrained", pretrained=True)


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_gap_224", "resnet50", "vit_tiny_patch16_22.augreg_in21k"])
def test_timms_other_names_are_refused(name):
    with pytest.raises(ValueError, match=rf"unknown model '{name}'; .*fastvit.list_models\(\) has them all"):
        fastvit.create_model(name)


def test_layer_decay_and_averages_take_our_model():
    """timm's optimizer factory reads no_weight_decay and group_matcher, its averages copy the model."""
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3

    model, peer = pair()
    groups = [
        create_optimizer_v2(m, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.7).param_groups for m in (model, peer)
    ]
    facts = [[(g["lr_scale"], g["weight_decay"], len(g["params"])) for g in found] for found in groups]
    assert facts[0] == facts[1]
    averaged = ModelEmaV3(model)
    averaged.update(model)
    assert averaged.module.pretrained_cfg == model.pretrained_cfg

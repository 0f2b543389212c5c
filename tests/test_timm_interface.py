"""What code written for timm reads and calls, held against timm's own model of the same weights."""

from __future__ import annotations

import copy
import inspect
import itertools

import pytest
import torch
from samples import timm_masks
from torch import nn

import fastvit
from fastvit.models.backbone import FeatureGetterNet
from fastvit.models.patches import PatchDropout
from fastvit.models.registry import MODELS
from fastvit.models.weights import resample_position_table

timm = pytest.importorskip("timm")

NAME = "vit_tiny_patch16_224"
DISTILLED = "deit_tiny_distilled_patch16_224"
REGISTERS = "vit_small_patch14_reg4_dinov2"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def pair(name=NAME, ours=None, **overrides):
    """Our model and timm's, small, of the same random weights, in evaluation; `ours` is for our model alone."""
    arguments = {**SMALL, **overrides}
    peer = timm.create_model(name, **arguments).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model = fastvit.create_model(name, **{**arguments, **(ours or {})}).eval()
    model.load_state_dict(peer.state_dict(), strict=not ours)
    return model, peer


def close(got, want):
    torch.testing.assert_close(got, want, **CLOSE)


# What images are prepared from.


def test_data_config_follows_the_model():
    model = fastvit.create_model(
        NAME, img_size=(96, 64), in_chans=2, mean=(0.1, 0.2), std=(0.3, 0.4), num_classes=7, depth=1, device="meta"
    )
    got = timm.data.resolve_model_data_config(model)
    want = {"input_size": (2, 96, 64), "mean": (0.1, 0.2), "std": (0.3, 0.4), "crop_pct": 0.9}
    assert got == {**want, "interpolation": "bicubic", "crop_mode": "center"}
    assert model.pretrained_cfg["num_classes"] == 7
    model.reset_classifier(5)
    model.set_input_size(128)
    assert model.pretrained_cfg["num_classes"] == 5
    assert timm.data.resolve_data_config(model=model)["input_size"] == (2, 128, 128)
    assert fastvit.create_model(NAME, dynamic_img_size=True, depth=1).pretrained_cfg["fixed_input_size"] is False


@pytest.mark.parametrize("name", [NAME, "deit_base_patch16_384", "vit_base_patch14_dinov2"])
def test_transforms_are_timms(name):
    transforms = [
        timm.data.create_transform(**timm.data.resolve_model_data_config(library.create_model(name, device="meta")))
        for library in (fastvit, timm)
    ]
    assert str(transforms[0]) == str(transforms[1])


@pytest.mark.parametrize("name", [NAME, "deit_tiny_patch16_224"])
@pytest.mark.parametrize("in_chans", [1, 4])
def test_statistics_of_other_channels_are_those_of_timms_scripts(name, in_chans):
    from timm.data.model_config import resolve_input_data_config

    ours, theirs = (library.create_model(name, in_chans=in_chans, device="meta") for library in (fastvit, timm))
    got = timm.data.resolve_data_config(model=ours)
    assert got == resolve_input_data_config(theirs)
    assert (ours.config.mean, ours.config.std) == (got["mean"], got["std"])


# Images of other sizes.


@pytest.mark.parametrize("name", [NAME, DISTILLED, REGISTERS])
@pytest.mark.parametrize("size", [(32, 32), (48, 24), (16, 16)])
def test_dynamic_image_size(name, size):
    model, peer = pair(name, dynamic_img_size=True)
    images = torch.randn(2, 3, *size)
    close(model(images), peer(images))
    got, want = (m.forward_intermediates(images, 2) for m in (model, peer))
    close(got, want)
    images.requires_grad_()
    for m in (model, peer):
        m(images).sum().backward()
    close(model.pos_embed.grad, peer.pos_embed.grad)


def test_dynamic_padding():
    model, peer = pair(dynamic_img_size=True, dynamic_img_pad=True)
    images = torch.randn(2, 3, 35, 41)
    close(model(images), peer(images))
    got, want = (m.forward_intermediates(images, 1, intermediates_only=True) for m in (model, peer))
    assert got[0].shape == (2, 48, 5, 6)
    close(got, want)
    pixels = torch.randint(256, (2, 3, 35, 41), dtype=torch.uint8)
    close(model(pixels), model((pixels / 255 - 0.5) / 0.5))


@pytest.mark.parametrize("policy", ["bicubic", "dinov2"])
def test_dynamic_image_size_by_the_models_policy(policy):
    model = fastvit.create_model(NAME, **SMALL, dynamic_img_size=True, pos_resampling=policy).eval()
    images = torch.randn(2, 3, 48, 24)
    fixed = fastvit.create_model(NAME, **{**SMALL, "img_size": (48, 24)}).eval()
    table = resample_position_table(model.pos_embed, (4, 4), (6, 3), 1, policy)
    fixed.load_state_dict({**model.state_dict(), "pos_embed": table})
    close(model(images), fixed(images))


def test_images_that_do_not_fit_are_refused():
    model = fastvit.create_model(NAME, **SMALL, dynamic_img_size=True)
    for size, text in {(3, 33, 32): "image is 33 x 32, expected multiples", (1, 32, 32): "image has shape"}.items():
        with pytest.raises(ValueError, match=text):
            model(torch.zeros(1, *size))
    with pytest.raises(TypeError, match="image is a list"):
        model([1])


def test_dynamic_image_size_and_masks_compile_and_export():
    overrides = {"depth": 1, "dynamic_img_size": True, "mask_token": True, "global_pool": "avg"}
    model = fastvit.create_model(NAME, **{**SMALL, **overrides}).eval()
    images, masks = torch.randn(2, 3, 48, 24), torch.rand(2, 18) < 0.5
    want = model(images, masks=masks)
    close(torch.compile(model, fullgraph=True, backend="aot_eager")(images, masks=masks), want)
    close(torch.export.export(model, (images,), {"masks": masks}).module()(images, masks=masks), want)


@pytest.mark.parametrize("name", [NAME, REGISTERS])
@pytest.mark.parametrize(
    "change", [{"img_size": (48, 24)}, {"patch_size": 4}, {"img_size": 48, "patch_size": (16, 8)}, {"img_size": 32}]
)
def test_set_input_size(name, change):
    model, peer = pair(name)
    for m in (model, peer):
        m.pos_embed.requires_grad_(False)
        m.set_input_size(**change)
    torch.testing.assert_close(dict(model.state_dict()), dict(peer.state_dict()), rtol=1e-5, atol=1e-6)
    assert model.patch_embed.grid_size == peer.patch_embed.grid_size == model.config.grid_size
    assert model.config.patch_size == peer.patch_embed.patch_size and not model.pos_embed.requires_grad
    images = torch.randn(2, 3, *model.config.img_size)
    close(model(images), peer(images))
    assert model.feature_info[0]["reduction"] == max(model.config.patch_size)
    # The state still fits a model built for that size.
    fastvit.create_model(name, **{**SMALL, **change}).load_state_dict(model.state_dict())


def test_set_input_size_refuses_what_does_not_fit():
    model = fastvit.create_model(NAME, **SMALL)
    for change, text in {"img_size": "img_size is .*30", "patch_size": "img_size is .*multiples of patch_size"}.items():
        with pytest.raises(ValueError, match=text):
            model.set_input_size(**{change: 30})
    assert model.config.img_size == model.patch_embed.img_size == (32, 32)


# Masks.


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mask", ["padding", "pairs", "additive", "causal"])
def test_attention_masks(mask, checkpointing):
    model, peer = pair()
    masks = timm_masks(17, 3)[mask]
    model.set_grad_checkpointing(checkpointing)
    images = torch.randn(2, 3, 32, 32)
    want = peer(images, **masks)
    assert (want - peer(images)).abs().max() > 1e-2
    close(model(images, **masks), want)
    close(
        model(images, *[masks.get(name, default) for name, default in (("attn_mask", None), ("is_causal", False))]),
        want,
    )
    close(model.forward_features(images, **masks), peer.forward_features(images, **masks))
    close(model.forward_intermediates(images, 2, **masks), peer.forward_intermediates(images, 2, **masks))
    if "attn_mask" in masks:
        got, want = (m.get_intermediate_layers(images, 2, **masks) for m in (model, peer))
        close(got, want)


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_mask_tokens_are_those_of_dinov2(registers, size):
    """Against Hugging Face's Dinov2, whose masked patches are replaced before positions come in."""
    transformers = pytest.importorskip("transformers")
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(
        image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=1, num_attention_heads=3
    )
    peer = getattr(transformers, f"{kind}Model")(config).embeddings.eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_()
    name = REGISTERS if registers else "vit_small_patch14_dinov2"
    policy = "antialias" if registers else "bicubic"
    model = fastvit.create_model(
        name, **{**SMALL, "depth": 1}, mask_token=True, dynamic_img_size=True, pos_resampling=policy
    ).eval()
    state = dict(peer.named_parameters())
    with torch.no_grad():
        table = state["position_embeddings"]
        model.pos_embed.copy_(table[:, 1:] if registers else table)
        model.cls_token.copy_(state["cls_token"] + (table[:, :1] if registers else 0))
        if registers:
            model.reg_token.copy_(state["register_tokens"])
        model.mask_token.copy_(state["mask_token"])
        model.patch_embed.proj.weight.copy_(state["patch_embeddings.projection.weight"])
        model.patch_embed.proj.bias.copy_(state["patch_embeddings.projection.bias"])
    images = torch.randn(2, 3, *size)
    masks = torch.rand(2, size[0] * size[1] // 64) < 0.5
    got, want = model.embed(images, masks), peer(images, bool_masked_pos=masks)
    close(got, want)
    assert not torch.allclose(got, model.embed(images))

    got.square().sum().backward()
    want.square().sum().backward()
    close(model.mask_token.grad, peer.mask_token.grad)
    close(model.patch_embed.proj.weight.grad, peer.patch_embeddings.projection.weight.grad)
    table_grad = peer.position_embeddings.grad
    close(model.pos_embed.grad, table_grad[:, 1:] if registers else table_grad)


def test_masked_features_and_logits():
    model = fastvit.create_model(NAME, **SMALL, mask_token=True).eval()
    assert not model.mask_token.any() and model.mask_token.shape == (1, 48)
    assert "mask_token" not in fastvit.create_model(NAME, **SMALL).state_dict()
    images, masks = torch.randn(2, 3, 32, 32), torch.rand(2, 16) < 0.5
    tokens = model.norm(model.blocks(model.embed(images, masks)))
    close(model.forward_features(images, masks=masks), tokens)
    close(model(images, masks=masks), model.forward_head(tokens))
    nothing = torch.zeros(2, 16, dtype=torch.bool)
    assert torch.equal(model(images, masks=nothing), model(images))


@pytest.mark.parametrize(
    "masks, error, text",
    [
        (
            torch.zeros(2, 17, dtype=torch.bool),
            ValueError,
            r"masks has shape \(2, 17\), expected one a patch, \(2, 16\)",
        ),
        (torch.zeros(2, 16), TypeError, "masks is torch.float32, expected a tensor of torch.bool"),
        ([True], TypeError, "masks is list, expected a tensor"),
    ],
)
def test_bad_masks(masks, error, text):
    images = torch.zeros(2, 3, 32, 32)
    with pytest.raises(error, match=text):
        fastvit.create_model(NAME, **SMALL, mask_token=True)(images, masks=masks)
    with pytest.raises(ValueError, match="without mask_token, expected one built with mask_token=True"):
        fastvit.create_model(NAME, **SMALL)(images, masks=masks)


# Dropout of patches.


@pytest.mark.parametrize("name", [NAME, DISTILLED, REGISTERS])
def test_patch_dropout_draws_as_timm(name):
    model, peer = pair(name, patch_drop_rate=0.4)
    assert isinstance(model.patch_drop, PatchDropout) and isinstance(pair(name)[0].patch_drop, nn.Identity)
    # timm tells its dropout of one prefix token only in a distilled model: the other may be dropped there.
    peer.patch_drop.num_prefix_tokens = model.num_prefix_tokens
    images = torch.randn(2, 3, 32, 32)
    close(model(images), peer(images))
    results = []
    for m in (model, peer):
        torch.manual_seed(3)
        m.train()
        results.append((m.forward_features(images), *m.forward_intermediates(images, 2, True, output_fmt="NLC")))
    assert results[0][0].shape == (2, model.num_prefix_tokens + 9, 48)
    close(results[0], results[1])
    with pytest.raises(ValueError, match="output_fmt is 'NCHW', but in training patch dropout leaves no grid"):
        model.forward_intermediates(images)
    assert model.eval().forward_intermediates(images)[1][0].shape == (2, 48, 4, 4)


def test_patch_dropout_keeps_one_patch():
    model = fastvit.create_model(NAME, **SMALL, patch_drop_rate=0.99).train()
    assert model.forward_features(torch.randn(2, 3, 32, 32)).shape == (2, 2, 48)


# Intermediate layers and backbones.


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


@pytest.mark.parametrize("name", [NAME, REGISTERS])
def test_intermediates_in_a_dict(name):
    model, peer = pair(name)
    images = torch.randn(2, 3, 32, 32)
    for prefix, fmt, only in itertools.product((False, True), ("NCHW", "NLC"), (False, True)):
        arguments = ([0, -1], prefix, True, False, fmt, only, True)
        got, want = (m.forward_intermediates(images, *arguments) for m in (model, peer))
        assert got.keys() == want.keys()
        close(got, want)


def test_class_tokens_as_dinov2_returns_them():
    model = fastvit.create_model(REGISTERS, **SMALL).eval()
    images = torch.randn(2, 3, 32, 32)
    for reshape in (False, True):
        got = model.get_intermediate_layers(images, [0, 2], reshape, return_class_token=True, norm=True)
        want = model.get_intermediate_layers(images, [0, 2], reshape, return_prefix_tokens=True, norm=True)
        close(got, [(patches, prefix[:, 0]) for patches, prefix in want])
    model = fastvit.create_model(NAME, **SMALL, class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match="return_class_token is True, expected a model with one"):
        model.get_intermediate_layers(images, return_class_token=True)


@pytest.mark.parametrize(
    "name, overrides", [(NAME, {}), (NAME, {"global_pool": "avg"}), (DISTILLED, {}), (REGISTERS, {})]
)
@pytest.mark.parametrize("prune_norm, prune_head", [(False, True), (True, False), (True, True)])
def test_pruning(name, overrides, prune_norm, prune_head):
    model, peer = pair(name, **overrides)
    kept = [m.prune_intermediate_layers([0, -2], prune_norm, prune_head) for m in (model, peer)]
    assert kept[0] == kept[1]
    torch.testing.assert_close(dict(model.state_dict()), dict(peer.state_dict()), rtol=0, atol=0)
    images = torch.randn(2, 3, 32, 32)
    close(model(images), peer(images))
    close(model.forward_intermediates(images, kept[0]), peer.forward_intermediates(images, kept[0]))
    # The config says what is left.
    built = fastvit.VisionTransformer(model.config)
    assert built.state_dict().keys() == model.state_dict().keys()
    assert len(model.feature_info) == model.config.depth == len(model.blocks)


@pytest.mark.parametrize("name", [NAME, DISTILLED, REGISTERS])
@pytest.mark.parametrize("out_indices", [None, 1, (0, 1), [-1, 0]])
def test_features_only(name, out_indices):
    overrides = {"features_only": True, "img_size": (32, 48)}
    if out_indices is not None:
        overrides["out_indices"] = out_indices
    ours = fastvit.create_model(name, **{**SMALL, **overrides})
    theirs = timm.create_model(name, **{**SMALL, **overrides})
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, FeatureGetterNet)
    images = torch.randn(2, 3, 32, 48)
    close(ours.eval()(images), theirs.eval()(images))
    # timm lists the facts in the order that was asked for, but returns the maps in the order of the blocks.
    ours, theirs = ours.feature_info, theirs.feature_info
    assert ours.module_name() == sorted(theirs.module_name())
    for facts in ("channels", "reduction"):
        assert getattr(ours, facts)() == getattr(theirs, facts)()
    for idx in (0, [0]):
        for facts in ("channels", "reduction", "module_name"):
            assert getattr(ours, facts)(idx) == getattr(theirs, facts)(idx)
        for keys in (["num_chs", "reduction"], ["module"]):
            assert ours.get_dicts(keys, idx) == theirs.get_dicts(keys, idx)
    assert ours.get_dicts() == [ours[index] for index in ours.out_indices]
    assert timm.models._features.FeatureInfo(ours, [0]).channels() == [48]


def test_backbone_facts():
    backbone = fastvit.create_model(NAME, **SMALL, features_only=True, in_chans=1)
    assert backbone.out_indices == [0, 1, 2] and backbone.in_chans == 1
    assert timm.data.resolve_data_config(model=backbone)["input_size"] == (1, 32, 32)
    assert not {"num_classes", "classifier"} & backbone.default_cfg.keys()
    assert backbone.feature_info.info == list(backbone.feature_info) and backbone.feature_info.get("index") == [0, 1, 2]
    with pytest.raises(ValueError, match=r"^out_indices is \[3\], expected block numbers"):
        fastvit.create_model(NAME, **SMALL, features_only=True, out_indices=[3])
    with pytest.raises(ValueError, match="out_indices is 2, but features_only is False"):
        fastvit.create_model(NAME, **SMALL, out_indices=2)


def test_a_backbone_takes_a_checkpoint_of_any_classifier(tmp_path):
    source = fastvit.create_model(NAME, **SMALL)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    sizes = {name: value for name, value in SMALL.items() if name != "num_classes"}
    backbone = fastvit.create_model(NAME, checkpoint=tmp_path / "w.pth", features_only=True, **sizes)
    assert torch.equal(backbone.model.pos_embed, source.pos_embed)


@pytest.mark.parametrize("norm", [False, True])
def test_timms_feature_getter_takes_our_model(norm):
    model, peer = pair()
    images = torch.randn(2, 3, 32, 32)
    ours, theirs = (timm.models._features.FeatureGetterNet(m, (0, 2), norm=norm) for m in (model, peer))
    close(ours(images), theirs(images))
    assert ours.feature_info.get_dicts() == theirs.feature_info.get_dicts()


def test_timms_hook_net_takes_our_model():
    model, peer = pair()
    images = torch.randn(2, 3, 32, 32)
    ours, theirs = (timm.models._features.FeatureHookNet(m, (0, 2)) for m in (model, peer))
    close(ours(images), theirs(images))


# Tracing.


@pytest.mark.parametrize(
    "name, overrides",
    [
        (NAME, {}),
        (NAME, {"global_pool": "avg", "class_token": False}),
        (NAME, {"dynamic_img_size": True, "dynamic_img_pad": True}),
        (DISTILLED, {}),
        (REGISTERS, {"patch_drop_rate": 0.5}),
    ],
)
def test_symbolic_trace(name, overrides):
    model, peer = pair(name, **overrides)
    traced = torch.fx.symbolic_trace(model)
    size = (40, 37) if "dynamic_img_size" in overrides else (32, 32)
    images = torch.randn(2, 3, *size)
    close(traced(images), peer(images))
    count = 16 if size == (32, 32) else 25
    mask = torch.rand(count + model.num_prefix_tokens, count + model.num_prefix_tokens) < 0.7
    close(traced(images, mask), peer(images, mask))
    close(copy.deepcopy(traced)(images), peer(images))
    with pytest.raises(ValueError, match="without mask_token"):
        traced(images, masks=torch.ones(2, count, dtype=torch.bool))


def test_tracing_keeps_mask_tokens():
    model = fastvit.create_model(NAME, **SMALL, mask_token=True).eval()
    images, masks = torch.randn(2, 3, 32, 32), torch.rand(2, 16) < 0.5
    traced = torch.fx.symbolic_trace(model)
    close(traced(images, masks=masks), model(images, masks=masks))
    close(traced(images), model(images))


def test_feature_extractors_by_tracing():
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model, peer = pair()
    images = torch.randn(2, 3, 32, 32)
    assert {"blocks.1", "norm"} <= {name.rsplit(".add", 1)[0] for name in get_graph_node_names(model)[1]}
    maps = peer.forward_intermediates(images, output_fmt="NLC", return_prefix_tokens=True)[1]
    want = torch.cat(maps[1][::-1], dim=1)
    for make in (create_feature_extractor, timm.models.create_feature_extractor):
        got = make(model, {"blocks.1": "middle", "norm": "last"})(images)
        close(got, {"middle": want, "last": peer.forward_features(images)})
    got = timm.models.FeatureGraphNet(model, (0, 1))(images)
    close(got[1], want)


# Everything else that code reads.


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
    with pytest.raises(ValueError, match="pool_type is 'map', expected one of"):
        model.pool(tokens, "map")


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


def test_names_with_timms_default_tag():
    for name, entry in MODELS.items():
        tag = timm.models.get_pretrained_cfg(name).tag
        assert fastvit.models.registry.model_entry(f"{name}.{tag}") is entry
    model = fastvit.create_model(f"{NAME}.augreg_in21k_ft_in1k", device="meta")
    assert model.pretrained_cfg["architecture"] == NAME
    with pytest.raises(
        ValueError, match="vit_base_patch16_224 has only the tag 'augreg2_in21k_ft_in1k' here; checkpoint"
    ):
        fastvit.create_model("vit_base_patch16_224.augreg_in21k")


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "resnet50", "vit_tiny_patch16_22.augreg_in21k"])
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

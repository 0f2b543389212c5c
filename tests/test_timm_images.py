"""Images of any size, attention masks, mask tokens and dropped patches, held against timm's own models."""

from __future__ import annotations

import pytest
import torch
from samples import timm_masks
from timm_pairs import DISTILLED, NAME, REGISTERS, SMALL, close, pair
from torch import nn

import fastvit
from fastvit.models.patches import PatchDropout
from fastvit.models.weights import resample_position_table

timm = pytest.importorskip("timm")


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

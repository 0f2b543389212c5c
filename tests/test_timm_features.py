"""Intermediate features, pruned models, backbones and torch.fx, held against timm's own models."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from timm_pairs import DISTILLED, NAME, REGISTERS, SMALL, close, pair

import fastvit
from fastvit.models.backbone import FeatureGetterNet

timm = pytest.importorskip("timm")


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

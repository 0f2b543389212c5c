"""The model: its configuration, the table of names, forward passes against the reference, and its interface."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn

import fastvit
from fastvit import ViTConfig, reference
from fastvit.models import vision_transformer
from fastvit.nn.layers import ACTIVATION_LAYERS

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}


def small(name="vit_tiny_patch16_224", **overrides):
    """A small model with no parameter left at zero or one."""
    model = fastvit.create_model(name, **{**SMALL, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {}),
    "average": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False, "norm_eps": 1e-2}),
    "tokens": ("vit_tiny_patch16_224", {"global_pool": "", "num_classes": 0, "activation": "gelu_tanh"}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "dinov2": ("vit_small_patch14_dinov2", {"num_classes": 0}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "swiglu": ("vit_giant_patch14_reg4_dinov2", {"num_classes": 0}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "dinov3 gated": ("vit_small_plus_patch16_dinov3_qkvb", {"num_classes": 0, "img_size": (32, 48)}),
    "siglip": ("vit_base_patch32_siglip_256", {"num_classes": 0}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_the_references(family):
    name, overrides = FAMILIES[family]
    model = small(name, **overrides).double().eval()
    config = model.config
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    want = reference.vision_transformer(
        images,
        model.state_dict(),
        num_heads=config.num_heads,
        eps=config.norm_eps,
        activation=config.activation,
        mlp=config.mlp,
        global_pool=config.global_pool,
        rope_temperature=config.rope_temperature,
    )
    torch.testing.assert_close(model(images), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_uint8_images_are_normalised_inside(family):
    name, overrides = FAMILIES[family]
    model = small(name, **overrides).eval()
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.config.mean, model.config.std))
    torch.testing.assert_close(model(pixels), model((pixels / 255 - mean) / std), rtol=1e-4, atol=1e-4)


def test_autocast_and_half_precision_images():
    model = small().eval()
    images = torch.randn(2, 3, 32, 32)
    want = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), want, rtol=0.05, atol=0.05)
    assert model(images.bfloat16()).dtype == torch.float32
    assert model.bfloat16()(images).dtype == torch.bfloat16


def test_model_compiles_in_one_piece():
    model = small("vit_small_patch14_reg4_dinov2").eval()
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)


def test_an_empty_batch():
    assert small().eval()(torch.empty(0, 3, 32, 32)).shape == (0, 10)


def test_checkpointing_changes_no_gradient_and_keeps_less(monkeypatch):
    kept = {}
    gradients = {}
    images = torch.randn(2, 3, 32, 32)
    model = small(depth=4, drop_path_rate=0.5).train()
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(5)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            loss = model(images).square().sum()
        kept[enable] = sum(sizes)
        loss.backward()
        gradients[enable] = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    torch.testing.assert_close(gradients[True], gradients[False])
    assert kept[True] < kept[False] / 2
    with torch.no_grad():
        model(images)

    # Blocks whose input needs no gradient have gradients all the same.
    model.zero_grad()
    for frozen in (model.patch_embed.proj.weight, model.patch_embed.proj.bias, model.cls_token, model.pos_embed):
        frozen.requires_grad_(False)
    model(images).sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad is not None


def test_dropout_rates_reach_their_layers():
    model = small(drop_rate=0.1, pos_drop_rate=0.2, proj_drop_rate=0.3, attn_drop_rate=0.4, drop_path_rate=0.5)
    block = model.blocks[1]
    assert (model.head_drop.p, model.pos_drop.p, block.attn.attn_drop.p) == (0.1, 0.2, 0.4)
    assert block.attn.proj_drop.p == block.mlp.drop1.p == block.mlp.drop2.p == 0.3
    assert isinstance(model.blocks[0].drop_path1, nn.Identity)
    assert [b.drop_path2.drop_prob for b in model.blocks[1:]] == [0.25, 0.5]
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_intermediates():
    model = small(img_size=(32, 48), reg_tokens=2).eval()
    images = torch.randn(2, 3, 32, 48)
    features, maps = model.forward_intermediates(images, indices=2, norm=True)
    torch.testing.assert_close(features, model.forward_features(images))
    assert [m.shape for m in maps] == [(2, 48, 4, 6)] * 2
    assert torch.equal(maps[-1], features[:, 3:].transpose(1, 2).reshape(2, 48, 4, 6)) and maps[-1].is_contiguous()
    every = model.forward_intermediates(images, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True)
    assert [(patches.shape, prefix.shape) for patches, prefix in every] == [((2, 24, 48), (2, 3, 48))] * 3
    torch.testing.assert_close(model.norm(torch.cat(every[-1][::-1], dim=1)), features)

    ran = []
    model.blocks[2].register_forward_hook(lambda *_: ran.append(1))
    first = model.get_intermediate_layers(images, n=[0])
    early, _ = model.forward_intermediates(images, [0], stop_early=True)
    assert not ran and torch.equal(first[0], every[0][0])
    torch.testing.assert_close(early, model.norm(torch.cat(every[0][::-1], dim=1)))


def test_reset_classifier():
    model = small().eval()
    images = torch.randn(2, 3, 32, 32)
    features = model.forward_features(images)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7) and model.num_classes == 7 and not model.head.training
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(images), features[:, 1:].mean(dim=1))
    assert isinstance(model.norm, nn.LayerNorm) and model.config.norm_after_pool is False
    model.bfloat16().reset_classifier(4, "token")
    assert model(images).shape == (2, 4) and model.head.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="global_pool is 'map'"):
        model.reset_classifier(4, "map")
    assert model.num_classes == 4

    distilled = small("deit_tiny_distilled_patch16_224")
    distilled.reset_classifier(7)
    assert [head.out_features for head in distilled.get_classifier()] == [7, 7]
    assert small().get_classifier().out_features == 10


def test_distilled_heads():
    model = small("deit_tiny_distilled_patch16_224")
    images = torch.randn(2, 3, 32, 32)
    mean = model(images)
    model.set_distilled_training()
    by_class, by_distillation = model(images)
    torch.testing.assert_close((by_class + by_distillation) / 2, mean)
    tokens = model.forward_features(images)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, :2].mean(dim=1))
    assert isinstance(model.eval()(images), torch.Tensor)
    with pytest.raises(ValueError, match="distilled"):
        small().set_distilled_training()


def test_list_models():
    names = fastvit.list_models()
    assert names == sorted(names) and "vit_base_patch16_224" in names
    assert fastvit.list_models("deit_*_384") == ["deit_base_distilled_patch16_384", "deit_base_patch16_384"]
    assert fastvit.list_models("resnet*") == []
    tiny = fastvit.list_models(["deit_tiny_*", "vit_tiny_*", "*_tiny_*"])
    assert tiny == [name for name in names if "tiny" in name]
    assert fastvit.list_models(filter="*tiny*", exclude_filters="vit_*") == [n for n in tiny if n.startswith("deit")]
    assert fastvit.list_models(exclude_filters=["vit_*", "deit*"]) == []
    weights = fastvit.list_models(["vit_large_patch1*_224", "vit_huge_patch14_224", "*32_clip_quick*"], weights=True)
    assert list(weights["vit_large_patch16_224"]) == ["augreg_in21k_ft_in1k", "orig_in21k", "augreg_in21k", "mae"]
    assert weights["vit_large_patch14_224"] == {}
    assert weights["vit_huge_patch14_224"]["mae"] == "timm/vit_huge_patch14_224.mae"
    assert weights["vit_base_patch32_clip_quickgelu_224"]["openai"] == "timm/vit_base_patch32_clip_224.openai"
    for name, value in (("filter", 3), ("filter", ["*", None]), ("exclude_filters", None)):
        with pytest.raises(TypeError, match=f"^{name} is .*, expected a shell pattern or a list of them$"):
            fastvit.list_models(**{name: value})


def test_config_is_frozen_and_complete():
    config = ViTConfig(img_size=224, patch_size=(16, 32), mean=[0.1, 0.2, 0.3])
    assert config.img_size == (224, 224) and config.grid_size == (14, 7) and config.mean == (0.1, 0.2, 0.3)
    assert hash(config) == hash(ViTConfig(patch_size=[16, 32], mean=(0.1, 0.2, 0.3)))
    with pytest.raises(FrozenInstanceError):
        config.depth = 3
    assert set(ACTIVATION_LAYERS) == set(reference.ops.ACTIVATIONS)


@pytest.mark.parametrize(
    "overrides, error, text",
    [
        ({"num_heads": 5}, ValueError, "num_heads is 5, expected a divisor of embed_dim, 768"),
        ({"img_size": 225}, ValueError, r"img_size is \(225, 225\), expected multiples of patch_size, \(16, 16\)"),
        ({"img_size": "big"}, ValueError, "img_size is 'big', expected a positive integer or"),
        ({"patch_size": -1}, ValueError, "patch_size is -1"),
        ({"global_pool": "prr"}, ValueError, "global_pool is 'prr', expected one of"),
        ({"crop_mode": "border"}, ValueError, "crop_mode is 'border', expected one of"),
        ({"activation": "relu"}, ValueError, "activation is 'relu', expected one of"),
        ({"mlp": "glu"}, ValueError, "mlp is 'glu', expected one of"),
        ({"pos_resampling": "nearest"}, ValueError, "pos_resampling is 'nearest'"),
        ({"depth": 0}, ValueError, "depth is 0, expected an integer of at least 1"),
        ({"embed_dim": 76.8}, ValueError, "embed_dim is 76.8"),
        ({"num_classes": -1}, ValueError, "num_classes is -1"),
        ({"mlp_ratio": 0}, ValueError, "mlp_ratio is 0, expected a positive"),
        ({"drop_path_rate": 1.0}, ValueError, "drop_path_rate is 1.0, expected a rate"),
        ({"drop_rate": float("nan")}, ValueError, "drop_rate is nan"),
        ({"qkv_bias": 1}, TypeError, "qkv_bias is 1, expected a bool"),
        ({"class_token": False}, ValueError, "global_pool is 'token'"),
        ({"mean": (0.5,)}, ValueError, r"mean is \(0.5,\), expected one number for each channel, 3"),
        ({"mean": 0.5}, ValueError, "mean is 0.5, expected one number for each channel, 3"),
        ({"std": "abc"}, ValueError, "std is 'abc', expected one number for each channel, 3"),
        ({"mean": (0.5, float("nan"), 0.5)}, ValueError, "mean is .*nan.*, expected one number"),
        ({"std": (1, 0, 1)}, ValueError, "std is .* expected positive"),
        ({"in_chans": "RGB"}, ValueError, "in_chans is 'RGB', expected an integer of at least 1"),
        ({"in_chans": True}, ValueError, "in_chans is True, expected an integer of at least 1"),
        ({"depth": True}, ValueError, "depth is True, expected an integer"),
        ({"img_size": True}, ValueError, "img_size is True, expected a positive integer"),
        ({"img_size": "224"}, ValueError, "img_size is '224', expected a positive integer or"),
        ({"drop_rate": "a"}, ValueError, r"drop_rate is 'a', expected a rate in \[0, 1\)"),
        ({"patch_drop_rate": True}, ValueError, "patch_drop_rate is True, expected a rate"),
        ({"mlp_ratio": float("inf")}, ValueError, "mlp_ratio is inf, expected a positive number"),
        ({"crop_pct": "0.9"}, ValueError, "crop_pct is '0.9', expected a positive number"),
        ({"init_values": "1e-5"}, ValueError, "init_values is '1e-5', expected a number or None"),
        ({"fc_norm": 1}, TypeError, "fc_norm is 1, expected a bool or None"),
        ({"dynamic_img_size": "yes"}, TypeError, "dynamic_img_size is 'yes', expected a bool"),
        ({"interpolation": "cubic"}, ValueError, "interpolation is 'cubic', expected one of"),
        ({"distilled": True, "reg_tokens": 4}, ValueError, "distilled is True, expected"),
        ({"distilled": True, "fc_norm": True}, ValueError, "fc_norm is True"),
        ({"mlp": "swiglu"}, ValueError, "activation is 'gelu', expected 'silu'"),
        ({"activation": "silu", "mlp": "swiglu", "mlp_ratio": 0.0026}, ValueError, "hidden_features is 1"),
    ],
)
def test_bad_configs(overrides, error, text):
    with pytest.raises(error, match=text):
        fastvit.create_model("vit_base_patch16_224", **overrides)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"name": "vit_base_patch16_223"}, ValueError, "unknown model 'vit_base_patch16_223'; did you mean vit_base_"),
        ({"name": "zzz"}, ValueError, r"unknown model 'zzz'; fastvit.list_models\(\) has them all"),
        ({"name": None}, TypeError, "name is None, expected the name of a model"),
        ({"name": 5}, TypeError, "name is 5, expected the name of a model"),
        ({"num_clases": 3}, TypeError, r"create_model got unknown num_clases; did you mean num_classes\?"),
        ({"checkpoint_path": "x"}, TypeError, r"unknown checkpoint_path; did you mean checkpoint\?"),
        ({"zzz": 3}, TypeError, "unknown zzz; the fields are those of fastvit.ViTConfig$"),
        ({"pretrained": "yes"}, TypeError, "pretrained is 'yes', expected a bool"),
        ({"features_only": 1}, TypeError, "features_only is 1, expected a bool"),
        ({"dtype": torch.float8_e4m3fn}, TypeError, "dtype is torch.float8_e4m3fn, expected a floating-point"),
        ({"dtype": "float32"}, TypeError, "dtype is 'float32', expected a floating-point"),
        ({"features_only": True, "out_indices": 13}, ValueError, "out_indices is 13, expected .* 1 to 12"),
        ({"features_only": True, "out_indices": [12]}, ValueError, r"out_indices is \[12\], expected .* to 11"),
        ({"checkpoint": {}}, TypeError, "checkpoint is a dict, expected a path"),
        ({"checkpoint": os.curdir}, ValueError, r"checkpoint is '\.', a directory, expected a \.safetensors or"),
        ({"pretrained": True, "checkpoint": "x.pth"}, ValueError, "expected only one of them"),
        ({"name": "vit_large_patch14_224", "pretrained": True}, ValueError, "no weights of vit_large_patch14_224"),
    ],
)
def test_bad_arguments_of_create_model(arguments, error, text):
    with pytest.raises(error, match=text):
        fastvit.create_model(**{"name": "vit_tiny_patch16_224", **arguments})


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda m: m(torch.zeros(1, 3, 32, 40)), ValueError, "image is 32 x 40, expected 32 x 32"),
        (lambda m: m(torch.zeros(1, 1, 32, 32)), ValueError, "image has shape"),
        (lambda m: m(torch.zeros(3, 32, 32)), ValueError, "image has shape"),
        (lambda m: m(torch.zeros(1, 3, 32, 32).long()), TypeError, "image has dtype torch.int64"),
        (lambda m: m([1, 2]), TypeError, "image is a list"),
        (lambda m: m.forward_intermediates(torch.zeros(1, 3, 32, 32), 4), ValueError, "indices is 4, .* 1 to 3"),
        (lambda m: m.forward_intermediates(torch.zeros(1, 3, 32, 32), [3]), ValueError, r"indices is \[3\], .* to 2"),
        (lambda m: m.forward_intermediates(torch.zeros(1, 3, 32, 32), []), ValueError, r"indices is \[\]"),
        (lambda m: m.forward_intermediates(torch.zeros(1, 3, 32, 32), True), TypeError, "indices is True"),
        (lambda m: m.forward_intermediates(torch.zeros(1, 3, 32, 32), "12"), TypeError, "indices is '12'"),
        (lambda m: m.forward_intermediates(None, output_fmt="NHWC"), ValueError, "output_fmt is 'NHWC'"),
    ],
)
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call(small())


def test_building_a_model_imports_no_model_library():
    program = (
        "import sys, fastvit; before = set(sys.modules); assert not {'torch', 'triton', 'timm'} & before;"
        "fastvit.create_model('vit_tiny_patch16_224', depth=1);"
        "print({'timm', 'torchvision', 'transformers', 'huggingface_hub', 'safetensors'} & set(sys.modules))"
    )
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("rate", ["drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate"])
def test_each_dropout_alone_changes_training(rate):
    model, images = small(**{rate: 0.5}).train(), torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(images), model(images))


@pytest.mark.parametrize("name, overrides", [("norm", {}), ("fc_norm", {"global_pool": "avg"})])
def test_hooks_on_the_last_norm_fire(name, overrides):
    model, fired = small(**overrides).eval(), []
    model.get_submodule(name).register_forward_hook(lambda *_: fired.append(1))
    model(torch.randn(2, 3, 32, 32))
    assert fired == [1]


def test_checkpointing_holds_for_intermediates_too(monkeypatch):
    model, calls = small().train(), []
    monkeypatch.setattr(vision_transformer, "checkpoint", lambda f, *a, **_: (calls.append(1), f(*a))[1])
    model.set_grad_checkpointing()
    model.forward_intermediates(torch.randn(2, 3, 32, 32))
    assert len(calls) == len(model.blocks)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_a_dynamic_batch(strict):
    model = small(reg_tokens=2).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (torch.randn(4, 3, 32, 32),), dynamic_shapes={"x": {0: batch}}, strict=strict)
    images = torch.randn(7, 3, 32, 32)
    torch.testing.assert_close(exported.module()(images), model(images))


def test_replicas_of_data_parallel_run():
    """What torch.nn.DataParallel makes of a module: parameters as plain attributes."""
    model = small().eval()

    def replica(module):
        copy = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            copy._modules[name] = replica(child)
        for name, parameter in module._parameters.items():
            setattr(copy, name, None if parameter is None else parameter.detach())
        return copy

    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(replica(model)(images), model(images))

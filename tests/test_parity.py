"""Whole models and drop-in modules against timm, torchvision and transformers, on the same random weights.

Error is judged against error: both models run in one dtype, both are compared to the peer's float64 run, and ours may
be at most a small factor worse. Every parameter is random, so that no zero or tiny one hides a mistake.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from samples import timm_masks

import fastvit
from fastvit.accuracy import FACTOR, relative_rms
from fastvit.dropin.layouts import activation_of
from fastvit.models.formats import to_timm
from fastvit.models.registry import MODELS
from fastvit.models.weights import resample_position_table

timm = pytest.importorskip("timm")

DTYPES = (torch.float32, torch.bfloat16)
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}


def randomise(model):
    """Parameters of the size that training gives, none of them zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.2)
            if name.endswith(("gamma", "lambda1")) or ("norm" in name or "ln" in name) and name.endswith("weight"):
                parameter.add_(1)
            elif any(part in name for part in ("token", "pos")):
                parameter.normal_(std=0.5)
    return model


def as_is(named):
    return dict(named)


def outputs_and_gradients(model, images, names=as_is):
    """The logits, and by our names the gradients of their weighted sum."""
    images = images.clone().requires_grad_()
    out = model(images)
    if not isinstance(out, torch.Tensor):  # transformers
        out = out.logits if "logits" in out else out.pooler_output
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    (out * weights).sum().backward()
    gradients = names({name: parameter.grad for name, parameter in model.named_parameters()})
    return out.detach(), {"image": images.grad, **gradients}


def assert_as_accurate(ours, peer, dtype, images, names=as_is):
    """`ours`, given the peer's weights, in `dtype` is as near the float64 truth as the peer is, within the factor."""
    images = images.to(dtype)
    peer = peer.to(dtype).eval()
    ours = ours.to(dtype).eval()
    ours.load_state_dict(names(peer.state_dict()))
    truth = copy.deepcopy(peer).double()
    want, want_gradients = outputs_and_gradients(truth, images.double(), names)
    peers_out, peers_gradients = outputs_and_gradients(peer, images, names)
    out, gradients = outputs_and_gradients(ours, images)

    assert out.dtype == dtype and out.shape == want.shape
    assert gradients.keys() == want_gradients.keys()
    factor = FACTOR[dtype]
    assert relative_rms(out, want) <= factor * relative_rms(peers_out, want)
    unread = {name for name, gradient in want_gradients.items() if gradient is None}
    assert unread == {name for name, gradient in gradients.items() if gradient is None}
    read = gradients.keys() - unread
    errors = torch.tensor([relative_rms(gradients[name], want_gradients[name]) for name in read])
    peers_errors = torch.tensor([relative_rms(peers_gradients[name], want_gradients[name]) for name in read])
    assert errors.square().mean().sqrt() <= factor * peers_errors.square().mean().sqrt()
    assert errors.max() <= factor * peers_errors.max()


def small_timm(name="vit_tiny_patch16_224", **overrides):
    return randomise(timm.create_model(name, **{**SMALL, **overrides}))


# What each variant means to us, and to timm where it says it otherwise.
VARIANTS = {
    "plain": ({}, {}),
    "average": ({"global_pool": "avg"}, {}),
    "average_of_normalised": ({"global_pool": "avg", "fc_norm": False}, {}),
    "maximum": ({"global_pool": "max"}, {}),
    "average_and_maximum": ({"global_pool": "avgmax"}, {}),
    "tokens": ({"global_pool": "", "num_classes": 0}, {}),
    "no_class_token": ({"class_token": False, "global_pool": "avg"}, {}),
    "no_final_norm": ({"final_norm": False}, {}),
    "no_qkv_bias": ({"qkv_bias": False}, {}),
    "oblong": ({"img_size": (32, 48), "patch_size": (8, 4)}, {}),
    "one_channel": ({"in_chans": 1, "mean": (0.5,), "std": (0.5,)}, {"in_chans": 1}),
    "layer_scale": ({"init_values": 1e-5}, {}),
    "registers": ({"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True}, {}),
    "swiglu": (
        {"mlp": "swiglu", "activation": "silu", "mlp_ratio": 2.5},
        {"mlp_layer": "SwiGLUPacked", "act_layer": "silu", "mlp_ratio": 2.5},
    ),
    "gelu_tanh": ({"activation": "gelu_tanh"}, {"act_layer": "gelu_tanh"}),
    "quick_gelu": ({"activation": "quick_gelu"}, {"act_layer": "quick_gelu"}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_timm(variant, dtype):
    config, for_timm = VARIANTS[variant]
    for_timm = dict(for_timm or config)
    if "mlp_layer" in for_timm:
        for_timm["mlp_layer"] = getattr(timm.layers, for_timm["mlp_layer"])
    ours = fastvit.create_model("vit_tiny_patch16_224", **{**SMALL, **config})
    images = torch.randn(3, ours.config.in_chans, *ours.config.img_size)
    assert_as_accurate(ours, small_timm(**for_timm), dtype, images)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_timm_distilled(dtype):
    name = "deit_tiny_distilled_patch16_224"
    assert_as_accurate(fastvit.create_model(name, **SMALL), small_timm(name), dtype, torch.randn(3, 3, 32, 32))


def torchvision_names(named):
    renamed = {}
    for name, tensor in named.items():
        for theirs, ours in (
            ("class_token", "cls_token"),
            ("encoder.pos_embedding", "pos_embed"),
            ("conv_proj", "patch_embed.proj"),
            ("encoder.layers.encoder_layer_", "blocks."),
            ("encoder.ln", "norm"),
            ("heads.head", "head"),
            ("self_attention.in_proj_", "attn.qkv."),
            ("self_attention.out_proj", "attn.proj"),
            ("ln_", "norm"),
            ("mlp.0", "mlp.fc1"),
            ("mlp.3", "mlp.fc2"),
        ):
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchvision(dtype):
    from torchvision.models import VisionTransformer

    peer = VisionTransformer(32, 8, num_layers=3, num_heads=3, hidden_dim=48, mlp_dim=192, num_classes=10)
    ours = fastvit.create_model("vit_base_patch16_224", **SMALL)
    assert_as_accurate(ours, randomise(peer), dtype, torch.randn(3, 3, 32, 32), torchvision_names)


def transformers_names(named):
    """For ViT, DeiT and Dinov2, with separate q, k, v and gate, value packed."""
    renamed = {}
    for name, tensor in named.items():
        for theirs, ours in (
            (r"^(vit|deit)\.", ""),
            ("embeddings.cls_token", "cls_token"),
            ("embeddings.distillation_token", "dist_token"),
            ("embeddings.register_tokens", "register_tokens"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            (r"^(encoder\.layer|layers)\.", "blocks."),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("^layernorm", "norm"),
            (r"attention\.([qkv])_proj", r"attn.\1"),
            (r"attention\.o_proj", "attn.proj"),
            (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
            ("down_proj", "fc2"),
            ("^distillation_classifier", "head_dist"),
            ("^(cls_)?classifier", "head"),
        ):
            name = re.sub(theirs, ours, name)
        if "mask_token" not in name:
            renamed[name] = tensor
    for parts, whole in (((".q.", ".k.", ".v."), ".qkv."), ((".gate_proj.", ".up_proj."), ".fc1.")):
        for name in [name for name in renamed if parts[0] in name]:
            renamed[name.replace(parts[0], whole)] = torch.cat(
                [renamed.pop(name.replace(parts[0], part)) for part in parts]
            )
    return renamed


TRANSFORMERS_SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "num_labels": 10,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "config, model, extra, ours, overrides",
    [
        ("ViTConfig", "ViTForImageClassification", {}, "vit_base_patch16_224", {"norm_eps": 1e-12}),
        (
            "DeiTConfig",
            "DeiTForImageClassificationWithTeacher",
            {},
            "deit_base_distilled_patch16_224",
            {"norm_eps": 1e-12},
        ),
        ("Dinov2Config", "Dinov2Model", {}, "vit_base_patch14_dinov2", {"num_classes": 0}),
        (
            "Dinov2Config",
            "Dinov2Model",
            {"use_swiglu_ffn": True},
            "vit_giant_patch14_dinov2",
            {"num_classes": 0},
        ),
    ],
    ids=["vit", "deit_distilled", "dinov2", "dinov2_swiglu"],
)
def test_transformers(config, model, extra, ours, overrides, dtype):
    transformers = pytest.importorskip("transformers")
    peer = getattr(transformers, model)(getattr(transformers, config)(**TRANSFORMERS_SIZES, **extra))
    ours = fastvit.create_model(ours, **{**SMALL, **overrides})
    assert_as_accurate(ours, randomise(peer), dtype, torch.randn(3, 3, 32, 32), transformers_names)


def test_dinov2_with_registers_under_its_original_names():
    """Registers come in after the positions, of which the class token's is folded into the token."""
    transformers = pytest.importorskip("transformers")
    peer = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**TRANSFORMERS_SIZES))
    peer = randomise(peer).eval()
    ours = fastvit.create_model("vit_base_patch14_reg4_dinov2", **{**SMALL, "num_classes": 0}).eval()
    ours.load_state_dict(to_timm(transformers_names(peer.state_dict()))[0])
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        want = copy.deepcopy(peer).double()(images.double()).pooler_output
        assert relative_rms(ours(images), want) <= FACTOR[torch.float32] * relative_rms(
            peer(images).pooler_output, want
        )


@pytest.mark.parametrize("policy, registers", [("bicubic", False), ("antialias", True)])
def test_position_resampling_of_transformers(policy, registers):
    """Hugging Face's Dinov2 resamples whenever the image has another size, without registers not antialiased."""
    transformers = pytest.importorskip("transformers")
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(**{**TRANSFORMERS_SIZES, "image_size": 56})
    embeddings = randomise(getattr(transformers, f"{kind}Model")(config)).embeddings
    table = embeddings.position_embeddings
    # Tokens of the right number; only the table's interpolation is asked for.
    want = embeddings.interpolate_pos_encoding(torch.empty(1, 1 + 4 * 5, 48), 32, 40)
    torch.testing.assert_close(resample_position_table(table, (7, 7), (4, 5), 1, policy), want)


@pytest.mark.parametrize("new_grid", [(4, 4), (5, 9), (14, 14)])
def test_position_resampling_of_timm(new_grid):
    table = torch.randn(1, 2 + 49, 48)
    want = timm.layers.resample_abs_pos_embed(table, new_grid, (7, 7), num_prefix_tokens=2)
    torch.testing.assert_close(resample_position_table(table, (7, 7), new_grid, 2), want, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_registry_agrees_with_timm(name):
    """Keys, shapes, order, and every fact about the weights and their images. DINOv3, of another class in timm, has the
    keys of our other models."""
    ours, theirs = (library.create_model(name, device="meta") for library in (fastvit, timm))
    shapes = [(key, tensor.shape) for key, tensor in ours.state_dict().items()]
    state = theirs.state_dict()
    if "dinov3" in name:
        shapes, state = sorted(shapes), dict(sorted(to_timm(state)[0].items()))
    assert shapes == [(key, tensor.shape) for key, tensor in state.items()]
    config, facts = ours.config, theirs.pretrained_cfg
    for field in ("num_classes", "mean", "std", "crop_pct", "crop_mode", "interpolation"):
        assert getattr(config, field) == facts[field], field
    assert ours.default_cfg is ours.pretrained_cfg
    # timm says the same of DINOv3, whose model takes images of any size.
    differs = {("fixed_input_size", False)} if config.dynamic_img_size else set()
    assert {item for item in ours.pretrained_cfg.items() if item not in facts.items()} == differs
    assert facts.keys() - ours.pretrained_cfg.keys() <= {"url", "custom_load", "license", "notes"}
    for resolve in (timm.data.resolve_data_config, timm.data.resolve_model_data_config):
        assert resolve(model=ours) == resolve(model=theirs)
    assert MODELS[name].hub_id == facts.get("hf_hub_id")
    assert ours.feature_info == theirs.feature_info
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads
    assert config.activation == activation_of(theirs.blocks[0].mlp.act)
    assert ours.blocks[-1].norm2.eps == theirs.blocks[-1].norm2.eps == config.norm_eps
    assert ours.no_weight_decay() >= {key for key in theirs.no_weight_decay() if key in ours.state_dict()}


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("vit_tiny_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_small_patch14_reg4_dinov2", {"num_classes": 10}),
        ("vit_giant_patch14_dinov2", {"num_classes": 10}),
        ("vit_base_patch32_clip_quickgelu_224", {}),
        ("vit_base_patch16_siglip_224", {}),
    ],
)
def test_the_same_seed_gives_timms_weights(name, overrides):
    sizes = {**SMALL, **overrides}
    torch.manual_seed(1)
    ours = fastvit.create_model(name, **sizes)
    torch.manual_seed(1)
    theirs = timm.create_model(name, **sizes)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_layer_groups_agree_with_timm(name):
    from timm.models import group_parameters

    ours, theirs = fastvit.create_model(name, **SMALL), timm.create_model(name, **SMALL)
    assert group_parameters(ours, ours.group_matcher()) == group_parameters(theirs, theirs.group_matcher())


@pytest.mark.parametrize("reshape", [False, True])
@pytest.mark.parametrize("n", [1, 2, [0, -1]])
def test_intermediates_agree_with_timm(n, reshape):
    theirs = small_timm(img_size=(32, 48)).eval()
    ours = fastvit.create_model("vit_tiny_patch16_224", **{**SMALL, "img_size": (32, 48)}).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 32, 48)
    for norm, prefix in ((False, False), (True, True)):
        arguments = {"reshape": reshape, "norm": norm, "return_prefix_tokens": prefix}
        got = ours.get_intermediate_layers(images, n, **arguments)
        want = theirs.get_intermediate_layers(images, n, **arguments)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    fmt = "NCHW" if reshape else "NLC"
    got, want = (model.forward_intermediates(images, n, output_fmt=fmt) for model in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


DROP_INS = {
    "attention": {"attn_layer": fastvit.nn.Attention},
    "patch_embed": {"embed_layer": fastvit.nn.PatchEmbed},
    "mlp": {"mlp_layer": fastvit.nn.Mlp},
    "block": {"block_fn": fastvit.nn.Block},
    "all": {"block_fn": fastvit.nn.Block, "embed_layer": fastvit.nn.PatchEmbed},
    "swiglu_block": {"block_fn": fastvit.nn.Block, "mlp_layer": timm.layers.SwiGLUPacked, "act_layer": "silu"},
    "scaled_block": {"block_fn": fastvit.nn.Block, "init_values": 1e-5},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("drop_in", DROP_INS)
def test_drop_ins_for_timm(drop_in, dtype):
    modules = DROP_INS[drop_in]
    stock = {name: layer for name, layer in modules.items() if "fastvit" not in getattr(layer, "__module__", "")}
    peer = small_timm(**stock)
    ours = timm.create_model("vit_tiny_patch16_224", **SMALL, **modules)
    kinds = {type(module) for module in ours.modules()}
    assert all(module in kinds for name, module in modules.items() if name not in stock)
    assert_as_accurate(ours, peer, dtype, torch.randn(3, 3, 32, 32))


@pytest.mark.parametrize("drop_in", ["attention", "block"])
@pytest.mark.parametrize("mask", ["padding", "pairs", "additive", "causal"])
def test_masks_as_timm_has_them(drop_in, mask):
    peer = small_timm().eval()
    ours = timm.create_model("vit_tiny_patch16_224", **SMALL, **DROP_INS[drop_in]).eval()
    ours.load_state_dict(peer.state_dict())
    masks = timm_masks(17, 3)[mask]
    images = torch.randn(2, 3, 32, 32)
    want = peer.forward_features(images, **masks)
    assert (want - peer.forward_features(images)).abs().max() > 1e-2
    torch.testing.assert_close(ours.forward_features(images, **masks), want, rtol=1e-4, atol=1e-5)


def test_any_image_size_in_timm():
    arguments = {**SMALL, "dynamic_img_size": True}
    peer = randomise(timm.create_model("vit_tiny_patch16_224", **arguments)).eval()
    ours = timm.create_model("vit_tiny_patch16_224", **arguments, embed_layer=fastvit.nn.PatchEmbed).eval()
    ours.load_state_dict(peer.state_dict())
    images = torch.randn(2, 3, 48, 24)
    torch.testing.assert_close(ours(images), peer(images), rtol=1e-4, atol=1e-5)


def test_drop_path_draws_as_timm():
    """The same seed drops the same samples, in timm with our blocks and in our model."""
    arguments = {**SMALL, "drop_path_rate": 0.5}
    peer = randomise(timm.create_model("vit_tiny_patch16_224", **arguments))
    swapped = timm.create_model("vit_tiny_patch16_224", **arguments, block_fn=fastvit.nn.Block)
    own = fastvit.create_model("vit_tiny_patch16_224", **arguments)
    images = torch.randn(8, 3, 32, 32)
    results = []
    for model in (peer, swapped, own):
        model.load_state_dict(peer.state_dict())
        torch.manual_seed(3)
        results.append(model.train()(images))
    assert (results[0] - peer.eval()(images)).abs().max() > 1e-2
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[2], results[0], rtol=1e-4, atol=1e-5)

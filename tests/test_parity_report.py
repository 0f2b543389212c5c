"""parity_report: models that are one, of every library, and planted faults, each of which it has to name."""

import copy
import json

import pytest
import torch
from dropin_models import FAMILIES, SMALL, from_timm
from torch import nn

import fastvit
from fastvit import parity_report, verify

BY_NAME = {family.name: family for family in FAMILIES}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))
COMPARED = [family for family in FAMILIES if not family.arguments]


def ours(**overrides):
    """A small model of ours, and timm's with the same weights."""
    small = {**SMALL, "num_classes": 10, **overrides}
    model = fastvit.create_model("vit_tiny_patch16_224", **small).eval()
    verify.randomise(model)
    theirs = from_timm("vit_tiny_patch16_224")(**overrides).eval()
    theirs.load_state_dict(model.state_dict())
    return model, theirs


@pytest.mark.parametrize("family", COMPARED, ids=str)
def test_a_model_is_its_own_equal(family):
    report = parity_report(family.model(), family.model(), IMAGES)
    assert report.same and report.first_departure is None
    assert [row.layer for row in report.rows[:3]] == ["tokens", "block 0 norm1", "block 0 attention"]
    assert {row.layer for row in report.rows} >= {"block 1 norm2", "block 1 mlp", "block 1", "output"}
    assert all(row.own == row.difference == row.largest == 0 < row.error_a for row in report.rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ours_and_timms(dtype):
    a, b = (model.to(dtype) for model in ours())
    report = parity_report(a, b, IMAGES.to(dtype))
    assert report.same
    most = 10 * torch.finfo(dtype).eps
    assert all(0 <= row.difference < most and row.error_b < most and row.own < 1e-12 for row in report.rows)
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert "No layer departs by more than rounding" in str(report)


def test_accelerated_models():
    family = BY_NAME["transformers ViT"]
    accelerated = family.model()
    fastvit.accelerate(accelerated)
    assert parity_report(family.model(), accelerated, IMAGES).same


def test_timm_and_torchvision():
    """The same weights under other names, q, k and v packed by another module."""
    theirs = BY_NAME["torchvision ViT"].model()
    theirs.heads = nn.Identity()
    state = theirs.state_dict()
    named = {
        "cls_token": state["class_token"],
        "pos_embed": state["encoder.pos_embedding"],
        "patch_embed.proj.weight": state["conv_proj.weight"],
        "patch_embed.proj.bias": state["conv_proj.bias"],
        "norm.weight": state["encoder.ln.weight"],
        "norm.bias": state["encoder.ln.bias"],
    }
    for kind in ("weight", "bias"):
        for i in range(2):
            there = f"encoder.layers.encoder_layer_{i}"
            named |= {
                f"blocks.{i}.norm1.{kind}": state[f"{there}.ln_1.{kind}"],
                f"blocks.{i}.attn.qkv.{kind}": state[f"{there}.self_attention.in_proj_{kind}"],
                f"blocks.{i}.attn.proj.{kind}": state[f"{there}.self_attention.out_proj.{kind}"],
                f"blocks.{i}.norm2.{kind}": state[f"{there}.ln_2.{kind}"],
                f"blocks.{i}.mlp.fc1.{kind}": state[f"{there}.mlp.0.{kind}"],
                f"blocks.{i}.mlp.fc2.{kind}": state[f"{there}.mlp.3.{kind}"],
            }
    model = from_timm("vit_tiny_patch16_224", mlp_ratio=2)(num_classes=0).eval()
    model.load_state_dict(named)
    report = parity_report(theirs, model, IMAGES)
    assert report.same and report.rows[-1].layer == "output"
    with torch.no_grad():
        theirs.encoder.layers[1].self_attention.in_proj_weight.copy_(
            theirs.encoder.layers[1].self_attention.in_proj_weight.roll(48, 0)
        )
    report = parity_report(theirs, model, IMAGES)
    assert report.first_departure == "block 1 attention" and report.explained > 0.99
    assert "other weights (of q, of k, of v)" in report.diagnosis  # not an order: the biases stayed where they were


def swap(layer, order):
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias):
            parts = tensor.chunk(3)
            tensor.copy_(torch.cat([parts[i] for i in order]))


def head_by_head(model):
    with torch.no_grad():
        for tensor in (model.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.bias):
            tensor.copy_(tensor.unflatten(0, (3, 3, 16)).transpose(0, 1).flatten(0, 2).clone())


def all_eps(model, eps):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps


def no_layer_scale(model):
    model.blocks[1].ls1, model.blocks[1].ls2 = nn.Identity(), nn.Identity()


def noise_on(name):
    def change(model):
        with torch.no_grad():
            parameter = model.get_parameter(name)
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))

    return change


FAULTS = {
    "eps": (lambda m: all_eps(m, 1e-12), "block 0 norm1", "eps 1e-12 against 1e-06 explains"),
    "GELU": (
        lambda m: setattr(m.blocks[1].mlp, "act", nn.GELU("tanh")),
        "block 1 mlp",
        "tanh GELU against exact GELU explains all",
    ),
    "quick GELU": (
        lambda m: setattr(m.blocks[0].mlp, "act", nn.SiLU()),
        "block 0 mlp",
        "SiLU against exact GELU explains all",
    ),
    "q and k": (lambda m: swap(m.blocks[1].attn.qkv, (1, 0, 2)), "block 1 attention", "q, k, v against k, q, v"),
    "v first": (lambda m: swap(m.blocks[0].attn.qkv, (2, 0, 1)), "block 0 attention", "q, k, v against k, v, q"),
    "heads": (head_by_head, "block 1 attention", "q, k and v of all heads against head by head"),
    "layer-scale": (no_layer_scale, "block 1", "model_a's layer-scale, where model_b has none, explains all"),
    "positions": (noise_on("pos_embed"), "tokens", "added to the patches of every image alike: another position table"),
    "class token": (noise_on("cls_token"), "tokens", "added to token 0 of every image alike"),
    "fc2": (noise_on("blocks.1.mlp.fc2.weight"), "block 1 mlp", "other weights (of the second layer)"),
    "qkv": (noise_on("blocks.0.attn.qkv.bias"), "block 0 attention", "other weights (of q, of k, of v)"),
    "norm": (noise_on("blocks.0.norm2.weight"), "block 0 norm2", "other weights (weight)"),
    "head": (noise_on("head.weight"), "output", "what comes after the last block differs"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_named(fault):
    change, where, words = fault
    right = from_timm("vit_small_patch14_dinov2")
    model = copy.deepcopy(BY_NAME["timm DINOv2"].model())
    assert type(model) is type(right())
    model.reset_classifier(10)
    wrong = copy.deepcopy(model)
    change(wrong)
    report = parity_report(model, wrong, IMAGES)
    assert not report.same and report.first_departure == where
    assert words in report.diagnosis
    if where != "output":
        assert report.explained > 0.99 and "explains" in report.diagnosis
    departing = [row.layer for row in report.rows if row.departs]
    assert departing[0] == where
    assert where == "block 0 norm1" or where.startswith(tuple(departing[1:] or [where]))  # the block with its part
    # And the other way round.
    back = parity_report(wrong, model, IMAGES)
    assert back.first_departure == where and (back.explained > 0.99 or where == "output")


@pytest.mark.parametrize("policy", ["bicubic", "dinov2"])
def test_a_position_table_resampled_by_another_policy(policy):
    """Of images of another size than the table's; antialiasing off is one."""
    a, _ = ours(dynamic_img_size=True)
    b = fastvit.create_model(
        "vit_tiny_patch16_224", **SMALL, num_classes=10, dynamic_img_size=True, pos_resampling=policy
    )
    b.load_state_dict(a.state_dict())
    report = parity_report(a, b.eval(), torch.randn(2, 3, 48, 48))
    assert report.first_departure == "tokens"
    assert f"a position table resampled by {policy!r} against 'antialias' explains all" in report.diagnosis


def test_images_normalised_by_other_statistics():
    class Normalising(nn.Module):
        """As a model that is given what CLIP's statistics made, and expects ImageNet's."""

        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            columns = [torch.tensor(v).to(x)[:, None, None] for v in (
                (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711),
                (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]  # fmt: skip
            return self.model((x * columns[3] + columns[2] - columns[0]) / columns[1])

    a, _ = ours()
    report = parity_report(a, Normalising(copy.deepcopy(a)).eval(), IMAGES)
    assert report.first_departure == "tokens" and report.explained > 0.99
    assert "images normalised by CLIP's against ImageNet's statistics explains all" in report.diagnosis


def test_blocks_that_nobody_knows_are_compared_as_a_whole():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*[nn.TransformerEncoderLayer(12, 2, 24, batch_first=True) for _ in range(3)])

        def forward(self, images):
            return self.layers(images.flatten(2).mT.repeat(1, 1, 4))

    model = Own().eval()
    other = copy.deepcopy(model)
    noise_on("layers.1.linear2.bias")(other)
    report = parity_report(model, other, IMAGES[..., :8, :8])
    assert [row.layer for row in report.rows] == ["tokens", "block 0", "block 1", "block 2", "output"]
    assert report.first_departure == "block 1" and "nothing that was tried" in report.diagnosis


def test_a_model_that_returns_nan_departs(tmp_path):
    a, b = ours()
    with torch.no_grad():
        b.blocks[1].mlp.fc2.weight[0, 0] = float("nan")
    report = parity_report(a, b, IMAGES)
    assert not report.same and report.first_departure == "block 1 mlp"
    assert "other weights (of the second layer)" in report.diagnosis
    report.save(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["rows"][-1]["difference"] is None


def test_what_explains_is_tried_and_not_taken_for_granted():
    """Another activation that no trial has, beside a weight that is off by next to nothing."""
    model = BY_NAME["timm ViT"].model()
    wrong = copy.deepcopy(model)
    wrong.blocks[1].mlp.act = nn.ReLU()
    with torch.no_grad():
        wrong.blocks[1].mlp.fc1.weight[0, 0] += 1e-6
    report = parity_report(model, wrong, IMAGES)
    assert report.first_departure == "block 1 mlp" and "nothing that was tried" in report.diagnosis
    wrong = copy.deepcopy(model)
    wrong.blocks[0].attn.num_heads, wrong.blocks[0].attn.head_dim, wrong.blocks[0].attn.scale = 2, 24, 24**-0.5
    assert "2 heads against 3 explains all" in parity_report(model, wrong, IMAGES).diagnosis


def test_attention_with_rotary_positions_swapped_alone():
    model = BY_NAME["timm EVA-02"].model()
    for block in model.blocks:
        block.mlp.act = nn.ReLU()
    wrong = copy.deepcopy(model)
    assert {entry.kind for entry in fastvit.accelerate(wrong).swapped} == {"attention", "patch_embed"}
    assert parity_report(model, wrong, IMAGES).same
    with torch.no_grad():
        wrong.blocks[0].attn.q_bias += 0.1
    report = parity_report(model, wrong, IMAGES)
    assert report.first_departure == "block 0 attention" and "other weights (of q)" in report.diagnosis


def test_files(tmp_path):
    a, b = ours()
    noise_on("pos_embed")(b)
    report = parity_report(a, b, IMAGES)
    for name in ("r.json", "r.txt", "r.png"):
        report.save(tmp_path / name)
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["first_departure"] == "tokens" and not found["same"] and len(found["rows"]) == len(report.rows)
    assert found["rows"][0]["departs"] and found["rows"][0]["own"] == report.rows[0].own
    assert (tmp_path / "r.txt").read_text() == f"{report}\n"
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_models_are_left_as_they_were():
    a, b = ours()
    before = [copy.deepcopy(model.state_dict()) for model in (a, b)]
    parity_report(a, b, IMAGES)
    for model, state in zip((a, b), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert not any(module._forward_hooks for module in model.modules())


def test_bad_input():
    a, b = ours()
    with pytest.raises(TypeError, match="model_b is a str, expected a torch.nn.Module"):
        parity_report(a, "vit", IMAGES)
    with pytest.raises(ValueError, match="model_a is in training mode"):
        parity_report(copy.deepcopy(a).train(), b, IMAGES)
    with pytest.raises(ValueError, match=r"images must be a floating-point tensor of shape \(B, C, H, W\)"):
        parity_report(a, b, IMAGES[0])
    with pytest.raises(ValueError, match="Linear has no row of blocks"):
        parity_report(nn.Linear(3, 3).eval(), b, IMAGES)
    with pytest.raises(ValueError, match=r"first block reads \(3, 17, 48\), but model_b's \(3, 17, 32\)"):
        parity_report(a, ours(embed_dim=32, num_heads=2)[0], IMAGES)
    with pytest.raises(ValueError, match="model_a has 2 blocks, but model_b has 3"):
        parity_report(a, ours(depth=3)[0], IMAGES)

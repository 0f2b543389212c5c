"""Checkpoints that fit a model, that are resampled or adapted to fit it, and that are refused whole."""

from __future__ import annotations

import pytest
import torch
from checkpoints import SMALL, assert_state, saved, small

import fastvit
from fastvit.models import load_checkpoint
from fastvit.models.weights import resample_position_table


@pytest.mark.parametrize(
    "file, wrap",
    [
        ("w.safetensors", "bare"),
        ("w.safetensors", "module"),
        ("w.pth", "bare"),
        ("w.pth", "module"),
        ("w.pth", "model"),
        ("w.pth", "state_dict"),
    ],
)
def test_round_trip(tmp_path, file, wrap):
    source = small()
    state = dict(source.state_dict())
    if wrap == "module":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    path = saved(tmp_path / file, state if wrap in ("bare", "module") else {wrap: state, "epoch": 3})
    assert_state(fastvit.create_model("vit_tiny_patch16_224", checkpoint=path, **SMALL), source.state_dict())


def test_values_are_cast_to_the_models_dtype(tmp_path):
    source = small()
    path = saved(tmp_path / "w.safetensors", source.state_dict())
    model = small().bfloat16()
    load_checkpoint(model, str(path))
    assert_state(model, source.bfloat16().state_dict())


def test_all_misfits_are_listed_and_nothing_is_loaded(tmp_path):
    state = small().state_dict()
    del state["norm.bias"], state["blocks.1.attn.qkv.weight"]
    state["extra"] = torch.zeros(2)
    state["head.weight"] = torch.zeros(7, 48)
    path = saved(tmp_path / "w.pth", state)
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_checkpoint(model, path)
    assert str(error.value) == (
        f"{path} does not fit the model: missing blocks.1.attn.qkv.weight (144, 48); missing norm.bias (48,); "
        "unexpected extra (2,); head.weight has shape (7, 48), expected (1000, 48)"
    )
    assert_state(model, before)


def test_the_classifier_is_left_only_on_request(tmp_path):
    source = small()
    path = saved(tmp_path / "w.pth", source.state_dict())
    with pytest.raises(ValueError, match=r"head.weight has shape \(1000, 48\), expected \(5, 48\)"):
        load_checkpoint(small(num_classes=5), path)
    for classes in (5, 0):
        model = fastvit.create_model("vit_tiny_patch16_224", checkpoint=path, **SMALL, num_classes=classes)
        body = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
        assert len(model.state_dict()) - len(body) == (2 if classes else 0)
        torch.testing.assert_close(body, {name: source.state_dict()[name] for name in body}, rtol=0, atol=0)
        assert not classes or model.head.weight.std() < 0.1  # random, as new, not the file's
    same = fastvit.create_model("vit_tiny_patch16_224", checkpoint=path, **SMALL, num_classes=1000)
    assert_state(same, source.state_dict())


def test_new_classifier_for_a_file_without_one(tmp_path):
    source = small(num_classes=0)
    path = saved(tmp_path / "w.pth", source.state_dict())
    with pytest.raises(ValueError, match="missing head.weight"):
        load_checkpoint(small(), path)
    model = fastvit.create_model("vit_tiny_patch16_224", checkpoint=path, **SMALL, num_classes=5)
    assert torch.equal(model.pos_embed, source.pos_embed)


@pytest.mark.parametrize("policy", ["antialias", "bicubic", "dinov2"])
@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_another_grid_is_resampled(tmp_path, name, policy):
    source = small(name)
    path = saved(tmp_path / "w.pth", source.state_dict())
    model = fastvit.create_model(name, checkpoint=path, **{**SMALL, "img_size": (40, 56)}, pos_resampling=policy)
    prefix = 2 if "distilled" in name else 0
    want = resample_position_table(source.pos_embed, (4, 4), (5, 7), prefix, policy)
    assert torch.equal(model.pos_embed, want) and torch.equal(want[:, :prefix], source.pos_embed[:, :prefix])
    assert torch.equal(model.cls_token, source.cls_token)


def test_equal_rows_of_another_shape(tmp_path):
    """4 x 4 and 2 x 8 have equally many rows: only the caller can say which the file has."""
    source = small()
    path = saved(tmp_path / "w.pth", source.state_dict())
    model = small(img_size=(16, 64))
    load_checkpoint(model, path)
    assert torch.equal(model.pos_embed, source.pos_embed)
    load_checkpoint(model, path, grid_size=(4, 4))
    assert torch.equal(model.pos_embed, resample_position_table(source.pos_embed, (4, 4), (2, 8), 1))
    source = small(img_size=(16, 24))
    path = saved(tmp_path / "w.pth", source.state_dict())
    with pytest.raises(ValueError, match=r"pos_embed has shape \(1, 7, 48\), expected \(1, 17, 48\)"):
        load_checkpoint(model, path)


def test_resampling_policies_differ_and_keep_constants():
    table = torch.randn(1, 1 + 37 * 37, 8)
    results = [resample_position_table(table, (37, 37), (16, 16), 1, p) for p in ("antialias", "bicubic", "dinov2")]
    assert all(result.shape == (1, 257, 8) for result in results)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (results[a] - results[b]).norm() / results[b].norm() > 0.02
    for policy in ("antialias", "bicubic", "dinov2"):
        flat = resample_position_table(torch.full((1, 26, 4), 3.0), (5, 5), (7, 3), 1, policy)
        torch.testing.assert_close(flat, torch.full((1, 22, 4), 3.0))
    half = table.bfloat16()
    want = resample_position_table(half.float(), (37, 37), (16, 16), 1).bfloat16()
    assert torch.equal(resample_position_table(half, (37, 37), (16, 16), 1), want)


def test_a_model_without_storage_is_refused(tmp_path):
    path = saved(tmp_path / "w.pth", small().state_dict())
    with pytest.raises(ValueError, match="meta device"):
        load_checkpoint(small().to("meta"), path)


def test_a_position_table_that_does_not_fit_is_listed_with_the_rest(tmp_path):
    state = small().state_dict()
    for table in (torch.zeros(7), torch.zeros(1, 12, 48), torch.zeros(2, 17, 48), torch.zeros(1, 4, 4, 48)):
        path = saved(tmp_path / "w.pth", {**state, "pos_embed": table, "extra": torch.zeros(1)})
        with pytest.raises(ValueError, match="unexpected extra.*; pos_embed has shape"):
            load_checkpoint(small(), path)


def test_registers_without_the_rest_of_dinov2_are_listed(tmp_path):
    with pytest.raises(
        ValueError, match="the original DINOv2, .*missing blocks.0-1.norm1.weight.*; unexpected reg_token"
    ):
        load_checkpoint(small(), saved(tmp_path / "w.pth", {"register_tokens": torch.zeros(1, 4, 48)}))


def test_misfits_alike_in_several_blocks_are_told_once(tmp_path):
    deep, shallow = small(depth=6), small(qkv_bias=False, num_classes=3)
    state = deep.state_dict()
    del state["blocks.1.norm1.bias"]
    path = saved(tmp_path / "w.pth", state)
    with pytest.raises(ValueError) as error:
        load_checkpoint(shallow, path)
    rest = {"norm1.weight": "48,", "norm1.bias": "48,", "attn.qkv.weight": "144, 48", "attn.proj.weight": "48, 48"}
    rest |= {"attn.proj.bias": "48,", "norm2.weight": "48,", "norm2.bias": "48,", "mlp.fc1.weight": "192, 48"}
    rest |= {"mlp.fc1.bias": "192,", "mlp.fc2.weight": "48, 192", "mlp.fc2.bias": "48,"}
    assert str(error.value) == (
        f"{path} does not fit the model: missing blocks.1.norm1.bias (48,); "
        "unexpected blocks.0-5.attn.qkv.bias (144,); "
        + "".join(f"unexpected blocks.2-5.{name} ({shape}); " for name, shape in rest.items())
        + "head.weight has shape (1000, 48), expected (3, 48); head.bias has shape (1000,), expected (3,)"
    )
    del state["blocks.3.norm1.weight"]
    with pytest.raises(ValueError, match=r"unexpected blocks\.2,4-5\.norm1\.weight"):
        load_checkpoint(shallow, saved(path, state))


@pytest.mark.parametrize("patch_size", [4, 16, (8, 4)])
def test_weights_for_another_patch_size_as_timm_does_it(tmp_path, patch_size):
    timm = pytest.importorskip("timm")
    peer = timm.create_model("vit_tiny_patch16_224", **SMALL)
    path = saved(tmp_path / "w.safetensors", peer.state_dict())
    want = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "patch_size": patch_size})
    timm.models.load_checkpoint(want, path, filter_fn=timm.models.vision_transformer.checkpoint_filter_fn)
    model = small(patch_size=patch_size)
    load_checkpoint(model, path)
    torch.testing.assert_close(dict(model.state_dict()), dict(want.state_dict()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("in_chans", [1, 2, 4, 7])
def test_rgb_weights_for_other_channels_as_timm_does_it(tmp_path, in_chans, dtype):
    timm = pytest.importorskip("timm")
    path = saved(tmp_path / "w.pth", {name: v.to(dtype) for name, v in small().state_dict().items()})
    want = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path)},
        in_chans=in_chans,
        **SMALL,
    )
    model = small(in_chans=in_chans, mean=(0.5,) * in_chans, std=(0.5,) * in_chans)
    load_checkpoint(model, path)
    assert_state(model, want.state_dict())


def test_only_rgb_weights_are_brought_to_other_channels(tmp_path):
    path = saved(tmp_path / "w.pth", small(in_chans=2, mean=(0.5,) * 2, std=(0.5,) * 2).state_dict())
    with pytest.raises(ValueError, match=r"patch_embed.proj.weight has shape \(48, 2, 8, 8\), expected"):
        load_checkpoint(small(), path)


@pytest.mark.parametrize("file, ours", [("token", "avg"), ("avg", "token")])
@pytest.mark.parametrize("num_classes", [5, 0])
def test_a_new_classifier_on_another_pool_as_timm_does_it(tmp_path, file, ours, num_classes):
    """Where the final norm moves behind the pool, or back, timm starts it anew with the classifier."""
    timm = pytest.importorskip("timm")
    path = saved(tmp_path / "w.pth", small(global_pool=file).state_dict())
    overrides = {**SMALL, "global_pool": ours, "num_classes": num_classes}
    want = timm.create_model(
        "vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **overrides
    ).state_dict()
    model = fastvit.create_model("vit_tiny_patch16_224", checkpoint=path, **overrides)
    got = model.state_dict()
    assert got.keys() == want.keys() and ("fc_norm.weight" in got) == (ours == "avg")
    for name in got:
        assert name.startswith("head.") or torch.equal(got[name], want[name]), name


@pytest.mark.parametrize(
    "file, ours, hint",
    [
        ("token", "avg", "the file has its norm before the pool, as a model with fc_norm=False"),
        ("avg", "token", "the file has its norm after the pool, as a model with fc_norm=True"),
    ],
)
def test_a_trained_classifier_on_another_pool_is_refused_as_by_timm(tmp_path, file, ours, hint):
    source = small(global_pool=file)
    path = saved(tmp_path / "w.pth", source.state_dict())
    with pytest.raises(ValueError, match=f"missing .*norm.weight .*unexpected .*norm.weight.*; {hint}$"):
        load_checkpoint(small(global_pool=ours), path)
    model = small(global_pool=ours, fc_norm=file == "avg")
    load_checkpoint(model, path)
    assert_state(model, source.state_dict())


def test_mask_tokens_are_no_misfit(tmp_path):
    """Only training reads it: original DINOv2 files have one, timm's have none."""
    source = small(mask_token=True)
    model = small(mask_token=True)
    own = model.mask_token.detach().clone()
    state = source.state_dict()
    load_checkpoint(model, saved(tmp_path / "w.pth", {name: v for name, v in state.items() if name != "mask_token"}))
    assert_state(model, state | {"mask_token": own})
    load_checkpoint(model, saved(tmp_path / "w.pth", state))
    assert_state(model, state)
    load_checkpoint(small(), tmp_path / "w.pth")


def test_a_model_of_another_library_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"^model is a torch\.nn\..*\.Linear, expected a fastvit.VisionTransformer$"):
        load_checkpoint(torch.nn.Linear(1, 1), saved(tmp_path / "w.pth", {}))

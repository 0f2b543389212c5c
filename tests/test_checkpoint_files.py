"""Which weights are found in a file, under which names, and which files are refused."""

from __future__ import annotations

import argparse
import collections
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import SMALL, assert_state, saved, small

from fastvit.models import load_checkpoint


def test_original_dinov2_names(tmp_path):
    """Chunked blocks, packed w12, w3, registers, and a class token that has a position of its own."""
    source = small("vit_giant_patch14_reg4_dinov2")
    state = {"mask_token": torch.zeros(1, 48)}
    class_position = torch.randn(1, 1, 48)
    for name, tensor in source.state_dict().items():
        name = name.replace("blocks.", "blocks.0.").replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        state[name.replace("reg_token", "register_tokens")] = tensor
    state["cls_token"] = state["cls_token"] - class_position
    state["pos_embed"] = torch.cat([class_position, state["pos_embed"]], dim=1)
    model = small("vit_giant_patch14_reg4_dinov2")
    load_checkpoint(model, saved(tmp_path / "w.pth", state))
    torch.testing.assert_close(dict(model.state_dict()), dict(source.state_dict()))


class Dangerous:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_bad_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = small()
    whole = saved(tmp_path / "w.safetensors", model.state_dict()).read_bytes()
    torch.save({"model": {"x": torch.zeros(1), "code": Dangerous()}}, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(torch.zeros(2), tmp_path / "tensor.pth")
    torch.save({"epoch": 1}, tmp_path / "number.pth")
    torch.save(model.state_dict(), tmp_path / "cut.pth")
    for name, content in {
        "cut.safetensors": whole[: len(whole) // 2],
        "cut.pth": (tmp_path / "cut.pth").read_bytes()[:5000],
        "text.pth": b"not a checkpoint",
        "empty.pth": b"",
        "words.pth": b"hello world, this is no checkpoint",
    }.items():
        (tmp_path / name).write_bytes(content)
    for name, text in {
        "cut.safetensors": "cannot be read as a safetensors file",
        "cut.pth": "cannot be read as a torch file of plain tensors",
        "text.pth": "cannot be read as a torch file of plain tensors",
        "empty.pth": "cannot be read as a torch file of plain tensors",
        "words.pth": "cannot be read as a torch file of plain tensors",
        "code.pth": "cannot be read as a torch file of plain tensors",
        "list.pth": "holds a list, expected tensors by name",
        "tensor.pth": "holds a Tensor, expected tensors by name",
        "number.pth": "holds 'epoch', a int, expected dense real tensors by name",
    }.items():
        with pytest.raises(ValueError, match=text) as error:
            load_checkpoint(model, tmp_path / name)
        assert "\n" not in str(error.value) and name in str(error.value)
    assert not (tmp_path / "pwned").exists()
    with pytest.raises(FileNotFoundError, match="no checkpoint at nowhere.pth"):
        load_checkpoint(model, "nowhere.pth")


@pytest.mark.parametrize(
    "name, value", [(0, torch.zeros(1)), ("w", torch.zeros(1).cfloat()), ("w", torch.eye(2).to_sparse())]
)
def test_only_dense_real_tensors_by_name_are_taken(name, value, tmp_path):
    with pytest.raises(ValueError, match="expected dense real tensors by name"):
        load_checkpoint(small(), saved(tmp_path / "w.pth", {name: value}))


def test_the_unused_layer_of_old_files_is_left_out(tmp_path):
    model = small()
    unused = {"pre_logits.fc.weight": torch.zeros(48, 48), "pre_logits.fc.bias": torch.zeros(48)}
    load_checkpoint(model, saved(tmp_path / "w.pth", model.state_dict() | unused))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_training_saves_beside_the_weights(tmp_path, zipped):
    """Arguments, paths and numpy's numbers stand in the way of plain loading, and are not wanted."""
    source = small()
    optimizer = torch.optim.AdamW(source.parameters())
    source(torch.randn(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    extra = argparse.Namespace(
        output=Path("out"), lr=np.float64(1e-3), seeds=np.arange(3), inner=argparse.Namespace(sizes=[1, (2, 3)])
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 7])
    saved_by_training = {
        "state_dict": source.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "rng": {"numpy": np.random.get_state(), "torch": torch.get_rng_state()},
        "epoch": 3,
        "best": np.float32(0.5),
        "args": extra,
    }
    torch.save(saved_by_training, tmp_path / "last.pth", _use_new_zipfile_serialization=zipped)
    model = small()
    load_checkpoint(model, tmp_path / "last.pth")
    assert_state(model, source.state_dict())


@pytest.mark.parametrize("ema", [True, False])
def test_training_checkpoints_of_timm(tmp_path, ema):
    """timm's own saver, and its own loader as the judge of which of the weights are meant."""
    timm = pytest.importorskip("timm")
    from timm.utils import CheckpointSaver, ModelEmaV3

    peer, averaged = (timm.create_model("vit_tiny_patch16_224", **SMALL) for _ in range(2))
    averaged = ModelEmaV3(averaged) if ema else None
    optimizer = torch.optim.SGD(peer.parameters(), lr=0.1)
    arguments = argparse.Namespace(model="vit_tiny_patch16_224", opt="sgd", mean=[0.5], opt_kwargs={})
    saver = CheckpointSaver(peer, optimizer, arguments, averaged, checkpoint_dir=tmp_path, recovery_dir=tmp_path)
    saver.save_checkpoint(1, 80.0)
    want = timm.create_model("vit_tiny_patch16_224", **SMALL)
    timm.models.load_checkpoint(want, str(tmp_path / "last.pth.tar"))
    model = small()
    load_checkpoint(model, tmp_path / "last.pth.tar")
    assert_state(model, want.state_dict())
    assert torch.equal(model.cls_token, (averaged.module if ema else peer).cls_token)


@pytest.mark.parametrize(
    "first, second",
    [("state_dict_ema", "state_dict"), ("model_ema", "model"), ("teacher", "student"), ("state_dict", "model")],
)
def test_which_of_several_is_taken(tmp_path, first, second):
    source, other = small(), small()
    path = saved(tmp_path / "w.pth", {second: other.state_dict(), first: source.state_dict(), "epoch": 1})
    model = small()
    load_checkpoint(model, path)
    assert_state(model, source.state_dict())
    if second != "student":
        load_checkpoint(model, saved(path, {second: other.state_dict(), first: None}))
        assert_state(model, other.state_dict())


@pytest.mark.parametrize(
    "wrappers, prefix, beside",
    [
        (["model_state_dict"], "_orig_mod.", ()),
        (["state_dict"], "model.", ("criterion.weight",)),  # Lightning
        ([], "module._orig_mod.", ()),
        (["model"], "_orig_mod.module.", ()),
        (["model", "state_dict"], "encoder.", ("decoder.0.weight", "mask_token")),
        (["teacher"], "backbone.", ("head.mlp.0.weight", "head.last_layer.weight_g")),  # DINO
        (["teacher"], "module.backbone.", ("dino_head.mlp.0.weight",)),
        (["model_ema"], "module.", ("n_averaged",)),  # torch.optim.swa_utils.AveragedModel
    ],
)
def test_wrappers_and_prefixes(tmp_path, wrappers, prefix, beside):
    source = small()
    content = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    content |= {name: torch.zeros(2) for name in beside}
    for wrapper in reversed(wrappers):
        content = {wrapper: content, "epoch": 1}
    model = small()
    load_checkpoint(model, saved(tmp_path / "w.pth", content))
    assert_state(model, source.state_dict())


def test_blocks_compiled_one_by_one(tmp_path):
    source = small()
    state = {re.sub(r"^(blocks\.\d+)\.", r"\1._orig_mod.", name): v for name, v in source.state_dict().items()}
    model = small()
    load_checkpoint(model, saved(tmp_path / "w.safetensors", state))
    assert_state(model, source.state_dict())


def test_two_models_side_by_side(tmp_path):
    state = {prefix + name: v for prefix in ("online.", "target.") for name, v in small().state_dict().items()}
    path = saved(tmp_path / "w.pth", state)
    with pytest.raises(ValueError) as error:
        load_checkpoint(small(), path)
    assert str(error.value) == f"{path} holds models under 'online.' and 'target.', expected one: save it alone"


@pytest.mark.filterwarnings("ignore:.*TorchScript archive", "ignore:.*torch.jit.script")
def test_what_torch_refuses_is_named(tmp_path):
    torch.save({"model": {"x": torch.zeros(1)}, "stats": collections.defaultdict(list)}, tmp_path / "w.pth")
    torch.save({"model": Dangerous()}, tmp_path / "system.pth")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pth")
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "script.pth")
    (tmp_path / "pointer.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    advice = "; a file of model.state_dict() alone can be read"
    for name, reason in {
        "w.pth": "Unsupported global: GLOBAL collections.defaultdict was not an allowed global by default" + advice,
        "system.pth": f"Trying to load unsupported GLOBAL {os.system.__module__}.system whose module "
        f"{os.system.__module__} is blocked" + advice,
        "module.pth": "Unsupported global: GLOBAL torch.nn.modules.linear.Linear was not an allowed global by default"
        + advice,
        "script.pth": "Cannot use ``weights_only=True`` with TorchScript archives passed to ``torch.load``",
        "pointer.pth": "it begins with b'version https://'",
    }.items():
        with pytest.raises(ValueError) as error:
            load_checkpoint(small(), tmp_path / name)
        assert str(error.value) == f"{tmp_path / name} cannot be read as a torch file of plain tensors: {reason}"


def foreign_names():
    """The names in other libraries' state dicts, and what a message should call them."""
    timm, torchvision, transformers = (pytest.importorskip(n) for n in ("timm", "torchvision", "transformers"))
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 48}
    with torch.device("meta"):
        yield "torchvision's VisionTransformer", torchvision.models.VisionTransformer(32, 8, 1, 3, 48, 48)
        yield "Swin", torchvision.models.swin_t()
        yield "ResNet", torchvision.models.resnet18()
        for name, kind in {
            "swin_tiny_patch4_window7_224": "Swin",
            "resnet26": "ResNet",
            "convnext_atto": "ConvNeXt",
            "beit_base_patch16_224": "BEiT",
        }.items():
            yield kind, timm.create_model(name)
        for name, kind in {
            "ViTForImageClassification": "ViT",
            "DeiTForImageClassificationWithTeacher": "DeiT",
            "Dinov2ForImageClassification": "Dinov2",
            "DINOv3ViTModel": "DINOv3",
            "SwinModel": "Swin",
            "CLIPVisionModelWithProjection": "CLIP",
            "SiglipVisionModel": "SigLIP",
        }.items():
            model = getattr(transformers, name)
            config = model.config_class() if name == "SwinModel" else model.config_class(**sizes)
            yield kind if kind == "Swin" else f"transformers' {kind}", model(config)


def test_checkpoints_of_other_libraries_are_named(tmp_path):
    for kind, peer in list(foreign_names()):  # all of them, and their device is ours no more
        path = saved(tmp_path / "w.pth", {name: torch.zeros(1) for name in peer.state_dict()})
        with pytest.raises(ValueError) as error:
            load_checkpoint(small(depth=12), path)
        text = str(error.value)
        assert text.startswith(f"{path} holds a checkpoint of {kind}"), text
        known = kind in (
            "torchvision's VisionTransformer",
            *(f"transformers' {of}" for of in ("ViT", "DeiT", "Dinov2", "DINOv3", "CLIP", "SigLIP")),
        )
        assert ("which does not fit the model: " if known else "which fastvit does not read") in text
        assert "\n" not in text


@pytest.mark.parametrize(
    "name, kind",
    [
        ("blocks_token_only.0.gamma_1", "CaiT"),
        ("beit.encoder.layer.0.lambda_1", "BEiT or EVA"),
        ("image_encoder.blocks.0.attn.rel_pos_h", "Segment Anything"),
        ("backbone.layers.0.ln1.weight", "mmpretrain"),
    ],
)
def test_telling_names(tmp_path, name, kind):
    path = saved(tmp_path / "w.pth", {name: torch.zeros(1)})
    for model in (small(), None):
        with pytest.raises(ValueError, match=re.escape(f"{path} holds a checkpoint of {kind}") + ".* does not read$"):
            load_checkpoint(model, path)


@pytest.mark.parametrize("entry", ["net", "weights", "params", "ema_state_dict"])
def test_the_only_entry_that_is_a_model_is_taken(entry, tmp_path):
    state = small().state_dict()
    optimizer = {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [{"lr": 1e-3}]}
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    saved(tmp_path / "w.pth", {"optimizer": optimizer, "epoch": 3, entry: prefixed, "metrics": {"top1": 0.5}})
    model = small()
    load_checkpoint(model, tmp_path / "w.pth")
    assert_state(model, state)
    saved(tmp_path / "w.pth", {entry: state, "other": state})
    with pytest.raises(ValueError, match=f"w.pth holds models as '{entry}' and 'other', expected one"):
        load_checkpoint(model, tmp_path / "w.pth")


def test_what_is_no_path_is_refused():
    with pytest.raises(TypeError, match="^path is a dict, expected a path; load_state_dict takes tensors$"):
        load_checkpoint(small(), {})
    with pytest.raises(ValueError, match=r"^path is '\.', a directory, expected"):
        load_checkpoint(small(), ".")

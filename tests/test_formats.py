"""Files that torchvision and transformers write: read, against the library's own model; and written back for them.

Every model is made by the library, small, with weights as trained ones are (a few channels far larger than the rest, a
class token of large norm), and saved by it. None names a model of ours: what it is is told by names and shapes.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from checkpoints import saved
from command_line import ROOT, run
from safetensors.torch import load_file, save_file

import fastvit
from fastvit.accuracy import relative_rms
from fastvit.models import formats
from fastvit.models.loading import convert_checkpoint
from fastvit.models.reading import read_checkpoint

torchvision = pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")

# 128 columns: two heads of 64, as a file does not tell.
SIZES = {"image_size": 32, "patch_size": 8, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 256, "num_labels": 5, "layer_norm_eps": 1e-6}
DINOV2 = {"mlp_ratio": 2}
GATED = {"mlp_ratio": 3, "use_swiglu_ffn": True}


def as_trained(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1)
            if name.endswith("lambda1"):
                parameter.add_(0.3)
            elif parameter.dim() == 1 and ("norm" in name or "ln" in name) and name.endswith("weight"):
                parameter.add_(1)
                parameter[:3] *= 8
            elif "token" in name or "pos" in name:
                parameter.normal_(std=0.5)
                parameter[..., :3] *= 10
    return model.eval()


def of_torchvision():
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 128, 256, num_classes=5)


def of_transformers(name, **more):
    model = getattr(transformers, name)
    return model(model.config_class(**SIZES, **more))


PEERS = {
    "torchvision": of_torchvision,
    "ViT": lambda: of_transformers("ViTForImageClassification"),
    "ViT without classifier": lambda: of_transformers("ViTModel"),
    "ViT without bias": lambda: of_transformers("ViTModel", qkv_bias=False),
    "ViT for masked images": lambda: of_transformers("ViTForMaskedImageModeling", encoder_stride=8).vit,
    "DeiT": lambda: of_transformers("DeiTForImageClassificationWithTeacher"),
    "DeiT without classifier": lambda: of_transformers("DeiTModel"),
    "MSN": lambda: of_transformers("ViTMSNModel"),
    "MAE": lambda: of_transformers("ViTMAEModel", mask_ratio=0.0),
    "Dinov2": lambda: of_transformers("Dinov2Model", **DINOV2),
    "Dinov2 gated": lambda: of_transformers("Dinov2Model", **GATED),
    "Dinov2 with registers": lambda: of_transformers("Dinov2WithRegistersModel", **DINOV2),
    "Dinov2 with registers, gated": lambda: of_transformers("Dinov2WithRegistersModel", **GATED),
    "CLIP": lambda: of_transformers("CLIPVisionModelWithProjection", projection_dim=5),
    "CLIP without projection": lambda: of_transformers("CLIPVisionModel", hidden_act="gelu"),
    "SigLIP": lambda: of_transformers("SiglipVisionModel"),
}


def on_disk(peer, folder):
    """The file or folder that the library's own way of saving makes."""
    if isinstance(peer, transformers.PreTrainedModel):
        peer.save_pretrained(folder)
        return folder
    return saved(folder.with_suffix(".pth"), peer.state_dict())


def outputs(peer, images):
    """The peer's logits, or without classifier its normalised tokens, of a tower for images and text what it gives."""
    if isinstance(peer, transformers.ViTMAEModel):  # which would shuffle the patches, and drop some
        return peer(images, noise=torch.arange(16.0).expand(len(images), 16)).last_hidden_state
    found = peer(images)
    if peer.__class__.__name__.startswith(("CLIP", "Siglip")):
        return found["image_embeds"] if "image_embeds" in found else found["pooler_output"]
    return found if isinstance(found, torch.Tensor) else found["logits"] if "logits" in found else found[0]


def assert_equal_outputs(model, peer, error=2e-6):
    images = torch.randn(2, 3, 32, 32, dtype=model.pos_embed.dtype)
    tower = model.config.pre_norm or model.global_pool == "map"
    ours = model.eval() if model.num_classes or tower else model.eval().forward_features
    with torch.no_grad():
        assert relative_rms(ours(images), outputs(peer, images)) <= error


@pytest.mark.parametrize("kind", PEERS)
def test_what_a_library_saves_gives_its_outputs(kind, tmp_path):
    peer = as_trained(PEERS[kind]())
    model = fastvit.load_checkpoint(None, on_disk(peer, tmp_path / "saved"))
    assert_equal_outputs(model, peer)
    # transformers has other names in memory than in its files.
    in_memory = fastvit.load_checkpoint(None, saved(tmp_path / "memory.pth", peer.state_dict())).state_dict()
    torch.testing.assert_close(dict(in_memory), dict(model.state_dict()), rtol=0, atol=0)
    # A file in half precision, read into a model in float32.
    half = copy.deepcopy(peer).bfloat16()
    path = on_disk(half, tmp_path / "half")
    assert_equal_outputs(fastvit.load_checkpoint(None, path), half.float())
    # In float64 nothing hides behind rounding.
    path = on_disk(peer.double(), tmp_path / "double")
    exact = fastvit.VisionTransformer(model.config, dtype=torch.float64)
    assert_equal_outputs(fastvit.load_checkpoint(exact, path), peer, error=1e-12)


@pytest.mark.parametrize("kind", PEERS)
def test_converted_there_and_back_every_bit_is_the_same(kind, tmp_path):
    peer = as_trained(PEERS[kind]()).bfloat16()
    library = "torchvision" if kind == "torchvision" else "transformers"
    path = on_disk(peer, tmp_path / "saved")
    original = {name: tensor for name, tensor in raw(path).items() if "pooler" not in name}
    if kind == "ViT for masked images":
        del original["embeddings.mask_token"]
    if "registers" in kind:  # timm's names have no place for the class token's position but in the token itself
        original["embeddings.cls_token"] += original["embeddings.position_embeddings"][:, :1]
        original["embeddings.position_embeddings"][:, :1] = 0
    back = convert_checkpoint(path, to=library)
    torch.testing.assert_close(back.state, original, rtol=0, atol=0)
    assert all(tensor.dtype == torch.bfloat16 for tensor in back.state.values())

    ours = convert_checkpoint(path)
    timm_file = tmp_path / "ours.safetensors"
    timm_file.write_bytes(ours.safetensors())
    torch.testing.assert_close(convert_checkpoint(timm_file).state, ours.state, rtol=0, atol=0)
    library_file = tmp_path / "library.safetensors"
    library_file.write_bytes(convert_checkpoint(timm_file, to=library).safetensors())
    torch.testing.assert_close(convert_checkpoint(library_file).state, ours.state, rtol=0, atol=0)


def raw(path):
    return load_file(path / "model.safetensors") if path.is_dir() else torch.load(path, weights_only=True)


@pytest.mark.parametrize("kind", [kind for kind in PEERS if kind not in ("MAE", "MSN")])
def test_the_library_takes_what_is_written_for_it(kind, tmp_path):
    peer = as_trained(PEERS[kind]())
    ours = fastvit.load_checkpoint(None, on_disk(peer, tmp_path / "saved"))
    tower = ours.config.pre_norm or ours.global_pool == "map"
    # Of a file alone nobody knows its activation, which the towers' config says.
    path = tmp_path / "saved" if tower else saved(tmp_path / "ours.safetensors", ours.state_dict())
    if kind == "torchvision":
        again = of_torchvision().eval()
        again.load_state_dict(convert_checkpoint(path, to="torchvision").state)
    else:
        folder = tmp_path / "written"
        assert run("convert", path, folder, "--to", "transformers") == 0
        again, said = type(peer).from_pretrained(folder, output_loading_info=True)
        assert not said["unexpected_keys"] and not said["mismatched_keys"]
        facts, original = again.config.to_dict(), peer.config.to_dict()
        unread = {"architectures", "dtype", "transformers_version", "_name_or_path", "encoder_stride"}
        unread |= {"id2label", "label2id"} if not ours.num_classes or tower else set()
        unread |= {"intermediate_size"} if "Dinov2" in kind else set()
        assert {name for name in original if facts.get(name) != original[name]} <= unread
        unread = {"embeddings.mask_token", "pooler.dense.weight", "pooler.dense.bias"}
        assert {*said["missing_keys"]} <= unread
        again.eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(outputs(again, images), outputs(peer, images))


def test_files_of_torchvision_before_its_names_changed(tmp_path):
    """As the weights that it publishes: MLPBlock had linear_1 and linear_2 before its version 2."""
    peer = as_trained(of_torchvision())
    old = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): tensor
        for name, tensor in peer.state_dict().items()
    }
    again = of_torchvision().eval()
    again.load_state_dict(old)
    assert_equal_outputs(fastvit.load_checkpoint(None, saved(tmp_path / "w.pth", old)), again)


def test_the_encoder_of_files_before_fine_tuning(tmp_path):
    peer = as_trained(of_transformers("ViTMAEForPreTraining", mask_ratio=0.0))
    assert_equal_outputs(fastvit.load_checkpoint(None, on_disk(peer, tmp_path / "w")), peer.vit)


def test_shards(tmp_path):
    peer = as_trained(PEERS["ViT"]())
    peer.save_pretrained(tmp_path / "w", max_shard_size="300KB")
    index = tmp_path / "w" / "model.safetensors.index.json"
    shards = sorted((tmp_path / "w").glob("*.safetensors"))
    assert len(shards) > 3
    for path in (tmp_path / "w", index):
        model = fastvit.load_checkpoint(None, path)
        assert_equal_outputs(model, peer)

    before = copy.deepcopy(model.state_dict())
    named = json.loads(index.read_text())["weight_map"]
    right = index.read_text()
    for text, error, message in (
        (json.dumps({"weight_map": named | {"x": "../w.safetensors"}}), ValueError, "expected files beside it"),
        (json.dumps({"weight_map": named | {"x": shards[0].name}}), ValueError, f"lack: x of {shards[0].name}"),
        (json.dumps({"weight_map": named | {"x": "y.safetensors"}}), FileNotFoundError, "no .*y.safetensors, which"),
        (json.dumps({"weight_map": named | {"x": 1}}), ValueError, "is no index"),
        (json.dumps([]), ValueError, "is no index"),
        (right[:-40], ValueError, "is no index"),
    ):
        index.write_text(text)
        with pytest.raises(error, match=message):
            fastvit.load_checkpoint(model, tmp_path / "w")
    index.write_text(right)
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{shards[1].name} cannot be read as a safetensors file"):
        fastvit.load_checkpoint(model, tmp_path / "w")
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_what_is_converted_is_left_as_it_was(tmp_path):
    for kind in ("torchvision", "DeiT", "Dinov2 with registers, gated"):
        state = as_trained(PEERS[kind]()).state_dict()
        before = copy.deepcopy(state)
        formats.to_timm(state)
        assert list(state) == list(before)
        torch.testing.assert_close(dict(state), dict(before), rtol=0, atol=0)


def test_faults_are_caught(tmp_path):
    """What the tests above rest on: with one tensor in another's place they fail, and what lacks is an error."""
    peer = as_trained(PEERS["Dinov2 with registers"]())
    right = peer.state_dict()

    def changed(change):
        state = dict(right)
        change(state)
        return saved(tmp_path / "w.pth", state)

    def swap(state):
        names = [f"encoder.layer.0.attention.{part}_proj.weight" for part in "qk"]
        state[names[0]], state[names[1]] = state[names[1]], state[names[0]]

    def no_class_position(state):
        state["embeddings.position_embeddings"] = state["embeddings.position_embeddings"].clone()
        state["embeddings.position_embeddings"][:, 0] = 0

    for change in (swap, no_class_position):
        with pytest.raises(AssertionError):
            assert_equal_outputs(fastvit.load_checkpoint(None, changed(change)), peer)
    model = fastvit.load_checkpoint(None, changed(lambda state: None))
    assert_equal_outputs(model, peer)
    before = copy.deepcopy(model.state_dict())
    for gone, message in {
        "embeddings.register_tokens": r"missing reg_token \(1, 4, 128\)",
        "encoder.layer.1.layer_scale2.lambda1": r"missing blocks\.1\.ls2\.gamma \(128,\)",
        "encoder.layer.0.attention.k_proj.bias": r"missing blocks\.0\.attn\.qkv\.bias .*unexpected .*query\.bias",
    }.items():
        with pytest.raises(ValueError, match=f"of transformers' Dinov2, which does not fit the model: .*{message}"):
            fastvit.load_checkpoint(model, changed(lambda state, gone=gone: state.pop(gone)))
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_a_classifier_that_timms_model_has_not(tmp_path):
    """Dinov2's reads the mean of the patches too; DeiT's without teacher has no head for the second token."""
    for name, more, message in (
        ("Dinov2ForImageClassification", DINOV2, r"head\.weight has shape \(5, 256\), expected \(5, 128\)"),
        ("DeiTForImageClassification", {}, r"missing head_dist\.weight \(5, 128\)"),
    ):
        peer = as_trained(of_transformers(name, **more))
        path = on_disk(peer, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            fastvit.load_checkpoint(None, path)
        config = fastvit.models.infer.infer_config(read_checkpoint(path)[0])[0]
        model = fastvit.VisionTransformer(config)
        fastvit.load_checkpoint(model, path, new_classifier=True)
        model.reset_classifier(0)
        assert_equal_outputs(model, getattr(peer, peer.base_model_prefix))


def test_what_the_config_beside_a_file_says(tmp_path):
    """eps, activation and heads, which tensors do not tell; transformers' ViT has an eps of 1e-12 unless it is said."""
    config = transformers.ViTConfig(
        **{**SIZES, "layer_norm_eps": 1e-3, "num_attention_heads": 8, "hidden_act": "gelu_pytorch_tanh"}
    )
    peer = as_trained(transformers.ViTModel(config))
    folder = on_disk(peer, tmp_path / "w")
    model = fastvit.load_checkpoint(None, folder)
    assert_equal_outputs(model, peer)
    assert_equal_outputs(fastvit.load_checkpoint(None, folder / "model.safetensors"), peer)
    alone = saved(tmp_path / "alone.safetensors", raw(folder))
    with pytest.raises(AssertionError):
        assert_equal_outputs(fastvit.load_checkpoint(None, alone), peer)
    assert_equal_outputs(fastvit.load_checkpoint(fastvit.VisionTransformer(model.config), alone), peer)
    # Of the file beside it whatever its name, and of an encoder inside a larger model.
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "encoder": config.to_dict()}))
    torch.save(peer.state_dict(), folder / "pytorch_model.bin")
    assert_equal_outputs(fastvit.load_checkpoint(None, folder / "pytorch_model.bin"), peer)
    for text, message in (
        ('{"model_type": "vit", "hidden_act": "relu"}', "activation is 'relu', expected one of"),
        ("{", r"config\.json is no config of a Vision Transformer: "),
        ("3", r"config\.json is no config of a Vision Transformer: "),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            fastvit.load_checkpoint(None, folder)
    (folder / "config.json").write_text('{"architecture": "vit_base_patch16_224", "num_classes": 5}')  # timm's
    fastvit.load_checkpoint(None, folder)


def test_what_a_converted_file_says_of_itself(tmp_path):
    """Activation, eps and heads go with the tensors: to timm's names and on to transformers' nothing is lost."""
    how = {**SIZES, "num_attention_heads": 4, "layer_norm_eps": 1e-4}
    peer = as_trained(
        transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**how, projection_dim=5))
    )
    path = tmp_path / "timm.safetensors"
    path.write_bytes(convert_checkpoint(on_disk(peer, tmp_path / "w")).safetensors())
    assert_equal_outputs(fastvit.load_checkpoint(None, path), peer)
    facts = convert_checkpoint(path, to="transformers").transformers_config()
    assert (facts["hidden_act"], facts["layer_norm_eps"], facts["num_attention_heads"]) == ("quick_gelu", 1e-4, 4)
    tensors = load_file(path)
    for said in ("[]", "{", '{"activation": "relu"}'):
        save_file(tensors, path, {"fastvit": said})
        with pytest.raises(ValueError, match="has metadata of fastvit that cannot be read|activation is 'relu'"):
            fastvit.load_checkpoint(None, path)


def test_towers_of_models_for_images_and_text(tmp_path):
    """The whole of CLIP and SigLIP, and SigLIP with a classifier, which reads the mean of the patches."""
    text = {"vocab_size": 9, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "bos_token_id": 0}
    vision = {name: value for name, value in SIZES.items() if name != "num_labels"}
    given = {"text_config": {**text, "eos_token_id": 1}, "vision_config": vision}
    images = torch.randn(2, 3, 32, 32)
    for kind, more, features in (
        ("CLIPModel", {"projection_dim": 5}, lambda peer: peer.get_image_features(images).pooler_output),
        ("SiglipModel", {}, lambda peer: peer.get_image_features(images).pooler_output),
        ("SiglipForImageClassification", {"num_labels": 7}, lambda peer: peer(images).logits),
    ):
        peer = getattr(transformers, kind)
        peer = as_trained(peer(peer.config_class(**given, **more)))
        model = fastvit.load_checkpoint(None, on_disk(peer, tmp_path / kind)).eval()
        assert model.config.activation == ("quick_gelu" if "CLIP" in kind else "gelu_tanh")
        with torch.no_grad():
            assert relative_rms(model(images), features(peer)) <= 2e-6


@pytest.mark.parametrize(
    "to, overrides, message",
    [
        ("torchvision", {"init_values": 0.1}, "torchvision has only init_values=None, the model has"),
        ("torchvision", {"reg_tokens": 4}, "torchvision has only reg_tokens=0, the model has 4"),
        ("torchvision", {"qkv_bias": False}, "torchvision has only qkv_bias=True, the model has False"),
        ("torchvision", {"class_token": False, "global_pool": "avg"}, "torchvision has only class_token=True"),
        ("transformers", {"reg_tokens": 4}, "transformers has only reg_tokens=0, the model has 4"),
        ("transformers", {"pre_norm": True, "reg_tokens": 4}, "transformers' CLIP has only reg_tokens=0"),
        ("transformers", {"global_pool": "map"}, "transformers' SigLIP has only class_token=False, the model has True"),
        ("transformers", {"init_values": 0.1}, "transformers' Dinov2 has only num_classes=0, the model has 5"),
        ("transformers", {"global_pool": "avg"}, "transformers has only global_pool='token', the model has 'avg'"),
        (
            "transformers",
            {"init_values": 0.1, "reg_tokens": 4, "num_classes": 0},
            "transformers' Dinov2 has only no_embed_class=True",
        ),
    ],
)
def test_models_that_a_library_has_not(to, overrides, message, tmp_path):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 1, "num_heads": 2, "num_classes": 5}
    path = saved(tmp_path / "w.pth", fastvit.VisionTransformer(fastvit.ViTConfig(**sizes | overrides)).state_dict())
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(path, to=to)


def test_no_config_says_what_transformers_dinov2_has_not(tmp_path, capsys):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 1, "num_heads": 2, "num_classes": 0}
    config = fastvit.ViTConfig(**sizes, init_values=0.1, mlp_ratio=2.5)
    path = saved(tmp_path / "w.pth", fastvit.VisionTransformer(config).state_dict())
    assert run("convert", path, tmp_path / "folder", "--to", "transformers") == 2
    assert "transformers' Dinov2 has only whole mlp_ratios, the model has 2.5" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


def test_how_images_were_normalised_where_the_format_tells(tmp_path):
    for kind, mean in (("torchvision", 0.485), ("ViT", 0.5)):
        model = fastvit.load_checkpoint(None, on_disk(PEERS[kind](), tmp_path / kind))
        assert model.config.mean[0] == model.pretrained_cfg["mean"][0] == mean


def test_the_page_has_every_format():
    page = " ".join((ROOT / "docs" / "checkpoints.md").read_text().split())
    for source in (*(format.source for format in formats.FORMATS), *formats._NOT_READ):
        assert source in page, source


def test_a_class_token_without_position_is_written_with_one_of_zeros(tmp_path):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = as_trained(fastvit.VisionTransformer(fastvit.ViTConfig(**sizes, mlp_ratio=2, no_embed_class=True)))
    path = saved(tmp_path / "w.pth", model.state_dict())
    peer = of_torchvision().eval()
    peer.load_state_dict(convert_checkpoint(path, to="torchvision").state)
    assert_equal_outputs(model, peer)

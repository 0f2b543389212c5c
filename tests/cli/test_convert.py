"""`fastvit convert`: what is written, what is said of it, and what stays as it was where it fails."""

import json

import pytest
import torch
from command_line import PHOTOS, one_line, read_npz, run

import fastvit

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def weights(tmp_path):
    model = fastvit.create_model("deit_tiny_distilled_patch16_224", num_classes=7)
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "last.pth")
    return tmp_path / "last.pth", dict(model.state_dict())


def test_to_timms_names(weights, tmp_path, capsys):
    path, state = weights
    output = tmp_path / "w.safetensors"
    assert run("convert", path, output) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"from   timm: {path}",
        "model  deit_tiny_distilled_patch16_224, 224 x 224 pixels, 7 classes, as its names and shapes tell",
        f"to     timm, {len(state)} tensors: {output}",
    ]
    torch.testing.assert_close(safetensors.load_file(output), state, rtol=0, atol=0)


def test_to_another_librarys_and_back(weights, tmp_path, capsys):
    path, state = weights
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    assert run("convert", path, there, "--to", "transformers", "--model", "deit_tiny_distilled_patch16_224") == 0
    assert run("convert", there, back) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "model  deit_tiny_distilled_patch16_224, 224 x 224 pixels, 7 classes"
    assert said[3] == f"from   transformers' DeiT: {there}"
    torch.testing.assert_close(safetensors.load_file(back), state, rtol=0, atol=0)
    assert "deit.encoder.layer.0.attention.attention.query.weight" in safetensors.load_file(there)


def test_what_is_written_for_transformers_is_read_by_the_other_commands(weights, tmp_path, capsys):
    pytest.importorskip("PIL")
    path, _ = weights
    assert run("convert", path, tmp_path / "folder", "--to", "transformers") == 0
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["num_hidden_layers"] == 12
    said = []
    for checkpoint in (path, tmp_path / "folder"):
        capsys.readouterr()
        model = ["--model", "deit_tiny_distilled_patch16_224", "--checkpoint", checkpoint]
        assert run("classify", PHOTOS / "chelsea.jpg", "--device", "cpu", "--json", *model) == 0
        said.append(capsys.readouterr().out)
        output = tmp_path / "features.npz"
        assert run("embed", PHOTOS, "-o", output, "--device", "cpu", *model) == 0
        said[-1] += str(read_npz(output)[1])
        output.unlink()
    assert said[0] == said[1]


def test_several_models_of_the_same_shapes_and_none(tmp_path, capsys):
    for model, said in {
        "vit_tiny_patch16_224": "vit_tiny_patch16_224 (or deit_tiny_patch16_224, vit_tiny_patch16_384), 224",
        None: "none that is known, embed_dim 192, depth 1, 3 heads, mlp, 224 x 224 pixels, 1000 classes",
    }.items():
        state = fastvit.create_model(model or "vit_tiny_patch16_224", depth=12 if model else 1).state_dict()
        torch.save(state, tmp_path / "w.pth")
        assert run("convert", tmp_path / "w.pth", tmp_path / "w.safetensors") == 0
        assert capsys.readouterr().out.splitlines()[1].startswith(f"model  {said}")


def test_what_cannot_be_leaves_what_was_there(weights, tmp_path, capsys):
    path, _ = weights
    output = tmp_path / "w.safetensors"
    output.write_bytes(b"before")
    (tmp_path / "text.pth").write_bytes(b"text")
    for arguments, message in {
        (path, output, "--to", "torchvision"): "torchvision has only distilled=False, the model has True",
        (path, output, "--model", "vit_tiny_patch16_224"): "does not fit the model: unexpected dist_token (1, 1, 192)",
        (path, output, "--model", "vit_tiny"): "unknown model 'vit_tiny'",
        (tmp_path / "no.pth", output): "no checkpoint at",
        (tmp_path / "text.pth", output): "text.pth cannot be read as a torch file",
        (tmp_path, output): "a directory, expected a .safetensors or .pth file, or a folder with model.safetensors",
        (path, tmp_path / "w.pth"): "unknown format '.pth', expected .safetensors",
        (path, tmp_path / "none" / "w.safetensors"): "no such folder",
    }.items():
        assert run("convert", *arguments) == 2
        assert message in one_line(capsys)
        assert output.read_bytes() == b"before"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["last.pth", "text.pth", "w.safetensors"]

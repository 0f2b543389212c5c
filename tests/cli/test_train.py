"""`fastvit train` and `validate` as they are called, and what is wrong with a call, in one line."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import one_line, run
from training_runs import CLASSES, PLAIN, SIZE, write_images

import fastvit


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def arguments(data, out, *more, **recipe):
    values = [f"--{name.replace('_', '-')}={value}" for name, value in {**PLAIN, **recipe}.items()]
    size = [f"{name}={value}" for name, value in SIZE.items() if name != "img_size"]
    model = ["--model", "deit_tiny_patch16_224", "--img-size", "16", "--model-kwargs", *size]
    return ["train", data, "-o", out, "--device", "cpu", "--workers", "0", *values, *more, *model]


def test_from_images_to_classes(data, tmp_path, capsys):
    """Train, validate, embed and classify, with nothing said of the model but its file."""
    assert run(*arguments(data, tmp_path / "run", hflip=0.0, auto_augment="none", crop_scale=0.8, epochs=20)) == 0
    out, said = capsys.readouterr()
    weights = tmp_path / "run" / "model.safetensors"
    assert out.strip().endswith(f"60 steps: {weights}") and "auto_augment              none   (rand-m9" in said
    best = float(out.split("%")[0].split()[-1])

    assert run("validate", data, "--checkpoint", weights, "--device", "cpu", "--json", "--workers", "0") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 9 and 100 * found["top1"] == pytest.approx(best, abs=0.01) and found["top5"] == 1
    probes = ("--knn", "--linear-probe", "--json", "--workers", "0")
    assert run("validate", data, "--checkpoint", weights, "--device", "cpu", *probes) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"knn", "linear_probe", "images"} and 0 <= found["knn"] <= 1 <= 2 * found["linear_probe"]

    images = sorted((data / "val" / "box").iterdir())
    assert run("classify", *images, "--checkpoint", weights, "--device", "cpu", "--json") == 0
    for entry in json.loads(capsys.readouterr().out):
        assert {top["label"] for top in entry["top5"]} == set(CLASSES)
    assert run("embed", data / "val", "-o", tmp_path / "f.npz", "--checkpoint", weights, "--device", "cpu") == 0
    frozen = fastvit.freeze(fastvit.load_checkpoint(None, weights).eval())
    frozen.save(tmp_path / "frozen.safetensors")
    fastvit.load_frozen(tmp_path / "frozen.safetensors")

    # A larger size, from there, and to nowhere with a learning rate of 0: positions are resampled.
    still = {"epochs": 1, "lr": 0.0, "min_lr": 0.0, "warmup_lr": 0.0}
    again = arguments(data, tmp_path / "larger", "--checkpoint", weights, **still)
    again[again.index("--img-size") + 1] = "24"
    assert run(*again) == 0
    larger = fastvit.load_checkpoint(None, tmp_path / "larger" / "model.safetensors")
    assert larger.config.img_size == (24, 24)
    before = fastvit.load_checkpoint(None, weights)
    torch.testing.assert_close(larger.blocks.state_dict(), before.blocks.state_dict(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "more, recipe, words",
    [
        (("--recipe", "best"), {}, "unknown recipe 'best', expected one of deit, deit-finetune"),
        (("--precision", "int8"), {}, "unknown precision 'int8'"),
        (("--teacher", "regnety_002"), {}, "--teacher needs --teacher-pretrained or --teacher-checkpoint"),
        (("--teacher-pretrained",), {}, "need --teacher NAME"),
        ((), {"batch_size": 64}, "batch_size is 64, expected at most the 24 training images"),
        ((), {"smoothing": 2.0}, "smoothing is 2.0"),
        ((), {"auto_augment": "rnd"}, "auto_augment is 'rnd', which timm does not know"),
        ((), {"optimizer": "sgdx"}, "sgdx"),
        (("--checkpoint", "none.pth"), {}, "none.pth"),
    ],
)
def test_wrong_calls(data, tmp_path, capsys, more, recipe, words):
    assert run(*arguments(data, tmp_path / "out", *more, **recipe)) == 2
    assert words in one_line(capsys)


def test_wrong_model_arguments(data, tmp_path, capsys):
    for change, words in (("foo=1", "create_model got unknown foo"), ("num_classes=4", "which data, recipe or"),
                          ("depth", "expected FIELD=VALUE")):  # fmt: skip
        assert run(*arguments(data, tmp_path / "out"), change) == 2
        assert words in one_line(capsys)
    assert run("train", tmp_path / "none", "-o", tmp_path / "out") == 2
    assert "no such folder" in one_line(capsys)


def test_validation_needs_the_models_classes(data, tmp_path, capsys):
    model = fastvit.create_model("vit_tiny_patch16_224", num_classes=10, depth=1, img_size=32)
    torch.save(model.state_dict(), tmp_path / "ten.pth")
    assert run("validate", data, "--checkpoint", tmp_path / "ten.pth", "--device", "cpu") == 2
    assert "has 10 classes" in one_line(capsys)


def test_unreadable_images_are_named_once_and_left_out(tmp_path, capsys):
    data = write_images(tmp_path / "data")
    bad = sorted((data / "val" / "box").iterdir())[:2]  # neighbours
    for path in bad:
        path.write_text("no image")
    model = fastvit.create_model("vit_tiny_patch16_224", num_classes=3, depth=1, img_size=32)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    assert run("validate", data, "--checkpoint", tmp_path / "w.pth", "--device", "cpu", "--workers", "0", "--json") == 1
    out, said = capsys.readouterr()
    assert json.loads(out)["images"] == 7
    assert [said.count(f"skipped {path}: not an image") for path in bad] == [1, 1]

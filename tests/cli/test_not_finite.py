"""Outputs that are not finite: found out by every command that runs a model, image by image."""

import numpy as np
import pytest
import torch
from command_line import MODEL, complaints, one_line, read_npz, run, strict_json, weights

import fastvit
from fastvit.commands._common import DTYPES


@pytest.fixture
def overflowing(tmp_path):
    """overflowing(limit): the arguments for a checkpoint whose first layer gives twice `limit` for the image spike.png,
    and 0 for flat.png; and the two images."""
    Image = pytest.importorskip("PIL.Image")
    for name, value in (("flat.png", 0), ("spike.png", 255)):
        image = Image.new("RGB", (35, 35))  # of which the model sees the central 32
        image.putpixel((2, 2), (value, value, value))
        image.save(tmp_path / name)

    def arguments(limit: float, **tensors) -> list[str]:
        model = fastvit.create_model(MODEL, img_size=32)
        with torch.no_grad():
            model.patch_embed.proj.weight.zero_()
            model.patch_embed.proj.weight[:, 0, 0, 0] = limit
            model.patch_embed.proj.weight[:, 0, 0, 1] = -limit
        torch.save(model.state_dict() | tensors, tmp_path / "w.pth")
        return [*weights(tmp_path / "w.pth"), "--img-size", "32"]

    return arguments


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 3e38), ("bf16", 3e38), ("fp16", 6e4)])
def test_numbers_that_are_not_finite_are_an_error_of_their_image_alone(dtype, limit, overflowing, tmp_path, capsys):
    arguments = [*overflowing(limit), "--dtype", dtype]
    flat, spike = tmp_path / "flat.png", tmp_path / "spike.png"
    skipped = f"skipped {spike}: the model's output is not finite in {DTYPES[dtype]}"
    skipped += "; --dtype bfloat16 and float32 reach further\n" if dtype == "fp16" else "\n"
    for more in ([], ["--batch-size", "1"]):
        assert run("classify", spike, flat, "--json", *arguments, *more) == 1
        printed = capsys.readouterr()
        assert [result["image"] for result in strict_json(printed.out)] == [str(flat)]
        assert complaints(printed.err, frozen=False) == skipped
    assert run("classify", spike, flat, *arguments) == 1
    assert "nan" not in capsys.readouterr().out
    assert run("embed", tmp_path, "-o", tmp_path / "x.npz", *arguments) == 1
    assert complaints(capsys.readouterr().err, frozen=False) == skipped
    names, rows = read_npz(tmp_path / "x.npz")
    assert names == ["flat.png"]
    assert np.isfinite(rows).all()
    assert run("attention", spike, "-o", tmp_path / "x.jpg", *arguments) == 1
    assert one_line(capsys) == skipped.replace("skipped", "fastvit attention: error:")
    assert not (tmp_path / "x.jpg").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value, overflowing, tmp_path, capsys):
    bad = {"norm.weight": torch.full((192,), value), "head.bias": torch.full((1000,), value)}
    arguments = overflowing(1.0, **bad)
    reason = f"is not finite in float32, nor are the weights of {tmp_path / 'w.pth'}: norm.weight"
    assert run("classify", tmp_path / "flat.png", "--json", *arguments) == 1
    printed = capsys.readouterr()
    assert strict_json(printed.out) == []
    assert (
        complaints(printed.err, frozen=False)
        == f"skipped {tmp_path / 'flat.png'}: the model's output {reason} and 1 more\n"
    )
    assert run("embed", tmp_path, "-o", tmp_path / "x.npz", *arguments) == 1
    assert complaints(capsys.readouterr().err, frozen=False).splitlines() == [
        f"skipped {tmp_path / 'flat.png'}: the model's output {reason}",
        f"skipped {tmp_path / 'spike.png'}: the model's output {reason}",
        "fastvit embed: error: no image gave features; nothing written",
    ]
    assert not list(tmp_path.glob("x.npz*"))

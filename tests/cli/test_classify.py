"""`fastvit classify`: what it prints, and of which images."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_line import MODEL, PHOTOS, ROOT, add_bad_files, complaints, one_line, run, strict_json, weights

import fastvit
from fastvit.commands.classify import imagenet_classes


def test_classify(checkpoint, folder, capsys):
    assert run("classify", folder / "chelsea.jpg", folder / "rocket.jpg", "--json", *weights(checkpoint)) == 0
    results = json.loads(capsys.readouterr().out)
    assert [Path(result["image"]).name for result in results] == ["chelsea.jpg", "rocket.jpg"]
    model = fastvit.create_model(MODEL, checkpoint=checkpoint).eval()
    from fastvit import images

    logits = model(images.read(folder / "chelsea.jpg", model.config)[None])
    expected = logits.softmax(-1).topk(5)
    assert [entry["class"] for entry in results[0]["top5"]] == expected.indices[0].tolist()
    assert results[0]["top5"][0]["probability"] == pytest.approx(expected.values[0, 0].item(), rel=1e-4)
    assert results[0]["top5"][0]["label"] == imagenet_classes()[expected.indices[0, 0]]

    assert run("classify", folder / "chelsea.jpg", *weights(checkpoint)) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == str(folder / "chelsea.jpg")
    assert results[0]["top5"][0]["label"] in printed.splitlines()[1]


def test_classify_names_and_skips_bad_images(checkpoint, folder, capsys):
    add_bad_files(folder)
    files = [folder / "half.jpg", folder / "chelsea.jpg", folder / "text.jpg", folder / "absent.jpg"]
    assert run("classify", *files, "--json", *weights(checkpoint)) == 1
    printed = capsys.readouterr()
    assert [Path(result["image"]).name for result in json.loads(printed.out)] == ["chelsea.jpg"]
    for line, name, reason in zip(
        complaints(printed.err).splitlines(),
        ("half.jpg", "text.jpg", "absent.jpg"),
        ("truncated", "not an image", "no such file"),
        strict=True,
    ):
        assert line.startswith(f"skipped {folder / name}: ")
        assert reason in line


def test_classify_needs_a_classifier(tmp_path, capsys):
    path = tmp_path / "headless.pth"
    torch.save(fastvit.create_model("vit_small_patch8_224").state_dict(), path)
    arguments = ["--device", "cpu", "--model", "vit_small_patch8_224", "--checkpoint", path]
    assert run("classify", PHOTOS / "chelsea.jpg", *arguments) == 2
    assert "has no classifier" in one_line(capsys)


@pytest.mark.parametrize(("name", "classes"), [(MODEL, 3), (MODEL, 12), ("vit_small_patch8_224", 7)])
def test_classify_takes_the_classes_of_a_fine_tuned_checkpoint(name, classes, tmp_path, capsys):
    """Fewer than five, more, and of a model that has no classifier of its own; in a wrapper and under a prefix."""
    from fastvit import images

    model = fastvit.create_model(name, img_size=32, num_classes=classes).eval()
    with torch.no_grad():
        model.head.weight.normal_()
    state = {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "tuned.pth")
    arguments = ["--device", "cpu", "--model", name, "--checkpoint", tmp_path / "tuned.pth", "--img-size", "32"]
    assert run("classify", PHOTOS / "chelsea.jpg", "--json", *arguments) == 0
    (result,) = strict_json(capsys.readouterr().out)
    logits = model(images.read(PHOTOS / "chelsea.jpg", model.config)[None])
    expected = logits.softmax(-1).topk(min(5, classes))
    assert [entry["class"] for entry in result["top5"]] == expected.indices[0].tolist()
    assert [entry["label"] for entry in result["top5"]] == [str(i) for i in expected.indices[0].tolist()]
    got = [entry["probability"] for entry in result["top5"]]
    assert got == pytest.approx(expected.values[0].tolist(), rel=1e-4)


def test_classify_in_half_precision_has_the_softmax_in_float32(checkpoint, folder, capsys):
    assert run("classify", folder / "chelsea.jpg", "--json", "--dtype", "bf16", *weights(checkpoint)) == 0
    from fastvit import images

    model = fastvit.freeze(fastvit.create_model(MODEL, checkpoint=checkpoint).eval().bfloat16(), runtime="torch")
    logits = model(images.read(folder / "chelsea.jpg", model.config)[None]).float()
    got = [entry["probability"] for entry in json.loads(capsys.readouterr().out)[0]["top5"]]
    assert got == pytest.approx(logits.softmax(-1).topk(5).values[0].tolist(), rel=1e-4)


def test_classify_prints_what_it_has_when_it_is_interrupted(checkpoint, folder, capsys, stop_after):
    files = sorted(folder.glob("*.jpg"))
    stop_after(1)
    arguments = [*files, "--batch-size", "1", *weights(checkpoint)]
    assert run("classify", "--json", *arguments) == 130
    assert [result["image"] for result in strict_json(capsys.readouterr().out)] == [str(files[0])]
    assert run("classify", *arguments) == 130
    assert capsys.readouterr().out.startswith(f"{files[0]}\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_file_that_gives_nothing_does_not_keep_an_interrupted_run(number, checkpoint, folder, tmp_path):
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "fastvit", "classify", folder / "chelsea.jpg", pipe, "--batch-size", "1"]
    command += ["--img-size", "32", *weights(checkpoint), "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        writer = None
        while writer is None:
            with contextlib.suppress(OSError):  # until somebody reads
                writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)  # for the image before it
        process.send_signal(number)
        try:
            out, error = process.communicate(timeout=20)
        finally:
            process.kill()
            os.close(writer)
    assert (process.returncode, complaints(error)) == (130, "fastvit classify: error: interrupted\n")
    assert [result["image"] for result in strict_json(out)] == [str(folder / "chelsea.jpg")]


def test_the_imagenet_classes():
    classes = imagenet_classes()
    assert len(set(classes)) == 1000
    assert (classes[0], classes[285], classes[999]) == ("tench", "Egyptian cat", "toilet tissue")
    data = pytest.importorskip("timm.data")
    info = data.ImageNetInfo()
    for i, name in enumerate(classes):
        assert name.split(" (")[0] == info.index_to_description(i).split(", ")[0]

"""The command line: what it prints, what it writes, and one clear line with the right exit status for a bad request."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastvit
from fastvit import cli

ROOT = Path(__file__).parent.parent
PHOTOS = ROOT / "benchmarks" / "photos"
MODEL = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.manual_seed(0)
    torch.save(fastvit.create_model(MODEL).state_dict(), path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three photographs, one of them in a folder of its own; a truncated one and a text beside them."""
    pytest.importorskip("PIL")
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    shutil.copy(PHOTOS / "chelsea.jpg", folder)
    shutil.copy(PHOTOS / "rocket.jpg", folder)
    shutil.copy(PHOTOS / "coffee.jpg", folder / "sub")
    return folder


def add_bad_files(folder: Path) -> None:
    photo = (PHOTOS / "coffee.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(photo[: len(photo) // 2])
    (folder / "text.jpg").write_text("no image at all\n")


def weights(checkpoint: Path) -> list[str]:
    return ["--device", "cpu", "--model", MODEL, "--checkpoint", str(checkpoint)]


def run(*arguments: str) -> int:
    """`main`'s exit status, also where argparse exits by itself."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        return exit.code


def one_line(capsys) -> str:
    """What was printed on stderr, which must be one line and no traceback."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_help_does_not_import_torch():
    code = "import sys\nfrom fastvit import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'triton', 'numpy', 'PIL'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("info", "verify", "bench", "embed", "classify"):
        assert command in done.stdout


def test_python_m_fastvit_runs_from_a_checkout(tmp_path):
    done = subprocess.run([sys.executable, "-m", "fastvit", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == f"fastvit {fastvit.__version__}"


def test_info(capsys):
    assert run("info", "--device", "cpu", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert facts["models"] == len(fastvit.list_models())
    assert run("info", "--device", "cpu") == 0
    assert f"torch                {torch.__version__}" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("command", ["info", "verify", "bench"])
def test_cuda_without_a_gpu(command, capsys):
    assert run(command, "--device", "cuda") == 2
    assert "'cuda' was asked for, but PyTorch" in one_line(capsys)


@pytest.mark.parametrize("device", ["cuad", "meta", "cpu cpu"])
def test_unknown_device(device, capsys):
    assert run("info", "--device", device) == 2
    assert f"unknown device {device!r}" in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "a.jpg"], "one of the arguments --pretrained --checkpoint is required"),
        (["embed", "folder", "-o", "x.npz"], "one of the arguments --pretrained --checkpoint is required"),
        (["classify", "--pretrained"], "required: IMAGE"),
        (["embed", "folder", "--pretrained"], "required: -o"),
        (["verify", "--ops", "softmax"], "unknown 'softmax'"),
        (["verify", "--dtypes", "int8"], "unknown 'int8'"),
        (["verify", "--time-limit", "-1"], "-1 is not positive"),
        (["bench", "--batches", "1,0"], "0 is not positive"),
        (["bench", "--batches", "one"], "invalid list of positive int value: 'one'"),
        (["tuna"], "invalid choice: 'tuna'"),
        ([], "required: command"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_unknown_model(checkpoint, folder, capsys):
    arguments = ["--device", "cpu", "--model", "vit_tiny_patch16_225", "--checkpoint", checkpoint]
    assert run("classify", folder / "chelsea.jpg", *arguments) == 2
    assert "did you mean vit_tiny_patch16_224" in one_line(capsys)


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
    assert results[0]["top5"][0]["label"] == cli.imagenet_classes()[expected.indices[0, 0]]

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
        printed.err.splitlines(),
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


@pytest.mark.parametrize("content", [None, b"not a checkpoint"])
def test_bad_checkpoint(content, folder, tmp_path, capsys):
    path = tmp_path / "bad.pth"
    if content is not None:
        path.write_bytes(content)
    assert run("classify", folder / "chelsea.jpg", *weights(path)) == 1
    assert "bad.pth" in one_line(capsys)


def read_npz(path: Path) -> tuple[list[str], np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return file["files"].tolist(), file["features"]


def test_embed_npz(checkpoint, folder, tmp_path, capsys):
    output = tmp_path / "out.npz"
    assert run("embed", folder, "-o", output, "--batch-size", "2", *weights(checkpoint)) == 0
    assert capsys.readouterr().out == f"3 images, 0 skipped: {output}\n"
    names, rows = read_npz(output)
    assert names == ["chelsea.jpg", "rocket.jpg", "sub/coffee.jpg"]
    model = fastvit.create_model(MODEL, checkpoint=checkpoint).eval()
    from fastvit import images

    pixels = torch.stack([images.read(folder / name, model.config) for name in names])
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
    np.testing.assert_allclose(rows, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out.npz"]


def test_embed_safetensors(checkpoint, folder, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    output = tmp_path / "out.safetensors"
    assert run("embed", folder, "-o", output, "--dtype", "bf16", *weights(checkpoint)) == 0
    with safetensors.safe_open(output, "np") as file:
        assert json.loads(file.metadata()["files"]) == ["chelsea.jpg", "rocket.jpg", "sub/coffee.jpg"]
        assert json.loads(file.metadata()["about"])["model"] == MODEL
        assert file.get_tensor("features").shape == (3, 192)


def test_embed_names_and_skips_bad_images(checkpoint, folder, tmp_path, capsys):
    add_bad_files(folder)
    output = tmp_path / "out.npz"
    assert run("embed", folder, "-o", output, *weights(checkpoint)) == 1
    printed = capsys.readouterr()
    assert "3 images, 2 skipped" in printed.out
    assert [line.split(":")[0] for line in printed.err.splitlines()] == [
        f"skipped {folder / 'half.jpg'}",
        f"skipped {folder / 'text.jpg'}",
    ]
    assert len(read_npz(output)[0]) == 3


def test_embed_of_bad_images_only_writes_nothing(checkpoint, tmp_path, capsys):
    pytest.importorskip("PIL")
    folder = tmp_path / "images"
    folder.mkdir()
    add_bad_files(folder)
    assert run("embed", folder, "-o", tmp_path / "out.npz", *weights(checkpoint)) == 1
    assert "none of the images could be read" in capsys.readouterr().err
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError("device lost")])
def test_embed_keeps_what_it_has_and_resumes(stop, checkpoint, folder, tmp_path, capsys, monkeypatch):
    from fastvit import images

    output, whole, right = tmp_path / "out.npz", tmp_path / "whole.npz", images.read_batches
    assert run("embed", folder, "-o", whole, "--batch-size", "1", *weights(checkpoint)) == 0

    def stopped(paths, *arguments):
        batches = right(paths, *arguments)
        yield next(batches)
        raise stop

    monkeypatch.setattr(images, "read_batches", stopped)
    status = run("embed", folder, "-o", output, "--batch-size", "1", *weights(checkpoint))
    assert status == (130 if stop is KeyboardInterrupt else 1)
    assert "1 images are kept" in capsys.readouterr().err
    assert not output.exists()
    partial = tmp_path / "out.npz.partial"
    assert read_npz(partial)[0] == ["chelsea.jpg"]

    monkeypatch.setattr(images, "read_batches", right)
    arguments = ["--batch-size", "1", "--resume"]
    assert run("embed", folder, "-o", output, *arguments, "--dtype", "bf16", *weights(checkpoint)) == 1
    assert "delete it to start anew" in one_line(capsys)
    assert run("embed", folder, "-o", output, *arguments, *weights(checkpoint)) == 0
    assert "1 of 3 images are done" in capsys.readouterr().err
    assert not partial.exists()
    assert read_npz(output)[0] == read_npz(whole)[0]
    assert np.array_equal(read_npz(output)[1], read_npz(whole)[1])


@pytest.mark.parametrize(
    ("target", "status", "message"),
    [
        ("absent/out.npz", 2, "no such folder"),
        ("images", 2, "is a folder"),
        ("out.csv", 2, "unknown format '.csv', expected .npz or .safetensors"),
    ],
)
def test_embed_refuses_a_bad_output_before_it_works(target, status, message, checkpoint, folder, tmp_path, capsys):
    assert run("embed", folder, "-o", tmp_path / target, *weights(checkpoint)) == status
    assert message in one_line(capsys)


def test_embed_of_no_folder_and_of_an_empty_one(checkpoint, tmp_path, capsys):
    pytest.importorskip("PIL")
    assert run("embed", tmp_path / "absent", "-o", tmp_path / "x.npz", *weights(checkpoint)) == 1
    assert "no such folder" in one_line(capsys)
    (tmp_path / "empty").mkdir()
    assert run("embed", tmp_path / "empty", "-o", tmp_path / "x.npz", *weights(checkpoint)) == 1
    assert "no images in" in one_line(capsys)


def test_embed_does_not_trust_a_partial_file(checkpoint, folder, tmp_path, capsys):
    (tmp_path / "x.npz.partial").write_bytes(b"not an archive")
    assert run("embed", folder, "-o", tmp_path / "x.npz", "--resume", *weights(checkpoint)) == 1
    assert "not a file of features" in one_line(capsys)


def test_without_pillow_there_is_one_line(monkeypatch, checkpoint, capsys):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "fastvit.images", raising=False)
    monkeypatch.delattr(fastvit, "images", raising=False)
    assert run("classify", "a.jpg", *weights(checkpoint)) == 1
    assert "pip install 'fastvit[images]'" in one_line(capsys)


def test_the_imagenet_classes():
    classes = cli.imagenet_classes()
    assert len(set(classes)) == 1000
    assert (classes[0], classes[285], classes[999]) == ("tench", "Egyptian cat", "toilet tissue")
    data = pytest.importorskip("timm.data")
    info = data.ImageNetInfo()
    for i, name in enumerate(classes):
        assert name.split(" (")[0] == info.index_to_description(i).split(", ")[0]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    from fastvit import report

    path = tmp_path / "results.json"
    report.write_json(path, {"old": 1})
    with pytest.raises(ValueError):
        report.write_json(path, {"new": float("nan")})

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(report.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        report.write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_classify_in_half_precision_has_the_softmax_in_float32(checkpoint, folder, capsys):
    assert run("classify", folder / "chelsea.jpg", "--json", "--dtype", "bf16", *weights(checkpoint)) == 0
    from fastvit import images

    model = fastvit.create_model(MODEL, checkpoint=checkpoint).eval().bfloat16()
    logits = model(images.read(folder / "chelsea.jpg", model.config)[None]).float()
    got = [entry["probability"] for entry in json.loads(capsys.readouterr().out)[0]["top5"]]
    assert got == pytest.approx(logits.softmax(-1).topk(5).values[0].tolist(), rel=1e-4)


def test_embed_saves_on_the_way(checkpoint, folder, tmp_path, monkeypatch):
    from fastvit.features import Features

    right, saved = Features.save_partial, []
    monkeypatch.setattr(Features, "save_partial", lambda self: (saved.append(len(self.done)), right(self))[1])
    monkeypatch.setattr(cli, "SAVE_SECONDS", -1)
    assert run("embed", folder, "-o", tmp_path / "x.npz", "--batch-size", "1", *weights(checkpoint)) == 0
    assert saved == [1, 2, 3]


def test_embed_takes_a_checkpoint_of_any_classifier(folder, tmp_path):
    for classes in (0, 10):
        torch.save(fastvit.create_model(MODEL, num_classes=classes).state_dict(), tmp_path / "w.pth")
        assert run("embed", folder, "-o", tmp_path / f"{classes}.npz", *weights(tmp_path / "w.pth")) == 0


def test_a_polite_kill_ends_like_ctrl_c():
    code = (
        "import os, signal, sys, time\nfrom fastvit import cli\n"
        "def info(a): os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)\n"
        "cli.info = info\nsys.argv = ['fastvit', 'info']\nsys.exit(cli.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "fastvit info: error: interrupted\n")


def test_results_have_the_permissions_of_the_umask(tmp_path):
    from fastvit import report

    before = os.umask(0o022)
    try:
        report.write_json(tmp_path / "x.json", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == 0o644

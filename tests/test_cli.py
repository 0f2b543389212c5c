"""The command line: what it prints, what it writes, and one clear line with the right exit status for a bad request."""

import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fastvit
from fastvit import cli
from fastvit.commands import embed
from fastvit.commands._common import DTYPES
from fastvit.commands.classify import imagenet_classes

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
    for command in ("info", "verify", "bench", "embed", "classify", "attention"):
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
        (["bench", "--models", ","], "',' names nothing"),
        (["verify", "--ops", ""], "'' names nothing"),
        (["attention", "a.jpg", "--pretrained"], "required: -o"),
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


@pytest.mark.parametrize("command", ["classify", "embed", "attention"])
@pytest.mark.parametrize("content", [None, b"not a checkpoint"])
def test_bad_checkpoint(content, command, folder, tmp_path, capsys):
    path = tmp_path / "bad.pth"
    if content is not None:
        path.write_bytes(content)
    given = {
        "classify": [folder / "chelsea.jpg"],
        "embed": [folder, "-o", tmp_path / "x.npz"],
        "attention": [folder / "chelsea.jpg", "-o", tmp_path / "x.png"],
    }[command]
    assert run(command, *given, *weights(path)) == 2
    assert "bad.pth" in one_line(capsys)


def usage_errors(tmp_path: Path) -> dict[str, tuple[list, str]]:
    """Command lines that ask for what cannot be, with what the error says."""
    tiny = ["--device", "cpu", "--model", MODEL]
    photo, untrained, npz, png = PHOTOS / "chelsea.jpg", "vit_large_patch14_224", tmp_path / "x.npz", tmp_path / "x.png"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "bench.json").mkdir()
    (tmp_path / "p.npz.partial").mkdir()
    os.mkfifo(tmp_path / "pipe")
    fine = [*tiny, "--checkpoint", tmp_path / "w.pth"]
    torch.save(fastvit.create_model(MODEL).state_dict(), tmp_path / "w.pth")
    without_bias = fastvit.create_model(MODEL, num_classes=7).state_dict()
    del without_bias["head.bias"]
    torch.save(without_bias, tmp_path / "b.pth")
    (tmp_path / "link.npz").symlink_to("absent/x.npz")
    other = [*fine[:2], "--model", "vit_small_patch16_224", *fine[4:]]
    bench = ["bench", "--device", "cpu", "--quick"]
    return {
        "size": (["classify", photo, *fine, "--img-size", "225"], "img_size is (225, 225), expected multiples"),
        "embed size": (["embed", PHOTOS, "-o", npz, *fine, "--img-size", "225"], "img_size is (225, 225)"),
        "no weights": (["classify", photo, "--device", "cpu", "--model", untrained, "--pretrained"], untrained),
        "other model": (["classify", photo, *other], "w.pth does not fit the model"),
        "no folder": (["embed", tmp_path / "absent", "-o", npz, *fine], "absent: no such folder"),
        "a file": (["embed", tmp_path / "file", "-o", npz, *fine], "file: not a folder"),
        "no images": (["embed", tmp_path / "empty", "-o", npz, *fine], "no images in"),
        "partial": (["embed", PHOTOS, "-o", tmp_path / "p.npz", *fine], "p.npz.partial is a folder"),
        "no file": (["embed", PHOTOS, "-o", tmp_path / "pipe", *fine], "pipe is no regular file, expected a file"),
        "json no file": (["verify", "--device", "cpu", "--json", tmp_path / "pipe"], "pipe is no regular file"),
        "json folder": (
            ["verify", "--device", "cpu", "--json", tmp_path / "file" / "{device}" / "x"],
            "cannot be made",
        ),
        "bench folder": ([*bench, "-o", tmp_path / "file"], "cannot be made"),
        "bench photos": ([*bench, "--photos", tmp_path / "empty"], "no images in it"),
        "bench weights": ([*bench, "--models", untrained, "--pretrained"], f"no weights of {untrained}"),
        "bench resume": ([*bench, "-o", tmp_path / "results", "--resume"], "bench.json"),
        "block": (["attention", photo, "-o", png, *fine, "--block", "12"], "--block is 12, expected one of"),
        "head": (["attention", photo, "-o", png, *fine, "--head", "3"], "--head is 3, expected one of"),
        "picture": (["attention", photo, "-o", tmp_path / "x.txt", *fine], "unknown format '.txt'"),
        "picture folder": (["attention", photo, "-o", tmp_path / "absent" / "x.png", *fine], "no such folder"),
        "link": (["embed", PHOTOS, "-o", tmp_path / "link.npz", *fine], f"no such folder as {tmp_path / 'absent'}"),
        "no bias": (["classify", photo, *tiny, "--checkpoint", tmp_path / "b.pth"], "missing head.bias (7,)"),
        "compare": (["bench", "compare", tmp_path / "a", tmp_path / "b"], "fastvit bench compare: error: "),
    }


def test_what_is_asked_for_wrongly_exits_with_2(tmp_path, capsys):
    pytest.importorskip("PIL")
    for name, (arguments, message) in usage_errors(tmp_path).items():
        assert (name, run(*arguments)) == (name, 2)
        assert message in one_line(capsys), name


@contextlib.contextmanager
def endpoint(answers: str):
    """The address of a hub that refuses connections, or takes them and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers == "nothing":
            server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("answers", ["no", "nothing"])
def test_pretrained_without_a_network_fails_at_once(answers, tmp_path):
    pytest.importorskip("huggingface_hub")
    code = (
        "import sys, time, huggingface_hub.utils\nfrom fastvit import cli, images, models\nstart = time.monotonic()\n"
        "status = cli.main(sys.argv[1:])\nprint(time.monotonic() - start)\nsys.exit(status)"
    )
    command = [sys.executable, "-c", code, "classify", PHOTOS / "chelsea.jpg", "--pretrained", "--model", MODEL]
    with endpoint(answers) as address:
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
        environment.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("fastvit classify: error: could not download model.safetensors of timm/")
    assert done.stderr.count("\n") == 1
    assert float(done.stdout) < 5


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


@pytest.mark.parametrize("name", ["OUT.NPZ", "Out.SafeTensors"])
def test_embed_takes_its_format_in_any_case(name, checkpoint, folder, tmp_path):
    pytest.importorskip("safetensors")
    assert run("embed", folder, "-o", tmp_path / name, "--img-size", "32", *weights(checkpoint)) == 0
    assert (tmp_path / name).read_bytes().startswith(b"PK") == (name == "OUT.NPZ")


def test_embed_writes_to_what_its_output_links_to(checkpoint, folder, tmp_path):
    (tmp_path / "disk").mkdir()
    output, target = tmp_path / "out.npz", tmp_path / "disk" / "real.npz"
    output.symlink_to("disk/real.npz")
    for _ in range(2):  # a link to nothing yet, and to a file
        assert run("embed", folder, "-o", output, "--img-size", "32", *weights(checkpoint)) == 0
        assert output.is_symlink() and not target.is_symlink()
        assert len(read_npz(target)[0]) == 3
        assert list((tmp_path / "disk").iterdir()) == [target]


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
    assert "no image gave features; nothing written" in capsys.readouterr().err
    assert not (tmp_path / "out.npz").exists()


@pytest.fixture
def stop_after(monkeypatch):
    """stop_after(n, error=KeyboardInterrupt): let `embed` and `classify` do n batches from now on, and then be stopped;
    all of them for None."""
    from fastvit import images

    right = images.read_batches

    def stop(batches, error=KeyboardInterrupt):
        def stopped(*arguments):
            for i, batch in enumerate(right(*arguments)):
                if i == batches:
                    raise error
                yield batch

        monkeypatch.setattr(images, "read_batches", right if batches is None else stopped)

    return stop


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError("device lost")])
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_embed_keeps_what_it_has_and_goes_on_from_there(stop, resume, checkpoint, folder, tmp_path, capsys, stop_after):
    output, whole = tmp_path / "out.npz", tmp_path / "whole.npz"
    arguments = [folder, "--batch-size", "1", *weights(checkpoint)]
    assert run("embed", "-o", whole, *arguments) == 0
    stop_after(1, stop)
    assert run("embed", "-o", output, *arguments) == (130 if stop is KeyboardInterrupt else 1)
    assert "1 images are kept" in capsys.readouterr().err
    assert not output.exists()
    partial = tmp_path / "out.npz.partial"
    assert read_npz(partial)[0] == ["chelsea.jpg"]

    stop_after(0, stop)
    assert run("embed", "-o", output, *arguments, *resume) == (130 if stop is KeyboardInterrupt else 1)
    assert read_npz(partial)[0] == ["chelsea.jpg"]

    stop_after(None)
    capsys.readouterr()
    assert run("embed", "-o", output, *arguments, *resume) == 0
    assert capsys.readouterr().err == "Resuming: 1 of 3 images are done.\n"
    assert not partial.exists()
    assert read_npz(output)[0] == read_npz(whole)[0]
    assert np.array_equal(read_npz(output)[1], read_npz(whole)[1])


def test_a_second_ctrl_c_does_not_stop_the_saving(checkpoint, folder, tmp_path, capsys, stop_after, monkeypatch):
    from fastvit import features

    right, before = features.write_atomically, signal.getsignal(signal.SIGTERM)

    def interrupted(path, data):
        assert "Saving 1 images" in capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        right(path, data)

    monkeypatch.setattr(features, "write_atomically", interrupted)
    stop_after(1)
    assert run("embed", folder, "-o", tmp_path / "x.npz", "--batch-size", "1", *weights(checkpoint)) == 130
    assert "Stopped: 1 images are kept in" in capsys.readouterr().err
    assert read_npz(tmp_path / "x.npz.partial")[0] == ["chelsea.jpg"]
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_embed_recomputes_what_is_gone_or_has_changed_and_keeps_the_order(
    checkpoint, folder, tmp_path, capsys, stop_after
):
    shutil.copy(PHOTOS / "camera.jpg", folder / "t.jpg")
    output, arguments = tmp_path / "out.npz", [folder, "--batch-size", "1", *weights(checkpoint)]
    stop_after(3)
    assert run("embed", "-o", output, *arguments) == 130
    assert read_npz(tmp_path / "out.npz.partial")[0] == ["chelsea.jpg", "rocket.jpg", "sub/coffee.jpg"]
    (folder / "rocket.jpg").unlink()
    shutil.copy(PHOTOS / "astronaut.jpg", folder / "a.jpg")
    status = (folder / "chelsea.jpg").stat()
    shutil.copy(PHOTOS / "astronaut.jpg", folder / "chelsea.jpg")
    os.utime(folder / "chelsea.jpg", ns=(status.st_atime_ns, status.st_mtime_ns))  # another size, the same time
    os.utime(folder / "sub" / "coffee.jpg")  # the same size, another time
    stop_after(1)
    capsys.readouterr()
    assert run("embed", "-o", output, *arguments) == 130
    noted = f"Left out 3 rows of {output}.partial: their images are gone or have changed.\n"
    assert capsys.readouterr().err.startswith(noted)
    stop_after(None)
    assert run("embed", "-o", output, *arguments) == 0
    assert run("embed", "-o", tmp_path / "whole.npz", *arguments) == 0
    names, rows = read_npz(output)
    assert names == read_npz(tmp_path / "whole.npz")[0] == ["a.jpg", "chelsea.jpg", "sub/coffee.jpg", "t.jpg"]
    assert np.array_equal(rows, read_npz(tmp_path / "whole.npz")[1])
    assert np.array_equal(rows[0], rows[1])


def test_embed_never_takes_or_replaces_what_another_run_left(checkpoint, folder, tmp_path, capsys, stop_after):
    output, partial = tmp_path / "out.npz", tmp_path / "out.npz.partial"
    arguments = ["-o", output, "--batch-size", "1", "--device", "cpu", "--model", MODEL]
    mine, theirs = ["--checkpoint", checkpoint], ["--checkpoint", tmp_path / "other.pth"]
    torch.save(fastvit.create_model(MODEL, num_classes=3).state_dict(), tmp_path / "other.pth")
    stop_after(2)
    assert run("embed", folder, *arguments, *mine) == 130
    before = partial.read_bytes()
    capsys.readouterr()
    for others, message in (
        ([folder, *mine, "--dtype", "bf16"], "was made with dtype float32 (now bfloat16)"),
        ([folder, *mine, "--img-size", "32"], "was made with img_size 224 (now 32)"),
        ([folder, *theirs], "other.pth"),
        ([folder / "sub", *mine], f"was made with folder {folder} (now {folder / 'sub'})"),
    ):
        assert run("embed", *arguments, *others) == 2
        error = one_line(capsys)
        assert message in error
        assert error.endswith("; --no-resume starts anew\n")
        assert partial.read_bytes() == before
    stop_after(0)
    assert run("embed", folder, *arguments, *mine, "--dtype", "fp32", "--img-size", "224") == 130  # not other ones
    assert partial.read_bytes() == before
    stop_after(1)
    assert run("embed", folder, *arguments, *mine, "--dtype", "bf16", "--no-resume") == 130
    assert read_npz(partial)[0] == ["chelsea.jpg"]


def test_embed_replaces_a_finished_result_when_it_is_through_and_says_so(
    checkpoint, folder, tmp_path, capsys, stop_after
):
    output, arguments = tmp_path / "out.npz", ["--batch-size", "1", *weights(checkpoint)]
    assert run("embed", folder, "-o", output, *arguments) == 0
    before = output.read_bytes()
    (folder / "rocket.jpg").unlink()
    stop_after(1)
    capsys.readouterr()
    assert run("embed", folder, "-o", output, *arguments) == 130
    assert f"{output} exists: it is replaced when this run is through.\n" in capsys.readouterr().err
    assert output.read_bytes() == before
    stop_after(None)
    assert run("embed", folder, "-o", output, *arguments) == 0
    assert read_npz(output)[0] == ["chelsea.jpg", "sub/coffee.jpg"]


def test_a_full_disk_costs_no_row(checkpoint, folder, tmp_path, capsys, monkeypatch):
    from fastvit import features

    right, calls = features.write_atomically, []

    def full(path, data):
        calls.append(path.name)
        if len(calls) in (2, 4):  # the second partial file, and the output
            raise OSError(28, "No space left on device")
        right(path, data)

    monkeypatch.setattr(features, "write_atomically", full)
    monkeypatch.setattr(embed, "SAVE_SECONDS", -1)
    arguments = [folder, "-o", tmp_path / "out.npz", "--batch-size", "1", *weights(checkpoint)]
    assert run("embed", *arguments) == 1
    assert calls == ["out.npz.partial"] * 3 + ["out.npz", "out.npz.partial"]
    error = capsys.readouterr().err.splitlines()
    assert error[0] == f"{tmp_path / 'out.npz.partial'} could not be written and is as it was: No space left on device"
    assert error[1].startswith("Saving 3 images")
    assert error[2].startswith("Stopped: 3 images are kept in")
    assert error[3] == "fastvit embed: error: [Errno 28] No space left on device"
    assert run("embed", *arguments) == 0
    assert "Resuming: 3 of 3" in capsys.readouterr().err


def test_ctrl_c_again_and_again_loses_no_row(checkpoint, tmp_path):
    """With real signals: a bad image among good ones tells when to send them."""
    Image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "000.png")
    for i in range(1, 1000):
        (folder / f"{i:03}.png").symlink_to("000.png")
    for bad in ("040.png", "080.png"):
        (folder / bad).unlink()
        (folder / bad).write_text("no image at all")
    command = [sys.executable, "-m", "fastvit", "embed", folder, "-o", tmp_path / "x.npz", "--batch-size", "1"]
    command += ["--img-size", "32", *weights(checkpoint)]
    kept = []
    for bad in ("040.png", "080.png"):
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            said = []
            for line in process.stderr:
                said.append(line)
                if f"skipped {folder / bad}: " in line:
                    process.send_signal(signal.SIGINT)
        assert process.returncode == 130, said
        assert "images are kept in" in said[-2]
        assert said[-1] == "fastvit embed: error: interrupted\n"
        kept.append(read_npz(tmp_path / "x.npz.partial")[0])
    assert kept[0][:40] == [f"{i:03}.png" for i in range(40)]
    assert kept[1][: len(kept[0])] == kept[0]
    assert 79 <= len(kept[1]) < 998
    assert said[0] == f"Resuming: {len(kept[0])} of 1000 images are done.\n"


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


@pytest.mark.parametrize("content", ["garbage", "older"])
def test_embed_does_not_trust_a_partial_file(content, checkpoint, folder, tmp_path, capsys):
    partial = tmp_path / "x.npz.partial"
    if content == "garbage":
        partial.write_bytes(b"not an archive")
    else:  # without the times of its images, as the first version wrote it
        with partial.open("wb") as file:
            np.savez(file, files=np.array(["chelsea.jpg"]), features=np.ones((1, 192)), about=np.array("{}"))
    before = partial.read_bytes()
    assert run("embed", folder, "-o", tmp_path / "x.npz", *weights(checkpoint)) == 2
    assert "no partial result of this version of fastvit; --no-resume starts anew" in one_line(capsys)
    assert partial.read_bytes() == before
    assert run("embed", folder, "-o", tmp_path / "x.npz", "--no-resume", *weights(checkpoint)) == 0
    assert not partial.exists()


def test_files_that_vanish_are_named_and_cost_only_themselves(checkpoint, folder, tmp_path, capsys, monkeypatch):
    from fastvit import images

    right = images.read_batches

    def vanish(*arguments):
        (folder / "rocket.jpg").unlink()
        return right(*arguments)

    monkeypatch.setattr(images, "read_batches", vanish)
    (folder / "dangling.jpg").symlink_to("absent.jpg")
    (folder / "link").symlink_to(PHOTOS)
    assert run("embed", folder, "-o", tmp_path / "x.npz", *weights(checkpoint)) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"skipped {folder / 'dangling.jpg'}: No such file or directory",
        f"skipped {folder / 'rocket.jpg'}: no such file",
    ]
    linked = [f"link/{path.name}" for path in sorted(PHOTOS.glob("*.jpg"))]
    assert read_npz(tmp_path / "x.npz")[0] == ["chelsea.jpg", *linked, "sub/coffee.jpg"]


def test_kinds_of_images_that_are_not_read_are_named(checkpoint, folder, tmp_path, capsys):
    for name in ("a.heic", "b.svg", "notes.txt"):
        (folder / name).write_text("")
    shutil.copy(PHOTOS / "coffee.jpg", folder / "c.NEF")
    assert run("embed", folder, "-o", tmp_path / "x.npz", *weights(checkpoint)) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("3 images, 3 skipped")
    for line, name in zip(printed.err.splitlines(), ("a.heic", "b.svg", "c.NEF"), strict=True):
        assert line.startswith(f"skipped {folder / name}: {Path(name).suffix.lower()} is not read by Pillow")


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


def strict_json(text: str):
    def refuse(name: str):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


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
        assert printed.err == skipped
    assert run("classify", spike, flat, *arguments) == 1
    assert "nan" not in capsys.readouterr().out
    assert run("embed", tmp_path, "-o", tmp_path / "x.npz", *arguments) == 1
    assert capsys.readouterr().err == skipped
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
    assert printed.err == f"skipped {tmp_path / 'flat.png'}: the model's output {reason} and 1 more\n"
    assert run("embed", tmp_path, "-o", tmp_path / "x.npz", *arguments) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"skipped {tmp_path / 'flat.png'}: the model's output {reason}",
        f"skipped {tmp_path / 'spike.png'}: the model's output {reason}",
        "fastvit embed: error: no image gave features; nothing written",
    ]
    assert not list(tmp_path.glob("x.npz*"))


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
    assert (process.returncode, error) == (130, "fastvit classify: error: interrupted\n")
    assert [result["image"] for result in strict_json(out)] == [str(folder / "chelsea.jpg")]


def attention_picture(output: Path):
    """The size of a written picture, and what is in it."""
    image = pytest.importorskip("PIL.Image").open(output)
    return image.size, np.asarray(image.convert("RGB"))


def test_attention(checkpoint, folder, tmp_path, capsys):
    output = tmp_path / "map.png"
    arguments = [folder / "chelsea.jpg", "-o", output, *weights(checkpoint)]
    assert run("attention", *arguments) == 0
    assert capsys.readouterr().out == f"block 11, mean of 3 heads, head 0, head 1, head 2: {output}\n"
    from fastvit import heatmaps, images

    model = fastvit.create_model(MODEL, checkpoint=checkpoint).eval()
    pixels = images.read(folder / "chelsea.jpg", model.config)
    maps = fastvit.attention_maps(model, pixels[None], [3])[0][0, :, 0, 1:].unflatten(1, (14, 14)).numpy()
    image = pixels.permute(1, 2, 0).numpy()

    size, picture = attention_picture(output)
    assert run("attention", *arguments, "--block", "-1") == 0
    assert np.array_equal(attention_picture(output)[1], picture)
    assert run("attention", *arguments, "--block", "3", "--head", "1", "--dtype", "fp32") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"block 3, head 1: {output}"
    expected = heatmaps.draw(
        image, {"head 1": maps[1]}, f"{MODEL}, block 3: attention of the class token to each patch"
    )
    assert np.array_equal(attention_picture(output)[1], np.asarray(expected))
    assert attention_picture(output)[0] < size
    assert run("attention", *arguments[:1], "-o", tmp_path / "map.jpg", *weights(checkpoint), "--dtype", "bf16") == 0
    assert attention_picture(tmp_path / "map.jpg")[0] == size


def test_attention_of_a_bad_image(checkpoint, folder, tmp_path, capsys):
    add_bad_files(folder)
    for name, message in (("half.jpg", "truncated"), ("absent.jpg", "no such file")):
        assert run("attention", folder / name, "-o", tmp_path / "x.png", *weights(checkpoint)) == 1
        assert message in one_line(capsys)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("name", "tokens"), [("deit_tiny_distilled_patch16_224", 2), ("vit_small_patch14_reg4_dinov2", 5)]
)
def test_attention_leaves_out_the_tokens_before_the_patches(name, tokens, tmp_path, monkeypatch):
    from fastvit import heatmaps

    seen = []
    monkeypatch.setattr(heatmaps, "save", lambda path, image, maps, title: seen.append((image, maps)))
    side = 28 if "patch14" in name else 32
    torch.save(fastvit.create_model(name, img_size=side).state_dict(), tmp_path / "w.pth")
    arguments = ["--device", "cpu", "--model", name, "--checkpoint", tmp_path / "w.pth", "--img-size", side]
    assert run("attention", PHOTOS / "chelsea.jpg", "-o", tmp_path / "x.png", *arguments, "--block", "1") == 0
    model = fastvit.create_model(name, checkpoint=tmp_path / "w.pth", img_size=side, num_classes=0).eval()
    ((image, maps),) = seen
    whole = fastvit.attention_maps(model, torch.from_numpy(image).permute(2, 0, 1)[None], [1])[0][0]
    assert whole.shape[1] == tokens + 4
    assert len(maps) == 1 + model.config.num_heads
    for head in range(model.config.num_heads):
        np.testing.assert_allclose(maps[f"head {head}"].ravel(), whole[head, 0, tokens:].numpy(), rtol=1e-6)
    np.testing.assert_allclose(next(iter(maps.values())).ravel(), whole[:, 0, tokens:].mean(0).numpy(), rtol=1e-5)


@pytest.mark.parametrize("arguments", [["classify", "a.jpg"], ["attention", "a.jpg", "-o", "a.png"]])
def test_without_pillow_there_is_one_line(arguments, monkeypatch, checkpoint, capsys):
    monkeypatch.setitem(sys.modules, "PIL", None)
    for name in ("images", "heatmaps"):
        monkeypatch.delitem(sys.modules, f"fastvit.{name}", raising=False)
        monkeypatch.delattr(fastvit, name, raising=False)
    assert run(*arguments, *weights(checkpoint)) == 2
    assert "pip install 'fastvit[images]'" in one_line(capsys)


def test_the_imagenet_classes():
    classes = imagenet_classes()
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
    monkeypatch.setattr(Features, "save_partial", lambda self: (saved.append(len(self.rows)), right(self))[1])
    monkeypatch.setattr(embed, "SAVE_SECONDS", -1)
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
        "cli.info.run = info\nsys.argv = ['fastvit', 'info']\nsys.exit(cli.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "fastvit info: error: interrupted\n")


def test_output_is_flushed_where_it_can_fail_and_names_come_out_as_they_are():
    code = (
        "import sys\nfrom fastvit import cli\ndef info(a): print('\\udce9.jpg'); return 0\n"
        "cli.info.run = info\nsys.argv = ['fastvit', 'info']\nsys.exit(cli.main())"
    )
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    usual["PYTHONIOENCODING"] = "utf-8:strict"

    def done(stdout) -> tuple[int, bytes, bytes]:
        found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=usual, stdout=stdout, stderr=subprocess.PIPE)
        return found.returncode, found.stdout, found.stderr

    assert done(subprocess.PIPE) == (0, b"\xe9.jpg\n", b"")
    with open("/dev/full", "w") as full:
        assert done(full) == (1, None, b"fastvit info: error: [Errno 28] No space left on device\n")
    read, write = os.pipe()
    os.close(read)
    assert done(write) == (1, None, b"")
    os.close(write)


def run_elsewhere(info: str, redirect: str = "", **environment) -> tuple[int, bytes, bytes]:
    """Exit status, stdout and stderr of `fastvit info` in a process of its own, with `info` as its function's body."""
    code = f"import sys\nfrom fastvit import cli\ndef info(a): {info}\n"
    code += "cli.info.run = info\nsys.argv = ['fastvit', 'info']\nsys.exit(cli.main())"
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True)
    return done.returncode, done.stdout, done.stderr


def test_a_name_that_the_terminal_cannot_show_stops_nothing():
    done = run_elsewhere("print('ü\\udce9\\udce9ü.jpg'); return 0", PYTHONIOENCODING="ascii")
    assert done == (0, b"\\xfc\xe9\xe9\\xfc.jpg\n", b"")


@pytest.mark.parametrize(
    ("redirect", "shown"), [(">&-", (b"", b"note\n")), ("2>&-", (b"result\n", b"")), ("<&- >&- 2>&-", (b"", b""))]
)
def test_closed_streams_are_as_devnull(redirect, shown):
    assert run_elsewhere("from fastvit import report; report.note('note'); print('result'); return 0", redirect) == (
        0,
        *shown,
    )


@pytest.mark.parametrize("variable", ["FASTVIT_BACKEND", "FASTVIT_TUNING"])
def test_a_setting_that_is_none_is_wrong_usage(variable):
    command = [sys.executable, "-m", "fastvit", "info", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {variable: "foo"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"fastvit info: error: {variable}")


def test_results_have_the_permissions_of_the_umask(tmp_path):
    from fastvit import report

    before = os.umask(0o022)
    try:
        report.write_json(tmp_path / "x.json", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == 0o644

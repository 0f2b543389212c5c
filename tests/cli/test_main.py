"""The command line as a whole: one clear line with the right exit status for a bad request, signals, streams."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import MODEL, PHOTOS, ROOT, one_line, run, weights

import fastvit


def test_help_does_not_import_torch():
    code = "import sys\nfrom fastvit import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'triton', 'numpy', 'PIL'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("info", "verify", "bench", "embed", "classify", "attention", "convert"):
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


@pytest.mark.parametrize("arguments", [["classify", "a.jpg"], ["attention", "a.jpg", "-o", "a.png"]])
def test_without_pillow_there_is_one_line(arguments, monkeypatch, checkpoint, capsys):
    monkeypatch.setitem(sys.modules, "PIL", None)
    for name in ("images", "heatmaps"):
        monkeypatch.delitem(sys.modules, f"fastvit.{name}", raising=False)
        monkeypatch.delattr(fastvit, name, raising=False)
    assert run(*arguments, *weights(checkpoint)) == 2
    assert "pip install 'fastvit[images]'" in one_line(capsys)


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
    info = "from fastvit.report import note; print('result'); note('note'); return 0"
    assert run_elsewhere(info, redirect) == (0, *shown)


@pytest.mark.parametrize("variable", ["FASTVIT_BACKEND", "FASTVIT_TUNING"])
def test_a_setting_that_is_none_is_wrong_usage(variable):
    command = [sys.executable, "-m", "fastvit", "info", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {variable: "foo"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"fastvit info: error: {variable}")

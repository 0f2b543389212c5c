"""Users' stories at the command line."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import PHOTOS, ROOT, complaints, strict_json
from fastvit.benchmarks import schema
from pairs import NAME, close, timm

import fastvit

pytest.importorskip("timm.optim")
pytest.importorskip("timm.utils")
Image = pytest.importorskip("PIL.Image")

RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "bench.json"


def fastvit_command(*arguments, **environment) -> dict:
    """What subprocess takes to run the command."""
    kept = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "FASTVIT_BACKEND")}
    command = [sys.executable, "-m", "fastvit", *map(str, arguments)]
    return {"args": command, "cwd": ROOT, "env": {**kept, "OMP_NUM_THREADS": "1", **environment}}


def run(*arguments, **environment):
    """A finished command, whose stderr never has a traceback."""
    done = subprocess.run(**fastvit_command(*arguments, **environment), capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """timm's model for images of 32 x 32, and what timm's training script would have saved of it: a file with the
    arguments and with averaged weights, which are the model's; the others are not."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    averaged, raw = (timm.create_model(NAME, img_size=32) for _ in range(2))
    with torch.no_grad():
        averaged.head.weight.normal_(std=0.2)
    optimizer = timm.optim.create_optimizer_v2(raw, opt="adamw", lr=1e-3)
    arguments = argparse.Namespace(model=NAME, lr=1e-3, amp_dtype=torch.bfloat16, data_dir=Path("/data"))
    saver = timm.utils.CheckpointSaver(
        raw, optimizer, args=arguments, model_ema=averaged, checkpoint_dir=folder, recovery_dir=folder
    )
    saver.save_checkpoint(3, metric=np.float64(71.5))
    return averaged.eval(), folder / "last.pth.tar"


def small_images(trained):
    return ["--device", "cpu", "--model", NAME, "--checkpoint", trained[1], "--img-size", "32"]


def by_timm(model, path):
    """One photograph as timm's own scripts prepare it for our model."""
    ours = fastvit.create_model(NAME, img_size=32, device="meta")
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=ours))
    with torch.inference_mode():
        return model(transform(Image.open(path).convert("RGB"))[None])[0]


def test_classify_with_the_checkpoint_of_a_training_script(trained, tmp_path):
    """The file is read without running code, and prepared and classified as in timm."""
    paths = [shutil.copy(PHOTOS / "chelsea.jpg", tmp_path / "my cat, große Ansicht.jpg"), PHOTOS / "coffee.jpg"]
    done = run("classify", *paths, "--json", *small_images(trained))
    assert (done.returncode, complaints(done.stderr)) == (0, "")
    for path, found in zip(paths, strict_json(done.stdout), strict=True):
        want = by_timm(trained[0], path).softmax(-1).topk(5)
        assert found["image"] == str(path)
        assert [entry["class"] for entry in found["top5"]] == want.indices.tolist()
        got = [entry["probability"] for entry in found["top5"]]
        assert got == pytest.approx(want.values.tolist(), rel=1e-2)


def photos_of_a_user(folder: Path) -> None:
    """A few photographs under odd names among many small ones, a broken one, and one of a camera's own format."""
    (folder / "über uns").mkdir(parents=True)
    shutil.copy(PHOTOS / "chelsea.jpg", folder / "0 first.JPG")
    shutil.copy(PHOTOS / "coffee.jpg", folder / "über uns" / "c a f é.jpeg")
    Image.open(PHOTOS / "rocket.jpg").convert("CMYK").save(folder / "0 print.jpg")
    random = np.random.default_rng(0)
    for i in range(500):
        pixels = random.integers(0, 256, (33, 35, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    for i in (60, 120):
        (folder / f"{i:03}.png").write_bytes(b"no image")
    (folder / "IMG_1.CR2").write_bytes(b"II*\0")


def interrupt_at(name, command):
    """Run a command, press Ctrl-C when it skips the image `name`, and return what it said."""
    with subprocess.Popen(**command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("skipped ") and name in line:
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130, said
    assert "Traceback" not in "".join(said)
    return "".join(said)


def kept(path: Path) -> list[str]:
    with np.load(path, allow_pickle=False) as file:
        return file["files"].tolist()


@pytest.mark.slow
def test_embed_a_folder_that_changes_between_interruptions(trained, tmp_path):
    """Ctrl-C twice, an image overwritten, one deleted, one more; then every row is of timm's features."""
    folder, output, partial = tmp_path / "my photos", tmp_path / "f.npz", tmp_path / "f.npz.partial"
    photos_of_a_user(folder)
    command = ["embed", folder, "-o", output, "--batch-size", "4", *small_images(trained)]

    said = interrupt_at("060.png", fastvit_command(*command))
    assert "images are kept in" in said
    first = kept(partial)
    assert {"0 first.JPG", "0 print.jpg", "005.png"} <= set(first)

    Image.new("RGB", (40, 40), "red").save(folder / "005.png")
    (folder / "006.png").unlink()
    shutil.copy(PHOTOS / "camera.jpg", folder / "0 new.jpg")
    said = interrupt_at("120.png", fastvit_command(*command))
    assert "2 rows" in said and f"{len(first) - 2} of 504 images are done" in said
    second = kept(partial)
    assert set(second) > set(first) - {"006.png"}

    done = run(*command)
    assert done.returncode == 1, "images were skipped"
    assert "IMG_1.CR2: .cr2 is not read by Pillow" in done.stderr
    assert done.stdout == f"501 images, 3 skipped: {output}\n"
    assert f"{len(second)} of 504 images are done" in done.stderr
    assert not partial.exists()
    names = kept(output)
    assert len(set(names)) == 501 and "006.png" not in names and "über uns/c a f é.jpeg" in names
    with np.load(output, allow_pickle=False) as file:
        rows = dict(zip(names, file["features"], strict=True))
    peer = copy.deepcopy(trained[0])
    peer.reset_classifier(0)
    for name in ("0 first.JPG", "0 print.jpg", "0 new.jpg", "über uns/c a f é.jpeg", *names[4:40], "499.png"):
        np.testing.assert_allclose(rows[name], by_timm(peer, folder / name), rtol=1e-2, atol=1e-3, err_msg=name)


def test_a_diverged_model_is_found_out(trained, tmp_path):
    """No "nan%", no JSON that is none, no exit status 0."""
    state = trained[0].state_dict()
    state["blocks.3.mlp.fc1.bias"] = torch.full_like(state["blocks.3.mlp.fc1.bias"], math.nan)
    torch.save({"state_dict": state}, tmp_path / "diverged.pth")
    arguments = small_images((None, tmp_path / "diverged.pth"))
    done = run("classify", PHOTOS / "chelsea.jpg", "--json", *arguments)
    assert done.returncode == 1 and strict_json(done.stdout) == []
    assert all(word in done.stderr for word in ("chelsea.jpg", "not finite", "diverged.pth", "blocks.3.mlp.fc1.bias"))
    done = run("embed", PHOTOS, "-o", tmp_path / "f.npz", *arguments)
    assert done.returncode == 1 and "nothing written" in done.stderr
    assert not list(tmp_path.glob("f.npz*"))


def results_with(path: Path, change) -> Path:
    """The shipped results with the times of each entry multiplied by change(its name)."""
    run = json.loads(RESULTS.read_text())
    for row in run["rows"]:
        for name, side in row["entries"].items():
            if side["seconds"]:
                side["seconds"] |= {key: side["seconds"][key] * change(name) for key in ("median", "q25", "q75")}
    path.write_text(json.dumps(run))
    return path


@pytest.mark.parametrize(
    "factors, status, text",
    [
        ({"timm": 0.18, "torchvision": 4.7, "ours": 0.5}, 2, "cannot be compared: timm took 0.18 times"),
        ({"ours": 1.5}, 1, "slower"),
    ],
)
def test_compare_with_last_weeks_bench(factors, status, text, tmp_path):
    """Peers that moved against each other leave nothing to conclude."""
    after = results_with(tmp_path / "after.json", lambda name: factors.get(name, 1.0))
    done = run("bench", "compare", RESULTS, after)
    assert done.returncode == status
    last = done.stdout.splitlines()[-1]
    assert text in last, done.stdout
    assert ("faster" in last) == (status == 0)


@pytest.mark.slow
def test_bench_shows_the_interval_of_each_verdict(tmp_path):
    command = ["bench", "--device", "cpu", "--models", NAME, "--img-sizes", "32", "--batches", "1", "--dtypes", "fp32"]
    command += ["--modes", "inference", "--peers", "timm,transformers", "--seconds", "0.05", "-o", tmp_path]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    (row,) = schema.load(tmp_path / "bench.json").rows
    ratios = {name: side for name, side in row.entries.items() if side.ratio}
    assert "timm" in ratios
    for name, side in ratios.items():
        low, high = side.ratio.low, side.ratio.high
        assert side.verdict == ("faster" if low > 1 else "slower" if high < 1 else "tie")
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(f"  {name} "))
        assert f"[{low:.2f} {high:.2f}]" in line and ("tie" in line) == (side.verdict == "tie")


def test_mistakes_at_the_command_line_exit_with_2(trained, tmp_path):
    shutil.copy(PHOTOS / "chelsea.jpg", tmp_path)
    model = small_images(trained)
    for arguments, text in (
        (["embed", tmp_path / "absent", "-o", tmp_path / "f.npz", *model], "absent: no such folder"),
        (["classify", tmp_path / "chelsea.jpg", *model[:5], tmp_path / "w.pth"], "no checkpoint at"),
        (["classify", tmp_path / "chelsea.jpg", *model[:-1], "225"], "img_size is (225, 225)"),
        (["attention", tmp_path / "chelsea.jpg", "-o", tmp_path / "m.csv", *model], "unknown format '.csv'"),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert text in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_see_where_a_model_looks(trained, tmp_path):
    """The picture shows the maps that timm's own attention would give, brightest where they are largest."""
    done = run("attention", PHOTOS / "chelsea.jpg", "-o", tmp_path / "map.png", *small_images(trained), "--block", "2")
    assert done.returncode == 0 and str(tmp_path / "map.png") in done.stdout, done.stderr
    with Image.open(tmp_path / "map.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100

    peer, seen = copy.deepcopy(trained[0]), []
    for block in peer.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, arguments, output: seen.append(output.detach()))
    model = fastvit.create_model(NAME, img_size=32, checkpoint=trained[1])
    images = torch.randn(2, 3, 32, 32)
    maps = fastvit.attention_maps(model, images)
    peer(images)
    close(maps, seen)


def test_a_service_that_has_closed_its_output(trained):
    command = fastvit_command("classify", PHOTOS / "chelsea.jpg", *small_images(trained), "--json")
    command["args"] = ["sh", "-c", 'exec "$@" >&-', "sh", *command["args"]]
    done = subprocess.run(**command, capture_output=True, text=True)
    assert (done.returncode, complaints(done.stderr)) == (0, "")


def test_a_terminal_that_is_ascii(trained, tmp_path):
    names = [shutil.copy(PHOTOS / "chelsea.jpg", tmp_path / name) for name in ("katze für oma.jpg", "z.jpg")]
    done = run("classify", *names, *small_images(trained), PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "katze f\\xfcr oma.jpg" in done.stdout and "z.jpg" in done.stdout


def test_a_pipe_among_the_photos(trained, tmp_path):
    """Nothing is ever read from it, and no command waits for it."""
    shutil.copy(PHOTOS / "chelsea.jpg", tmp_path)
    os.mkfifo(tmp_path / "pipe.jpg")
    command = fastvit_command("embed", tmp_path, "-o", tmp_path / "f.npz", *small_images(trained))
    done = subprocess.run(**command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, complaints(done.stderr)) == (1, f"skipped {tmp_path / 'pipe.jpg'}: no regular file\n")
    assert kept(tmp_path / "f.npz") == ["chelsea.jpg"]


@pytest.mark.slow
def test_the_interpreter_by_its_environment_variable(trained):
    """What the error under FASTVIT_BACKEND=triton says is missing, TRITON_INTERPRET, is enough."""
    arguments = ["classify", PHOTOS / "chelsea.jpg", *small_images(trained), "--json"]
    done = run(*arguments, FASTVIT_BACKEND="triton")
    assert done.returncode != 0 and "TRITON_INTERPRET is not set" in done.stderr
    done = run(*arguments, FASTVIT_BACKEND="triton", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    want = by_timm(trained[0], PHOTOS / "chelsea.jpg").argmax()
    assert strict_json(done.stdout)[0]["top5"][0]["class"] == want

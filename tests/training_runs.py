"""Small sets of labelled images, and training runs on them, in this process or in others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import fastvit
from fastvit.training import Recipe, Settings, Trainer, find
from fastvit.training.log import read

ROOT = Path(__file__).parents[1]
CLASSES = ("bar", "box", "dot")
SIZE = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
# Everything random is on.
FULL = {"epochs": 3, "batch_size": 8, "lr": 3e-3, "lr_images": 0, "warmup_epochs": 0.5, "ema": 0.9, "drop_path": 0.2}
# Nothing that depends on which process an image is in.
PLAIN = FULL | {"drop_path": 0.0, "mixup": 0.0, "cutmix": 0.0, "erase": 0.0, "repeats": 1}


def write_images(folder: Path, train: int = 24, val: int = 9) -> Path:
    """Class folders of grey pictures, each with a shape of its class at a place of its own."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            pixels = random.integers(0, 60, (20, 20))
            top, left = random.integers(0, 10, 2)
            height, width = {"bar": (10, 2), "box": (8, 8), "dot": (2, 2)}[CLASSES[i % 3]]
            pixels[top : top + height, left : left + width] += 180
            path = folder / split / CLASSES[i % 3] / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def trainer(data: Path, out: Path, recipe: dict, teacher=None, model: dict | None = None, **settings) -> Trainer:
    images = find(data, "train")
    torch.manual_seed(0)
    recipe = Recipe(**recipe)
    options = SIZE | {"num_classes": len(images.classes), "drop_path_rate": recipe.drop_path} | (model or {})
    name = options.pop("name", "vit_tiny_patch16_224")
    how = {} if teacher is None else {"teacher_mean": (0.5,) * 3, "teacher_std": (0.5,) * 3}
    settings = Settings(out, **{"workers": 0, **settings})
    built = fastvit.create_model(name, **options)
    return Trainer(built, images, find(data, "val", images.classes), recipe, settings, teacher, **how)


def losses(out: Path) -> list[float]:
    return [float(row["loss"]) for row in read(out / "log.csv")]


def command(data: Path, out: Path, recipe: dict, *more: str, processes: int = 0, restarts: int = 0) -> list[str]:
    """`fastvit train`, alone or under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    start = [*torchrun, f"--max-restarts={restarts}", "-m", "fastvit"] if processes else ["-m", "fastvit"]
    size = [f"{name}={value}" for name, value in SIZE.items() if name != "img_size"]
    values = [f"--{name.replace('_', '-')}={value}" for name, value in recipe.items()]
    model = ["--model", "vit_tiny_patch16_224", "--img-size", str(SIZE["img_size"]), "--model-kwargs", *size]
    return [sys.executable, *start, "train", str(data), "-o", str(out), "--workers=0", *values, *more, *model]


def start(arguments: list[str]) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """What it said on stderr; it has to end with this status."""
    _, said = process.communicate(timeout=300)
    assert process.returncode == status, (process.returncode, said)
    return said


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until the run has got so far that `path` is there."""
    until = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, path
        time.sleep(0.02)


def kill(process: subprocess.Popen) -> None:
    """Process and children, at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()

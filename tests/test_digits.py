"""Real data: scikit-learn's 1,797 handwritten digits as a folder of PNGs, a fifth of them held out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from training_runs import ROOT, finish, start

import fastvit
from fastvit.images import read as read_image
from fastvit.training import find
from fastvit.training.log import read

pytestmark = pytest.mark.slow

SIZE = ["--img-size", "32", "--model-kwargs", "patch_size=8", "embed_dim=96", "depth=6", "num_heads=3"]
RECIPE = "--epochs 40 --batch-size 32 --lr 1e-3 --lr-images 0 --warmup-epochs 2 --smoothing 0.05 --mixup 0 --cutmix 0"
RECIPE += " --hflip 0 --erase 0 --auto-augment none --crop-scale 0.6 --color-jitter 0.2 --repeats 1 --ema 0"
RECIPE += " --drop-path 0 --workers 0"


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    found, folder = load_digits(), tmp_path_factory.mktemp("digits")
    for place, index in enumerate(np.random.default_rng(0).permutation(len(found.images))):
        split = "val" if place < len(found.images) // 5 else "train"
        path = folder / split / str(found.target[index]) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((found.images[index] * (255 / 16)).astype(np.uint8)).save(path)
    return folder


def train(data: Path, out: Path, *more: str) -> list[float]:
    """Top-1 in validation, epoch by epoch."""
    finish(start([sys.executable, "-m", "fastvit", "train", str(data), "-o", str(out), *RECIPE.split(), *more, *SIZE]))
    return [float(row["top1"]) for row in read(out / "epochs.csv")]


@pytest.fixture(scope="module")
def alone(digits, tmp_path_factory) -> tuple[list[float], Path]:
    out = tmp_path_factory.mktemp("alone")
    return train(digits, out, "--model", "deit_tiny_patch16_224"), out / "model.safetensors"


def test_a_small_vit_reads_digits(digits, alone):
    accuracies, weights = alone
    top1 = max(accuracies)
    assert accuracies[-1] >= 0.97
    command = [sys.executable, "-m", "fastvit", "validate", str(digits), "--checkpoint", str(weights)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == f"top-1 {top1:.2%}, top-5 100.00%, 359 images\n"
    said = subprocess.run([*command, "--knn", "--linear-probe"], cwd=ROOT, capture_output=True, text=True, check=True)
    values = [float(part.split()[-1].rstrip("%")) for part in said.stdout.split(", ")[:2]]
    assert said.stdout.startswith("k-NN top-1 ") and min(values) > 95


def test_a_student_of_a_regnet_is_no_worse(digits, alone, tmp_path):
    import timm
    from safetensors.torch import save_file

    config = fastvit.create_model("deit_tiny_patch16_224", img_size=32, patch_size=8, device="meta").config
    source = find(digits, "train")
    mean, std = (torch.tensor(timm.get_pretrained_cfg("regnety_002").to_dict()[name]) for name in ("mean", "std"))
    images = torch.stack([read_image(source.open(i), config) for i in range(len(source))]).permute(0, 2, 3, 1) / 255
    images = ((images - mean) / std).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([source.label(i) for i in range(len(source))])
    torch.manual_seed(0)
    teacher = timm.create_model("regnety_002", num_classes=10)
    steps = 20 * (len(images) // 64)
    optimizer = torch.optim.AdamW(teacher.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(20):
        for part in torch.randperm(len(images))[: len(images) // 64 * 64].split(64):
            moved = torch.roll(images[part], torch.randint(-2, 3, (2,)).tolist(), (2, 3))
            loss = F.cross_entropy(teacher(moved), labels[part], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    save_file(teacher.state_dict(), tmp_path / "regnet.safetensors")
    by = ("--teacher", "regnety_002", "--teacher-checkpoint", str(tmp_path / "regnet.safetensors"))
    student = train(digits, tmp_path / "run", "--model", "deit_tiny_distilled_patch16_224", *by)
    assert sum(student[-5:]) >= sum(alone[0][-5:])

"""What rates a GPU reaches: in a large copy and a large product, and in the library's product at every shape of a ViT.

Each is timed until clocks are steady. Where our kernel reaches less than the library's at the same shape, a better main
loop can gain the difference; the library at that shape, not the large product, is the standard to meet.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from fastvit import report
from fastvit.models.config import ViTConfig
from fastvit.models.registry import model_entry
from fastvit.verify import SHORT

from . import roofline
from .schema import Peaks
from .timing import steady_seconds

FILE = "peaks.json"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PRODUCTS = torch.bfloat16
SECONDS = 0.15  # of each product, once the large one has brought the clocks down


def shapes(config: ViTConfig, batch: int) -> dict[str, tuple[int, int, int]]:
    """(rows, outputs, inputs) of the five linear layers of a ViT, by name."""
    grid = config.grid_size[0] * config.grid_size[1]
    rows, dim = batch * (grid + config.num_prefix_tokens), config.embed_dim
    hidden = int(dim * config.mlp_ratio)
    pixels = config.in_chans * config.patch_size[0] * config.patch_size[1]
    return {
        "patch embedding": (batch * grid, dim, pixels),
        "qkv": (rows, 3 * dim, dim),
        "proj": (rows, dim, dim),
        "fc1": (rows, hidden, dim),
        "fc2": (rows, dim, hidden),
    }


def run(folder: Path, deadline: float, models: list[str], batch: int, device: str = "cuda") -> bool:
    """Write peaks.json into `folder` as it goes; past `deadline` (`time.monotonic()`) nothing new is started. What an
    earlier call measured is not measured again."""
    path = folder / FILE
    before = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        before = json.loads(path.read_text(encoding="utf-8"))
    found = {(row["model"], row["layer"], row["direction"]): row for row in before.get("products", [])}
    if not before:
        before = asdict(roofline.measure_peaks(device, DTYPES))
    peak = before["flops_per_s"][SHORT[PRODUCTS]]
    rates = ", ".join(f"{dtype} {rate / 1e12:.0f} TFLOP/s" for dtype, rate in before["flops_per_s"].items())
    print(f"copy {before['bytes_per_s'] / 1e12:.2f} TB/s; {rates}", flush=True)

    def save(finished: bool) -> None:
        report.write_json(path, before | {"products": list(found.values()), "finished": finished})

    rows = report.Table({"model": -26, "layer": -16, "direction": -16, "m": 6, "n": 6, "k": 6, "us": 8, "TFLOP/s": 8,
                         "of peak": 8})  # fmt: skip
    for key, (m, n, k), call in _products(models, batch, device):
        if key in found:
            continue
        if time.monotonic() > deadline:
            save(finished=False)
            return True
        seconds = steady_seconds(call, device, SECONDS)
        rate = 2 * m * n * k / seconds
        found[key] = dict(zip(("model", "layer", "direction"), key, strict=True)) | {
            "shape": [m, n, k],
            "seconds": seconds,
            "flops_per_s": rate,
        }
        rows.row(*key, m, n, k, f"{1e6 * seconds:.1f}", f"{rate / 1e12:.0f}", f"{rate / peak:.0%}")
        save(finished=False)
    save(finished=True)
    return True


def _products(models: list[str], batch: int, device: str) -> Iterator[tuple]:
    """((model, layer, direction), (m, n, k), call) of the library's products; an image needs no gradient."""
    for model in models:
        for layer, (rows, outputs, inputs) in shapes(model_entry(model).config, batch).items():
            x, weight, dy = (
                torch.randn(shape, device=device).to(PRODUCTS)
                for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
            )
            bias = torch.randn(outputs, device=device).to(PRODUCTS)
            products = {
                "forward": ((rows, outputs, inputs), lambda x=x, w=weight, b=bias: torch.addmm(b, x, w.t())),
                "input gradient": ((rows, inputs, outputs), lambda dy=dy, w=weight: torch.mm(dy, w)),
                "weight gradient": ((outputs, inputs, rows), lambda dy=dy, x=x: torch.mm(dy.t(), x)),
            }
            if layer == "patch embedding":
                del products["input gradient"]
            for direction, (shape, call) in products.items():
                yield (model, layer, direction), shape, call


def read_or_measure(folder: Path, device: str = "cuda") -> Peaks:
    """The measured peaks from peaks.json in `folder`; measured now if there is none."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return Peaks(found["bytes_per_s"], found["flops_per_s"])
    return roofline.measure_peaks(device, DTYPES)

"""An invented run of the suite, in which everything happens that can: the numbers mean nothing."""

from __future__ import annotations

import random
from dataclasses import asdict
from itertools import product

from fastvit.benchmarks.schema import OURS, Entry, Peaks, Ratio, Row, Run, Spread

BATCHES = (1, 8, 32, 256)
ABSENT = {"flash-attn": "flash-attn is not installed", "openvino": "for the CPU only"}
# How many times ours each takes: about.
SLOWNESS = {
    "torch": 1.3,
    "timm": 1.32,
    "timm amp": 1.6,
    "timm compiled": 1.15,
    "timm max-autotune": 1.002,
    "torchvision": 1.45,
    "transformers": 1.7,
}
OP_SLOWNESS = {"torch": 1.5, "compiled": 0.8, "sdpa flash": 1.01, "sdpa math": 3.0}
SIZES = {"vit_tiny_patch16_224": 6e6, "vit_base_patch16_224": 86e6, "vit_giant_patch14_reg4_dinov2": 1.1e9}
OPS = ("attention", "layer_norm_mlp")
MODES = ("inference", "training")


def fake_run(gpu=True, batches=BATCHES, models=tuple(SIZES), modes=MODES, ops=OPS, dtypes=("bf16", "fp32")) -> Run:
    """On a GPU with two models or more, some cases and peers come to grief."""
    draw = random.Random(0)
    peaks = Peaks(2e12, {"bf16": 5e14, "fp32": 4e13}) if gpu else Peaks(2e10, {"bf16": 4e11, "fp32": 3e11})
    rows = [_row(draw, peaks, gpu, *case) for case in product(models, dtypes, modes, ("", *ops), batches)]
    if gpu and len(models) > 1:
        _spoil(rows)
    environment = {
        "fastvit": "0.1.0",
        "python": "3.12.3",
        "processor": "Imaginary CPU",
        "torch_threads": 2,
        "torch": "2.13.0",
        "device": "Imaginary GPU" if gpu else "Imaginary CPU",
        "packages": {"triton": "3.7.1", "timm": "1.0.31", "flash-attn": None},
        "commit": "0123456789abcdef0123456789abcdef01234567",
    }
    if gpu:
        environment["gpu"] = {"capability": "9.9", "multiprocessors": 99}
    settings = {
        "device": "cuda" if gpu else "cpu",
        "weights": "random, seed 0",
        "images": "random normal",
        "models": list(models),
        # Longer than a screen is wide.
        "command": f"fastvit bench --device {'cuda' if gpu else 'cpu'} --models {','.join(3 * [*SIZES])}",
    }
    return Run(environment, settings, "2000-01-01T00:00:00+00:00", True, 100.0, peaks, rows, {"seen": ["a", "b"]})


def _row(draw, peaks, gpu, model, dtype, mode, op, batch) -> Row:
    parameters = SIZES[model] * (0.05 if op else 1)
    itemsize, passes = (2 if dtype == "bf16" else 4), (3 if mode == "training" else 1)
    flops = 2 * parameters * 197 * batch * passes
    moved = (parameters + 40 * (parameters / 12) ** 0.5 * 197 * batch) * itemsize * passes
    bound = max(flops / peaks.flops_per_s[dtype], moved / peaks.bytes_per_s)
    ours = bound / draw.uniform(0.45, 0.9) + (5e-5 if gpu else 0)
    slowness = OP_SLOWNESS if op else SLOWNESS
    parts = [model, dtype, f"b{batch}", mode, *([op] if op else [])]
    row = Row("/".join(parts), model, op, 224, 197, dtype, batch, mode, "timed", items=1 if op else batch)
    row.limit, row.flops, row.bytes, row.bound_seconds = 4e-3 if dtype == "bf16" else 1e-6, flops, moved, bound
    for name in (OURS, *slowness):
        times = draw.uniform(0.95, 1.05) * slowness.get(name, 1.0)
        entry = row.entries[name] = Entry(error=row.limit * draw.uniform(0.3, 0.9), seconds=_spread(ours * times))
        entry.peak_bytes = None if model.startswith("vit_giant") else int(moved * times)
        if name != OURS:
            low, high = 0.98 * times, 1.03 * times
            entry.ratio = Ratio(**asdict(_spread(times)), low=low, high=high)
            entry.verdict = "faster" if low > 1 else "slower" if high < 1 else "tie"
        if "compile" in name or "max" in name:
            entry.compile_seconds = draw.uniform(20, 90)
        if gpu and batch == 1:
            entry.graph, entry.host = _spread(ours * times * 0.6), _spread(ours * times * 0.9)
        if gpu and not op:
            entry.joules = ours * times * 500
    if "transformers" in row.entries:
        row.entries["transformers"].note = "tanh GELU; no class token"
    for name, reason in ABSENT.items():
        row.entries[name] = Entry("absent", reason)
    return row


def _spread(median: float) -> Spread:
    return Spread(median, 0.985 * median, 1.02 * median, 50)


def _spoil(rows: list[Row]) -> None:
    """One of everything that goes wrong: a peer that is wrong, one that raises, and rows of each status."""
    models = [row for row in rows if not row.op]
    for row in models:
        if row.model.startswith("vit_base") and row.dtype == "bf16":
            row.entries["torchvision"] = Entry("failed", "RuntimeError: expected <b>one</b> device")
            row.entries["timm compiled"] = Entry("wrong", error=0.25)
    wrong, failed, skipped = models[5], models[6], models[7]
    wrong.status, wrong.reason = "wrong", "error 3.0e-01 is more than the limit 4.0e-03"
    wrong.entries = {OURS: Entry("wrong", error=0.3)}
    failed.status, failed.reason, failed.entries = (
        "failed",
        "out of memory",
        {OURS: Entry("failed", "out of memory")},
    )
    skipped.status, skipped.reason, skipped.entries = "skipped", "the time limit of 100 s was reached", {}

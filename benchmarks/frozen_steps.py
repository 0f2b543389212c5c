"""What docs/frozen.md shows: the rewrites, what `describe` says, and where the time of a model goes before it is frozen
and after, as a picture and as shares of the machine's peak.

    python benchmarks/frozen_steps.py        # or: make frozen

Runs on the CPU, random weights. Writes docs/frozen/steps.png and, between the markers in docs/frozen.md, the rest.
"""

from __future__ import annotations

import collections
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from fastvit.benchmarks import roofline, timing
from fastvit.benchmarks.report.summary import between

import fastvit
from fastvit import report
from fastvit.frozen import REWRITES, recognise
from fastvit.frozen.export import PlainModule
from fastvit.frozen.plan import IMAGES
from fastvit.frozen.runtimes import torch_runtime
from fastvit.verify import SHORT, randomise

DOCS = Path(__file__).resolve().parents[1] / "docs"
SHOWN = ("vit_base_patch16_224", "vit_small_patch14_dinov2")
CASES = [
    (name, dtype, 8) for name in ("vit_tiny_patch16_224", "vit_base_patch16_224") for dtype in ("float32", "bfloat16")
]
ROUNDS = 15
RATED = ("linear", "linear with GELU", "attention", "patch_embed")  # whose share of the peak is shown
# Kinds of steps, as the picture names them, by the operations of a plan.
KINDS = {
    "linear": ("linear",),
    "attention": ("attention",),
    "LayerNorm": ("layer_norm",),
    "activation, sums, scales": ("activation", "add", "scale", "swiglu"),
    "patches and positions": ("normalise", "patch_embed", "assemble"),
    "rows and pooling": ("rows", "flatten", "pool", "mean"),
}


def model_of(name: str) -> fastvit.VisionTransformer:
    model = fastvit.create_model(name).eval()
    randomise(model, 0)
    return model


def seconds_of_steps(sides: dict[str, list[tuple]], images: torch.Tensor) -> dict[str, dict[str, float]]:
    """Seconds of each step of each side, medians over rounds in which the sides take turns; a side: (out, inputs, call)
    of its steps."""
    times = {title: collections.defaultdict(list) for title in sides}
    for _ in range(ROUNDS):
        for title, calls in sides.items():
            values = {IMAGES: images}
            for out, inputs, call in calls:
                start = time.perf_counter()
                values[out] = call(*[values[name] for name in inputs])
                times[title][out].append(time.perf_counter() - start)
    return {title: {out: statistics.median(each) for out, each in found.items()} for title, found in times.items()}


@dataclass
class Side:
    """A model before it is frozen, or after. ms: milliseconds by kind of step; rates: FLOP/s by operation, linear steps
    with an activation in them apart."""

    title: str
    ms: dict[str, float]
    rates: dict[str, float]


@torch.inference_mode()
def measured(name: str, dtype: str, batch: int) -> list[Side]:
    """The model's own modules, one after the other on PyTorch's operators, and the frozen one's steps."""
    report.note(f"timing {name}, {dtype}, batch {batch}")
    model = model_of(name).to(getattr(torch, dtype))
    images = torch.randn(batch, 3, *model.config.img_size, dtype=model.pos_embed.dtype)
    before = recognise.plan_of(model, ["logits"])
    after = fastvit.freeze(model, runtime="torch", batch_sizes=(batch,)).plan
    kinds = {op: kind for kind, several in KINDS.items() for op in several}
    prepared = torch_runtime.prepare(after, batch, False)
    sides = {
        "before": [(step.out, step.inputs, call) for step, call in PlainModule(before, False).calls()],
        "frozen": [(out, inputs, call) for out, inputs, call, _ in prepared.calls],
    }
    found = []
    for (title, seconds), plan in zip(seconds_of_steps(sides, images).items(), (before, after), strict=True):
        ms, work, taken = dict.fromkeys(KINDS, 0.0), collections.Counter(), collections.Counter()
        for step, flops, _ in plan.costs(batch):
            ms[kinds[step.op]] += 1000 * seconds[step.out]
            what = "linear with GELU" if step.options.get("activation") else step.op
            work[what] += flops
            taken[what] += seconds[step.out]
        found.append(Side(title, ms, {what: work[what] / taken[what] for what in RATED if what in work}))
    return found


def measured_peaks() -> dict[str, float]:
    """FLOP/s of a large product by the fastest library, by the dtype's name in CASES."""
    dtypes = {dtype: getattr(torch, dtype) for _, dtype, _ in CASES}
    found = roofline.measure_peaks("cpu", dtypes.values()).flops_per_s
    return {name: found[SHORT[dtype]] for name, dtype in dtypes.items()}


def rates_table(cases: dict[tuple, list[Side]], peaks: dict[str, float]) -> str:
    """Shares of the machine's peak, in Markdown."""
    lines = [["model", "", *RATED], ["---", "---", *["---:"] * len(RATED)]]
    for (name, dtype, batch), sides in cases.items():
        for side in sides:
            shares = [f"{side.rates[what] / peaks[dtype]:.0%}" if what in side.rates else "" for what in RATED]
            lines.append([f"{name}, {dtype}, batch {batch}", side.title, *shares])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rewrites_table() -> str:
    lines = [["rewrite", "what", "why nothing changes"], ["---"] * 3]
    lines += [[rewrite.name, rewrite.what, rewrite.proof] for rewrite in REWRITES.values()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(path: Path, cases: dict[tuple, list[Side]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#6b7580")
    figure, axes = plt.subplots(len(cases), 1, figsize=(9, 1.5 * len(cases) + 0.9))
    for axis, ((name, dtype, batch), sides) in zip(axes, cases.items(), strict=True):
        for row, side in enumerate(sides):
            left = 0.0
            for kind, colour in zip(KINDS, colours, strict=True):
                axis.barh(row, side.ms[kind], left=left, color=colour, label=kind if row == 0 else None)
                left += side.ms[kind]
            axis.text(left, row, f" {left:.0f} ms", va="center")
        axis.set_yticks(range(len(sides)), [side.title for side in sides])
        axis.invert_yaxis()
        axis.set_xlim(right=1.12 * max(sum(side.ms.values()) for side in sides))
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(f"{name}, {dtype}, batch {batch}", loc="left", fontsize=10)
    axes[-1].set_xlabel(f"milliseconds, by kind of step ({torch.get_num_threads()} threads)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=3, loc="lower center", frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def described(name: str) -> str:
    """What a frozen model says of itself, blocks that are like their neighbours left out."""
    text = fastvit.freeze(model_of(name), runtime="torch").describe()
    lines = [line for line in text.splitlines() if not re.match(r"blocks\.([1-9]|10)\b(?!\d)", line)]
    at = next(i for i, line in enumerate(lines) if line.startswith("blocks.11."))
    return "\n".join([*lines[:at], "...", *lines[at:]])


def main() -> None:
    timing.pin_threads()
    early = measured_peaks()
    cases = {case: measured(*case) for case in CASES}
    late = measured_peaks()  # a machine has slow moments
    peaks = {dtype: max(early[dtype], late[dtype]) for dtype in early}
    parts = {"rewrites": rewrites_table(), "rates": rates_table(cases, peaks)}
    parts |= {name: f"```\n{described(name)}\n```" for name in SHOWN}
    picture(DOCS / "frozen" / "steps.png", cases)
    page = DOCS / "frozen.md"
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = between(text, f"<!-- {name}:begin -->", f"<!-- {name}:end -->", part, page.name)
    report.write_atomically(page, text.encode())


if __name__ == "__main__":
    main()

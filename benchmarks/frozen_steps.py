"""Where the time of a model goes before it is frozen and after: the picture in docs/frozen.md; what `describe` says.

    python benchmarks/frozen_steps.py        # or: make frozen

Runs on the CPU, random weights. Writes docs/frozen/steps.png and, between the markers in docs/frozen.md, the texts.
"""

from __future__ import annotations

import collections
import re
import statistics
import sys
import time
from pathlib import Path

import torch
from fastvit.benchmarks import timing

import fastvit
from fastvit import report
from fastvit.frozen import recognise
from fastvit.frozen.export import PlainModule
from fastvit.frozen.plan import IMAGES
from fastvit.frozen.runtimes import torch_runtime
from fastvit.verify import randomise

DOCS = Path(__file__).resolve().parents[1] / "docs"
SHOWN = ("vit_base_patch16_224", "vit_small_patch14_dinov2")
CASES = [
    (name, dtype, 8) for name in ("vit_tiny_patch16_224", "vit_base_patch16_224") for dtype in ("float32", "bfloat16")
]
ROUNDS = 9
# Kinds of steps, as the picture names them, by the operations of a plan.
KINDS = {
    "linear": ("linear",),
    "attention": ("attention",),
    "LayerNorm": ("layer_norm",),
    "activation, sums, scales": ("activation", "add", "scale", "swiglu"),
    "patches and positions": ("normalise", "patch_embed", "assemble"),
    "head and pooling": ("rows", "flatten", "pool", "mean"),
}


def model_of(name: str) -> fastvit.VisionTransformer:
    model = fastvit.create_model(name).eval()
    randomise(model, 0)
    return model


def seconds_by_kind(calls: list[tuple], ops: dict[str, str], images: torch.Tensor) -> dict[str, float]:
    """Milliseconds of each kind of step, medians; calls: (out, inputs, call); ops: the operation of each by its out."""
    times = collections.defaultdict(list)
    for _ in range(ROUNDS):
        values = {IMAGES: images}
        for out, inputs, call in calls:
            start = time.perf_counter()
            values[out] = call(*[values[name] for name in inputs])
            times[out].append(time.perf_counter() - start)
    kinds = {op: kind for kind, several in KINDS.items() for op in several}
    found = dict.fromkeys(KINDS, 0.0)
    for out, seconds in times.items():
        found[kinds[ops[out]]] += 1000 * statistics.median(seconds)
    return found


@torch.inference_mode()
def measured(name: str, dtype: str, batch: int) -> list[tuple[str, dict[str, float]]]:
    """Milliseconds by kind of step: of the model's own modules, one after the other, and frozen."""
    model = model_of(name).to(getattr(torch, dtype))
    images = torch.randn(batch, 3, *model.config.img_size, dtype=model.pos_embed.dtype)
    before = recognise.plan_of(model, ["logits"])
    after = fastvit.freeze(model, runtime="torch", batch_sizes=(batch,)).plan
    found = []
    for title, plan in (("before", before), ("frozen", after)):
        ops = {step.out: step.op for step in plan.steps}
        if title == "before":
            calls = [(step.out, step.inputs, call) for step, call in PlainModule(plan, False).calls()]
        else:
            calls = [(out, inputs, call) for out, inputs, call, _ in torch_runtime.prepare(plan, batch, False).calls]
        found.append((title, seconds_by_kind(calls, ops, images)))
    return found


def picture(path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#6b7580")
    figure, axes = plt.subplots(len(CASES), 1, figsize=(9, 1.5 * len(CASES) + 0.9))
    for axis, case in zip(axes, CASES, strict=True):
        for row, (_, times) in enumerate(sides := measured(*report_progress(case))):
            left = 0.0
            for kind, colour in zip(KINDS, colours, strict=True):
                axis.barh(row, times[kind], left=left, color=colour, label=kind if row == 0 else None)
                left += times[kind]
            axis.text(left, row, f" {left:.0f} ms", va="center")
        axis.set_yticks(range(len(sides)), [title for title, _ in sides])
        axis.invert_yaxis()
        axis.set_xlim(right=1.12 * max(sum(times.values()) for _, times in sides))
        axis.spines[["top", "right"]].set_visible(False)
        name, dtype, batch = case
        axis.set_title(f"{name}, {dtype}, batch {batch}", loc="left", fontsize=10)
    axes[-1].set_xlabel(f"milliseconds, by kind of step ({torch.get_num_threads()} threads)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=3, loc="lower center", frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def report_progress(case: tuple) -> tuple:
    report.note(f"timing {', '.join(map(str, case))}")
    return case


def described(name: str) -> str:
    """What a frozen model says of itself, blocks that are like their neighbours left out."""
    text = fastvit.freeze(model_of(name), runtime="torch").describe()
    lines = [line for line in text.splitlines() if not re.match(r"blocks\.([1-9]|10)\b(?!\d)", line)]
    at = next(i for i, line in enumerate(lines) if line.startswith("blocks.11."))
    return "\n".join([*lines[:at], "...", *lines[at:]])


def main() -> None:
    timing.pin_threads()
    page = DOCS / "frozen.md"
    text = page.read_text(encoding="utf-8")
    for name in SHOWN:
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n\n```\n{described(name)}\n```\n\n{end}{after}"
    picture(DOCS / "frozen" / "steps.png")
    report.write_atomically(page, text.encode())


if __name__ == "__main__":
    sys.exit(main())

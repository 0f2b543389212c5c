"""What a frozen model says of itself, as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .choice import Answer
from .plan import Plan
from .rewrites import REWRITES
from .simplify import Change


def describe(plan: Plan, changes: Iterable[Change], answers: Mapping[int, Answer]) -> str:
    """Rewrites with what each saved and cost, the plan step by step, and the runtimes."""
    lines = [
        f"{'rewrite':17}{'launches':>9}{'MFLOPs':>9}{'MB':>8}{'error':>10}  what",
        f"{'-' * 15:17}{'-' * 8:>9}{'-' * 7:>9}{'-' * 6:>8}{'-' * 8:>10}  {'-' * 40}",
    ]
    for change in changes:
        if change.error is None:
            numbers = f"{'not applied':>36}"
        else:
            saved = f"{-change.steps:+9d}" if change.steps else f"{'':9}"
            saved += "".join(
                f"{-value / 1e6:+{width}.{digits}f}" if value else f"{'':{width}}"
                for value, width, digits in ((change.flops, 9, 1), (change.bytes, 8, 2))
            )
            numbers = f"{saved}{change.error:10.1e}"
        lines.append(f"{change.name:17}{numbers}  {REWRITES[change.name].what}")
    launches, flops, moved = plan.totals()
    lines += [
        f"{'left':17}{launches:9d}{flops / 1e6:9.1f}{moved / 1e6:8.2f}",
        "Of one image. error: how far the outputs moved in float32, relative rms, with what is rounded anew.",
        "",
        str(plan),
        "",
    ]
    for batch, answer in sorted(answers.items()):
        lines += [f"runtime for batches of {batch}: {answer.name}", *[f"  {line}" for line in answer.lines]]
    return "\n".join(lines)

"""Which runtime a frozen model runs on: what is installed is measured side by side, and the answer kept on disk.

What is measured first has to be right: a runtime whose outputs are further from the truth than allowed is left out. The
file, frozen.json in the cache folder (see `fastvit.tuned.folder`), holds one answer for each plan, batch, dtype,
processor, number of threads and set of versions; a damaged file counts as empty.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import statistics
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fastvit import __version__, accuracy, report, tuned
from fastvit.decide import interleave
from fastvit.environment import device_name

from .export import example
from .plan import Plan
from .runtimes import RUNTIMES, Run

# Errors that are always allowed, relative rms: what float32 is promised to, and what float64 may differ in by rounding.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12}
LEAST_ROUNDS, ROUNDS = 3, 15
SECONDS = 6.0  # for one decision's timing, about; a slow model gets fewer rounds
GAIN = 1.02  # by which another must be faster than PyTorch, which needs nothing installed
QUICK_SECONDS = 0.1  # a call that takes less is made twice in a row, since another library has emptied the caches
REST_SECONDS = 0.02  # until another library's threads have stopped waiting for work


@dataclass(frozen=True)
class Answer:
    """A choice: its name, and one line for each runtime that says why it was, or was not, taken."""

    name: str
    lines: tuple[str, ...]


def wrong(outputs, truth, plain, dtype: torch.dtype) -> str:
    """Why outputs are not accurate enough; empty if they are.

    outputs: tensors of any number of images that are all the same; truth: by name, what the unfrozen model makes of one
    in float64; plain(): what it does in `dtype`. Allowed are TOLERANCE, and so many times the unfrozen model's own
    error as `accuracy.limit` says, with three standard deviations of the ratio of two errors over n numbers,
    1 / sqrt(n): a classifier may have only two.
    """
    for (name, want), got in zip(truth.items(), outputs, strict=True):
        if got.shape[1:] != want.shape[1:]:
            return f"{name} is {tuple(got.shape[1:])}, expected {tuple(want.shape[1:])}"
        error, most = accuracy.relative_rms(got, want.expand_as(got)), TOLERANCE.get(dtype, 0.0)
        if not error <= most and dtype in accuracy.FACTOR:
            limit = accuracy.limit(dtype, accuracy.relative_rms(plain()[name].to(want.device), want))
            most = max(most, limit * (1 + 3 / math.sqrt(want.numel())))
        if not error <= most:
            return f"{name} is wrong: error {error:.1e}, at most {most:.1e} is allowed"
    return ""


def choose(plan: Plan, batch: int, device: torch.device, prepare, judge) -> Answer:
    """The runtime for such batches: from the file, or measured now.

    prepare(name, batch) -> Run; judge(run, batch) -> why its outputs are wrong, or "".
    """
    key = _key(plan, batch, device)
    known = _known(_read().get(key))
    if known and not RUNTIMES[known.name].why_not(plan, device):
        with contextlib.suppress(Exception):  # another library's, of any kind: then all are measured
            if not judge(prepare(known.name, batch), batch):
                return known
    lines, runs = {}, {}
    for name, runtime in RUNTIMES.items():
        reason = runtime.why_not(plan, device)
        if not reason:
            try:
                run = prepare(name, batch)
                reason = judge(run, batch)
            except Exception as error:  # another library's, of any kind
                reason = f"failed: {report.first_line(error)}"
        lines[name] = f"{name}: {reason}"
        if not reason:
            runs[name] = run
    if not runs:
        raise RuntimeError(f"no runtime can run this model: {'; '.join(lines.values())}")
    times = measure(runs, example(plan, batch, False).to(device)) if len(runs) > 1 else {}
    best = next(iter(runs))
    for name, seconds in times.items():
        if seconds * GAIN < times[best]:
            best = name
    for name in runs:
        speed = f"{batch / times[name]:.4g} images/s" if times else "the only one"
        lines[name] = f"{name}: {speed}{', taken' if name == best else ''}"
    answer = Answer(best, tuple(lines.values()))
    if times:
        _write(key, answer)
    return answer


def measure(runs: dict[str, Run], images: torch.Tensor) -> dict[str, float]:
    """The median of seconds a call by name, all taking turns."""

    def seconds(run: Run) -> float:
        began = time.perf_counter()
        run(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def rested(run: Run) -> float:
        time.sleep(REST_SECONDS)
        first = seconds(run)
        return first if first > QUICK_SECONDS else seconds(run)

    for run in runs.values():
        run(images)
    rounds = max(LEAST_ROUNDS, min(ROUNDS, int(SECONDS / sum(map(seconds, runs.values())))))
    times = interleave({name: partial(rested, run) for name, run in runs.items()}, rounds, warmups=0)
    return {name: statistics.median(each) for name, each in times.items()}


def _key(plan: Plan, batch: int, device: torch.device) -> str:
    versions = {p: report.version_of(p) for runtime in RUNTIMES.values() for p in runtime.packages}
    facts = (
        *(__version__, str(plan), repr(plan.config), str(plan.dtype), batch),
        *(device_name(str(device)), torch.get_num_threads(), torch.__version__),
        *sorted(versions.items(), key=str),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _known(found: object) -> Answer | None:
    """An answer as the file holds it; None for what is none."""
    if isinstance(found, dict) and found.get("name") in RUNTIMES and isinstance(found.get("lines"), list):
        return Answer(found["name"], tuple(map(str, found["lines"])))
    return None


def _path() -> Path:
    return tuned.folder() / "frozen.json"


def _read() -> dict:
    try:
        found = json.loads(_path().read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _write(key: str, answer: Answer) -> None:
    try:
        _path().parent.mkdir(parents=True, exist_ok=True)
        report.write_json(_path(), _read() | {key: {"name": answer.name, "lines": list(answer.lines)}})
    except OSError as error:
        warnings.warn(f"{_path()} could not be written, the runtime will be measured again: {error}", stacklevel=4)

"""One decision by measuring: of candidates that do the same work, which is right, and which of those is fastest.

What computes something else than the incumbent is dropped before any timing; the rest are timed side by side, in random
order, and the incumbent stays unless a challenger is faster by more than `GAIN` with quartiles apart.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import Protocol

import torch

from . import report
from .attempts import TRY_SECONDS, Attempts
from .graphs import capture
from .measure import quartiles, verdict

GAIN = 1.02  # by which a challenger must be faster
ROUNDS, WARMUP_ROUNDS = 50, 3
ROUND_SECONDS = 1e-3  # a replay lasts at least about this long: an event's tick must not count

Run = Callable[[], tuple[torch.Tensor, ...]]


# --------------------------------------------------------------------------------------------------------------------
# Time


class Clock(Protocol):
    """What measures: the device, or a test's stand-in."""

    def timer(self, runs: list[Run], graph: bool) -> Callable[[], float]:
        """A function that measures once: seconds of one of `runs`, which do the same on buffers of their own. graph:
        replayed from a CUDA graph. Raises RuntimeError for what cannot be captured."""


class CudaClock:
    """Times on the current CUDA device by events around replays of a CUDA graph. stream: the one it captures on."""

    def __init__(self):
        # PyTorch's own stream for captures is of the device that captured first.
        self.stream = torch.cuda.Stream()

    def timer(self, runs: list[Run], graph: bool) -> Callable[[], float]:
        def work(repeats: int = 1) -> None:
            for _ in range(repeats):
                for run in runs:
                    run()

        work()  # compiles
        repeats = self._repeats(work)
        work = partial(work, repeats)
        if graph:
            # Each in a pool of its own: one that cuBLAS left its workspace in cannot be used again once its graphs are
            # gone.
            work = capture(work, torch.cuda.graph_pool_handle(), stream=self.stream)
        # A graph does in less time what takes its launches longer.
        replays = self._repeats(work)
        calls = replays * repeats * len(runs)
        return lambda: self._elapsed(lambda: [work() for _ in range(replays)]) / calls

    def _repeats(self, work: Callable[[], object]) -> int:
        return max(1, math.ceil(ROUND_SECONDS / max(self._elapsed(work), 1e-6)))

    def _elapsed(self, work: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000


def interleave(
    timers: dict[str, Callable[[], float]], rounds: int = ROUNDS, warmups: int = WARMUP_ROUNDS
) -> dict[str, list[float]]:
    """Seconds by name, one a round after the warm-ups, each round in a fresh random order: what drifts falls on all
    alike."""
    order, shuffle = list(timers), random.Random(0).shuffle
    measured: dict[str, list[float]] = {name: [] for name in timers}
    for round in range(warmups + rounds):
        shuffle(order)
        for name in order:
            seconds = timers[name]()
            if round >= warmups:
                measured[name].append(seconds)
    return measured


# --------------------------------------------------------------------------------------------------------------------
# One decision


def beats(challenger: list[float], incumbent: list[float]) -> bool:
    """Whether the challenger's times, paired by round with the incumbent's, take its place."""
    ratios = [theirs / ours for ours, theirs in zip(challenger, incumbent, strict=True)]
    apart = quartiles(challenger).q75 < quartiles(incumbent).q25
    return apart and quartiles(ratios).median > GAIN and verdict(ratios) == "faster"


def mismatch(got: Iterable[torch.Tensor], want: Iterable[torch.Tensor], dtype: torch.dtype, roundings: int) -> str:
    """Why `got` is not `want` up to so many roundings in `dtype`; empty if it is.

    Each element is held against its own size and the tensor's rms. Of a narrow dtype, a rounding is 4 eps: a result
    and its neighbour are one eps apart, and sums round elsewhere. In float32 it is the order of long sums, 1000 eps.
    NaN, in what a launch does not write, must be where it was.
    """
    limit = roundings * torch.finfo(dtype).eps * (4 if dtype.itemsize == 2 else 1000)
    for index, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            found = f"{tuple(ours.shape)} {ours.dtype}, expected {tuple(theirs.shape)} {theirs.dtype}"
            return f"result {index} is {found}"
        finite = theirs.isfinite()
        if not torch.equal(ours.isfinite(), finite):
            return f"result {index} is not finite where it should be, or the other way round"
        if not finite.any():
            continue
        ours, theirs = ours[finite].float(), theirs[finite].float()
        scale = theirs.abs() + theirs.square().mean().sqrt()
        error = ((ours - theirs).abs() / scale.clamp_min(torch.finfo(torch.float32).tiny)).max().item()
        if error > limit:
            return f"result {index} is wrong: off by {error:.1e} of its size, {limit:.1e} may be"
    return ""


@dataclass(frozen=True)
class Measured:
    """Seconds of every candidate that computes the right thing, one a round, and why the others do not; graph: whether
    replayed from CUDA graphs."""

    times: dict[str, list[float]]
    dropped: dict[str, str]
    graph: bool

    def choice(self, among: Iterable[str]) -> tuple[str, dict]:
        """The candidate to use of those timed, and the evidence (fields of `tuned.Entry`). The first of `among` is the
        incumbent."""
        incumbent, *challengers = [name for name in among if name in self.times]
        times = {name: self.times[name] for name in (incumbent, *challengers)}
        medians = {name: quartiles(values).median for name, values in times.items()}
        winners = [name for name in challengers if beats(times[name], times[incumbent])]
        evidence = {
            "incumbent": incumbent,
            "seconds": {name: [float(f"{q:.4g}") for q in quartiles(values)] for name, values in times.items()},
            "dropped": self.dropped,
            "rounds": len(times[incumbent]),
            "graph": self.graph,
            "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        return min(winners, key=medians.get, default=incumbent), evidence


def measure(
    candidates: dict[str, list[Run]],
    dtype: torch.dtype,
    roundings: int,
    clock: Clock,
    *,
    in_place: bool = False,
    beside: dict[str, list[Run]] | None = None,
    attempts: Attempts | None = None,
    key: str = "",
    rounds: int = ROUNDS,
) -> Measured:
    """Time all candidates that compute what the first does, side by side; beside: what is timed with them unasked.

    Each candidate is a list of runs that do the same on different buffers and return what they wrote; in_place: into
    tensors that all candidates write, which are filled with NaN before, so that nothing is found there. One that raises
    or computes something else is dropped, and so is one that `attempts` knows, by "key: name", to end a process. Raises
    whatever the first does, and GpuLost.
    """
    attempts, beside = attempts or Attempts(), beside or {}
    attempt = {name: f"{key}: {name}" for name in (*candidates, *beside)}
    dropped = {name: attempts.fatal[attempt[name]] for name in attempt if attempt[name] in attempts.fatal}
    (incumbent, (first, *_)), *challengers = candidates.items()
    timing = f"{key}: timing"
    for name in (attempt[incumbent], timing):  # without which there is nothing to measure
        if name in attempts.fatal:
            raise RuntimeError(f"{name} {attempts.fatal[name]}")
    written: tuple[torch.Tensor, ...] = ()

    def fresh(run: Run) -> tuple[torch.Tensor, ...]:
        for tensor in written:
            tensor.fill_(math.nan)
        return run()

    with attempts.trying(attempt[incumbent]):
        if in_place:
            written = first()
            want = [tensor.clone() for tensor in fresh(first)]
        else:
            want = first()
    for name, runs in challengers:
        if name in dropped:
            continue
        try:
            with attempts.trying(attempt[name]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SDPA's, of a back end that cannot take the call
                reason = mismatch(fresh(runs[0]), want, dtype, roundings)
        except Exception as error:  # whatever a candidate that cannot run raises
            reason = report.first_line(error)
        if reason:
            dropped[name] = reason
    if in_place:
        with attempts.trying(attempt[incumbent]):
            first()  # other launches may read what a wrong candidate wrote
    alive = {name: runs for name, runs in candidates.items() if name not in dropped}
    with attempts.trying(timing, 3 * TRY_SECONDS):
        timers, graph = _timers(alive, clock)
        for name, runs in beside.items():  # held against nothing, but it may raise or be fatal too
            if name not in dropped:
                try:
                    with attempts.trying(attempt[name]):
                        timers[name] = clock.timer(runs, graph)
                except Exception as error:
                    dropped[name] = report.first_line(error)
        times = interleave(timers, rounds)
    return Measured(times, dropped, graph)


def _timers(candidates: dict[str, list[Run]], clock: Clock) -> tuple[dict[str, Callable[[], float]], bool]:
    """Timers of all, from graphs, or from none where one cannot be captured: a launch from Python costs time too."""
    for graph in (True, False):
        try:
            return {name: clock.timer(runs, graph) for name, runs in candidates.items()}, graph
        except RuntimeError:
            if not graph:
                raise

"""The benchmark behind `fastvit bench`: ours beside its peers on whole models and single ops, in one run.

One row is a case. All entries of a row have the same weights, take the same input and run interleaved; what computes
wrong outputs, or wrong gradients in training, is not timed. A peer that fails does not stop its row or the others.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import fastvit
from fastvit import accuracy, report
from fastvit.environment import environment
from fastvit.measure import verdict
from fastvit.verify import SHORT

from . import plan, roofline, timing
from .cases import Case
from .peers import PEERS, absent
from .schema import OURS, SIDES, Duel, Entry, Peaks, Ratio, Row, Run
from .suites import SEED, Settings
from .work import ModelWork, OpWork, Subject, run_watched

FILE = "bench.json"
# What must be equal for rows of an earlier run to be taken over.
_SAME_ENVIRONMENT = ("fastvit", "commit", "device", "tuned", "torch", "torch_threads", "packages")
_SAME_SETTINGS = ("peers", "weights", "images")


def first_line(error: BaseException) -> str:
    """An exception as one line; "out of memory" for all kinds of that."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "out of memory"
    return report.first_line(error)


class Bench:
    """Measures the cases of `settings`, one row each. top5: for every model and dtype that was timed, the five most
    likely classes of each photograph."""

    file = FILE

    def __init__(self, settings: Settings):
        self.settings = settings
        self.top5: dict[str, dict] = {}
        self._start = time.perf_counter()
        self._subject: Subject | None = None
        # Under a time limit energy is not measured: it takes a second for each entry.
        self._energy = timing.energy_counter(settings.device) if settings.time_limit is None else None
        self._lost = ""

    def spent(self) -> float:
        """Seconds of the time limit that are used up."""
        return time.perf_counter() - self._start

    def out_of_time(self) -> str:
        """Why nothing more is started: the time limit, or a lost GPU; "" while neither applies."""
        if self._lost:
            return self._lost
        limit = self.settings.time_limit
        if limit is None or self.spent() <= limit:
            return ""
        return f"not started: the time limit of {limit:g} s was reached"

    def peaks(self) -> Peaks | None:
        return roofline.measure_peaks(self.settings.device, dict.fromkeys(c.dtype for c in self.settings.cases))

    def plan(self, cases: list[Case], peaks: Peaks | None, interprets: bool) -> plan.Plan:
        """How long these cases will take, and which of them do not fit. interprets: whether the interpreter follows."""
        planning = self.settings if interprets else replace(self.settings, interpreted=None)
        pace = plan.probe(self.settings, peaks) if cases else plan.Pace()
        return plan.make(planning, cases, peaks, self.spent(), pace)

    def blank(self, case: Case, peaks: Peaks | None) -> Row:
        """The row of a case before anything is measured."""
        return _row(case, peaks)

    def row(self, case: Case, peaks: Peaks | None = None) -> Row:
        """Verify, then time. An exception that the case, ours or a peer raises is recorded in the row, not raised."""
        row = self.blank(case, peaks)
        if reason := self.out_of_time():
            row.status, row.reason = "skipped", reason
            return row
        try:
            self._measure(row, case)
        except Exception as error:  # a failing row must not stop the others
            row.status, row.reason = "failed", first_line(error)
        finally:
            try:
                _clean_up()
            except RuntimeError as error:  # after an illegal access CUDA is unusable in this process
                self._lost = f"not started: the GPU was lost in {case.id}: {first_line(error)}"
        return row

    def _measure(self, row: Row, case: Case) -> None:
        work = self._prepare(case)
        row.limit = _finite(work.limits["out"])
        steps, first_seconds, opaque = {}, {}, set()
        # Ours first: if it is wrong, the peers are not measured at all.
        for name in (OURS, *(name for name in self.settings.peers if plan.concerns(PEERS[name], case))):
            entry = row.entries[name] = Entry()
            if name != OURS:
                reason = absent(PEERS[name], case, self.settings.device) or self.out_of_time()
                if reason:
                    entry.status, entry.reason = "absent", reason
                    continue
            try:
                start = time.perf_counter()
                built = None if name == OURS else work.build(name)
                call = work.ours if name == OURS else built.call
                step = work.step(call)
                with work.gradients():
                    if built is None:
                        entry.note = run_watched(step)
                    else:
                        entry.note = built.note
                        step()
                    self._synchronise()
                if PEERS[name].compiles if built else self.settings.device.startswith("cuda"):
                    first_seconds[name] = time.perf_counter() - start
                entry.error, wrong = work.judge(call, ours=name == OURS)
                if wrong:
                    entry.status, entry.reason = "wrong", wrong
                else:
                    if built and built.opaque:
                        opaque.add(name)
                    else:
                        with work.gradients():
                            entry.peak_bytes = timing.peak_memory(step, self.settings.device)
                    steps[name] = step
            except Exception as error:
                entry.status, entry.reason = "failed", first_line(error)
            if name == OURS and entry.status != "timed":
                row.status, row.reason = entry.status, entry.reason
                if row.status == "wrong":
                    row.reason = f"not timed: {entry.reason}"
                return
        if isinstance(work, ModelWork) and case.mode == "inference":
            self.top5[f"{row.model}@{row.img_size}/{row.dtype}"] = work.top5()
        with work.gradients():
            self._time(row, steps, first_seconds, opaque, work.turns)

    def _prepare(self, case: Case) -> ModelWork | OpWork:
        if case.op:
            self._subject = None
            return OpWork(case, self.settings)
        if self._subject is None or (self._subject.name, self._subject.img_size) != (case.model, case.img_size):
            self._subject = None  # frees its memory before the next one needs its own
            self._subject = Subject(case.model, case.img_size, self.settings)
        return ModelWork(case, self._subject)

    def _time(
        self,
        row: Row,
        steps: dict[str, timing.Call],
        first_seconds: dict[str, float],
        opaque: set[str],
        turns: int,
    ) -> None:
        """Time the steps, by name, and write the results into the row. first_seconds: what building and the first call
        took, of entries that compile; opaque: entries that cannot be captured as a CUDA graph; turns: after this many
        calls a step has used each of its inputs once."""
        device, seconds = self.settings.device, self.settings.seconds
        timer = timing.timer(device)
        measured, failures = timing.interleave(steps, timer, seconds)
        for name, error in failures.items():
            row.entries[name].status, row.entries[name].reason = "failed", first_line(error)
        if OURS not in measured:
            row.status, row.reason = "failed", row.entries[OURS].reason
            return
        ratios = _against(OURS, measured)
        row.against = {
            side: {name: Duel(*found) for name, found in _against(side, measured).items()}
            for side in SIDES
            if side in measured
        }
        for name, durations in measured.items():
            entry = row.entries[name]
            entry.seconds = timing.spread(durations)
            if name in first_seconds:
                entry.compile_seconds = max(0.0, first_seconds[name] - entry.seconds.median)
            if name in ratios:
                entry.ratio, entry.verdict = ratios[name]
            if self._energy is not None and not row.op:
                with contextlib.suppress(Exception):  # without energy the times still count
                    entry.joules = timing.joules(steps[name], timer, self._energy, entry.seconds.median)
        if device.startswith("cuda") and not self._without_graphs(row):
            self._time_host_and_graph(row, {name: steps[name] for name in measured}, opaque, turns)

    def _without_graphs(self, row: Row) -> bool:
        """Whether no time is left to time the host and CUDA graphs; if so, the row says so and counts as unfinished."""
        row.entries[OURS].reason = self.out_of_time()
        return bool(row.entries[OURS].reason)

    def _time_host_and_graph(self, row: Row, steps: dict[str, timing.Call], opaque: set[str], turns: int) -> None:
        """Time each step until it returns, and as the replay of a CUDA graph: an eager call may mostly wait for Python
        on the host, a replay is the time of the GPU alone."""
        for name, step in steps.items():
            with contextlib.suppress(Exception):  # without the host's time the others still count
                budget = timing.HOST_SHARE * self.settings.seconds / len(steps)
                row.entries[name].host = timing.spread(timing.host_seconds(step, budget))
        graphs, failures = timing.replayed({name: steps[name] for name in steps if name not in opaque}, turns)
        measured, more = timing.interleave(graphs, timing.timer("cuda"), self.settings.seconds)
        for name, error in (failures | more).items():  # some entries cannot be captured
            entry = row.entries[name]
            entry.note = "; ".join(filter(None, [entry.note, f"no CUDA graph: {first_line(error)}"]))
        ratios = _against(OURS, measured)
        for name, durations in measured.items():
            entry = row.entries[name]
            entry.graph = timing.spread([duration / turns for duration in durations])
            if name in ratios:
                entry.graph_ratio, entry.graph_verdict = ratios[name]

    def _synchronise(self) -> None:
        if self.settings.device.startswith("cuda"):
            torch.cuda.synchronize()


def _row(case: Case, peaks: Peaks | None) -> Row:
    """The row of a case before anything is measured."""
    config, dtype = case.config, SHORT[case.dtype]
    cost = roofline.case_cost(case)
    return Row(
        case.id,
        case.model,
        case.op,
        config.img_size[0],
        case.tokens,
        dtype,
        case.batch,
        case.mode,
        "timed",
        items=1 if case.op else case.batch,
        flops=cost.flops,
        bytes=cost.bytes,
        bound_seconds=None if peaks is None else roofline.bound(case, roofline.rates(peaks, dtype)),
    )


def _against(side: str, measured: dict[str, list[float]]) -> dict[str, tuple[Ratio, str]]:
    """For every other entry, the ratio of its time to that of `side` in paired rounds, and the verdict; empty without
    times of that."""
    found = {}
    for name in measured.keys() - {side} if side in measured else ():
        ratios = [peer / ours for peer, ours in zip(measured[name], measured[side], strict=True)]
        found[name] = timing.ratio(ratios), verdict(ratios)
    return found


def _finite(value: float) -> float | None:
    """None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def _clean_up() -> None:
    """Free what the row's entries held, so that memory and compilation of the next row do not depend on them."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------------------------
# A run and its file


def record(
    settings: Settings,
    folder: Path,
    before: Run | None = None,
    each: Callable[[Row], None] = lambda row: None,
    planned: Callable[[plan.Plan], None] = lambda plan: None,
    kind: type[Bench] = Bench,
) -> tuple[Run, bool]:
    """Measure all cases, saving to `folder`/bench.json after every row; returns the run, and whether Ctrl-C interrupted
    it. before: an earlier run, whose rows are taken over where code, machine and settings are the same; its failed
    cases are tried last, so that one that ends the process does not keep the others from being measured. each: called
    with every row. planned: called with the estimate of how long the run takes, when only the peaks have been measured.
    kind: what measures a row, and says the file's name.

    On a CPU, cases that do not fit the time limit are left out from the start (`plan.make`); rows that the limit then
    cuts off all the same are "skipped". `finished` of the run says whether every case was measured.
    """
    timing.pin_threads()
    timing.pin_precision()
    facts = environment(settings.device) | {"seed": SEED}
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    run = Run(facts, settings.as_dict(), started)
    start = time.perf_counter()
    bench = kind(settings)
    found, failed = {}, set()
    if before is not None and _same_conditions(before, run):
        found = {row.id: row for row in before.rows if row.status == "timed" and not _unfinished(row)}
        failed = {row.id for row in before.rows if row.status == "failed"}
        run.peaks = before.peaks  # in case the run is interrupted before they are measured
        bench.top5 |= before.extra.get("top5", {})
        interpreted = before.extra.get("interpreted", {})
        if interpreted.get("ok") and interpreted["model"] == settings.interpreted:
            run.extra["interpreted"] = interpreted
    complete = interrupted = False

    def save() -> None:
        run.rows = [found[case.id] for case in settings.cases if case.id in found]
        run.extra["top5"] = bench.top5
        run.seconds, run.finished = round(time.perf_counter() - start, 1), complete
        report.write_json(folder / bench.file, run.as_dict())

    try:
        run.peaks = bench.peaks()
        cases = sorted(settings.cases, key=lambda case: case.id in failed)
        todo = [case for case in cases if case.id not in found]
        interprets = settings.interpreted and "interpreted" not in run.extra
        schedule = bench.plan(todo, run.peaks, bool(interprets))
        planned(schedule)
        if schedule.left_out:
            run.extra["left_out"] = schedule.left_out
            cases = [case for case in cases if case.id not in schedule.left_out]
        for case in report.progress(cases, len(cases), "timing"):
            if case.id in found:
                found[case.id].bound_seconds = bench.blank(case, run.peaks).bound_seconds  # at the peaks of this run
            else:
                # Saved as failed while it runs: if it ends the process, the next run tries it last.
                found[case.id] = bench.blank(case, run.peaks)
                found[case.id].status, found[case.id].reason = "failed", ENDED
                save()
                found[case.id] = bench.row(case, run.peaks)
            save()
            each(found[case.id])
        if interprets:
            run.extra["interpreted"] = classify_interpreted(settings)
        complete = not schedule.left_out and not any(_unfinished(row) for row in run.rows)
    except KeyboardInterrupt:
        interrupted = True
        found = {name: row for name, row in found.items() if row.reason != ENDED}
    save()
    return run, interrupted


ENDED = "it ended the process"


def _unfinished(row: Row) -> bool:
    """Whether the time limit cut off something of it."""
    return row.status == "skipped" or any(entry.reason.startswith("not started") for entry in row.entries.values())


def _same_conditions(a: Run, b: Run) -> bool:
    return all(a.environment.get(key) == b.environment.get(key) for key in _SAME_ENVIRONMENT) and all(
        a.settings.get(key) == b.settings.get(key) for key in _SAME_SETTINGS
    )


def classify_interpreted(settings: Settings) -> dict:
    """Classify the photographs in bfloat16 by the kernels in Triton's interpreter: the same code that a GPU runs, but
    too slow to be timed. The errors are of the logits, relative rms against the float64 reference."""
    start = time.perf_counter()
    dtype = torch.bfloat16
    subject = Subject(settings.interpreted, None, settings)
    model, images = subject.model.to(dtype), subject.photos.to(dtype)
    truth = subject.truth(dtype, "inference")[0]["out"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the interpreter's arrays are small
    try:
        with torch.inference_mode():
            plain = model(images)
            with fastvit.use_backend("triton"):
                logits = model(images)
    finally:
        torch.set_num_threads(threads)
    error, plain_error = (accuracy.relative_rms(found, truth) for found in (logits, plain))
    return {
        "model": subject.name,
        "dtype": SHORT[dtype],
        "error": error,
        "plain_error": plain_error,
        "ok": error <= accuracy.limit(dtype, plain_error),
        "seconds": round(time.perf_counter() - start, 1),
        **subject.top5(logits, dtype),
    }

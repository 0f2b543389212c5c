"""The benchmark behind `fastvit bench`: ours beside its peers on whole models and single ops, in one run.

One row is a case. All sides hold the same weights, take the same input and run interleaved; nothing is timed whose
output, or in training whose gradients, are wrong. A peer's trouble stays in its row.
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
from .schema import OURS, Ceilings, Contestant, Ratio, Row, Run
from .suites import SEED, Settings
from .work import ModelWork, OpWork, Subject, run_watched

FILE = "bench.json"
# What must be equal for rows of an earlier run to stand for this one's.
_SAME_ENVIRONMENT = ("fastvit", "commit", "device", "tuned", "torch", "torch_threads", "packages")
_SAME_SETTINGS = ("peers", "weights", "images")


def first_line(error: BaseException) -> str:
    """An exception as one line; running out of memory as just that."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "out of memory"
    return report.first_line(error)


class Bench:
    """Measures the cases of `settings`, one row each. top5: of every model and dtype that was timed, what the
    photographs are taken for."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.top5: dict[str, dict] = {}
        self._start = time.perf_counter()
        self._subject: Subject | None = None
        # It takes a second a side, which a time limit needs for something else.
        self._energy = timing.energy_counter(settings.device) if settings.time_limit is None else None
        self._lost = ""

    def spent(self) -> float:
        """Seconds of the time limit that are gone."""
        return time.perf_counter() - self._start

    def out_of_time(self) -> str:
        """Why nothing more is started; "" while there is time, and a device."""
        if self._lost:
            return self._lost
        limit = self.settings.time_limit
        if limit is None or self.spent() <= limit:
            return ""
        return f"not started: the time limit of {limit:g} s was reached"

    def row(self, case: Case, ceilings: Ceilings | None = None) -> Row:
        """Verify, then time. Raises nothing for what the case, ours or a peer does: it is in the row."""
        row = _row(case, ceilings)
        if reason := self.out_of_time():
            row.status, row.reason = "skipped", reason
            return row
        try:
            self._measure(row, case)
        except Exception as error:  # one row must not stop the others
            row.status, row.reason = "failed", first_line(error)
        finally:
            try:
                _clean_up()
            except RuntimeError as error:  # a kernel went astray: CUDA does nothing more for this process
                self._lost = f"not started: the GPU was lost in {case.id}: {first_line(error)}"
        return row

    def _measure(self, row: Row, case: Case) -> None:
        work = self._prepare(case)
        row.limit = _finite(work.limits["out"])
        steps, first_seconds, opaque = {}, {}, set()
        # Ours first: where it is wrong, nothing else is worth the time.
        for name in (OURS, *(name for name in self.settings.peers if plan.concerns(PEERS[name], case))):
            side = row.contestants[name] = Contestant()
            if name != OURS:
                reason = absent(PEERS[name], case, self.settings.device) or self.out_of_time()
                if reason:
                    side.status, side.reason = "absent", reason
                    continue
            try:
                start = time.perf_counter()
                built = None if name == OURS else work.build(name)
                call = work.ours if name == OURS else built.call
                step = work.step(call)
                with work.gradients():
                    if built is None:
                        side.note = run_watched(step)
                    else:
                        side.note = built.note
                        step()
                    self._synchronise()
                if PEERS[name].compiles if built else self.settings.device.startswith("cuda"):
                    first_seconds[name] = time.perf_counter() - start
                side.error, wrong = work.judge(call, ours=name == OURS)
                if wrong:
                    side.status, side.reason = "wrong", wrong
                else:
                    if built and built.opaque:
                        opaque.add(name)
                    else:
                        with work.gradients():
                            side.peak_bytes = timing.peak_memory(step, self.settings.device)
                    steps[name] = step
            except Exception as error:
                side.status, side.reason = "failed", first_line(error)
            if name == OURS and side.status != "timed":
                row.status, row.reason = side.status, side.reason
                if row.status == "wrong":
                    row.reason = f"not timed: {side.reason}"
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
            self._subject = None  # its memory first
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
        """first_seconds: of those that compile; opaque: those that cannot be captured; turns: after so many calls a
        step is back at its first input."""
        device, seconds = self.settings.device, self.settings.seconds
        timer = timing.timer(device)
        measured, failures = timing.interleave(steps, timer, seconds)
        for name, error in failures.items():
            row.contestants[name].status, row.contestants[name].reason = "failed", first_line(error)
        if OURS not in measured:
            row.status, row.reason = "failed", row.contestants[OURS].reason
            return
        ratios = _against_ours(measured)
        for name, durations in measured.items():
            side = row.contestants[name]
            side.seconds = timing.spread(durations)
            if name in first_seconds:
                side.compile_seconds = max(0.0, first_seconds[name] - side.seconds.median)
            if name in ratios:
                side.ratio, side.verdict = ratios[name]
            if self._energy is not None and not row.op:
                with contextlib.suppress(Exception):  # what was timed is not lost for it
                    side.joules = timing.joules(steps[name], timer, self._energy, side.seconds.median)
        if device.startswith("cuda") and not self._without_graphs(row):
            self._time_host_and_graph(row, {name: steps[name] for name in measured}, opaque, turns)

    def _without_graphs(self, row: Row) -> bool:
        """Whether there is no time left for the other two ways: said in the row, which is then unfinished."""
        row.contestants[OURS].reason = self.out_of_time()
        return bool(row.contestants[OURS].reason)

    def _time_host_and_graph(self, row: Row, steps: dict[str, timing.Call], opaque: set[str], turns: int) -> None:
        """Where the host is what an eager call waits for, Python is measured: a graph's replay is the GPU alone."""
        for name, step in steps.items():
            with contextlib.suppress(Exception):  # what was timed is not lost for it
                budget = timing.HOST_SHARE * self.settings.seconds / len(steps)
                row.contestants[name].host = timing.spread(timing.host_seconds(step, budget))
        graphs, failures = timing.replayed({name: steps[name] for name in steps if name not in opaque}, turns)
        measured, more = timing.interleave(graphs, timing.timer("cuda"), self.settings.seconds)
        for name, error in (failures | more).items():  # not everything can be captured
            side = row.contestants[name]
            side.note = "; ".join(filter(None, [side.note, f"no CUDA graph: {first_line(error)}"]))
        ratios = _against_ours(measured)
        for name, durations in measured.items():
            side = row.contestants[name]
            side.graph = timing.spread([duration / turns for duration in durations])
            if name in ratios:
                side.graph_ratio, side.graph_verdict = ratios[name]

    def _synchronise(self) -> None:
        if self.settings.device.startswith("cuda"):
            torch.cuda.synchronize()


def _row(case: Case, ceilings: Ceilings | None) -> Row:
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
        floor_seconds=None if ceilings is None else roofline.floor(case, roofline.rates(ceilings, dtype)),
    )


def _against_ours(measured: dict[str, list[float]]) -> dict[str, tuple[Ratio, str]]:
    """Of every peer, its time over ours in each round, and the verdict; nothing where ours was not measured."""
    found = {}
    for name in measured.keys() - {OURS} if OURS in measured else ():
        ratios = [peer / ours for peer, ours in zip(measured[name], measured[OURS], strict=True)]
        found[name] = timing.ratio(ratios), verdict(ratios)
    return found


def _finite(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return value if math.isfinite(value) else None


def _clean_up() -> None:
    """Give back what the row's contestants held: the next one's memory and compilations must not depend on them."""
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
) -> tuple[Run, bool]:
    """Measure everything, saving to `folder`/bench.json after every row; returns the run, and whether Ctrl-C cut it
    short. before: an earlier run, whose rows are not measured again where code, machine and settings are the same; its
    cases that failed come last, so that one that ends the run keeps it from none of the others. planned: told, before
    anything but the ceilings is measured, how long the rest will take.

    What would not fit the time limit is left out from the start (`plan.make`), and what the limit cuts off all the same
    comes back "skipped"; `finished` says whether there is nothing left to do.
    """
    timing.pin_threads()
    timing.pin_precision()
    facts = environment(settings.device) | {"seed": SEED}
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    run = Run(facts, settings.as_dict(), started)
    start = time.perf_counter()
    bench = Bench(settings)
    found, failed = {}, set()
    if before is not None and _same_conditions(before, run):
        found = {row.id: row for row in before.rows if row.status == "timed" and not _unfinished(row)}
        failed = {row.id for row in before.rows if row.status == "failed"}
        run.ceilings = before.ceilings  # until they are measured again
        bench.top5 |= before.extra.get("top5", {})
        interpreted = before.extra.get("interpreted", {})
        if interpreted.get("ok") and interpreted["model"] == settings.interpreted:
            run.extra["interpreted"] = interpreted
    complete = interrupted = False

    def save() -> None:
        run.rows = [found[case.id] for case in settings.cases if case.id in found]
        run.extra["top5"] = bench.top5
        run.seconds, run.finished = round(time.perf_counter() - start, 1), complete
        report.write_json(folder / FILE, run.as_dict())

    try:
        run.ceilings = roofline.measure_ceilings(settings.device, dict.fromkeys(c.dtype for c in settings.cases))
        cases = sorted(settings.cases, key=lambda case: case.id in failed)
        todo = [case for case in cases if case.id not in found]
        interprets = settings.interpreted and "interpreted" not in run.extra
        planning = settings if interprets else replace(settings, interpreted=None)
        pace = plan.probe(settings, run.ceilings) if todo else plan.Pace()
        schedule = plan.make(planning, todo, run.ceilings, bench.spent(), pace)
        planned(schedule)
        if schedule.left_out:
            run.extra["left_out"] = schedule.left_out
            cases = [case for case in cases if case.id not in schedule.left_out]
        for case in report.progress(cases, len(cases), "timing"):
            if case.id in found:
                found[case.id].floor_seconds = _row(case, run.ceilings).floor_seconds  # by the ceilings of this run
            else:
                # Kept while it runs: a row that ends the process has failed for the next one, which takes it last.
                found[case.id] = _row(case, run.ceilings)
                found[case.id].status, found[case.id].reason = "failed", ENDED
                save()
                found[case.id] = bench.row(case, run.ceilings)
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
    """Whether the time limit took something from it."""
    return row.status == "skipped" or any(side.reason.startswith("not started") for side in row.contestants.values())


def _same_conditions(a: Run, b: Run) -> bool:
    return all(a.environment.get(key) == b.environment.get(key) for key in _SAME_ENVIRONMENT) and all(
        a.settings.get(key) == b.settings.get(key) for key in _SAME_SETTINGS
    )


def classify_interpreted(settings: Settings) -> dict:
    """Classify the photographs on the kernels themselves, in Triton's interpreter: no speed, but the same code that a
    GPU runs. bfloat16; the errors are of the logits, relative rms against the float64 reference."""
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

"""Chooses by measuring, on a GPU: the config of each launch, then for each op our kernels or one of PyTorch's ways.

An op's calls are taken from the models at hand (`calls_of`). Each launch that has a choice is shown by
`kernels.configs.watching`; of the configs worth measuring, `kernels.cost` keeps the most promising. Then each op as a
whole, forward or forward and backward, is measured against the library: its PyTorch back end, and for attention every
back end of SDPA. In both, what computes something else than the incumbent is dropped before any timing; the rest are
timed side by side, in random order, on buffers that rotate so that none is found in the L2 cache; and the incumbent
stays unless a challenger is faster by more than `GAIN` with quartiles apart. Every decision is kept in the table of
choices (`fastvit.tuned`) as soon as it is made, also when nothing changes, so that none is measured twice.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from typing import Protocol

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from . import dispatch, report, tuned
from .attempts import TRY_SECONDS, Attempts, GpuLost, gpu_is_lost
from .graphs import capture
from .kernels import configs, cost, hardware
from .measure import quartiles, verdict
from .models.config import ViTConfig
from .models.vision_transformer import VisionTransformer
from .ops import _common

MODES = ("inference", "training")
KEEP, ALL = 8, sys.maxsize  # configs that are measured beside the heuristic's
GAIN = 1.02  # by which a challenger must be faster
ROUNDS, WARMUP_ROUNDS = 50, 3
ROUND_SECONDS = 1e-3  # a replay lasts at least about this long: an event's tick must not count
MAX_COPIES = 8  # of an op's tensors, to rotate through
# How many roundings may lie between the results of two configs, and of two ways to run an op, which round in between.
LAUNCH_ROUNDINGS, OP_ROUNDINGS = 1, 8

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


def interleave(timers: dict[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds by name, one a round, each round in a fresh random order: what drifts falls on all alike."""
    order, shuffle = list(timers), random.Random(0).shuffle
    measured: dict[str, list[float]] = {name: [] for name in timers}
    for round in range(WARMUP_ROUNDS + rounds):
        shuffle(order)
        for name in order:
            seconds = timers[name]()
            if round >= WARMUP_ROUNDS:
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


# --------------------------------------------------------------------------------------------------------------------
# Calls of ops


@dataclass(frozen=True)
class Call:
    """One call of an op as a shape: args are the op's, tensors on the meta device; those that require grad make it a
    forward and a backward pass. autocast: the dtype of the autocast it runs under, or None."""

    op: _common.Op
    args: tuple
    autocast: torch.dtype | None = None

    @staticmethod
    def like(op: _common.Op, args: tuple) -> Call:
        """The call as it would be made now."""
        autocast = torch.get_autocast_dtype(args[0].device.type) if _common.autocasting(args[0]) else None
        made = {id(value): _meta(value) for value in args}  # what is given twice, x as its own residual, stays one
        return Call(op, tuple(made[id(value)] for value in args), autocast)

    def __reduce__(self):
        return _call_of, (self.op.name, self.args, self.autocast)  # not every function of an op can be pickled


def _call_of(name: str, args: tuple, autocast: torch.dtype | None) -> Call:
    return Call(importlib.import_module(f"{_common.__package__}.{name}").OP, args, autocast)


def _meta(value):
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device="meta").requires_grad_(_common.needs_grad(value))


class Work:
    """A call with tensors: `work(function)` runs it once with one of the op's candidates and returns the result and all
    gradients. make(shape, dtype, name) gives the tensors."""

    def __init__(self, call: Call, device: torch.device, make: Callable):
        self.call, self.device = call, device
        names = inspect.signature(call.op.check).parameters
        made = {}
        for name, value in zip(names, call.args, strict=True):
            if isinstance(value, torch.Tensor) and value not in made:
                made[value] = make(value.shape, value.dtype, name).requires_grad_(value.requires_grad)
        self.args = tuple(made[value] if isinstance(value, torch.Tensor) else value for value in call.args)
        self.tensors = list(made.values())
        self.wanted = [tensor for tensor in self.tensors if tensor.requires_grad]
        self.dout = None
        if self.wanted:
            with self.mode():
                out = call.op.triton(*self.args)
            self.dout = make(out.shape, out.dtype, "dout")

    @contextlib.contextmanager
    def mode(self) -> Iterator[None]:
        """Gradients and autocast as the call has them."""
        autocast = self.call.autocast
        kind = torch.autocast(self.device.type, autocast, enabled=autocast is not None, cache_enabled=False)
        with torch.set_grad_enabled(bool(self.wanted)), kind:
            yield

    @property
    def key(self) -> str:
        with self.mode():
            return self.call.op.key(self.args)

    def candidates(self) -> dict[str, Callable]:
        """Every way to run the call, by name, ours first."""
        with self.mode():
            return self.call.op.candidates(self.args)

    def unmeasured(self) -> str:
        """The candidate that runs where nothing was measured."""
        with self.mode():
            return self.call.op.unmeasured(self.args)[0]

    def __call__(self, function: Callable) -> tuple[torch.Tensor, ...]:
        with self.mode():
            out = function(*self.args)
            return (out.detach(), *torch.autograd.grad(out, self.wanted, self.dout)) if self.wanted else (out,)

    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


def _random(device: torch.device) -> Callable:
    """Random tensors of an op, weights scaled by their inputs; the process's own generators are left alone."""
    generator = torch.Generator(device).manual_seed(0)

    def make(shape, dtype, name):
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if dtype == torch.bool:
            tensor.bernoulli_(0.9, generator=generator)[:, 0] = True  # a mask that leaves every query a key
            return tensor
        if not dtype.is_floating_point:
            return tensor.random_(0, 256, generator=generator)
        tensor.normal_(generator=generator)
        return tensor.mul_(math.prod(shape[1:]) ** -0.5) if name.endswith("weight") and len(shape) > 1 else tensor

    return make


def works_of(call: Call, device: torch.device, arch: hardware.Arch) -> list[Work]:
    """The call with random tensors, so often that by the time the first comes round again it has left the L2 cache."""
    make = _random(device)
    first = Work(call, device, make)
    copies = min(MAX_COPIES, math.ceil(2 * arch.l2 / max(1, first.bytes())))
    return [first, *(Work(call, device, make) for _ in range(copies - 1))]


def calls_of(config: ViTConfig, batch: int, dtype: torch.dtype, mode: str) -> list[Call]:
    """Every distinct call of an op that a model of `config` makes in a forward pass, found by running it without
    memory. mode: "inference" or "training". Raises ValueError for another mode."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
    with torch.device("meta"):
        model = VisionTransformer(config).to(dtype).train(mode == "training")
        images = torch.empty(batch, config.in_chans, *_pair(config.img_size), dtype=dtype)
    found: dict[str, Call] = {}
    with (
        _common.watching(lambda op, args: found.setdefault(op.key(args), Call.like(op, args))),
        dispatch.use_backend("torch"),
        torch.set_grad_enabled(mode == "training"),
    ):
        model(images)
    return list(found.values())


def _pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


# --------------------------------------------------------------------------------------------------------------------
# Launches


def requests_of(works: list[Work]) -> dict[configs.Request, list[Callable]]:
    """Each launch with a choice that the works' op makes on our kernels: how to repeat it, once a work. The weight
    gradients are made in both ways."""
    found: dict[configs.Request, list[Callable]] = {}

    def note(request: configs.Request, run: Callable) -> None:
        runs = found.setdefault(request, [])
        if len(runs) < len(works):
            runs.append(run)

    with configs.watching(note):
        for name in (_common.KERNELS, _common.LIBRARY_GRADIENTS):
            for work in works:
                if name in (candidates := work.candidates()):
                    work(candidates[name])
    return found


def pruned(
    request: configs.Request, arch: hardware.Arch, sms: int, keep: int | None = None
) -> dict[configs.Config, float]:
    """The configs to measure, with their estimates in seconds: the heuristic's, then the `keep` most promising, `KEEP`
    if not said."""
    first, *rest = configs.search_space(request, arch, sms)
    estimates = {config: cost.request_seconds(request, config, arch, sms) for config in (first, *rest)}
    return {config: estimates[config] for config in (first, *sorted(rest, key=estimates.get)[: keep or KEEP])}


def as_dict(config: configs.Config) -> dict:
    """A config as a table holds it."""
    return {type(config).__name__: asdict(config)}


def label(config: configs.Config) -> str:
    """A config's name in a table's evidence."""
    return tuned.label(as_dict(config))


# --------------------------------------------------------------------------------------------------------------------
# Tuning


class OutOfTime(Exception):
    """The time limit was reached."""


def tune_call(
    call: Call,
    device: torch.device,
    clock: Clock,
    say: Callable[[str], None] = lambda line: None,
    deadline: float = math.inf,
    attempts: Attempts | None = None,
) -> None:
    """Decide what the table lacks for one call: the config of each of its launches, then the candidate of its op.

    say: called with a line a decision; attempts: those of the table, if not said. Raises OutOfTime once
    `time.monotonic()` has passed `deadline`, between two decisions, and GpuLost where a candidate took the GPU from
    this process: the next one leaves it out. A launch for which not even the heuristic's config runs is said and left
    out.
    """
    table, arch, sms = tuned.table(device), hardware.current_arch(), hardware.num_sms(device)
    attempts = attempts or Attempts(table.attempts)
    with tuned.use_tuning("read-only"), torch.inference_mode(False), torch.no_grad():
        works, launches = launches_of(call, device, arch, attempts)
        if works[0].key in table.own("segments"):
            return

        def settle(
            kind: str, key: str, candidates: dict[str, list[Run]], choice_of: Callable, *how, first="", **more
        ) -> None:
            if time.monotonic() > deadline:
                raise OutOfTime
            measured = measure(candidates, *how, attempts=attempts, key=key, **more)
            name, evidence = measured.choice(sorted(candidates, key=lambda name: name != first))
            entry = tuned.Entry(choice_of(name), **evidence)
            table.record(kind, key, entry)
            say(f"{key}: {summary(entry)}")

        for request, runs in launches.items():
            if request.key in table.own("configs"):
                continue
            choices = {label(config): config for config in pruned(request, arch, sms)}
            candidates = {
                name: [partial(run, config) for run in runs[: len(works)]] for name, config in choices.items()
            }
            how = (request.dtype, LAUNCH_ROUNDINGS, clock)
            try:
                settle(
                    *("configs", request.key, candidates, lambda name, known=choices: as_dict(known[name]), *how),
                    in_place=True,
                )
            except OutOfTime:
                raise
            except Exception as error:  # whatever a launch raises must not stop the others
                go_on_without(error)
                say(f"{request.key}: not tuned, {report.first_line(error)}")
        candidates = {
            name: [partial(work, function) for work in works] for name, function in works[0].candidates().items()
        }
        how = (_narrowest(call), OP_ROUNDINGS, clock)
        settle("segments", works[0].key, candidates, str, *how, first=works[0].unmeasured())


def go_on_without(error: Exception) -> None:
    """Return where the failure of one thing leaves the others; raise GpuLost where the GPU went with it."""
    if gpu_is_lost():
        raise GpuLost(f"outside any attempt: {report.first_line(error)}") from error


def launches_of(
    call: Call, device: torch.device, arch: hardware.Arch, attempts: Attempts
) -> tuple[list[Work], dict[configs.Request, list[Callable]]]:
    """The call with tensors on the device, and each of its launches with a choice (see `requests_of`), for which it is
    run once. Raises RuntimeError where that ended a process before, and GpuLost."""
    name = f"{call.op.name}: {call.op.key(call.args)}"
    if name in attempts.fatal:
        raise RuntimeError(f"{name} {attempts.fatal[name]}")
    with attempts.trying(name):
        works = works_of(call, device, arch)
        found = requests_of(works)
    return works, found


def _narrowest(call: Call) -> torch.dtype:
    """The dtype that rounds the most in a call."""
    dtypes = [a.dtype for a in call.args if isinstance(a, torch.Tensor) and a.is_floating_point()]
    return min([*dtypes, call.autocast or dtypes[0]], key=lambda dtype: dtype.itemsize)


def summary(entry: tuned.Entry) -> str:
    medians = {name: median for name, (_, median, _) in entry.seconds.items()}
    gain = medians[entry.incumbent] / medians[entry.chosen]
    how = "stays" if entry.chosen == entry.incumbent else f"is {gain:.2f} times as fast as {entry.incumbent}"
    dropped = "".join(f"; dropped {name}: {reason}" for name, reason in entry.dropped.items())
    return f"{entry.chosen} {how}, {1e6 * medians[entry.chosen]:.1f} us, of {len(medians)} timed{dropped}"


def tune(calls: Iterable[Call], device: torch.device, clock: Clock, say=lambda line: None, deadline=math.inf) -> int:
    """`tune_call` for each; one that fails is said and left out. Returns how many did. Raises OutOfTime and GpuLost;
    ends the process where a kernel does not end."""
    failed, attempts = 0, Attempts(tuned.table(device).attempts, watched=True)
    for call in calls:
        try:
            tune_call(call, device, clock, say, deadline, attempts)
        except OutOfTime:
            raise
        except Exception as error:
            go_on_without(error)
            failed += 1
            say(f"{call.op.name}: not tuned, {report.first_line(error)}")
    return failed


_given_up: set[str] = set()


def tune_missing(op: _common.Op, args: tuple) -> None:
    """Tune a call that is about to be made on a GPU, where the table has nothing for it: FASTVIT_TUNING=measure. Where
    that fails, it warns, and the heuristics stand."""
    device, key = args[0].device, op.key(args)
    if key in tuned.table(device).segments or key in _given_up:
        return
    try:
        with torch.cuda.device(device):
            # What is fatal is remembered here alone: other processes of the same run tune at the same time.
            tune_call(Call.like(op, args), device, CudaClock(), attempts=Attempts())
    except Exception as error:  # no measurement is worth a user's run
        _given_up.add(key)
        warnings.warn(f"{key} could not be tuned: {report.first_line(error)}", stacklevel=4)


# --------------------------------------------------------------------------------------------------------------------
# Without a GPU


class _AbsentDriver:
    """Answers for a GPU as far as choosing a config and compiling a kernel ask."""

    def __init__(self, target: GPUTarget):
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device) -> int:
        return 0


@contextlib.contextmanager
def without_gpu(target: GPUTarget, run: Callable = JITFunction.run) -> Iterator[None]:
    """In the `with` body Triton takes `target` for its device, and launches go to run(kernel, *args, grid, warmup,
    **kwargs) in place of Triton's own method."""
    driver, before = triton.runtime.driver, (triton.runtime.driver._active, JITFunction.run)
    driver.set_active(_AbsentDriver(target))
    JITFunction.run = run
    try:
        yield
    finally:
        driver._active, JITFunction.run = before


def hollow(call: Call) -> Work:
    """The call with tensors that hold nothing, on the CPU: for launches that nothing runs."""
    return Work(call, torch.device("cpu"), lambda shape, dtype, name: torch.empty(shape, dtype=dtype))


def planned(call: Call, arch: hardware.Arch) -> dict[configs.Request, dict[configs.Config, float]]:
    """What `tune_call` would measure on a GPU of `arch` for a call's launches, with the estimates it prunes by."""
    target = GPUTarget(arch.backend, arch.capability, arch.warp_size)
    with without_gpu(target, run=lambda *args, **kwargs: None), torch.no_grad():
        found = requests_of([hollow(call)])
    return {request: pruned(request, arch, arch.sms) for request in found}

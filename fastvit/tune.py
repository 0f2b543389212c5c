"""Chooses by measuring, on a GPU: the config of each launch, then for each op our kernels or one of PyTorch's ways.

Each launch of a call that has a choice is shown by `kernels.launch.choice.watching`; of the configs worth measuring,
`kernels.launch.cost` keeps the most promising. Then each op as a whole, forward or forward and backward, is measured
against the library: its PyTorch back end, and for attention every back end of SDPA. Both are decided by
`decide.measure`, on buffers that rotate so that none is found in the L2 cache. Every decision is kept in the table of
choices (`fastvit.tuned`) as soon as it is made, also when nothing changes, so that none is measured twice.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial

import torch
import triton
from triton.runtime.jit import JITFunction

from . import dispatch, report, tuned
from .attempts import Attempts, GpuLost, gpu_is_lost
from .decide import Clock, CudaClock, Run, measure
from .examples import Draw
from .kernels.launch import choice, cost, hardware
from .kernels.launch.absent import launching_by, target_of, without_gpu
from .kernels.launch.heuristic import library
from .kernels.launch.request import Config, Request
from .kernels.launch.search import search_space

KEEP, ALL = 8, sys.maxsize  # configs that are measured beside the heuristic's
MAX_COPIES = 8  # of an op's tensors, to rotate through
# How many roundings may lie between the results of two configs, and of two ways to run an op, which round in between.
LAUNCH_ROUNDINGS, OP_ROUNDINGS = 2, 8


# --------------------------------------------------------------------------------------------------------------------
# Calls of ops


@dataclass(frozen=True)
class Call:
    """One call of an op as a shape: args are the op's, tensors on the meta device (all that `dispatch.is_drawn`); those
    that require grad make it a forward and a backward pass. autocast: the dtype of the autocast it runs under, or
    None."""

    op: dispatch.Op
    args: tuple
    autocast: torch.dtype | None = None

    @staticmethod
    def like(op: dispatch.Op, args: tuple) -> Call:
        """The call as it would be made now."""
        autocast = torch.get_autocast_dtype(args[0].device.type) if dispatch.autocasting(args[0]) else None
        made = {id(value): _meta(value) for value in args}  # what is given twice, x as its own residual, stays one
        return Call(op, tuple(made[id(value)] for value in args), autocast)


def _meta(value):
    if not dispatch.is_drawn(value):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device="meta").requires_grad_(dispatch.needs_grad(value))


class BoundCall:
    """A call with tensors: `bound(function)` runs it once with one of the op's candidates and returns the result and
    all gradients. make(shape, dtype, name) gives the tensors."""

    def __init__(self, call: Call, device: torch.device, make: Callable):
        self.call, self.device = call, device
        names = call.op.parameters
        made = {}
        for name, value in zip(names, call.args, strict=True):
            if dispatch.is_drawn(value) and value not in made:
                made[value] = make(value.shape, value.dtype, name).requires_grad_(value.requires_grad)
        self.args = tuple(made[value] if dispatch.is_drawn(value) else value for value in call.args)
        self.tensors = list(made.values())
        self.wanted = [tensor for tensor in self.tensors if tensor.requires_grad]
        self.dout = None
        if self.wanted:
            with self.mode():
                out = call.op.kernels(*self.args)
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
    """Random tensors of an op; the process's own generators are left alone."""
    generator = torch.Generator(device).manual_seed(0)

    def make(shape, dtype, name):
        if dtype == torch.bool:  # a mask that leaves every query a key
            mask = torch.rand(shape, generator=generator, device=device) < 0.9
            mask[:, 0] = True
            return mask
        return Draw(dtype, str(device), generator)(name, *shape)

    return make


def bind(call: Call, device: torch.device, arch: hardware.Arch) -> list[BoundCall]:
    """The call with random tensors, so often that by the time the first comes round again it has left the L2 cache."""
    make = _random(device)
    first = BoundCall(call, device, make)
    copies = min(MAX_COPIES, math.ceil(2 * arch.l2 / max(1, first.bytes())))
    return [first, *(BoundCall(call, device, make) for _ in range(copies - 1))]


# --------------------------------------------------------------------------------------------------------------------
# Launches


def requests_of(bound: list[BoundCall]) -> dict[Request, list[Callable]]:
    """Each launch with a choice that the calls' op makes on our kernels: how to repeat it, once a call."""
    found: dict[Request, list[Callable]] = {}

    def note(request: Request, run: Callable) -> None:
        runs = found.setdefault(request, [])
        if len(runs) < len(bound):
            runs.append(run)

    with choice.watching(note):
        for call in bound:
            call(call.call.op.kernels)
    return found


def pruned(request: Request, arch: hardware.Arch, sms: int, keep: int | None = None) -> dict[Config, float]:
    """The configs to measure, with their estimates in seconds: what runs unmeasured, of a product both ours and the
    library's, then the `keep` most promising, `KEEP` if not said."""
    first, *rest = search_space(request, arch, sms)
    twin = [library(request)] if request.kernel == "gemm" else []
    heads = sorted((first, *twin), key=lambda config: config != choice.unmeasured(request, arch, sms))
    estimates = {config: cost.request_seconds(request, config, arch, sms) for config in (*heads, *rest)}
    return {config: estimates[config] for config in (*heads, *sorted(rest, key=estimates.get)[: keep or KEEP])}


def compile_all(starts: Iterable[Callable[[], object]], device: torch.device) -> None:
    """Compile, in a thread a core, every kernel that a call of `starts` would launch on `device`, and launch none:
    while a compiler works, Python's other threads do too. What cannot be compiled is met again when it is launched."""
    if dispatch.interpreting():
        return
    found: dict[object, Callable[[], object]] = {}
    compile = JITFunction.run

    def note(kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
        *_, binder = kernel.device_caches[triton.runtime.driver.active.get_current_device()]
        _, specialization, options = binder(*args, **kwargs)
        one = partial(compile, kernel, *args, grid=grid, warmup=True, **kwargs)
        found.setdefault((kernel, str(specialization), str(options)), one)

    with launching_by(note):
        for start in starts:
            with contextlib.suppress(Exception):
                start()
    on_device = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), initializer=on_device)
    try:
        wait([pool.submit(one) for one in found.values()])
    finally:
        pool.shutdown(cancel_futures=True)


def as_dict(config: Config) -> dict:
    """A config as a table holds it."""
    return {type(config).__name__: config._asdict()}


def label(config: Config) -> str:
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
        bound, launches = launches_of(call, device, arch, attempts)
        if bound[0].key in table.own("ops"):
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
                name: [partial(run, config) for run in runs[: len(bound)]] for name, config in choices.items()
            }
            how = (request.dtype, LAUNCH_ROUNDINGS, clock)
            compile_all([partial(runs[0], config) for config in choices.values()], device)
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
            name: [partial(one, function) for one in bound] for name, function in bound[0].candidates().items()
        }
        how = (_narrowest(call), OP_ROUNDINGS, clock)
        settle("ops", bound[0].key, candidates, str, *how, first=bound[0].unmeasured())


def go_on_without(error: Exception) -> None:
    """Return where the failure of one thing leaves the others; raise GpuLost where the GPU went with it."""
    if gpu_is_lost():
        raise GpuLost(f"outside any attempt: {report.first_line(error)}") from error


def launches_of(
    call: Call, device: torch.device, arch: hardware.Arch, attempts: Attempts
) -> tuple[list[BoundCall], dict[Request, list[Callable]]]:
    """The call with tensors on the device, and each of its launches with a choice (see `requests_of`), for which it is
    run once. Raises RuntimeError where that ended a process before, and GpuLost."""
    name = f"{call.op.name}: {call.op.key(call.args)}"
    if name in attempts.fatal:
        raise RuntimeError(f"{name} {attempts.fatal[name]}")
    with attempts.trying(name):
        compile_all([lambda: requests_of([BoundCall(call, device, _random(device))])], device)
        bound = bind(call, device, arch)
        found = requests_of(bound)
    return bound, found


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


def tune_missing(op: dispatch.Op, args: tuple) -> None:
    """Tune a call that is about to be made on a GPU, where the table has nothing for it: FASTVIT_TUNING=measure. Where
    that fails, it warns, and the heuristics stand."""
    device, key = args[0].device, op.key(args)
    if key in tuned.table(device).ops or key in _given_up:
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


def placeholder(call: Call) -> BoundCall:
    """The call with tensors that hold nothing, on the CPU: for launches that nothing runs."""
    return BoundCall(call, torch.device("cpu"), lambda shape, dtype, name: torch.empty(shape, dtype=dtype))


def planned(call: Call, arch: hardware.Arch) -> dict[Request, dict[Config, float]]:
    """What `tune_call` would measure on a GPU of `arch` for a call's launches, with the estimates it prunes by."""
    with without_gpu(target_of(arch), run=lambda *args, **kwargs: None), torch.no_grad():
        found = requests_of([placeholder(call)])
    return {request: pruned(request, arch, arch.sms) for request in found}

"""Catches what the launchers launch for a GPU that is not here, and compiles it: never runs it.

Launches carry the very specialisation that Triton derives for them; equal ones count once. The configs of a launch that
has a choice are the heuristic's for the architecture's own GPU, not for this machine, and those of the tables that ship
for it; of the cases that ask for it, the tuner's likeliest candidates are launched as well.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import triton
from fastvit.kernels.launch import choice, cost
from fastvit.kernels.launch import request as requests
from fastvit.kernels.launch.absent import target_of, without_gpu
from fastvit.kernels.launch.hardware import ARCHS, Arch
from fastvit.kernels.launch.heuristic import heuristic, library
from fastvit.kernels.launch.request import Config, LibraryConfig, Request
from fastvit.kernels.launch.search import search_space
from triton.runtime.jit import JITFunction

from fastvit.tuned import KERNELS

from . import estimate, read
from .record import Record, Use

# Of a search space, how many configs besides the shipped one are compiled: the best by the estimate.
CANDIDATES = 3


@dataclass(frozen=True)
class Case:
    """Launches of one kind: `call()` calls launchers on meta tensors. candidates: with the tuner's as well."""

    label: str
    call: Callable[[], object]
    candidates: bool = False


@dataclass
class Launch:
    """One kernel in one specialisation, with what `Record` says of a launch."""

    arch: str
    case: str
    kernel: JITFunction | None
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    shipped: bool = True
    uses: dict[Use, None] = field(default_factory=dict)
    error: str = ""


def compiling_for(arch: str, run: Callable = JITFunction.run) -> contextlib.AbstractContextManager:
    """Have launches compile for `arch`, through `run` in place of Triton's own method. Kernels are cached by device:
    each architecture gets a cache of its own."""
    return without_gpu(target_of(ARCHS[arch]), run, arch)


class _Catcher:
    """Collects the launches of one architecture's cases."""

    def __init__(self, arch: str, candidates: bool) -> None:
        self.arch, self.candidates = ARCHS[arch], candidates
        self.tuned = tuned_configs(self.arch)
        self.found: dict[object, Launch] = {}
        self._choice: tuple[Request, Config] | None = None
        self._shipped, self._ignore = True, False

    def collect(self, cases: list[Case]) -> list[Launch]:
        with compiling_for(self.arch.name, self._run()), choice.watching(self._watch):
            # The shipped ones first, so that a candidate of the same code does not pass for new.
            for wanted in (False, True) if self.candidates else (False,):
                for self._case in cases:
                    if wanted <= self._case.candidates:
                        self._only_candidates = wanted
                        self._attempt(self._case.call)
        return list(self.found.values())

    def _attempt(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            case = self._case.label
            self.found[case, str(error)] = Launch(
                self.arch.name, case, None, shipped=not self._only_candidates, error=one_line(error)
            )

    def _watch(self, request: Request, run: Callable[[Config], object]) -> None:
        ours = heuristic(request, self.arch, self.arch.sms)
        twin = [library(request)] if request.kernel == "gemm" else []
        chosen = dict.fromkeys([ours, *twin, *self.tuned.get(_without_shape(request.key), [])])
        if self._only_candidates:
            others = search_space(request, self.arch, self.arch.sms)[1:]
            chosen = sorted(others, key=lambda config: cost.request_seconds(request, config, self.arch))[:CANDIDATES]
        for config in chosen:
            self._choice = request, config
            self._attempt(lambda config=config: run(config))
        self._choice = None
        # What the launcher launches next by itself is the choice for this machine.
        self._ignore = True

    def _run(self):
        def run(kernel, *args, grid, warmup, **kwargs):
            if self._choice is None and self._ignore:
                self._ignore = False
                return
            if self._choice is None and self._only_candidates:
                return
            binder = kernel.device_caches[self.arch.name][-1]
            bound, specialization, options = binder(*args, **kwargs)
            new = Launch(self.arch.name, self._case.label, kernel, args, kwargs, shipped=not self._only_candidates)
            launch = self.found.setdefault((kernel, str(specialization), str(options)), new)
            # Of the library's form these are the small kernels around it, which have no estimate of their own.
            if self._choice is not None and type(self._choice[1]) is not LibraryConfig:
                size = grid(bound) if callable(grid) else grid
                blocks = 1
                for extent in size:
                    blocks *= extent
                launch.uses[estimate.use(*self._choice, blocks, self.arch)] = None

        return run


def tuned_configs(arch: Arch, folder: Path = KERNELS / "tuned") -> dict[str, list[Config]]:
    """What the tables that ship choose on `arch`, by the request without its shape: any shape may get it."""
    capability = "9.4" if arch.backend == "hip" else f"{arch.capability // 10}.{arch.capability % 10}"
    found: dict[str, list[Config]] = {}
    for path in sorted(folder.glob("*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["identity"]["capability"] != capability:
            continue
        for key, entry in table["configs"].items():
            ((kind, values),) = entry["choice"].items()
            found.setdefault(_without_shape(key), []).append(getattr(requests, kind)(**values))
    return found


def _without_shape(key: str) -> str:
    kernel, _, *rest = key.split(" ")
    return " ".join([kernel, *rest])


def launches(cases: Iterable[Case], arch: str, candidates: bool = False) -> list[Launch]:
    """What the cases launch on `arch`, each kernel once per specialisation; a case that raises gives an error.
    candidates: also those of the cases that ask for them."""
    return _Catcher(arch, candidates).collect(list(cases))


def compile_launch(launch: Launch) -> Record:
    """Compile one caught launch and read the result."""
    record = Record(
        launch.arch, launch.case, _name(launch), _options(launch.kwargs), launch.shipped, tuple(launch.uses)
    )
    if launch.error:
        return replace(record, error=launch.error)
    log = io.StringIO()
    with compiling_for(launch.arch), triton.knobs.nvidia.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        try:
            with contextlib.redirect_stdout(log):
                compiled = launch.kernel.run(*launch.args, grid=None, warmup=True, **launch.kwargs)
        except Exception as error:
            return replace(record, error=one_line(error))
    arch = ARCHS[launch.arch]
    facts = (read.nvidia if arch.backend == "cuda" else read.amd)(compiled, arch, log.getvalue())
    return replace(record, **read.products(compiled.asm["ttir"]), **facts)


def compile_all(found: list[Launch]) -> Iterator[Record]:
    """A record of every launch, in their order, as they come: on all cores of this process."""
    # Unset, the newest Triton warns that its default will change.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    _forked[:] = found
    # Triton prints what ptxas said, but only of a kernel that it does not find in its cache: an empty one, of our own.
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        # Forked, the workers know the launches already: functions and modules of the cases need not be pickled.
        pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("fork"), _leave_interrupts)
        try:
            yield from pool.map(_compile_forked, range(len(found)))
        finally:
            pool.shutdown(cancel_futures=True)
            _forked.clear()


_forked: list[Launch] = []


def _compile_forked(index: int) -> Record:
    return compile_launch(_forked[index])


def _leave_interrupts() -> None:
    """The parent answers Ctrl-C; one thread a worker is enough."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def _name(launch: Launch) -> str:
    """The kernel's name, and the names of the functions that it is given: loaders and epilogue of a product."""
    if launch.kernel is None:
        return "(launcher)"
    functions = (launch.kernel, *launch.kwargs.values())
    return " ".join(value.fn.__name__ for value in functions if isinstance(value, JITFunction))


def _options(kwargs: dict) -> str:
    """The sizes and options of a launch; the rest follows from the case."""
    return " ".join(f"{name}={value}" for name, value in kwargs.items() if isinstance(value, int))

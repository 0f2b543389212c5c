"""Compiles ahead of the tuner, in processes of its own, what it will measure.

Compiling takes longer than measuring, and has no need of the GPU. Each worker goes through the same calls in the same
order, on the CPU and for the same target, and compiles its share of the kernels that `tune.tune_call` is about to
launch; Triton keeps them in its cache on disk, where the measuring process finds them. Nothing is handed over but that:
what a worker could not compile, or died of, the measuring process compiles itself, or drops as any bad candidate.

Triton's key of a kernel there is made of its own source, the kernel's, the specialisation of the arguments, the target,
the options and the environment. A worker is this very Python with this environment and sys.path; the target is the
device's own; arguments are tensors of the same shapes and strides, aligned as the device's are; and options follow from
the config.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
import pickle
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from . import tune, tuned, workers  # the ops, so that a worker knows them by their names
from .kernels.launch import hardware
from .kernels.launch.absent import without_gpu


@dataclass(frozen=True)
class Job:
    """What all workers are given: the calls in the order of their measurement; what Triton compiles for; how many
    multiprocessors the device has; the keys of what the table has already; torch's switch for float32 products; how
    many configs of a launch are measured (see `tune.pruned`)."""

    calls: list[tune.Call]
    target: GPUTarget
    sms: int
    settled: frozenset[str]
    float32: str
    keep: int | None = None

    @staticmethod
    def on(
        device: torch.device, calls: list[tune.Call], keep: int | None = None, kinds: Iterable[str] = tuned.KINDS
    ) -> Job:
        """The job for a GPU. kinds: of the decisions that settle what they are of."""
        table = tuned.table(device)
        return Job(
            calls,
            triton.runtime.driver.active.get_current_target(),
            hardware.num_sms(device),
            frozenset().union(*(table.own(kind) for kind in kinds)),
            torch.backends.cuda.matmul.fp32_precision,
            keep,
        )


# --------------------------------------------------------------------------------------------------------------------
# The measuring process


@contextlib.contextmanager
def ahead(job: Job, deadline: float = math.inf) -> Iterator[Iterator[tune.Call]]:
    """Work ahead of the `with` body, which gets the job's calls: each once all its kernels are compiled or failed.

    There is a worker for each core but one, this process's own: on a single core, nothing is done ahead. Asking for a
    call raises `tune.OutOfTime` once `time.monotonic()` has passed `deadline`. The workers are killed when the body
    ends, however it does.
    """
    count = len(os.sched_getaffinity(0)) - 1
    with contextlib.ExitStack() as stack:
        started: list[Connection] = []
        with workers.ignoring_interrupts():
            for share in range(count):
                here, there = workers.CONTEXT.Pipe()
                process = workers.CONTEXT.Process(target=_work, args=(there, share, count), daemon=True)
                process.start()
                stack.callback(workers.kill, process)
                there.close()  # so that a worker's end is seen here
                started.append(here)
        blob = pickle.dumps(job)
        for connection in started:
            with contextlib.suppress(OSError):  # of a worker that is dead, seen below
                connection.send_bytes(blob)
        yield _in_time(job.calls, started, deadline)


def _in_time(calls: list[tune.Call], started: list[Connection], deadline: float) -> Iterator[tune.Call]:
    """Each call, after every worker has said that it is through with it, or has died."""
    alive = set(started)
    for call in calls:
        # The workers are at later calls while this one is measured. Its times are not theirs to disturb: they are taken
        # by the device, between events around a graph's replay, and this process keeps a core.
        for worker in alive.copy():
            left = deadline - time.monotonic()
            try:
                if left < 0 or not worker.poll(None if left == math.inf else left):
                    raise tune.OutOfTime
                worker.recv_bytes()
            except (EOFError, OSError):
                alive.remove(worker)
        yield call


# --------------------------------------------------------------------------------------------------------------------
# A worker


def _work(connection: Connection, share: int, count: int) -> None:
    """Compile every `count`th kernel of the job that comes through the connection, and tell the end of each call."""
    workers.leave_group()
    # Autograd asks for the number of GPUs: none is to be touched here.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the measuring process gives the same ones
    job = pickle.loads(connection.recv_bytes())
    torch.backends.cuda.matmul.fp32_precision = job.float32
    parent, known, dealt = multiprocessing.parent_process(), set(), itertools.cycle(range(count))
    with without_gpu(job.target), torch.no_grad():
        for call in job.calls:
            found = {}
            with contextlib.suppress(Exception):
                found = kernels_of(call, job)
            # All workers find the same kernels in the same order, so that each is dealt to one of them.
            for compile in [found[key] for key in found if key not in known]:
                if not parent.is_alive():
                    return
                if next(dealt) == share:
                    with contextlib.suppress(Exception):  # the measuring process will meet it too, and drop the config
                        compile()
            known |= found.keys()
            with contextlib.suppress(OSError):  # the parent is gone
                connection.send_bytes(b"")


def kernels_of(call: tune.Call, job: Job) -> dict[object, Callable[[], object]]:
    """Every distinct kernel of ours that `tune.tune_call` would launch for a call, with what compiles it: those of the
    op as it is, then those of the configs to measure. Within `without_gpu` only."""
    found = {}

    def record(kernel, *args, grid, warmup, **kwargs) -> None:
        *_, binder = kernel.device_caches[0]
        _, specialization, options = binder(*args, **kwargs)
        compile = partial(launch, kernel, *args, grid=grid, warmup=True, **kwargs)
        found.setdefault((kernel, str(specialization), str(options)), compile)

    launch, arch = JITFunction.run, hardware.current_arch()
    with without_gpu(job.target, record):
        work = tune.placeholder(call)
        if work.key in job.settled:
            return {}
        for request, (run, *_) in tune.requests_of([work]).items():
            for config in () if request.key in job.settled else tune.pruned(request, arch, job.sms, job.keep):
                with contextlib.suppress(Exception):
                    run(config)
    return found

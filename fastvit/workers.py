"""Tasks shared out over processes of which any may die, or never end: what a kernel that goes astray takes with it is
one task. A CUDA context that met an illegal access serves nobody again, so a process that says so is replaced."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

# This process may have a CUDA context or threads, which no fork survives.
CONTEXT = multiprocessing.get_context("spawn")


GPU_LOST = 3  # the exit status of a process that a kernel left without its GPU: another one goes on
TOO_LONG = "did not end within"


class Outcome(NamedTuple):
    """One task, what was made of it, and why nothing was ("" where something was)."""

    task: Any
    result: Any = None
    died: str = ""


def run(
    groups: Iterable[Iterable[Hashable]],
    serve: Callable[[Any], tuple[Any, bool]],
    count: int,
    seconds: float,
    deadline: float | None = None,
) -> Iterator[Outcome]:
    """Outcomes of all tasks, as they come, from `count` processes.

    A process calls serve(task), which can be pickled and returns a result that can, and whether the process is fit for
    another task. Tasks of a group run in their order, groups begin in theirs; a process stays with its group, where it
    has compiled what the next task needs, until that is empty. One task may take `seconds`, then its process is killed.
    Past `deadline` (`time.monotonic()`) no task is started: those have no outcome. All processes end with the iterator.
    """
    left = [list(tasks)[::-1] for tasks in groups]
    busy: dict[Connection, _Worker] = {}
    try:
        while True:
            while len(busy) < count and any(left) and not (deadline and time.monotonic() > deadline):
                worker = _Worker(serve)
                busy[worker.connection] = worker
                worker.take(left, busy.values(), seconds)
            if not busy:
                return
            next_end = min(worker.ends for worker in busy.values())
            ready = wait(list(busy), max(0.0, next_end - time.monotonic()))
            for connection in ready:
                worker = busy[connection]
                try:
                    result, fit = connection.recv()
                except (EOFError, OSError):
                    del busy[connection]
                    yield Outcome(worker.task, died=worker.end(wait=5.0))
                    continue
                outcome = Outcome(worker.task, result)
                if fit and any(left) and not (deadline and time.monotonic() > deadline):
                    worker.take(left, busy.values(), seconds)
                else:
                    del busy[connection]
                    worker.end()
                yield outcome
            for connection, worker in list(busy.items()):
                if connection not in ready and time.monotonic() > worker.ends:
                    del busy[connection]
                    worker.end()
                    yield Outcome(worker.task, died=f"{TOO_LONG} {seconds:g} s")
    finally:
        for worker in busy.values():
            worker.process.kill()  # all at once, then wait for each
        for worker in busy.values():
            worker.end()


class _Worker:
    """One process, its task, and when that must have ended."""

    def __init__(self, serve: Callable):
        self.connection, there = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_work, args=(there, serve), daemon=True)
        with ignoring_interrupts():
            self.process.start()
        there.close()  # so that its end is seen here
        self.group: list | None = None
        self.task, self.ends = None, 0.0

    def take(self, left: list[list], others: Iterable[_Worker], seconds: float) -> None:
        if not self.group:
            taken = [id(other.group) for other in others if other is not self]
            # The first of those that the fewest are at.
            self.group = min(filter(None, left), key=lambda group: taken.count(id(group)))
        self.task, self.ends = self.group.pop(), time.monotonic() + seconds
        with contextlib.suppress(OSError):  # it is dead: seen when its answer is waited for
            self.connection.send(self.task)

    def end(self, wait: float = 0.0) -> str:
        """Kill it if it lives, after so many seconds; how it ended, where it did by itself."""
        self.connection.close()
        self.process.join(wait)
        code = self.process.exitcode
        kill(self.process)
        if code is None:
            return "the process was killed"
        return (
            f"the process was killed by {signal.Signals(-code).name}" if code < 0 else f"the process ended with {code}"
        )


@contextlib.contextmanager
def ignoring_interrupts() -> Iterator[None]:
    """Processes started here ignore Ctrl-C from their first moment on: it is this process that answers it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def kill(process) -> None:
    """End a process that made a group of its own, at once, with whatever it runs."""
    with contextlib.suppress(ProcessLookupError):  # it had no group of its own yet
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def leave_group() -> None:
    """Called by a process as it starts: a group of its own, for `kill`, and an end when the parent's comes."""
    os.setpgrp()
    with contextlib.suppress(AttributeError):  # Linux's: not even a kernel that never ends outlives the parent
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _work(connection: Connection, serve: Callable) -> None:
    leave_group()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        fit = True
        while fit:
            result, fit = serve(connection.recv())
            connection.send((result, fit))

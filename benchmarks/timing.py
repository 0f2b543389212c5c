"""Time and memory of one call, measured the same way for every contestant."""

from __future__ import annotations

import contextlib
import ctypes
import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 50
ROUND_SECONDS = 0.02  # calls are repeated within a round until it lasts this long: a clock's tick must not count


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles of the measurements."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q25": low, "q75": high}


def interleave(calls: dict[str, Callable[[], object]], device: str, seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each of `calls`, one value a round; round i of all of them ran side by side in time.

    Every round runs all of them in a fresh random order, so that what drifts (clocks, temperature, neighbours) falls
    on all alike and rounds can be compared in pairs. As many rounds as fit `seconds`, within MIN_ROUNDS and MAX_ROUNDS.
    """
    timer = _time_cuda if device.startswith("cuda") else _time_cpu
    for call in calls.values():
        timer(call, 1)  # compiles, loads, fills caches
    single = {name: timer(call, 1) for name, call in calls.items()}
    repeats = {name: max(1, math.ceil(ROUND_SECONDS / duration)) for name, duration in single.items()}
    round_seconds = sum(single[name] * repeats[name] for name in calls)
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / round_seconds)))
    order, shuffle = list(calls), random.Random(0).shuffle
    measured = {name: [] for name in calls}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            measured[name].append(timer(calls[name], repeats[name]))
    return measured


def _time_cpu(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _time_cuda(call: Callable[[], object], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


def peak_memory(call: Callable[[], object], device: str) -> int | None:
    """Bytes that one call needs at its peak beyond what was there before it: weights and inputs do not count.

    On a GPU what the allocator handed out; on Linux's CPU the growth of the process's resident set, which also sees
    what a library allocates behind PyTorch's back, to about a megabyte. None where neither can be read.
    """
    call()  # what is set up once does not count
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        with contextlib.suppress(AttributeError, OSError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)  # free memory that malloc holds would hide what the call takes from it
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except OSError:
        return None


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")

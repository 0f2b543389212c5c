"""Time, memory and energy of one call, measured the same way for ours and every peer."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from fastvit.graphs import capture
from fastvit.measure import interval, quartiles

from .schema import Ratio, Spread

# In 12 rounds the sign test allows one round that goes the other way: with 2 % of noise it then finds a difference of
# 5 % in nine runs of ten.
MIN_ROUNDS, MAX_ROUNDS = 12, 51
# The time until a call returns: measured for this fraction of a row's seconds, and over this many calls at least.
HOST_SHARE, HOST_CALLS = 0.25, 5
ROUND_SECONDS = 0.02  # calls are repeated within a round until it lasts this long, to hide the clock's resolution
# A library's threads go on spinning after its call, on cores that the next call needs: ONNX Runtime's doubled the time
# of the call after them, PyTorch's own slowed ONNX Runtime by a sixth.
PAUSE_SECONDS = 0.03
STEADY, STEADY_WITHIN, MAX_WARM_UPS = 3, 0.02, 20  # warmed up when the last STEADY times fell by less than 2 %
ENERGY_SECONDS = 1.0  # the energy counter moves in steps of some ten milliseconds
SETTLE_SECONDS = 0.5  # a GPU's first milliseconds run at clocks that its power limit does not sustain

Call = Callable[[], object]
Timer = Callable[[Call, int], float]  # (call, repeats) -> seconds of one call


def pin_threads() -> int:
    """Let PyTorch use as many threads as this process may use cores, and no more; returns the number."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(cores)
    return cores


def pin_precision() -> None:
    """Let cuDNN's convolutions in float32 use TF32 only where matrix products may: by default convolutions use it and
    products do not, and a peer's patch embedding would differ from ours."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"


def spread(values: Sequence[float]) -> Spread:
    """Median, quartiles and number of the measurements."""
    low, median, high = quartiles(values)
    return Spread(median, low, high, len(values))


def ratio(values: Sequence[float]) -> Ratio:
    """The same for paired ratios, MIN_ROUNDS or more, with the interval that their verdict rests on."""
    low, median, high = quartiles(values)
    return Ratio(median, low, high, len(values), *interval(values))


def interleave(
    calls: dict[str, Call], timer: Timer, seconds: float
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Seconds per call of each of `calls`, one value a round; and what a call raised, which is then left out.

    Every round runs all of them in a fresh random order, so that drift (clocks, temperature, other programs) affects
    all alike, and round i of one can be compared with round i of another. After a warm-up of each, rounds are started
    for `seconds`, at least MIN_ROUNDS and at most MAX_ROUNDS of them.
    """
    repeats: dict[str, int] = {}
    failures: dict[str, Exception] = {}
    for name, call in calls.items():
        try:
            single = warm_up(call, timer, seconds / (4 * len(calls)))
        except Exception as error:
            failures[name] = error.with_traceback(None)  # whose frames hold the call's tensors
            continue
        repeats[name] = _repeats(single)
    order, shuffle = list(repeats), random.Random(0).shuffle
    measured: dict[str, list[float]] = {name: [] for name in order}
    start = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - start >= seconds:
            break
        shuffle(order)
        for name in list(order):
            try:
                measured[name].append(timer(calls[name], repeats[name]))
            except Exception as error:
                failures[name] = error.with_traceback(None)
                order.remove(name)
                del measured[name]
    return measured, failures


def interleave_seconds(single: float, calls: int, seconds: float, device: str) -> float:
    """About how long `interleave` takes for so many calls of `single` seconds each."""
    pause = 0.0 if device.startswith("cuda") else PAUSE_SECONDS
    one = _repeats(single) * single + pause
    warming = 2 * (single + pause) + min((STEADY + 1) * one, one + seconds / (4 * calls))
    rounds = min(max(seconds, MIN_ROUNDS * calls * one), MAX_ROUNDS * calls * one)
    return calls * warming + rounds


def warm_up(call: Call, timer: Timer, seconds: float) -> float:
    """Run `call` until its time no longer falls, for `seconds` at most; returns the seconds of a call by then.

    Its time no longer falls when none of the last STEADY times is clearly below the best one before them.
    """
    timer(call, 1)  # compiles, loads, fills caches
    repeats = _repeats(timer(call, 1))
    start = time.perf_counter()
    times = [timer(call, repeats)]
    while len(times) < MAX_WARM_UPS and time.perf_counter() - start < seconds:
        times.append(timer(call, repeats))
        if len(times) > STEADY and min(times[-STEADY:]) >= (1 - STEADY_WITHIN) * min(times[:-STEADY]):
            break
    return statistics.median(times[-STEADY:])


def _repeats(single: float) -> int:
    return max(1, math.ceil(ROUND_SECONDS / max(single, 1e-7)))


# --------------------------------------------------------------------------------------------------------------------
# Clocks


def timer(device: str) -> Timer:
    """Seconds of a call on the device, from the first of its repeats to the end of the last: by CUDA events, waits for
    the host included, or the system's clock."""
    return _events if device.startswith("cuda") else _wall


def _wall(call: Call, repeats: int) -> float:
    time.sleep(PAUSE_SECONDS)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _events(call: Call, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


def host_seconds(call: Call, seconds: float) -> list[float]:
    """Seconds until a call returns, started on an idle GPU: what the launches cost the host. One value a call, of as
    many calls as fit `seconds`, HOST_CALLS at least and MAX_ROUNDS at most; not repeated within a round, because each
    waits for the GPU."""
    found: list[float] = []
    began = time.perf_counter()
    while len(found) < HOST_CALLS or (len(found) < MAX_ROUNDS and time.perf_counter() - began < seconds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return found


def steady_seconds(call: Call, device: str | torch.device, seconds: float = SETTLE_SECONDS) -> float:
    """Seconds of one call at sustained clocks: it first runs for `seconds`, then is timed in windows that together take
    as long again, each long enough to hide the cost of a launch; the median of the windows. Measured by CUDA events on
    a GPU, else by the system's clock.

    Raises what the call raises.
    """
    device = torch.device(device)
    clock = timer(device.type)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        clock(call, 1)
        single = clock(call, 1)
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            single = clock(call, _repeats(single))
        repeats = _repeats(single)
        windows = max(3, math.ceil(seconds / max(repeats * single, ROUND_SECONDS)))
        return statistics.median(clock(call, repeats) for _ in range(windows))


def replayed(calls: dict[str, Call], times: int) -> tuple[dict[str, Call], dict[str, Exception]]:
    """Each of `calls`, repeated `times` times, captured as a CUDA graph: functions that replay them; and the exceptions
    of those that cannot be captured.

    The graphs share one memory pool, so that together they need about as much as the largest alone. They may be
    replayed in any order: a graph reads only its inputs, which lie outside the pool, and what it wrote in the same
    replay. What a call returns is dropped during capture, so that the next graph may reuse its memory.
    """
    found: dict[str, Call] = {}
    failures: dict[str, Exception] = {}

    def attempt(name: str, work: Callable[[], object]) -> object:
        try:
            return work()
        except Exception as error:
            failures[name] = error.with_traceback(None)  # whose frames hold the call's tensors

    for name, call in calls.items():  # all before the first capture, which keeps its memory
        attempt(name, partial(_set_up, call, times))
    torch.cuda.empty_cache()
    pool = torch.cuda.graph_pool_handle()
    for name, call in calls.items():
        if name in failures:
            continue
        replay = attempt(name, partial(capture, partial(_repeat, call, times), pool))
        if name in failures:
            pool = torch.cuda.graph_pool_handle()  # the old one may still be marked as recording
        else:
            found[name] = replay
    return found, failures


def _set_up(call: Call, times: int) -> None:
    """Run the calls before capture: what happens only once for each input (compiling, allocation) must not be
    captured."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        _repeat(call, max(3, times))
    current.wait_stream(stream)


def _repeat(call: Call, times: int) -> None:
    for _ in range(times):
        call()


# --------------------------------------------------------------------------------------------------------------------
# Caches, memory, energy


def cache_bytes(device: str) -> int:
    """Size of the last cache before memory: a GPU's L2, a processor's last level (32 MiB where it does not say)."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            text = path.read_text().strip()
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes, default=32 << 20)


def peak_memory(call: Call, device: str) -> int | None:
    """Bytes that one call needs at its peak beyond what was allocated before it: weights and inputs do not count.

    On a GPU by PyTorch's allocator; on a CPU under Linux by the growth of the process's resident set, which includes
    what other libraries allocate, exact to about a megabyte. None where neither can be read.
    """
    call()  # so that what is allocated only once does not count
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


def energy_counter(device: str) -> Callable[[], float] | None:
    """A function that reads the joules that the GPU has used so far; None without a GPU or NVML's package (pynvml),
    and where the GPU does not count."""
    if not device.startswith("cuda") or importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        # NVML numbers GPUs its own way; the name that it shares with CUDA is the UUID.
        gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
    except (pynvml.NVMLError, AttributeError):
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000


def joules(call: Call, timer: Timer, counter: Callable[[], float], single: float) -> float:
    """Joules of one call, idle power included, from the counter before and after a second of calls or more."""
    calls = max(1, math.ceil(ENERGY_SECONDS / max(single, 1e-7)))
    before = counter()
    timer(call, calls)
    return (counter() - before) / calls

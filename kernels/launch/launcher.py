"""Launches kernels, by Triton's own call; whoever records launches (see `replay`) is told of each."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from . import rehearsal

# recorder(kernel, compiled kernel, grid, args, constants): of this thread's launches.
Recorder = Callable[[JITFunction, CompiledKernel, tuple, tuple, dict], None]

here = threading.local()  # .recorder, if any
_one_at_a_time = threading.RLock()


def launch(kernel: JITFunction, grid: tuple[int, int, int], device: torch.device) -> Callable[..., object]:
    """kernel[grid] on `device`, where the tensors are: what to call with the kernel's arguments, and by name with its
    constants in their order, then num_warps and num_stages.

    The arguments are tensors, numbers, None, and tuples of these.
    """
    going = rehearsal.current()
    if going is not None:
        return going.launch(kernel)
    if not isinstance(kernel, JITFunction):
        return _told(kernel, grid, _one_at_a_time)  # the interpreter knows one launch only
    if device.index not in (None, triton.runtime.driver.active.get_current_device()):
        return _told(kernel, grid, torch.cuda.device(device))
    return kernel[grid] if getattr(here, "recorder", None) is None else _told(kernel, grid, contextlib.nullcontext())


def _told(kernel: JITFunction, grid: tuple[int, int, int], within: contextlib.AbstractContextManager) -> Callable:
    def run(*args, **constants) -> None:
        with within:
            compiled = kernel[grid](*args, **constants)
        recorder: Recorder | None = getattr(here, "recorder", None)
        if recorder is not None:
            recorder(kernel, compiled, grid, args, constants)

    return run

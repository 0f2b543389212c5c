"""Launches kernels, by Triton's own call; whoever records launches (see `replay`) is told of each."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

# recorder(kernel, compiled kernel, grid, args, constants): of this thread's launches.
Recorder = Callable[[JITFunction, CompiledKernel, tuple, tuple, dict], None]

here = threading.local()  # .recorder, if any
_one_at_a_time = threading.RLock()


def launch(kernel: JITFunction, grid: tuple[int, int, int], args: tuple, constants: dict, device: torch.device) -> None:
    """Launch kernel[grid](*args, **constants) on `device`, where the tensors are.

    args: the kernel's arguments before its constants: tensors, numbers, None, and tuples of these. constants: its
    constants in their order, then num_warps and num_stages.
    """
    if not isinstance(kernel, JITFunction):
        with _one_at_a_time:  # the interpreter knows one launch only
            compiled = kernel[grid](*args, **constants)
    elif device.index not in (None, triton.runtime.driver.active.get_current_device()):
        with torch.cuda.device(device):
            return launch(kernel, grid, args, constants, device)
    else:
        compiled = kernel[grid](*args, **constants)
    recorder: Recorder | None = getattr(here, "recorder", None)
    if recorder is not None:
        recorder(kernel, compiled, grid, args, constants)

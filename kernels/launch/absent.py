"""A stand-in for a GPU that is not there: Triton specialises, compiles and caches for it, and launches nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from . import replay  # noqa: F401, which has to see Triton's own method before it is replaced
from .hardware import ARCHS, Arch


class AbsentDriver:
    """Answers for a GPU of `target` as far as choosing a config, compiling and autotuning ask. device: its name, by
    which Triton caches kernels."""

    def __init__(self, target: GPUTarget, device: int | str = 0):
        self._target, self._device = target, device

    def is_active(self) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int | str:
        return self._device

    def get_current_stream(self, device=None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable:
        def run_once(call, quantiles=None, **kwargs):
            call()
            return [0.0, 0.0, 0.0]  # to an autotuner all configs are the same: the first wins

        return run_once


def target_of(arch: Arch) -> GPUTarget:
    """What Triton compiles for to run on `arch`."""
    return GPUTarget(arch.backend, arch.capability, arch.warp_size)


ABSENT_H100 = AbsentDriver(target_of(ARCHS["sm_90"]))


@contextlib.contextmanager
def launching_by(run: Callable) -> Iterator[None]:
    """In the `with` body launches go to run(kernel, *args, grid, warmup, **kwargs) in place of Triton's own method."""
    before, JITFunction.run = JITFunction.run, run
    try:
        yield
    finally:
        JITFunction.run = before


@contextlib.contextmanager
def without_gpu(target: GPUTarget, run: Callable = JITFunction.run, device: int | str = 0) -> Iterator[None]:
    """`launching_by`, and Triton takes `target` for its device, named `device`."""
    driver, before = triton.runtime.driver, triton.runtime.driver._active
    driver.set_active(AbsentDriver(target, device))
    try:
        with launching_by(run):
            yield
    finally:
        driver._active = before

"""Which config a launch gets: a table's answer where one is installed and valid, else the heuristic's; remembered, so
that a launch pays for a dictionary's lookup. Launches can be watched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import triton

from . import hardware
from .heuristic import heuristic
from .request import Config, Request
from .validity import why_invalid

Lookup = Callable[[Request, torch.device], Config | None]
Repeat = Callable[[Config], tuple[torch.Tensor, ...]]
Watcher = Callable[[Request, Repeat], None]

REMEMBERED = 4096  # choices, and prepared launches, that are kept; then all are forgotten

_lookup: Lookup | None = None
_watcher: Watcher | None = None
_chosen: dict[tuple, Config] = {}


def set_table(lookup: Lookup | None) -> None:
    """Have `choose` ask lookup(request, device) first, which returns a config or None; None: the heuristic alone."""
    global _lookup
    _lookup = lookup
    _chosen.clear()


def choose(request: Request, device: torch.device, repeat: Repeat | None = None) -> Config:
    """The config to launch `request` with on `device`. repeat: what makes this very launch with a config, for a watcher
    (see `watching`), who is shown both first."""
    if _watcher is not None and repeat is not None:
        _watcher(request, repeat)
    # Compiled ahead of time, one process serves several architectures, each with a driver of its own.
    key = request, device, triton.runtime.driver.active
    config = _chosen.get(key)
    if config is None:
        if len(_chosen) >= REMEMBERED:
            _chosen.clear()
        config = _chosen[key] = _decide(request, device)
    return config


def _decide(request: Request, device: torch.device) -> Config:
    if device.index not in (None, triton.runtime.driver.active.get_current_device()):
        with torch.cuda.device(device):  # which may be of another architecture
            return _decide(request, device)
    arch = hardware.current_arch()
    if _lookup is not None:
        config = _lookup(request, device)
        if config is not None and not why_invalid(config, request, arch):
            return config
    return heuristic(request, arch, hardware.num_sms(device))


@contextlib.contextmanager
def watching(callback: Watcher) -> Iterator[None]:
    """In the `with` body, callback(request, repeat) is called before each launch that has a choice.

    repeat(config) launches that very piece of work with another config, any number of times, also later, and returns
    the tensors it wrote: the same ones every time where the launch fills tensors that its caller made.
    """
    global _watcher
    before, _watcher = _watcher, callback
    try:
        yield
    finally:
        _watcher = before

"""Which config a launch gets: a table's answer where one is installed and valid, else what needs no measuring;
remembered, so that a launch pays for a dictionary's lookup. Launches can be watched.

Unmeasured, a product is the library's (`LibraryConfig`) where ours has no reason to be faster: gradients of weights,
float32, and what `cost` does not expect to win by a tenth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import triton

from . import cost, hardware, rehearsal
from .heuristic import heuristic, library
from .request import Config, LibraryConfig, Request
from .validity import why_invalid

Lookup = Callable[[Request, torch.device], Config | None]
Repeat = Callable[[Config], tuple[torch.Tensor, ...]]
Watcher = Callable[[Request, Repeat], None]

REMEMBERED = 4096  # choices that are kept; then all are forgotten

EXPECTED_GAIN = 1.1  # of our product over the library's form, for ours to run unmeasured

_lookup: Lookup | None = None
_library = False
_forced: Callable[[Request], Config | None] | None = None
_watcher: Watcher | None = None
_chosen: dict[tuple, Config] = {}
_followers: list[Callable[[], None]] = []
_changes = 0


def on_change(callback: Callable[[], None]) -> None:
    """Have callback() called whenever other configs may be chosen than before."""
    _followers.append(callback)


def changes() -> int:
    """How many changes there were: what was begun before one is not to be kept after it."""
    return _changes


def _changed() -> None:
    global _changes
    _changes += 1
    for follower in _followers:
        follower()


on_change(_chosen.clear)


def watched() -> bool:
    """Whether somebody is shown each launch that has a choice, or none is made."""
    return _watcher is not None or rehearsal.current() is not None


def set_table(lookup: Lookup | None, library: bool = False) -> None:
    """Have `choose` ask lookup(request, device) first, which returns a config or None; None: ask no one. library:
    whether a product may be the library's."""
    global _lookup, _library
    _lookup, _library = lookup, library
    _changed()


def choose(request: Request, device: torch.device, repeat: Repeat | None = None) -> Config:
    """The config to launch `request` with on `device`. repeat: what makes this very launch with a config, for a watcher
    (see `watching`), who is shown both first."""
    going = rehearsal.current()
    if going is not None:
        device = going.device
    elif _watcher is not None and repeat is not None:
        _watcher(request, repeat)
    # Compiled ahead of time, one process serves several architectures, each with a driver of its own.
    key = request, device, triton.runtime.driver.active
    config = _chosen.get(key)
    if config is None:
        if len(_chosen) >= REMEMBERED:
            _chosen.clear()
        before = _changes
        config = _decide(request, device)
        if _changes == before:
            _chosen[key] = config
    if going is not None:
        going.chosen(request, config, _lookup is not None and _lookup(request, device) == config)
    return config


def _decide(request: Request, device: torch.device) -> Config:
    if device.index not in (None, triton.runtime.driver.active.get_current_device()):
        with torch.cuda.device(device):  # which may be of another architecture
            return _decide(request, device)
    if _forced is not None and (forced := _forced(request)) is not None:
        return forced
    arch = hardware.current_arch()
    if _lookup is not None:
        config = _lookup(request, device)
        permitted = _library or type(config) is not LibraryConfig
        if config is not None and permitted and not why_invalid(config, request, arch):
            return config
    sms = hardware.num_sms(device)
    return unmeasured(request, arch, sms) if _library else heuristic(request, arch, sms)


def unmeasured(request: Request, arch: hardware.Arch, sms: int) -> Config:
    """The config for a request without measuring, ours or the library's."""
    ours = heuristic(request, arch, sms)
    if request.kernel != "gemm":
        return ours
    twin = library(request)
    if request.parts.epilogue.sums or request.dtype.itemsize > 2:
        return twin
    seconds, twin_seconds = (cost.request_seconds(request, config, arch, sms) for config in (ours, twin))
    return ours if EXPECTED_GAIN * seconds <= twin_seconds else twin


@contextlib.contextmanager
def forcing(config_of: Callable[[Request], Config | None]) -> Iterator[None]:
    """In the `with` body a launch gets config_of(request), valid or not, whatever would be chosen; None: that."""
    global _forced
    before, _forced = _forced, config_of
    _changed()
    try:
        yield
    finally:
        _forced = before
        _changed()


def by_library() -> contextlib.AbstractContextManager[None]:
    """In the `with` body every product is the library's."""
    return forcing(lambda request: library(request) if request.kernel == "gemm" else None)


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

"""A call gone through without its launches, on tensors without memory: whoever asks is told of each."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from triton.runtime.jit import JITFunction

from .request import Config, LibraryConfig, Request

_here = threading.local()


class Rehearsal(NamedTuple):
    """device: what is chosen for. chosen(request, config, measured): of each launch that has a choice, before it;
    measured: the config is a table's. launched(kernel, args, constants): in place of each launch of a kernel."""

    device: torch.device
    chosen: Callable[[Request, Config, bool], object]
    launched: Callable[[JITFunction, tuple, dict], object]

    def launch(self, kernel: JITFunction) -> Callable[..., None]:
        """What to call with the kernel's arguments in place of launching it."""

        def told(*args, **constants) -> None:
            self.launched(kernel, args, constants)

        return told


def current() -> Rehearsal | None:
    """This thread's, if it goes through a call."""
    return getattr(_here, "rehearsal", None)


@contextlib.contextmanager
def rehearsing(rehearsal: Rehearsal) -> Iterator[None]:
    """In the `with` body this thread makes no launch of a kernel."""
    _here.rehearsal = rehearsal
    try:
        yield
    finally:
        _here.rehearsal = None


@contextlib.contextmanager
def listing(device: torch.device) -> Iterator[list[str]]:
    """A line for each launch of the `with` body, as it would be on `device`: what was chosen for it, where there is a
    choice; a product of the library's has one, and each kernel around it."""
    lines: list[str] = []
    ours = False  # chosen for the next launch, whose line is there

    def chosen(request: Request, config: Config, measured: bool) -> None:
        nonlocal ours
        ours = type(config) is not LibraryConfig
        lines.append(f"{request.key}: {config if ours else 'the library'}{', measured' if measured else ''}")

    def launched(kernel: JITFunction, args: tuple, constants: dict) -> None:
        nonlocal ours
        if not ours:
            parts = [constants[role].fn.__name__ for role in ("LOAD", "SECTION", "EPILOGUE") if role in constants]
            name = kernel.fn.__name__
            lines.append(f"{name}({', '.join(parts)})" if parts else name)
        ours = False

    with rehearsing(Rehearsal(device, chosen, launched)):
        yield lines

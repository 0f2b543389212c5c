"""A call gone through without its launches, on tensors without memory: what it would launch on a device is noted."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch

_here = threading.local()


class Rehearsal:
    """launches: a line for each launch on `device`, in order; of those with a choice, with the choice."""

    def __init__(self, device: torch.device):
        self.device = device
        self.launches: list[str] = []
        self._chosen = False  # for the next launch, whose line is there already

    def choice(self, line: str, launches: bool) -> None:
        """Note a launch that has a choice; launches: it comes next, and is not the library's."""
        self.launches.append(line)
        self._chosen = launches

    def launch(self, kernel) -> Callable[..., None]:
        """Note a launch in place of making it."""
        if not self._chosen:
            self.launches.append(kernel.fn.__name__)
        self._chosen = False
        return lambda *args, **constants: None


def current() -> Rehearsal | None:
    """This thread's, if it goes through a call."""
    return getattr(_here, "rehearsal", None)


@contextlib.contextmanager
def rehearsing(device: torch.device) -> Iterator[Rehearsal]:
    """In the `with` body this thread's launches are noted as they would be on `device`, and not made."""
    _here.rehearsal = Rehearsal(device)
    try:
        yield _here.rehearsal
    finally:
        _here.rehearsal = None

"""Triton's interpreter, repaired and guarded: runs the kernels on a CPU and finds their faults.

Stock, the interpreter computes bfloat16 on raw bit patterns, casts wrongly and lets a kernel read and write any
address. `install` makes its numbers those of a GPU (`repair`) and every launch checked (`guard`).
"""

from __future__ import annotations

import contextlib
import functools
import os

import torch

GUARDS = ("off", "bounds", "race")

_installed: str | None = None


def install(guard: str = "race") -> None:
    """Repair Triton's interpreter and guard every launch; a second call changes nothing.

    guard: "off" checks nothing; "bounds" raises `guard.KernelFault` when a kernel touches memory outside the tensors
    it was given, and hands masked-off lanes of a load without `other=` NaN or the largest integer; "race" also raises
    when two programs touch the same element, one of them writing.

    Raises ValueError for an unknown guard, RuntimeError when TRITON_INTERPRET=1 was not in the environment before
    Triton was imported, when another guard is installed already, or when this Triton's interpreter is not one known.
    """
    global _installed
    if guard not in GUARDS:
        raise ValueError(f"install: unknown guard {guard!r}, expected one of {', '.join(GUARDS)}")
    if _installed == guard:
        return
    if _installed is not None:
        raise RuntimeError(f"install: guard {_installed!r} is installed already, cannot change it to {guard!r}")
    if os.environ.get("TRITON_INTERPRET", "").lower() not in ("1", "true", "on", "yes", "y"):
        raise RuntimeError("install: set TRITON_INTERPRET=1 in the environment before Triton is imported")

    from . import guard as guard_module
    from . import repair

    repair.install()
    if guard != "off":
        guard_module.install(races=guard == "race")
    _installed = guard


def repaired() -> None:
    """Repair the interpreter, without a guard, unless that is done: what a launch there needs. Raises as `install`."""
    if _installed is None:
        install("off")


@contextlib.contextmanager
def poison_empty():
    """Inside the `with` body, fill what `torch.empty` and its kin return with NaN, or the largest integer.

    A kernel that reads memory that nothing wrote then shows it in its result.
    """

    def poisoned(make):
        @functools.wraps(make)
        def wrapper(*args, **kwargs):
            tensor = make(*args, **kwargs)
            with torch.no_grad():
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
                elif tensor.dtype != torch.bool and not tensor.is_complex():
                    tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return wrapper

    places = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]
    originals = [(owner, name, getattr(owner, name)) for owner, name in places]
    for owner, name, original in originals:
        setattr(owner, name, poisoned(original))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)

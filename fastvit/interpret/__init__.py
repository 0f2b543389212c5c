"""Triton's interpreter, repaired and sanitized: runs the kernels on a CPU and finds their faults.

Stock, the interpreter computes bfloat16 on raw bit patterns, casts wrongly and lets a kernel read and write any
address. `install` makes its numbers those of a GPU (`repair`) and every launch checked (`sanitizer`).
"""

from __future__ import annotations

import os

SANITIZERS = ("off", "bounds", "race")

_installed: str | None = None


def install(sanitizer: str = "race") -> None:
    """Repair Triton's interpreter and check every launch; a second call changes nothing.

    sanitizer: "off" checks nothing; "bounds" raises `sanitizer.KernelFault` when a kernel touches memory outside the
    tensors it was given, and hands masked-off lanes of a load without `other=` NaN or the largest integer; "race" also
    raises when two programs touch the same element, one of them writing.

    Raises ValueError for an unknown sanitizer, RuntimeError when TRITON_INTERPRET=1 was not in the environment before
    Triton was imported, when another sanitizer is installed already, or when this Triton's interpreter is unknown.
    """
    global _installed
    if sanitizer not in SANITIZERS:
        raise ValueError(f"install: unknown sanitizer {sanitizer!r}, expected one of {', '.join(SANITIZERS)}")
    if _installed == sanitizer:
        return
    if _installed is not None:
        raise RuntimeError(f"install: sanitizer {_installed!r} is installed already, cannot change it to {sanitizer!r}")
    if os.environ.get("TRITON_INTERPRET", "").lower() not in ("1", "true", "on", "yes", "y"):
        raise RuntimeError("install: set TRITON_INTERPRET=1 in the environment before Triton is imported")

    from . import repair
    from .sanitizer import sanitize_launches

    repair.install()
    if sanitizer != "off":
        sanitize_launches(races=sanitizer == "race")
    _installed = sanitizer


def repaired() -> None:
    """Repair the interpreter, unless that is done: what a launch there needs. No sanitizer. Raises as `install`."""
    if _installed is None:
        install("off")

"""What every command writes with: tables, files, a progress bar; errors and names on one line."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO


class Table:
    """Rows of text in aligned columns, printed as they come; the widths are given first, so that nothing waits."""

    def __init__(self, columns: dict[str, int], out: TextIO | None = None):
        """columns: heading -> width; a negative width aligns left."""
        self._widths = [(abs(width), width < 0) for width in columns.values()]
        self._out = out
        self.row(*columns)
        self.row(*("-" * abs(width) for width in columns.values()))

    def row(self, *cells: object) -> None:
        """Print one row; a cell wider than its column pushes the rest to the right rather than being cut."""
        padded = (
            str(cell).ljust(width) if left else str(cell).rjust(width)
            for cell, (width, left) in zip(cells, self._widths, strict=True)
        )
        print("  ".join(padded).rstrip(), file=self._out or sys.stdout, flush=True)


def note(text: str) -> None:
    """Say on stderr, at once, something about the run."""
    print(text, file=sys.stderr, flush=True)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, or what it links to, by way of a file beside it: no reader ever sees half of it."""
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file beside `path`, named with a dot before it, that takes its place when the `with` body is through."""
    path = Path(os.path.realpath(path))
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o666 & ~_umask())  # mkstemp's files are for the owner alone
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        raise


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity, which JSON has not, are refused."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def lines_of(path: Path) -> set[str]:
    """The different lines of a file; none where there is no file."""
    with contextlib.suppress(FileNotFoundError):
        return set(path.read_text(encoding="utf-8", errors="surrogateescape").splitlines())
    return set()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def progress(items: Iterable, total: int, what: str) -> Iterator:
    """`items`, with a progress bar on stderr when that is a terminal and rich is installed."""
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console
            from rich.progress import track

            items = track(items, total=total, description=what, console=Console(stderr=True), transient=True)
    yield from items


def version_of(package: str) -> str | None:
    """The installed version of a package, read without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_line(error: BaseException) -> str:
    """An exception on one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['(no message)'])[0]}"


def slug(name: str) -> str:
    """`name` as part of a path: lower-case letters and digits, hyphens between."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

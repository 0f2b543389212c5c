"""What is made of a run: a table in the terminal, CSV, pictures, one HTML page, and the READMEs' tables."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fastvit.report import write_atomically

from ..schema import Run
from .flat import as_csv
from .page import CAPTIONS, render
from .table import Table, print_run

__all__ = ["Table", "print_run", "write"]

CSV, PAGE = "bench.csv", "index.html"


def write(run: Run, folder: str | Path) -> list[Path]:
    """Write bench.csv, the pictures and index.html of a run into an existing folder; returns what was written.

    The same run gives the same bytes. Without matplotlib there are no pictures. Raises OSError.
    """
    folder = Path(folder)
    drawn = {}
    if importlib.util.find_spec("matplotlib"):
        from .pictures import pictures

        drawn = pictures(run)
    # Pictures of an earlier run in the folder would pass for this one's.
    for stale in {path for stem in CAPTIONS for path in folder.glob(f"{stem}*.png")} - {
        folder / name for name in drawn
    }:
        stale.unlink()
    files = {CSV: as_csv(run).encode(), **drawn, PAGE: render(run, drawn).encode()}
    for name, data in files.items():
        write_atomically(folder / name, data)
    return [folder / name for name in files]

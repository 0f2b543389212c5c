"""What is made of a run of `fastvit bench --baselines`: a Markdown table and a picture."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import fastvit
from fastvit.report import write_atomically

from ..schema import Row, Run
from ..top1 import FIGURES, SIZE, Figure
from .words import device, number, rate, versions

FILE, TABLE, PICTURE = "baselines.json", "baselines.md", "baselines.png"
FROZEN = "frozen "  # before a network's name: our model, frozen


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def is_vit(network: str) -> bool:
    return network in fastvit.list_models()


@dataclass(frozen=True)
class Speed:
    """The fastest that an entry was in a mode, over the rows of a run: in images a second, and the row."""

    rate: float
    row: Row

    def __str__(self) -> str:
        return f"{number(self.rate)} ({self.row.dtype}, batch {self.row.batch})"


def fastest(run: Run, mode: str, name: str) -> Speed | None:
    """None where the entry has no time in this mode."""
    rows = [row for row in run.rows if row.mode == mode and name in row.entries and row.entries[name].seconds]
    return max((Speed(rate(row, row.entries[name])[0], row) for row in rows), key=lambda s: s.rate, default=None)


def write(run: Run, folder: Path) -> list[Path]:
    """Write the table and the picture of a run into an existing folder; returns what was written. The same run gives
    the same bytes. Without matplotlib, and before anything was timed, there is no picture. Raises OSError."""
    files = {TABLE: f"# {title(run)}\n\n{markdown(run)}\n".encode()}
    if installed("matplotlib"):
        from . import pictures

        if found := pictures.accuracy_against_speed(run, points(run), is_vit):
            files[PICTURE] = found
    if PICTURE not in files:  # that of an earlier run would pass for this one's
        (folder / PICTURE).unlink(missing_ok=True)
    for name, data in files.items():
        write_atomically(folder / name, data)
    return [folder / name for name in files]


def title(run: Run) -> str:
    return f"Baselines on {device(run)}"


def points(run: Run) -> dict[str, list[tuple[Figure, float, float | None]]]:
    """By mode: each figure whose network was timed, its images a second, and those of the network frozen."""
    found = {}
    for mode in dict.fromkeys(row.mode for row in run.rows):
        speeds = [(figure, *(fastest(run, mode, kind + figure.network) for kind in ("", FROZEN))) for figure in FIGURES]
        found[mode] = [(figure, s.rate, frozen and frozen.rate) for figure, s, frozen in speeds if s]
    return {mode: some for mode, some in found.items() if some}


def markdown(run: Run) -> str:
    """The table, and what must be known to read it."""
    columns = {"inference": "", "inference, frozen": FROZEN, "training step": ""}
    lines = [["network", "weights of the top-1", "top-1, %", *(f"{name}, images/s" for name in columns), "source"]]
    lines.append(["---", "---", "---:", *["---:"] * len(columns), "---"])
    for figure in FIGURES:
        modes = [fastest(run, name.split()[0].rstrip(","), kind + figure.network) for name, kind in columns.items()]
        if any(modes):
            weights = f"`{figure.network}.{figure.weights}`"
            lines.append([figure.label, weights, f"{figure.top1:.1f}", *(str(s or "") for s in modes), figure.source])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    undone = "".join(f"\n\nNot timed: {row.id}: {row.reason}." for row in run.rows if row.status != "timed")
    return f"{_READ}\n\nMeasured {run.started[:10]} with {_versions(run)}.\n\n{table}{undone}"


def _versions(run: Run) -> str:
    timm = run.environment.get("packages", {}).get("timm")
    return versions(run) + (f", timm {timm}" if timm else "")


_READ = (
    f"Images a second measured on this machine at {SIZE} pixels, random weights, the median of rounds in which all "
    "networks took turns, each at the fastest of the dtypes and batches that were tried; top-1 on ImageNet as "
    "published, not measured. A training step is a forward and a backward pass. The convolutional networks are timm's, "
    "eager, the ViTs fastvit's; frozen is `fastvit.freeze` on PyTorch alone, for which the convolutional networks have "
    "no counterpart here: compare the first column."
)

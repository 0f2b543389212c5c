"""The table in the terminal, row by row as a run goes. Coloured by rich where out is a terminal; else plain text."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from typing import TextIO

from ..schema import OURS, Row, Run
from .words import COLUMNS, aside, cells, outcome

WIDTHS = dict(zip(COLUMNS, (-20, 9, 19, 8, 8, 8, 9, 8), strict=True))  # negative: aligned left
STYLES = {"faster": "green", "slower": "yellow", "tie": "dim"}
WIDEST = 120


class Table:
    """Prints rows to `out`, sys.stdout if not given. Columns that do not fit the terminal are left out, from the right;
    the results file has them all."""

    def __init__(self, out: TextIO | None = None):
        self._out = out or sys.stdout
        self._console = None
        self._absent: set[tuple[str, str]] = set()
        width = WIDEST
        if self._out.isatty():
            width = shutil.get_terminal_size((80, 24)).columns
            if importlib.util.find_spec("rich"):
                from rich.console import Console

                self._console = Console(file=self._out, highlight=False)
        self._columns = _that_fit(width)
        self._line("  " + _aligned(dict(zip(COLUMNS, COLUMNS, strict=True)), self._columns), "bold")

    def row(self, row: Row) -> None:
        """Print a case, then a line for each entry, with the reason instead of the speed for those that failed. That a
        peer is absent, and why, is printed once in a run."""
        facts = [row.id, f"{row.tokens} tokens"]
        if row.limit is not None:
            facts.append(f"error limit {row.limit:.1e}")
        self._line("  ".join(facts), "bold")
        if row.status != "timed":
            self._line(f"  {row.status}: {row.reason}", "red" if row.status != "skipped" else "dim")
        for name, entry in row.entries.items():
            if entry.status == "absent":
                if (name, entry.reason) not in self._absent:
                    self._absent.add((name, entry.reason))
                    self._line(f"  {name:20}  absent: {entry.reason}", "dim")
                continue
            if entry.status != "timed":
                self._line(f"  {name:20}  {outcome(entry, row.limit)}", "red")
                continue
            style = "bold cyan" if name == OURS else STYLES.get(entry.verdict, "")
            self._line("  " + _aligned(cells(row, name), self._columns), style)
            if aside(entry):
                self._line(f"  {'':20}  {aside(entry)}", "dim")

    def _line(self, text: str, style: str) -> None:
        if self._console is None:
            print(text.rstrip(), file=self._out, flush=True)
        else:
            self._console.print(text.rstrip(), style=style or None, markup=False, soft_wrap=True)


def print_run(run: Run, out: TextIO | None = None) -> None:
    """Print every row of a run."""
    table = Table(out)
    for row in run.rows:
        table.row(row)


def _that_fit(width: int) -> list[str]:
    columns = list(COLUMNS)
    while sum(abs(WIDTHS[name]) + 2 for name in columns) > width and len(columns) > 3:
        columns.pop()
    return columns


def _aligned(values: dict[str, str], columns: list[str]) -> str:
    return "  ".join(
        values[name].ljust(-width) if (width := WIDTHS[name]) < 0 else values[name].rjust(width) for name in columns
    )

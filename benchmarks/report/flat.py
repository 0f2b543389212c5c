"""The results as CSV: a line for each entry, with every field of it and of its case."""

from __future__ import annotations

import csv
import io
from dataclasses import fields

from ..schema import SPREADS, Entry, Row, Run

_OF_ROW = [field.name for field in fields(Row) if field.name not in ("entries", "status", "reason")]
_OF_ENTRY = [field.name for field in fields(Entry) if field.name not in SPREADS]
_OF_SPREADS = [(name, part.name) for name, form in SPREADS.items() for part in fields(form)]


def as_csv(run: Run) -> str:
    """The case's fields, "case_status" and "case_reason", "by", the entry's fields, and those of its spreads as
    "seconds_median" and so on; empty for what was not measured. A case without entries has one line."""
    spreads = [f"{name}_{part}" for name, part in _OF_SPREADS]
    text = io.StringIO()
    writer = csv.DictWriter(
        text,
        [*_OF_ROW, "case_status", "case_reason", "by", *_OF_ENTRY, *spreads, "fraction_of_bound"],
        lineterminator="\n",
    )
    writer.writeheader()
    for row in run.rows:
        case = {name: getattr(row, name) for name in _OF_ROW}
        case |= {"case_status": row.status, "case_reason": row.reason}
        if not row.entries:
            writer.writerow(case)
        for name, entry in row.entries.items():
            line = case | {"by": name, "fraction_of_bound": row.fraction_of_bound(name)}
            line |= {field: getattr(entry, field) for field in _OF_ENTRY}
            for spread, part in _OF_SPREADS:
                if getattr(entry, spread) is not None:
                    line[f"{spread}_{part}"] = getattr(getattr(entry, spread), part)
            writer.writerow(line)
    return text.getvalue()

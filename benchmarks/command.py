"""What `fastvit bench` and `fastvit bench compare` do once their arguments are read."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fastvit.environment import device_name
from fastvit.report import Table, note

from . import report, schema
from .bench import FILE, record
from .compare import compare, lines
from .plan import Plan
from .report import table, words
from .suites import Settings, describe


def run(settings: Settings, folder: Path, before: schema.Run | None = None) -> int:
    """Measure what `before` has not, print and write everything into `folder`; returns the exit status: 0 when
    something was timed and nothing of ours was wrong or failed, 1 otherwise, 130 after Ctrl-C."""
    folder.mkdir(parents=True, exist_ok=True)
    note(f"Timing on {device_name(settings.device)}: {describe(settings)}")
    if settings.interpreted:
        note(f"Last, the photographs are classified on the Triton kernels in the interpreter: {settings.interpreted}.")
    rows = None

    def planned(schedule: Plan) -> None:
        nonlocal rows
        _tell(schedule, settings)
        rows = table.Table()  # its heading stands above the rows

    found, interrupted = record(settings, folder, before, lambda row: rows.row(row), planned)
    if interrupted:
        note(f"Interrupted after {len(found.rows)} of {len(settings.cases)} rows.")
    if any(entry.ratio for row in found.rows for entry in row.entries.values()):
        print(words.INTERVAL)
    if beyond := words.faster_than_bound(found.rows):
        print(beyond)
    _print_top5(found.extra["top5"], settings)
    interpreted = found.extra.get("interpreted")
    if interpreted:
        _print_interpreted(interpreted)
    print(f"results: {folder / FILE}")
    if importlib.util.find_spec("matplotlib") is None:
        note("No pictures: matplotlib is not installed.")
    for path in report.write(found, folder):
        print(f"written: {path}")
    if interrupted:
        return 130
    statuses = {row.status for row in found.rows}
    right = interpreted is None or interpreted["ok"]
    return 0 if right and "timed" in statuses and statuses <= {"timed", "skipped"} else 1


def compare_files(before: Path, after: Path, threshold: float, relative: str | None) -> int:
    """Print what changed; returns the exit status: 1 if any of ours got slower or wrong, else 2 if the times cannot be
    compared, else 0. Raises ValueError, OSError for files that cannot be."""
    found = compare(schema.load(before), schema.load(after), threshold, relative)
    for line in lines(found, threshold, relative):
        print(line)
    return found.status


def _tell(schedule: Plan, settings: Settings) -> None:
    """Print how long the run will take, and what is left out."""
    if schedule.rows:
        entries = words.count(schedule.entries, "entry")
        cases = f"{words.count(len(schedule.rows), 'case')}, {'up to ' if schedule.compiling else ''}{entries} each"
        beside = ", and what compiling takes" if schedule.compiling else ""
        limit = settings.time_limit
        cut = limit is not None and schedule.seconds > limit
        stop = f" The time limit of {words.minutes(limit)} cuts the end off; --resume goes on." if cut else ""
        note(f"This will take about {words.minutes(schedule.seconds)}{beside}: {cases}.{stop}")
    if schedule.left_out:
        note(f"Left out, because the time limit is {settings.time_limit:g} s:")
        for case, seconds in schedule.left_out.items():
            note(f"  {case}, about {words.minutes(seconds)}")
        resume = "" if "--resume" in settings.command else " --resume"
        note(f"What measures them, a limit's worth at a time: {settings.command}{resume}")


def _print_top5(found: dict[str, dict], settings: Settings) -> None:
    """Print, for each model and dtype, how far ours and the float64 reference agree on the classes of the
    photographs."""
    if not found:
        return
    print()
    if not settings.pretrained:
        print(
            "With random weights the classes mean nothing; that ours and the reference name the same ones is the check."
        )
    rows = Table({"model": -32, "same top class": 14, "shared top-5 classes": 20})
    for model, top5 in found.items():
        photos = len(top5["photos"])
        rows.row(model, f"{top5['same_first']} of {photos}", f"{top5['same_in_top5']} of {5 * photos}")
    print()


def _print_interpreted(found: dict) -> None:
    """Print the class of each photograph by the kernels and by the reference, and both errors."""
    rows = Table({"photograph": -24, "class by the kernels": 20, "by the reference": 16, "shared top-5": 12})
    for photo, ours, truth in zip(found["photos"], found["ours"], found["reference"], strict=True):
        rows.row(photo, ours[0], truth[0], len({*ours} & {*truth}))
    print(
        f"{found['model']} {found['dtype']}: error of the kernels {found['error']:.1e}, of plain PyTorch "
        f"{found['plain_error']:.1e}; {'ok' if found['ok'] else 'WRONG'}; {found['seconds']:.0f} s in the interpreter\n"
    )

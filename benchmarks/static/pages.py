"""The pages of the static report, one an architecture, and their index, from the JSON of `static_report.py --json`.

    python -m fastvit.benchmarks.static.pages FOLDER FILE [FILE ...]

FILE: of a whole run with one Triton. The pages are of the newest of them, and say what differs with each of the others.
The same code gives the same bytes: rows are sorted, and nothing names the time, the machine or a path outside the repo.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from fastvit.kernels.launch.hardware import ARCHS, Arch

from fastvit.report import write_atomically, write_json

from . import estimate
from .allowed import ALLOWED
from .gates import GATES, OF_CANDIDATES, Allowed, Verdict, findings, held_to, judge
from .record import Record, Use

KIND, SCHEMA = "fastvit static report", 2
ESTIMATE_NOTE = "an estimate from code and shape, not a measurement"
# Where measured kernels lie: `estimate.measurements`.
RESULTS = Path(__file__).parents[1] / "results"
# Of the kinds of instruction in a main loop, how many are shown.
COMMONEST = 6


class Run(NamedTuple):
    """What one Triton made of the cases whose label holds `match`."""

    triton: str
    match: str
    records: list[Record]

    def shipped(self, arch: str) -> list[Record]:
        """Those of one architecture, the worst first."""
        return sorted((r for r in self.records if r.shipped and r.arch == arch), key=_worst_first)


def config(record: Record) -> str:
    """The choice that made it, else the launch's sizes."""
    return record.uses[0].config if record.uses else record.options


def save(path: Path, run: Run) -> None:
    """Write a run, and what is estimated for each use of its kernels, as JSON; atomically, into a folder that need not
    exist."""
    rows = []
    for record in sorted(run.records, key=repr):
        seconds = [estimate.seconds(record, use, ARCHS[record.arch]) for use in record.uses]
        rows.append({**asdict(record), "estimated_seconds": seconds})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"kind": KIND, "schema": SCHEMA, "triton": run.triton, "match": run.match, "kernels": rows})


def load(path: Path) -> Run:
    """What `save` wrote. Raises ValueError, naming the file, for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if (found["kind"], found["schema"]) != (KIND, SCHEMA):
            raise ValueError(f"{found['kind']!r} of schema {found['schema']!r}")
        return Run(found["triton"], found["match"], [_record(**row) for row in found["kernels"]])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a {KIND} of schema {SCHEMA} ({error})") from None


def _record(uses: list[dict], estimated_seconds: list, **fields) -> Record:
    for name, value in fields.items():
        if name.endswith("_by_bits"):  # JSON's keys are text
            fields[name] = {int(bits): count for bits, count in value.items()}
    return Record(uses=tuple(Use(**use) for use in uses), **fields)


def write(folder: Path, runs: Sequence[Run], allowed: Sequence[Allowed], results: Path = RESULTS) -> None:
    """Write a page for each architecture, of the newest Triton, and the index of all; each atomically.

    results: where measured kernels lie. Raises ValueError for a damaged file there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = sorted(runs, key=lambda run: [int(number) for number in re.findall(r"\d+", run.triton)])
    *others, newest = runs
    for arch in ARCHS.values():
        if newest.shipped(arch.name):
            text = _page(arch, newest, others, allowed, estimate.measurements(results, arch.name))
            write_atomically(folder / f"{arch.name}.md", text.encode())
    write_atomically(folder / "README.md", _index(runs, allowed).encode())


def _page(arch: Arch, run: Run, others: Iterable[Run], allowed: Sequence[Allowed], measured: dict[str, dict]) -> str:
    shipped = run.shipped(arch.name)
    candidates = [record for record in run.records if record.arch == arch.name and not record.shipped]
    verdict = judge([*shipped, *candidates], run.triton, allowed)
    lines = [
        f"# {arch.name}",
        "",
        f"Compiled ahead of time for {arch.name} ({arch.gpu}) by Triton {run.triton} and read off the code; nothing "
        "ran. [What the columns mean, and how to make this again](README.md).",
        "",
        f"{len(shipped)} shipped kernels, {len(verdict.failures)} failures, {len(verdict.excused)} let through with a "
        f"reason; {len(candidates)} candidates of the tuner, held to {' and '.join(OF_CANDIDATES)} only.",
        "",
        *_gate_lines(verdict),
    ]
    spared = Counter(gate for record in candidates for gate in findings(record) if gate not in held_to(record))
    if spared:
        lines.append(f"- of the candidates: {', '.join(f'{gate} {count}' for gate, count in sorted(spared.items()))}")
    lines += ["", "## Kernels, each in its worst case", "", *_table(shipped), *_estimate_lines(run, arch, measured)]
    for other in others:
        lines += _differences(run, other, arch.name, allowed)
    return "\n".join(lines).rstrip() + "\n"


def _gate_lines(verdict: Verdict) -> list[str]:
    """A line for each failure, and one for each gate and reason for which kernels are let through it."""
    lines = sorted(f"- **{gate}**: {_about(record)}: {text}" for record, gate, text in verdict.failures)
    let_through = defaultdict(list)
    for record, gate, _, entry in verdict.excused:
        let_through[f"- {gate}, let through. {entry.reason}"].append(record)
    return lines + [f"{why} {_by_kernel(records)}" for why, records in sorted(let_through.items())]


def _by_kernel(records: list[Record]) -> str:
    cases = defaultdict(set)
    for record in records:
        cases[record.kernel].add(record.case)
    listed = (f"`{kernel}`: {'; '.join(sorted(of_kernel))}." for kernel, of_kernel in sorted(cases.items()))
    return f"{len(records)}: {' '.join(listed)}"


def _about(record: Record) -> str:
    return f"`{record.kernel}`, {record.case}, {config(record)}"


def _worst_first(record: Record) -> tuple:
    worst = (not record.error, -record.spill_bytes, record.occupancy, -record.registers)
    return *worst, _about(record), repr(record)


def _table(shipped: list[Record]) -> list[str]:
    """A row a kernel: its worst case, and how often it was compiled."""
    lines = _heading(
        "kernel | compiled | case | config | registers | spill | stack | shared KiB | occupancy | tensor cores | copies"
        " | loads | stores | FLOP/byte | main loop | estimate, us"
    )
    counts = Counter(record.kernel for record in shipped)
    worst = {record.kernel: record for record in reversed(shipped)}
    for record in sorted(worst.values(), key=_worst_first):
        cells = [record.kernel, counts[record.kernel], record.case, config(record)]
        if record.error:
            lines.append(_row([*cells, f"ERROR {record.error}", *[""] * 11]))
            continue
        arch = ARCHS[record.arch]
        share = record.shared_bytes / arch.shared_per_block
        copies = {"cp.async": record.async_copies, "TMA": record.tma_loads + record.tma_stores}
        commonest = dict(list(record.loop.items())[:COMMONEST])
        cells += [
            record.registers,
            record.spill_bytes or "",
            record.stack_bytes or "",
            f"{record.shared_bytes / 1024:.0f} ({share:.0%})" if record.shared_bytes else "",
            f"{record.occupancy:.0%} ({record.blocks_per_sm}x{record.warps} warps, {record.limiter})",
            _counts(record.tensor_core) + (", serialized" if record.serialized else ""),
            _counts({name: count for name, count in copies.items() if count}),
            _counts(record.loads_by_bits),
            _counts(record.stores_by_bits),
            f"{record.flops_per_byte:g}" if record.flops_per_byte else "",
            f"{sum(record.loop.values())}: {_counts(commonest)}" if commonest else "",
            _microseconds(estimate.seconds(record, record.uses[0], arch) if record.uses else None),
        ]
        lines.append(_row(cells))
    return [*lines, ""]


def _heading(names: str) -> list[str]:
    return [f"| {names} |", "|" + " --- |" * len(names.split(" | "))]


def _row(cells: list) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _counts(counter: dict) -> str:
    return " ".join(f"{name}:{count}" for name, count in counter.items())


def _estimate_lines(run: Run, arch: Arch, measured: dict[str, dict]) -> list[str]:
    """Of each file of measurements: how well the estimates rank what was measured, and both times."""
    lines = ["## Estimated times", "", f"Each is {ESTIMATE_NOTE}, for {arch.gpu}'s data sheet.", ""]
    if not measured:
        lines += [f"No kernel has been measured on {arch.name} yet: nothing says how good these estimates are.", ""]
    estimates = {
        (use.request, use.config): estimate.seconds(record, use, arch)
        for record in run.records
        if record.arch == arch.name
        for use in record.uses
    }
    for path, times in measured.items():
        pairs = {key: (estimates[key], times[key]) for key in sorted(times.keys() & estimates) if estimates[key]}
        rank = estimate.rank_correlation(pairs.values())
        told = "too few to rank" if rank is None else f"Spearman's rank correlation {rank:.2f}"
        lines += [f"Against {path}: {len(pairs)} kernels, {told} of estimate and measurement.", ""]
        lines += _heading("request | config | estimate, us | measured, us")
        lines += [*(_row([*key, *map(_microseconds, pair)]) for key, pair in pairs.items()), ""]
    return lines


def _microseconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{float(f'{seconds * 1e6:.3g}'):,g}" if seconds < 0.1 else f"{seconds * 1e6:,.0f}"


def _differences(run: Run, other: Run, arch: str, allowed: Sequence[Allowed]) -> list[str]:
    """What the gates find with only one of two Tritons, and how often the occupancy is another."""
    shipped, others = run.shipped(arch), other.shipped(arch)
    here, there = (
        {(gate, _about(record)): record for record in records for gate in findings(record)}
        for records in (shipped, others)
    )
    verdict = judge(others, other.triton, allowed)
    for judged in (verdict.failures, verdict.excused):
        judged[:] = [row for row in judged if (row[1], _about(row[0])) not in here]
    lines = [f"## With Triton {other.triton} instead", "", *_gate_lines(verdict)]
    for gate in GATES:
        if gone := [record for (found, about), record in here.items() if found == gate and (found, about) not in there]:
            lines.append(f"- no {gate}: {_by_kernel(gone)}")
    # Of kernels with the same name, case and config, the worst.
    worst, others_worst = ({_about(record): record for record in reversed(each)} for each in (shipped, others))
    changes = [others_worst[key].occupancy - worst[key].occupancy for key in worst.keys() & others_worst.keys()]
    higher, lower = (sum(sign * change > 0 for change in changes) for sign in (1, -1))
    lines.append(
        f"- of {len(changes)} kernels (by name, case and config), {higher} have a higher occupancy, {lower} lower"
    )
    return [*lines, ""]


def _index(runs: Sequence[Run], allowed: Sequence[Allowed]) -> str:
    """README.md of the pages of the last of `runs`."""
    lines = [
        "# What the compiler made of every kernel",
        "",
        "Generated by `make static`. Every launcher is called on meta tensors, which have no data, at models' sizes; "
        "what it launches is compiled ahead of time and read off the code: on no GPU, so that none of it says how fast "
        "a kernel is, or that it is right. The configs are those that `kernels/launch/heuristic.py` picks for "
        "each architecture's GPU, and, for the block of ViT-B and attention of 64 columns in bfloat16, the best of "
        "the tuner's candidates by the estimate. A page is of the newest Triton, and says what differs with the other.",
        "",
    ]
    lines += _heading(
        "Triton | page | shipped | failures | let through | spilling | most registers | lowest occupancy | candidates"
    )
    for run in reversed(runs):
        for arch in ARCHS:
            of_arch = [record for record in run.records if record.arch == arch]
            if not of_arch:
                continue
            shipped, verdict = run.shipped(arch), judge(of_arch, run.triton, allowed)
            compiled = [record for record in shipped if not record.error]
            cells = [run.triton, f"[{arch}]({arch}.md)", len(shipped), len(verdict.failures), len(verdict.excused)]
            cells += [
                sum(record.spill_bytes > 0 for record in compiled),
                max((record.registers for record in compiled), default=""),
                f"{min((record.occupancy for record in compiled), default=0):.0%}",
                len(of_arch) - len(shipped),
            ]
            lines.append(_row(cells))
    gates = [f"- {name}: {what}." for name, what in GATES.items()]
    about = inspect.getdoc(estimate).split("\n", 2)[2].strip()
    return "\n".join([*lines, *_COLUMNS_MEAN, "", *gates, "", *_AGAIN, "", about]) + "\n"


_COLUMNS_MEAN = """
## The columns

- kernel: its function and, of a matrix product, its loaders and epilogue; compiled: in how many specialisations, which
  count once however many cases launch them. The row shows the worst: most bytes spilled, then lowest occupancy, then
  most registers. case: the first that launches it; config: tile sizes, then w warps, s stages, g GROUP_M, k SPLIT_K.
- registers, spill, stack: of a thread, the latter two in bytes. shared: of a block, and its share of what one may have.
- occupancy: warps resident on a multiprocessor over those it could hold; blocks x warps, and what limits them.
- tensor cores: their instructions by kind. copies: cp.async and TMA instructions. loads, stores: instructions of global
  memory by the bits that each moves a thread (cp.async is not among them).
- FLOP/byte: of one iteration of the main loop: FLOPs of matrix products over the bytes of the tiles that it loads.
- main loop: the innermost loop with the most tensor-core instructions: how many instructions, the commonest by kind.

## The gates

The exit status is 1 when a shipped kernel fails one and `benchmarks/static/allowed.py` has no entry for it with a
written reason, or has an entry that nothing needs any more. Candidates that are not shipped are held to `compile` and
`shared memory` only.
""".splitlines()

_AGAIN = """## To make it again

`make static` on any Linux machine; it makes its own environments. A page changes only when the compiled code, an
estimate or the list of exceptions does. Every kernel, with what was read off it, every launch and its estimate, is then
in `results/static/<Triton>.json`, a row a kernel under "kernels" with the fields of `benchmarks/static/record.py`. Of
one architecture and the Triton at hand: `python benchmarks/static_report.py --arch sm_90 --json FILE`. The pages of
another Triton alone: `python -m fastvit.benchmarks.static.pages FOLDER results/static/3.6.0.json`.

## What an estimate is worth

It ranks configs and kernels; it promises no time. Until kernels have been measured, nothing says how well it ranks;
once they have, each page shows both and their rank correlation.
""".splitlines()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pages", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    try:
        runs = [load(path) for path in options.files]
        for path, run in zip(options.files, runs, strict=True):
            if run.match or {record.arch for record in run.records} != set(ARCHS):
                parser.error(f"{path}: not of all cases on all architectures")
        write(options.folder, runs, ALLOWED)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The report as pages: one in Markdown and one in JSON for each version of Triton and architecture, and their index.

The same code gives the same bytes: rows are sorted, and nothing names the time, the machine or a path outside the repo.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from fastvit.kernels.launch.hardware import ARCHS

from fastvit.report import write_atomically

from . import estimate
from .gates import GATES, OF_CANDIDATES, Verdict, findings, held_to
from .record import Record, Use

KIND, SCHEMA = "fastvit static report", 1
FACTS = (
    "warps", "registers", "spill_bytes", "stack_bytes", "shared_bytes", "blocks_per_sm", "occupancy", "limiter",
    "tensor_core", "async_copies", "tma_loads", "tma_stores", "loads_by_bits", "stores_by_bits", "loop_loads_by_bits",
    "flops_per_byte", "missed_fusions", "serialized", "loop",
)  # fmt: skip
COLUMNS = ("kernel", "case", "config", "shipped", "failed", "allowed", "error", *FACTS)
ESTIMATES = ("request", "config", "kernel_index", "estimated_seconds")
ESTIMATE_NOTE = "an estimate from code and shape, not a measurement"
WORST = 5
# Of the kinds of instruction in a main loop, how many are shown.
COMMONEST = 6


def config(record: Record) -> str:
    """The choice that made it, else the launch's sizes."""
    return record.uses[0].config if record.uses else record.options


def write(
    folder: Path, triton: str, arch: str, records: list[Record], verdict: Verdict, measured: dict[str, dict]
) -> None:
    """Write `<triton>-<arch>.md` and `.json`, and the index of all that lies in `folder`, each atomically.

    verdict: of these records; measured: as `estimate.measurements` gives it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = sorted(records, key=lambda record: (not record.shipped, _about(record), repr(record)))
    name = f"{triton}-{arch}"
    write_atomically(folder / f"{name}.json", _json(triton, arch, records, verdict).encode())
    write_atomically(folder / f"{name}.md", _markdown(triton, arch, records, verdict, measured).encode())
    write_atomically(folder / "README.md", index(folder).encode())


def load(path: Path) -> dict:
    """A page's JSON: {"triton", "arch", "kernels": [{column: value}, ...], "estimates": [...]}.

    Raises ValueError, naming the file, for what is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if (found["kind"], found["schema"]) != (KIND, SCHEMA):
            raise ValueError(f"{found['kind']!r} of schema {found['schema']!r}")
        tables = {
            name: [dict(zip(found[name]["columns"], row, strict=True)) for row in found[name]["rows"]]
            for name in ("kernels", "estimates")
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a {KIND} of schema {SCHEMA} ({error})") from None
    return {"triton": found["triton"], "arch": found["arch"], **tables}


def _uses(records: Iterable[Record]) -> list[tuple[Use, int, Record]]:
    """Every use, with the number and the kernel that it is a use of, by request."""
    found = [(use, number, record) for number, record in enumerate(records) for use in record.uses if use.request]
    return sorted(found, key=lambda item: (item[0].request, not item[2].shipped, item[0].config))


def _json(triton: str, arch: str, records: list[Record], verdict: Verdict) -> str:
    def value(record: Record, name: str) -> object:
        fact = getattr(record, name)
        if name == "loop":
            return {"all": sum(fact.values()), **_commonest(fact)}
        return round(fact, 4) if isinstance(fact, float) else fact

    def row(record: Record) -> list:
        failed = [gate for other, gate, _ in verdict.failures if other is record]
        allowed = [gate for other, gate, *_ in verdict.excused if other is record]
        about = [record.kernel, record.case, config(record), record.shipped, failed, allowed, record.error]
        return about + [value(record, name) for name in FACTS]

    def seconds(use: Use, record: Record) -> float | None:
        found = estimate.seconds(record, use, ARCHS[arch])
        return found and float(f"{found:.4g}")

    estimates = [[use.request, use.config, number, seconds(use, record)] for use, number, record in _uses(records)]
    # A row a line: compact, and a change shows as the rows that changed.
    tables = [
        f'"{name}": {{"columns": {json.dumps(columns)}, "rows": [\n'
        + ",\n".join(json.dumps(line, separators=(",", ":"), allow_nan=False) for line in rows)
        + "\n]}"
        for name, columns, rows in (("kernels", COLUMNS, map(row, records)), ("estimates", ESTIMATES, estimates))
    ]
    head = {"kind": KIND, "schema": SCHEMA, "triton": triton, "arch": arch, "estimates_are": ESTIMATE_NOTE}
    return json.dumps(head)[:-1] + ",\n" + ",\n".join(tables) + "}\n"


def _markdown(triton: str, arch: str, records: list[Record], verdict: Verdict, measured: dict[str, dict]) -> str:
    shipped = [record for record in records if record.shipped]
    candidates = [record for record in records if not record.shipped]
    lines = [
        f"# Triton {triton}, {arch}",
        "",
        f"Compiled ahead of time for {arch} ({ARCHS[arch].gpu}) and read off the code; nothing ran. "
        "[What the columns mean, and how to make this again](README.md).",
        "",
        f"{len(shipped)} shipped kernels, {len(verdict.failures)} failures, {len(verdict.excused)} let through with a "
        f"reason; {len(candidates)} candidates of the tuner.",
        "",
        *_gate_lines(verdict, candidates),
        "## Worst of the shipped",
        "",
        *_worst("spills", shipped, lambda record: -record.spill_bytes, lambda record: f"{record.spill_bytes} bytes"),
        *_worst("registers", shipped, lambda record: -record.registers, lambda record: str(record.registers)),
        *_worst("occupancy", shipped, lambda record: record.occupancy, _occupancy),
        "## Shipped",
        "",
        *_table(shipped),
        "## Candidates of the tuner",
        "",
        f"Held to {' and '.join(OF_CANDIDATES)} only: what one of them does badly otherwise, the tuner finds slow.",
        "",
        *_table(candidates),
        *_estimate_lines(records, ARCHS[arch], measured),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _gate_lines(verdict: Verdict, candidates: list[Record]) -> list[str]:
    lines = []
    for record, gate, text in sorted(verdict.failures, key=_by_gate):
        lines.append(f"- **{gate}**: {_about(record)} {text}")
    let_through = defaultdict(list)
    for record, _, _, entry in sorted(verdict.excused, key=_by_gate):
        let_through[entry.gate, entry.reason].append(f"`{record.kernel}`, {record.case}, {config(record)}")
    for (gate, reason), kernels in let_through.items():
        lines.append(f"- {gate}, let through. {reason} {len(kernels)}: {'; '.join(kernels)}.")
    spared = Counter(gate for record in candidates for gate in findings(record) if gate not in held_to(record))
    if spared:
        lines.append(f"- of the candidates: {', '.join(f'{gate} {count}' for gate, count in sorted(spared.items()))}")
    return [*lines, ""] if lines else []


def _by_gate(found: tuple) -> tuple:
    record, gate, *_ = found
    return gate, _about(record), repr(record)


def _about(record: Record) -> str:
    return f"`{record.kernel}`, {record.case}, {config(record)}:"


def _worst(what: str, records: list[Record], key: Callable, show: Callable) -> list[str]:
    ranked = sorted(
        (record for record in records if not record.error), key=lambda record: (key(record), _about(record))
    )
    if what == "spills":
        ranked = [record for record in ranked if record.spill_bytes]
    if not ranked:
        return [f"By {what}: none.", ""]
    return [f"By {what}:", "", *(f"- {show(record)}: {_about(record)[:-1]}" for record in ranked[:WORST]), ""]


def _occupancy(record: Record) -> str:
    return f"{record.occupancy:.0%} ({record.blocks_per_sm}x{record.warps} warps, {record.limiter})"


def _table(records: list[Record]) -> list[str]:
    if not records:
        return ["None.", ""]
    headings = "kernel | case | config | registers | spill | stack | shared KiB | occupancy | tensor cores | copies"
    headings += " | loads | stores | FLOP/byte | main loop"
    lines = [f"| {headings} |", "|" + " --- |" * (headings.count("|") + 1)]
    for record in records:
        about = [record.kernel, record.case, config(record)]
        if record.error:
            lines.append(_row([*about, f"ERROR {record.error}", *[""] * 10]))
            continue
        share = record.shared_bytes / ARCHS[record.arch].shared_per_block
        copies = {"cp.async": record.async_copies, "TMA": record.tma_loads + record.tma_stores}
        total = sum(record.loop.values())
        lines.append(
            _row(
                [
                    *about,
                    record.registers,
                    record.spill_bytes or "",
                    record.stack_bytes or "",
                    f"{record.shared_bytes / 1024:.0f} ({share:.0%})" if record.shared_bytes else "",
                    _occupancy(record),
                    _counts(record.tensor_core) + (", serialized" if record.serialized else ""),
                    _counts({name: count for name, count in copies.items() if count}),
                    _counts(record.loads_by_bits),
                    _counts(record.stores_by_bits),
                    f"{record.flops_per_byte:g}" if record.flops_per_byte else "",
                    f"{total}: {_counts(_commonest(record.loop))}" if total else "",
                ]
            )
        )
    return [*lines, ""]


def _commonest(mix: dict[str, int]) -> dict[str, int]:
    return dict(list(mix.items())[:COMMONEST])


def _row(cells: list) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _counts(counter: dict) -> str:
    return " ".join(f"{name}:{count}" for name, count in counter.items())


def _estimate_lines(records: list[Record], arch, measured: dict[str, dict]) -> list[str]:
    """Estimates, the measured time beside each where there is one, and how well they rank the kernels."""
    rows = [(use, record, estimate.seconds(record, use, arch)) for use, _, record in _uses(records)]
    lines = ["## Estimated times", "", f"Each is {ESTIMATE_NOTE}, for {arch.gpu}'s data sheet.", ""]
    if not measured:
        lines += [f"No kernel has been measured on {arch.name} yet: nothing says how good these estimates are.", ""]
    for path, times in measured.items():
        pairs = [
            (seconds, times[use.request, use.config])
            for use, _, seconds in rows
            if seconds and (use.request, use.config) in times
        ]
        rank = estimate.rank_correlation(pairs)
        told = "too few to rank" if rank is None else f"Spearman's rank correlation {rank:.2f}"
        lines += [f"Against {path}: {len(pairs)} kernels, {told} of estimate and measurement.", ""]
    heads = ["request", "config", "", "estimate, us", *(f"measured, us: {path}" for path in measured)]
    lines += [_row(heads), "|" + " --- |" * len(heads)]
    for use, record, seconds in rows:
        # Those of candidates that nobody measured are in the JSON.
        times = [found.get((use.request, use.config)) for found in measured.values()]
        about = [use.request, use.config, "shipped" if record.shipped else "candidate"]
        if record.shipped or any(times):
            lines.append(_row([*about, *map(_microseconds, (seconds, *times))]))
    return [*lines, ""]


def _microseconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{float(f'{seconds * 1e6:.3g}'):,g}" if seconds < 0.1 else f"{seconds * 1e6:,.0f}"


def index(folder: Path) -> str:
    """README.md of the pages that lie in `folder`."""
    lines = [
        "# What the compiler made of every kernel",
        "",
        "Generated by `make static`. Every launcher is called on tensors without memory, at models' sizes; what it "
        "launches is compiled ahead of time and read off the code: on no GPU, so that none of it says how fast a "
        "kernel is, or that it is right. The configs are those that the heuristic of `kernels/configs.py` picks for "
        "each architecture's GPU, and, for the block of ViT-B and attention of 64 columns in bfloat16, the best of "
        "the tuner's candidates by the estimate.",
        "",
        "| page | shipped | failures | let through | spilling | most registers | lowest occupancy | candidates |",
        "|" + " --- |" * 8,
    ]
    for path in sorted(folder.glob("*-*.json"), key=lambda path: _page_order(path.stem)):
        page = load(path)["kernels"]
        shipped = [row for row in page if row["shipped"]]
        compiled = [row for row in shipped if not row["error"]]
        lines.append(
            _row(
                [
                    f"[{path.stem}]({path.stem}.md)",
                    len(shipped),
                    sum(len(row["failed"]) for row in page),
                    sum(len(row["allowed"]) for row in page),
                    sum(row["spill_bytes"] > 0 for row in compiled),
                    max((row["registers"] for row in compiled), default=""),
                    f"{min((row['occupancy'] for row in compiled), default=0):.0%}",
                    len(page) - len(shipped),
                ]
            )
        )
    gates = [f"- {name}: {what}." for name, what in GATES.items()]
    about = inspect.getdoc(estimate).split("\n", 2)[2].strip()
    return "\n".join([*lines, *_COLUMNS_MEAN, "", *gates, "", *_AGAIN, "", about]) + "\n"


def _page_order(stem: str) -> tuple:
    version, _, arch = stem.rpartition("-")
    return [int(part) if part.isdigit() else -1 for part in version.split(".")], list(ARCHS).index(arch)


_COLUMNS_MEAN = """
## The columns

- kernel: its function and, of a matrix product, its loaders and epilogue; case: the first that launches it (equal code
  counts once); config: tile sizes, then w warps, s stages, g GROUP_M, k SPLIT_K.
- registers, spill, stack: of a thread, the latter two in bytes. shared: of a block, and its share of what one may have.
- occupancy: warps resident on a multiprocessor over those it could hold; blocks x warps, and what limits them.
- tensor cores: their instructions by kind. copies: cp.async and TMA instructions. loads, stores: instructions of global
  memory by the bits that each moves a thread (cp.async is not among them).
- FLOP/byte: of one turn of the main loop: products over the bytes of the tiles that it loads.
- main loop: the innermost loop with the most tensor-core instructions: how many instructions, the commonest by kind.

## The gates

The exit status is 1 when a shipped kernel fails one and `benchmarks/static/allowed.py` has no entry for it with a
written reason, or has an entry that nothing needs any more. Candidates that are not shipped are held to `compile` and
`shared memory` only.
""".splitlines()

_AGAIN = """## To make it again

`make static` on any Linux machine; it makes its own environments. For one architecture and the Triton at hand:
`python benchmarks/static_report.py --arch sm_90 --output docs/static`. A page changes only when the compiled code, an
estimate or the list of exceptions does.

## What an estimate is worth

It ranks configs and kernels; it promises no time. Until kernels have been measured, nothing says how well it ranks;
once they have, each page shows both and their rank correlation.
""".splitlines()

"""The summary of a `make gpu` run, in thirty lines of text, for a reader who has nothing else."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

from .. import micro
from ..schema import OURS, Row, load
from .words import duration, number, percent, score

LINES, WIDTH, WORST = 30, 158, 5


def summary(results: Path) -> str:
    """The text, at most LINES lines of WIDTH characters, from what lies in the results folder of a run."""
    lines = [*_head(results), *_steps(results), *_verified(results), *_fatal(results), *_peaks(results)]
    lines += [*_models(results), *_launches(results)]
    last = [line[:WIDTH] for line in _next(results)]
    return "\n".join([*(line[:WIDTH] for line in lines[: LINES - len(last)]), *last])


def _json(path: Path) -> dict:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _head(results: Path) -> Iterator[str]:
    facts = _json(results / "environment.json")
    driver = facts.get("gpu", {}).get("driver")
    parts = [
        f"fastvit on {facts.get('device', 'an unknown device')}",
        f"commit {facts.get('commit')}",
        f"torch {facts.get('torch')}",
        f"Triton {facts.get('packages', {}).get('triton')}",
        *([f"driver {driver}"] if driver else []),
    ]
    yield "; ".join(parts)


def _steps(results: Path) -> Iterator[str]:
    states = _json(results / "runbook.json")
    told = []
    for name, state in states.items():
        again = f" in {state['starts']} starts" if state.get("starts", 0) > 1 else ""
        told.append(f"{name} {state['state']}{again}" + (f" {state['seconds']:.0f} s" if state["seconds"] else ""))
    # Two lines, so that none is cut.
    half = -(-len(told) // 2)
    for part in (told[:half], told[half:]):
        if part:
            yield f"steps: {', '.join(part)}"


def _verified(results: Path) -> Iterator[str]:
    found = _json(results / "verify.json").get("results", [])
    if not found:
        yield "verify: nothing is known"
        return
    counts = {status: [row for row in found if row["status"] == status] for status in ("passed", "failed", "skipped")}
    total = ", ".join(f"{len(rows)} {status}" for status, rows in counts.items() if rows)
    yield f"verify: {total}"
    for row in counts["failed"][:3]:
        yield f"  FAILED {row['op']} {row['case']} {row['dtype']}: {row['reason']}"
    if len(counts["failed"]) > 3:
        yield f"  and {len(counts['failed']) - 3} more"


def _peaks(results: Path) -> Iterator[str]:
    found = _json(results / "peaks.json")
    if not found:
        return
    rates = ", ".join(f"{dtype} {rate / 1e12:.0f}" for dtype, rate in found["flops_per_s"].items())
    line = f"peaks: copy {found['bytes_per_s'] / 1e12:.2f} TB/s; TFLOP/s of a large product {rates}"
    directions: dict[str, list[float]] = {}
    for row in found.get("products", []):
        directions.setdefault(row["direction"], []).append(row["flops_per_s"] / 1e12)
    if directions:
        spans = (f"{name} {min(rates):.0f}-{max(rates):.0f}" for name, rates in directions.items())
        line += f"; of ViT's: {', '.join(spans)}"
    yield line


def _launches(results: Path) -> Iterator[str]:
    found = _json(results / "micro.json")
    rows = micro.merged(found.get("launches", []))
    if not rows:
        return
    known = [row for row in rows if math.isfinite(micro.library_seconds(row))]
    ours, bound = sum(row["seconds"] for row in rows), sum(row["bound_seconds"] for row in rows)
    heuristic, library = sum(row["heuristic_seconds"] for row in rows), sum(map(micro.library_seconds, known))
    yield (
        f"{len(rows)} launches of a block and the ends, {found['model']} b{found['batch']} {found['dtype']} training: "
        f"ours {duration(ours)} (untuned {duration(heuristic)}), library {duration(library)}, bound {duration(bound)}"
    )
    yield "furthest behind the library (us: ours / library = ratio; best config; without a part):"
    for row in sorted(known, key=lambda row: micro.library_seconds(row) - row["seconds"])[:WORST]:
        theirs = micro.library_seconds(row)
        less = "".join(f"; {name} {micro.us(value)}" for name, value in row.get("without", {}).items())
        ratio = f"{micro.us(row['seconds'])} / {micro.us(theirs)} = {row['seconds'] / theirs:.2f}"
        yield f"  {micro.short(row)}: {ratio}; {row['best']}{less}"
    yield "furthest from the bound (us: ours / bound = ratio; best config):"
    for row in sorted(rows, key=lambda row: row["bound_seconds"] - row["seconds"])[:WORST]:
        ratio = f"{micro.us(row['seconds'])} / {micro.us(row['bound_seconds'])} = "
        yield f"  {micro.short(row)}: {ratio}{row['seconds'] / row['bound_seconds']:.2f}; {row['best']}"
    for failure in found.get("failed", [])[:2]:
        yield f"NOT MEASURED: {failure}"


def _fatal(results: Path) -> Iterator[str]:
    """Launches that made the GPU unusable or never ended; what was being tried when the run ended may be one more."""
    for path in sorted((results / "tuned").glob("*.attempts.json")):
        for name, why in list(_json(path).items())[:3]:
            yield f"FATAL, left out: {name}: {why}"
    for path in sorted((results / "tuned").glob("*.trying")):
        yield f"FATAL: ended the process that tried it: {path.read_text(encoding='utf-8')}"


def _models(results: Path) -> Iterator[str]:
    for folder, title in (("", "models"), ("after-tuning", "after tuning"), ("small-batches", "small batches")):
        with contextlib.suppress(OSError, ValueError):
            rows = [row for row in load(results / folder / "bench.json").rows if not row.op and row.status != "skipped"]
            for row in rows[:6]:
                yield f"{title}: {_model(row)}"


def _model(row: Row) -> str:
    ours = row.entries.get(OURS)
    if row.status != "timed" or ours is None or ours.seconds is None:
        return f"{row.id}: {row.status}, {row.reason}"
    graph = f", graph {number(row.items / ours.graph.median)}" if ours.graph else ""
    host = f", host {duration(ours.host.median)}" if ours.host else ""
    fraction = row.fraction_of_bound()
    peers = []
    for name, entry in row.entries.items():
        if not entry.ratio:
            continue
        graphed = f" (graph {score(entry.graph_ratio, entry.graph_verdict)})" if entry.graph_ratio else ""
        peers.append(f"{name} {score(entry.ratio, entry.verdict)}{graphed}")
    bound = f", {percent(fraction)} of bound" if fraction else ""
    return f"{row.id}: {number(row.items / ours.seconds.median)} images/s{graph}{host}{bound}; ours over " + ", ".join(
        peers
    )


def _next(results: Path) -> Iterator[str]:
    states = _json(results / "runbook.json")
    left = [name for name, state in states.items() if state["state"] not in ("done", "kept")]
    failed = any(row["status"] == "failed" for row in _json(results / "verify.json").get("results", []))
    advice = []
    if failed:
        advice.append("mend what verify names before believing any time")
    if left:
        advice.append(f"call again to go on with {', '.join(left)} (--only STEP for one)")
    if any(state["state"] == "done" for name, state in states.items() if name == "tune"):
        advice.append("ship the table of tuned/ as kernels/tuned/<device>.json")
    if not advice:
        advice.append("nothing is left; the numbers are in the archive (micro.json, bench.json, index.html)")
    yield f"next: {'; '.join(advice)}"

"""A run in words and figures: the one place for what the terminal, the page, the pictures and the README all say."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..schema import OURS, Entry, Ratio, Row, Run, is_ours

NOT_THE_KERNELS = (
    "Only fastvit's PyTorch back end was timed here: its Triton kernels need a GPU, were not timed, "
    "and nothing here says how fast they are."
)
FASTER_THAN_BOUND = 1.05  # a fraction of the roofline bound that noise does not explain
# Headings of `cells`, in the order of report.
COLUMNS = ("by", "images/s", "ours/this", "of bound", "error", "peak MB", "compile s", "J/image")


def on_gpu(run: Run) -> bool:
    return "gpu" in run.environment


def ours_is(run: Run) -> str:
    return "fastvit" if on_gpu(run) else run.extra.get("side") or "fastvit's PyTorch back end"


_SIDES = {
    "frozen auto": "a frozen model, on the fastest runtime that is installed (torch, OpenVINO, ONNX Runtime),",
    "frozen": "a frozen model, on PyTorch alone,",
}


def sides(run: Run) -> list[Run]:
    """The run as each side of ours sees it, the frozen ones first, of those that were timed; it itself last."""
    found = []
    for side, name in _SIDES.items():
        rows = [row.seen_from(side) for row in run.rows if side in row.against]
        if rows:
            found.append(replace(run, rows=rows, extra=run.extra | {"side": name}))
    return [*found, run]


def timed(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.status == "timed" and OURS in row.entries and row.entries[OURS].seconds]


def peers_of(rows: list[Row]) -> list[str]:
    """Every peer's name, in order of first appearance."""
    return [name for name in dict.fromkeys(name for row in rows for name in row.entries) if name != OURS]


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def number(value: float) -> str:
    """Three digits at least, thousands apart: 19,012, 312, 31.2, 3.12, 0.0312."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 - math.floor(math.log10(abs(value)))}f}"


def duration(seconds: float, digits: Callable[[float], str] = number) -> str:
    unit, size = _unit(seconds, {"s": 1, "ms": 1e-3, "us": 1e-6})
    return f"{digits(seconds / size)} {unit}"


def minutes(seconds: float) -> str:
    """For people who wait: 45 s, 2 min 20 s, 1 h 5 min."""
    whole = max(1, round(seconds))
    if whole >= 60:
        whole = 5 * round(whole / 5)
    if whole < 3600:
        parts = (whole // 60, "min"), (whole % 60, "s")
    else:
        parts = (whole // 3600, "h"), (whole % 3600 // 60, "min")
    return " ".join(f"{n} {unit}" for n, unit in parts if n)


def quantity(value: float, unit: str, digits: Callable[[float], str] = number) -> str:
    """With a suitable prefix: 1.23e12 FLOP/s is 1.23 TFLOP/s."""
    prefix, size = _unit(value, {"T": 1e12, "G": 1e9, "M": 1e6, "": 1})
    return f"{digits(value / size)} {prefix}{unit}"


def _unit(value: float, sizes: dict[str, float]) -> tuple[str, float]:
    """The largest unit that `value` fills, or the smallest there is; sizes: largest first."""
    return next((pair for pair in sizes.items() if value >= pair[1]), list(sizes.items())[-1])


def percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


def count(n: int, thing: str) -> str:
    """ "1 case", "2 cases", "2 entries"."""
    if n == 1:
        return f"1 {thing}"
    return f"{n} {thing[:-1]}ies" if thing.endswith("y") else f"{n} {thing}s"


def rate(row: Row, entry: Entry) -> tuple[float, float, float] | None:
    """Images a second, median and quartiles."""
    if entry.seconds is None:
        return None
    return row.items / entry.seconds.median, row.items / entry.seconds.q75, row.items / entry.seconds.q25


def score(found: Ratio, verdict: str) -> str:
    """A ratio in a word: "1.31", or "tie" where it is one."""
    return "tie" if verdict == "tie" else _factor(found.median, verdict)


def ends(found: Ratio, verdict: str) -> list[str]:
    """Both ends of the interval that the verdict rests on; empty for results files from before it was kept."""
    return [] if found.low is None else [_factor(end, verdict) for end in (found.low, found.high)]


def ratio(found: Ratio | None, verdict: str) -> str:
    """ "1.31 [1.29 1.33]"; "tie [0.98 1.02]" where it is one."""
    if found is None:
        return ""
    interval = " ".join(ends(found, verdict))
    return score(found, verdict) + (f" [{interval}]" if interval else "")


def _factor(value: float, verdict: str) -> str:
    """Two decimals; more if what is not a tie would otherwise read as 1."""
    digits = 2
    while verdict != "tie" and value != 1 and round(value, digits) == 1:
        digits += 1
    return f"{value:.{digits}f}"


def cells(row: Row, name: str) -> dict[str, str]:
    """One entry as text by COLUMNS; empty where it was not measured. An op's speed is the time of a call."""
    entry = row.entries[name]
    found = rate(row, entry)
    fraction = row.fraction_of_bound(name)
    speed = "" if found is None else duration(entry.seconds.median) if row.op else number(found[0])
    return {
        "by": name,
        "images/s": speed,
        "ours/this": ratio(entry.ratio, entry.verdict),
        "of bound": "" if fraction is None else percent(fraction),
        "error": "" if entry.error is None else f"{entry.error:.1e}",
        "peak MB": "" if entry.peak_bytes is None else number(entry.peak_bytes / 1e6),
        "compile s": "" if entry.compile_seconds is None else number(entry.compile_seconds),
        "J/image": "" if entry.joules is None else number(entry.joules / row.items),
    }


def aside(entry: Entry) -> str:
    """What the columns leave out: the time of a CUDA graph and of the host, and how the entry differs."""
    parts = []
    if entry.graph:
        beside = f", ours/this {ratio(entry.graph_ratio, entry.graph_verdict)}" if entry.graph_ratio else ""
        parts.append(f"CUDA graph {duration(entry.graph.median)}{beside}")
    if entry.host:
        parts.append(f"until the call returned {duration(entry.host.median)}")
    return "; ".join([*parts, entry.note] if entry.note else parts)


def outcome(entry: Entry, limit: float | None) -> str:
    """Why an entry has no speed, on one line."""
    if entry.status == "wrong" and not entry.reason and entry.error is not None and limit is not None:
        return f"wrong: error {entry.error:.1e} is more than the limit {limit:.1e}"
    return f"{entry.status}: {entry.reason}" if entry.reason else entry.status


# ---------------------------------------------------------------------------------------------------------------------
# Names


def subject(row: Row) -> str:
    """The model, with the image size where that is not its own."""
    return row.id.partition("/")[0]


def group_of(row: Row) -> str:
    """Rows of one group are summarised together: "inference", "training", or either of single ops."""
    return f"single ops, {row.mode}" if row.op else row.mode


def groups(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by group, whole models first."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: bool(row.op)):
        found.setdefault(group_of(row), []).append(row)
    return found


def versions(run: Run) -> str:
    """ "torch 2.13.0, triton 3.7.1, fastvit 0.1.0 at 9423417", without what the environment lacks."""
    environment = run.environment
    found = {"torch": environment.get("torch"), "triton": environment.get("packages", {}).get("triton")}
    parts = [f"{name} {version}" for name, version in found.items() if version]
    if environment.get("fastvit"):
        commit = environment.get("commit")
        parts.append(f"fastvit {environment['fastvit']}" + (f" at {commit[:10]}" if commit else ""))
    return ", ".join(parts)


def device(run: Run) -> str:
    name = str(run.environment.get("device", "an unknown device"))
    threads = run.environment.get("torch_threads")
    return name if on_gpu(run) or not threads else f"{name}, {count(threads, 'thread')}"


def weights(run: Run) -> str:
    found = run.settings.get("weights")
    return f"weights: {found}" if found else ""


def command(run: Run) -> str:
    """What was typed to make the run; settings["command"] where the run recorded it."""
    return str(run.settings.get("command", "fastvit bench"))


# ---------------------------------------------------------------------------------------------------------------------
# Standings


@dataclass(frozen=True)
class Standing:
    """Ours against one peer over several cases. speed: ours over this peer's, the geometric mean."""

    peer: str
    speed: float
    faster: int
    ties: int
    slower: int

    @property
    def cases(self) -> int:
        return self.faster + self.ties + self.slower

    @property
    def score(self) -> str:
        return "a tie" if self.ties == self.cases else f"{self.speed:.2f}"

    def __str__(self) -> str:
        return "ties with" if self.ties == self.cases else f"has {self.score} times the speed of"

    @property
    def verdicts(self) -> str:
        return f"faster in {self.faster}, a tie in {self.ties}, slower in {self.slower}"


def _standing(peer: str, entries: list[Entry]) -> Standing:
    verdicts = [entry.verdict for entry in entries]
    return Standing(
        peer,
        statistics.geometric_mean(entry.ratio.median for entry in entries),
        *(verdicts.count(verdict) for verdict in ("faster", "tie", "slower")),
    )


def against_each(rows: list[Row]) -> list[Standing]:
    """Ours against every peer that was timed in some row, in the order of report."""
    peers = [peer for peer in peers_of(rows) if not is_ours(peer)]
    entries = {peer: [row.entries[peer] for row in rows if peer in row.entries] for peer in peers}
    entries = {peer: [entry for entry in found if entry.ratio] for peer, found in entries.items()}
    return [_standing(peer, found) for peer, found in entries.items() if found]


def against_the_fastest(rows: list[Row]) -> Standing | None:
    """Ours against the fastest peer of each row, whichever that is there; None where no peer was timed."""
    fastest = []
    for row in rows:
        peers = [entry for name, entry in row.entries.items() if not is_ours(name) and entry.ratio and entry.seconds]
        if peers:
            fastest.append(min(peers, key=lambda entry: entry.seconds.median))
    return _standing("the fastest peer of each case", fastest) if fastest else None


def fractions(rows: list[Row]) -> list[float]:
    found = [row.fraction_of_bound() for row in rows]
    return [fraction for fraction in found if fraction is not None]


def faster_than_bound(rows: list[Row]) -> str:
    """A caveat that names the entries that were faster than the roofline bound; empty if none was."""
    entries = ", ".join(f"{name} (up to {percent(fraction)} of it)" for name, fraction in _beyond(timed(rows)).items())
    return entries and (
        f"Faster than the roofline bound: {entries}. The device can do more than its measured peaks, those of a copy "
        "and of PyTorch's matrix product: fractions of the bound are relative to those."
    )


def _beyond(rows: list[Row]) -> dict[str, float]:
    """The names of entries that were faster than the roofline bound, and the largest fraction of it each reached."""
    found: dict[str, float] = {}
    for row in rows:
        for name in row.entries:
            fraction = row.fraction_of_bound(name)
            if fraction is not None and fraction > FASTER_THAN_BOUND:
                found[name] = max(fraction, found.get(name, 0.0))
    return found


def _span(values: list[float]) -> str:
    """Lowest, highest and median as percentages."""
    low, middle, high = percent(min(values)), percent(statistics.median(values)), percent(max(values))
    return middle if low == high else f"{middle} (median; {low} to {high})"


def headline(run: Run) -> str:
    """One sentence: how fast, against whom, on what, how close to the roofline bound."""
    for group, rows in groups(timed(run.rows)).items():
        best = against_the_fastest(rows)
        if best is None:
            continue
        cases = f"{count(best.cases, 'case')} of {group}: {best.verdicts}"
        sentence = f"On {device(run)}, {ours_is(run)} {best} {best.peer} ({cases})"
        found = fractions(rows)
        if not found or _beyond(rows):
            return f"{sentence}."
        return f"{sentence}, and reaches {_span(found)} of the roofline bound."
    if timed(run.rows):
        return f"On {device(run)}, {ours_is(run)} was timed alone: no peer could take part."
    return f"On {device(run)}, nothing was timed: {_undone(run) or 'no case was run'}."


def caveats(run: Run) -> list[str]:
    """What a reader must know before believing the headline."""
    found = [] if on_gpu(run) else [NOT_THE_KERNELS]
    if _undone(run):
        found.append(f"Without a speed: {_undone(run)}; the reasons stand in the tables.")
    if not run.finished:
        left_out = run.extra.get("left_out")
        why = f", {count(len(left_out), 'case')} to fit the time limit" if left_out else ""
        found.append(f"The run did not finish: cases are missing{why}.")
    if beyond := faster_than_bound(run.rows):
        found.append(beyond)
    return found


def _undone(run: Run) -> str:
    """How many cases have no speed, by status."""
    statuses = [row.status for row in run.rows if row.status != "timed"]
    return ", ".join(f"{count(statuses.count(status), 'case')} {status}" for status in dict.fromkeys(statuses))


def answers(run: Run) -> dict[str, list[str]]:
    """What a reader asks of a run, and the answer in sentences computed from it."""
    by_group = groups(timed(run.rows))
    return {
        "How fast?": _how_fast(by_group),
        "Against whom?": _against_whom(by_group, run),
        "On what?": _on_what(run),
        "How sure?": _how_sure(run),
        "How close to the roofline bound?": _how_close(by_group, run),
    }


def _how_fast(by_group: dict[str, list[Row]]) -> list[str]:
    found = []
    for group, rows in by_group.items():
        best = against_the_fastest(rows)
        if best:
            found.append(
                f"{group.capitalize()}: fastvit {best} {best.peer} (geometric mean of {count(best.cases, 'case')}; "
                f"{best.verdicts})."
            )
    return found or ["Nothing was timed beside a peer."]


def _against_whom(by_group: dict[str, list[Row]], run: Run) -> list[str]:
    found = []
    for group, rows in by_group.items():
        standings = ", ".join(f"{s.peer} {s.score}" for s in against_each(rows))
        if standings:
            found.append(f"Our speed over theirs, {group}: {standings}.")
    absent = {}
    for name in peers_of(run.rows):
        entries = [row.entries[name] for row in run.rows if name in row.entries]
        if all(entry.status == "absent" for entry in entries):
            absent[name] = entries[0].reason
    if absent:
        found.append("Absent: " + "; ".join(f"{name} ({reason})" for name, reason in absent.items()) + ".")
    return found or ["No peer took part."]


def _on_what(run: Run) -> list[str]:
    settings = [weights(run), f"images: {run.settings['images']}" if run.settings.get("images") else ""]
    return [f"{device(run)}; " + "; ".join(part for part in [versions(run), *settings] if part) + "."]


def _how_sure(run: Run) -> list[str]:
    rows = timed(run.rows)
    ratios = [entry.ratio for row in rows for entry in row.entries.values() if entry.ratio]
    right = sum(_right(row) for row in run.rows)
    checked = sum(row.status in ("timed", "wrong") for row in run.rows)
    found = [f"Before it was timed, our output was held against float64: {right} of {checked} cases within the limit."]
    if ratios:
        width = statistics.median((spread.q75 - spread.q25) / spread.median for spread in ratios)
        low, high = min(s.rounds for s in ratios), max(s.rounds for s in ratios)
        rounds = f"{low}" if low == high else f"{low} to {high}"
        found.append(
            f"Each ratio is the median of {rounds} paired rounds; half of a ratio's rounds lie within "
            f"{100 * width:.1f} % of each other (median over {count(len(ratios), 'ratio')}). "
            "A ratio whose interval holds 1 is called a tie."
        )
    return found


def _right(row: Row) -> bool:
    ours = row.entries.get(OURS)
    return row.status == "timed" and ours is not None and ours.status == "timed"


def _how_close(by_group: dict[str, list[Row]], run: Run) -> list[str]:
    found = [
        f"{group.capitalize()}: {_span(values)} of the speed that the roofline bound allows."
        for group, rows in by_group.items()
        if (values := fractions(rows))
    ]
    if not found or run.peaks is None:
        return ["Not known: the device's peaks were not measured in this run."]
    products = ", ".join(f"{quantity(rate, 'FLOP/s')} in {dtype}" for dtype, rate in run.peaks.flops_per_s.items())
    copy = quantity(run.peaks.bytes_per_s, "B/s")
    return [*found, f"Peaks measured in the same run: {copy} in a copy; in matrix products {products}."]


INTERVAL = (
    "A ratio's interval holds its true median in 99 cases of 100 (by a sign test), and the middle half of its rounds; "
    "where it holds 1, the ratio is called a tie."
)

METHOD = (
    "All entries of a case have the same weights and take the same input in the same precision; a remark says what "
    "differs.",
    "Every entry's output, and in training the gradients of ours, is checked against float64 before anything is timed; "
    "an entry that is wrong shows its error and no speed.",
    "Entries run interleaved, in a fresh random order every round, after a warm-up, so that drift affects all alike.",
    f"Times are medians with quartiles over rounds; ratios are taken round by round, then their median. {INTERVAL}",
    "Single ops take inputs that are not in the cache; models run as they are.",
)
METHOD_CPU = "The clock is the system's monotonic one; the number of threads is fixed to the one that is named."
METHOD_GPU = (
    "The clock is CUDA events; the GPU's frequencies are not fixed. A call from Python is timed, and separately the "
    "time until it returns on the host, and the time of its replay as a CUDA graph, which does not wait for the host."
)

GLOSSARY = {
    "images/s": "Images a second, the median over rounds. Of a single op: the time of one call.",
    "ours/this": "Our speed over this entry's: above 1, we are faster. In brackets the ratio's interval; results "
    "files from before it was kept have none.",
    "tie": "The ratio's interval holds 1: the run does not tell the two apart.",
    "CUDA graph": "Time of a call recorded once and replayed by the GPU alone: where it is much shorter, the call "
    "itself waited for Python.",
    "of bound": "The roofline bound over the time taken: 100 % is as fast as the measured peaks allow.",
    "roofline bound": "The least time for the case's floating-point operations and bytes of memory, kernel by kernel, "
    "at the measured peaks.",
    "measured peaks": "What this device reached in the same run in a large copy and in large matrix products.",
    "error": "Relative rms error of the output against the same model in float64. Above the limit nothing is timed.",
    "peak MB": "Memory that one call needs beyond weights and input, 10^6 bytes.",
    "compile s": "Time to the first answer, where something is compiled for it.",
    "J/image": "Energy of the device for one image.",
    "inference, training": "A forward pass; a forward and a backward pass, without the optimiser.",
}

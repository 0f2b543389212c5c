"""A run in words and figures: what the terminal, the page, the pictures and the README all say, each said once here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from ..schema import OURS, Contestant, Ratio, Row, Run

NOT_THE_KERNELS = (
    "Only fastvit's PyTorch back end was timed here: its Triton kernels need a GPU, were not timed, "
    "and nothing here says how fast they are."
)
BEYOND_THE_LIMIT = 1.05  # a fraction of the floor that noise does not explain
# Headings of `cells`, in the order of report.
COLUMNS = ("by", "images/s", "ours/this", "of floor", "error", "peak MB", "compile s", "J/image")


def on_gpu(run: Run) -> bool:
    return "gpu" in run.environment


def ours_is(run: Run) -> str:
    return "fastvit" if on_gpu(run) else "fastvit's PyTorch back end"


def timed(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.status == "timed" and OURS in row.contestants and row.contestants[OURS].seconds]


def peers_of(rows: list[Row]) -> list[str]:
    """Every peer's name, in order of first appearance."""
    return [name for name in dict.fromkeys(name for row in rows for name in row.contestants) if name != OURS]


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
    """With the prefix that suits: 1.23e12 FLOP/s is 1.23 TFLOP/s."""
    prefix, size = _unit(value, {"T": 1e12, "G": 1e9, "M": 1e6, "": 1})
    return f"{digits(value / size)} {prefix}{unit}"


def _unit(value: float, sizes: dict[str, float]) -> tuple[str, float]:
    """The largest unit that `value` fills, or the smallest there is; sizes: largest first."""
    return next((pair for pair in sizes.items() if value >= pair[1]), list(sizes.items())[-1])


def percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


def count(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def rate(row: Row, side: Contestant) -> tuple[float, float, float] | None:
    """Images a second, median and quartiles."""
    if side.seconds is None:
        return None
    return row.items / side.seconds.median, row.items / side.seconds.q75, row.items / side.seconds.q25


def score(found: Ratio, verdict: str) -> str:
    """A ratio in a word: "1.31", or "tie" where it is one."""
    return "tie" if verdict == "tie" else _factor(found.median, verdict)


def ends(found: Ratio, verdict: str) -> list[str]:
    """Of the interval that the verdict rests on; empty where the results file is from before it was kept."""
    return [] if found.low is None else [_factor(end, verdict) for end in (found.low, found.high)]


def ratio(found: Ratio | None, verdict: str) -> str:
    """ "1.31 [1.29 1.33]"; "tie [0.98 1.02]" where it is one."""
    if found is None:
        return ""
    interval = " ".join(ends(found, verdict))
    return score(found, verdict) + (f" [{interval}]" if interval else "")


def _factor(value: float, verdict: str) -> str:
    """Two decimals; more where, of what is no tie, they would read as 1."""
    digits = 2
    while verdict != "tie" and value != 1 and round(value, digits) == 1:
        digits += 1
    return f"{value:.{digits}f}"


def cells(row: Row, name: str) -> dict[str, str]:
    """One contestant as text by COLUMNS; empty where it was not measured. An op's speed is the time of a call."""
    side = row.contestants[name]
    found = rate(row, side)
    fraction = row.fraction_of_floor(name)
    speed = "" if found is None else duration(side.seconds.median) if row.op else number(found[0])
    return {
        "by": name,
        "images/s": speed,
        "ours/this": ratio(side.ratio, side.verdict),
        "of floor": "" if fraction is None else percent(fraction),
        "error": "" if side.error is None else f"{side.error:.1e}",
        "peak MB": "" if side.peak_bytes is None else number(side.peak_bytes / 1e6),
        "compile s": "" if side.compile_seconds is None else number(side.compile_seconds),
        "J/image": "" if side.joules is None else number(side.joules / row.items),
    }


def aside(side: Contestant) -> str:
    """What the columns leave out: how the contestant differs, and its other two times."""
    parts = []
    if side.graph:
        beside = f", ours/this {ratio(side.graph_ratio, side.graph_verdict)}" if side.graph_ratio else ""
        parts.append(f"CUDA graph {duration(side.graph.median)}{beside}")
    if side.host:
        parts.append(f"until the call returned {duration(side.host.median)}")
    return "; ".join([*parts, side.note] if side.note else parts)


def outcome(side: Contestant, limit: float | None) -> str:
    """Why a contestant has no speed, on one line."""
    if side.status == "wrong" and not side.reason and side.error is not None and limit is not None:
        return f"wrong: error {side.error:.1e} is more than the limit {limit:.1e}"
    return f"{side.status}: {side.reason}" if side.reason else side.status


# ---------------------------------------------------------------------------------------------------------------------
# Names


def subject(row: Row) -> str:
    """The model, with the image size where that is not its own."""
    return row.id.partition("/")[0]


def group_of(row: Row) -> str:
    """What is compared with what: "inference", "training", or the same of single ops."""
    return f"single ops, {row.mode}" if row.op else row.mode


def groups(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by group, whole models first."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: bool(row.op)):
        found.setdefault(group_of(row), []).append(row)
    return found


def versions(run: Run) -> str:
    """ "torch 2.13.0, triton 3.7.1, fastvit 0.1.0 at 9423417": what of it the environment has."""
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


def _standing(peer: str, sides: list[Contestant]) -> Standing:
    verdicts = [side.verdict for side in sides]
    return Standing(
        peer,
        statistics.geometric_mean(side.ratio.median for side in sides),
        *(verdicts.count(verdict) for verdict in ("faster", "tie", "slower")),
    )


def against_each(rows: list[Row]) -> list[Standing]:
    """Ours against every peer that was timed in some row, in the order of report."""
    sides = {peer: [row.contestants[peer] for row in rows if peer in row.contestants] for peer in peers_of(rows)}
    sides = {peer: [side for side in found if side.ratio] for peer, found in sides.items()}
    return [_standing(peer, found) for peer, found in sides.items() if found]


def against_the_fastest(rows: list[Row]) -> Standing | None:
    """Ours against the fastest peer of each row, whichever that is there; None where no peer was timed."""
    fastest = []
    for row in rows:
        peers = [side for name, side in row.contestants.items() if name != OURS and side.ratio and side.seconds]
        if peers:
            fastest.append(min(peers, key=lambda side: side.seconds.median))
    return _standing("the fastest peer of each case", fastest) if fastest else None


def fractions(rows: list[Row]) -> list[float]:
    found = [row.fraction_of_floor() for row in rows]
    return [fraction for fraction in found if fraction is not None]


def beyond_the_limit(rows: list[Row]) -> str:
    """Which sides took less than the least time there is, and what that says; empty where none did."""
    sides = ", ".join(f"{side} (to {percent(fraction)} of it)" for side, fraction in _beyond(timed(rows)).items())
    return sides and (
        f"Faster than the limit as measured: {sides}. The device can do more than the copy and PyTorch's matrix "
        "product that measured it: distances to the limit are distances to those."
    )


def _beyond(rows: list[Row]) -> dict[str, float]:
    """The sides that took less than the least time there is, and the largest fraction of the limit each reached."""
    found: dict[str, float] = {}
    for row in rows:
        for side in row.contestants:
            fraction = row.fraction_of_floor(side)
            if fraction is not None and fraction > BEYOND_THE_LIMIT:
                found[side] = max(fraction, found.get(side, 0.0))
    return found


def _span(values: list[float]) -> str:
    """Lowest, highest and median as percentages."""
    low, middle, high = percent(min(values)), percent(statistics.median(values)), percent(max(values))
    return middle if low == high else f"{middle} (median; {low} to {high})"


def headline(run: Run) -> str:
    """One sentence: how fast, against whom, on what, how close to the limit."""
    for group, rows in groups(timed(run.rows)).items():
        best = against_the_fastest(rows)
        if best is None:
            continue
        cases = f"{count(best.cases, 'case')} of {group}: {best.verdicts}"
        sentence = f"On {device(run)}, {ours_is(run)} {best} {best.peer} ({cases})"
        found = fractions(rows)
        if not found or _beyond(rows):
            return f"{sentence}."
        return f"{sentence}, and reaches {_span(found)} of the device's limit."
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
    if beyond := beyond_the_limit(run.rows):
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
        "How close to the limit?": _how_close(by_group, run),
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
        sides = [row.contestants[name] for row in run.rows if name in row.contestants]
        if all(side.status == "absent" for side in sides):
            absent[name] = sides[0].reason
    if absent:
        found.append("Absent: " + "; ".join(f"{name} ({reason})" for name, reason in absent.items()) + ".")
    return found or ["No peer took part."]


def _on_what(run: Run) -> list[str]:
    settings = [weights(run), f"images: {run.settings['images']}" if run.settings.get("images") else ""]
    return [f"{device(run)}; " + "; ".join(part for part in [versions(run), *settings] if part) + "."]


def _how_sure(run: Run) -> list[str]:
    rows = timed(run.rows)
    ratios = [side.ratio for row in rows for side in row.contestants.values() if side.ratio]
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
    ours = row.contestants.get(OURS)
    return row.status == "timed" and ours is not None and ours.status == "timed"


def _how_close(by_group: dict[str, list[Row]], run: Run) -> list[str]:
    found = [
        f"{group.capitalize()}: {_span(values)} of the roofline's speed."
        for group, rows in by_group.items()
        if (values := fractions(rows))
    ]
    if not found or run.ceilings is None:
        return ["Not known: the device's ceilings were not measured in this run."]
    peaks = ", ".join(f"{quantity(rate, 'FLOP/s')} in {dtype}" for dtype, rate in run.ceilings.flops_per_s.items())
    return [*found, f"Measured in the same run: {quantity(run.ceilings.bytes_per_s, 'B/s')} of a copy; {peaks}."]


INTERVAL = (
    "A ratio's interval holds its true median in 99 cases of 100 (by a sign test), and the middle half of its rounds; "
    "where it holds 1, the ratio is called a tie."
)

METHOD = (
    "All sides of a case hold the same weights and take the same input in the same precision; what differs is said "
    "beside the name.",
    "Every side's output, and in training the gradients of ours, is checked against float64 before anything is timed; "
    "a side that is wrong shows its error and no speed.",
    "Sides run interleaved, in a fresh random order every round, after a warm-up, so that what drifts falls on all.",
    f"Times are medians with quartiles over rounds; ratios are taken round by round, then their median. {INTERVAL}",
    "Single ops find their input out of the cache; models run as they are.",
)
METHOD_CPU = "The clock is the system's monotonic one; the threads are pinned to the number that is said."
METHOD_GPU = (
    "The clock is CUDA events, with the clocks of the GPU left alone. A call from Python is timed, and shown apart the "
    "time until it returns on the host and the time of its CUDA graph replayed, which no host holds up."
)

GLOSSARY = {
    "images/s": "Images a second, the median over rounds. Of a single op: the time of one call.",
    "ours/this": "Our speed over this side's: above 1, we are faster. In brackets the ratio's interval; results "
    "files from before it was kept have none.",
    "tie": "The ratio's interval holds 1: the run does not tell the two apart.",
    "CUDA graph": "Time of a call recorded once and replayed by the GPU alone: where it is much shorter, the call "
    "itself waited for Python.",
    "of floor": "The least time that the device could take, over the time taken: 100 % is the roofline.",
    "roofline": "The least time for the case's floating-point operations and bytes of memory, kernel by kernel, at the "
    "matrix and copy speeds that this device reached in the same run.",
    "error": "Relative rms error of the output against the same model in float64. Beyond the limit nothing is timed.",
    "peak MB": "Memory that one call needs beyond weights and input, 10^6 bytes.",
    "compile s": "Time to the first answer, where something is compiled for it.",
    "J/image": "Energy of the device for one image.",
    "inference, training": "A forward pass; a forward and a backward pass, without the optimiser.",
}

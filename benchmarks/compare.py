"""What changed between two results files, row by row: `fastvit bench compare BEFORE AFTER`.

A time has changed if its median moved by more than a threshold and the quartiles of the two runs do not overlap. Only
ours can fail the comparison. The peers' times show whether the machine itself became slower or faster; if it did so
unevenly, so that peers moved relative to each other, our times are not judged at all.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations

from .schema import OURS, Entry, Row, Run, Spread, is_ours

MEMORY_NOISE = 4 << 20  # bytes that a CPU's resident set varies by from run to run
# Two runs are not comparable where two peers moved relative to each other by this factor, in the mean of their rows. In
# runs of several rows on two CPU cores, some slowed down six times by other programs, no two peers moved apart by more
# than 1.13 (1.24 in a single row), and a new PyTorch that makes its peers 1.2 times as fast as the others should still
# be comparable. What slows some peers down by 1.5, such as fewer threads or cores for them alone, may have slowed ours
# down as well or not: that cannot be known.
APART = 1.5
# Facts of the environment that may differ between runs; the comparison then warns of it.
_WARNED_OF = ("processor", "cpu_count", "torch_threads", "torch", "python", "platform", "gpu", "packages", "variables")


@dataclass(frozen=True)
class Change:
    """What changed of one entry of a row. id: of the row; entry: its name. ratio: seconds after over seconds before,
    above 1 is slower; None where it is not the time that changed. what: "slower", "faster", "unchanged" or "not
    judged", "error grew", "memory grew", "appeared", "vanished", or the new status ("wrong", "failed", "absent",
    "skipped", "timed"). bad: whether the comparison fails because of it."""

    id: str
    entry: str
    what: str
    ratio: float | None = None
    detail: str = ""
    bad: bool = False


@dataclass
class Comparison:
    """changes: of all entries, unchanged ones included. drift: for every peer, the geometric mean of its ratios and the
    number of rows. warnings: what else differs between the runs. incomparable: why our times are not judged, empty if
    they are."""

    changes: list[Change] = field(default_factory=list)
    drift: dict[str, tuple[float, int]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    incomparable: str = ""

    @property
    def status(self) -> int:
        """The exit status: 1 if any of ours got slower or wrong, else 2 if the runs cannot be compared, else 0."""
        return 1 if any(change.bad for change in self.changes) else 2 if self.incomparable else 0


def compare(before: Run, after: Run, threshold: float = 0.05, relative: str | None = None) -> Comparison:
    """Compare two runs of one device. relative: judge our time by its ratio to this peer's in the same rounds, which
    does not depend on how fast the machine was. If two peers moved relative to each other by APART, our times are not
    judged, except relative to a peer that most others moved with.

    Raises ValueError if the runs are of different devices or have no case in common, or if no case of both has a ratio
    of `relative` to ours.
    """
    devices = [run.environment.get("device") for run in (before, after)]
    if devices[0] != devices[1]:
        raise ValueError(f"the runs are of different devices, {devices[0]!r} and {devices[1]!r}: not comparable")
    old, new = ({row.id: row for row in run.rows} for run in (before, after))
    both = [id for id in new if id in old]
    if not both:
        raise ValueError("the runs have no case in common")
    if relative and not any(_beside(old[id], relative) and _beside(new[id], relative) for id in both):
        timed = dict.fromkeys(name for id in both for name in new[id].entries if _beside(new[id], name))
        raise ValueError(f"{relative!r} was timed in no case of both runs, expected one of {', '.join(timed)}")
    found = Comparison(warnings=list(_differences(before, after)))
    for id in both:
        found.changes += _row_changes(old[id], new[id], threshold, relative)
    found.changes += [
        Change(id, OURS, "appeared", detail=new[id].status, bad=new[id].status == "wrong")
        for id in new
        if id not in old
    ]
    found.changes += [Change(id, OURS, "vanished") for id in old if id not in new]
    moves = _moves(old, new, both)
    found.drift = {name: (statistics.geometric_mean(by_row.values()), len(by_row)) for name, by_row in moves.items()}
    found.incomparable = _incomparable(moves, relative)
    if found.incomparable:
        found.changes = [
            replace(change, what="not judged", bad=False) if is_ours(change.entry) and change.ratio else change
            for change in found.changes
        ]
    return found


def _beside(row: Row, peer: str) -> Spread | None:
    entry = row.entries.get(peer)
    return entry.ratio if entry else None


def _differences(before: Run, after: Run) -> Iterator[str]:
    for key in _WARNED_OF:
        a, b = before.environment.get(key), after.environment.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            for name in dict.fromkeys((*a, *b)):
                if a.get(name) != b.get(name):
                    yield f"{key}: {name} was {a.get(name)}, is {b.get(name)}"
        elif a != b:
            yield f"{key} was {a}, is {b}"
    for key in ("weights", "images"):
        if before.settings.get(key) != after.settings.get(key):
            yield f"{key}: {before.settings.get(key)}, then {after.settings.get(key)}"


def _row_changes(old: Row, new: Row, threshold: float, relative: str | None) -> Iterator[Change]:
    # A row without entries was not started, or its case could not be prepared.
    if old.status != new.status and not (OURS in old.entries and OURS in new.entries):
        yield Change(new.id, OURS, new.status, detail=new.reason, bad=new.status in ("wrong", "failed"))
        return
    for name in dict.fromkeys((*old.entries, *new.entries)):
        a, b = old.entries.get(name), new.entries.get(name)
        if a is None or b is None:
            # The runs chose other peers. Where ours became wrong, no peer is measured: our own change says that.
            if new.status == old.status:
                yield Change(new.id, name, "vanished" if b is None else "appeared")
            continue
        if a.status != b.status:
            bad = is_ours(name) and b.status in ("wrong", "failed")
            yield Change(new.id, name, b.status, detail=b.reason, bad=bad)
        if a.seconds and b.seconds:
            by_peer = (_beside(old, relative), _beside(new, relative)) if relative and name == OURS else ()
            yield _time_change(new.id, name, a.seconds, b.seconds, threshold, relative, by_peer)
        yield from _other_changes(new.id, name, a, b, threshold)


def _time_change(
    id: str, name: str, a: Spread, b: Spread, threshold: float, relative: str | None, by_peer: tuple
) -> Change:
    detail = f"{_milliseconds(a.median)} to {_milliseconds(b.median)} ms"
    if by_peer:
        if None in by_peer:
            return Change(id, name, "not judged", detail=f"{detail}; {relative} was not timed beside it")
        # The ratio is the peer's time over ours; its inverse is our time in units of the peer's.
        a, b = (Spread(1 / s.median, 1 / s.q75, 1 / s.q25, s.rounds) for s in by_peer)
        detail += f"; {a.median:.3f} to {b.median:.3f} times that of {relative}"
    ratio = b.median / a.median
    slower = ratio > 1 + threshold and b.q25 > a.q75
    faster = ratio < 1 / (1 + threshold) and b.q75 < a.q25
    what = "slower" if slower else "faster" if faster else "unchanged"
    return Change(id, name, what, ratio, detail, bad=slower and is_ours(name))


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def _other_changes(id: str, name: str, a: Entry, b: Entry, threshold: float) -> Iterator[Change]:
    if a.error is not None and b.error is not None and b.error > a.error * (1 + threshold):
        yield Change(id, name, "error grew", detail=f"{a.error:.2e} to {b.error:.2e}")
    if a.peak_bytes is not None and b.peak_bytes is not None:
        most = max(a.peak_bytes * (1 + threshold), a.peak_bytes + MEMORY_NOISE)
        if b.peak_bytes > most:
            detail = f"{a.peak_bytes / 1e6:.1f} to {b.peak_bytes / 1e6:.1f} MB"
            yield Change(id, name, "memory grew", detail=detail)


def _moves(old: dict[str, Row], new: dict[str, Row], both: list[str]) -> dict[str, dict[str, float]]:
    """For every peer and row: its seconds after over its seconds before."""
    moves: dict[str, dict[str, float]] = {}
    for id in both:
        for name, entry in new[id].entries.items():
            before = old[id].entries.get(name)
            if not is_ours(name) and entry.seconds and before and before.seconds:
                moves.setdefault(name, {})[id] = entry.seconds.median / before.seconds.median
    return moves


def _incomparable(moves: dict[str, dict[str, float]], relative: str | None) -> str:
    """A sentence on why our times cannot be judged; empty if they can: no two peers moved by APART relative to each
    other, or more than half of the peers, `relative` included, moved with `relative`."""
    # Distances row by row: in a mean over rows, a peer that is faster in one and slower in another would not move.
    between = {}
    for a, b in combinations(moves, 2):
        if shared := {id: abs(math.log(moves[a][id] / moves[b][id])) for id in moves[a] if id in moves[b]}:
            between[a, b] = shared
    apart = {pair: statistics.fmean(rows.values()) for pair, rows in between.items()}
    apart = {pair: distance for pair, distance in apart.items() if distance > math.log(APART)}
    against = Counter(name for pair in apart for name in pair)  # how many peers each moved against
    yardsticks = [name for name in moves if 2 * against[name] < len(moves)]
    if not apart or relative in yardsticks:
        return ""
    pair = max((pair for pair in apart if relative in (None, *pair)), key=apart.get)
    row = max(between[pair], key=between[pair].get)
    quick, slow = sorted(pair, key=lambda name: moves[name][row])
    found = (
        f"These runs cannot be compared: {quick} took {moves[quick][row]:.3g} times as long as before, "
        f"{slow} {moves[slow][row]:.3g} times ({row})."
    )
    if yardsticks:
        found += f" Most peers moved with {yardsticks[0]}: --relative {yardsticks[0]} judges ours beside it."
    return found


def lines(found: Comparison, threshold: float, relative: str | None) -> Iterator[str]:
    """The comparison as lines of text. Unchanged times of peers are left out, ours are not."""
    for warning in found.warnings:
        yield f"differs: {warning}"
    width = max((len(change.id) for change in found.changes), default=0)
    for change in found.changes:
        if change.what == "unchanged" and not is_ours(change.entry):
            continue
        ratio = "" if change.ratio is None else f"{change.ratio:.3f}"
        mark = "!" if change.bad else " "
        told = f"{mark} {change.id:{width}}  {change.entry:16} {change.what:11} {ratio:>6}  {change.detail}"
        yield told.rstrip()
    for name, (ratio, rows) in found.drift.items():
        yield f"drift of {name}: {ratio:.3f} times as long as before, over {rows} row{'s' if rows > 1 else ''}"
    if found.drift and not relative and not found.incomparable:
        mean = statistics.geometric_mean(ratio for ratio, _ in found.drift.values())
        if not 1 / (1 + threshold) <= mean <= 1 + threshold:
            yield f"The peers' own times moved by {mean:.3f}: the machine did, too. --relative PEER leaves that out."
    ours = [change for change in found.changes if change.entry == OURS]
    counts = {what: sum(change.what == what for change in ours) for what in dict.fromkeys(c.what for c in ours)}
    yield "ours: " + ", ".join(f"{count} {what}" for what, count in counts.items())
    if found.incomparable:
        yield found.incomparable

"""The form of a results file: what a run of the suite writes, and everything that reads one takes.

A file is one `Run`: the environment and settings it was made in, the measured peaks of the device, and a `Row` for each
case with one `Entry` for ours and for each peer, "ours" first. Times are seconds of one call, medians and quartiles
over interleaved rounds. Files carry the schema's version; another version is refused.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

KIND, SCHEMA = "fastvit bench", 3
OURS = "ours"
# Further entries that are ours, whose ratios to each peer a row keeps too: a frozen model with nothing installed beside
# PyTorch, and on the fastest runtime that is installed.
SIDES = ("frozen", "frozen auto")


@dataclass
class Spread:
    """Median, quartiles and number of measurements."""

    median: float
    q25: float
    q75: float
    rounds: int


@dataclass
class Ratio(Spread):
    """A ratio of paired rounds. low, high: the interval that its verdict rests on (`fastvit.measure.interval`): where
    it contains 1, the verdict is "tie". None in files from before intervals were kept."""

    low: float | None = None
    high: float | None = None


@dataclass
class Duel:
    """A peer's time over that of a side of ours in paired rounds, and whether the side is "faster", "slower" or a
    "tie"."""

    ratio: Ratio
    verdict: str


# The fields of an Entry that are not plain values.
SPREADS = {"seconds": Spread, "ratio": Ratio, "graph": Spread, "graph_ratio": Ratio, "host": Spread}


@dataclass
class Entry:
    """What was measured of one implementation, ours or a peer, in one case.

    status: "timed", "wrong" (its error is above the limit: not timed), "failed" (it raised: `reason` is the first line)
    or "absent" (not installed, or it has no such model). note: how it differs from the case ("tanh GELU"). error:
    relative rms of the output against float64. ratio: this entry's time over ours in paired rounds, above 1 where ours
    is faster; verdict: whether ours is "faster", "slower" or a "tie". graph: time when replayed from a CUDA graph, with
    ratio and verdict of those times; host: time until the call returned. joules: energy of a call. peak_bytes: memory
    beyond weights and input, None where it cannot be measured. compile_seconds: how much longer the first call took, of
    a peer that compiles or of our kernels.
    """

    status: str = "timed"
    reason: str = ""
    note: str = ""
    error: float | None = None
    seconds: Spread | None = None
    ratio: Ratio | None = None
    verdict: str = ""
    graph: Spread | None = None
    graph_ratio: Ratio | None = None
    graph_verdict: str = ""
    host: Spread | None = None
    peak_bytes: int | None = None
    joules: float | None = None
    compile_seconds: float | None = None


@dataclass
class Row:
    """One case: its parts (as in `cases.Case`, the dtype's short name), its least cost, and an entry by each name.

    status: "timed", "wrong" (ours is: nothing is timed), "failed" (ours raised) or "skipped" (the time limit). limit:
    the largest `error` allowed. flops, bytes: the least that the case needs; bound_seconds: the roofline bound, the
    least time for them at the run's measured peaks, None without those. items: images in a call; 1 for an op. against:
    of each of SIDES that was timed, the duel with each other entry, by name.
    """

    id: str
    model: str
    op: str
    img_size: int
    tokens: int
    dtype: str
    batch: int
    mode: str
    status: str
    reason: str = ""
    items: int = 1
    limit: float | None = None
    flops: float | None = None
    bytes: float | None = None
    bound_seconds: float | None = None
    entries: dict[str, Entry] = field(default_factory=dict)
    against: dict[str, dict[str, Duel]] = field(default_factory=dict)

    def seen_from(self, side: str) -> Row:
        """The row with this side in the place of ours, and without the rest of ours; ratios and verdicts are its."""
        entries = {OURS: replace(self.entries[side], ratio=None, verdict="")} if side in self.entries else {}
        for name, entry in self.entries.items():
            if not is_ours(name):
                duel = self.against.get(side, {}).get(name)
                found = {"ratio": duel.ratio, "verdict": duel.verdict} if duel else {"ratio": None, "verdict": ""}
                entries[name] = replace(entry, **found)
        return replace(self, entries=entries, against={})

    def fraction_of_bound(self, name: str = OURS) -> float | None:
        """The roofline bound over this entry's time: 1 is the fastest possible at the measured peaks."""
        entry = self.entries.get(name)
        if entry is None or entry.seconds is None or self.bound_seconds is None:
            return None
        return self.bound_seconds / entry.seconds.median


def is_ours(name: str) -> bool:
    """Whether an entry is fastvit's: as it is, or frozen."""
    return name == OURS or name.startswith("frozen")


@dataclass
class Peaks:
    """Measured peaks, what the device reached in this run: bytes/s of a large copy, and FLOP/s of a large matrix
    product by dtype, on a CPU by the fastest library that is there."""

    bytes_per_s: float
    flops_per_s: dict[str, float]


@dataclass
class Run:
    """One results file. environment: as `fastvit.environment.environment` gives it, with commit, seed and clocks;
    started: ISO 8601, UTC; finished: whether every case was measured; extra: what only some runs have (the photographs'
    classes; "left_out": estimated seconds by the id of each case that did not fit the time limit)."""

    environment: dict
    settings: dict
    started: str
    finished: bool = False
    seconds: float = 0.0
    peaks: Peaks | None = None
    rows: list[Row] = field(default_factory=list)
    extra: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        return {"kind": KIND, "schema": SCHEMA} | asdict(self)


def load(path: str | Path) -> Run:
    """Read a results file. Raises OSError, and ValueError where it is not a results file or of another schema."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        kind, schema = found["kind"], found["schema"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not a results file of {KIND!r}") from None
    if kind != KIND or schema != SCHEMA:
        raise ValueError(f"{path}: {kind!r} of schema {schema!r}, expected {KIND!r} of schema {SCHEMA}")
    try:
        rows = [_row(row) for row in found.pop("rows")]
        peaks = found.pop("peaks")
        known = {name: found[name] for name in (f.name for f in fields(Run)) if name in found}
        return Run(**known, rows=rows, peaks=peaks and Peaks(**peaks))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: a damaged results file ({type(error).__name__}: {error})") from None


def _row(found: dict) -> Row:
    entries = {name: _entry(entry) for name, entry in found["entries"].items()}
    against = {
        side: {name: Duel(Ratio(**duel["ratio"]), duel["verdict"]) for name, duel in duels.items()}
        for side, duels in found.get("against", {}).items()
    }
    return Row(**found | {"entries": entries, "against": against})


def _entry(found: dict) -> Entry:
    spreads = {name: form(**found[name]) for name, form in SPREADS.items() if found.get(name)}
    return Entry(**found | spreads)

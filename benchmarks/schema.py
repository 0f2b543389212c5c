"""The form of a results file: what a run of the suite writes, and everything that reads one takes.

A file is one `Run`: the environment and settings it was made in, the ceilings of the device, and a `Row` a case with
one `Contestant` a peer, "ours" first. Times are seconds of one call, medians and quartiles over interleaved rounds.
Files carry the schema's number; another number is refused.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

KIND, SCHEMA = "fastvit bench", 2
OURS = "ours"


@dataclass
class Spread:
    """Median, quartiles and number of measurements."""

    median: float
    q25: float
    q75: float
    rounds: int


@dataclass
class Ratio(Spread):
    """A ratio of paired rounds. low, high: the interval that its verdict rests on (`fastvit.measure.interval`): a tie
    is one that holds 1. None in files from before intervals were kept."""

    low: float | None = None
    high: float | None = None


# Fields of a Contestant.
SPREADS = {"seconds": Spread, "ratio": Ratio, "graph": Spread, "graph_ratio": Ratio, "host": Spread}


@dataclass
class Contestant:
    """One side of a row.

    status: "timed", "wrong" (its error is beyond the limit: no speed), "failed" (it raised: `reason` is the first line)
    or "absent" (not installed, or it has no such model). note: how it differs from the case ("tanh GELU"). error:
    relative rms of the output against float64. ratio: this side's time over ours in paired rounds, so that above 1 ours
    is faster; verdict: of that, "faster" (ours), "slower" or "tie". graph: replayed from a CUDA graph, with the ratio
    and the verdict of those times; host: until the call returned. joules: energy a call. peak_bytes: memory beyond
    weights and input, None where it cannot be seen. compile_seconds: before the first answer of a peer that compiles,
    or of our kernels.
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
    """One case: its parts (as in `cases.Case`, the dtype's short name), what it must cost, and how each side did.

    status: "timed", "wrong" (ours is: nothing is timed), "failed" (ours raised) or "skipped" (the time limit). limit:
    the most that `error` may be. flops, bytes: the least the case needs; floor_seconds: the least time for them at the
    run's ceilings, None where those were not measured. items: images (of a model) or calls (of an op, 1) a call.
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
    floor_seconds: float | None = None
    contestants: dict[str, Contestant] = field(default_factory=dict)

    def fraction_of_floor(self, name: str = OURS) -> float | None:
        """The floor over this side's time: 1 is the device's limit."""
        side = self.contestants.get(name)
        if side is None or side.seconds is None or self.floor_seconds is None:
            return None
        return self.floor_seconds / side.seconds.median


@dataclass
class Ceilings:
    """What the device reached in this run: bytes/s of a large copy, and FLOP/s of a large matrix product by dtype."""

    bytes_per_s: float
    flops_per_s: dict[str, float]


@dataclass
class Run:
    """One results file. environment: as `fastvit.environment.environment` gives it, with commit, seed and clocks;
    started: ISO 8601, UTC; finished: nothing is left to do; extra: what belongs to one kind of run only (the
    photographs' classes; "left_out", seconds by the id of each case that did not fit the time limit and was not
    started)."""

    environment: dict
    settings: dict
    started: str
    finished: bool = False
    seconds: float = 0.0
    ceilings: Ceilings | None = None
    rows: list[Row] = field(default_factory=list)
    extra: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        return {"kind": KIND, "schema": SCHEMA} | asdict(self)


def load(path: str | Path) -> Run:
    """Read a results file. Raises ValueError, naming it, for what is none, or of another schema; OSError."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        kind, schema = found["kind"], found["schema"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not a results file of {KIND!r}") from None
    if kind != KIND or schema != SCHEMA:
        raise ValueError(f"{path}: {kind!r} of schema {schema!r}, expected {KIND!r} of schema {SCHEMA}")
    try:
        rows = [_row(row) for row in found.pop("rows")]
        ceilings = found.pop("ceilings")
        known = {name: found[name] for name in (f.name for f in fields(Run)) if name in found}
        return Run(**known, rows=rows, ceilings=ceilings and Ceilings(**ceilings))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: a damaged results file ({type(error).__name__}: {error})") from None


def _row(found: dict) -> Row:
    sides = {name: _contestant(side) for name, side in found["contestants"].items()}
    return Row(**found | {"contestants": sides})


def _contestant(found: dict) -> Contestant:
    spreads = {name: form(**found[name]) for name, form in SPREADS.items() if found.get(name)}
    return Contestant(**found | spreads)

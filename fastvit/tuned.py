"""The table of choices: what `fastvit tune` measured, kept on disk, one file a device; and which choices are in force.

A file holds what one device, driver and set of versions measured: for each launch (a `Request`) a config, for each op
and shape a candidate ("triton", "torch", "sdpa flash"), each with its evidence. The user's files lie under `folder()`;
a file shipped with the package (`kernels/tuned/`; there is none yet) fills in what they lack. A user's file counts
where device, driver, versions and kernels' source are those it was measured with, a shipped one where device and source
are: its decisions say what else they were measured with. A file that is damaged, foreign or of another schema is
ignored, with one warning. Nothing is read before the first launch that could use it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

KIND, SCHEMA = "fastvit tuned", 2
MODES = ("off", "read-only", "measure")
KINDS = ("configs", "ops")
# What a shipped file must share with this machine; a user's file, everything.
SHIPPED_MATCH = ("device", "capability", "kernels")
KERNELS = Path(importlib.util.find_spec("fastvit.kernels.gemm").origin).parent


# --------------------------------------------------------------------------------------------------------------------
# Modes


def _checked(name: str, source: str) -> str:
    if name not in MODES:
        raise ValueError(f"{source}: unknown tuning mode {name!r}, expected one of {', '.join(MODES)}")
    return name


_mode = _checked(os.environ.get("FASTVIT_TUNING", "read-only"), "FASTVIT_TUNING")


_when_changed: list[Callable[[], None]] = []


def on_change(callback: Callable[[], None]) -> None:
    """Have callback() called whenever other choices may have come into force: with a mode, a decision, a back end."""
    _when_changed.append(callback)


def changed() -> None:
    """Other choices may have come into force: have everything that follows them made anew."""
    for callback in _when_changed:
        callback()


class Setting:
    """A choice that was just made, as `torch.set_grad_enabled` makes one: it stands, or, as a context manager, until
    the end of the `with` body; as a decorator, while the function runs. again: makes it anew."""

    def __init__(self, undo: Callable[[], None], again: Callable[[], Setting]):
        self._undo, self._again = undo, again

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error) -> None:
        self._undo()

    def __call__(self, function: Callable) -> Callable:
        self._undo()

        @functools.wraps(function)
        def decorated(*args, **kwargs):
            with self._again():
                return function(*args, **kwargs)

        return decorated


def use_tuning(name: str) -> Setting:
    """Tune as FASTVIT_TUNING=`name` would, from now on or in the `with` body: "off" (heuristics only), "read-only"
    (follow the tables) or "measure" (also measure what they lack, at the first eager call on a GPU). The choice is the
    process's. Raises ValueError for an unknown name."""
    before = _mode
    _set_mode(_checked(name, "use_tuning"))
    return Setting(lambda: _set_mode(before), lambda: use_tuning(name))


def _set_mode(name: str) -> None:
    global _mode
    _mode = name
    changed()


def mode() -> str:
    """The mode in force: "off", "read-only" or "measure"."""
    return _mode


# --------------------------------------------------------------------------------------------------------------------
# What a table is measured with


def folder() -> Path:
    """Where this user's tables are: FASTVIT_CACHE, else XDG_CACHE_HOME/fastvit, else ~/.cache/fastvit."""
    if chosen := os.environ.get("FASTVIT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fastvit"


@functools.cache
def source_hash(kernels: Path = KERNELS) -> str:
    """A hash of the kernels' source: of every file there but the model of cost, which makes no code."""
    digest = hashlib.sha256()
    for path in sorted(kernels.rglob("*.py")):
        if path.name != "cost.py":
            digest.update(path.relative_to(kernels).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def driver_version() -> str:
    """The GPU driver's version, as far as it can be told without its tools."""
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            if found := re.search(r"\d+\.\d+(\.\d+)?", Path(path).read_text()):
                return found[0]
    return "unknown"


def identity(device: torch.device) -> dict[str, str]:
    """What a table for `device`, a GPU, is measured with and valid for."""
    from .report import version_of

    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": driver_version(),
        "torch": torch.__version__,
        "triton": version_of("triton") or "unknown",
        "kernels": source_hash(),
    }


# --------------------------------------------------------------------------------------------------------------------
# Files


@dataclass(frozen=True)
class Entry:
    """One decision. choice: a candidate's name, or a config as `{"GemmConfig": {...}}`. incumbent: what would have run
    unmeasured; seconds: (q25, median, q75) of a call of all that were timed; dropped: why others were not; rounds,
    graph: how many interleaved rounds, replayed from CUDA graphs or not; when: ISO 8601, UTC."""

    choice: str | dict
    incumbent: str
    seconds: dict[str, list[float]]
    dropped: dict[str, str] = field(default_factory=dict)
    rounds: int = 0
    graph: bool = True
    when: str = ""

    @property
    def chosen(self) -> str:
        """The choice's name among `seconds`."""
        return self.choice if isinstance(self.choice, str) else label(self.choice)

    def __str__(self) -> str:
        def timed(name: str) -> str:
            q25, median, q75 = (f"{1e6 * value:.1f}" for value in self.seconds[name])
            return f"{name} {median} us [{q25}, {q75}]"

        rest = [name for name in self.seconds if name not in (self.chosen, self.incumbent)]
        named = dict.fromkeys((self.chosen, self.incumbent, *rest))
        dropped = "".join(f"; {name} not timed: {reason}" for name, reason in self.dropped.items())
        how = f"{self.rounds} rounds{'' if self.graph else ' without graphs'}, {self.when}"
        return f"{', '.join(timed(name) for name in named)} ({how}){dropped}"


def label(config: dict) -> str:
    """A config as an entry holds it, as a name: "GemmConfig BLOCK_M=128 ..."."""
    ((kind, values),) = config.items()
    return " ".join([kind, *(f"{name}={value}" for name, value in values.items())])


@dataclass(frozen=True)
class File:
    """One file of decisions: by `Request.key` in configs, by an op's key in ops."""

    path: Path
    identity: dict[str, str]
    configs: dict[str, Entry]
    ops: dict[str, Entry]

    @property
    def versions(self) -> str:
        """What it was measured with."""
        found = self.identity
        return f"{found['device']}, driver {found['driver']}, torch {found['torch']}, Triton {found['triton']}"

    def as_dict(self) -> dict:
        entries = {kind: {key: asdict(entry) for key, entry in getattr(self, kind).items()} for kind in KINDS}
        return {"kind": KIND, "schema": SCHEMA, "identity": self.identity} | entries


_warned: set[Path] = set()


def _warn_once(path: Path, what: str) -> None:
    if path not in _warned:
        _warned.add(path)
        warnings.warn(f"{path}: {what}", stacklevel=2)


def _read(path: Path, expected: dict[str, str], must_match: tuple[str, ...]) -> File | None:
    """The file, or None where there is none, or none to use here: of that it warns once."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["kind"] != KIND or found["schema"] != SCHEMA:
            raise ValueError(f"{found['kind']!r} of schema {found['schema']!r}, expected {KIND!r} of schema {SCHEMA}")
        entries = {kind: {key: _entry(row) for key, row in found[kind].items()} for kind in KINDS}
        file = File(path, {name: found["identity"][name] for name in expected}, **entries)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _warn_once(path, f"ignored, not a table of choices that can be read ({type(error).__name__}: {error})")
        return None
    wrong = [f"{name} {file.identity[name]}" for name in must_match if file.identity[name] != expected[name]]
    if wrong:
        _warn_once(path, f"ignored, measured with another {', '.join(wrong)}")
        return None
    return file


def _entry(row: dict) -> Entry:
    entry = Entry(**row)
    wanted = {entry.incumbent, entry.chosen}  # raises for a choice that is neither a name nor a config
    if not wanted <= set(entry.seconds) or any(len(value) != 3 for value in entry.seconds.values()):
        raise ValueError(f"no times of {', '.join(sorted(wanted))}")
    if not all(math.isfinite(value) for times in entry.seconds.values() for value in times):
        raise ValueError("times that are not finite")
    return entry


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold `path`'s lock against other processes; a process that dies lets go of it."""
    import fcntl

    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --------------------------------------------------------------------------------------------------------------------
# The table in force


class Table:
    """The decisions in force on one device: the user's, then the shipped ones."""

    def __init__(self, identity: dict[str, str], path: Path | None = None, files: tuple[File, ...] = ()):
        self.identity, self.path, self.files = identity, path, files
        # key -> (the decision, the file it is from)
        self.configs: dict[str, tuple[Entry, File]] = {}
        self.ops: dict[str, tuple[Entry, File]] = {}
        # Of each op, what was chosen for it at some shape.
        self.choices: dict[str, set] = {}
        for file in reversed(files):
            for kind in KINDS:
                for key, entry in getattr(file, kind).items():
                    self._adopt(kind, key, entry, file)

    def _adopt(self, kind: str, key: str, entry: Entry, file: File) -> None:
        getattr(self, kind)[key] = (entry, file)
        if kind == "ops" and isinstance(entry.choice, str):
            self.choices.setdefault(key.partition(" ")[0], set()).add(entry.choice)

    @property
    def attempts(self) -> Path | None:
        """Where `attempts.Attempts` keeps what was fatal on this device with these versions; None without a file."""
        return self.path and self.path.with_suffix(".attempts.json")

    @property
    def fingerprint(self) -> str:
        """A hash of what is in force, whatever it was decided on; empty where nothing is."""
        choices = {kind: {key: entry.choice for key, (entry, _) in getattr(self, kind).items()} for kind in KINDS}
        if not any(choices.values()):
            return ""
        return hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()[:12]

    def own(self, kind: str) -> set[str]:
        """The keys of the decisions measured here, with these versions."""
        return {key for key, (_, file) in getattr(self, kind).items() if file.path == self.path}

    def record(self, kind: str, key: str, entry: Entry) -> None:
        """Put a decision in force, and keep it in the user's file beside what other processes wrote there. A file that
        cannot be written costs one warning."""
        mine = next((file for file in self.files if file.path == self.path), None)
        if mine is None:
            mine = File(self.path, self.identity, {}, {})
            self.files = (mine, *self.files)
        getattr(mine, kind)[key] = entry
        self._adopt(kind, key, entry, mine)
        changed()
        try:
            self._save({kind: {key: entry}})
        except (OSError, ImportError) as error:
            _warn_once(self.path, f"cannot be written, decisions last as long as this process ({error})")

    def _save(self, new: dict[str, dict[str, Entry]]) -> None:
        from .report import write_json

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path):
            before = _read(self.path, self.identity, tuple(self.identity))
            kept = {kind: (getattr(before, kind) if before else {}) | new.get(kind, {}) for kind in KINDS}
            write_json(self.path, File(self.path, self.identity, **kept).as_dict())


def load(identity: dict[str, str], shipped: Path = KERNELS / "tuned") -> Table:
    """The table for what `identity` describes, from the user's file and the shipped one."""
    from .report import slug

    name = slug(identity["device"])
    # Environments of one home keep tables of their own: no one's measurements push out another's.
    digest = hashlib.sha256(json.dumps([SCHEMA, identity], sort_keys=True).encode()).hexdigest()[:12]
    path = folder() / f"{name}-{digest}.json"
    found = (_read(path, identity, tuple(identity)), _read(shipped / f"{name}.json", identity, SHIPPED_MATCH))
    return Table(identity, path, tuple(file for file in found if file))


_tables: dict[torch.device, Table] = {}


def table(device: torch.device) -> Table:
    """The table in force for tensors on `device`, read when first asked for; without decisions for what is no GPU."""
    found = _tables.get(device)
    if found is None:
        found = _tables[device] = load(identity(device)) if device.type == "cuda" else Table({})
    return found


def lookup(request, device: torch.device):
    """The config that the table has for a `Request`, or None: what `kernels.launch.choice` asks."""
    found = None if _mode == "off" else table(device).configs.get(request.key)
    if found is None:
        return None
    entry, file = found
    try:
        ((kind, values),) = entry.choice.items()
        requests = importlib.import_module("fastvit.kernels.launch.request")
        return getattr(requests, kind)(**values)
    except (AttributeError, TypeError) as error:
        _warn_once(file.path, f"the choice for {request.key!r} is ignored ({error})")
        return None

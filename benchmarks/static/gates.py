"""The gates that every shipped kernel must pass, and the form of the exceptions to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fastvit.kernels.launch.hardware import ARCHS

from .record import DOT_16, NO_DOT, Record

COMPILE, SPILL, SHARED, SERIALIZED = "compile", "spill", "shared memory", "serialized"
NO_HGMMA, SCALAR, NARROW, FUSION = "no HGMMA", "scalar loads", "narrow stores", "missed fusion"
GATES = {
    COMPILE: "the compiler, or the launcher, raises",
    SPILL: "registers are kept in local memory",
    SHARED: "more than a block may have on the architecture",
    SERIALIZED: "ptxas waits for each of Hopper's asynchronous products before it starts the next",
    NO_HGMMA: "a product of 16-bit matrices on sm_90 without Hopper's instruction for it",
    SCALAR: "in the main loop of a kernel with matrix products, loads of 32 bits or less a thread are eight or more "
    "and outnumber the wider ones. A tile whose rows are contiguous and aligned moves 64 or 128 bits a load; one that "
    "does not, for a stride whose divisibility is lost or a gather, takes eight to sixty-four loads where one to eight "
    "would do. The few narrow loads of a row's statistics or scales, beside wide ones of the tiles, are as they"
    " should be",
    NARROW: "eight or more stores of 16 bits or less a thread, of an element each, where rows that are contiguous and "
    "aligned take 64 or 128 bits a store",
    FUSION: "eight or more multiplications a thread have a result that only additions read, and are not fused with "
    "them: `tl.where` stands between, or fusion is switched off. A multiplication whose result something else reads "
    "too (softmax's row maximum) and additions of other values (softmax's sums) do not count, nor does one "
    "multiplication a row",
}
# A candidate of the tuner that is not shipped is held to these only: by the others it is slow, which the tuner finds
# out, but by these it fails on the device although `configs.why_invalid` lets it pass.
OF_CANDIDATES = (COMPILE, SHARED)
FEW = 8


def findings(record: Record) -> dict[str, str]:
    """{gate: what it found}, of all gates, whether or not the record is held to them."""
    if record.error:
        return {COMPILE: f"does not compile: {record.error}"}
    found = {}
    if record.spill_bytes:
        where = "in its main loop" if record.loop.keys() & {"LDL", "STL", "scratch_load"} else "outside its main loop"
        found[SPILL] = f"spills {record.spill_bytes} bytes of registers, {where}"
    limit = ARCHS[record.arch].shared_per_block
    if record.shared_bytes > limit:
        found[SHARED] = f"needs {record.shared_bytes} bytes of shared memory, {record.arch} has {limit}"
    if record.serialized:
        found[SERIALIZED] = "its warpgroup matrix instructions are serialized"
    if record.arch == "sm_90" and record.dot == DOT_16 and not record.tensor_core.get("HGMMA"):
        found[NO_HGMMA] = "multiplies 16-bit matrices without HGMMA"
    narrow = sum(count for bits, count in record.loop_loads_by_bits.items() if bits <= 32)
    wide = sum(count for bits, count in record.loop_loads_by_bits.items() if bits > 32) + record.loop.get("UTMALDG", 0)
    if record.dot != NO_DOT and narrow >= FEW and narrow > wide:
        found[SCALAR] = f"{narrow} loads of 32 bits or less in its main loop, beside {wide} wider ones"
    if (elements := sum(count for bits, count in record.stores_by_bits.items() if bits <= 16)) >= FEW:
        found[NARROW] = f"{elements} stores of 16 bits or less"
    if record.missed_fusions >= FEW:
        found[FUSION] = f"{record.missed_fusions} multiplications that only additions read are not fused with them"
    return found


def held_to(record: Record) -> tuple[str, ...]:
    """The gates that stop this record."""
    return tuple(GATES) if record.shipped else OF_CANDIDATES


@dataclass(frozen=True)
class Allowed:
    """An exception to a gate: for the architectures, versions of Triton, kernels (with the names of their loaders and
    epilogue) and cases that match `fnmatch` patterns. Raises ValueError without a reason, or for an unknown gate."""

    gate: str
    reason: str
    arch: str = "*"
    triton: str = "*"
    kernel: str = "*"
    case: str = "*"

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise ValueError(f"gate is {self.gate!r}, expected one of {', '.join(GATES)}")
        if len(self.reason.split()) < 3:
            raise ValueError(f"the reason of an exception to {self.gate!r} is {self.reason!r}, expected a sentence")

    def matches(self, gate: str, record: Record, triton: str) -> bool:
        pairs = (
            (self.arch, record.arch),
            (self.triton, triton),
            (self.kernel, record.kernel),
            (self.case, record.case),
        )
        return self.gate == gate and all(fnmatchcase(value, pattern) for pattern, value in pairs)

    def covered_by(self, archs: Iterable[str], triton: str) -> bool:
        """Whether a run of these architectures compiles everything that this entry could be for."""
        return fnmatchcase(triton, self.triton) and {a for a in ARCHS if fnmatchcase(a, self.arch)} <= set(archs)

    def __str__(self) -> str:
        return f"{self.gate}, Triton {self.triton}, {self.arch}, {self.kernel}, {self.case}"


@dataclass(frozen=True)
class Verdict:
    """failures and excused: (record, gate, what it found), the excused with the entry that lets them through."""

    failures: list[tuple[Record, str, str]]
    excused: list[tuple[Record, str, str, Allowed]]


def judge(records: Iterable[Record], triton: str, allowed: Iterable[Allowed]) -> Verdict:
    """Hold every record to its gates."""
    verdict = Verdict([], [])
    for record in records:
        for gate, text in findings(record).items():
            if gate not in held_to(record):
                continue
            entry = next((entry for entry in allowed if entry.matches(gate, record, triton)), None)
            if entry is None:
                verdict.failures.append((record, gate, text))
            else:
                verdict.excused.append((record, gate, text, entry))
    return verdict


def unused(records: Iterable[Record], archs: Iterable[str], triton: str, allowed: Iterable[Allowed]) -> list[Allowed]:
    """The entries that a whole run of `archs` should have needed and did not: what they excused is gone."""
    found = [(gate, record) for record in records for gate in findings(record) if gate in held_to(record)]
    return [
        entry
        for entry in allowed
        if entry.covered_by(archs, triton) and not any(entry.matches(gate, record, triton) for gate, record in found)
    ]

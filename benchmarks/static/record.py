"""What is known of one compiled kernel, and what it is used for."""

from __future__ import annotations

from dataclasses import dataclass, field

# The kinds of matrix product that the gates tell apart, by the width of the operands' elements.
NO_DOT, DOT_16, DOT_WIDE = "", "16-bit", "wide"


@dataclass(frozen=True)
class Use:
    """A launch of the kernel. request: the key of the choice that it serves, empty for a kernel without one; config: of
    the choice, as text; blocks: of the grid; steps: iterations of its main loop; base_seconds: what `cost` estimates
    for the whole request, None where it has no estimate."""

    request: str
    config: str
    blocks: int
    steps: int = 1
    base_seconds: float | None = None


@dataclass(frozen=True)
class Record:
    """One kernel in one specialisation, compiled for one architecture. `error` is empty unless that failed.

    case: the first that launches it; shipped: whether the heuristic or a shipped table chooses it, else it is only a
    candidate of the tuner; options: sizes and options of the launch. Bytes are of a thread (spills, stack) or a block
    (shared); *_by_bits: instructions by the bits that each moves a thread; loop, rest: instructions of the main loop
    and of all else, by kind; flops_per_byte: of one iteration of the main loop, FLOPs of matrix products over bytes of
    the tiles that it loads; missed_fusions: see `read.missed_fusions`.
    """

    arch: str
    case: str
    kernel: str
    options: str
    shipped: bool = True
    uses: tuple[Use, ...] = ()
    error: str = ""
    warps: int = 0
    registers: int = 0
    spill_bytes: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    blocks_per_sm: int = 0
    occupancy: float = 0.0
    limiter: str = ""
    serialized: bool = False
    dot: str = NO_DOT
    flops_per_byte: float = 0.0
    tensor_core: dict[str, int] = field(default_factory=dict)
    async_copies: int = 0
    tma_loads: int = 0
    tma_stores: int = 0
    loads_by_bits: dict[int, int] = field(default_factory=dict)
    stores_by_bits: dict[int, int] = field(default_factory=dict)
    loop_loads_by_bits: dict[int, int] = field(default_factory=dict)
    loop: dict[str, int] = field(default_factory=dict)
    rest: dict[str, int] = field(default_factory=dict)
    missed_fusions: int = 0

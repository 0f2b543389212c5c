"""Launch configurations as data, and the choice among them.

A launch that has a choice states what it does as a `Request`. `heuristic` answers it without measuring; `search_space`
lists what is worth measuring; `why_invalid` is the one judge of what an architecture can run; `choose` takes a tuned
table's answer where one is installed (`set_table`) and valid, else the heuristic's. `run` is the one place through
which such a launch goes; inside `watching`, each is shown to a callback, with the means to repeat it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
import triton

from . import hardware
from ._math import float32_precision
from .hardware import Arch


@dataclass(frozen=True)
class GemmConfig:
    """Tile (BLOCK_M, BLOCK_N) of the output, step BLOCK_K of the reduction, GROUP_M row tiles that share L2; SPLIT_K:
    into how many parts the reduction is cut, each with partial sums of its own."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8
    SPLIT_K: int = 1


@dataclass(frozen=True)
class AttentionConfig:
    """BLOCK_ROWS rows of the result a program (queries, or keys for dk and dv) against BLOCK_STEP of the other at a
    time."""

    BLOCK_ROWS: int
    BLOCK_STEP: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RowConfig:
    """BLOCK_ROWS rows of BLOCK_D columns at a time: whole rows for a LayerNorm."""

    BLOCK_ROWS: int
    BLOCK_D: int
    num_warps: int


Config = GemmConfig | AttentionConfig | RowConfig

# The kernels that have a choice, and what they choose.
CONFIGS: dict[str, type[Config]] = {
    "gemm": GemmConfig,
    "attention_forward": AttentionConfig,
    "attention_backward_dq": AttentionConfig,
    "attention_backward_dkdv": AttentionConfig,
    "layer_norm_statistics": RowConfig,
    "layer_norm_forward": RowConfig,
    "layer_norm_backward": RowConfig,
    "column_sum": RowConfig,
}


@dataclass(frozen=True)
class Request:
    """One launch that has a choice of config.

    kernel: a name in `CONFIGS`. shape: (m, n, k) of a gemm; (batch, tokens, heads, head_dim) of attention;
    (rows, columns) of the others. dtype: of a gemm's products, of attention's qkv, of what the others read. traits:
    what else changes the code: of a gemm the names of its loaders and epilogue, then the activation's, "scattered",
    "partial" (sums that SPLIT_K may cut), "preactivation" (stored too) or "residual", `left=`, `right=` or `out=` with
    the dtype of a matrix that is not `dtype` in memory, and "tf32"; of attention "mask", "bias", "bias_gradient",
    `bias=` with its dtype if that is not `dtype`, "tf32"; of a LayerNorm's backward "residual".
    """

    kernel: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    traits: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """A stable string, the same for equal requests only."""
        return " ".join((self.kernel, "x".join(map(str, self.shape)), dtype_name(self.dtype), *self.traits))


def dtype_name(dtype: torch.dtype) -> str:
    """As a request spells it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def precision_traits(dtype: torch.dtype) -> tuple[str, ...]:
    """The trait of products in `dtype` that follows from torch's switch for float32."""
    return ("tf32",) if dtype == torch.float32 and float32_precision() == "tf32" else ()


# 16-bit products. LARGE: the largest tile that leaves the loaders and most epilogues their registers; HEAVY: for the
# epilogue that holds three tiles at once, and where operands take registers; SMALL: for outputs of few tiles.
LARGE = GemmConfig(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)
HEAVY = GemmConfig(BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, num_warps=8, num_stages=3)
SMALL = GemmConfig(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3)
# Pixels gathered by less than 16 bytes at a time, or converted, pass through registers: nothing to pipeline.
SCATTERED = GemmConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=1)
# float32 in full precision has no tensor cores.
FULL_PRECISION = GemmConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=8, num_stages=3)


def heuristic(request: Request, arch: Arch, sms: int) -> Config:
    """The config for a request on a GPU of `sms` multiprocessors, chosen without measuring."""
    if request.kernel == "gemm":
        config = _gemm_tile(request, arch, sms)
        return replace(config, SPLIT_K=_split_k(request, config, sms)) if "partial" in request.traits else config
    if request.kernel == "attention_forward":
        return _attention_forward(request, arch)
    if request.kernel.startswith("attention_backward"):
        return _attention_backward(request, arch)
    if request.kernel == "column_sum":
        # Four warps hold so much float32 that Triton 3.9 spills on sm_100.
        return RowConfig(BLOCK_ROWS=32, BLOCK_D=128, num_warps=4 if request.dtype.itemsize <= 2 else 8)
    # Whole rows, about as many elements at a time; the backward pass holds several tiles.
    elements = 2048 if request.kernel == "layer_norm_backward" else 4096
    block = triton.next_power_of_2(request.shape[1])
    return RowConfig(BLOCK_ROWS=max(1, elements // block), BLOCK_D=block, num_warps=8 if block > 2048 else 4)


def _gemm_tile(request: Request, arch: Arch, sms: int) -> GemmConfig:
    m, n, _ = request.shape
    if request.dtype.itemsize > 2:
        config = FULL_PRECISION
    elif "scattered" in request.traits:
        config = SCATTERED
    elif "store_activation_gradient" in request.traits or not arch.has_wgmma:
        config = HEAVY
    elif triton.cdiv(m, LARGE.BLOCK_M) * triton.cdiv(n, LARGE.BLOCK_N) < sms:
        config = SMALL
    elif arch.name == "sm_90" and request.traits[:2] == ("load_matrix",) * 2 and "out=float32" in request.traits:
        # Triton 3.6 serializes the products of LARGE where these two epilogues store float32.
        by_epilogue = {"store": replace(LARGE, num_warps=4), "store_pixels": HEAVY}
        config = by_epilogue.get(request.traits[2], LARGE)
    else:
        config = LARGE
    # CDNA3 has 64 KiB of shared memory a block, room for two stages.
    return replace(config, num_stages=min(config.num_stages, 2)) if arch.backend == "hip" else config


def _split_k(request: Request, config: GemmConfig, sms: int) -> int:
    """Into how many parts to cut the reduction of a weight gradient, which has few output tiles and a long k."""
    m, n, k = request.shape
    tiles = triton.cdiv(m, config.BLOCK_M) * triton.cdiv(n, config.BLOCK_N)
    # A part of fewer than 8 steps would spend more on writing its partial sums than on making them.
    return _filled_parts(k, max(1, min(sms // tiles, k // (8 * config.BLOCK_K))), config.BLOCK_K)


def _filled_parts(k: int, parts: int, block: int) -> int:
    """How many of `parts` are left something to do when a part's length is rounded up to whole blocks."""
    return triton.cdiv(k, triton.cdiv(triton.cdiv(k, parts), block) * block)


# By whether the head is wider than 64.
FULL_PRECISION_ATTENTION = (
    AttentionConfig(BLOCK_ROWS=32, BLOCK_STEP=32, num_warps=8, num_stages=1),
    AttentionConfig(BLOCK_ROWS=16, BLOCK_STEP=16, num_warps=8, num_stages=1),
)


def _masked(request: Request) -> bool:
    return "mask" in request.traits or "bias" in request.traits


def _attention_forward(request: Request, arch: Arch) -> AttentionConfig:
    head_dim, masked = request.shape[3], _masked(request)
    if request.dtype.itemsize > 2:
        return FULL_PRECISION_ATTENTION[head_dim > 64]
    # Pipelined, the loads of a mask between the two products make the compiler serialize them on Hopper.
    stages = 1 if masked or arch.backend == "hip" else 3
    wide_and_masked = masked and head_dim > 64
    step = 64 if arch.has_wgmma and not wide_and_masked else 32
    warps = 8 if wide_and_masked else 4
    return AttentionConfig(BLOCK_ROWS=64, BLOCK_STEP=step, num_warps=warps, num_stages=stages)


def _attention_backward(request: Request, arch: Arch) -> AttentionConfig:
    """The tile of either backward kernel."""
    head_dim, masked = request.shape[3], _masked(request)
    if request.dtype.itemsize > 2:
        return FULL_PRECISION_ATTENTION[head_dim > 64]
    if not arch.has_wgmma:
        if head_dim <= 64:
            return AttentionConfig(BLOCK_ROWS=64, BLOCK_STEP=32, num_warps=4, num_stages=1)
        # Wider steps of wide heads spill with these compilers.
        spills = request.kernel == "attention_backward_dkdv" and head_dim > 80 and arch.name in ("sm_120", "gfx942")
        return AttentionConfig(BLOCK_ROWS=32, BLOCK_STEP=16 if masked or spills else 32, num_warps=8, num_stages=1)
    if head_dim <= 64:
        return AttentionConfig(BLOCK_ROWS=64, BLOCK_STEP=64, num_warps=8 if masked else 4, num_stages=1)
    return AttentionConfig(BLOCK_ROWS=64, BLOCK_STEP=32 if masked else 64, num_warps=8, num_stages=1)


def why_invalid(config: Config, request: Request, arch: Arch) -> list[str]:
    """Every reason why `config` cannot serve `request` on `arch`, with the numbers; empty if it can."""
    expected = CONFIGS[request.kernel]
    if type(config) is not expected:
        return [f"{request.kernel} takes a {expected.__name__}, got a {type(config).__name__}"]
    reasons = []
    for field in fields(config):
        value = getattr(config, field.name)
        if type(value) is not int or value < 1:
            reasons.append(f"{field.name} is {value!r}, expected a positive integer")
        elif field.name not in ("num_stages", "GROUP_M", "SPLIT_K") and value & (value - 1):
            reasons.append(f"{field.name} is {value}, expected a power of two")
    if reasons:
        return reasons
    threads = config.num_warps * arch.warp_size
    if threads > 1024:
        reasons.append(f"{config.num_warps} warps are {threads} threads, a block has at most 1024")
    reasons += _RULES[expected](config, request, arch)
    if (needed := shared_memory(config, request, arch)) > arch.shared_per_block:
        reasons.append(f"needs {needed} bytes of shared memory, {arch.name} has {arch.shared_per_block} a block")
    # On AMD the block's waves share the registers of four SIMDs.
    available = arch.registers // max(1, config.num_warps // 4) if arch.backend == "hip" else arch.registers // threads
    available = min(available, 512 if arch.backend == "hip" else 255)
    if (needed := registers(config, request, arch)) > available:
        reasons.append(f"needs about {needed} registers a thread, {arch.name} has {available}")
    return reasons


def _gemm_rules(config: GemmConfig, request: Request, arch: Arch) -> list[str]:
    reasons = [
        f"{name} is {getattr(config, name)}, a product needs at least 16"
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")
        if getattr(config, name) < 16
    ]
    reasons += _warpgroup_rules(config.BLOCK_M, config.num_warps, request, arch)
    if arch.name == "sm_90" and request.dtype.itemsize <= 2:
        reasons += _serialized(config, request)
    if arch.backend == "hip" and config.num_stages > 2 and (_transformed(0, request) or _transformed(1, request)):
        reasons.append(f"{config.num_stages} stages, registers to pipeline a transformed operand in last for 2")
    k = request.shape[2]
    if config.SPLIT_K > 1 and "partial" not in request.traits:
        reasons.append(f"SPLIT_K is {config.SPLIT_K}, but the epilogue finishes a whole sum")
    elif "partial" in request.traits and (filled := _filled_parts(k, config.SPLIT_K, config.BLOCK_K)) < config.SPLIT_K:
        reasons.append(f"SPLIT_K is {config.SPLIT_K}, but {k} in steps of {config.BLOCK_K} fills only {filled} parts")
    return reasons


def _serialized(config: GemmConfig, request: Request) -> list[str]:
    """Why Hopper's compiler would wait for each product before the next: a left operand that comes from registers.
    Held against what ptxas said; the epilogue of the activation's gradient is free of it."""
    if config.num_stages == 1 or "store_activation_gradient" in request.traits:
        return []
    if request.traits[0] == "load_patches" and "scattered" in request.traits:
        return [f"{config.num_stages} stages serialize the products of gathered pixels, which nothing can pipeline"]
    wide = _memory_itemsize("left", request) > request.dtype.itemsize
    if _transformed(0, request) and not wide and config.BLOCK_N < 128:
        return [f"{config.BLOCK_N} columns serialize the products of a transformed left operand, which need 128"]
    return []


def _attention_rules(config: AttentionConfig, request: Request, arch: Arch) -> list[str]:
    reasons = [
        f"{name} is {getattr(config, name)}, a product needs at least 16"
        for name in ("BLOCK_ROWS", "BLOCK_STEP")
        if getattr(config, name) < 16
    ]
    if arch.name == "sm_90" and request.dtype.itemsize <= 2 and _masked(request) and config.num_stages > 1:
        reasons.append(f"{config.num_stages} stages serialize products with the loads of a mask between them")
    return reasons + _warpgroup_rules(config.BLOCK_ROWS, config.num_warps, request, arch)


def _warpgroup_rules(rows: int, num_warps: int, request: Request, arch: Arch) -> list[str]:
    """Hopper's products are of four warps and 64 rows; with less the compiler falls back to Ampere's."""
    if not arch.has_wgmma or request.dtype.itemsize > 2:
        return []
    reasons = []
    if num_warps < 4:
        reasons.append(f"{num_warps} warps, a warpgroup's product needs 4")
    if rows < 64:
        reasons.append(f"{rows} rows, a warpgroup's product needs 64")
    return reasons


def _row_rules(config: RowConfig, request: Request, arch: Arch) -> list[str]:
    columns = request.shape[1]
    if request.kernel != "column_sum" and columns > config.BLOCK_D:
        return [f"BLOCK_D is {config.BLOCK_D}, expected whole rows of {columns}"]
    return []


_RULES = {GemmConfig: _gemm_rules, AttentionConfig: _attention_rules, RowConfig: _row_rules}


def _memory_itemsize(matrix: str, request: Request) -> int:
    """Bytes an element of a gemm's "left", "right" or "out" matrix, or of attention's "bias", takes in memory."""
    for trait in request.traits:
        if trait.startswith(f"{matrix}="):
            return getattr(torch, trait.removeprefix(f"{matrix}=")).itemsize
    return request.dtype.itemsize


def _transformed(side: int, request: Request) -> bool:
    """Whether the loader of a gemm's left (0) or right (1) operand computes with what it loads."""
    return (
        request.traits[side] in ("load_normalised", "load_scaled")
        or _memory_itemsize(("left", "right")[side], request) != request.dtype.itemsize
    )


def shared_memory(config: Config, request: Request, arch: Arch) -> int:
    """Bytes of shared memory that a block needs, as Triton 3.7 allocates it; at most a few KiB too many."""
    if isinstance(config, GemmConfig):
        return _gemm_shared_memory(config, request, arch)
    if isinstance(config, AttentionConfig):
        return _attention_shared_memory(config, request, arch)
    # Sums across warps.
    return 4 * config.num_warps * max(32 * config.num_warps, config.BLOCK_ROWS)


def _gemm_shared_memory(config: GemmConfig, request: Request, arch: Arch) -> int:
    pipelined = config.num_stages > 1
    needed = 0
    for side, rows in enumerate((config.BLOCK_M, config.BLOCK_N)):
        elements = rows * config.BLOCK_K
        in_memory = elements * _memory_itemsize(("left", "right")[side], request)
        if not pipelined:
            needed += max(in_memory, elements * request.dtype.itemsize)
        elif not _transformed(side, request):
            # A warpgroup's product reads a buffer while the next ones are filled, hence one more.
            needed += in_memory * (config.num_stages if arch.has_wgmma else config.num_stages - 1)
        else:
            # Statistics and scales: by column, and on Blackwell by row as well.
            vectors = 8 * (config.BLOCK_K + (rows if arch.capability == 100 else 0))
            needed += (in_memory + vectors) * (config.num_stages - 1)
            if (arch.has_wgmma and side == 1) or request.dtype.itemsize > 2:
                # Only a warpgroup's left operand, and Ampere's, may come from registers.
                needed += elements * request.dtype.itemsize
    # The epilogue rearranges its tile, when the buffers are free.
    epilogue = config.BLOCK_M * config.BLOCK_N * (_memory_itemsize("out", request) if arch.has_wgmma else 2)
    # Barriers of Blackwell's products.
    return max(needed, epilogue) + 64 * (arch.capability == 100)


def _attention_shared_memory(config: AttentionConfig, request: Request, arch: Arch) -> int:
    row = sum(split_head(request.shape[3])) * request.dtype.itemsize
    if arch.backend == "hip":
        # What a program keeps stays in registers; the rest passes through.
        return max(config.BLOCK_ROWS, config.BLOCK_STEP, 3 * config.BLOCK_STEP * (config.num_stages - 1)) * row
    held = 1 if request.kernel == "attention_forward" else 2
    buffers = config.num_stages if arch.has_wgmma else max(1, config.num_stages - 1)
    needed = held * config.BLOCK_ROWS * row + 2 * config.BLOCK_STEP * row * buffers
    if request.kernel == "attention_backward_dkdv":
        # The log-sum-exp beside the queries, and room to transpose it.
        needed += 4 * config.BLOCK_STEP * config.num_stages + 2048
    if "bias" in request.traits:
        buffers = max(1, config.num_stages - 1)
        needed += config.BLOCK_ROWS * config.BLOCK_STEP * _memory_itemsize("bias", request) * buffers
    return needed


def split_head(head_dim: int) -> tuple[int, int]:
    """Widths of the two parts that a head is loaded in; powers of two of at least 16, or 0 for no second part."""
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - first
    return first, max(16, triton.next_power_of_2(rest)) if rest > 0 else 0


# Registers a thread beside the tiles that are counted: addresses, masks, what ptxas keeps in flight.
_BASE_REGISTERS = 64


def registers(config: Config, request: Request, arch: Arch) -> int:
    """About how many 32-bit registers a thread needs, from what compiled with and without spills."""
    threads = config.num_warps * arch.warp_size
    wide = 2 if request.dtype == torch.float64 else 1
    if isinstance(config, GemmConfig):
        tile = wide * config.BLOCK_M * config.BLOCK_N / threads
        return int(tile * _epilogue_tiles(request, arch)) + _operand_registers(config, request, arch) + _BASE_REGISTERS
    if isinstance(config, AttentionConfig):
        sums = 2 if request.kernel == "attention_backward_dkdv" else 1
        scores = 1 if request.kernel == "attention_forward" else 2
        columns = sums * sum(split_head(request.shape[3])) + scores * config.BLOCK_STEP
        # Without tensor cores the operands take as many again, and more.
        copies = 4 if request.dtype.itemsize > 2 else 1
        return copies * config.BLOCK_ROWS * columns // threads + _BASE_REGISTERS
    tiles = 4 if request.kernel == "layer_norm_backward" else 1
    return wide * tiles * config.BLOCK_ROWS * config.BLOCK_D // threads + _BASE_REGISTERS


def _epilogue_tiles(request: Request, arch: Arch) -> float:
    """How many tiles of the output a gemm's epilogue holds at once."""
    epilogue = request.traits[2]
    if epilogue == "store_activation_gradient":
        return 3
    # A warpgroup's product lands as a whole, what else the epilogue reads or writes comes beside it.
    beside = epilogue == "store_activated" or "residual" in request.traits
    return 1.5 if beside and arch.has_wgmma else 1


def _operand_registers(config: GemmConfig, request: Request, arch: Arch) -> int:
    """Registers a thread that operands pass through: where a loader has transformed them, and without warpgroup
    products always."""
    wide_left = _memory_itemsize("left", request) > request.dtype.itemsize
    per_loader = {"load_normalised": (64 if wide_left else 48, 64), "load_scaled": (64, 48)}
    needed = sum(per_loader.get(request.traits[side], (0, 0))[side] for side in (0, 1))
    if request.dtype.itemsize > 2:
        return needed + 4 * config.BLOCK_K
    return needed if arch.has_wgmma else needed + config.BLOCK_K // 2


# Tiles worth measuring: BLOCK_M, BLOCK_N, BLOCK_K, num_warps.
_TILES_16_BIT = (
    (128, 256, 64, 8),
    (256, 128, 64, 8),
    (128, 128, 64, 8),
    (128, 128, 64, 4),
    (128, 128, 32, 8),
    (128, 64, 64, 8),
    (128, 64, 64, 4),
    (128, 64, 32, 4),
    (64, 128, 64, 4),
    (64, 256, 64, 4),
    (64, 64, 64, 4),
    (64, 64, 128, 4),
)
_TILES_SCATTERED = ((64, 64, 32, 4), (64, 128, 32, 4), (128, 64, 32, 4), (128, 128, 32, 8), (64, 64, 64, 4))
_TILES_32_BIT = (
    (128, 128, 16, 8),
    (128, 64, 16, 8),
    (64, 64, 16, 8),
    (64, 64, 16, 4),
    (64, 64, 32, 8),
    (64, 32, 32, 4),
    (32, 32, 32, 4),
)


def search_space(request: Request, arch: Arch, sms: int) -> list[Config]:
    """The configs worth measuring: valid ones only, each once, the heuristic's first."""
    first = heuristic(request, arch, sms)
    candidates = _CANDIDATES[type(first)](request, first, arch, sms)
    distinct = dict.fromkeys((first, *candidates))
    return [config for config in distinct if not why_invalid(config, request, arch)]


def _gemm_candidates(request: Request, first: GemmConfig, arch: Arch, sms: int) -> Iterator[GemmConfig]:
    m, n, _ = request.shape
    if request.dtype.itemsize > 2:
        tiles, stages_tried = _TILES_32_BIT, (2, 3)
    elif "scattered" in request.traits:
        tiles, stages_tried = _TILES_SCATTERED, (1, 3)
    else:
        tiles, stages_tried = _TILES_16_BIT, (3, 4)
    if arch.backend == "hip":
        stages_tried = (1, 2)
    if "partial" in request.traits:
        # Splits are tried instead.
        stages_tried = (first.num_stages,)
    for block_m, block_n, block_k, warps in tiles:
        # A tile that is mostly padding never wins over a smaller one.
        if block_m > max(64, triton.next_power_of_2(m)) or block_n > max(64, triton.next_power_of_2(n)):
            continue
        for stages in stages_tried:
            config = GemmConfig(block_m, block_n, block_k, warps, stages)
            if "partial" not in request.traits:
                yield config
                continue
            parts = _split_k(request, config, sms)
            yield replace(config, SPLIT_K=parts)
            yield replace(config, SPLIT_K=_filled_parts(request.shape[2], 2 * parts, block_k))


def _attention_candidates(request: Request, first: AttentionConfig, arch: Arch, sms: int) -> Iterator[AttentionConfig]:
    for rows in (first.BLOCK_ROWS, 2 * first.BLOCK_ROWS):
        for step in (first.BLOCK_STEP, 2 * first.BLOCK_STEP):
            for warps in (4, 8):
                for stages in (first.num_stages, 2):
                    yield AttentionConfig(rows, step, warps, stages)


def _row_candidates(request: Request, first: RowConfig, arch: Arch, sms: int) -> Iterator[RowConfig]:
    for rows in (first.BLOCK_ROWS, max(1, first.BLOCK_ROWS // 2), 2 * first.BLOCK_ROWS):
        for warps in (4, 8):
            yield replace(first, BLOCK_ROWS=rows, num_warps=warps)


_CANDIDATES = {GemmConfig: _gemm_candidates, AttentionConfig: _attention_candidates, RowConfig: _row_candidates}

Lookup = Callable[[Request, torch.device], Config | None]
Watcher = Callable[[Request, Callable[[Config], tuple[torch.Tensor, ...]]], None]

_table: Lookup | None = None
_watcher: Watcher | None = None


def set_table(lookup: Lookup | None) -> None:
    """Have `choose` ask lookup(request, device) first, which returns a config or None; None: the heuristic alone."""
    global _table
    _table = lookup
    _chosen.cache_clear()


def choose(request: Request, device: torch.device) -> Config:
    """The config to launch `request` with on `device`: the table's where it has a valid one, else the heuristic's."""
    # Compiled ahead of time, one process serves several architectures, each with a driver of its own.
    return _chosen(request, device, triton.runtime.driver.active)


@functools.lru_cache(maxsize=4096)
def _chosen(request: Request, device: torch.device, driver) -> Config:
    arch = hardware.current_arch()
    if _table is not None:
        config = _table(request, device)
        if config is not None and not why_invalid(config, request, arch):
            return config
    return heuristic(request, arch, hardware.num_sms(device))


def run(request: Request, device: torch.device, launch: Callable[[Config], tuple[torch.Tensor, ...]]):
    """launch(config) with the config chosen for `request`; returns what it returns, the tensors it wrote. A watcher is
    shown the request first."""
    if _watcher is not None:
        _watcher(request, launch)
    return launch(choose(request, device))


@contextlib.contextmanager
def watching(callback: Watcher) -> Iterator[None]:
    """In the `with` body, callback(request, run) is called before each launch that has a choice.

    run(config) launches that very piece of work with another config, any number of times, also later, and returns the
    tensors it wrote: the same ones every time where the launch fills tensors that its caller made.
    """
    global _watcher
    before, _watcher = _watcher, callback
    try:
        yield
    finally:
        _watcher = before

"""The one judge of what an architecture can run: shared memory from a model that, held against 602 compiled kernels,
let none through that did not fit; registers and serialization by rules of thumb fitted to the same kernels."""

from __future__ import annotations

import torch

from .hardware import Arch
from .request import (
    CONFIGS,
    MAX_STEP,
    AttentionConfig,
    Config,
    GemmConfig,
    LibraryConfig,
    Product,
    Request,
    RowConfig,
    TmaConfig,
    filled_parts,
    split_head,
    tiling,
)


def why_invalid(config: Config, request: Request, arch: Arch) -> list[str]:
    """Every reason why `config` cannot serve `request` on `arch`, with the numbers; empty if it can."""
    expected = CONFIGS[request.kernel]
    other_form = type(config) in (LibraryConfig, TmaConfig) and expected is GemmConfig
    if type(config) is not expected and not other_form:
        return [f"{request.kernel} takes a {expected.__name__}, got a {type(config).__name__}"]
    reasons = []
    for field, value in config._asdict().items():
        if type(value) is not int or value < 1:
            reasons.append(f"{field} is {value!r}, expected a positive integer")
        elif field not in ("num_stages", "GROUP_M", "SPLIT_K", "PROGRAMS") and value & (value - 1):
            reasons.append(f"{field} is {value}, expected a power of two")
    if reasons:
        return reasons
    threads = config.num_warps * arch.warp_size
    if threads > 1024:
        reasons.append(f"{config.num_warps} warps are {threads} threads, a block has at most 1024")
    if type(config) is LibraryConfig:
        return reasons
    reasons += _RULES[type(config)](config, request, arch)
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
    if config.BLOCK_N % (columns := request.parts.epilogue.columns):
        reasons.append(f"BLOCK_N is {config.BLOCK_N}, but the epilogue takes groups of {columns} columns")
    reasons += _warpgroup_rules(config.BLOCK_M, config.num_warps, request, arch)
    if arch.name == "sm_90" and request.dtype.itemsize <= 2:
        reasons += _serialized(config, request)
    if arch.backend == "hip" and config.num_stages > 2 and (_transforms(0, request) or _transforms(1, request)):
        reasons.append(f"{config.num_stages} stages, registers to pipeline a transformed operand in last for 2")
    k = request.shape[2]
    sums = request.parts.epilogue.sums
    if config.SPLIT_K > 1 and not sums:
        reasons.append(f"SPLIT_K is {config.SPLIT_K}, but the epilogue finishes a whole sum")
    elif sums and (filled := filled_parts(k, config.SPLIT_K, config.BLOCK_K)) < config.SPLIT_K:
        reasons.append(f"SPLIT_K is {config.SPLIT_K}, but {k} in steps of {config.BLOCK_K} fills only {filled} parts")
    return reasons


def _tma_rules(config: TmaConfig, request: Request, arch: Arch) -> list[str]:
    reasons = []
    if not arch.has_tma:
        reasons.append(f"{arch.name} has no loop by TMA")
    if not request.parts.tma:
        reasons.append("an operand is not as TMA takes it")
    width = config.BLOCK_N // config.SUBTILES
    if config.SUBTILES not in (1, 2, 4) or width % max(16, columns := request.parts.epilogue.columns):
        reasons.append(f"parts of {width} columns, but the epilogue takes groups of {max(16, columns)}")
    return reasons + _warpgroup_rules(config.BLOCK_M, config.num_warps, request, arch)


def _serialized(config: GemmConfig, request: Request) -> list[str]:
    """Why Hopper's compiler would wait for each product before the next: a left operand that comes from registers.
    Held against what ptxas said; an epilogue of three tiles is free of it."""
    if config.num_stages == 1 or request.parts.epilogue.tiles > 2:
        return []
    if request.parts.left.gathers:
        return [f"{config.num_stages} stages serialize the products of gathered pixels, which nothing can pipeline"]
    if request.parts.left_dtype.itemsize == 1:
        free = (config.BLOCK_N, config.BLOCK_K) in ((64, 64), (128, 32))
        return [] if free else ["products of bytes are serialized, but of 64 columns in steps of 64, or 128 of 32"]
    if _transforms(0, request) and not _wide_left(request) and config.BLOCK_N < 128:
        return [f"{config.BLOCK_N} columns serialize the products of a transformed left operand, which need 128"]
    return []


def _attention_rules(config: AttentionConfig, request: Request, arch: Arch) -> list[str]:
    reasons = [
        f"{name} is {getattr(config, name)}, a product needs at least 16"
        for name in ("BLOCK_ROWS", "BLOCK_STEP")
        if getattr(config, name) < 16
    ]
    if config.BLOCK_STEP > MAX_STEP:
        reasons.append(f"BLOCK_STEP is {config.BLOCK_STEP}, rows of numbers a token are padded to {MAX_STEP}")
    if config.ROW_TILES > 1 and (request.kernel != "attention_forward" or not request.parts.plain):
        reasons.append(f"ROW_TILES is {config.ROW_TILES}, which is for the forward pass without options")
    if config.ROW_TILES > 1 and config.num_stages > 1:
        reasons.append(f"{config.num_stages} stages, but nothing passes through a program of {config.ROW_TILES} tiles")
    if arch.name == "sm_90" and request.dtype.itemsize <= 2 and request.parts.masked and config.num_stages > 1:
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


_RULES = {GemmConfig: _gemm_rules, TmaConfig: _tma_rules, AttentionConfig: _attention_rules, RowConfig: _row_rules}


def _transforms(side: int, request: Request) -> bool:
    """Whether a gemm's left (0) or right (1) operand is computed with as it is loaded."""
    product = request.parts
    return product[side].transforms or (product.left_dtype, product.right_dtype)[side] != request.dtype


def _wide_left(request: Request) -> bool:
    return request.parts.left_dtype.itemsize > request.dtype.itemsize


def shared_memory(config: Config, request: Request, arch: Arch) -> int:
    """Bytes of shared memory that a block needs, as Triton 3.7 allocates it; at most a few KiB too many."""
    if isinstance(config, GemmConfig):
        return _gemm_shared_memory(config, request, arch)
    if isinstance(config, TmaConfig):
        operands = (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K * request.dtype.itemsize * config.num_stages
        part = config.BLOCK_M * config.BLOCK_N // config.SUBTILES
        return max(operands, part * request.parts.out_dtype.itemsize) + 1024
    if isinstance(config, AttentionConfig):
        return _attention_shared_memory(config, request, arch)
    # Sums across warps.
    return 4 * config.num_warps * max(32 * config.num_warps, config.BLOCK_ROWS)


def _gemm_shared_memory(config: GemmConfig, request: Request, arch: Arch) -> int:
    pipelined = config.num_stages > 1
    needed = 0
    product: Product = request.parts
    operands = ((config.BLOCK_M, product.left_dtype), (config.BLOCK_N, product.right_dtype))
    for side, (rows, dtype) in enumerate(operands):
        elements = rows * config.BLOCK_K
        in_memory = elements * dtype.itemsize
        if not pipelined:
            needed += max(in_memory, elements * request.dtype.itemsize)
        elif not _transforms(side, request):
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
    epilogue = config.BLOCK_M * config.BLOCK_N * (product.out_dtype.itemsize if arch.has_wgmma else 2)
    # Barriers of Blackwell's products.
    return max(needed, epilogue) + 64 * (arch.capability == 100)


def _attention_shared_memory(config: AttentionConfig, request: Request, arch: Arch) -> int:
    columns = sum(split_head(request.shape[3]))
    if request.parts.rope:  # held by pairs, in two halves
        columns = 2 * sum(split_head(request.shape[3] // 2))
    row = columns * request.dtype.itemsize
    if config.ROW_TILES > 1:
        fit = tiling(request, config)
        # Sums across warps of the first token, and Blackwell's barriers, beside all keys and values.
        return (config.BLOCK_ROWS + 2 * sum(fit.widths)) * row + 1024 * fit.peeled + 4096 * (arch.capability == 100)
    if arch.backend == "hip":
        # What a program keeps stays in registers; the rest passes through.
        return max(config.BLOCK_ROWS, config.BLOCK_STEP, 3 * config.BLOCK_STEP * (config.num_stages - 1)) * row
    held = 1 if request.kernel == "attention_forward" else 2
    buffers = config.num_stages if arch.has_wgmma else max(1, config.num_stages - 1)
    needed = held * config.BLOCK_ROWS * row + 2 * config.BLOCK_STEP * row * buffers
    if request.parts.rope and config.num_stages > 1:  # cos and sin beside them
        needed += 4 * config.BLOCK_STEP * columns * buffers
    if request.kernel == "attention_backward_dkdv":
        # The log-sum-exp beside the queries, and room to transpose it.
        needed += 4 * config.BLOCK_STEP * config.num_stages + 2048
    if request.parts.bias is not None:
        buffers = max(1, config.num_stages - 1)
        needed += config.BLOCK_ROWS * config.BLOCK_STEP * request.parts.bias.itemsize * buffers
    return needed


# Registers a thread beside the tiles that are counted: addresses, masks, what ptxas keeps in flight.
_BASE_REGISTERS = 64


def registers(config: Config, request: Request, arch: Arch) -> int:
    """About how many 32-bit registers a thread needs, from what compiled with and without spills."""
    threads = config.num_warps * arch.warp_size
    wide = 2 if request.dtype == torch.float64 else 1
    if isinstance(config, GemmConfig):
        tile = wide * config.BLOCK_M * config.BLOCK_N / threads
        return int(tile * _epilogue_tiles(request, arch)) + _operand_registers(config, request, arch) + _BASE_REGISTERS
    if isinstance(config, TmaConfig):
        tile = config.BLOCK_M * config.BLOCK_N // threads
        return int(tile * (1 + _epilogue_tiles(request, arch) / config.SUBTILES)) + _BASE_REGISTERS
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
    epilogue = request.parts.epilogue
    # A warpgroup's product lands as a whole, what else the epilogue reads or writes comes beside it.
    return epilogue.tiles + 0.5 * (epilogue.beside and arch.has_wgmma)


def _operand_registers(config: GemmConfig, request: Request, arch: Arch) -> int:
    """Registers a thread that operands pass through: where a prologue has transformed them, and without warpgroup
    products always."""
    left, right, *_ = request.parts
    needed = left.registers[_wide_left(request)] + right.registers[2]
    if request.dtype.itemsize > 2:
        return needed + 4 * config.BLOCK_K
    return needed if arch.has_wgmma else needed + config.BLOCK_K // 2

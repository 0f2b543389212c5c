"""The config of a launch, chosen without measuring."""

from __future__ import annotations

from .hardware import Arch
from .request import (
    AttentionConfig,
    Config,
    GemmConfig,
    LibraryConfig,
    Request,
    RowConfig,
    TmaConfig,
    ceil_div,
    filled_parts,
    next_power_of_2,
    split_head,
    tiling,
)
from .validity import shared_memory

# 16-bit products. LARGE: the largest tile that leaves the loaders and most epilogues their registers; HEAVY: for the
# epilogue that holds three tiles at once, and where operands take registers; GATED: for that of six; SMALL: for outputs
# of few tiles.
LARGE = GemmConfig(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)
HEAVY = GemmConfig(BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, num_warps=8, num_stages=3)
GATED = GemmConfig(BLOCK_M=64, BLOCK_N=32, BLOCK_K=64, num_warps=4, num_stages=3)
SMALL = GemmConfig(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3)
# By TMA. WIDE_TMA: the widest tile whose epilogue, in four parts, leaves the accumulator its registers; TMA: for those
# that hold more.
WIDE_TMA = TmaConfig(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3, SUBTILES=4)
TMA = TmaConfig(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=4, SUBTILES=2)
# Gathered pixels pass through registers: nothing to pipeline.
GATHERED = GemmConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=1)
# float32 in full precision has no tensor cores.
FULL_PRECISION = GemmConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=8, num_stages=3)


def heuristic(request: Request, arch: Arch, sms: int) -> Config:
    """The config for a request on a GPU of `sms` multiprocessors, chosen without measuring."""
    if request.kernel == "gemm":
        m, n, _ = request.shape
        tma = arch.has_tma and request.parts.tma and not request.parts.epilogue.scatters
        if tma and ceil_div(m, TMA.BLOCK_M) * ceil_div(n, TMA.BLOCK_N) >= sms:
            epilogue = request.parts.epilogue
            light = epilogue.tiles == 1 and not epilogue.beside and request.parts.out_dtype.itemsize == 2
            return WIDE_TMA if light else TMA._replace(SUBTILES=4) if epilogue.tiles > 3 else TMA
        return pointer_heuristic(request, arch, sms)
    if request.kernel == "attention_forward":
        return _attention_forward(request, arch, sms)
    if request.kernel.startswith("attention_backward"):
        return _attention_backward(request, arch)
    if request.kernel == "column_sum":
        # Four warps hold so much float32 that Triton 3.9 spills on sm_100.
        return RowConfig(BLOCK_ROWS=32, BLOCK_D=128, num_warps=4 if request.dtype.itemsize <= 2 else 8)
    # Whole rows, about as many elements at a time; the backward pass holds several tiles.
    elements = 2048 if request.kernel == "layer_norm_backward" else 4096
    block = next_power_of_2(request.shape[1])
    return RowConfig(BLOCK_ROWS=max(1, elements // block), BLOCK_D=block, num_warps=8 if block > 2048 else 4)


def library(request: Request) -> LibraryConfig:
    """The library's form of a product, with the tile of the small kernels around it."""
    return LibraryConfig(BLOCK_N=64) if request.parts.epilogue.tiles > 3 else LibraryConfig()


def pointer_heuristic(request: Request, arch: Arch, sms: int) -> GemmConfig:
    """The config of the loop that loads by pointers."""
    config = _gemm_tile(request, arch, sms)
    return config._replace(SPLIT_K=split_k(request, config, sms)) if request.parts.epilogue.sums else config


def _gemm_tile(request: Request, arch: Arch, sms: int) -> GemmConfig:
    m, n, _ = request.shape
    left, right, epilogue, *_ = request.parts
    if request.dtype.itemsize > 2:
        config = FULL_PRECISION
        patches = not (left.plain or left.transforms)
        if epilogue.wide or epilogue.tiles > 2 or (patches and arch.name == "sm_100"):
            config = FULL_PRECISION._replace(num_stages=2)  # of three, some spill with Triton 3.6 or 3.7
    elif request.parts.gathers:
        config = GATHERED
    elif epilogue.tiles > 3:
        config = GATED
    elif epilogue.tiles > 2 or not arch.has_wgmma or request.parts.left_dtype.itemsize == 1:
        config = HEAVY
    elif ceil_div(m, LARGE.BLOCK_M) * ceil_div(n, LARGE.BLOCK_N) < sms:
        config = SMALL
    elif arch.name == "sm_90" and not left.plain and epilogue.columns > 1 and request.parts.left_dtype.itemsize == 2:
        config = SMALL  # where row statistics follow patches, Triton 3.6 serializes the products of LARGE and HEAVY
    else:
        config = LARGE
        plain = left.plain and right.plain
        if plain and request.parts.out_dtype.itemsize > request.dtype.itemsize:
            # Where these store float32, Triton 3.6 serializes the products of LARGE on sm_90 and spills on sm_100.
            if epilogue.bare:
                config = LARGE._replace(num_warps=4)
            elif epilogue.scatters and arch.name == "sm_90":
                config = HEAVY
        if epilogue.wide and arch.name == "sm_100":
            config = HEAVY  # of LARGE, Triton 3.6 spills
    # CDNA3 has 64 KiB of shared memory a block, room for two stages.
    return config._replace(num_stages=min(config.num_stages, 2)) if arch.backend == "hip" else config


def split_k(request: Request, config: GemmConfig, sms: int) -> int:
    """Into how many parts to cut the reduction of a weight gradient, which has few output tiles and a long k."""
    m, n, k = request.shape
    tiles = ceil_div(m, config.BLOCK_M) * ceil_div(n, config.BLOCK_N)
    # A part of fewer than 8 steps would spend more on writing its partial sums than on making them.
    return filled_parts(k, max(1, min(sms // tiles, k // (8 * config.BLOCK_K))), config.BLOCK_K)


# By whether the head is wider than 64.
FULL_PRECISION_ATTENTION = (
    AttentionConfig(BLOCK_ROWS=32, BLOCK_STEP=32, num_warps=8, num_stages=1),
    AttentionConfig(BLOCK_ROWS=16, BLOCK_STEP=16, num_warps=8, num_stages=1),
)


def _attention_forward(request: Request, arch: Arch, sms: int) -> AttentionConfig:
    batch, tokens, heads, head_dim = request.shape
    masked = request.parts.masked
    if request.dtype.itemsize > 2:
        return FULL_PRECISION_ATTENTION[head_dim > 64]
    # All keys on chip, where a multiprocessor holds two such programs, one of which loads while the other computes, and
    # they are enough for all. Triton 3.9 keeps the keys in registers where a class token is taken apart, or products
    # read registers, and spills; and of wider heads.
    together = next_power_of_2(ceil_div(tokens, 64))
    config = AttentionConfig(BLOCK_ROWS=64, BLOCK_STEP=128, num_warps=4, num_stages=1, ROW_TILES=together)
    spills = not arch.has_wgmma or not request.parts.plain or head_dim > 96 or tiling(request, config).peeled
    room = arch.shared - 2 * (shared_memory(config, request, arch) + 1024)
    if together > 1 and not spills and room >= 0 and batch * heads >= 2 * sms:
        return config
    # Pipelined, the loads of a mask between the two products make the compiler serialize them on Hopper.
    stages = 1 if masked or arch.backend == "hip" else 3
    wide_and_masked = masked and head_dim > 64
    step = 64 if arch.has_wgmma and not wide_and_masked else 32
    warps = 8 if wide_and_masked else 4
    return AttentionConfig(BLOCK_ROWS=64, BLOCK_STEP=step, num_warps=warps, num_stages=stages)


def _attention_backward(request: Request, arch: Arch) -> AttentionConfig:
    """The tile of either backward kernel."""
    head_dim, masked, rope = request.shape[3], request.parts.masked, request.parts.rope
    queries = request.kernel == "attention_backward_dq"
    if request.dtype.itemsize > 2:
        config = FULL_PRECISION_ATTENTION[head_dim > 64]
        # Wider steps spill where dk and dv are made for a norm.
        spills = request.parts.before_norm and arch.name in ("gfx942", "sm_120") and not queries
        return config._replace(BLOCK_STEP=16) if spills else config
    if not arch.has_wgmma:
        if head_dim <= 64 and rope:  # what is rotated passes through registers
            return AttentionConfig(BLOCK_ROWS=64, BLOCK_STEP=16, num_warps=8, num_stages=2)
        if head_dim <= 64:
            # Not pipelined, dq for a norm spills.
            stages = 2 if request.parts.before_norm and arch.name == "sm_80" and queries else 1
            # Of a mask, four warps' dq spills with Triton 3.7 and later.
            warps = 8 if masked and queries and arch.name in ("sm_89", "sm_120") else 4
            return AttentionConfig(BLOCK_ROWS=64, BLOCK_STEP=32, num_warps=warps, num_stages=stages)
        # Wider steps of wide heads spill with these compilers, of three parts with all.
        wide = head_dim > 80 and arch.name in ("sm_120", "gfx942")
        spills = not queries and (wide or len(split_head(head_dim)) > 2) or (rope and arch.backend == "hip")
        return AttentionConfig(BLOCK_ROWS=32, BLOCK_STEP=16 if masked or spills else 32, num_warps=8, num_stages=1)
    blackwell = arch.name == "sm_100"
    if head_dim <= 64:
        # Of four warps, dk and dv of rotated keys for a norm spill with Triton 3.9, of 48 columns with 3.6; of wider
        # steps so do those beside dropout.
        many = masked or (not queries and (rope and request.parts.before_norm or blackwell and head_dim == 48))
        step = 32 if request.parts.dropout and not queries else 64
        return AttentionConfig(BLOCK_ROWS=64, BLOCK_STEP=step, num_warps=8 if many else 4, num_stages=1)
    if masked or rope:
        return AttentionConfig(BLOCK_ROWS=64, BLOCK_STEP=32, num_warps=8, num_stages=1)
    # Not pipelined, heads of 104 and 112 columns spill.
    return AttentionConfig(BLOCK_ROWS=64, BLOCK_STEP=64, num_warps=8, num_stages=2 if blackwell else 1)

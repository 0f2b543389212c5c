"""The configs of a launch that are worth measuring."""

from __future__ import annotations

from collections.abc import Iterator

from .hardware import Arch
from .heuristic import heuristic, pointer_heuristic, split_k
from .request import (
    AttentionConfig,
    Config,
    GemmConfig,
    Request,
    RowConfig,
    TmaConfig,
    ceil_div,
    filled_parts,
    next_power_of_2,
)
from .validity import why_invalid

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
# Of epilogues that hold six tiles.
_TILES_GATED = ((64, 32, 64, 4), (128, 32, 64, 8), (64, 64, 64, 8), (32, 64, 64, 4))
# By TMA: BLOCK_M, BLOCK_N, num_warps, num_stages, SUBTILES.
_TILES_TMA = (
    (128, 256, 8, 3, 4),
    (128, 256, 8, 4, 4),
    (128, 256, 8, 3, 2),
    (256, 128, 8, 3, 2),
    (128, 128, 8, 4, 2),
    (128, 128, 8, 3, 2),
    (128, 128, 8, 3, 1),
    (128, 128, 4, 3, 2),
    (128, 64, 4, 4, 1),
    (64, 128, 4, 4, 1),
    (64, 128, 4, 4, 2),
)
_TILES_GATHERED = ((64, 64, 32, 4), (64, 128, 32, 4), (128, 64, 32, 4), (128, 128, 32, 8), (64, 64, 64, 4))
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
    if request.kernel == "gemm":
        candidates = _gemm_candidates(request, arch, sms)
    else:
        candidates = _CANDIDATES[type(first)](request, first, arch, sms)
    distinct = dict.fromkeys((first, *candidates))
    return [config for config in distinct if not why_invalid(config, request, arch)]


def _gemm_candidates(request: Request, arch: Arch, sms: int) -> Iterator[Config]:
    m, n, _ = request.shape
    if request.parts.tma and arch.has_tma:
        for block_m, block_n, warps, stages, parts in _TILES_TMA:
            yield TmaConfig(block_m, block_n, 64, warps, stages, SUBTILES=parts)
    first = pointer_heuristic(request, arch, sms)
    yield first
    if request.dtype.itemsize > 2:
        tiles, stages_tried = _TILES_32_BIT, (2, 3)
    elif request.parts.gathers:
        tiles, stages_tried = _TILES_GATHERED, (1, 3)
    else:
        tiles, stages_tried = _TILES_GATED if request.parts.epilogue.tiles > 3 else _TILES_16_BIT, (3, 4)
    if arch.backend == "hip":
        stages_tried = (1, 2)
    sums = request.parts.epilogue.sums
    if sums:
        # Splits are tried instead.
        stages_tried = (first.num_stages,)
    for block_m, block_n, block_k, warps in tiles:
        # A tile that is mostly padding never wins over a smaller one.
        if block_m > max(64, next_power_of_2(m)) or block_n > max(64, next_power_of_2(n)):
            continue
        for stages in stages_tried:
            config = GemmConfig(block_m, block_n, block_k, warps, stages)
            if not sums:
                yield config
                continue
            parts = split_k(request, config, sms)
            yield config._replace(SPLIT_K=parts)
            yield config._replace(SPLIT_K=filled_parts(request.shape[2], 2 * parts, block_k))


def _attention_candidates(request: Request, first: AttentionConfig, arch: Arch, sms: int) -> Iterator[AttentionConfig]:
    if request.kernel == "attention_forward" and request.dtype.itemsize == 2 and request.parts.plain:
        for rows, warps in ((64, 4), (128, 8)):
            together = next_power_of_2(ceil_div(request.shape[1], rows))
            for step in (32, 64, 128):
                yield AttentionConfig(rows, step, warps, 3)
                yield AttentionConfig(rows, step, warps, 2)
                yield AttentionConfig(rows, step, warps, 1, together)
        return
    for rows in (first.BLOCK_ROWS, 2 * first.BLOCK_ROWS):
        for step in (first.BLOCK_STEP, 2 * first.BLOCK_STEP):
            for warps in (4, 8):
                for stages in (first.num_stages, 2):
                    yield AttentionConfig(rows, step, warps, stages)


def _row_candidates(request: Request, first: RowConfig, arch: Arch, sms: int) -> Iterator[RowConfig]:
    for rows in (first.BLOCK_ROWS, max(1, first.BLOCK_ROWS // 2), 2 * first.BLOCK_ROWS):
        for warps in (4, 8):
            yield first._replace(BLOCK_ROWS=rows, num_warps=warps)


_CANDIDATES = {AttentionConfig: _attention_candidates, RowConfig: _row_candidates}

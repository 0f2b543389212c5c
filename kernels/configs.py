"""Launch configurations as data: frozen dataclasses, and the heuristic that picks one without measuring."""

from dataclasses import dataclass, replace

import torch
import triton

from . import hardware


@dataclass(frozen=True)
class GemmConfig:
    """Tile (BLOCK_M, BLOCK_N) of the output, step BLOCK_K of the reduction, GROUP_M row tiles that share L2."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8


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
    """BLOCK_ROWS whole rows of BLOCK_D (a power of two) columns."""

    BLOCK_ROWS: int
    BLOCK_D: int
    num_warps: int


# 16-bit products. LARGE: the largest tile that leaves the loaders and most epilogues their registers; HEAVY: for the
# epilogue that holds three tiles at once, and where operands take registers; SMALL: for outputs of few tiles. Narrower
# than 128 columns, Hopper's compiler serializes the products of operands that a loader has transformed.
LARGE = GemmConfig(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)
HEAVY = GemmConfig(BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, num_warps=8, num_stages=3)
SMALL = GemmConfig(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3)
# Pixels gathered by less than 16 bytes at a time, or converted, pass through registers: nothing to pipeline.
SCATTERED = GemmConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=1)
# float32 in full precision has no tensor cores.
FULL_PRECISION = GemmConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, num_warps=8, num_stages=3)


def gemm_config(
    m: int, n: int, dtype: torch.dtype, device: torch.device, *, scattered=False, heavy=False
) -> GemmConfig:
    """The tile for an (m, n) product in `dtype`. scattered: pixels are gathered or scattered by less than 16 bytes at a
    time; heavy: the epilogue holds several tiles at once."""
    if dtype.itemsize > 2:
        config = FULL_PRECISION
    elif scattered:
        config = SCATTERED
    elif heavy or not hardware.has_wgmma():
        config = HEAVY
    elif triton.cdiv(m, LARGE.BLOCK_M) * triton.cdiv(n, LARGE.BLOCK_N) < hardware.num_sms(device):
        config = SMALL
    else:
        config = LARGE
    # CDNA3 has 64 KiB of shared memory a block, room for two stages.
    return replace(config, num_stages=min(config.num_stages, 2)) if hardware.is_amd() else config


def split_k(m: int, n: int, k: int, config: GemmConfig, device: torch.device) -> int:
    """Into how many parts to cut the reduction of a weight gradient, which has few output tiles and a long k."""
    tiles = triton.cdiv(m, config.BLOCK_M) * triton.cdiv(n, config.BLOCK_N)
    # A part of fewer than 8 steps would spend more on writing its partial sums than on making them.
    return max(1, min(hardware.num_sms(device) // tiles, k // (8 * config.BLOCK_K)))


# By whether the head is wider than 64.
FULL_PRECISION_ATTENTION = (
    AttentionConfig(BLOCK_ROWS=32, BLOCK_STEP=32, num_warps=8, num_stages=1),
    AttentionConfig(BLOCK_ROWS=16, BLOCK_STEP=16, num_warps=8, num_stages=1),
)


def attention_config(head_dim: int, dtype: torch.dtype, masked: bool) -> AttentionConfig:
    """The tile of the forward kernel; masked: with a key padding mask or a bias."""
    if dtype.itemsize > 2:
        return FULL_PRECISION_ATTENTION[head_dim > 64]
    # Pipelined, the loads of a mask between the two products make the compiler serialize them on Hopper.
    stages = 1 if masked or hardware.is_amd() else 3
    wide_and_masked = masked and head_dim > 64
    step = 64 if hardware.has_wgmma() and not wide_and_masked else 32
    warps = 8 if wide_and_masked else 4
    return AttentionConfig(BLOCK_ROWS=64, BLOCK_STEP=step, num_warps=warps, num_stages=stages)


def attention_backward_config(head_dim: int, dtype: torch.dtype, masked: bool) -> AttentionConfig:
    """The tile of both backward kernels."""
    if dtype.itemsize > 2:
        return FULL_PRECISION_ATTENTION[head_dim > 64]
    if not hardware.has_wgmma():
        if head_dim <= 64:
            return AttentionConfig(BLOCK_ROWS=64, BLOCK_STEP=32, num_warps=4, num_stages=1)
        return AttentionConfig(BLOCK_ROWS=32, BLOCK_STEP=16 if masked else 32, num_warps=8, num_stages=1)
    if head_dim <= 64:
        return AttentionConfig(BLOCK_ROWS=64, BLOCK_STEP=64, num_warps=8 if masked else 4, num_stages=1)
    return AttentionConfig(BLOCK_ROWS=64, BLOCK_STEP=32 if masked else 64, num_warps=8, num_stages=1)


def row_config(columns: int, elements: int) -> RowConfig:
    """Whole rows of `columns`, about `elements` of them at a time."""
    block = triton.next_power_of_2(columns)
    return RowConfig(BLOCK_ROWS=max(1, elements // block), BLOCK_D=block, num_warps=8 if block > 2048 else 4)

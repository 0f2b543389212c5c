"""Launch configurations as data: frozen dataclasses, and the heuristic that picks one without measuring."""

from dataclasses import dataclass

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
    """BLOCK_M query rows against BLOCK_N keys."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RowConfig:
    """BLOCK_ROWS whole rows of BLOCK_D (a power of two) columns."""

    BLOCK_ROWS: int
    BLOCK_D: int
    num_warps: int


# Narrow or gathered loads (a patch of 14 pixels) keep whole tiles in registers: smaller tiles.
SCATTERED = GemmConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=2)


def gemm_config(m: int, n: int, dtype: torch.dtype, device: torch.device, scattered: bool = False) -> GemmConfig:
    """The tile for an (m, n) product in `dtype`; `scattered`: an operand is gathered by less than 16 bytes at a time."""
    if scattered:
        return SCATTERED
    stages = 2 if hardware.is_amd() else 3  # 64 KiB of local data share on CDNA3
    if dtype.itemsize > 2:
        return GemmConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=stages)
    if triton.cdiv(m, 128) * triton.cdiv(n, 128) < hardware.num_sms(device):
        return GemmConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=stages)
    return GemmConfig(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=stages)


def split_k(m: int, n: int, k: int, config: GemmConfig, device: torch.device) -> int:
    """Into how many parts to cut the reduction of a weight gradient, which has few output tiles and a long k."""
    tiles = triton.cdiv(m, config.BLOCK_M) * triton.cdiv(n, config.BLOCK_N)
    # A part of fewer than 8 steps would spend more on writing its partial sums than on making them.
    return max(1, min(hardware.num_sms(device) // tiles, k // (8 * config.BLOCK_K)))


def attention_config(head_dim: int, dtype: torch.dtype) -> AttentionConfig:
    """The tile of the forward kernel."""
    if dtype.itemsize > 2:
        return AttentionConfig(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=1 if hardware.is_amd() else 2)
    return AttentionConfig(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=1 if hardware.is_amd() else 3)


def attention_backward_config(head_dim: int, dtype: torch.dtype) -> AttentionConfig:
    """The tile of both backward kernels."""
    if dtype.itemsize > 2:
        return AttentionConfig(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=1)
    return AttentionConfig(BLOCK_M=64, BLOCK_N=64, num_warps=4 if head_dim <= 64 else 8, num_stages=1)


def row_config(columns: int, elements: int) -> RowConfig:
    """Whole rows of `columns`, about `elements` of them at a time."""
    block = triton.next_power_of_2(columns)
    return RowConfig(BLOCK_ROWS=max(1, elements // block), BLOCK_D=block, num_warps=8 if block > 2048 else 4)

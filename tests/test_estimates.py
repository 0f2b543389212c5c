"""Estimates of a launch keep their order, and stay above the floor."""

from __future__ import annotations

import math

import pytest
import torch
from fastvit.kernels import gemm
from fastvit.kernels.launch import cost
from fastvit.kernels.launch.cost import Rates
from fastvit.kernels.launch.hardware import ARCHS
from fastvit.kernels.launch.request import (
    CONFIGS,
    AttentionConfig,
    GemmConfig,
    Product,
    Request,
    RowConfig,
    Rows,
    Scores,
)
from fastvit.kernels.launch.search import search_space

BF16, FP32 = torch.bfloat16, torch.float32


def product(shape, dtype, epilogue=gemm.INPUT_GRADIENT):
    return Request("gemm", shape, dtype, Product(gemm.MATRIX, gemm.MATRIX, epilogue, None, *[dtype] * 3))


REQUESTS = [
    (product((50432, 2304, 768), BF16), cost.gemm(50432, 2304, 768, 2)),
    (product((197, 768, 3072), BF16), cost.gemm(197, 768, 3072, 2)),
    (product((1000, 768, 768), FP32), cost.gemm(1000, 768, 768, 4)),
    (product((768, 768, 6304), BF16, gemm.SUMS), cost.weight_gradient(6304, 768, 768, 2)),
    (Request("attention_forward", (3, 197, 12, 64), BF16, Scores()), cost.attention_forward(3, 197, 12, 64, 2)),
    (Request("attention_backward_dq", (8, 257, 16, 80), BF16, Scores()), cost.attention_backward_dq(8, 257, 16, 80, 2)),
    (Request("attention_backward_dkdv", (8, 50, 3, 64), FP32, Scores()), cost.attention_backward_dkdv(8, 50, 3, 64, 4)),
    (Request("layer_norm_statistics", (1576, 768), BF16, Rows()), cost.row_statistics(1576, 768, 2)),
    (Request("layer_norm_forward", (50432, 192), BF16, Rows()), cost.layer_norm_forward(50432, 192, 2)),
    (Request("layer_norm_backward", (1576, 768), BF16, Rows()), cost.layer_norm_backward(1576, 768, 2)),
    (
        Request("layer_norm_backward", (1576, 768), BF16, Rows(residual=True)),
        cost.layer_norm_backward(1576, 768, 2, residual=True),
    ),
    (Request("column_sum", (1576, 3072), BF16, Rows()), cost.column_sum(1576, 3072, 2)),
]


@pytest.mark.parametrize("request_, must", REQUESTS, ids=lambda value: getattr(value, "key", ""))
def test_what_a_request_needs(request_, must):
    assert cost.request_cost(request_) == must


@pytest.mark.parametrize("request_, must", REQUESTS, ids=lambda value: getattr(value, "key", ""))
@pytest.mark.parametrize("arch", ARCHS.values(), ids=lambda arch: arch.name)
def test_estimates(arch, request_, must):
    """Never below the floor of the data sheet; never slower with more multiprocessors; nothing but numbers."""
    flops = arch.flops_16 if request_.dtype.itemsize <= 2 else arch.flops_32
    floor = cost.bound_seconds(must, Rates(flops, arch.bandwidth))
    for config in search_space(request_, arch, arch.sms):
        seconds = cost.request_seconds(request_, config, arch)
        assert math.isfinite(seconds) and seconds > floor
        assert seconds == cost.request_seconds(request_, config, arch, sms=arch.sms)
        by_sms = [cost.request_seconds(request_, config, arch, sms) for sms in range(8, 2 * arch.sms, 7)]
        assert by_sms == sorted(by_sms, reverse=True) and by_sms[0] > floor


def test_estimates_count_padding_waves_and_room():
    arch = ARCHS["sm_90"]
    tall = GemmConfig(128, 64, 64, 4, 3)
    wide = tall._replace(BLOCK_M=64, BLOCK_N=128)
    # 64 rows fill half of a tall tile; of many rows neither wastes any.
    assert cost.gemm_seconds(64, 65536, 768, 4, tall, arch) > 1.5 * cost.gemm_seconds(64, 65536, 768, 4, wide, arch)
    assert cost.gemm_seconds(65536, 8192, 768, 2, tall, arch) == cost.gemm_seconds(65536, 8192, 768, 2, wide, arch)
    # One tile more than the multiprocessors hold takes another round.
    full, over = (cost.gemm_seconds(128 * n, 64, 4096, 4, tall, arch) for n in (132, 133))
    assert over > 1.3 * full
    # A long sum into few tiles is better cut.
    cut = tall._replace(SPLIT_K=8)
    assert cost.gemm_seconds(768, 768, 50432, 2, cut, arch) < cost.gemm_seconds(768, 768, 50432, 2, tall, arch)
    # Blocks that fill the shared memory cannot hide each other's latency.
    thin = tall._replace(num_stages=2)
    alone, together = (cost.gemm_seconds(4096, 4096, 64, 4, thin, arch, shared) for shared in (arch.shared // 2, 0))
    assert alone >= together

    narrow = AttentionConfig(64, 32, 4, 2)
    shape = (256, 197, 12, 64, 2)
    wasteful = cost.attention_seconds(*shape, narrow._replace(BLOCK_STEP=256), arch)
    assert wasteful > cost.attention_seconds(*shape, narrow, arch)
    kernels = [cost.attention_seconds(*shape, narrow, arch, kernel) for kernel in CONFIGS if "attention" in kernel]
    assert kernels == sorted(kernels) and kernels[0] < kernels[2]

    row = RowConfig(4, 1024, 4)
    assert cost.row_seconds(50432, 1024, 2, row, arch, moves=4) > cost.row_seconds(50432, 1024, 2, row, arch, moves=2)
    few = cost.row_seconds(50432, 1024, 2, row, arch, stretches=16)
    assert few > cost.row_seconds(50432, 1024, 2, row, arch, stretches=256)

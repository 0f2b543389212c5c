"""Estimates of a launch keep their order, and stay above the floor."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from fastvit.kernels import tiles
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
from fastvit.kernels.launch.validity import shared_memory

BF16, FP32 = torch.bfloat16, torch.float32


def product(shape, dtype, epilogue=tiles.INPUT_GRADIENT):
    return Request("gemm", shape, dtype, Product(tiles.MATRIX, tiles.MATRIX, epilogue, None, *[dtype] * 3))


REQUESTS = [
    (product((50432, 2304, 768), BF16), cost.gemm(50432, 2304, 768, 2)),
    (product((197, 768, 3072), BF16), cost.gemm(197, 768, 3072, 2)),
    (product((1000, 768, 768), FP32), cost.gemm(1000, 768, 768, 4)),
    (product((768, 768, 6304), BF16, tiles.SUMS), cost.weight_gradient(6304, 768, 768, 2)),
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


def test_estimates_count_padding_waves_and_room(monkeypatch):
    arch = ARCHS["sm_90"]
    tall = GemmConfig(128, 64, 64, 4, 3)
    wide = tall._replace(BLOCK_M=64, BLOCK_N=128)

    def gemm_seconds(shape, config, dtype=BF16, epilogue=tiles.INPUT_GRADIENT, arch=arch):
        return cost.request_seconds(product(shape, dtype, epilogue), config, arch)

    # 64 rows fill half of a tall tile; of many rows neither wastes any.
    few, many = (64, 65536, 768), (65536, 8192, 768)
    assert gemm_seconds(few, tall, FP32) > 1.5 * gemm_seconds(few, wide, FP32)
    assert gemm_seconds(many, tall) == gemm_seconds(many, wide)
    # One tile more than the multiprocessors hold takes another round.
    full, over = (gemm_seconds((128 * n, 64, 4096), tall, FP32) for n in (132, 133))
    assert over > 1.3 * full
    # A long sum into few tiles is better cut.
    long, cut = (768, 768, 50432), tall._replace(SPLIT_K=8)
    assert gemm_seconds(long, cut, epilogue=tiles.SUMS) < gemm_seconds(long, tall, epilogue=tiles.SUMS)
    # Its parts are written, read again and added.
    assert gemm_seconds((4096, 4096, 512), cut, epilogue=tiles.SUMS) > (8 + 8 + 1) * 4096**2 * 4 / arch.bandwidth
    # Blocks that fill the shared memory cannot hide each other's latency.
    shallow, thin = (4096, 4096, 64), tall._replace(num_stages=2)
    crowded = replace(arch, shared=shared_memory(thin, product(shallow, FP32), arch) + 1024)
    assert gemm_seconds(shallow, thin, FP32, arch=crowded) >= gemm_seconds(shallow, thin, FP32)

    narrow = AttentionConfig(64, 32, 4, 2)
    attentions = [Request(kernel, (256, 197, 12, 64), BF16, Scores()) for kernel in CONFIGS if "attention" in kernel]
    kernels = [cost.request_seconds(request, narrow, arch) for request in attentions]
    rows = [cost.request_seconds(attentions[0], AttentionConfig(rows, 32, 4, 2), arch) for rows in (64, 256)]
    assert rows[0] < rows[1]
    # A head of 72 takes products of 80.
    by_head_dim = [
        cost.request_seconds(Request("attention_forward", (64, 1024, 12, d), BF16, Scores()), narrow, arch)
        for d in (64, 72, 80)
    ]
    assert by_head_dim[0] < by_head_dim[1] == by_head_dim[2]
    assert kernels == sorted(kernels) and kernels[0] < kernels[2]

    def row_seconds(kernel, residual=False):
        request = Request(kernel, (50432, 1024), BF16, Rows(residual))
        return cost.request_seconds(request, RowConfig(4, 1024, 4), arch)

    assert row_seconds("layer_norm_backward", residual=True) > row_seconds("layer_norm_backward")
    assert row_seconds("layer_norm_forward") > row_seconds("layer_norm_statistics")
    many = row_seconds("layer_norm_backward")
    monkeypatch.setitem(cost.MAX_PARTIALS, "layer_norm_backward", 16)
    assert row_seconds("layer_norm_backward") > many

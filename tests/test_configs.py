"""Configs: the heuristic's choices, one judge of what fits, the search space, and what a launch does with them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch
from fastvit.kernels import attention, block_tiles, gemm, layer_norm, layer_norm_mlp, patch_embed, tiles
from fastvit.kernels.launch import choice, hardware
from fastvit.kernels.launch.absent import AbsentDriver, target_of
from fastvit.kernels.launch.hardware import ARCHS
from fastvit.kernels.launch.heuristic import heuristic
from fastvit.kernels.launch.request import (
    CONFIGS,
    AttentionConfig,
    GemmConfig,
    Product,
    Request,
    RowConfig,
    Rows,
    Scores,
    TmaConfig,
)
from fastvit.kernels.launch.search import search_space
from fastvit.kernels.launch.validity import shared_memory, why_invalid
from samples import SAMPLES, results

from fastvit.accuracy import relative_rms
from fastvit.dispatch import interpreting

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SMS = 132
# What products are made of: left and right operand, epilogue, activation.
FORWARD = (tiles.NORMALISED, tiles.MATRIX, tiles.LINEAR)
FOLDED = (tiles.MATRIX, tiles.MATRIX, block_tiles.FOLDED)
RESIDUAL = (tiles.MATRIX, tiles.MATRIX, tiles.LINEAR_RESIDUAL)
GRADIENT = (tiles.MATRIX, tiles.MATRIX, tiles.INPUT_GRADIENT)
HEAVY = (tiles.MATRIX, tiles.MATRIX, layer_norm_mlp.ACTIVATION_GRADIENT, "gelu")
GATED_HEAVY = (tiles.MATRIX, tiles.MATRIX, block_tiles.GATED_DERIVATIVE, "silu")
PATCHES = (patch_embed.PATCHES, tiles.MATRIX, patch_embed.TOKENS)
GATHERED = (patch_embed.GATHERED_PATCHES, tiles.MATRIX, patch_embed.TOKENS)
WEIGHT = (tiles.MATRIX, tiles.NORMALISED, tiles.SUMS)
PLAIN_WEIGHT = (tiles.MATRIX, tiles.MATRIX, tiles.SUMS)
GATHERED_WEIGHT = (tiles.MATRIX, patch_embed.GATHERED_PATCHES, tiles.SUMS)
PIXELS = (tiles.MATRIX, tiles.MATRIX, patch_embed.PIXELS)
NVIDIA = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
HOPPER, OLDER = ("sm_90", "sm_100"), ("sm_80", "sm_89", "sm_120")
BACKWARD = ("attention_backward_dq", "attention_backward_dkdv")


def product(m, n, k, made_of=FORWARD, dtype=BF16, out=None):
    left, right, epilogue, *activation = made_of
    out = out or (FP32 if epilogue.sums else dtype)
    return Request("gemm", (m, n, k), dtype, Product(left, right, epilogue, *(activation or [None]), dtype, dtype, out))


def of_bytes(request):
    """The product with a left operand in uint8."""
    return request._replace(parts=request.parts._replace(left_dtype=torch.uint8))


def heads(kernel, head_dim, *masks, dtype=BF16, tokens=197):
    has = {"before_norm": "norm" in masks, "dropout": "dropout" in masks}
    scores = Scores("mask" in masks, dtype if "bias" in masks else None, **has)
    return Request(kernel, (64, tokens, 12, head_dim), dtype, scores)


def rows(kernel, shape, dtype, **parts):
    return Request(kernel, shape, dtype, Rows(**parts))


# (architectures, requests, config): what compiles without spills, chosen by no measurement.
CHOICES = [
    (HOPPER, [product(12608, 2304, 768), product(50432, 768, 3072, RESIDUAL, FP16)], (128, 128, 64, 8, 3)),
    (HOPPER, [product(2816, 768, 768), product(2689, 768, 768)], (128, 128, 64, 8, 3)),
    (HOPPER, [product(1, 768, 768), product(197, 3072, 768), product(2816, 640, 768)], (64, 128, 64, 4, 3)),
    (HOPPER, [product(12608, 3072, 768, HEAVY), product(197, 3072, 768, HEAVY)], (128, 64, 64, 8, 3)),
    (OLDER, [product(12608, 2304, 768), product(1, 768, 768), product(197, 3072, 768, HEAVY)], (128, 64, 64, 8, 3)),
    (("gfx942",), [product(12608, 2304, 768), product(197, 3072, 768, HEAVY, FP16)], (128, 64, 64, 8, 2)),
    (ARCHS, [product(12608, 1024, 588, GATHERED, FP16)], (64, 64, 32, 4, 1)),
    (("sm_90",), [product(12608, 768, 768, PATCHES)], (64, 128, 64, 4, 3)),
    (("sm_100",), [product(12608, 768, 768, PATCHES)], (128, 128, 64, 8, 3)),
    (NVIDIA, [of_bytes(product(12608, 768, 768, PATCHES))], (128, 64, 64, 8, 3)),
    (NVIDIA, [product(12608, 768, 768, dtype=FP32), product(197, 3072, 768, RESIDUAL, FP64)], (64, 64, 16, 8, 3)),
    (ARCHS, [product(1, 8, 8, HEAVY, FP64), product(12608, 2304, 768, FOLDED, FP32)], (64, 64, 16, 8, 2)),
    (("sm_80", "sm_89", "sm_90", "sm_120"), [product(12608, 1024, 588, GATHERED, FP32)], (64, 64, 16, 8, 3)),
    (("sm_100",), [product(12608, 1024, 588, made_of, FP32) for made_of in (GATHERED, PATCHES)], (64, 64, 16, 8, 2)),
    (("gfx942",), [product(12608, 768, 768, dtype=FP32)], (64, 64, 16, 8, 2)),
    (HOPPER, [product(768, 768, 12608, WEIGHT)], (64, 128, 64, 4, 3, 8, 1)),
    (HOPPER, [product(192, 192, 50432, WEIGHT)], (64, 128, 64, 4, 3, 8, 22)),
    (HOPPER, [product(768, 3072, 12608, PLAIN_WEIGHT)], (128, 128, 64, 4, 3, 8, 1)),
    (("sm_90",), [product(12608, 2304, 768, FOLDED)], (128, 128, 64, 8, 3)),
    (("sm_100",), [product(12608, 2304, 768, FOLDED)], (128, 64, 64, 8, 3)),
    (NVIDIA, [product(12608, 4096, 1536, GATED_HEAVY)], (64, 32, 64, 4, 3)),
    (("sm_90",), [product(12608, 768, 768, PIXELS, out=FP32)], (128, 64, 64, 8, 3)),
    (HOPPER, [product(12608, 768, 768, PIXELS)], (128, 128, 64, 8, 3)),
    (OLDER, [product(768, 768, 12608, WEIGHT)], (128, 64, 64, 8, 3, 8, 1)),
    (("gfx942",), [product(192, 192, 12608, WEIGHT)], (128, 64, 64, 8, 2, 8, 22)),
    (ARCHS, [product(768, 588, 3000, GATHERED_WEIGHT)], (64, 64, 32, 4, 1, 8, 1)),
    (NVIDIA, [product(192, 192, 1576, WEIGHT, FP32)], (64, 64, 16, 8, 3, 8, 11)),
    (HOPPER, [heads("attention_forward", d) for d in (16, 64, 80, 96)], (64, 128, 4, 1, 4)),
    (HOPPER, [heads("attention_forward", 80, tokens=257)], (64, 64, 4, 3)),
    (HOPPER, [heads("attention_forward", 128), heads("attention_forward", 64, tokens=577)], (64, 64, 4, 3)),
    (HOPPER, [heads("attention_forward", 64)._replace(shape=(1, 197, 12, 64))], (64, 64, 4, 3)),
    (HOPPER, [heads("attention_forward", 64, "mask"), heads("attention_forward", 8, "mask", "bias")], (64, 64, 4, 1)),
    (HOPPER, [heads("attention_forward", 80, "bias"), heads("attention_forward", 128, "mask")], (64, 32, 8, 1)),
    (OLDER, [heads("attention_forward", 104), heads("attention_forward", 128)], (64, 32, 4, 3)),
    (OLDER, [heads("attention_forward", d) for d in (16, 64, 72)], (64, 32, 4, 3)),
    (("gfx942", *OLDER), [heads("attention_forward", 64, "mask")], (64, 32, 4, 1)),
    (("gfx942",), [heads("attention_forward", 64)], (64, 32, 4, 1)),
    (HOPPER, [heads(kernel, 64) for kernel in BACKWARD], (64, 64, 4, 1)),
    (HOPPER, [heads(kernel, 64, "bias") for kernel in BACKWARD], (64, 64, 8, 1)),
    (("sm_90",), [heads(kernel, 80, dtype=FP16) for kernel in BACKWARD], (64, 64, 8, 1)),
    (("sm_100",), [heads(kernel, 80, dtype=FP16) for kernel in BACKWARD], (64, 64, 8, 2)),
    (("sm_100",), [heads(BACKWARD[1], 48)], (64, 64, 8, 1)),
    (HOPPER, [heads(BACKWARD[1], 64, "dropout")], (64, 32, 4, 1)),
    (HOPPER, [heads(BACKWARD[0], 64, "dropout"), heads(BACKWARD[0], 48)], (64, 64, 4, 1)),
    (HOPPER, [heads(kernel, 128, "mask") for kernel in BACKWARD], (64, 32, 8, 1)),
    (("gfx942", "sm_80"), [heads(kernel, 64, "mask") for kernel in BACKWARD], (64, 32, 4, 1)),
    (("sm_89", "sm_120"), [heads(BACKWARD[0], 64, "mask")], (64, 32, 8, 1)),
    (("sm_89", "sm_120"), [heads(BACKWARD[1], 64, "mask")], (64, 32, 4, 1)),
    (("gfx942", *OLDER), [heads(kernel, 80) for kernel in BACKWARD], (32, 32, 8, 1)),
    (("gfx942", *OLDER), [heads(kernel, 80, "mask") for kernel in BACKWARD], (32, 16, 8, 1)),
    (("sm_120", "gfx942"), [heads(BACKWARD[1], 96)], (32, 16, 8, 1)),
    (("sm_80", "sm_89"), [heads(BACKWARD[1], 96)], (32, 32, 8, 1)),
    (("sm_80", "sm_89"), [heads(BACKWARD[1], 104)], (32, 16, 8, 1)),
    (("sm_80",), [heads(BACKWARD[0], 64, "norm")], (64, 32, 4, 2)),
    (("sm_89", "sm_120"), [heads(BACKWARD[0], 64, "norm")], (64, 32, 4, 1)),
    (OLDER, [heads(BACKWARD[1], 64, "norm")], (64, 32, 4, 1)),
    (("sm_120", "gfx942"), [heads(BACKWARD[1], 64, "norm", dtype=FP32)], (32, 16, 8, 1)),
    (("sm_80", "sm_90"), [heads(BACKWARD[1], 64, "norm", dtype=FP32)], (32, 32, 8, 1)),
    (ARCHS, [heads(k, 64, dtype=FP32) for k in (*BACKWARD, "attention_forward")], (32, 32, 8, 1)),
    (ARCHS, [heads(k, 65, "mask", dtype=FP64) for k in (*BACKWARD, "attention_forward")], (16, 16, 8, 1)),
    (ARCHS, [rows(f"layer_norm_{kind}", (1576, 768), BF16) for kind in ("forward", "statistics")], (4, 1024, 4)),
    (ARCHS, [rows("layer_norm_forward", (1576, 4096), FP32)], (1, 4096, 8)),
    (ARCHS, [rows("layer_norm_forward", (1576, 24), BF16)], (128, 32, 4)),
    (ARCHS, [rows("layer_norm_backward", (1576, 768), BF16, residual=True)], (2, 1024, 4)),
    (ARCHS, [rows("layer_norm_backward", (1576, 2049), BF16)], (1, 4096, 8)),
    (ARCHS, [rows("column_sum", (1576, 768), BF16)], (32, 128, 4)),
    (ARCHS, [rows("column_sum", (1576, 768), FP32)], (32, 128, 8)),
]
REQUESTS = list(dict.fromkeys(request for _, requests, _ in CHOICES for request in requests if request.dtype != FP64))


@pytest.mark.parametrize("archs, requests, config", CHOICES)
def test_the_heuristics_choices(archs, requests, config):
    for arch in archs:
        for request in requests:
            chosen = heuristic(request, ARCHS[arch], SMS)
            assert chosen == CONFIGS[request.kernel](*config), (arch, request.key)


@pytest.mark.parametrize(
    "made_of, config",
    [
        (FOLDED, (128, 256, 64, 8, 3, 8, 4)),
        ((tiles.MATRIX, tiles.MATRIX, block_tiles.FOLDED_ACTIVATED, "gelu"), (128, 256, 64, 8, 3, 8, 4)),
        ((tiles.MATRIX, tiles.MATRIX, block_tiles.FOLDED_KEPT, "gelu"), (128, 128, 64, 8, 4, 8, 2)),
        (HEAVY, (128, 128, 64, 8, 4, 8, 2)),
        (GATED_HEAVY, (128, 128, 64, 8, 4, 8, 4)),
    ],
)
def test_tiles_by_tma(made_of, config):
    """On Hopper, where a product has a tile for every multiprocessor; never elsewhere."""
    request = product(12608, 3072, 768, made_of)
    request = request._replace(parts=request.parts._replace(tma=True))
    assert heuristic(request, ARCHS["sm_90"], SMS) == TmaConfig(*config)
    space = search_space(request, ARCHS["sm_90"], SMS)
    assert space[0] == TmaConfig(*config) and len(set(space)) == len(space) <= 32
    assert {TmaConfig, GemmConfig} == set(map(type, space))
    for config in space:
        assert why_invalid(config, request, ARCHS["sm_90"]) == [], config
    few = request._replace(shape=(197, 3072, 768))
    assert type(heuristic(few, ARCHS["sm_90"], SMS)) is GemmConfig
    for arch in ("sm_80", "sm_120", "gfx942"):
        assert {GemmConfig} == set(map(type, search_space(request, ARCHS[arch], SMS)))


@pytest.mark.parametrize("arch", ARCHS.values(), ids=lambda arch: arch.name)
def test_search_spaces(arch):
    for request in REQUESTS:
        space = search_space(request, arch, SMS)
        assert space[0] == heuristic(request, arch, SMS)
        assert len(set(space)) == len(space) <= 24, request.key
        for config in space:
            assert why_invalid(config, request, arch) == [], (request.key, config)


@pytest.mark.parametrize("made_of", [FORWARD, RESIDUAL, GRADIENT, WEIGHT], ids=lambda made_of: made_of[2].name)
def test_a_16_bit_product_has_a_search_space_worth_the_name(made_of):
    request = product(12608, 768, 768, made_of)
    assert 8 <= len(search_space(request, ARCHS["sm_90"], SMS)) <= 24


def test_only_the_gradient_of_a_weight_is_split():
    arch = ARCHS["sm_90"]
    for request in REQUESTS:
        space = search_space(request, arch, SMS)
        if request.kernel == "gemm" and not request.parts.epilogue.sums:
            assert all(config.SPLIT_K == 1 for config in space)
            assert "the epilogue finishes a whole sum" in str(why_invalid(space[0]._replace(SPLIT_K=2), request, arch))
    parts = {config.SPLIT_K for config in search_space(product(384, 384, 12608, WEIGHT), arch, SMS)}
    assert len(parts) > 2 and max(parts) <= 132


LARGE = GemmConfig(128, 128, 64, 8, 3)


@pytest.mark.parametrize(
    "config, request_, arch, reason",
    [
        (RowConfig(4, 1024, 4), product(64, 64, 64), "sm_90", "gemm takes a GemmConfig, got a RowConfig"),
        (LARGE._replace(BLOCK_M=96), product(64, 64, 64), "sm_90", "BLOCK_M is 96, expected a power of two"),
        (LARGE._replace(num_stages=0), product(64, 64, 64), "sm_90", "num_stages is 0, expected a positive integer"),
        (LARGE._replace(BLOCK_K="64"), product(64, 64, 64), "sm_90", "BLOCK_K is '64', expected a positive integer"),
        (LARGE._replace(BLOCK_K=8), product(64, 64, 64), "sm_80", "BLOCK_K is 8, a product needs at least 16"),
        (
            LARGE._replace(num_warps=64),
            product(64, 64, 64),
            "sm_80",
            "64 warps are 2048 threads, a block has at most 1024",
        ),
        (
            LARGE._replace(num_stages=8),
            product(64, 64, 64, GRADIENT),
            "sm_90",
            "needs 262144 bytes of shared memory, sm_90 has 232448 a block",
        ),
        (LARGE._replace(num_stages=4), product(64, 64, 64, GRADIENT), "gfx942", "needs 98304 bytes"),
        (LARGE._replace(num_warps=2), product(64, 64, 64), "sm_90", "2 warps, a warpgroup's product needs 4"),
        (LARGE._replace(BLOCK_M=32), product(64, 64, 64), "sm_90", "32 rows, a warpgroup's product needs 64"),
        (LARGE._replace(BLOCK_N=64), product(64, 64, 64), "sm_90", "64 columns serialize"),
        (LARGE, of_bytes(product(64, 64, 64, PATCHES)), "sm_90", "products of bytes are serialized"),
        (
            LARGE._replace(BLOCK_N=256, num_warps=4),
            product(64, 64, 64, GRADIENT),
            "sm_80",
            "registers a thread, sm_80 has 255",
        ),
        (
            LARGE._replace(SPLIT_K=9),
            product(64, 64, 500, WEIGHT),
            "sm_90",
            "SPLIT_K is 9, but 500 in steps of 64 fills only 8 parts",
        ),
        (
            AttentionConfig(8, 64, 4, 1),
            heads("attention_forward", 64),
            "sm_80",
            "BLOCK_ROWS is 8, a product needs at least 16",
        ),
        (
            RowConfig(4, 512, 4),
            rows("layer_norm_forward", (8, 768), BF16),
            "sm_90",
            "BLOCK_D is 512, expected whole rows of 768",
        ),
    ],
)
def test_reasons_name_the_numbers(config, request_, arch, reason):
    reasons = why_invalid(config, request_, ARCHS[arch])
    assert any(reason in found for found in reasons), reasons


def test_keys_are_stable_and_tell_requests_apart():
    assert product(8, 16, 32, WEIGHT).key == ("gemm 8x16x32 bfloat16 matrix normalised sums out=float32")
    assert len({request.key for request in REQUESTS}) == len(REQUESTS)


@pytest.fixture
def table():
    """Installs a lookup for the test, which begins without."""
    before = choice._lookup, choice._library
    choice.set_table(None)
    yield choice.set_table
    choice.set_table(*before)


def test_a_wider_bias_is_another_request():
    """Its tile takes more shared memory than was measured to fit."""
    qkv = torch.empty(2, 64, 3, 2, 64, dtype=BF16, device="meta")
    needed, requests = [], []
    for dtype in (BF16, FP32):
        bias = torch.empty(2, 64, 64, dtype=dtype, device="meta")
        with choice.watching(lambda request, _: requests.append(request)), contextlib.suppress(Exception):
            attention.attention_forward(qkv, 0.125, None, bias)
        needed.append(shared_memory(AttentionConfig(128, 64, 8, 1), requests[-1], ARCHS["sm_89"]))
    assert [request.key.split()[3:] for request in requests] == [["bias"], ["bias", "bias=float32"]]
    assert needed[1] - needed[0] == 2 * 128 * 64


def test_a_table_is_asked_once_and_obeyed_where_valid(table, device):
    request, device, asked = product(197, 768, 768), torch.device(device), []
    arch_choice = choice.choose(request, device)
    assert arch_choice == heuristic(request, hardware.current_arch(), hardware.num_sms(device))
    tuned = arch_choice._replace(num_stages=2)

    def lookup(*args):
        asked.append(args)
        return tuned

    table(lookup)
    assert choice.choose(request, device) == choice.choose(request, device) == tuned
    assert asked == [(request, device)]
    for answer in (None, tuned._replace(BLOCK_M=100), RowConfig(1, 1, 1), "nonsense"):
        table(lambda *_, answer=answer: answer)
        assert choice.choose(request, device) == arch_choice
    table(None)
    assert choice.choose(request, device) == arch_choice


def test_a_tensor_on_another_gpu_gets_a_config_for_its_architecture(monkeypatch, table):
    """Whichever GPU is current: there are two, of two kinds."""
    current = 0

    @contextlib.contextmanager
    def on(device):
        nonlocal current
        before, current = current, device.index
        yield
        current = before

    kinds = [ARCHS["sm_90"], ARCHS["sm_80"]]
    driver = AbsentDriver(target_of(kinds[0]))
    driver.get_current_device = lambda: current
    monkeypatch.setattr(choice.triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(choice.hardware, "current_arch", lambda: kinds[current])
    monkeypatch.setattr(choice.hardware, "num_sms", lambda device: kinds[device.index].sms)
    request = product(12608, 768, 768)
    for _ in range(2):  # the second time by what is remembered
        for index, arch in enumerate(kinds):
            assert choice.choose(request, torch.device("cuda", index)) == heuristic(request, arch, arch.sms)
        current = 1 - current
    assert heuristic(request, kinds[0], 132) != heuristic(request, kinds[1], 108)


def test_a_launch_runs_the_tables_config(table, device, triton_backend):
    dy, x = torch.randn(300, 40, device=device), torch.randn(300, 24, device=device)

    def gradient():
        seen = []
        with choice.watching(lambda request, run: seen.append(request)):
            out = gemm.weight_gradient(dy, tiles.MATRIX, tiles.plain(x), 24, FP32)
        assert [request.shape for request in seen] == [(40, 24, 300)]
        return out

    shipped = gradient()
    parts = []
    original = torch.empty

    def counting(*shape, **kwargs):
        parts.append(shape)
        return original(*shape, **kwargs)

    table(lambda request, device: GemmConfig(64, 64, 16, 8, 1, SPLIT_K=5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", counting)
        split = gradient()
    assert (5, 40, 24) in parts
    assert relative_rms(split, dy.double().t() @ x.double()) < 1e-6 and relative_rms(shipped, split) < 1e-6


# What each op launches, forward and backward, in the dtype of the sample.
LAUNCHES = {
    "layer_norm": ["layer_norm_forward", "layer_norm_backward"],
    "layer_norm_linear": ["layer_norm_statistics", "gemm", "gemm", "column_sum", "gemm", "layer_norm_backward"],
    "linear_residual": ["gemm", "gemm", "column_sum", "gemm"],
    "attention": ["attention_forward", "attention_backward_dq", "attention_backward_dkdv"],
    "attention-biased": ["attention_forward", "attention_backward_dq", "attention_backward_dkdv"],
    "patch_embed": ["gemm", "gemm", "gemm", "column_sum"],
    "layer_norm_mlp": [
        *("layer_norm_statistics", "gemm", "gemm"),
        *("gemm", "column_sum", "gemm", "gemm", "column_sum", "gemm", "layer_norm_backward"),
    ],
    "transformer_block": [*["gemm"] * 12, "attention_forward", "attention_backward_dq", "attention_backward_dkdv"],
}


@pytest.mark.parametrize("sample", [sample for sample in SAMPLES if sample.name in LAUNCHES], ids=str)
def test_every_launch_is_shown_and_can_be_repeated(sample, device, triton_backend):
    tensors = sample.tensors(BF16, device)
    shown = []

    def watch(request, run):
        shown.append((request, run))

    with choice.watching(watch):
        results(sample, tensors)
    assert sorted(request.kernel for request, _ in shown) == sorted(LAUNCHES[sample.name])
    assert len({request.key for request, _ in shown}) == len(shown)
    count = len(shown)
    for request, run in shown:
        config = choice.choose(request, torch.device(device))
        first = [tensor.clone() for tensor in run(config)]
        for tensor in run(config):
            tensor.fill_(float("nan"))
        again = run(config)
        assert first and all(map(torch.equal, first, again)), request.key
        for got, want in zip(run(another(config, request)), first, strict=True):
            assert relative_rms(got, want) < 8e-3, request.key
    assert len(shown) == count, "shown outside of the with body"


def another(config, request):
    if isinstance(config, GemmConfig):
        return config._replace(BLOCK_M=32, BLOCK_N=max(32, request.parts.epilogue.columns), BLOCK_K=16)
    if isinstance(config, AttentionConfig):
        return config._replace(BLOCK_ROWS=16, BLOCK_STEP=16)
    return config._replace(BLOCK_ROWS=2 * config.BLOCK_ROWS)


def test_a_launch_repeats_what_the_op_returned(device, triton_backend):
    """run(config) with the chosen config gives the op's own output, bit for bit."""
    x = torch.randn(37, 24, device=device)
    shown = []
    with choice.watching(lambda request, run: shown.append((request, run))):
        mean, rstd = layer_norm.row_statistics(x, 1e-6)
    ((request, run),) = shown
    kept = mean.clone(), rstd.clone()
    mean.zero_(), rstd.zero_()
    written = run(choice.choose(request, torch.device(device)))
    assert written[0] is mean and written[1] is rstd
    assert torch.equal(mean, kept[0]) and torch.equal(rstd, kept[1])


def test_watching_ends_with_its_body(device):
    shown = []

    def launch():
        layer_norm.row_statistics(torch.ones(2, 8, device=device), 1e-6)

    with choice.watching(lambda *_: shown.append("outer")):
        with choice.watching(lambda *_: shown.append("inner")):
            launch()
        launch()
    launch()
    assert shown == ["inner", "outer"]


@pytest.mark.skipif(not interpreting(), reason="a GPU need not hold every candidate of another")
@pytest.mark.parametrize("arch, dtype", [("sm_80", FP32), ("sm_90", BF16)])
def test_every_candidate_is_right(arch, dtype, device, triton_backend):
    """A product with a split sum and attention, both passes, in all configs of their search spaces."""
    dy, x = torch.randn(1100, 70, device=device).to(dtype), torch.randn(1100, 40, device=device).to(dtype)
    qkv = torch.randn(1, 37, 3, 1, 16, device=device).to(dtype)
    shown = []
    with choice.watching(lambda request, run: shown.append((request, run))):
        gemm.weight_gradient(dy, tiles.MATRIX, tiles.plain(x), 40, dtype, wide=True)
        out, lse = attention.attention_forward(qkv, 0.25)
        attention.attention_backward(out, qkv, out, lse, 0.25, False)
    assert len(shown) == 4
    for request, run in shown:
        first, *others = search_space(request, ARCHS[arch], SMS)
        assert others
        truth = [tensor.clone() for tensor in run(first)]
        if request.kernel == "gemm":
            assert relative_rms(truth[0], dy.double().t() @ x.double()) < 1e-6
        for config in others:
            for got, want in zip(run(config), truth, strict=True):
                assert relative_rms(got, want) < (5e-3 if dtype == BF16 else 2e-6), (request.key, config)


# Compiles a few requests in a process that does not interpret, and prints what each takes of shared memory.
COMPILED = """
import json, os
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
import torch, triton
from triton.runtime.jit import JITFunction
from fastvit.kernels import attention, layer_norm_linear
from fastvit.kernels.launch import choice, hardware, request as requests
from fastvit.kernels.launch.absent import target_of, without_gpu
from fastvit.kernels.launch.request import AttentionConfig, GemmConfig
from fastvit.kernels.launch.validity import shared_memory, why_invalid

CASES = [
    ("sm_90", GemmConfig(128, 128, 64, 8, 4)), ("sm_90", GemmConfig(128, 256, 64, 8, 5)),
    ("sm_80", GemmConfig(128, 64, 64, 8, 3)), ("gfx942", GemmConfig(128, 64, 64, 8, 2)),
    ("sm_90", AttentionConfig(64, 64, 4, 3)), ("sm_80", AttentionConfig(64, 32, 4, 3)),
]

def meta(*shape): return torch.empty(shape, dtype=torch.bfloat16, device="meta")
def product():
    x, weight, norm = meta(1576, 768), meta(2304, 768), meta(768)
    y, mean, rstd = layer_norm_linear.layer_norm_linear_forward(x, norm, norm, weight, None, 1e-6)
    layer_norm_linear.layer_norm_linear_backward(y, x, mean, rstd, norm, norm, weight, (True, True, False))
def heads():
    qkv = meta(8, 197, 3, 12, 64)
    out, lse = attention.attention_forward(qkv, 0.125)
    attention.attention_backward(out, qkv, out, lse, 0.125, False)

original, found = JITFunction.run, []
def run(kernel, *args, grid, warmup, **kwargs):
    if wanted:
        found.append(original(kernel, *args, grid=None, warmup=True, **kwargs).metadata.shared)
for name, config in CASES:
    arch = hardware.ARCHS[name]
    with without_gpu(target_of(arch), run, name):
        launches, wanted = {}, False
        with choice.watching(lambda request, launch: launches.update({request: launch})):
            product() if isinstance(config, GemmConfig) else heads()
        wanted = True
        for request, launch in launches.items():
            if requests.CONFIGS[request.kernel] is type(config):
                launch(config)
                needed, limit = shared_memory(config, request, arch), arch.shared_per_block
                refused = any("shared" in reason for reason in why_invalid(config, request, arch))
                print(json.dumps([name, request.key, str(config), found[-1], needed, limit, refused]))
"""


@pytest.mark.slow
def test_shared_memory_is_what_the_compiler_allocates(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 4 * 3 + 2 * 3
    assert {refused for *_, refused in lines} == {True, False}
    for *about, allocated, predicted, limit, refused in lines:
        assert refused == (allocated > limit), about
        # Never too little; what is too much is small beside the limit.
        assert allocated <= predicted <= allocated + 0.15 * limit, (about, allocated, predicted)

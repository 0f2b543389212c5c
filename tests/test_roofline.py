"""The bounds of models, against floors computed elsewhere and independent counts; what the device reaches."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from itertools import cycle

import pytest
import torch
from fastvit.benchmarks import roofline
from fastvit.benchmarks.cases import OPS, Case
from fastvit.benchmarks.schema import Peaks
from fastvit.kernels.launch.cost import Rates
from scripts import run_script
from torch.utils.flop_counter import FlopCounterMode

from fastvit import accuracy, onednn

BF16, FP32 = torch.bfloat16, torch.float32

# ---- Models ----------------------------------------------------------------------------------------------------------

# Milliseconds of the fused block's roofline at 790 TFLOP/s and 3.0 TB/s, bfloat16, from a calculation that shares no
# code with this one: model, batch, inference, training.
FLOORS = [
    ("vit_tiny_patch16_224", 1, 0.01049766, 0.03836134),
    ("vit_tiny_patch16_224", 32, 0.2192026, 0.7764962),
    ("vit_tiny_patch16_224", 256, 1.727264, 6.112879),
    ("vit_small_patch16_224", 1, 0.02802304, 0.1049339),
    ("vit_small_patch16_224", 32, 0.4600478, 1.598585),
    ("vit_small_patch16_224", 256, 3.639095, 12.59876),
    ("vit_base_patch16_224", 1, 0.08430746, 0.3230136),
    ("vit_base_patch16_224", 32, 1.527823, 4.607333),
    ("vit_base_patch16_224", 256, 12.18956, 36.66049),
    ("vit_large_patch16_224", 1, 0.2737265, 1.059846),
    ("vit_large_patch16_224", 32, 5.245315, 15.63266),
    ("vit_large_patch16_224", 256, 41.96252, 125.0613),
    ("vit_huge_patch14_224", 1, 0.5754469, 2.22836),
    ("vit_huge_patch14_224", 32, 14.01296, 41.81432),
    ("vit_huge_patch14_224", 256, 112.1037, 334.5146),
]


@pytest.mark.parametrize("model, batch, inference, training", FLOORS)
def test_floor_of_models(model, batch, inference, training):
    rates = Rates(790e12, 3.0e12)
    for mode, milliseconds in (("inference", inference), ("training", training)):
        floor = 1e3 * roofline.bound(Case(model, BF16, batch, mode), rates)
        assert floor == pytest.approx(milliseconds, rel=0.01)


MODELS = [
    "vit_tiny_patch16_224",
    "vit_base_patch16_224",
    "vit_giant_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "deit_tiny_distilled_patch16_224",
]


# In a process of its own: here fresh memory may be poisoned, which takes memory.
COUNT = """
import json, sys
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastvit import accuracy, onednn
from fastvit import create_model

# Which back end of SDPA runs, and so whether it is counted, depends on the machine.
torch.nn.functional.scaled_dot_product_attention = (
    lambda q, k, v, **options: (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v
)
found = {}
for name in sys.argv[1:]:
    with torch.device("meta"):
        model = create_model(name)
        images = torch.empty(2, 3, *model.config.img_size)
    with FlopCounterMode(display=False) as inference, torch.no_grad():
        model.eval()(images)
    with FlopCounterMode(display=False) as training:
        model.train()(images).sum().backward()
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "token" not in name}
    found[name] = [inference.get_total_flops(), training.get_total_flops(), matrices]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def counted() -> dict[str, list]:
    """Of each of MODELS, for two images: the FLOPs of PyTorch's products in inference and in training, and the sizes
    of its matrices."""
    return json.loads(run_script(COUNT, *MODELS))


@pytest.mark.parametrize("model", MODELS)
def test_flops_of_models(model, counted):
    inference, training, _ = counted[model]
    case = Case(model, BF16, 2)
    assert roofline.case_cost(case).flops == inference
    # PyTorch keeps the scores that the plan makes again.
    again = 2 * 2 * case.tokens**2 * case.config.embed_dim * case.config.depth
    assert roofline.case_cost(dataclasses.replace(case, mode="training")).flops == training + again


@pytest.mark.parametrize("model", MODELS)
def test_weights_of_models(model, counted):
    """Bytes are linear in the batch; what does not grow with it is the weights: read once, and in training read again
    for the gradient of their input, with float32 gradients written."""
    matrices = dict(counted[model][2])
    matrices.pop("pos_embed")
    patches = matrices.pop("patch_embed.proj.weight")
    for dtype in (BF16, FP32):
        size = dtype.itemsize
        for mode, each, of_patches in (("inference", size, size), ("training", 2 * size + 4, size + 4)):
            one, two = (roofline.case_cost(Case(model, dtype, batch, mode)).bytes for batch in (1, 2))
            assert 2 * one - two == each * sum(matrices.values()) + of_patches * patches


def test_bytes_of_activations():
    """A plain block moves 22 tensors of (tokens, embed_dim) in inference and 78 in training, in any dtype."""

    def tensors(model, mode="inference", dtype=BF16):
        one, two = (roofline.model_cost(Case(model, dtype, batch, mode)) for batch in (1, 2))
        case = Case(model, dtype, 1, mode)
        moved = {name: later.bytes - cost.bytes for (name, cost), (_, later) in zip(one, two, strict=True)}
        per_tensor = case.config.depth * case.tokens * case.config.embed_dim * dtype.itemsize
        return sum(moved[name] for name in moved if "head" not in name and "patch" not in name) / per_tensor

    assert tensors("vit_base_patch16_224") == tensors("vit_base_patch16_224", dtype=FP32) == 22
    assert tensors("vit_base_patch16_224", "training") == 78
    # SwiGLU: fc2 reads 8/3 of embed_dim; fc1 makes gate and value, twice that, which training saves.
    assert tensors("vit_giant_patch14_dinov2") == pytest.approx(14 + 2 * 8 / 3)
    assert tensors("vit_giant_patch14_dinov2", "training") == pytest.approx(42 + 14 * 8 / 3)
    assert tensors("vit_small_patch14_reg4_dinov2") == 22


def test_more_tokens_or_images_cost_more():
    for name in ("", *OPS):
        for mode in ("inference", "training"):
            costs = [
                roofline.case_cost(Case("vit_base_patch16_224", BF16, batch, mode, name, size))
                for batch, size in ((1, 224), (8, 224), (8, 384))
            ]
            for less, more in zip(costs, costs[1:], strict=False):
                assert less.bytes < more.bytes and less.flops <= more.flops
            assert costs[1].flops == pytest.approx(8 * costs[0].flops)


# ---- What the device reaches -----------------------------------------------------------------------------------------


def test_rates():
    peaks = Peaks(3e12, {"bf16": 8e14})
    assert roofline.rates(peaks, "bf16") == Rates(8e14, 3e12)
    with pytest.raises(ValueError, match="'fp32'.*bf16"):
        roofline.rates(peaks, "fp32")


def test_peaks_count_what_they_time(monkeypatch):
    counted = []

    def seconds(call):
        with FlopCounterMode(display=False) as counter:
            call()
        counted.append(counter.get_total_flops())
        return [0.5, 0.25, 1e9][len(counted) % 3]  # the median counts

    monkeypatch.setattr(roofline, "_seconds", seconds)
    monkeypatch.setattr(roofline, "_other_products", lambda left, right: [])
    peaks = roofline.measure_peaks("cpu", [FP32])
    assert peaks.flops_per_s == {"fp32": counted[-1] / 0.5}
    assert counted[-1] > 0 and peaks.bytes_per_s == 2 * 2**27 / 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_libraries_multiply_the_same(dtype):
    left, right = torch.randn(48, 64).to(dtype), torch.randn(40, 64).to(dtype)
    calls = roofline._other_products(left, right)
    assert len(calls) == onednn.available(dtype) + bool(importlib.util.find_spec("openvino"))
    for call in calls:
        found = call()
        found = found if isinstance(found, torch.Tensor) else torch.from_numpy(found[0])
        assert accuracy.relative_rms(found, left.double() @ right.double().t()) < 8 * accuracy.floor(dtype)


def test_the_fastest_library_makes_the_peak(monkeypatch):
    monkeypatch.setattr(roofline, "_other_products", lambda left, right: [lambda: "slow", lambda: "fast"])
    took = {"slow": 9.0, "fast": 0.25}
    monkeypatch.setattr(roofline, "_cpu_size", lambda dtype: 256)
    monkeypatch.setattr(roofline, "_median_seconds", lambda call, device: took.get(str(call()), 1.0))
    assert roofline._product_rate(torch.float32, torch.device("cpu")) == 2 * 256**3 / 0.25


def test_on_a_gpu_peaks_are_steady(monkeypatch):
    asked = []
    monkeypatch.setattr(roofline.timing, "steady_seconds", lambda call, device: asked.append(device) or 0.5)
    assert roofline._median_seconds(lambda: None, torch.device("cuda", 1)) == 0.5
    assert asked == [torch.device("cuda", 1)]


def test_a_busy_machine_makes_no_small_ceiling(monkeypatch):
    """It takes a core away for longer than a product of 256 lasts: what that one takes says nothing of larger ones."""
    took = cycle([0.1, 0.016, 0.1])
    monkeypatch.setattr(roofline, "_seconds", lambda call: next(took))
    assert roofline._cpu_size(FP32) == 2048
    monkeypatch.setattr(roofline, "_seconds", lambda call: 0.03)
    assert roofline._cpu_size(FP32) == 256


def test_peaks_of_this_machine():
    peaks = roofline.measure_peaks("cpu", [FP32, BF16])
    assert list(peaks.flops_per_s) == ["fp32", "bf16"]
    for rate in (peaks.bytes_per_s, *peaks.flops_per_s.values()):
        assert 1e7 < rate < 1e16

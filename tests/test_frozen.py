"""Frozen models: each rewrite against the model before it, whole plans against models, bad input, the CPU runtime."""

from __future__ import annotations

import copy
import itertools
import pickle
import resource
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from frozen_models import EXACT, SMALL, VARIANTS, images_of, model_of, outputs_of
from torch import nn

import fastvit
from fastvit import VisionTransformer, ViTConfig, accuracy, dispatch, onednn
from fastvit.frozen import REWRITES, freeze, plan, recognise, simplify
from fastvit.frozen.export import PlainModule
from fastvit.frozen.runtimes import torch_runtime
from fastvit.verify import randomise

# --------------------------------------------------------------------------------------------------------------------
# Rewrites

# Where each rewrite has something to do, and what it must save there: launches, and whether FLOPs.
WHERE = {
    "dead outputs": ("distilled", 1, False),
    "normalisation": ("plain", 1, False),
    "layer scale": ("layer scale", 4, False),
    "norm into linear": ("plain", 0, False),
    "norm into head": ("plain", 0, False),
    "heads averaged": ("distilled", 2, False),
    "softmax scale": ("plain", 0, False),
    "learned query": ("attention pool", 1, True),
    "key bias": ("plain", 0, False),
    "value bias": ("plain", 0, False),
    "position table": ("registers", 0, False),
    "rows read": ("plain", -1, True),
    "fused": ("plain", 6, False),
}


def test_every_rewrite_is_tested():
    assert list(WHERE) == list(REWRITES)


@pytest.mark.parametrize("kind", ["float", "uint8"])
@pytest.mark.parametrize("name", REWRITES)
def test_rewrite_alone_keeps_the_outputs(name, kind):
    """In float64, where nothing hides behind rounding."""
    variant, launches, fewer_flops = WHERE[name]
    model = model_of(variant).double()
    before = recognise.plan_of(model, ["logits"])
    if name != "dead outputs":
        before = REWRITES["dead outputs"].apply(before)
    after = REWRITES[name].apply(before)
    assert (
        after.steps != before.steps
        or after.constants.keys() != before.constants.keys()
        or any(not torch.equal(after.constants[key], before.constants[key]) for key in before.constants)
    )
    images = images_of(model)[kind]
    images = images.double() if kind == "float" else images
    got, want = (each.run(images, torch.float64)["logits"] for each in (after, before))
    assert accuracy.relative_rms(got, want) < (1e-13 if kind == "float" or name != "normalisation" else 1e-6)
    was, now = before.totals(), after.totals()
    assert was[0] - now[0] == launches
    assert (now[1] < was[1]) == fewer_flops


@pytest.mark.parametrize("name", REWRITES)
def test_rewrite_has_a_switch(name):
    variant, _, _ = WHERE[name]
    model = model_of(variant)
    frozen = freeze(model, runtime="torch", without=[name])
    change = next(change for change in frozen.changes if change.name == name)
    assert change == simplify.Change(name, 0, 0, 0, None)
    _, with_it = simplify.simplify(recognise.plan_of(model, ["logits"]), [])
    error = next(change.error for change in with_it if change.name == name)
    assert error is not None and error < EXACT
    images = images_of(model)["float"]
    assert accuracy.relative_rms(frozen(images), outputs_of(model, images)["logits"]) < EXACT


def test_the_docs_have_every_rewrite_with_its_proof():
    page = (Path(__file__).parents[1] / "docs" / "frozen.md").read_text()
    for rewrite in REWRITES.values():
        assert f"| {rewrite.name} | {rewrite.what} | {rewrite.proof} |" in page


def test_rewrites_do_not_touch_the_model():
    model = model_of("layer scale")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    freeze(model, runtime="torch")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_happens_to_the_model_later_does_not_matter(dtype):
    model = model_of("swiglu").to(dtype)
    frozen = freeze(model, output=["logits", "tokens"], runtime="torch")
    images = {batch: torch.randn(batch, 3, 32, 32, dtype=dtype) for batch in (1, 2)}
    before = {batch: frozen(each) for batch, each in images.items()}
    again = freeze(model, output=["logits", "tokens"], runtime="torch")
    for parameter in model.parameters():
        parameter.data.zero_()
    for batch, each in images.items():
        for name in before[batch]:
            assert torch.equal(again(each)[name], before[batch][name])


def test_a_wrong_rewrite_is_found(monkeypatch):
    """The model itself is what a frozen one is held to."""
    wrong = replace(REWRITES["value bias"], apply=lambda plan: _without_bias(plan, "blocks.0.attn.proj"))
    monkeypatch.setitem(REWRITES, "value bias", wrong)
    with pytest.raises(RuntimeError, match="logits is wrong: error"):
        freeze(model_of(), runtime="torch")


def _without_bias(before: plan.Plan, name: str) -> plan.Plan:
    steps = [
        replace(step, constants={"weight": step.constants["weight"]}) if step.out == name else step
        for step in before.steps
    ]
    assert tuple(steps) != before.steps
    return replace(before, steps=tuple(steps))


# --------------------------------------------------------------------------------------------------------------------
# Whole plans


@pytest.mark.parametrize("name", VARIANTS)
def test_frozen_gives_what_the_model_gives(name):
    model = model_of(name)
    for output in ("logits", "features", "tokens", ["tokens", "logits"]):
        frozen = freeze(model, output=output, runtime="torch")
        for images in images_of(model).values():
            want, got = outputs_of(model, images), frozen(images)
            for key, value in (got if isinstance(got, dict) else {output: got}).items():
                assert value.shape == want[key].shape and value.dtype == want[key].dtype
                assert accuracy.relative_rms(value, want[key]) < EXACT, (output, key)
        assert isinstance(got, dict) == isinstance(output, list)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    """Against the truth in float64, as plain PyTorch in the same dtype."""
    model = model_of(num_classes=200)
    frozen = freeze(model, dtype=dtype, output="tokens", runtime="torch")
    images = images_of(model, 8)["float"]
    truth = outputs_of(model_of(num_classes=200).double(), images.double())["tokens"]
    plain = outputs_of(model_of(num_classes=200).to(dtype), images.to(dtype))["tokens"]
    error = accuracy.relative_rms(frozen(images), truth)
    if dtype == torch.float64:
        assert error < 1e-7  # the images were float32's
    else:
        assert error < accuracy.limit(dtype, accuracy.relative_rms(plain, truth))
    assert frozen.dtype == frozen(images).dtype == dtype


@pytest.mark.parametrize("size, policy", [((48, 32), "antialias"), ((40, 64), "bicubic"), ((24, 40), "dinov2")])
def test_other_sizes(size, policy):
    model = model_of("any size", pos_resampling=policy, reg_tokens=1)
    frozen = freeze(model, runtime="torch")
    for images in images_of(model, 2, size).values():
        assert accuracy.relative_rms(frozen(images), outputs_of(model, images)["logits"]) < EXACT


def test_sizes_that_are_filled_up():
    model = model_of("padded")
    frozen = freeze(model, runtime="torch")
    for images in images_of(model, 2, (35, 50)).values():
        assert accuracy.relative_rms(frozen(images), outputs_of(model, images)["logits"]) < EXACT


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batches_and_layouts(batch, layout):
    model = model_of()
    frozen = freeze(model, runtime="torch", batch_sizes=(2,))
    for images in images_of(model, batch).values():
        got = frozen(images.to(memory_format=layout))
        assert accuracy.relative_rms(got, outputs_of(model, images)["logits"]) < EXACT


def test_results_stay_when_it_is_called_again():
    frozen = freeze(model_of(), runtime="torch")
    first = frozen(images := torch.randn(2, 3, 32, 32))
    kept = first.clone()
    frozen(torch.randn(2, 3, 32, 32))
    assert torch.equal(first, kept) and torch.equal(frozen(images), kept)


def test_the_plan_is_readable():
    text = str(freeze(model_of(), runtime="torch").plan)
    lines = text.splitlines()
    first = "patches 16 x 32 = patch_embed(images) centre (128, 128, 128), weight, pixel_weight"
    assert lines[0].split() == first.split()
    assert lines[-1] == "returns logits: head"
    assert len(lines) == 2 + 7 + 10 + 3 + 1
    assert not any("layer_norm" in line and ("weight" in line or "bias" in line) for line in lines)


@pytest.mark.parametrize("name", VARIANTS)
def test_shapes_are_those_of_the_values(name):
    """Before the rewrites and after; of an image of another size, too."""
    model, every = model_of(name), recognise.OUTPUTS
    frozen = [freeze(model, output=output, runtime="torch").plan.dense() for output in (every, "logits")]
    with torch.inference_mode():
        for found in (recognise.plan_of(model, every), *frozen):
            found = found.resized(24, 40) if model.config.dynamic_img_size else found
            values = found.values(torch.randn(2, model.config.in_chans, *found.config.img_size), every=True)
            assert found.shapes(2) == {name: tuple(value.shape) for name, value in values.items()}


def test_only_rows_that_are_read_are_computed():
    frozen = freeze(model_of(), runtime="torch")
    shapes = frozen.plan.shapes(1)
    last = [step.out for step in frozen.plan.steps if step.out.startswith("blocks.1") and shapes[step.out][1] == 17]
    assert last == ["blocks.1.norm1", "blocks.1.attn.qkv.kv"]
    assert [step.out for step in frozen.plan.steps if step.op == "attention"][-1] == "blocks.1.attn[0:1]"


def test_bias_that_moved_is_gone():
    """Of q, k and v only q keeps one, and no step after the first adds a position or a prefix."""
    frozen = freeze(model_of(), runtime="torch")
    constants = frozen.plan.dense().constants
    bias = constants["blocks.0.attn.qkv.bias"]
    assert bias[:32].abs().min() > 0 and not bias[32:].any()
    assert set(frozen.plan.maker("tokens").constants) == {"positions", "pixel_positions"}


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_dinov2"]
)
def test_registry_entries(name):
    check_registry_entry(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", fastvit.list_models())
def test_all_registry_entries(name):
    # Whole giants take 20 GB and two minutes. Towers differ from other models before and after their blocks.
    few = any(word in name for word in ("giant", "clip", "siglip", "dinov3"))
    check_registry_entry(name, **({"depth": 4} if few else {}))


def check_registry_entry(name: str, **changes) -> None:
    """float32 outputs within 5e-6 of the unfrozen model's."""
    model = fastvit.create_model(name, img_size=112 if "dinov2" in name else 224, **changes).eval()
    randomise(model, 0)
    images = torch.randn(1, 3, *model.config.img_size)
    frozen = freeze(model, runtime="torch")
    assert accuracy.relative_rms(frozen(images), outputs_of(model, images)["logits"]) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pixels_of_patch_filters_that_have_a_mean(dtype):
    """Whose products of raw pixels are far larger than what is left when the mean is taken from them."""
    model = model_of(embed_dim=64)
    torch.nn.init.normal_(model.patch_embed.proj.weight, 0.1, 0.05)
    pixels = 110 + torch.randint(36, (4, 3, 32, 32), dtype=torch.uint8)
    truth = outputs_of(model.double(), pixels)["tokens"]
    model = model.to(dtype)
    plain = accuracy.relative_rms(outputs_of(model, pixels)["tokens"], truth)
    got = freeze(model, output="tokens", runtime="torch")(pixels)
    assert accuracy.relative_rms(got, truth) < max(5e-6 if dtype == torch.float32 else 0, 1.5 * plain)


def test_autocast_does_not_reach_in():
    model = model_of()
    images = torch.randn(3, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        frozen = freeze(model, runtime="torch")
        got = frozen(images)
    assert got.dtype == torch.float32
    assert accuracy.relative_rms(got, outputs_of(model, images)["logits"]) < EXACT


def test_another_default_device():
    with torch.device("meta"):
        frozen = freeze(model := model_of_cpu(), runtime="torch")
    images = torch.randn(2, 3, 32, 32)
    assert accuracy.relative_rms(frozen(images), outputs_of(model, images)["logits"]) < EXACT


def model_of_cpu() -> VisionTransformer:
    with torch.device("cpu"):
        return model_of()


def test_copies():
    frozen = freeze(model_of("any size"), runtime="torch", batch_sizes=(2,))
    images = [torch.randn(2, 3, 32, 32), torch.randn(1, 3, 40, 32)]
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert all(torch.equal(other(each), frozen(each)) for each in images)
        assert other.describe() == frozen.describe()


def test_results_may_be_trained_on():
    features = freeze(model_of(), output="features", runtime="torch")(torch.randn(2, 3, 32, 32))
    head = nn.Linear(32, 4)
    head(features).sum().backward()
    assert head.weight.grad is not None and not features.requires_grad


@pytest.mark.filterwarnings("ignore")
def test_not_for_the_compiler():
    frozen = freeze(model_of(), runtime="torch")
    with pytest.raises(Exception, match="a frozen model is not for torch.compile or torch.export"):
        torch.compile(lambda images: frozen(images) * 2, fullgraph=True)(torch.randn(1, 3, 32, 32))


def test_large_weights_have_large_errors_of_their_own():
    """Which are allowed for, in float32 as in 16 bits; one output alone is not held to what many are."""
    model = model_of(depth=12)
    for block in model.blocks:
        block.attn.qkv.weight.data[:64] *= 6
    images = torch.randn(2, 3, 32, 32)
    frozen = freeze(model, runtime="torch")
    truth = outputs_of(copy.deepcopy(model).double(), images.double())["logits"]
    plain = accuracy.relative_rms(outputs_of(model, images)["logits"], truth)
    assert accuracy.relative_rms(frozen(images), truth) < max(5e-6, 4 * plain)
    for seed in range(8):
        one = VisionTransformer(ViTConfig(**{**SMALL, "num_classes": 1})).eval()
        randomise(one, seed)
        freeze(one, runtime="torch")


# --------------------------------------------------------------------------------------------------------------------
# Bad input


def test_models_that_cannot_be_frozen():
    hooked, changed, other, dropping, lost = (model_of() for _ in range(5))
    hooked.blocks[1].mlp.register_forward_hook(lambda *_: None)
    changed.blocks[0].attn.proj = nn.Sequential(nn.Linear(32, 32))
    other.norm = nn.RMSNorm(32)
    dropping.blocks[1].mlp.drop1 = nn.Dropout(0.5).train()
    lost.head.weight.data[3, 2] = float("nan")
    for model, message in (
        (model_of().train(), r"model is in training mode, expected model.eval\(\)"),
        (hooked, "model.blocks.1.mlp has hooks"),
        (changed, "model.blocks.0.attn.proj is a Sequential, which a frozen model has no step for"),
        (other, "model.norm is a RMSNorm"),
        (dropping, "model.blocks.1.mlp.drop1 is active dropout"),
        (lost, "model.head.weight is not finite"),
        (VisionTransformer(ViTConfig(**SMALL), device="meta").eval(), "meta device"),
    ):
        with pytest.raises(ValueError, match=message):
            freeze(model, runtime="torch")
    with pytest.raises(TypeError, match="model is a torch.nn.modules.linear.Linear, expected a fastvit"):
        freeze(nn.Linear(3, 3))


def test_a_subclass_is_not_taken_for_its_parent():
    class Louder(VisionTransformer):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="model is a Louder"):
        freeze(Louder(ViTConfig(**SMALL)).eval())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"output": "classes"}, "output is 'classes', expected one of logits, features, tokens"),
        ({"output": []}, "output is"),
        ({"runtime": "tensorrt"}, "runtime is 'tensorrt', expected 'auto' or one of torch, openvino"),
        ({"batch_sizes": ()}, "batch_sizes is empty"),
        ({"batch_sizes": (0,)}, "batch_sizes is 0, expected a positive integer"),
        ({"batch_sizes": 8}, "batch_sizes is 8, expected a list of positive integers"),
        ({"without": "fused"}, "without is 'fused', expected a list of names"),
        ({"without": ["speed"]}, "without names speed, expected some of dead outputs"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        freeze(model_of(), **arguments)


def test_dtypes_that_are_none():
    with pytest.raises(TypeError, match="dtype is torch.int8"):
        freeze(model_of(), dtype=torch.int8)


@pytest.mark.parametrize(
    "images, error, message",
    [
        ([1], TypeError, "images is a list, expected a torch.Tensor"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int32), TypeError, "images has dtype torch.int32"),
        (torch.zeros(3, 32, 32), ValueError, r"images has shape \(3, 32, 32\), expected \(batch, 3, H, W\)"),
        (torch.zeros(1, 1, 32, 32), ValueError, "expected \\(batch, 3, H, W\\)"),
        (torch.zeros(1, 3, 32, 40), ValueError, "images are 32 x 40, expected 32 x 32"),
        (torch.zeros(1, 3, 32, 32, device="meta"), ValueError, "images is on meta, expected cpu"),
    ],
)
def test_images_that_are_none(images, error, message):
    frozen = freeze(model_of(), runtime="torch")
    with pytest.raises(error, match=message):
        frozen(images)


def test_sizes_that_the_patch_does_not_divide():
    with pytest.raises(ValueError, match="images are 36 x 32, expected multiples of the patch, 8 x 8"):
        freeze(model_of("any size"), runtime="torch")(torch.zeros(1, 3, 36, 32))
    with pytest.raises(ValueError, match="images are 0 x 32, expected at least one patch, 8 x 8"):
        freeze(model_of("any size"), runtime="torch")(torch.zeros(1, 3, 0, 32))


def test_no_images_and_nan():
    model = model_of()
    frozen = freeze(model, output=["logits", "tokens"], runtime="torch")
    none = frozen(torch.zeros(0, 3, 32, 32))
    assert none["logits"].shape == (0, 10) and none["tokens"].shape == (0, 17, 32)
    images = torch.randn(2, 3, 32, 32)
    images[1, 0, 5, 5] = float("nan")
    logits = frozen(images)["logits"]
    assert logits[1].isnan().all() and logits[0].isfinite().all()


# --------------------------------------------------------------------------------------------------------------------
# PyTorch on a CPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_memory_is_taken_from_the_system_after_warming_up(dtype):
    """Minor page faults count what the system had to hand out."""
    model = model_of(embed_dim=192, num_heads=3, img_size=112).to(dtype)
    frozen = freeze(model, runtime="torch")
    images = images_of(model, 4)["float"].to(dtype)
    for _ in range(5):
        frozen(images)

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        frozen(images)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(faults() for _ in range(5)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory(dtype):
    """At most 1.2 times the largest pair of activations that live at once: fc2's input, and its output or residual."""
    if not onednn.available(dtype):
        pytest.skip("PyTorch's own products take more where oneDNN has none of this dtype")
    model = model_of(embed_dim=192, num_heads=3, img_size=112).to(dtype)
    frozen = freeze(model, runtime="torch", batch_sizes=(16,))
    images = images_of(model, 16)["float"].to(dtype)
    frozen(images)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        frozen(images)
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    live = list(itertools.accumulate(size for _, size in sorted(changes)))
    tokens = 16 * 197 * 192 * dtype.itemsize
    assert 4 * tokens <= max(live) <= 1.2 * 5 * tokens * 1.02


def test_weights_are_held_once():
    """As oneDNN reads them, whatever the number of batch sizes; what is saved is what they were."""
    model = model_of()
    frozen = freeze(model, runtime="torch", batch_sizes=(1, 4))
    weights = [frozen.plan.constants[s.constants["weight"]] for s in frozen.plan.steps if s.op == "linear"]
    assert all(weight.is_mkldnn for weight in weights)
    held = {id(call.keywords["weight"]) for run in frozen._prepared.values() for _, _, call, _ in run.calls
            if getattr(call, "func", None) is torch_runtime._linear}  # fmt: skip
    assert held == {id(weight) for weight in weights}


@pytest.mark.parametrize("shape, heads", [((5, 17, 96), 2), ((1, 33, 72), 3), ((7, 4, 12), 1)])
@pytest.mark.parametrize("scratch", [1, 20_000, 8 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_by_products(monkeypatch, shape, heads, scratch, dtype):
    """In pieces of any size: one head, some images with a rest, all."""
    monkeypatch.setattr(torch_runtime, "SCRATCH_BYTES", scratch)
    products = torch_runtime._Products(shape, dtype, heads, 0.3)
    for _ in range(2):
        qkv = torch.randn(shape).to(dtype)
        want = plan.OPERATIONS["attention"](qkv.double(), num_heads=heads, scale=0.3)
        assert accuracy.relative_rms(products(qkv), want) < 8 * accuracy.floor(dtype)


def test_without_onednn(monkeypatch):
    """The same numbers by plain operators."""
    monkeypatch.setattr("fastvit.onednn.available", lambda dtype: False)
    model = model_of()
    frozen = freeze(model, runtime="torch")
    assert not any(tensor.is_mkldnn for tensor in frozen.plan.constants.values())
    for images in images_of(model).values():
        assert accuracy.relative_rms(frozen(images), outputs_of(model, images)["logits"]) < EXACT


def test_threads():
    """Calls from several threads do not disturb each other."""
    model = model_of()
    frozen = freeze(model, runtime="torch")
    images = [torch.randn(batch, 3, 32, 32) for batch in (1, 2, 1, 3, 2, 1)]
    want, got = [frozen(each) for each in images], [None] * len(images)

    def work(i: int) -> None:
        for _ in range(20):
            got[i] = frozen(images[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


# --------------------------------------------------------------------------------------------------------------------
# The kernels, in the interpreter


@pytest.mark.parametrize("name", ["plain", "distilled", "swiglu", "registers", "rotary", "attention pool"])
@pytest.mark.parametrize("kind", ["float", "uint8"])
def test_on_the_kernels(name, kind, device):
    from fastvit.frozen.runtimes.triton_runtime import Program

    model = model_of(name).to(device)
    frozen = freeze(model, runtime="torch")
    images = images_of(model, 2)[kind].to(device)
    program = Program(frozen.plan.dense(), kind == "uint8")
    with fastvit.use_backend("triton"), torch.inference_mode():
        (got,) = program(images)
    assert accuracy.relative_rms(got, outputs_of(model, images)["logits"]) < EXACT
    # A whole block is four: norm and qkv, attention, proj, and norm and MLP.
    first = [out for out, _ in program.calls if out.startswith("blocks.0") and "[" not in out]
    assert len(first) == (6 if name == "swiglu" else 4), first


def test_in_16_bits_angles_stay_in_float32(monkeypatch):
    """In every runtime of PyTorch's and the kernels', as in the model."""
    from fastvit.frozen.runtimes.triton_runtime import Program

    frozen = freeze(model_of("rotary").bfloat16(), runtime="torch")
    images, seen, rotate = torch.randn(1, 3, 32, 32).bfloat16(), [], plan.OPERATIONS["rotate"]

    def watched(qkv, cos, sin, **options):
        seen.append((qkv.dtype, cos.dtype, sin.dtype))
        return rotate(qkv, cos, sin, **options)

    monkeypatch.setitem(plan.OPERATIONS, "rotate", watched)
    dense = frozen.plan.dense()
    for run in (dense.run, torch_runtime.prepare(dense, 1, False), PlainModule(dense, False)):
        before = len(seen)
        run(images)
        assert len(seen) == before + 2

    def note(op, args):
        if op.name == "attention":
            seen.append((args[0].dtype, args[5].dtype, args[6].dtype))

    with dispatch.watching(note), torch.inference_mode():
        Program(dense, False)(images)
    assert len(seen) == 6 + 2 and set(seen) == {(torch.bfloat16, torch.float32, torch.float32)}

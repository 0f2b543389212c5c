"""Frozen models in files, on other runtimes, chosen among them, and made of timm's models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from frozen_models import EXACT, images_of, model_of, outputs_of

import fastvit
from fastvit import accuracy
from fastvit.frozen import RUNTIMES, choice, freeze
from fastvit.frozen.openvino_import import import_openvino, openvino_core
from fastvit.frozen.runtimes import Runtime, torch_runtime
from fastvit.verify import randomise

OTHERS = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx", "onnxscript")}


def need(runtime: str) -> None:
    for package in OTHERS[runtime]:
        pytest.importorskip(package)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing is read from, or left in, the user's own cache."""
    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "frozen.json"


# --------------------------------------------------------------------------------------------------------------------
# Files


def test_saved_and_loaded_in_another_process(tmp_path, dtype=torch.bfloat16):
    pytest.importorskip("safetensors")
    model = model_of("any size")
    frozen = freeze(model, dtype=dtype, output=["features", "logits"], runtime="torch")
    path = tmp_path / "frozen.safetensors"
    frozen.save(path)
    images = {**images_of(model), "large": torch.randn(2, 3, 48, 40)}
    torch.save(images, tmp_path / "images.pt")
    script = (
        "import sys, torch, fastvit\n"
        "frozen = fastvit.load_frozen(sys.argv[1] + '/frozen.safetensors', runtime='torch')\n"
        "images = torch.load(sys.argv[1] + '/images.pt', weights_only=True)\n"
        "torch.save({name: frozen(each) for name, each in images.items()}, sys.argv[1] + '/outputs.pt')\n"
        "assert 'timm' not in sys.modules\n"
        "print(frozen.describe())\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == frozen.describe()
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    for name, each in images.items():
        for key, value in frozen(each).items():
            # The threads of a process, and so the order of sums, are its own.
            assert accuracy.relative_rms(outputs[name][key], value) < 4 * accuracy.floor(dtype)


def test_files_that_are_none(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path, other = tmp_path / "frozen.safetensors", tmp_path / "other.safetensors"
    freeze(model_of(), runtime="torch").save(path)
    data = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="no file"):
        fastvit.load_frozen(tmp_path / "none.safetensors")
    other.write_bytes(data[:-100])
    with pytest.raises(ValueError, match="cut off or no safetensors file"):
        fastvit.load_frozen(other)
    changed = bytearray(data)
    changed[-5] ^= 64
    other.write_bytes(changed)
    with pytest.raises(ValueError, match="damaged: its checksum"):
        fastvit.load_frozen(other)
    other.write_bytes(data.replace(b'\\"op\\": \\"swiglu', b"").replace(b"blocks.0.norm1", b"blocks.0.norm9"))
    with pytest.raises(ValueError, match="damaged: its checksum"):
        fastvit.load_frozen(other)
    safetensors.save_file({"a": torch.zeros(3)}, other)
    with pytest.raises(ValueError, match="holds no frozen model; fastvit.load_checkpoint reads weights"):
        fastvit.load_frozen(other)
    other.write_bytes(data.replace(b'"version":"1"', b'"version":"7"'))
    with pytest.raises(ValueError, match="of version 7, and this fastvit reads 1: freeze the model anew"):
        fastvit.load_frozen(other)
    assert fastvit.load_frozen(path, runtime="torch").plan.steps == freeze(model_of(), runtime="torch").plan.steps


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    path = tmp_path / "frozen.safetensors"
    frozen = freeze(model_of(), runtime="torch")
    frozen.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        frozen.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# --------------------------------------------------------------------------------------------------------------------
# Exports


def exported(frozen, path, images, **how) -> torch.Tensor:
    """What the runtime that reads such a file makes of the images."""
    frozen.export(path, **how)
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    if path.suffix == ".xml":
        network = openvino_core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return torch.from_numpy(network({"images": images.numpy()})["logits"])
    return torch.export.load(path).module()(images)[0]


@pytest.mark.parametrize("suffix", [".onnx", ".xml", ".pt2"])
@pytest.mark.parametrize("kind, batch", [("float", None), ("uint8", 3)])
@pytest.mark.filterwarnings("ignore")
def test_exported(tmp_path, suffix, kind, batch):
    if suffix != ".pt2":
        need({".onnx": "onnxruntime", ".xml": "openvino"}[suffix])
    model = model_of("distilled", depth=1)
    images = images_of(model, 3)[kind]
    got = exported(
        freeze(model, runtime="torch"), tmp_path / f"m{suffix}", images, batch_size=batch, uint8=kind == "uint8"
    )
    assert accuracy.relative_rms(got, outputs_of(model, images)["logits"]) < EXACT
    files = {".onnx": ["m.onnx"], ".xml": ["m.bin", "m.xml"], ".pt2": ["m.pt2"]}
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == files[suffix]


def test_exports_that_are_none(tmp_path):
    frozen = freeze(model_of(), runtime="torch")
    with pytest.raises(ValueError, match=r"m.tflite', expected a name that ends in .onnx, .xml or .pt2"):
        frozen.export(tmp_path / "m.tflite")
    with pytest.raises(ValueError, match="batch_size is 0"):
        frozen.export(tmp_path / "m.onnx", batch_size=0)


# --------------------------------------------------------------------------------------------------------------------
# Runtimes and the choice


@pytest.mark.parametrize("runtime", OTHERS)
@pytest.mark.parametrize("name", ["distilled", "swiglu", "registers"])
@pytest.mark.filterwarnings("ignore")
def test_other_runtimes(runtime, name):
    need(runtime)
    model = model_of(name, depth=1)
    frozen = freeze(model, runtime=runtime, batch_sizes=(2,))
    images = images_of(model, 2)["float"]
    assert frozen.runtime == runtime
    assert accuracy.relative_rms(frozen(images), outputs_of(model, images)["logits"]) < EXACT


@pytest.mark.parametrize("runtime", OTHERS)
@pytest.mark.filterwarnings("ignore")
def test_batches_of_other_runtimes(runtime):
    need(runtime)
    model = model_of(depth=1)
    frozen = freeze(model, runtime=runtime, batch_sizes=(4,))
    for batch, kind in ((3, "float"), (4, "uint8"), (1, "uint8")):  # filled up to 4, 4, and one of its own
        images = images_of(model, batch)[kind]
        got = frozen(images)
        assert got.shape == (batch, 10)
        assert accuracy.relative_rms(got, outputs_of(model, images)["logits"]) < EXACT
    assert {key[1] for key in frozen._prepared} == {4, 1}


def test_a_runtime_that_is_not_there(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"openvino: not installed: openvino; pip install 'fastvit\[openvino\]'"):
        freeze(model_of(), runtime="openvino")


def test_runtimes_for_something_else():
    if RUNTIMES["triton"].packages and not torch.cuda.is_available():
        with pytest.raises(ValueError, match="triton: runs on cuda, not on cpu"):
            freeze(model_of(), runtime="triton")
    need("onnxruntime")
    with pytest.raises(ValueError, match="onnxruntime: takes float32, not bfloat16"):
        freeze(model_of(), dtype=torch.bfloat16, runtime="onnxruntime")


class Fake:
    """In place of one runtime: PyTorch's, but as wrong and as slow as it is told; `prepared` counts. The rest but
    PyTorch's own are not there."""

    def __init__(self, monkeypatch, name: str, factor: float = 1.0, seconds: float = 0.0):
        self.name, self.factor, self.seconds, self.prepared = name, factor, seconds, 0
        for runtime in RUNTIMES.values():
            there = runtime.name in ("torch", name)
            fake = replace(
                runtime, packages=() if there else ("no such package",), dtypes=(torch.float32, torch.float64)
            )
            monkeypatch.setitem(RUNTIMES, runtime.name, fake)
        monkeypatch.setattr(Runtime, "prepare", self.prepare_as)

    @property
    def prepare_as(self):
        def prepare(runtime: Runtime, plan, batch: int, uint8: bool):
            run = torch_runtime.prepare(plan, batch, uint8)
            if runtime.name != self.name:
                return run
            self.prepared += 1

            def changed(images):
                time.sleep(self.seconds)
                return tuple(value * self.factor for value in run(images))

            return changed

        return prepare


def test_the_choice_is_kept_on_disk(monkeypatch, cache):
    fake = Fake(monkeypatch, "onnxruntime", seconds=0.05)
    frozen = freeze(model_of(), batch_sizes=(1, 2))
    assert frozen.runtime == "torch" and fake.prepared == 2 and len(json.loads(cache.read_text())) == 2
    assert "torch: " in frozen.describe() and "images/s, taken" in frozen.describe()
    again = freeze(model_of(), batch_sizes=(1, 2))
    assert again.runtime == "torch" and fake.prepared == 2
    assert again.describe().splitlines()[-8:] == frozen.describe().splitlines()[-8:]
    freeze(model_of(), batch_sizes=(3,))
    freeze(model_of(), dtype=torch.float64)
    freeze(model_of(depth=1))
    assert fake.prepared == 5 and len(json.loads(cache.read_text())) == 5


def test_the_faster_one_is_taken(monkeypatch):
    Fake(monkeypatch, "openvino")
    fast = RUNTIMES["openvino"]
    Fake(monkeypatch, "torch", seconds=0.05)
    monkeypatch.setitem(RUNTIMES, "openvino", fast)
    assert freeze(model_of()).runtime == "openvino"


@pytest.mark.parametrize("factor", [1 + 1e-5, float("nan"), -1.0])
def test_a_wrong_runtime_is_never_taken(monkeypatch, cache, factor):
    Fake(monkeypatch, "openvino", factor=factor)
    frozen = freeze(model_of())
    assert frozen.runtime == "torch"
    assert "  openvino: logits is wrong: error" in frozen.describe()
    with pytest.raises(RuntimeError, match="openvino: logits is wrong: error"):
        freeze(model_of(), runtime="openvino")


def test_an_answer_on_disk_is_checked_too(monkeypatch, cache):
    """What was right when it was measured may not be any more."""
    fake = Fake(monkeypatch, "openvino", seconds=0.02)
    freeze(model_of())
    found = json.loads(cache.read_text())
    for answer in found.values():
        answer["name"] = "openvino"
    cache.write_text(json.dumps(found))
    assert freeze(model_of()).runtime == "openvino" and fake.prepared == 2
    Fake(monkeypatch, "openvino", factor=1.1)
    assert freeze(model_of()).runtime == "torch"


def test_what_is_compiled_later_is_checked_too(monkeypatch):
    """Another batch, another size, pixels: PyTorch takes the place of what is wrong."""
    fake = Fake(monkeypatch, "openvino")
    model = model_of("any size")
    frozen = freeze(model, runtime="openvino", batch_sizes=(2,))
    fake.factor = 1.01
    for images in (torch.randn(1, 3, 32, 32), torch.randn(2, 3, 40, 32), images_of(model, 2)["uint8"]):
        with pytest.warns(UserWarning, match="openvino is not used for batches of .*: logits is wrong: error"):
            got = frozen(images)
        assert accuracy.relative_rms(got, outputs_of(model, images)["logits"]) < EXACT
        assert torch.equal(frozen(images), got)  # without a second warning


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("runtime", OTHERS)
def test_sizes_that_are_filled_up_elsewhere(runtime):
    need(runtime)
    model = model_of("padded", depth=1)
    frozen = freeze(model, runtime=runtime)
    images = images_of(model, 1, (30, 35))["uint8"]
    with torch.autocast("cpu", torch.bfloat16):  # which does not reach in
        got = frozen(images)
    assert accuracy.relative_rms(got, outputs_of(model, images)["logits"]) < EXACT


def test_the_key_tells_models_apart():
    plans = [
        freeze(model_of(img_size=8 * patch, patch_size=2 * patch, in_chans=channels), runtime="torch").plan
        for patch, channels in ((4, 3), (8, 3), (8, 1))
    ]
    keys = {choice._key(plan, 1, torch.device("cpu")) for plan in plans}
    assert len(keys) == 3 and choice._key(plans[0], 2, torch.device("cpu")) not in keys


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": 3}'])
def test_a_damaged_file_of_answers(monkeypatch, cache, text):
    fake = Fake(monkeypatch, "openvino", seconds=0.02)
    cache.parent.mkdir()
    cache.write_text(text)
    assert freeze(model_of()).runtime == "torch" and fake.prepared == 1 and len(json.loads(cache.read_text())) >= 1


def test_answers_of_another_form(monkeypatch, cache):
    fake = Fake(monkeypatch, "openvino", seconds=0.02)
    freeze(model_of())
    for value in (None, 3, {}, {"name": "other", "lines": []}, {"name": "torch", "lines": "no"}):
        cache.write_text(json.dumps(dict.fromkeys(json.loads(cache.read_text()), value)))
        before = fake.prepared
        assert freeze(model_of()).runtime == "torch" and fake.prepared == before + 1


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path / "file" / "cache"))
    Fake(monkeypatch, "openvino", seconds=0.02)
    with pytest.warns(UserWarning, match="could not be written, the runtime will be measured again"):
        assert freeze(model_of()).runtime == "torch"


def test_the_nearest_batch_size_decides(monkeypatch):
    frozen = freeze(model_of(), runtime="torch", batch_sizes=(2, 32))
    frozen._answers = {2: choice.Answer("a", ()), 32: choice.Answer("b", ())}
    assert [frozen._answer(batch).name for batch in (1, 2, 16, 18, 100)] == ["a", "a", "a", "b", "b"]
    assert [frozen._padded("openvino", batch) for batch in (1, 2, 3, 16, 17, 31, 33)] == [1, 2, 3, 16, 32, 32, 33]
    assert [frozen._padded("triton", batch) for batch in (1, 2, 3, 5, 17, 33)] == [1, 2, 4, 8, 32, 64]
    assert frozen._padded("torch", 31) == 31


# --------------------------------------------------------------------------------------------------------------------
# timm's models

TIMM = {
    "plain": {},
    "one channel": {"in_chans": 1},
    "CLIP's": {"pre_norm": True, "norm_layer": "layernorm", "act_layer": "quick_gelu"},
    "SigLIP's": {"global_pool": "map", "class_token": False, "act_layer": "gelu_tanh"},
    "average": {"global_pool": "avg"},
    "layer scale": {"init_values": 0.1},
    "registers": {"reg_tokens": 2, "no_embed_class": True},
    "no qkv bias": {"qkv_bias": False},
    "any size": {"dynamic_img_size": True},
    "tanh gelu": {"act_layer": "gelu_tanh"},
    "quick gelu": {"act_layer": "quick_gelu"},
    "headless": {"num_classes": 0},
}
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}


def timm_model(**arguments):
    pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(**{**SIZES, **arguments}).eval()
    randomise(model, 0)
    return model


@pytest.mark.parametrize("name", TIMM)
def test_models_of_timm(name):
    model = timm_model(**TIMM[name])
    frozen = freeze(model, output=["logits", "tokens"], runtime="torch")
    images = torch.randn(2, frozen.config.in_chans, 32, 32)
    with torch.inference_mode():
        want = {"logits": model(images), "tokens": model.forward_features(images)}
    for key, value in frozen(images).items():
        assert accuracy.relative_rms(value, want[key]) < EXACT


def test_other_models_of_timm():
    pytest.importorskip("timm")
    from timm.layers import SwiGLUPacked
    from timm.models.deit import VisionTransformerDistilled

    distilled = VisionTransformerDistilled(**SIZES).eval()
    randomise(distilled, 0)
    for model in (distilled, timm_model(mlp_layer=SwiGLUPacked, act_layer="silu")):
        images = torch.randn(2, 3, 32, 32)
        with torch.inference_mode():
            assert accuracy.relative_rms(freeze(model, runtime="torch")(images), model(images)) < EXACT


def test_a_timm_model_keeps_its_preparation():
    timm = pytest.importorskip("timm")
    model = timm.create_model("deit_tiny_patch16_224").eval()
    frozen = freeze(model, runtime="torch")
    assert frozen.config.mean == model.pretrained_cfg["mean"] and frozen.config.std == model.pretrained_cfg["std"]
    pixels = torch.randint(256, (1, 3, 224, 224), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (frozen.config.mean, frozen.config.std))
    with torch.inference_mode():
        assert accuracy.relative_rms(frozen(pixels), model((pixels / 255 - mean) / std)) < 5e-6


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"qk_norm": True}, "model.blocks.0.attn.q_norm is a LayerNorm"),
        ({"global_pool": "prr"}, "attn_pool is a AttentionPoolPrr"),
        ({"act_layer": "relu"}, "act is a ReLU"),
    ],
)
def test_models_of_timm_that_do_something_else(arguments, message):
    with pytest.raises(ValueError, match=f"{message}.*which a frozen model has no step for"):
        freeze(timm_model(**arguments))


def test_models_of_timm_as_they_must_not_be():
    with pytest.raises(ValueError, match=r"training mode, expected model.eval\(\)"):
        freeze(timm_model().train())
    model = timm_model()
    model.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="model.blocks.1 has hooks"):
        freeze(model)
    timm = pytest.importorskip("timm")
    with pytest.raises(TypeError, match="ResNet, expected a fastvit.VisionTransformer, or one of timm"):
        freeze(timm.create_model("resnet10t").eval())


def test_openvino_reports_nothing_to_anyone(tmp_path):
    """Its telemetry would, at each import and conversion, from processes forked off ours."""
    need("openvino")
    script = """
import multiprocessing, os, sys
import fastvit
os.fork = multiprocessing.Process.start = lambda *_: sys.exit("forked")
model = fastvit.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=1, num_heads=3).eval()
frozen = fastvit.freeze(model, runtime="openvino")
frozen.export("model.xml")
assert "openvino" in sys.modules and "openvino_telemetry" not in sys.modules
"""
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    assert not (tmp_path / "intel").exists()


def test_a_signal_after_openvino(tmp_path):
    """Its Cores leave the thread no stack for signals where two end in the order of their making."""
    need("openvino")
    script = """
import os, signal
import torch, fastvit
model = fastvit.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=1, num_heads=3).eval()
kept = [fastvit.freeze(model, runtime="openvino", batch_sizes=(size,)) for size in (1, 2)]
images = torch.zeros(1, 3, 32, 32)
for size in (1, 2):
    kept[0](images.expand(size, -1, -1, -1))
    del kept[0]
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""
    said = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, text=True, stdout=subprocess.PIPE, check=True)
    assert said.stdout == "interrupted\n"


def test_processes_that_share_a_machine_are_not_pinned_to_the_same_cores(monkeypatch):
    """OpenVINO's threads, where a process has fewer than there are cores: its first ones would be everyone's."""
    need("openvino")
    openvino = import_openvino()
    asked, compile_model = [], openvino.Core.compile_model

    def watched(core, model, device, properties):
        asked.append(properties)
        return compile_model(core, model, device, properties)

    monkeypatch.setattr(openvino.Core, "compile_model", watched)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(torch.get_num_threads() + 1))
    freeze(model_of(), runtime="openvino", batch_sizes=(1,))
    assert asked[-1]["ENABLE_CPU_PINNING"] is False and asked[-1]["INFERENCE_NUM_THREADS"] == torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(torch.get_num_threads()))
    freeze(model_of(), runtime="openvino", batch_sizes=(1,))
    assert asked[-1]["ENABLE_CPU_PINNING"] is True

"""Stories of users who know timm and PyTorch and have read the README: whole tasks across parts of the package, by the
real command line where a command is meant, against timm's model of the same weights."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastvit.benchmarks import schema
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune

import fastvit
from fastvit import dispatch

timm = pytest.importorskip("timm")
pytest.importorskip("timm.optim")
pytest.importorskip("timm.utils")
Image = pytest.importorskip("PIL.Image")

ROOT = Path(__file__).parent.parent
PHOTOS = ROOT / "benchmarks" / "photos"
RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "bench.json"
NAME = "vit_tiny_patch16_224"
BACKENDS = ["torch", "triton"] if dispatch.interpreting() else ["torch"]
on_kernels = pytest.mark.skipif(not dispatch.interpreting(), reason="on CPU tensors kernels need the interpreter")
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}


def randomised(model):
    """`model` in evaluation, with weights far from their start, so that nothing is small by chance."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def pair(name=NAME, **overrides):
    """Our model and timm's, small, of the same weights, in evaluation."""
    arguments = {**SMALL, **overrides}
    peer = randomised(timm.create_model(name, **arguments))
    model = fastvit.create_model(name, **arguments).eval()
    model.load_state_dict(peer.state_dict())
    return model, peer


def close(got, want, rtol=1e-3, atol=1e-4):
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """ "auto" takes the kernels for tensors on the CPU too, as it does for those on a GPU."""
    monkeypatch.setattr(dispatch, "torch_without_question", lambda device_type: None)


# The command line.


def fastvit_command(*arguments, **environment) -> dict:
    """What subprocess takes to run the command."""
    kept = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "FASTVIT_BACKEND")}
    command = [sys.executable, "-m", "fastvit", *map(str, arguments)]
    return {"args": command, "cwd": ROOT, "env": {**kept, "OMP_NUM_THREADS": "1", **environment}}


def run(*arguments, **environment):
    """A finished command, whose stderr never has a traceback."""
    done = subprocess.run(**fastvit_command(*arguments, **environment), capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def strict_json(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """timm's model for images of 32 x 32, and what timm's training script would have saved of it: a file with the
    arguments and with averaged weights, which are the model's; the others are not."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    averaged, raw = (timm.create_model(NAME, img_size=32) for _ in range(2))
    with torch.no_grad():
        averaged.head.weight.normal_(std=0.2)
    optimizer = timm.optim.create_optimizer_v2(raw, opt="adamw", lr=1e-3)
    arguments = argparse.Namespace(model=NAME, lr=1e-3, amp_dtype=torch.bfloat16, data_dir=Path("/data"))
    saver = timm.utils.CheckpointSaver(
        raw, optimizer, args=arguments, model_ema=averaged, checkpoint_dir=folder, recovery_dir=folder
    )
    saver.save_checkpoint(3, metric=np.float64(71.5))
    return averaged.eval(), folder / "last.pth.tar"


def small_images(trained):
    return ["--device", "cpu", "--model", NAME, "--checkpoint", trained[1], "--img-size", "32"]


def by_timm(model, path):
    """One photograph as timm's own scripts prepare it for our model."""
    ours = fastvit.create_model(NAME, img_size=32, device="meta")
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=ours))
    with torch.inference_mode():
        return model(transform(Image.open(path).convert("RGB"))[None])[0]


def test_classify_with_the_checkpoint_of_a_training_script(trained, tmp_path):
    """The file is read without running code, and prepared and classified as in timm."""
    paths = [shutil.copy(PHOTOS / "chelsea.jpg", tmp_path / "my cat, große Ansicht.jpg"), PHOTOS / "coffee.jpg"]
    done = run("classify", *paths, "--json", *small_images(trained))
    assert (done.returncode, done.stderr) == (0, "")
    for path, found in zip(paths, strict_json(done.stdout), strict=True):
        want = by_timm(trained[0], path).softmax(-1).topk(5)
        assert found["image"] == str(path)
        assert [entry["class"] for entry in found["top5"]] == want.indices.tolist()
        got = [entry["probability"] for entry in found["top5"]]
        assert got == pytest.approx(want.values.tolist(), rel=1e-2)


def photos_of_a_user(folder: Path) -> None:
    """A few photographs under odd names among many small ones, a broken one, and one of a camera's own format."""
    (folder / "über uns").mkdir(parents=True)
    shutil.copy(PHOTOS / "chelsea.jpg", folder / "0 first.JPG")
    shutil.copy(PHOTOS / "coffee.jpg", folder / "über uns" / "c a f é.jpeg")
    Image.open(PHOTOS / "rocket.jpg").convert("CMYK").save(folder / "0 print.jpg")
    random = np.random.default_rng(0)
    for i in range(500):
        pixels = random.integers(0, 256, (33, 35, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    for i in (60, 120):
        (folder / f"{i:03}.png").write_bytes(b"no image")
    (folder / "IMG_1.CR2").write_bytes(b"II*\0")


def interrupt_at(name, command):
    """Run a command, press Ctrl-C when it skips the image `name`, and return what it said."""
    with subprocess.Popen(**command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("skipped ") and name in line:
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130, said
    assert "Traceback" not in "".join(said)
    return "".join(said)


def kept(path: Path) -> list[str]:
    with np.load(path, allow_pickle=False) as file:
        return file["files"].tolist()


def test_embed_a_folder_that_changes_between_interruptions(trained, tmp_path):
    """Ctrl-C twice, an image overwritten, one deleted, one more; then every row is of timm's features."""
    folder, output, partial = tmp_path / "my photos", tmp_path / "f.npz", tmp_path / "f.npz.partial"
    photos_of_a_user(folder)
    command = ["embed", folder, "-o", output, "--batch-size", "4", *small_images(trained)]

    said = interrupt_at("060.png", fastvit_command(*command))
    assert "images are kept in" in said
    first = kept(partial)
    assert {"0 first.JPG", "0 print.jpg", "005.png"} <= set(first)

    Image.new("RGB", (40, 40), "red").save(folder / "005.png")
    (folder / "006.png").unlink()
    shutil.copy(PHOTOS / "camera.jpg", folder / "0 new.jpg")
    said = interrupt_at("120.png", fastvit_command(*command))
    assert "2 rows" in said and f"{len(first) - 2} of 504 images are done" in said
    second = kept(partial)
    assert set(second) > set(first) - {"006.png"}

    done = run(*command)
    assert done.returncode == 1, "images were skipped"
    assert "IMG_1.CR2: .cr2 is not read by Pillow" in done.stderr
    assert done.stdout == f"501 images, 3 skipped: {output}\n"
    assert f"{len(second)} of 504 images are done" in done.stderr
    assert not partial.exists()
    names = kept(output)
    assert len(set(names)) == 501 and "006.png" not in names and "über uns/c a f é.jpeg" in names
    with np.load(output, allow_pickle=False) as file:
        rows = dict(zip(names, file["features"], strict=True))
    peer = copy.deepcopy(trained[0])
    peer.reset_classifier(0)
    for name in ("0 first.JPG", "0 print.jpg", "0 new.jpg", "über uns/c a f é.jpeg", *names[4:40], "499.png"):
        np.testing.assert_allclose(rows[name], by_timm(peer, folder / name), rtol=1e-2, atol=1e-3, err_msg=name)


def test_a_diverged_model_is_found_out(trained, tmp_path):
    """No "nan%", no JSON that is none, no exit status 0."""
    state = trained[0].state_dict()
    state["blocks.3.mlp.fc1.bias"] = torch.full_like(state["blocks.3.mlp.fc1.bias"], math.nan)
    torch.save({"state_dict": state}, tmp_path / "diverged.pth")
    arguments = small_images((None, tmp_path / "diverged.pth"))
    done = run("classify", PHOTOS / "chelsea.jpg", "--json", *arguments)
    assert done.returncode == 1 and strict_json(done.stdout) == []
    assert all(word in done.stderr for word in ("chelsea.jpg", "not finite", "diverged.pth", "blocks.3.mlp.fc1.bias"))
    done = run("embed", PHOTOS, "-o", tmp_path / "f.npz", *arguments)
    assert done.returncode == 1 and "nothing written" in done.stderr
    assert not list(tmp_path.glob("f.npz*"))


def results_with(path: Path, change) -> Path:
    """The shipped results with the times of each entry multiplied by change(its name)."""
    run = json.loads(RESULTS.read_text())
    for row in run["rows"]:
        for name, side in row["entries"].items():
            if side["seconds"]:
                side["seconds"] |= {key: side["seconds"][key] * change(name) for key in ("median", "q25", "q75")}
    path.write_text(json.dumps(run))
    return path


@pytest.mark.parametrize(
    "factors, status, text",
    [
        ({"timm": 0.18, "torchvision": 4.7, "ours": 0.5}, 2, "cannot be compared: timm took 0.18 times"),
        ({"ours": 1.5}, 1, "slower"),
    ],
)
def test_compare_with_last_weeks_bench(factors, status, text, tmp_path):
    """Peers that moved against each other leave nothing to conclude."""
    after = results_with(tmp_path / "after.json", lambda name: factors.get(name, 1.0))
    done = run("bench", "compare", RESULTS, after)
    assert done.returncode == status
    last = done.stdout.splitlines()[-1]
    assert text in last, done.stdout
    assert ("faster" in last) == (status == 0)


def test_bench_shows_the_interval_of_each_verdict(tmp_path):
    command = ["bench", "--device", "cpu", "--models", NAME, "--img-sizes", "32", "--batches", "1", "--dtypes", "fp32"]
    command += ["--modes", "inference", "--peers", "timm,transformers", "--seconds", "0.05", "-o", tmp_path]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    (row,) = schema.load(tmp_path / "bench.json").rows
    ratios = {name: side for name, side in row.entries.items() if side.ratio}
    assert "timm" in ratios
    for name, side in ratios.items():
        low, high = side.ratio.low, side.ratio.high
        assert side.verdict == ("faster" if low > 1 else "slower" if high < 1 else "tie")
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(f"  {name} "))
        assert f"[{low:.2f} {high:.2f}]" in line and ("tie" in line) == (side.verdict == "tie")


def test_mistakes_at_the_command_line_exit_with_2(trained, tmp_path):
    shutil.copy(PHOTOS / "chelsea.jpg", tmp_path)
    model = small_images(trained)
    for arguments, text in (
        (["embed", tmp_path / "absent", "-o", tmp_path / "f.npz", *model], "absent: no such folder"),
        (["classify", tmp_path / "chelsea.jpg", *model[:5], tmp_path / "w.pth"], "no checkpoint at"),
        (["classify", tmp_path / "chelsea.jpg", *model[:-1], "225"], "img_size is (225, 225)"),
        (["attention", tmp_path / "chelsea.jpg", "-o", tmp_path / "m.csv", *model], "unknown format '.csv'"),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert text in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_see_where_a_model_looks(trained, tmp_path):
    """The picture shows the maps that timm's own attention would give, brightest where they are largest."""
    done = run("attention", PHOTOS / "chelsea.jpg", "-o", tmp_path / "map.png", *small_images(trained), "--block", "2")
    assert done.returncode == 0 and str(tmp_path / "map.png") in done.stdout, done.stderr
    with Image.open(tmp_path / "map.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100

    peer, seen = copy.deepcopy(trained[0]), []
    for block in peer.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, arguments, output: seen.append(output.detach()))
    model = fastvit.create_model(NAME, img_size=32, checkpoint=trained[1])
    images = torch.randn(2, 3, 32, 32)
    maps = fastvit.attention_maps(model, images)
    peer(images)
    close(maps, seen)


def test_a_service_that_has_closed_its_output(trained):
    command = fastvit_command("classify", PHOTOS / "chelsea.jpg", *small_images(trained), "--json")
    command["args"] = ["sh", "-c", 'exec "$@" >&-', "sh", *command["args"]]
    done = subprocess.run(**command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_terminal_that_is_ascii(trained, tmp_path):
    names = [shutil.copy(PHOTOS / "chelsea.jpg", tmp_path / name) for name in ("katze für oma.jpg", "z.jpg")]
    done = run("classify", *names, *small_images(trained), PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "katze f\\xfcr oma.jpg" in done.stdout and "z.jpg" in done.stdout


def test_a_pipe_among_the_photos(trained, tmp_path):
    """Nothing is ever read from it, and no command waits for it."""
    shutil.copy(PHOTOS / "chelsea.jpg", tmp_path)
    os.mkfifo(tmp_path / "pipe.jpg")
    command = fastvit_command("embed", tmp_path, "-o", tmp_path / "f.npz", *small_images(trained))
    done = subprocess.run(**command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, f"skipped {tmp_path / 'pipe.jpg'}: no regular file\n")
    assert kept(tmp_path / "f.npz") == ["chelsea.jpg"]


def test_the_interpreter_by_its_environment_variable(trained):
    """What the error under FASTVIT_BACKEND=triton says is missing, TRITON_INTERPRET, is enough."""
    arguments = ["classify", PHOTOS / "chelsea.jpg", *small_images(trained), "--json"]
    done = run(*arguments, FASTVIT_BACKEND="triton")
    assert done.returncode != 0 and "TRITON_INTERPRET is not set" in done.stderr
    done = run(*arguments, FASTVIT_BACKEND="triton", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    want = by_timm(trained[0], PHOTOS / "chelsea.jpg").argmax()
    assert strict_json(done.stdout)[0]["top5"][0]["class"] == want


# Training.


def fine_tune(model, images, labels, steps=3):
    """What timm's training script does: layer-wise learning rates, accumulation, clipping, averaged weights."""
    torch.manual_seed(1)
    model.train()
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    average, losses = timm.utils.ModelEmaV3(model, decay=0.9), []
    for _ in range(steps):
        for half in (slice(0, 2), slice(2, None)):
            loss = F.cross_entropy(model(images[half]), labels[half], label_smoothing=0.1) / 2
            loss.backward()
            losses.append(loss.item())
        timm.utils.dispatch_clip_grad(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(model)
    groups = [(group["lr_scale"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    return losses, groups, average.module.eval()


@pytest.mark.parametrize(
    "name, overrides",
    [
        (NAME, {"drop_path_rate": 0.2, "global_pool": "avg"}),
        ("vit_small_patch14_reg4_dinov2", {"proj_drop_rate": 0.1, "patch_drop_rate": 0.3}),
    ],
)
def test_fine_tuning_goes_as_with_timm(name, overrides, images):
    model, peer = pair(name, **overrides)
    labels = torch.tensor([1, 4, 0])
    for each in (model, peer):
        each.reset_classifier(5)
    model.load_state_dict(peer.state_dict())
    results = [fine_tune(each, images, labels) for each in (model, peer)]
    close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    close(results[0][2](images), results[1][2](images), rtol=1e-2, atol=1e-2)


class LoRA(nn.Module):
    """A linear layer with a trained product of low rank beside it (arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_prompts_and_pruning_on_frozen_weights(backend, images):
    """Layers are replaced, hooked and reparametrised after loading, as peft and prompt tuning do."""
    results = []
    for model in pair():
        torch.manual_seed(2)
        model.requires_grad_(False)
        model.blocks[0].attn.qkv = LoRA(model.blocks[0].attn.qkv)
        model.blocks[1].mlp.fc2 = LoRA(model.blocks[1].mlp.fc2)
        prune.random_unstructured(model.blocks[0].mlp.fc1, "weight", 0.5)
        prompts = nn.Parameter(torch.randn(1, 4, 48))

        def prepend(module, arguments, prompts=prompts):
            return (torch.cat([arguments[0][:, :1], prompts.expand(3, -1, -1), arguments[0][:, 1:]], 1),)

        model.blocks[1].register_forward_pre_hook(prepend)
        with fastvit.use_backend(backend):
            logits = model(images)
            logits.square().mean().backward()
        results.append((logits, prompts.grad, gradients(model)))
    close(*results)
    assert results[0][2].keys() >= {"blocks.0.attn.qkv.up.weight", "blocks.1.mlp.fc2.down.weight"}


class Segmenter(nn.Module):
    def __init__(self, library):
        super().__init__()
        arguments = {name: value for name, value in SMALL.items() if name != "num_classes"}
        self.backbone = library.create_model(
            NAME, features_only=True, out_indices=(0, 1), dynamic_img_size=True, **arguments
        )
        self.head = nn.Conv2d(sum(self.backbone.feature_info.channels()), 4, 1)

    def forward(self, x):
        return F.interpolate(self.head(torch.cat(self.backbone(x), 1)), x.shape[-2:], mode="bilinear")


def test_a_segmenter_of_images_of_every_size():
    peer, model = randomised(Segmenter(timm)), Segmenter(fastvit)
    model.load_state_dict(peer.state_dict())
    for size in ((32, 32), (48, 24), (16, 56)):
        images, labels = torch.randn(2, 3, *size), torch.randint(4, (2, *size))
        results = []
        for each in (model, peer):
            each.zero_grad()
            logits = each(images)
            F.cross_entropy(logits, labels).backward()
            results.append((logits, gradients(each)))
        close(*results)
    for each in (model, peer):
        each.backbone.model.set_input_size(64)
    images = torch.randn(1, 3, 64, 64)
    close(model(images), peer(images))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_and_causal_sequences(backend, images):
    model, peer = pair(depth=1)
    padding = (torch.arange(17) < torch.tensor([9, 17, 4])[:, None])[:, None, None]
    with fastvit.use_backend(backend):
        for mask in ({"attn_mask": padding}, {"attn_mask": torch.randn(3, 17, 17)}, {"is_causal": True}):
            results = []
            for each in (model, peer):
                each.zero_grad()
                logits = each(images, **mask)
                logits.square().mean().backward()
                results.append((logits, gradients(each)))
            close(*results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (6,), (6, 1), (6, 6), (2, 1, 6), (3, 2, 6, 6), (3, 1, 1, 6)])
def test_a_position_bias_of_any_shape(shape, backend):
    """Each shape that broadcasts, with its gradient, as in scaled_dot_product_attention."""
    qkv = torch.randn(3, 6, 3, 2, 8, requires_grad=True)
    bias = torch.randn(shape, requires_grad=True)
    upstream = torch.randn(3, 6, 16)
    with fastvit.use_backend(backend):
        out = fastvit.ops.attention(qkv, attn_bias=bias)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    want = F.scaled_dot_product_attention(q, k, v, bias.expand(3, 2, 6, 6)).transpose(1, 2).flatten(2)
    close(out, want)
    close(*(torch.autograd.grad(y, [qkv, bias], upstream) for y in (out, want)))


# The kernels under what PyTorch does with a model.


@on_kernels
@pytest.mark.usefixtures("triton_backend")
def test_threads_of_a_service_share_a_model(images):
    """No false fault, no mixed-up answer."""
    model, peer = pair()

    def answer(image):
        with torch.inference_mode():
            return model(image[None])[0]

    with ThreadPoolExecutor(3) as pool:
        close(torch.stack(list(pool.map(answer, images))), peer(images))


@on_kernels
@pytest.mark.usefixtures("as_on_a_gpu")
def test_gradients_of_each_sample_and_an_ensemble(images):
    """torch.func, where an ordinary call of the same model takes the kernels."""
    from torch.func import functional_call, grad, jvp, stack_module_state, vmap

    model, peer = pair()
    labels = torch.tensor([1, 4, 0])
    norm = model.norm
    assert fastvit.explain("layer_norm", torch.randn(2, 48), norm.weight, norm.bias).backend == "triton"

    def loss(parameters, image, label):
        return F.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    for i in range(3):
        peer.zero_grad()
        F.cross_entropy(peer(images[i : i + 1]), labels[i : i + 1]).backward()
        close({name: value[i] for name, value in found.items()}, gradients(peer))

    others = [pair() for _ in range(2)]
    stacked = stack_module_state([ours for ours, _ in others])
    outputs = vmap(lambda state: functional_call(model, state, (images,)))(stacked)
    close(outputs, torch.stack([theirs(images) for _, theirs in others]))

    step = 1e-3 * torch.randn_like(images)
    value, change = jvp(model, (images,), (step,))
    close(value + change, peer(images + step), atol=1e-3)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_gradient_penalty(backend, images):
    """Second derivatives, on every back end. PyTorch's fused attention has none: it is told to take another."""
    model, peer = pair()
    results = []
    with fastvit.use_backend(backend), sdpa_kernel(SDPBackend.MATH):
        for each in (model, peer):
            leaf = images.clone().requires_grad_()
            (slope,) = torch.autograd.grad(each(leaf).sum(), leaf, create_graph=True)
            slope.square().mean().backward()
            results.append((leaf.grad, each.blocks[0].attn.qkv.weight.grad))
    close(*results)


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing", "ignore::DeprecationWarning")
def test_features_of_a_timm_model_with_our_blocks(images):
    """torch.fx sees into them; scripting says in one sentence what to do."""
    arguments = {**SMALL, "drop_path_rate": 0.1}
    peer = randomised(timm.create_model("deit3_small_patch16_224", **arguments))
    model = timm.create_model("deit3_small_patch16_224", block_fn=fastvit.nn.Block, **arguments).eval()
    model.load_state_dict(peer.state_dict())
    nodes = ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.mlp.fc1", "blocks.1", "head"]
    got, want = (timm.models.create_feature_extractor(each, nodes)(images) for each in (model, peer))
    close(got, want)
    with pytest.raises(RuntimeError, match="torch.jit.script cannot compile fastvit.nn.Block, .* use torch.compile"):
        torch.jit.script(model)


@pytest.mark.parametrize("backend", BACKENDS)
def test_black_borders_under_a_tiny_eps(backend):
    """Tokens without any variance are the bias, with transformers' 1e-12 too."""
    norm = randomised(nn.LayerNorm(48, eps=1e-12))
    x = torch.randn(2, 5, 48)
    x[0, 2], x[1] = 0.1, 3e3
    with fastvit.use_backend(backend):
        out = fastvit.ops.layer_norm(x, norm.weight, norm.bias, norm.eps)
    assert torch.equal(out[0, 2], norm.bias) and torch.equal(out[1], norm.bias.expand(5, -1))
    close(out, norm(x))


@on_kernels
@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "every other"])
def test_half_precision_is_as_accurate_in_every_layout(layout):
    """A bfloat16 block's output and gradient against float64, beside timm's block in bfloat16."""
    block = randomised(fastvit.nn.Block(64, 2, qkv_bias=True))
    peer = timm.models.vision_transformer.Block(64, 2, qkv_bias=True).eval()
    peer.load_state_dict(block.state_dict())
    x = torch.randn(2, 40, 64).bfloat16()
    laid_out = {
        "contiguous": x,
        "channels last": x.reshape(2, 5, 8, 64).permute(0, 3, 1, 2).flatten(2).transpose(1, 2),
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "every other": torch.stack([x, -x], 2).flatten(1, 2)[:, ::2],
    }[layout]
    assert torch.equal(laid_out, x)

    def result(module, x):
        x = x.detach().requires_grad_()
        out = module(x)
        return out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])

    truth = result(copy.deepcopy(peer).double(), x.double())
    ours, theirs = (result(module.bfloat16(), laid_out) for module in (block, peer))
    for got, other, true in zip(ours, theirs, truth, strict=True):
        error, bar = ((value.double() - true).norm() / true.norm() for value in (got, other))
        assert error <= 1.5 * bar


def test_what_auto_takes_on_a_gpu(monkeypatch):
    """Asked with tensors that only claim to be on one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    properties = types.SimpleNamespace(major=9, minor=0, name="Imaginary GPU", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setenv("FASTVIT_TUNING", "off")

    def asked(dtype, backend="auto"):
        make = {"device": "cuda", "dtype": dtype, "requires_grad": True}
        x, norm, weight = torch.empty(2, 8, 64, **make), torch.empty(64, **make), torch.empty(32, 64, **make)
        with fastvit.use_backend(backend):
            return fastvit.explain("layer_norm_linear", x, norm, norm, weight, None)

    with FakeTensorMode():
        single, half = asked(torch.float32), asked(torch.bfloat16)
        assert single.backend == "torch" and "measurement" in single.reasons[0] and "float32" in single.reasons[0]
        assert half.backend == "triton" and half.candidate == "triton + torch.mm" and "weight grad" in half.reasons[0]
        for dtype in (torch.float32, torch.bfloat16):
            assert asked(dtype, "triton").candidate == "triton"


# Putting models to use.


def test_from_the_meta_device_to_bfloat16(tmp_path, images):
    """Weights through safetensors, half as wide, into models that were built without memory or in another dtype."""
    from safetensors.torch import load_file, save_file

    model, peer = pair()
    path = tmp_path / "w.safetensors"
    save_file(model.state_dict(), path)
    empty = fastvit.create_model(NAME, **SMALL, device="meta")
    with pytest.raises(ValueError, match="meta device.*to_empty"):
        fastvit.load_checkpoint(empty, path)
    empty.load_state_dict(load_file(path), assign=True)
    close(empty.eval()(images), peer(images))
    filled = fastvit.create_model(NAME, **SMALL, device="meta").to_empty(device="cpu")
    fastvit.load_checkpoint(filled, path)
    close(filled.eval()(images), peer(images))
    half = fastvit.create_model(NAME, **SMALL, checkpoint=path, dtype=torch.bfloat16).eval()
    want = copy.deepcopy(peer).bfloat16()(images.bfloat16())
    close(half(images.bfloat16()), want, rtol=0.05, atol=0.05)
    close(timm.create_model(NAME, **SMALL, checkpoint_path=path).eval()(images), peer(images))


def test_weights_for_the_meta_device_are_drawn_by_init_weights():
    """As timm's init_weights does after to_empty: nothing is left as the memory was."""
    model = fastvit.create_model(NAME, **SMALL, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.init_weights()
    assert [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()] == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_copied_and_pickled(images):
    model, peer = pair()
    linear = {nn.Linear}
    close(*(torch.ao.quantization.quantize_dynamic(each, linear)(images) for each in (model, peer)), atol=1e-3)
    other = copy.deepcopy(model)
    other.reset_classifier(3)
    other.set_input_size(64)
    with torch.no_grad():
        other.blocks[0].norm1.weight.zero_()
    assert timm.data.resolve_data_config(model=model)["input_size"] == (3, 32, 32)
    close(model(images.contiguous(memory_format=torch.channels_last)), peer(images))


def test_a_compiled_model_in_multi_scale_training():
    """The second size makes the compiler take it as variable, gradients included; timm's model does."""
    model, peer = pair(dynamic_img_size=True)
    compiled = torch.compile(model, backend="aot_eager")
    for size in ((32, 32), (48, 24), (16, 40)):
        images = torch.randn(2, 3, *size)
        for each, run in ((model, compiled), (peer, peer)):
            each.zero_grad()
            run(images).square().mean().backward()
        close(gradients(model), gradients(peer))


@pytest.mark.parametrize("example", [(32, 32), (48, 24)])
def test_an_exported_model_takes_images_of_any_size(example):
    """Whatever size the export was shown, the model's own among them; timm's model does."""
    model, peer = pair(dynamic_img_size=True)
    height, width = (torch.export.Dim(side, min=2, max=9) for side in ("height", "width"))
    shapes = {"x": {2: 8 * height, 3: 8 * width}}
    exported = torch.export.export(model, (torch.randn(1, 3, *example),), dynamic_shapes=shapes).module()
    for size in ((48, 24), (32, 32), (16, 72)):
        images = torch.randn(1, 3, *size)
        close(exported(images), peer(images))


@pytest.mark.filterwarnings("ignore")
def test_the_older_onnx_exporter(tmp_path, images):
    """It calls forward with every argument that the signature has."""
    try:
        torch.onnx.export(pair()[0], (images,), tmp_path / "m.onnx", dynamo=False)
    except torch.onnx.errors.OnnxExporterError as error:
        assert "onnx is not installed" in str(error)


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")
@pytest.mark.parametrize("way", ["hook", "node", "call"])
def test_the_patch_embedding_gives_what_timms_does(way, images):
    """Patch tokens, without positions and class token, to whoever looks at that module."""
    results = []
    for model in pair():
        if way == "hook":
            seen = []
            model.patch_embed.register_forward_hook(lambda module, arguments, output, seen=seen: seen.append(output))
            model(images)
            results.append(seen[0])
        elif way == "node":
            results.append(timm.models.create_feature_extractor(model, ["patch_embed"])(images)["patch_embed"])
        else:
            results.append(model.patch_embed(images))
    close(*results)


def test_another_patch_embedding(images):
    """A user's own stem in the place of ours: any module from images to tokens (B, N, D)."""
    results = []
    for model in pair():
        torch.manual_seed(4)
        stem = [nn.Conv2d(3, 24, 4, 4), nn.GELU(), nn.Conv2d(24, 48, 2, 2), nn.Flatten(2)]
        model.patch_embed = nn.Sequential(*stem, Transpose())
        results.append(model(images))
    close(*results)


class Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: fastvit.create_model(None), "name is None, expected the name of a model"),
        (lambda: fastvit.create_model("vit_tiny_patch16_225"), "did you mean vit_tiny_patch16_224"),
        (lambda: fastvit.create_model(NAME, mean=0.5), "mean is 0.5, expected one number for each channel, 3"),
        (lambda: fastvit.create_model(NAME, drop_rate="a"), "drop_rate is 'a', expected a rate in"),
        (lambda: fastvit.create_model(NAME, num_class=3), "unknown num_class; did you mean num_classes"),
        (lambda: fastvit.nn.Block(0, 1), "dim is 0, expected a positive integer"),
        (lambda: fastvit.nn.Block(8, 2, act_layer="gelu"), "act_layer is 'gelu', expected a class such as"),
        (lambda: fastvit.ops.attention(None), "attention: qkv must be a torch.Tensor, got NoneType"),
        (lambda: fastvit.ops.attention(torch.ones(1, 2, 3, 1, 8), scale=math.nan), "attention: scale must be"),
        (lambda: fastvit.ops.layer_norm(torch.ones(8), torch.ones(8), torch.ones(8), "x"), "layer_norm: eps must be"),
        (lambda: fastvit.ops.layer_norm(torch.ones(8), torch.ones(8), torch.ones(8), -1), "layer_norm: eps must be"),
        (lambda: pair()[0](None), "image is a NoneType, expected a torch.Tensor"),
        (lambda: fastvit.load_checkpoint(timm.create_model(NAME, **SMALL), "w.pth"), "timm.models"),
        (lambda: fastvit.list_models(None), "filter is None, expected a shell pattern"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mistakes_in_python_are_told_in_one_line(call, text, backend):
    with fastvit.use_backend(backend), pytest.raises((TypeError, ValueError)) as raised:
        call()
    assert text in str(raised.value) and "\n" not in str(raised.value)

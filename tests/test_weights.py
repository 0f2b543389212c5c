"""Checkpoints: what is read, renamed and resampled, what is refused whole, and downloads from a server that fails."""

from __future__ import annotations

import argparse
import collections
import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

import fastvit
from fastvit.models import load_checkpoint
from fastvit.models.weights import resample_position_table

safetensors = pytest.importorskip("safetensors.torch")

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def small(name="vit_tiny_patch16_224", **overrides):
    """A small model with random parameters."""
    model = fastvit.create_model(name, **{**SMALL, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def saved(path, tensors):
    """`tensors` at `path`, in the format of its ending."""
    if path.suffix == ".safetensors":
        safetensors.save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


def assert_state(model, want):
    torch.testing.assert_close(dict(model.state_dict()), dict(want), rtol=0, atol=0)


@pytest.mark.parametrize(
    "file, wrap",
    [
        ("w.safetensors", "bare"),
        ("w.safetensors", "module"),
        ("w.pth", "bare"),
        ("w.pth", "module"),
        ("w.pth", "model"),
        ("w.pth", "state_dict"),
    ],
)
def test_round_trip(tmp_path, file, wrap):
    source = small()
    state = dict(source.state_dict())
    if wrap == "module":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    path = saved(tmp_path / file, state if wrap in ("bare", "module") else {wrap: state, "epoch": 3})
    assert_state(fastvit.create_model("vit_tiny_patch16_224", checkpoint=path, **SMALL), source.state_dict())


def test_values_are_cast_to_the_models_dtype(tmp_path):
    source = small()
    path = saved(tmp_path / "w.safetensors", source.state_dict())
    model = small().bfloat16()
    load_checkpoint(model, str(path))
    assert_state(model, source.bfloat16().state_dict())


def test_all_misfits_are_listed_and_nothing_is_loaded(tmp_path):
    state = small().state_dict()
    del state["norm.bias"], state["blocks.1.attn.qkv.weight"]
    state["extra"] = torch.zeros(2)
    state["head.weight"] = torch.zeros(7, 48)
    path = saved(tmp_path / "w.pth", state)
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_checkpoint(model, path)
    assert str(error.value) == (
        f"{path} does not fit the model: missing blocks.1.attn.qkv.weight (144, 48); missing norm.bias (48,); "
        "unexpected extra (2,); head.weight has shape (7, 48), expected (1000, 48)"
    )
    assert_state(model, before)


def test_the_classifier_is_left_only_on_request(tmp_path):
    source = small()
    path = saved(tmp_path / "w.pth", source.state_dict())
    with pytest.raises(ValueError, match=r"head.weight has shape \(1000, 48\), expected \(5, 48\)"):
        load_checkpoint(small(num_classes=5), path)
    for classes in (5, 0):
        model = fastvit.create_model("vit_tiny_patch16_224", checkpoint=path, **SMALL, num_classes=classes)
        body = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
        assert len(model.state_dict()) - len(body) == (2 if classes else 0)
        torch.testing.assert_close(body, {name: source.state_dict()[name] for name in body}, rtol=0, atol=0)
        assert not classes or model.head.weight.std() < 0.1  # random, as new, not the file's
    same = fastvit.create_model("vit_tiny_patch16_224", checkpoint=path, **SMALL, num_classes=1000)
    assert_state(same, source.state_dict())


def test_new_classifier_for_a_file_without_one(tmp_path):
    source = small(num_classes=0)
    path = saved(tmp_path / "w.pth", source.state_dict())
    with pytest.raises(ValueError, match="missing head.weight"):
        load_checkpoint(small(), path)
    model = fastvit.create_model("vit_tiny_patch16_224", checkpoint=path, **SMALL, num_classes=5)
    assert torch.equal(model.pos_embed, source.pos_embed)


@pytest.mark.parametrize("policy", ["antialias", "bicubic", "dinov2"])
@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_another_grid_is_resampled(tmp_path, name, policy):
    source = small(name)
    path = saved(tmp_path / "w.pth", source.state_dict())
    model = fastvit.create_model(name, checkpoint=path, **{**SMALL, "img_size": (40, 56)}, pos_resampling=policy)
    prefix = 2 if "distilled" in name else 0
    want = resample_position_table(source.pos_embed, (4, 4), (5, 7), prefix, policy)
    assert torch.equal(model.pos_embed, want) and torch.equal(want[:, :prefix], source.pos_embed[:, :prefix])
    assert torch.equal(model.cls_token, source.cls_token)


def test_equal_rows_of_another_shape(tmp_path):
    """4 x 4 and 2 x 8 have equally many rows: only the caller can say which the file has."""
    source = small()
    path = saved(tmp_path / "w.pth", source.state_dict())
    model = small(img_size=(16, 64))
    load_checkpoint(model, path)
    assert torch.equal(model.pos_embed, source.pos_embed)
    load_checkpoint(model, path, grid_size=(4, 4))
    assert torch.equal(model.pos_embed, resample_position_table(source.pos_embed, (4, 4), (2, 8), 1))
    source = small(img_size=(16, 24))
    path = saved(tmp_path / "w.pth", source.state_dict())
    with pytest.raises(ValueError, match=r"pos_embed has shape \(1, 7, 48\), expected \(1, 17, 48\)"):
        load_checkpoint(model, path)


def test_resampling_policies_differ_and_keep_constants():
    table = torch.randn(1, 1 + 37 * 37, 8)
    results = [resample_position_table(table, (37, 37), (16, 16), 1, p) for p in ("antialias", "bicubic", "dinov2")]
    assert all(result.shape == (1, 257, 8) for result in results)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (results[a] - results[b]).norm() / results[b].norm() > 0.02
    for policy in ("antialias", "bicubic", "dinov2"):
        flat = resample_position_table(torch.full((1, 26, 4), 3.0), (5, 5), (7, 3), 1, policy)
        torch.testing.assert_close(flat, torch.full((1, 22, 4), 3.0))
    half = table.bfloat16()
    want = resample_position_table(half.float(), (37, 37), (16, 16), 1).bfloat16()
    assert torch.equal(resample_position_table(half, (37, 37), (16, 16), 1), want)


def test_original_dinov2_names(tmp_path):
    """Chunked blocks, packed w12, w3, registers, and a class token that has a position of its own."""
    source = small("vit_giant_patch14_reg4_dinov2")
    state = {"mask_token": torch.zeros(1, 48)}
    class_position = torch.randn(1, 1, 48)
    for name, tensor in source.state_dict().items():
        name = name.replace("blocks.", "blocks.0.").replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        state[name.replace("reg_token", "register_tokens")] = tensor
    state["cls_token"] = state["cls_token"] - class_position
    state["pos_embed"] = torch.cat([class_position, state["pos_embed"]], dim=1)
    model = small("vit_giant_patch14_reg4_dinov2")
    load_checkpoint(model, saved(tmp_path / "w.pth", state))
    torch.testing.assert_close(dict(model.state_dict()), dict(source.state_dict()))


class Dangerous:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_bad_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = small()
    whole = saved(tmp_path / "w.safetensors", model.state_dict()).read_bytes()
    torch.save({"model": {"x": torch.zeros(1), "code": Dangerous()}}, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(torch.zeros(2), tmp_path / "tensor.pth")
    torch.save({"epoch": 1}, tmp_path / "number.pth")
    torch.save(model.state_dict(), tmp_path / "cut.pth")
    for name, content in {
        "cut.safetensors": whole[: len(whole) // 2],
        "cut.pth": (tmp_path / "cut.pth").read_bytes()[:5000],
        "text.pth": b"not a checkpoint",
        "empty.pth": b"",
        "words.pth": b"hello world, this is no checkpoint",
    }.items():
        (tmp_path / name).write_bytes(content)
    for name, text in {
        "cut.safetensors": "cannot be read as a safetensors file",
        "cut.pth": "cannot be read as a torch file of plain tensors",
        "text.pth": "cannot be read as a torch file of plain tensors",
        "empty.pth": "cannot be read as a torch file of plain tensors",
        "words.pth": "cannot be read as a torch file of plain tensors",
        "code.pth": "cannot be read as a torch file of plain tensors",
        "list.pth": "holds a list, expected tensors by name",
        "tensor.pth": "holds a Tensor, expected tensors by name",
        "number.pth": "holds 'epoch', a int, expected dense real tensors by name",
    }.items():
        with pytest.raises(ValueError, match=text) as error:
            load_checkpoint(model, tmp_path / name)
        assert "\n" not in str(error.value) and name in str(error.value)
    assert not (tmp_path / "pwned").exists()
    with pytest.raises(FileNotFoundError, match="no checkpoint at nowhere.pth"):
        load_checkpoint(model, "nowhere.pth")


def test_a_model_without_storage_is_refused(tmp_path):
    path = saved(tmp_path / "w.pth", small().state_dict())
    with pytest.raises(ValueError, match="meta device"):
        load_checkpoint(small().to("meta"), path)


class Hub(BaseHTTPRequestHandler):
    """The few paths of the hub that a download of one file takes; `files` has a repository's bytes, and `cut` the
    repositories that send only the first half of them and hang up."""

    files: dict[str, bytes] = {}
    cut: set[str] = set()
    requests: list[tuple[str, str]] = []

    def do_GET(self):
        self.requests.append((self.command, self.path))
        repository = self.path.split("/resolve/")[0].strip("/")
        content = self.files.get(repository)
        if content is None or not self.path.endswith("/model.safetensors"):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if repository in self.cut else content)
        self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Hub.requests.clear()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


PROGRAM = """
import sys, time, fastvit
time.sleep = lambda seconds: None  # the client waits half a minute for a server that is down
for name in sys.argv[1:]:
    try:
        # A size of the test's own, so that only a small file travels.
        model = fastvit.create_model(name, pretrained=True, embed_dim=48, depth=2, num_heads=3, img_size=(112, 448))
        print(name, "loaded", float(model.pos_embed.double().sum()), flush=True)
    except Exception as error:
        print(name, type(error).__name__, error, flush=True)
"""


def hub_environment(tmp_path, endpoint):
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,hub.invalid",
    }


def pretrained(tmp_path, endpoint, *names, **environment):
    """What create_model(pretrained=True) said of each name, in a process of its own: the client reads its
    environment when it is imported."""
    environment = hub_environment(tmp_path, endpoint) | environment
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def test_pretrained_weights(tmp_path, hub):
    pytest.importorskip("huggingface_hub")
    source = small(patch_size=16, img_size=224)
    content = saved(tmp_path / "model.safetensors", source.state_dict()).read_bytes()
    whole, cut, gone = "vit_tiny_patch16_224", "vit_small_patch16_224", "deit_tiny_patch16_224"
    Hub.files = {f"timm/{name}.augreg_in21k_ft_in1k": content for name in (whole, cut)}
    Hub.cut = {f"timm/{cut}.augreg_in21k_ft_in1k"}
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    said = pretrained(tmp_path, endpoint, whole, cut, gone)
    # 14 x 14 and 7 x 28 have equally many rows, and the table is resampled all the same.
    table = resample_position_table(source.pos_embed, (14, 14), (7, 28), 1)
    loaded = f"loaded {float(table.detach().double().sum())}"
    assert said[whole] == loaded
    for name, tag in ((cut, "augreg_in21k_ft_in1k"), (gone, "fb_in1k")):
        assert said[name].startswith(f"RuntimeError could not download model.safetensors of timm/{name}.{tag}: "), said
    path = f"/timm/{whole}.augreg_in21k_ft_in1k/resolve/main/model.safetensors"
    assert ("HEAD", path) in Hub.requests and ("GET", path) in Hub.requests

    # A server that is down: what was downloaded is used from the cache, the rest is an error; so it is offline.
    hub.shutdown()
    hub.server_close()
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        said = pretrained(tmp_path, endpoint, whole, gone, **environment)
        assert said[whole] == loaded
        assert said[gone].startswith("RuntimeError could not download model.safetensors of timm/deit_tiny"), said


def test_missing_extras_are_named(tmp_path):
    path = saved(tmp_path / "w.safetensors", small().state_dict())
    program = (
        "import sys; sys.modules.update({'huggingface_hub': None, 'safetensors': None})\n"
        "import fastvit\n"
        f"for arguments in ({{'pretrained': True}}, {{'checkpoint': {str(path)!r}}}):\n"
        "    try: fastvit.create_model('vit_tiny_patch16_224', depth=1, **arguments)\n"
        "    except ImportError as error: print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "pretrained weights need huggingface_hub: pip install 'fastvit[hub]'",
        f"reading {path} needs safetensors: pip install 'fastvit[hub]'",
    ], done.stderr


def test_a_position_table_that_does_not_fit_is_listed_with_the_rest(tmp_path):
    state = small().state_dict()
    for table in (torch.zeros(7), torch.zeros(1, 12, 48), torch.zeros(2, 17, 48), torch.zeros(1, 4, 4, 48)):
        path = saved(tmp_path / "w.pth", {**state, "pos_embed": table, "extra": torch.zeros(1)})
        with pytest.raises(ValueError, match="unexpected extra.*; pos_embed has shape"):
            load_checkpoint(small(), path)


@pytest.mark.parametrize(
    "name, value", [(0, torch.zeros(1)), ("w", torch.zeros(1).cfloat()), ("w", torch.eye(2).to_sparse())]
)
def test_only_dense_real_tensors_by_name_are_taken(name, value, tmp_path):
    with pytest.raises(ValueError, match="expected dense real tensors by name"):
        load_checkpoint(small(), saved(tmp_path / "w.pth", {name: value}))


def test_registers_without_the_rest_of_dinov2_are_listed(tmp_path):
    with pytest.raises(ValueError, match="unexpected register_tokens"):
        load_checkpoint(small(), saved(tmp_path / "w.pth", {"register_tokens": torch.zeros(1, 4, 48)}))


def test_the_unused_layer_of_old_files_is_left_out(tmp_path):
    model = small()
    unused = {"pre_logits.fc.weight": torch.zeros(48, 48), "pre_logits.fc.bias": torch.zeros(48)}
    load_checkpoint(model, saved(tmp_path / "w.pth", model.state_dict() | unused))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_training_saves_beside_the_weights(tmp_path, zipped):
    """Arguments, paths and numpy's numbers stand in the way of plain loading, and are not wanted."""
    source = small()
    optimizer = torch.optim.AdamW(source.parameters())
    source(torch.randn(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    extra = argparse.Namespace(
        output=Path("out"), lr=np.float64(1e-3), seeds=np.arange(3), inner=argparse.Namespace(sizes=[1, (2, 3)])
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 7])
    saved_by_training = {
        "state_dict": source.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "rng": {"numpy": np.random.get_state(), "torch": torch.get_rng_state()},
        "epoch": 3,
        "best": np.float32(0.5),
        "args": extra,
    }
    torch.save(saved_by_training, tmp_path / "last.pth", _use_new_zipfile_serialization=zipped)
    model = small()
    load_checkpoint(model, tmp_path / "last.pth")
    assert_state(model, source.state_dict())


@pytest.mark.parametrize("ema", [True, False])
def test_training_checkpoints_of_timm(tmp_path, ema):
    """timm's own saver, and its own loader as the judge of which of the weights are meant."""
    timm = pytest.importorskip("timm")
    from timm.utils import CheckpointSaver, ModelEmaV3

    peer, averaged = (timm.create_model("vit_tiny_patch16_224", **SMALL) for _ in range(2))
    averaged = ModelEmaV3(averaged) if ema else None
    optimizer = torch.optim.SGD(peer.parameters(), lr=0.1)
    arguments = argparse.Namespace(model="vit_tiny_patch16_224", opt="sgd", mean=[0.5], opt_kwargs={})
    saver = CheckpointSaver(peer, optimizer, arguments, averaged, checkpoint_dir=tmp_path, recovery_dir=tmp_path)
    saver.save_checkpoint(1, 80.0)
    want = timm.create_model("vit_tiny_patch16_224", **SMALL)
    timm.models.load_checkpoint(want, str(tmp_path / "last.pth.tar"))
    model = small()
    load_checkpoint(model, tmp_path / "last.pth.tar")
    assert_state(model, want.state_dict())
    assert torch.equal(model.cls_token, (averaged.module if ema else peer).cls_token)


@pytest.mark.parametrize(
    "first, second",
    [("state_dict_ema", "state_dict"), ("model_ema", "model"), ("teacher", "student"), ("state_dict", "model")],
)
def test_which_of_several_is_taken(tmp_path, first, second):
    source, other = small(), small()
    path = saved(tmp_path / "w.pth", {second: other.state_dict(), first: source.state_dict(), "epoch": 1})
    model = small()
    load_checkpoint(model, path)
    assert_state(model, source.state_dict())
    if second != "student":
        load_checkpoint(model, saved(path, {second: other.state_dict(), first: None}))
        assert_state(model, other.state_dict())


@pytest.mark.parametrize(
    "wrappers, prefix, beside",
    [
        (["model_state_dict"], "_orig_mod.", ()),
        (["state_dict"], "model.", ("criterion.weight",)),  # Lightning
        ([], "module._orig_mod.", ()),
        (["model"], "_orig_mod.module.", ()),
        (["model", "state_dict"], "encoder.", ("decoder.0.weight", "mask_token")),
        (["teacher"], "backbone.", ("head.mlp.0.weight", "head.last_layer.weight_g")),  # DINO
        (["teacher"], "module.backbone.", ("dino_head.mlp.0.weight",)),
        (["model_ema"], "module.", ("n_averaged",)),  # torch.optim.swa_utils.AveragedModel
    ],
)
def test_wrappers_and_prefixes(tmp_path, wrappers, prefix, beside):
    source = small()
    content = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    content |= {name: torch.zeros(2) for name in beside}
    for wrapper in reversed(wrappers):
        content = {wrapper: content, "epoch": 1}
    model = small()
    load_checkpoint(model, saved(tmp_path / "w.pth", content))
    assert_state(model, source.state_dict())


def test_blocks_compiled_one_by_one(tmp_path):
    source = small()
    state = {re.sub(r"^(blocks\.\d+)\.", r"\1._orig_mod.", name): v for name, v in source.state_dict().items()}
    model = small()
    load_checkpoint(model, saved(tmp_path / "w.safetensors", state))
    assert_state(model, source.state_dict())


def test_two_models_side_by_side(tmp_path):
    state = {prefix + name: v for prefix in ("online.", "target.") for name, v in small().state_dict().items()}
    path = saved(tmp_path / "w.pth", state)
    with pytest.raises(ValueError) as error:
        load_checkpoint(small(), path)
    assert str(error.value) == f"{path} holds models under 'online.' and 'target.', expected one: save it alone"


@pytest.mark.filterwarnings("ignore:.*TorchScript archive", "ignore:.*torch.jit.script")
def test_what_torch_refuses_is_named(tmp_path):
    torch.save({"model": {"x": torch.zeros(1)}, "stats": collections.defaultdict(list)}, tmp_path / "w.pth")
    torch.save({"model": Dangerous()}, tmp_path / "system.pth")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pth")
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "script.pth")
    (tmp_path / "pointer.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    np.savez(tmp_path / "jax.npz", **{"Transformer/encoderblock_0/x": np.zeros(1)})
    advice = "; a file of model.state_dict() alone can be read"
    for name, reason in {
        "w.pth": "Unsupported global: GLOBAL collections.defaultdict was not an allowed global by default" + advice,
        "system.pth": f"Trying to load unsupported GLOBAL {os.system.__module__}.system whose module "
        f"{os.system.__module__} is blocked" + advice,
        "module.pth": "Unsupported global: GLOBAL torch.nn.modules.linear.Linear was not an allowed global by default"
        + advice,
        "script.pth": "Cannot use ``weights_only=True`` with TorchScript archives passed to ``torch.load``",
        "pointer.pth": "it begins with b'version https://'",
    }.items():
        with pytest.raises(ValueError) as error:
            load_checkpoint(small(), tmp_path / name)
        assert str(error.value) == f"{tmp_path / name} cannot be read as a torch file of plain tensors: {reason}"
    with pytest.raises(ValueError, match="jax.npz is a NumPy archive, .* expected a torch or safetensors file"):
        load_checkpoint(small(), tmp_path / "jax.npz")


def foreign_names():
    """The names in other libraries' state dicts, and what a message should call them."""
    timm, torchvision, transformers = (pytest.importorskip(n) for n in ("timm", "torchvision", "transformers"))
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 48}
    with torch.device("meta"):
        yield "torchvision's VisionTransformer", torchvision.models.VisionTransformer(32, 8, 1, 3, 48, 48)
        yield "Swin", torchvision.models.swin_t()
        yield "ResNet", torchvision.models.resnet18()
        for name, kind in {
            "swin_tiny_patch4_window7_224": "Swin",
            "resnet26": "ResNet",
            "convnext_atto": "ConvNeXt",
            "beit_base_patch16_224": "BEiT",
        }.items():
            yield kind, timm.create_model(name)
        for name, kind in {
            "ViTForImageClassification": "ViT",
            "DeiTForImageClassificationWithTeacher": "DeiT",
            "Dinov2ForImageClassification": "Dinov2",
            "DINOv3ViTModel": "DINOv3",
            "SwinModel": "Swin",
            "CLIPVisionModelWithProjection": "CLIP",
            "SiglipVisionModel": "SigLIP",
        }.items():
            model = getattr(transformers, name)
            config = model.config_class() if name == "SwinModel" else model.config_class(**sizes)
            yield kind if kind == "Swin" else f"transformers' {kind}", model(config)


def test_checkpoints_of_other_libraries_are_named(tmp_path):
    for kind, peer in foreign_names():
        path = saved(tmp_path / "w.pth", {name: torch.zeros(1) for name in peer.state_dict()})
        with pytest.raises(ValueError) as error:
            load_checkpoint(small(depth=12), path)
        text = str(error.value)
        assert text.startswith(f"{path} holds a checkpoint of {kind}"), text
        assert "expected timm's names: missing " in text and "; unexpected " in text
        assert len(text) - len(str(path)) < 500 and "\n" not in text


@pytest.mark.parametrize(
    "name, kind",
    [
        ("vit.embeddings.patch_embeddings.projection.weight", "transformers' ViT"),
        ("vision_model.embeddings.class_embedding", "transformers' CLIP"),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", "CLIP as OpenAI and OpenCLIP release it"),
        ("blocks.0.gamma_1", "DeiT III"),
        ("decoder_blocks.0.norm1.weight", "MAE"),
        ("image_encoder.blocks.0.attn.rel_pos_h", "Segment Anything"),
        ("storage_tokens", "DINOv3 as Meta releases it"),
        ("backbone.layers.0.ln1.weight", "mmpretrain"),
    ],
)
def test_telling_names(tmp_path, name, kind):
    path = saved(tmp_path / "w.pth", {name: torch.zeros(1)})
    with pytest.raises(ValueError, match=re.escape(f"{path} holds a checkpoint of {kind}")):
        load_checkpoint(small(), path)


def test_long_lists_of_misfits_are_cut(tmp_path):
    deep, shallow = small(depth=6), small(qkv_bias=False, num_classes=3)
    path = saved(tmp_path / "w.pth", deep.state_dict())
    with pytest.raises(ValueError) as error:
        load_checkpoint(shallow, path)
    assert str(error.value) == (
        f"{path} does not fit the model: unexpected blocks.0.attn.qkv.bias (144,); "
        "unexpected blocks.1.attn.qkv.bias (144,); unexpected blocks.2.norm1.weight (48,); 47 more unexpected; "
        "head.weight has shape (1000, 48), expected (3, 48); head.bias has shape (1000,), expected (3,)"
    )


@pytest.mark.parametrize("patch_size", [4, 16, (8, 4)])
def test_weights_for_another_patch_size_as_timm_does_it(tmp_path, patch_size):
    timm = pytest.importorskip("timm")
    peer = timm.create_model("vit_tiny_patch16_224", **SMALL)
    path = saved(tmp_path / "w.safetensors", peer.state_dict())
    want = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "patch_size": patch_size})
    timm.models.load_checkpoint(want, path, filter_fn=timm.models.vision_transformer.checkpoint_filter_fn)
    model = small(patch_size=patch_size)
    load_checkpoint(model, path)
    torch.testing.assert_close(dict(model.state_dict()), dict(want.state_dict()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("in_chans", [1, 2, 4, 7])
def test_rgb_weights_for_other_channels_as_timm_does_it(tmp_path, in_chans, dtype):
    timm = pytest.importorskip("timm")
    path = saved(tmp_path / "w.pth", {name: v.to(dtype) for name, v in small().state_dict().items()})
    want = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path)},
        in_chans=in_chans,
        **SMALL,
    )
    model = small(in_chans=in_chans, mean=(0.5,) * in_chans, std=(0.5,) * in_chans)
    load_checkpoint(model, path)
    assert_state(model, want.state_dict())


def test_only_rgb_weights_are_brought_to_other_channels(tmp_path):
    path = saved(tmp_path / "w.pth", small(in_chans=2, mean=(0.5,) * 2, std=(0.5,) * 2).state_dict())
    with pytest.raises(ValueError, match=r"patch_embed.proj.weight has shape \(48, 2, 8, 8\), expected"):
        load_checkpoint(small(), path)


@pytest.mark.parametrize("file, ours", [("token", "avg"), ("avg", "token")])
@pytest.mark.parametrize("num_classes", [5, 0])
def test_a_new_classifier_on_another_pool_as_timm_does_it(tmp_path, file, ours, num_classes):
    """Where the final norm moves behind the pool, or back, timm starts it anew with the classifier."""
    timm = pytest.importorskip("timm")
    path = saved(tmp_path / "w.pth", small(global_pool=file).state_dict())
    overrides = {**SMALL, "global_pool": ours, "num_classes": num_classes}
    want = timm.create_model(
        "vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **overrides
    ).state_dict()
    model = fastvit.create_model("vit_tiny_patch16_224", checkpoint=path, **overrides)
    got = model.state_dict()
    assert got.keys() == want.keys() and ("fc_norm.weight" in got) == (ours == "avg")
    for name in got:
        assert name.startswith("head.") or torch.equal(got[name], want[name]), name


@pytest.mark.parametrize(
    "file, ours, hint",
    [
        ("token", "avg", "the file has its norm before the pool, as a model with fc_norm=False"),
        ("avg", "token", "the file has its norm after the pool, as a model with fc_norm=True"),
    ],
)
def test_a_trained_classifier_on_another_pool_is_refused_as_by_timm(tmp_path, file, ours, hint):
    source = small(global_pool=file)
    path = saved(tmp_path / "w.pth", source.state_dict())
    with pytest.raises(ValueError, match=f"missing .*norm.weight .*unexpected .*norm.weight.*; {hint}$"):
        load_checkpoint(small(global_pool=ours), path)
    model = small(global_pool=ours, fc_norm=file == "avg")
    load_checkpoint(model, path)
    assert_state(model, source.state_dict())


def test_mask_tokens_are_no_misfit(tmp_path):
    """Only training reads it: original DINOv2 files have one, timm's have none."""
    source = small(mask_token=True)
    model = small(mask_token=True)
    own = model.mask_token.detach().clone()
    state = source.state_dict()
    load_checkpoint(model, saved(tmp_path / "w.pth", {name: v for name, v in state.items() if name != "mask_token"}))
    assert_state(model, state | {"mask_token": own})
    load_checkpoint(model, saved(tmp_path / "w.pth", state))
    assert_state(model, state)
    load_checkpoint(small(), tmp_path / "w.pth")


def test_a_model_of_another_library_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"^model is a torch\.nn\..*\.Linear, expected a fastvit.VisionTransformer$"):
        load_checkpoint(torch.nn.Linear(1, 1), saved(tmp_path / "w.pth", {}))


@pytest.mark.parametrize("entry", ["net", "weights", "params", "ema_state_dict"])
def test_the_only_entry_that_is_a_model_is_taken(entry, tmp_path):
    state = small().state_dict()
    optimizer = {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [{"lr": 1e-3}]}
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    saved(tmp_path / "w.pth", {"optimizer": optimizer, "epoch": 3, entry: prefixed, "metrics": {"top1": 0.5}})
    model = small()
    load_checkpoint(model, tmp_path / "w.pth")
    assert_state(model, state)
    saved(tmp_path / "w.pth", {entry: state, "other": state})
    with pytest.raises(ValueError, match=f"w.pth holds models as '{entry}' and 'other', expected one"):
        load_checkpoint(model, tmp_path / "w.pth")


def test_what_is_no_path_is_refused():
    with pytest.raises(TypeError, match="^path is a dict, expected a path; load_state_dict takes tensors$"):
        load_checkpoint(small(), {})
    with pytest.raises(ValueError, match=r"^path is '\.', a directory, expected"):
        load_checkpoint(small(), ".")


TIMED = """
import socket, sys, time, fastvit
from huggingface_hub import hf_hub_download
if sys.argv[1] == "mute resolver":
    socket.getaddrinfo = lambda *_, **__: time.sleep(600)
for name in sys.argv[2:]:
    start = time.monotonic()
    try:
        fastvit.create_model(name, pretrained=True, embed_dim=48, depth=2, num_heads=3)
        print(time.monotonic() - start, "loaded", flush=True)
    except RuntimeError as error:
        print(time.monotonic() - start, error, flush=True)
"""


def test_no_network_is_an_error_within_seconds_and_needless_for_what_is_cached(tmp_path, request):
    pytest.importorskip("huggingface_hub")
    cached, absent = "vit_tiny_patch16_224", "deit_tiny_patch16_224"
    repository = tmp_path / f"hub/hub/models--timm--{cached}.augreg_in21k_ft_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    saved(repository / "snapshots" / ("0" * 40) / "model.safetensors", small(patch_size=16, img_size=224).state_dict())
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as closing:
        ports = silent.getsockname()[1], closing.getsockname()[1]
        closing.close()
        processes = {
            kind: subprocess.Popen(
                [sys.executable, "-c", TIMED, kind, cached, cached, absent],
                env=hub_environment(tmp_path, endpoint),
                stdout=subprocess.PIPE,
                text=True,
            )
            for kind, endpoint in {
                "silent server": f"http://127.0.0.1:{ports[0]}",
                "closed port": f"http://127.0.0.1:{ports[1]}",
                "mute resolver": "http://hub.invalid",
            }.items()
        }
        for process in processes.values():
            request.addfinalizer(process.kill)
        for kind, process in processes.items():
            _, of_cached, of_absent = process.communicate(timeout=120)[0].splitlines()
            seconds, said = of_cached.split(" ", 1)
            assert said == "loaded" and float(seconds) < 3, (kind, of_cached)
            seconds, said = of_absent.split(" ", 1)
            assert float(seconds) < 5, (kind, of_absent)
            assert said.startswith(f"could not download model.safetensors of timm/{absent}.fb_in1k: "), (kind, said)
            assert said.endswith("; a copy from elsewhere can be given as checkpoint"), (kind, said)
            assert "refused" in said or "no answer within 3 seconds" in said, (kind, said)

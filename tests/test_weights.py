"""Checkpoints: what is read, renamed and resampled, what is refused whole, and downloads from a server that fails."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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


def pretrained(tmp_path, endpoint, *names, **environment):
    """What create_model(pretrained=True) said of each name, in a process of its own: the client reads its
    environment when it is imported."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        **environment,
    }
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

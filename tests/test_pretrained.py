"""Pretrained weights: downloads, from a server that fails too, the cache, and the packages that they need."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from checkpoints import saved, small

from fastvit.models.weights import resample_position_table


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
    tagged = "vit_base_patch16_224.sam_in1k"
    Hub.files = {f"timm/{name}.augreg_in21k_ft_in1k": content for name in (whole, cut)}
    Hub.files[f"timm/{tagged}"] = content
    Hub.cut = {f"timm/{cut}.augreg_in21k_ft_in1k"}
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    said = pretrained(tmp_path, endpoint, whole, cut, gone, tagged)
    # 14 x 14 and 7 x 28 have equally many rows, and the table is resampled all the same.
    table = resample_position_table(source.pos_embed, (14, 14), (7, 28), 1)
    loaded = f"loaded {float(table.detach().double().sum())}"
    assert said[whole] == said[tagged] == loaded
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

"""Quick runs of the benchmark, for the tests of what it measures, checks and writes. conftest.py has the fixtures."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastvit.benchmarks import bench, ops, peers, report, schema, suites, timing
from fastvit.benchmarks.cases import MODES, Case

import fastvit

ROOT = Path(__file__).parent.parent
PHOTOS = ROOT / "benchmarks" / "photos"
MODEL = "vit_tiny_patch16_224"
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("chelsea.jpg", "coffee.jpg"):
        shutil.copy(PHOTOS / name, folder)
    return folder


@pytest.fixture
def quick(monkeypatch, photos):
    """Settings of a run that takes a second: one tiny model of two blocks, two photographs, few rounds."""
    create = fastvit.create_model
    monkeypatch.setattr(fastvit, "create_model", lambda name, **kwargs: create(name, depth=2, **kwargs))
    monkeypatch.setattr(timing, "ROUND_SECONDS", 0)
    monkeypatch.setattr(timing, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(timing, "pin_threads", torch.get_num_threads)
    peaks = schema.Peaks(1e10, {"fp32": 1e11, "bf16": 1e11, "fp16": 1e11})
    monkeypatch.setattr(bench.roofline, "measure_peaks", lambda device, dtypes: peaks)
    monkeypatch.setattr(ops, "MOST_BYTES", 1 << 20)

    def settings(*cases, **chosen):
        defaults = {"peers": ("reference",), "photos": photos, "seconds": 1e-9}
        return suites.Settings("cpu", cases or (Case(MODEL, FP32, 3),), **defaults | chosen)

    return settings


@pytest.fixture
def add_peer(monkeypatch):
    """Add a peer whose adapter is `make(case, ours, inputs) -> call`."""

    def add(name, make, note=""):
        monkeypatch.setitem(peers.PEERS, name, peers.Peer(name, name, (), "both", ("cpu", "cuda"), MODES, "invented"))
        adapter = SimpleNamespace(build=lambda peer, *given: peers.Built(make(*given), note))
        monkeypatch.setitem(sys.modules, f"fastvit.benchmarks.peers.{name}", adapter)

    return add


@pytest.fixture
def no_pictures(monkeypatch):
    """They take longer than all the rest, and have tests of their own."""
    monkeypatch.setattr(report, "write", lambda run, folder: [])


def rows_of(settings):
    measuring = bench.Bench(settings)
    return [measuring.row(case, bench.roofline.measure_peaks("cpu", ())) for case in settings.cases]


def as_is(case, ours, inputs):
    """A peer that is ours."""
    return getattr(fastvit.ops, case.op) if case.op else ours

"""The measurements of `make gpu`, as far as they can be told without one; test_micro.py has those of launches."""

import json
import os
import sys
import time
import types

import pytest
import torch
from fastvit.benchmarks import on_gpu, peaks, roofline
from fastvit.benchmarks.schema import Peaks
from fastvit.kernels.launch.hardware import ARCHS

from fastvit import tune
from fastvit.attempts import GpuLost
from fastvit.calls import calls_of
from fastvit.dispatch import interpreting
from fastvit.models.registry import model_entry
from fastvit.workers import GPU_LOST

pytestmark = pytest.mark.skipif(not interpreting(), reason="with a GPU, `make gpu` runs them")

MODEL = "vit_tiny_patch16_224"
LIMITS = Peaks(1e12, {"bf16": 1e14})


def test_what_the_driver_loads_is_held_against_the_report(monkeypatch, tmp_path, capsys):
    """Three kernels: two as the report says, one with a stack of its own, and one whose registers differ. What ptxas
    says of a kernel is only heard where Triton's cache does not have it; a second call goes on where the first stopped.
    """
    from fastvit.benchmarks.static import compile
    from fastvit.benchmarks.static.record import Record

    kernel = types.SimpleNamespace(run=lambda *args, **kwargs: compiled)
    launches = [types.SimpleNamespace(kernel=kernel, args=(), kwargs={}, n=n) for n in (64, 66, 65)]
    metadata = types.SimpleNamespace(shared=0)
    compiled = types.SimpleNamespace(name="k", kernel=b"", metadata=metadata)
    users_cache = compile.triton.knobs.cache.dir
    loads = iter([(None, None, 64, 0, 1024), (None, None, 66, 4, 1024), (None, None, 64, 0, 1024)])

    def compile_launch(launch):
        assert compile.triton.knobs.cache.dir != users_cache
        return Record("sm_90", "case", "kernel", "", registers=launch.n, stack_bytes=8 if launch.n == 66 else 0)

    def load_binary(*_):
        assert compile.triton.knobs.cache.dir != users_cache
        return next(loads)

    monkeypatch.setattr(compile, "launches", lambda cases, arch: launches)
    monkeypatch.setattr(compile, "compile_launch", compile_launch)
    monkeypatch.setattr(on_gpu.hardware, "current_arch", lambda: ARCHS["sm_90"])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    active = types.SimpleNamespace(utils=types.SimpleNamespace(load_binary=load_binary))
    driver = types.SimpleNamespace(active=active, _active=None, set_active=lambda _: None)
    monkeypatch.setattr(on_gpu.triton.runtime, "driver", driver)
    assert on_gpu.loaded(tmp_path, time.monotonic() - 1, [], 1)
    assert json.loads((tmp_path / "loaded.json").read_text())["finished"] is False
    capsys.readouterr()
    assert not on_gpu.loaded(tmp_path, time.monotonic() + 60, [], 1)
    written = json.loads((tmp_path / "loaded.json").read_text())
    assert written["finished"] is True
    assert [row["same"] for row in written["kernels"]] == [True, True, False]
    assert "3 of 3 kernels loaded; 1 differ" in capsys.readouterr().out


SECTION = '"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
# In place of Nsight Compute: runs what it is given, and counts two kernels.
NCU = f"""#!/bin/sh
echo "$@" > "$ASKED"
echo "==PROF== Connected"
echo '{SECTION}'
echo '"0","7","gemm_kernel","GPU Speed Of Light Throughput","Duration","us","310.2"'
echo '"0","7","gemm_kernel","GPU Speed Of Light Throughput","DRAM Throughput","%","41.5"'
echo '"1","7","attention_kernel","Launch Statistics","Registers Per Thread","register/thread","168"'
exit $STATUS
"""


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    """A profiler on the PATH, and where it writes down what it was asked; its exit status is set by the test."""
    program = tmp_path / "bin" / "ncu"
    program.parent.mkdir()
    program.write_text(NCU)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    return tmp_path / "asked"


@pytest.mark.parametrize("status", [0, 9])
def test_counters_are_those_that_the_profiler_prints(status, ncu, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("STATUS", str(status))
    assert on_gpu.counters(tmp_path, time.monotonic() + 60, ["m"], 8) == (status == 0)
    assert ncu.read_text().endswith(f"-m fastvit.benchmarks.on_gpu launches {tmp_path} 36 --models m --batch 8\n")
    counted = on_gpu.read_counters(tmp_path / "counters.csv")
    assert [kernel for kernel, _ in counted] == ["gemm_kernel", "attention_kernel"]
    assert counted[0][1] == {"Duration": "310.2", "DRAM Throughput": "41.5"}
    printed = capsys.readouterr().out
    assert "310.2" in printed and "41.5" in printed and "168" in printed
    written = json.loads((tmp_path / "counters.json").read_text())
    assert written == {"kernels": 2, "why": "" if status == 0 else "ncu ended with 9", "finished": True}


def test_without_a_profiler_there_are_no_counters_and_nothing_is_left(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert on_gpu.counters(tmp_path, time.monotonic() + 60, ["m"], 8)
    assert "ncu) is not on the PATH" in capsys.readouterr().out
    assert json.loads((tmp_path / "counters.json").read_text())["finished"] is True


def test_peaks_are_kept_and_not_measured_twice(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(roofline, "measure_peaks", lambda device, dtypes: LIMITS)
    asked = []
    monkeypatch.setattr(peaks, "steady_seconds", lambda call, *_: asked.append(call()) or 1e-4)
    assert peaks.run(tmp_path, time.monotonic() - 1, [MODEL], 2, "cpu")
    assert json.loads((tmp_path / "peaks.json").read_text())["finished"] is False
    assert peaks.run(tmp_path, time.monotonic() + 60, [MODEL], 2, "cpu")
    written = json.loads((tmp_path / "peaks.json").read_text())
    assert written["finished"] is True and written["bytes_per_s"] == 1e12
    shapes = {(row["layer"], row["direction"]): row["shape"] for row in written["products"]}
    assert len(shapes) == 14 == len(asked)
    assert shapes["qkv", "forward"] == [394, 576, 192]
    assert shapes["fc2", "input gradient"] == [394, 768, 192]
    assert shapes["fc1", "weight gradient"] == [768, 192, 394]
    assert shapes["patch embedding", "forward"] == [392, 192, 768]
    for row, out in zip(written["products"], asked, strict=True):
        m, n, k = row["shape"]
        assert out.shape == (m, n) and row["flops_per_s"] == 2 * m * n * k / 1e-4
    assert "1.00 TB/s; bf16 100 TFLOP/s" in capsys.readouterr().out
    assert peaks.run(tmp_path, time.monotonic() + 60, [MODEL], 2, "cpu") and len(asked) == 14
    monkeypatch.setattr(roofline, "measure_peaks", None)
    assert peaks.read_or_measure(tmp_path) == LIMITS


def test_the_shapes_are_those_of_the_launches():
    """What the library is timed at is what our kernels are asked for; the patch embedding's makes the prefix too."""
    calls = calls_of(model_entry(MODEL).config, 1, torch.bfloat16, "inference")
    launches = [request for call in calls for request in tune.planned(call, ARCHS["sm_90"])]
    asked = {request.shape for request in launches if request.kernel == "gemm" and "patches" not in request.key}
    layers = peaks.shapes(model_entry(MODEL).config, 1)
    assert layers.pop("patch embedding") == (196, 192, 768)
    assert asked == set(layers.values())


def test_a_lost_gpu_is_an_exit_status_of_its_own(monkeypatch, tmp_path, capsys):
    def lost(*_):
        raise GpuLost("a kernel took it")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(on_gpu.MEASUREMENTS, "micro", lost)
    assert on_gpu.main(["micro", str(tmp_path), "10", "--models", "m", "--batch", "1"]) == GPU_LOST
    assert "the GPU is lost: a kernel took it" in capsys.readouterr().out


def test_arguments(capsys):
    with pytest.raises(SystemExit) as left:
        on_gpu.main(["nothing"])
    assert left.value.code == 2 and "invalid choice: 'nothing'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert on_gpu.main(["micro", ".", "10", "--models", "m", "--batch", "1"]) == 2
        assert "finds no GPU" in capsys.readouterr().err
    assert "fastvit.benchmarks.on_gpu" in sys.modules

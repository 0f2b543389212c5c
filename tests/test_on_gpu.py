"""The measurements of `make gpu`, as far as they can be told without one: the launches of an op, with a clock that is
told what everything takes, and the files that the static report reads."""

import json
import sys
import time
import types

import pytest
import torch
from fastvit.benchmarks import on_gpu, roofline
from fastvit.benchmarks.schema import Ceilings
from fastvit.benchmarks.static import estimate
from fastvit.kernels import configs, cost
from fastvit.kernels.hardware import ARCHS

from fastvit import tune
from fastvit.dispatch import interpreting
from fastvit.models.registry import model_entry

pytestmark = pytest.mark.skipif(not interpreting(), reason="with a GPU, `make gpu` runs them")

MODEL = "vit_tiny_patch16_224"
LIMITS = Ceilings(1e12, {"bf16": 1e14})


class FakeClock:
    """Every run takes 2 ms."""

    def timer(self, runs, graph):
        assert graph and runs
        for run in runs:
            run()
        return lambda: 2e-3


def small_call(mode="inference", op="layer_norm_mlp"):
    calls = tune.calls_of(model_entry(MODEL).config, 1, torch.bfloat16, mode)
    return next(call for call in calls if call.op.name == op)


@pytest.mark.parametrize("mode", tune.MODES)
def test_every_launch_of_an_op_is_measured_with_the_config_in_force(mode):
    rows = list(on_gpu.measure_launches(small_call(mode), torch.device("cpu"), ARCHS["sm_90"], FakeClock(), LIMITS))
    launches = {row["request"]: row for row in rows}
    assert len(launches) == len(rows) == (3 if mode == "inference" else 10)
    fc1 = next(row for key, row in launches.items() if key.startswith("gemm 197x768x192 "))
    request = configs.Request("gemm", (197, 768, 192), torch.bfloat16)
    needs = cost.request_cost(request)
    assert fc1["seconds"] == fc1["q25"] == fc1["q75"] == 2e-3
    assert fc1["flops_per_s"] == needs.flops / 2e-3
    assert fc1["bytes_per_s"] == needs.bytes / 2e-3
    assert fc1["fraction_of_floor"] == max(needs.flops / 1e14, needs.bytes / 1e12) / 2e-3
    assert fc1["config"]["BLOCK_M"] in (64, 128)


def test_past_the_deadline_nothing_is_started():
    call, cpu = small_call(), torch.device("cpu")
    assert not list(on_gpu.measure_launches(call, cpu, ARCHS["sm_90"], FakeClock(), LIMITS, time.monotonic() - 1))


def test_the_profile_is_what_the_static_report_reads(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(on_gpu, "_calls", lambda: [(MODEL, "inference", small_call())])
    monkeypatch.setattr(on_gpu.tune, "CudaClock", FakeClock)
    monkeypatch.setattr(on_gpu.hardware, "current_arch", lambda: ARCHS["sm_90"])
    monkeypatch.setattr(on_gpu, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(roofline, "measure_ceilings", lambda *_: LIMITS)
    folder = tmp_path / "some-gpu" / "abc"
    folder.mkdir(parents=True)
    assert on_gpu.profile(folder, time.monotonic() - 1)
    assert json.loads((folder / "kernels.json").read_text())["finished"] is False
    assert on_gpu.profile(folder, time.monotonic() + 600)
    written = json.loads((folder / "kernels.json").read_text())
    assert written["finished"] is True
    assert "2000.0" in capsys.readouterr().out
    (times,) = estimate.measurements(tmp_path, "sm_90").values()
    assert len(times) == 3 and set(times.values()) == {2e-3}
    assert estimate.measurements(tmp_path, "sm_80") == {}
    monkeypatch.setattr(on_gpu.tune, "CudaClock", lambda: None)
    assert on_gpu.profile(folder, time.monotonic() + 600), "what was measured was measured again"
    assert json.loads((folder / "kernels.json").read_text()) == written


def test_an_op_that_cannot_be_profiled_stops_no_other(monkeypatch, tmp_path, capsys):
    def measure(call, *rest):
        if call.op.name == "attention":
            raise torch.OutOfMemoryError("no memory left")
        return []

    calls = [(MODEL, "inference", small_call(op=name)) for name in ("attention", "layer_norm_mlp")]
    monkeypatch.setattr(on_gpu, "_calls", lambda: calls)
    monkeypatch.setattr(on_gpu, "measure_launches", measure)
    monkeypatch.setattr(on_gpu.tune, "CudaClock", FakeClock)
    monkeypatch.setattr(on_gpu.hardware, "current_arch", lambda: ARCHS["sm_90"])
    monkeypatch.setattr(on_gpu, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(roofline, "measure_ceilings", lambda *_: LIMITS)
    assert not on_gpu.profile(tmp_path, time.monotonic() + 600)
    assert "attention: not profiled, OutOfMemoryError: no memory left" in capsys.readouterr().out
    assert json.loads((tmp_path / "kernels.json").read_text())["finished"] is True


def test_ceilings_are_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(roofline, "measure_ceilings", lambda device, dtypes: LIMITS)
    assert on_gpu.ceilings(tmp_path, time.monotonic() + 1)
    written = json.loads((tmp_path / "ceilings.json").read_text())
    assert written == {"bytes_per_s": 1e12, "flops_per_s": {"bf16": 1e14}, "finished": True}
    assert "1.00 TB/s; bf16 100 TFLOP/s" in capsys.readouterr().out


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
    assert on_gpu.loaded(tmp_path, time.monotonic() - 1)
    assert json.loads((tmp_path / "loaded.json").read_text())["finished"] is False
    capsys.readouterr()
    assert not on_gpu.loaded(tmp_path, time.monotonic() + 60)
    written = json.loads((tmp_path / "loaded.json").read_text())
    assert written["finished"] is True
    assert [row["same"] for row in written["kernels"]] == [True, True, False]
    assert "3 of 3 kernels loaded; 1 differ" in capsys.readouterr().out


def test_arguments(capsys):
    assert on_gpu.main(["nothing"]) == 2
    assert "usage: on_gpu {ceilings,loaded,profile} FOLDER SECONDS" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert on_gpu.main(["profile", ".", "10"]) == 2
        assert "finds no GPU" in capsys.readouterr().err
    assert "fastvit.benchmarks.on_gpu" in sys.modules

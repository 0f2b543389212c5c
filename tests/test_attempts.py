"""What is fatal on a GPU is written down before it is tried, and left alone after."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastvit import attempts, decide, tune
from fastvit.attempts import Attempts, GpuLost


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tables" / "gpu.attempts.json"


@pytest.fixture
def lost(monkeypatch):
    """The GPU is gone from the first exception on."""
    monkeypatch.setattr(attempts, "gpu_is_lost", lambda: True)


def test_an_attempt_that_ends_leaves_nothing(path):
    tried = Attempts(path)
    with tried.trying("a"):
        assert path.with_suffix(".trying").read_text() == "a"
    with pytest.raises(ValueError), tried.trying("b"):
        raise ValueError
    with pytest.raises(KeyboardInterrupt), tried.trying("c"):
        raise KeyboardInterrupt
    assert tried.fatal == Attempts(path).fatal == {}
    assert list(path.parent.iterdir()) == []


def test_what_took_the_gpu_is_known_here_and_to_the_next_process(path, lost):
    tried = Attempts(path)
    with pytest.raises(GpuLost, match="a took the GPU from its process: RuntimeError: CUDA error"), tried.trying("a"):
        raise RuntimeError("CUDA error: an illegal memory access\nand more")
    assert list(tried.fatal) == list(Attempts(path).fatal) == ["a"]
    assert json.loads(path.read_text()) == tried.fatal


def test_a_lost_gpu_is_no_exception_that_a_candidates_handler_takes(lost):
    with pytest.raises(GpuLost):
        try:
            with Attempts().trying("a"):
                raise RuntimeError
        except Exception:
            pytest.fail("taken for the failure of one candidate")


@pytest.mark.parametrize("end", ["import os; os.kill(os.getpid(), 9)", "import time; time.sleep(600)"])
def test_what_ended_its_process_is_known_to_the_next(path, end):
    """Killed in the attempt; or, in a hang that it cannot hear of anything in, ended by the watchdog."""
    code = f"""
from pathlib import Path
from fastvit.attempts import Attempts
tried = Attempts(Path({str(path)!r}), watched=True)
with tried.trying("sound"):
    pass
with tried.trying("bad", 1.0):
    {end}
"""
    root = str(Path(__file__).parents[1])
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": root}, capture_output=True, text=True)
    assert time.monotonic() - start < 60
    if "sleep" in end:
        assert done.returncode == attempts.GPU_LOST and "bad did not end within 1 s" in done.stderr
    assert Attempts(path).fatal == {"bad": "ended the process that tried it"}
    assert Attempts(path).fatal == {"bad": "ended the process that tried it"}, "forgotten once it was read"


def test_without_a_place_to_write_they_last_as_long_as_the_object(tmp_path, lost):
    (tmp_path / "file").write_text("")
    for place in (None, tmp_path / "file" / "below.json"):
        tried = Attempts(place)
        with pytest.raises(GpuLost), tried.trying("a"):
            raise RuntimeError
        assert list(tried.fatal) == ["a"]


class Clock:
    def timer(self, runs, graph):
        return lambda: 1.0


def runs(*results):
    """Candidates by name a, b, ...: what each does."""

    def run(result):
        if isinstance(result, Exception):
            raise result
        return (torch.full((4,), result),)

    return {name: [lambda result=result: run(result)] for name, result in zip("abcd", results, strict=False)}


def measure(candidates, tried, **more):
    return decide.measure(candidates, torch.float32, 1, Clock(), attempts=tried, key="key", **more)


def test_the_tuner_leaves_out_what_was_fatal(path, lost):
    fatal = runs(1.0, RuntimeError("CUDA error"), 1.0)
    with pytest.raises(GpuLost, match="key: b took the GPU"):
        measure(fatal, Attempts(path))
    measured = measure(fatal, Attempts(path))  # as the next process does
    assert set(measured.times) == {"a", "c"} and measured.dropped["b"].startswith("took the GPU")
    assert measured.choice(fatal)[1]["dropped"] == measured.dropped


@pytest.mark.parametrize("in_place", [False, True])
def test_the_first_candidates_fault_is_not_laid_at_the_next_ones_door(path, monkeypatch, in_place):
    """CUDA tells of an illegal access when it is next waited for: that must be before another is tried."""
    broken = []

    def wait():
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(attempts, "_wait", wait)
    candidates = {"first": [lambda: broken.append(1) or (torch.ones(4),)], "second": [lambda: (torch.ones(4),)]}
    with pytest.raises(GpuLost, match="key: first took the GPU"):
        measure(candidates, Attempts(path), in_place=in_place)
    assert list(Attempts(path).fatal) == ["key: first"]


def test_a_fault_outside_any_attempt_condemns_nothing_and_goes_no_further(path, monkeypatch):
    monkeypatch.setattr(tune, "gpu_is_lost", lambda: True)
    monkeypatch.setattr(tune, "tune_call", lambda *_: (_ for _ in ()).throw(RuntimeError("CUDA error")))
    with pytest.raises(GpuLost, match="outside any attempt: RuntimeError: CUDA error"):
        tune.tune([None], torch.device("cpu"), Clock())


@pytest.mark.parametrize("name", ["key: a", "key: timing"])
def test_a_launch_whose_first_config_or_timing_was_fatal_is_given_up(name):
    tried = Attempts()
    tried.fatal[name] = "ended the process that tried it"
    with pytest.raises(RuntimeError, match="ended the process"):
        measure(runs(1.0, 1.0), tried)


def test_what_is_measured_beside_is_no_candidate():
    beside = {"library": [lambda: None], "absent": [lambda: None]}

    class Fussy(Clock):
        def timer(self, calls, graph):
            if calls is beside["absent"]:
                raise RuntimeError("no such back end\nat all")
            return lambda: 0.5 if calls is beside["library"] else 1.0

    candidates = runs(1.0, 1.0)
    measured = decide.measure(candidates, torch.float32, 1, Fussy(), beside=beside, rounds=9)
    assert set(measured.times) == {"a", "b", "library"} and len(measured.times["library"]) == 9
    assert measured.dropped == {"absent": "RuntimeError: no such back end"}
    assert measured.choice(candidates)[0] == "a"

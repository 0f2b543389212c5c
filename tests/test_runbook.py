"""The GPU runbook: steps in order, time shared out, nothing lost, nothing done twice. Its steps are scripts here."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fastvit.benchmarks import runbook
from fastvit.benchmarks.runbook import Step

from fastvit import cli

DONE = "import json, sys; json.dump({'finished': True}, open(sys.argv[1], 'w'))"
HALF = "import json, sys; json.dump({'finished': False}, open(sys.argv[1], 'w'))"


@pytest.fixture
def asked():
    """What each step was told: (name, seconds)."""
    return []


def step(asked, name, code, share=1.0):
    def command(folder, seconds):
        asked.append((name, seconds))
        return ["-c", code, str(folder / f"{name}.json")]

    return Step(name, "a script", share, command, f"{name}.json")


def states(found):
    return [state["state"] for state in found.values()]


def test_a_second_call_goes_on_where_the_first_stopped(asked, tmp_path):
    steps = (step(asked, "a", DONE), step(asked, "b", HALF), step(asked, "c", "raise SystemExit(1)"))
    assert states(runbook.run(steps, tmp_path, 60)) == ["done", "unfinished", "failed"]
    asked.clear()
    steps = (steps[0], step(asked, "b", DONE), step(asked, "c", DONE))
    assert states(runbook.run(steps, tmp_path, 60)) == ["kept", "done", "done"]
    assert [name for name, _ in asked] == ["b", "c"]
    assert states(json.loads((tmp_path / "runbook.json").read_text())) == ["kept", "done", "done"]


def test_time_that_a_step_leaves_goes_to_the_others(asked, tmp_path):
    steps = (step(asked, "a", DONE, 3), step(asked, "b", DONE, 1), step(asked, "c", DONE, 1))
    runbook.run(steps, tmp_path, 100)
    seconds = dict(asked)
    assert seconds["a"] == pytest.approx(0.85 * 60, rel=0.05)
    assert seconds["b"] == pytest.approx(0.85 * 50, rel=0.05)
    assert seconds["c"] == pytest.approx(0.85 * 100, rel=0.05)
    asked.clear()
    (tmp_path / "c.json").unlink()
    runbook.run(steps, tmp_path, 100)
    assert asked == [("c", pytest.approx(85, rel=0.05))], "time was kept for steps that have nothing to do"


def test_a_step_beyond_its_time_is_interrupted_then_killed_and_the_rest_runs(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(runbook, "GRACE", 0.5)
    polite = "import time, sys\ntry: time.sleep(60)\nexcept KeyboardInterrupt: open(sys.argv[1] + '.kept', 'w')"
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    steps = (step(asked, "a", polite, 2), step(asked, "b", deaf, 1), step(asked, "c", DONE, 1))
    start = time.monotonic()
    assert states(runbook.run(steps, tmp_path, 8)) == ["unfinished", "unfinished", "done"]
    assert time.monotonic() - start < 20
    assert (tmp_path / "a.json.kept").exists()


def test_no_step_starts_without_time_and_none_after_the_gpu_is_gone(asked, tmp_path):
    assert states(runbook.run((step(asked, "a", DONE),), tmp_path, 0.5)) == ["unfinished"]
    assert asked == []
    steps = (step(asked, "a", f"raise SystemExit({runbook.NO_GPU})"), step(asked, "b", DONE))
    assert states(runbook.run(steps, tmp_path, 60)) == ["failed"]


def test_a_results_file_that_is_none_is_not_finished(asked, tmp_path):
    a = step(asked, "a", DONE)
    for text in ("", "[]", "{}", '{"finished": false}', '{"finished": "yes"}'):
        (tmp_path / "a.json").write_text(text)
        assert not a.finished(tmp_path)


def test_the_whole_takes_less_than_nine_minutes():
    """Even if the last of the steps has to be killed."""
    assert runbook.BUDGET + runbook.GRACE <= 9 * 60


@pytest.mark.parametrize("found", runbook.STEPS, ids=lambda found: found.name)
def test_each_step_is_a_command_that_exists(found, tmp_path):
    """Its arguments are those that the command takes: without a GPU it says so, and nothing else."""
    command = found.command(tmp_path, 100.0)
    assert command[0] == "-m"
    if command[1] == "fastvit":
        cli._parser().parse_args(command[2:])
    if torch.cuda.is_available():
        return
    root = str(Path(__file__).parents[1])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON")}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment | {"PYTHONPATH": root}
    )
    assert done.returncode == runbook.NO_GPU
    assert "finds no GPU" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    assert runbook.main(["--output", str(tmp_path)]) == runbook.NO_GPU
    assert "finds no GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

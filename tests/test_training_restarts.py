"""Training runs that are killed, stopped, restarted and spread over processes."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
from training_runs import FULL, PLAIN, command, finish, kill, losses, start, trainer, wait_for, write_images


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """The losses of a run with everything random, and its weights at the end."""
    out = tmp_path_factory.mktemp("undisturbed")
    finish(start(command(data, out, FULL)))
    assert len(losses(out)) == 9
    return losses(out), (out / "step-9" / "model.safetensors").read_bytes()


def test_killed_and_started_again(data, tmp_path, undisturbed):
    """To the bit, from whatever checkpoint there is."""
    arguments = command(data, tmp_path, FULL, "--save-every", "2", "--keep", "2")
    run = start(arguments)
    wait_for(tmp_path / "step-4" / "state.json", run)
    kill(run)
    assert not (tmp_path / "step-9").exists()
    said = finish(start(arguments))
    assert "Going on after step" in said
    assert (losses(tmp_path), (tmp_path / "step-9" / "model.safetensors").read_bytes()) == undisturbed
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-8", "step-9"]

    other = trainer(data, tmp_path, FULL | {"lr": 1e-3})
    with pytest.raises(ValueError, match=r"is of a run with .*lr 0.003 \(now 0.001\).*--no-resume starts anew"):
        other.resume()
    again = trainer(data, tmp_path, FULL | {"epochs": 1})
    again.run()  # which was not asked to resume
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-3"] and len(losses(tmp_path)) == 3
    again = trainer(data, tmp_path, FULL | {"epochs": 1})
    again.resume()
    again.run()
    assert again.step == 3 and len(losses(tmp_path)) == 3  # nothing was left to do

    # Checkpoints are gone: what was trained is not replaced by another run, unless one says so.
    shutil.rmtree(tmp_path / "step-3")
    weights = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"is of a run with lr 0.003 \(now 0.001\).*--no-resume starts anew"):
        trainer(data, tmp_path, FULL | {"epochs": 1, "lr": 1e-3}).resume()
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match="has a model.safetensors of no run; --no-resume replaces it"):
        trainer(data, tmp_path, FULL | {"epochs": 1}).resume()
    assert (tmp_path / "model.safetensors").read_bytes() == weights


def test_asked_to_end_it_saves_first(data, tmp_path, undisturbed):
    arguments = command(data, tmp_path, FULL, "--save-every", "1000")
    run = start(arguments)
    wait_for(tmp_path / "run.json", run)
    run.send_signal(signal.SIGTERM)
    said = finish(run, 130)
    assert "which is saved: the same command goes on" in said
    assert "Going on after step" in finish(start(arguments))
    assert losses(tmp_path) == undisturbed[0]


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_are_one(data, tmp_path, parallel):
    """The same losses within rounding; and one goes on with what two have saved."""
    recipe = PLAIN | {"accumulate": 2, "clip_grad": 1.0}
    trainer(data, tmp_path / "one", recipe).run()
    often = ("--save-every", "4", "--keep", "9")
    two = command(data, tmp_path / "two", recipe, "--parallel", parallel, *often, processes=2)
    finish(start(two))
    want = losses(tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(want, rel=2e-5)
    for later in ("step-8", "step-9"):
        for file in (tmp_path / "two" / later).iterdir():
            file.unlink()
        (tmp_path / "two" / later).rmdir()
    assert "Going on after step 4 of 9" in finish(start(command(data, tmp_path / "two", recipe)))
    assert losses(tmp_path / "two") == pytest.approx(want, rel=2e-5)
    scores = [json.loads((tmp_path / name / "step-9" / "state.json").read_text())["best"] for name in ("one", "two")]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_torchrun_restarts_after_a_killed_worker(data, tmp_path):
    """All of them, from the last checkpoint, and the losses are those of an undisturbed run."""
    recipe = PLAIN | {"epochs": 8}
    trainer(data, tmp_path / "one", recipe).run()
    two = tmp_path / "two"
    run = start(command(data, two, recipe, "--save-every", "2", processes=2, restarts=1))
    wait_for(two / "step-4" / "state.json", run)
    worker = next(pid for pid in children(run.pid) if "train" in command_line(pid))
    signal_to(worker)
    said = finish(run)
    assert "Going on after step" in said
    assert losses(two) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        found = [int(child) for child in file.read().split()]
    return found + [further for child in found for further in children(child)]


def command_line(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read()


def signal_to(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)

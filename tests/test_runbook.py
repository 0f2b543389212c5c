"""The GPU runbook: steps in order, time shared out, nothing lost, nothing done twice. Its steps are scripts here;
test_rehearsal.py runs the real ones on a stand-in for a GPU."""

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from fastvit.benchmarks import on_gpu, runbook
from fastvit.benchmarks.runbook import Out, Step

from fastvit import cli

DONE = "import json, sys; json.dump({'finished': True}, open(sys.argv[1], 'w')); print('a line')"
HALF = "import json, sys; json.dump({'finished': False}, open(sys.argv[1], 'w'))"
# Ends without its result the first time, as a process does that lost its GPU.
TWICE = "import os, sys; seen = sys.argv[1] + '.seen'; os.path.exists(seen) or (open(seen, 'w'), sys.exit(3)); " + DONE
NAME = "some-gpu-abc"


@pytest.fixture
def asked():
    """What each step was told: (name, seconds)."""
    return []


@pytest.fixture
def out(tmp_path):
    return Out(tmp_path / "out", NAME)


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    return folder


def step(asked, name, code, share=1.0, **more):
    def command(folder, seconds):
        asked.append((name, seconds))
        return ["-c", code, str(folder / f"{name}.json")]

    return Step(name, "a script", share, command, f"{name}.json", **more)


def states(found):
    return [state["state"] for state in found.values()]


def test_a_second_call_goes_on_where_the_first_stopped(asked, results, out):
    todo = (step(asked, "a", DONE), step(asked, "b", HALF), step(asked, "c", "raise SystemExit(1)"))
    assert states(runbook.run(todo, results, 30, out)) == ["done", "unfinished", "failed"]
    asked.clear()
    todo = (todo[0], step(asked, "b", DONE), step(asked, "c", DONE))
    assert states(runbook.run(todo, results, 60, out)) == ["kept", "done", "done"]
    assert [name for name, _ in asked] == ["b", "c"]
    assert states(json.loads((results / "runbook.json").read_text())) == ["kept", "done", "done"]


def test_a_step_that_ends_early_is_started_again_while_there_is_time(asked, results, out):
    found = runbook.run((step(asked, "a", TWICE),), results, 60, out)
    assert (found["a"]["state"], found["a"]["starts"]) == ("done", 2)
    assert "== a: ended with status 3; goes on" in (out.folder / "gpu.log").read_text()
    found = runbook.run((step(asked, "b", "raise SystemExit(3)"),), results, 60, out)
    assert (found["b"]["state"], found["b"]["starts"]) == ("unfinished", runbook.MOST_AGAIN)
    found = runbook.run((step(asked, "d", "raise ValueError"),), results, 60, out)
    assert (found["d"]["state"], found["d"]["starts"]) == ("failed", 1), "what fails by itself was tried again"
    found = runbook.run((step(asked, "c", TWICE),), results, runbook.AGAIN - 1, out)
    assert (found["c"]["state"], found["c"]["starts"]) == ("unfinished", 1), "started again without the time for it"


def test_time_that_a_step_leaves_goes_to_the_others(asked, results, out):
    todo = (step(asked, "a", DONE, 3), step(asked, "b", DONE, 1), step(asked, "c", DONE, 1))
    runbook.run(todo, results, 100, out)
    seconds = dict(asked)
    assert seconds["a"] == pytest.approx(0.85 * 60, rel=0.05)
    assert seconds["b"] == pytest.approx(0.85 * 50, rel=0.05)
    assert seconds["c"] == pytest.approx(0.85 * 100, rel=0.05)
    asked.clear()
    (results / "c.json").unlink()
    runbook.run(todo, results, 100, out)
    assert asked == [("c", pytest.approx(85, rel=0.05))], "time was kept for steps that have nothing to do"


def test_a_step_beyond_its_time_is_interrupted_then_killed_and_the_rest_runs(asked, results, out, monkeypatch):
    monkeypatch.setattr(runbook, "GRACE", 0.5)
    polite = "import time, sys\ntry: time.sleep(60)\nexcept KeyboardInterrupt: open(sys.argv[1] + '.kept', 'w')"
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    todo = (step(asked, "a", polite, 2), step(asked, "b", deaf, 1), step(asked, "c", DONE, 1))
    start = time.monotonic()
    assert states(runbook.run(todo, results, 16, out)) == ["unfinished", "unfinished", "done"]
    assert time.monotonic() - start < 40
    assert (results / "a.json.kept").exists()


def test_a_step_that_says_nothing_is_taken_to_hang_and_started_again(asked, results, out, monkeypatch):
    monkeypatch.setattr(runbook, "GRACE", 0.5)
    monkeypatch.setattr(runbook, "STALL", 2.0)
    hangs = TWICE.replace("sys.exit(3)", "__import__('time').sleep(60)")
    found = runbook.run((step(asked, "a", hangs),), results, 60, out)
    assert (found["a"]["state"], found["a"]["starts"]) == ("done", 2)
    assert "== a: hung; goes on" in (out.folder / "gpu.log").read_text()
    talks = "import time\nfor i in range(6): print(i, flush=True); time.sleep(0.7)\n" + DONE
    found = runbook.run((step(asked, "b", talks),), results, 60, out)
    assert (found["b"]["state"], found["b"]["starts"]) == ("done", 1)


def test_no_step_starts_without_time(asked, results, out):
    assert states(runbook.run((step(asked, "a", DONE),), results, 0.5, out)) == ["unfinished"]
    assert asked == []


def test_a_results_file_that_is_none_is_not_finished(asked, results):
    a = step(asked, "a", DONE)
    for text in ("", "[]", "{}", '{"finished": false}', '{"finished": "yes"}'):
        (results / "a.json").write_text(text)
        assert not a.finished(results)


def test_what_a_step_prints_goes_to_the_log_and_its_variables_to_it(asked, results, out, capfd):
    code = "import os, sys; print(os.environ['MINE']); print('no newline', end='', file=sys.stderr); " + HALF
    runbook.run((step(asked, "a", code, environment={"MINE": "its own"}),), results, 10, out)
    log = (out.folder / "gpu.log").read_text()
    assert "\nits own\n" in log and "\nno newline\n" in log
    assert capfd.readouterr().out == log


def members(archive):
    with tarfile.open(archive) as tar:
        return sorted(tar.getnames())


def test_what_comes_home_is_few_files_and_a_later_call_takes_them_up(asked, results, out, tmp_path):
    (results / "tuned").mkdir()
    (results / "tuned" / "table.json").write_text("{}")
    runbook.run((step(asked, "a", DONE),), results, 30, out)
    assert sorted(path.name for path in out.folder.iterdir()) == ["gpu.log", f"{NAME}.tgz"]
    files = ["a.json", "runbook.json", "tuned/table.json"]
    assert members(out.archive) == [f"{NAME}/{name}" for name in files]
    for archive, elsewhere in ((None, out), (out.archive, Out(tmp_path / "elsewhere", NAME))):
        again = tmp_path / f"again-{elsewhere.folder.name}"
        again.mkdir()
        elsewhere.unpack(again, archive)
        assert sorted(path.relative_to(again).as_posix() for path in again.rglob("*") if path.is_file()) == files
        assert states(runbook.run((step(asked, "a", DONE),), again, 30, elsewhere)) == ["kept"]


def test_an_archive_of_another_device_or_commit_is_not_taken_up(results, out, tmp_path):
    (results / "a.json").write_text('{"finished": true}')
    out.pack(results)
    other, again = Out(tmp_path / "other", "another-gpu-abc"), tmp_path / "again"
    again.mkdir()
    other.unpack(again, out.archive)
    assert not list(again.iterdir())
    assert "is of another device or commit" in (other.folder / "gpu.log").read_text()


def test_the_archive_is_refreshed_while_a_step_runs(asked, results, out, monkeypatch):
    monkeypatch.setattr(runbook, "PACK_SECONDS", 0.5)
    archives = set()
    monkeypatch.setattr(runbook, "write_atomically", lambda path, data: archives.add(data))
    slow = "import sys, time; open(sys.argv[1] + '.part', 'w').write('x'); time.sleep(3); " + DONE
    runbook.run((step(asked, "a", slow),), results, 30, out)
    assert len(archives) >= 2


def test_what_is_tried_just_now_comes_home_only_once_its_process_has_ended(results, out):
    for name in ("table.attempts.trying", ".half-written", "table.json"):
        (results / name).write_text("x")
    out.pack(results, every=1e-9)
    assert members(out.archive) == [f"{NAME}/table.json"]
    out.pack(results)
    assert members(out.archive) == [f"{NAME}/table.attempts.trying", f"{NAME}/table.json"]


def test_an_archive_that_is_not_there_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        runbook.main(["--from", str(tmp_path / "absent.tgz")])
    assert left.value.code == 2 and "no such file" in capsys.readouterr().err


def test_the_whole_takes_less_than_nine_minutes():
    """Even if the last of the steps has to be killed."""
    assert runbook.BUDGET + runbook.GRACE <= 9 * 60


@pytest.mark.parametrize("found", runbook.steps(), ids=lambda found: found.name)
def test_each_step_is_a_command_that_exists(found, tmp_path):
    """Its arguments are those that the command takes: without a GPU it says so, and nothing else."""
    command = found.command(tmp_path, 100.0)
    assert command[0] == "-m"
    if command[1] == "fastvit":
        cli._parser().parse_args(command[2:])
    else:
        assert command[1:3] == ["fastvit.benchmarks.on_gpu", found.name] and found.name in on_gpu.MEASUREMENTS
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


def test_what_is_verified_and_timed_before_tuning_does_not_depend_on_it():
    tuned = {step.name: step.environment.get("FASTVIT_TUNING") for step in runbook.steps()}
    assert {name for name, mode in tuned.items() if mode == "off"} == {"verify", "models", "small"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    assert runbook.main(["--out", str(tmp_path / "out")]) == runbook.NO_GPU
    assert "finds no GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_archive_writes_nowhere_else(results, out, tmp_path):
    with tarfile.open(out.archive, "w:gz") as tar:
        for name in ("../../outside.json", "links/a.json"):
            member = tarfile.TarInfo(f"{out._name}/{name}")
            tar.addfile(member)
    again = tmp_path / "again"
    again.mkdir()
    with pytest.raises(ValueError, match="outside.json' lies outside of it"):
        out.unpack(again, None)
    assert not list(tmp_path.rglob("outside.json"))


def test_make_hands_its_variables_on():
    command = ["make", "-n", "gpu", "OUT=o", "FROM=f.tgz", "COMMIT=c", "BUDGET=9", "MODELS=m", "BATCH=2", "STEPS=a b"]
    root = Path(__file__).parents[1]
    # Without what `make test` itself tells its children.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=root, env=outside, capture_output=True, text=True, check=True).stdout
    words = re.sub(r"[\\\s]+", " ", done)
    assert words.strip().endswith('--out "o" --from "f.tgz" --commit "c" --budget 9 --models m --batch 2 --only a b')

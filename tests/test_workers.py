"""Tasks shared out over processes: every task has an outcome, whatever becomes of the process that has it."""

import os
import time

import pytest
from served import serve

from fastvit import workers


def outcomes(groups, count=2, seconds=30.0, deadline=None):
    return {outcome.task: outcome for outcome in workers.run(groups, serve, count, seconds, deadline)}


def test_each_task_is_done_once_and_a_group_stays_with_its_process():
    groups = [[f"ok:{group}{i}" for i in range(4)] for group in "ab"]
    found = outcomes(groups)
    assert set(found) == {task for group in groups for task in group}
    assert all(outcome.result[1] == task.partition(":")[2] for task, outcome in found.items())
    processes = [{found[task].result[0] for task in group} for group in groups]
    assert len(processes[0] | processes[1]) == 2
    assert len({found[group[0]].result[0] for group in groups}) == 2, "both groups began in one process"


def test_what_dies_takes_its_own_task_only():
    found = outcomes([["ok:1", "die:", "ok:2", "exit:", "ok:3"]], count=1)
    assert {task for task, outcome in found.items() if outcome.died} == {"die:", "exit:"}
    assert (
        found["die:"].died == "the process was killed by SIGSEGV" and found["exit:"].died == "the process ended with 7"
    )
    assert len({found[f"ok:{i}"].result[0] for i in (1, 2, 3)}) == 3


def test_what_does_not_end_is_killed_and_the_rest_goes_on():
    start = time.monotonic()
    found = outcomes([["hang:", "ok:1"], ["ok:2"]], seconds=8.0)
    assert found["hang:"].died == "did not end within 8 s"
    assert found["ok:1"].result and found["ok:2"].result
    assert time.monotonic() - start < 60


def test_a_process_that_is_not_fit_gets_no_other_task():
    found = outcomes([["spoil:1", "ok:2"]], count=1)
    assert found["spoil:1"].result[1] == "1" and found["spoil:1"].result[0] != found["ok:2"].result[0]


def test_past_the_deadline_nothing_is_started():
    assert outcomes([["ok:1", "ok:2"]], deadline=time.monotonic() - 1) == {}


@pytest.mark.parametrize("task", ["ok:1", "hang:"])
def test_no_process_outlives_the_iteration(task):
    running = workers.run([["ok:0", task]], serve, 1, 30.0)
    pid = next(running).result[0]
    running.close()
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}")

"""How long a run will take, and what is left out before it starts. With invented peaks; nothing is measured."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvit import cli

pytest.importorskip("PIL")
from fastvit.benchmarks import bench, command, plan, schema, suites  # noqa: E402
from fastvit.benchmarks.cases import Case  # noqa: E402
from fastvit.benchmarks.schema import Peaks  # noqa: E402

ROOT = Path(__file__).parent.parent
QUIET = plan.Pace()
TINY, BASE = "vit_tiny_patch16_224", "vit_base_patch16_224"
FP32, BF16 = torch.float32, torch.bfloat16
PEAKS = Peaks(4e10, {"fp32": 2e11, "bf16": 8e11, "fp16": 8e11})  # of two cores


def settings(*cases, **others):
    return suites.Settings("cpu", cases, **{"peers": ("reference",)} | others)


def make(chosen, spent=0.0, pace=QUIET, peaks=PEAKS):
    return plan.make(chosen, chosen.cases, peaks, spent, pace)


def default(**others):
    return replace(suites.settings("cpu", peers=("reference",)), **others)


def test_make_bench_measures_all_of_the_default_suite_on_two_cores():
    """With the peers and the limit of the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    (peers,), (limit,) = (
        re.findall(r"PEERS := (.*)", makefile),
        re.findall(r"fastvit bench .*--time-limit (\d+)", makefile),
    )
    chosen = suites.settings("cpu", peers=peers.split(","), time_limit=float(limit))
    assert BASE in {case.model for case in chosen.cases}
    schedule = make(chosen)
    assert list(schedule.rows) == [case.id for case in chosen.cases]
    assert not schedule.left_out


def test_what_does_not_fit_is_left_out_from_the_end_and_all_that_is_kept_fits():
    alone = make(default(interpreted=None))
    seconds = list(alone.rows.values())
    for kept in range(1, len(seconds) + 1):
        limit = plan.MARGIN * sum(seconds[:kept]) + alone.after + 1e-6
        schedule = make(default(interpreted=None, time_limit=limit))
        assert plan.MARGIN * sum(schedule.rows.values()) + schedule.after <= limit
        assert list(schedule.rows)[: min(kept, 4)] == list(alone.rows)[: min(kept, 4)]
        assert schedule.rows.keys() | schedule.left_out.keys() == alone.rows.keys()
    # The first row goes whatever it takes, so that resuming ends.
    assert len(make(default(time_limit=1e-3)).rows) == 1
    assert len(make(default(time_limit=150.0), spent=1e3).rows) == 1


def test_a_machine_that_is_slow_or_busy_takes_longer_and_measures_less():
    chosen = default(time_limit=150.0)
    whole = make(default()).seconds
    slow = Peaks(PEAKS.bytes_per_s / 3, {dtype: rate / 3 for dtype, rate in PEAKS.flops_per_s.items()})
    for pace, peaks in ((plan.Pace(python=3.0), slow), (plan.Pace(wait=0.5), PEAKS)):
        assert make(default(), 0.0, pace, peaks).seconds > 1.8 * whole
        assert make(chosen, 0.0, pace, peaks).left_out


def test_a_wait_between_kernels_is_that_of_a_call_not_of_its_size():
    """Threads of a busy machine wait for each other after every kernel: as long in a small model as in a large one."""
    quiet, busy = make(settings(Case(TINY, FP32, 8), Case(BASE, FP32, 1))), plan.Pace(wait=1.0)
    added = make(settings(Case(TINY, FP32, 8), Case(BASE, FP32, 1)), 0.0, busy)
    tiny, base = (added.rows[id] - quiet.rows[id] for id in quiet.rows)
    assert tiny / 2 < base < 2 * tiny


def test_what_a_row_holds_costs():
    one = Case(TINY, FP32, 8)

    def seconds(case=one, **others):
        return make(settings(case, **others)).seconds

    for more in (
        seconds(peers=("reference", "compiled")) - seconds(),  # has no models: takes no part
        seconds(peers=("reference", "flash-attn")) - seconds(),
    ):
        assert more == 0
    assert seconds(peers=()) < seconds() < seconds(replace(one, mode="training"))
    assert seconds() < seconds(seconds=50.0)
    assert seconds(interpreted=TINY) - seconds() > 10
    assert make(settings(one, peers=("reference", "flash-attn"))).entries == 2
    # The truth of a model and dtype is computed once, and the model is drawn once.
    twice = make(settings(one, replace(one, batch=7)))
    alone = make(settings(replace(one, batch=7)))
    assert twice.rows[alone_id := next(iter(alone.rows))] < alone.rows[alone_id]


def test_on_a_gpu_nothing_is_left_out_and_graphs_are_counted():
    chosen = replace(settings(Case(TINY, FP32, 1), Case(BASE, FP32, 256), seconds=10.0, time_limit=1.0), device="cuda")
    schedule = make(chosen, 0.0, plan.probe(chosen, PEAKS))
    assert (len(schedule.rows), schedule.left_out, schedule.compiling) == (2, {}, True)
    assert schedule.rows[chosen.cases[0].id] > 2.25 * 2 * 51 * 0.02


def test_a_gpu_is_told_that_the_limit_cuts_the_end_off(capsys):
    chosen = replace(settings(Case(TINY, FP32, 1)), device="cuda")
    for limit, told in ((1.0, True), (1e6, False), (None, False)):
        limited = replace(chosen, time_limit=limit)
        command._tell(make(limited), limited)
        assert ("cuts the end off" in capsys.readouterr().err) == told


def test_the_probe_sees_a_slow_machine(monkeypatch):
    took = iter([plan.CREATE_SECONDS * factor for factor in (9, 4, 9)] + [1.0] * 5)
    monkeypatch.setattr(plan, "_seconds", lambda call: next(took))
    pace = plan.probe(settings(Case(TINY, FP32, 8)), PEAKS)
    assert pace.python == pytest.approx(4.0)
    assert pace.wait == pytest.approx(1.0 - plan._call_seconds(Case(TINY, FP32, 1), PEAKS))
    took = iter([1e-9] * 8)
    assert plan.probe(settings(Case(TINY, FP32, 8)), PEAKS) == plan.Pace()


def test_a_run_names_what_is_left_out_and_resuming_measures_it(monkeypatch, tmp_path, capsys):
    """The first row alone fits; nothing of it is a failure, and three calls are done with all."""
    measured = []

    def row(self, case, peaks):
        measured.append(case.batch)
        return bench._row(case, peaks)

    monkeypatch.setattr(bench.Bench, "row", row)
    monkeypatch.setattr(bench.roofline, "measure_peaks", lambda *_: PEAKS)
    monkeypatch.setattr(plan, "probe", lambda *_: plan.Pace())
    monkeypatch.setattr("fastvit.benchmarks.report.write", lambda run, folder: [])
    typed = ["bench", "--device", "cpu", "--models", TINY, "--dtypes", "fp32", "--batches", "1,2,3"]
    typed += ["--peers", "reference", "--time-limit", "1", "-o", str(tmp_path)]
    assert cli.main(typed) == 0
    printed = capsys.readouterr().err
    assert ": 1 case, 2 entries each." in printed
    assert f"  {TINY}/fp32/b2/inference, about " in printed and f"  {TINY}/fp32/b3/inference, about " in printed
    command = printed.splitlines()[-1].partition(": ")[2]
    assert command == shlex.join(["fastvit", *typed, "--resume"])
    run = schema.load(tmp_path / "bench.json")
    assert (len(run.rows), run.finished) == (1, False)
    assert list(run.extra["left_out"]) == [f"{TINY}/fp32/b{batch}/inference" for batch in (2, 3)]
    for _ in range(2):
        assert cli.main(shlex.split(command)[1:]) == 0
    assert measured == [1, 2, 3]
    run = schema.load(tmp_path / "bench.json")
    assert (len(run.rows), run.finished, "left_out" in run.extra) == (3, True, False)
    assert "Left out" not in capsys.readouterr().err.rpartition("This will take")[2]

"""Single launches beside the library's equivalents, as far as they can be told without a GPU: in the interpreter, with
a clock that is told what everything takes."""

import json
import math
import time

import pytest
import torch
from fastvit.benchmarks import micro
from fastvit.benchmarks.static import estimate
from fastvit.kernels import tiles
from fastvit.kernels.launch import choice, cost
from fastvit.kernels.launch.absent import target_of, without_gpu
from fastvit.kernels.launch.hardware import ARCHS
from fastvit.kernels.launch.request import GemmConfig, Product, Request, TmaConfig
from fastvit.kernels.launch.search import search_space

from fastvit import dispatch, ops, tune, tuned  # noqa: F401, the ops register themselves
from fastvit.attempts import Attempts
from fastvit.calls import calls_of
from fastvit.dispatch import interpreting
from fastvit.models.registry import model_entry

pytestmark = pytest.mark.skipif(not interpreting(), reason="with a GPU, `make gpu` runs it")

MODEL = "vit_tiny_patch16_224"
CPU, ARCH, RATES = torch.device("cpu"), ARCHS["sm_90"], cost.Rates(1e14, 1e12)


class Clock:
    """A config of ours takes as many microseconds as its tile has rows, the library's ways 100."""

    def timer(self, runs, graph):
        for run in runs:
            run()
        config = next((arg for arg in getattr(runs[0], "args", ()) if isinstance(arg, GemmConfig)), None)
        seconds = 1e-4 if config is None else 1e-6 * config.BLOCK_M
        return lambda: seconds


@pytest.fixture
def table(tmp_path, monkeypatch):
    found = tuned.Table({}, tmp_path / "table.json")
    monkeypatch.setitem(tuned._tables, CPU, found)
    return found


def small_call(op=dispatch.OPS["layer_norm_linear"], shapes=((2, 35, 64), (64,), (64,), (72, 64), (72,)), more=(1e-6,)):
    tensors = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    return tune.Call.like(op, (*tensors, *more))


def rows_of(call, known=None, deadline=math.inf):
    known = {} if known is None else known
    found = micro.measure_launches(call, CPU, ARCH, RATES, Attempts(), deadline, known, Clock())
    return {row["launch"].partition(": ")[2]: row for row in found}


def test_every_launch_is_measured_with_every_config_beside_the_library(table):
    rows = rows_of(small_call())
    assert [row["direction"] for row in rows.values()] == [
        "layer_norm_statistics",
        "forward",
        "weight gradient",
        "column_sum",
        "input gradient",
        "layer_norm_backward",
    ]
    key = "gemm 70x72x64 bfloat16 normalised matrix linear"
    row = rows[key]
    product = Product(tiles.NORMALISED, tiles.MATRIX, tiles.LINEAR, None, *[torch.bfloat16] * 3)
    request = Request("gemm", (70, 72, 64), torch.bfloat16, product)
    assert request.key == key
    space = search_space(request, ARCH, 132)
    assert len(row["configs"]) == len(space) > 5 and not row["dropped"]
    assert row["seconds"] == min(entry["seconds"] for entry in row["configs"]) == 64e-6
    assert row["best"].startswith("64x") and row["heuristic_seconds"] == 1e-6 * space[0].BLOCK_M
    needs = cost.request_cost(request)
    assert row["bound_seconds"] == cost.bound_seconds(needs, RATES) > 0
    assert row["library"] == {"library mm": 1e-4, "library addmm": 1e-4, "twin": 1e-4}
    assert set(rows["gemm 70x64x72 bfloat16 matrix matrix input_gradient tma"]["library"]) == {"library mm", "twin"}
    partial = next(row for key, row in rows.items() if " sums" in key)
    assert set(partial["library"]) == {"library mm", "twin"}
    # What it decided is the tuner's.
    assert set(table.configs) == set(rows)
    assert table.configs[key][0].choice["GemmConfig"]["BLOCK_M"] == 64
    json.dumps(rows, allow_nan=False)


def test_a_launch_that_is_known_is_not_measured_again(table):
    rows = rows_of(small_call())
    known = {row["launch"]: row for row in rows.values()}
    assert rows_of(small_call(), known, deadline=time.monotonic() - 1) == {}
    renamed = {f"other op: {key}": row | {"launch": f"other op: {key}"} for key, row in rows.items()}
    again = rows_of(small_call(), renamed, deadline=time.monotonic() - 1)
    assert {key: row["seconds"] for key, row in again.items()} == {key: row["seconds"] for key, row in rows.items()}
    with pytest.raises(tune.OutOfTime):
        rows_of(small_call(), deadline=time.monotonic() - 1)


def explained(call, rows, deadline=math.inf):
    known = {row["launch"]: row for row in rows.values()}
    found = micro.explanations(call, CPU, ARCH, Attempts(), deadline, known, Clock())
    return {row["request"]: without for row, without in found}


@pytest.mark.slow
def test_the_best_config_is_tried_without_its_parts(table):
    rows = rows_of(small_call())
    found = explained(small_call(), rows)
    assert {key: set(without) for key, without in found.items() if without} == {
        "gemm 70x72x64 bfloat16 normalised matrix linear": {"no prologue", "no epilogue", "plain"},
        "gemm 72x64x70 bfloat16 matrix normalised sums out=float32": {"no prologue"},
    }
    assert set(found) == set(rows)
    for row in rows.values():
        row["without"] = {}
    assert explained(small_call(), rows) == {}, "what is explained was explained again"
    del rows["gemm 70x72x64 bfloat16 normalised matrix linear"]["without"]
    with pytest.raises(tune.OutOfTime):
        explained(small_call(), rows, time.monotonic() - 1)


def test_the_loop_by_tma_takes_products_without_their_parts(table):
    """Forward, and of an input's gradient, whose right operand lies the other way."""
    for parts, names in (
        ((tiles.NORMALISED, tiles.MATRIX, tiles.LINEAR), {"no prologue", "plain"}),
        ((tiles.SCALED, tiles.MATRIX, tiles.INPUT_GRADIENT), {"no prologue"}),
    ):
        product = Product(*parts, None, *[torch.bfloat16] * 3)
        found = micro.lesser_products(Request("gemm", (70, 72, 64), torch.bfloat16, product), CPU)
        found.pop("no epilogue", None)  # whose prologue computes, which is no loop's by TMA
        assert found.keys() == names
        for launch in found.values():
            assert launch(TmaConfig(64, 64, 16, 4, 2, SUBTILES=1))[0].isfinite().all()


@pytest.mark.slow
def test_attention_is_tried_at_other_lengths(table):
    call = small_call(dispatch.OPS["attention"], ((1, 21, 3, 1, 16),), (0.25, None, None, 0.0, None, None, False, None))
    rows = rows_of(call)
    assert list(rows) == [
        f"attention_{name} 1x21x1x16 bfloat16" for name in ("forward", "backward_dq", "backward_dkdv")
    ]
    assert all(set(without) == {"192 tokens", "256 tokens"} for without in explained(call, rows).values())


@pytest.mark.parametrize("op", ["layer_norm_mlp", "linear_residual", "patch_embed", "layer_norm"])
def test_products_without_their_parts_are_the_same_products(op, table):
    """Every launch of a real model's step: its lesser forms have its shape and dtype, and less to do."""
    calls = calls_of(model_entry(MODEL).config, 1, torch.bfloat16, "training")
    call = next(call for call in calls if call.op.name == op)
    for request in tune.planned(call, ARCH):
        if request.kernel != "gemm":
            continue
        shown = []
        watch = choice.watching(lambda lesser, run, shown=shown: shown.append(lesser))
        with without_gpu(target_of(ARCH), lambda *args, **kwargs: None), watch:
            names = set(micro.lesser_products(request, CPU))
        left, right, epilogue, *_ = request.parts
        of_patches = {"patches", "gathered_patches"} & {left.name, right.name} or epilogue.name == "tokens"
        expected = set()
        if not of_patches and epilogue.sums:
            expected = {"no prologue"} if right is tiles.NORMALISED else set()
        elif not of_patches:
            expected |= {"no prologue"} if left is not tiles.MATRIX else set()
            expected |= {"no epilogue"} if epilogue is not tiles.INPUT_GRADIENT else set()
            expected |= {"plain"} if len(expected) == 2 else set()
        assert names == expected, request.key
        # `watching` of the capture hides them from this one: what is shown must not be tuned.
        assert shown == []


def test_both_backward_kernels_of_attention_stand_beside_one_pass(table):
    launches = list(
        rows_of(
            small_call(
                dispatch.OPS["attention"], ((1, 21, 3, 1, 16),), (0.25, None, None, 0.0, None, None, False, None)
            )
        ).values()
    )
    forward, dq, dkdv = launches
    merged = micro.merged(launches)
    assert len(merged) == 2 and merged[0] == forward
    assert merged[1]["seconds"] == dq["seconds"] + dkdv["seconds"] and merged[1]["library"] == dq["library"]
    assert micro.short(merged[1]) == "attention backward 1x21x1x16"


def test_the_table_and_the_line_say_what_was_measured(table, capsys):
    rows = list(rows_of(small_call()).values())
    micro.table(rows)
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("layer_norm_linear forward 70x72x64"))
    assert line.split()[3:7] == ["64", "64", "100", "0.64"]
    assert printed.splitlines()[-1].startswith("all ")
    assert "64 us (64x" in micro.line(rows[1]) and "library: twin 100, mm 100, addmm 100" in micro.line(rows[1])


@pytest.fixture
def calls(monkeypatch):
    """Two ops in place of a model's."""
    found = [
        small_call(),
        small_call(dispatch.OPS["attention"], ((1, 21, 3, 1, 16),), (0.25, None, None, 0.0, None, None, False, None)),
    ]
    monkeypatch.setattr(micro, "calls_of", lambda *_: found)
    monkeypatch.setattr(micro.hardware, "current_arch", lambda: ARCH)
    return found


def run(folder, deadline=math.inf, batch=2, clock=None):
    return micro.run(folder, deadline, MODEL, batch, RATES, CPU, clock or Clock())


@pytest.mark.slow
def test_the_file_is_what_the_static_report_reads_and_a_second_call_goes_on(calls, tmp_path, table, capsys):
    folder = tmp_path / "some-gpu" / "abc"
    folder.mkdir(parents=True)
    assert run(folder, time.monotonic() - 1)
    written = json.loads((folder / "micro.json").read_text())
    assert (written["finished"], written["launches"]) == (False, [])
    assert "no time for the rest" in capsys.readouterr().out
    assert run(folder)
    written = json.loads((folder / "micro.json").read_text())
    assert written["finished"] is True and len(written["launches"]) == 9
    assert "layer_norm_linear forward 70x72x64" in capsys.readouterr().out
    (times,) = estimate.measurements(tmp_path, "sm_90").values()
    assert len(times) == sum(len(row["configs"]) for row in written["launches"])
    assert estimate.measurements(tmp_path, "sm_80") == {}
    assert run(folder, clock="none that is asked"), "what was measured was measured again"
    assert micro._before(folder / "micro.json", "sm_90", MODEL, 3) == {}, "another batch's rows are not this one's"


def test_an_op_that_cannot_be_measured_stops_no_other(calls, monkeypatch, tmp_path, table, capsys):
    found = micro.tune.launches_of

    def launches_of(call, *rest):
        if call is calls[0]:
            raise torch.OutOfMemoryError("no memory left")
        return found(call, *rest)

    monkeypatch.setattr(micro.tune, "launches_of", launches_of)
    assert not run(tmp_path)
    written = json.loads((tmp_path / "micro.json").read_text())
    assert written["failed"] == ["layer_norm_linear: OutOfMemoryError: no memory left"]
    assert written["finished"] is False
    assert {row["op"] for row in written["launches"]} == {"attention"}

"""The tuner and its command, with a clock that is told what everything costs."""

import json
import os
import random
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from fastvit.kernels.launch import choice, hardware
from fastvit.kernels.launch.request import CONFIGS, Request, Rows
from tuning import CPU, IDENTITY, FakeClock, attention_call, norm_call, price_of

from fastvit import calls, cli, dispatch, ops, tune, tuned
from fastvit.models.registry import model_entry


def test_a_call_is_tuned_launch_by_launch_then_as_a_whole(table):
    eight_warps = FakeClock(price_of(lambda bound: getattr(bound, "num_warps", 0) == 8))
    said = []
    tune.tune_call(norm_call(grad=True), CPU, eight_warps, said.append)
    kernels = {key.split()[0]: entry for key, (entry, _) in table.configs.items()}
    assert set(kernels) == {"layer_norm_forward", "layer_norm_backward"}
    for entry in kernels.values():
        assert entry.choice["RowConfig"]["num_warps"] == 8 and "num_warps=4" in entry.incumbent
        assert not entry.dropped
    ((key, (segment, _)),) = table.ops.items()
    assert key == "layer_norm float32[2x21x24]+grad float32[24] float32[24]"
    assert (segment.choice, set(segment.seconds), segment.dropped) == ("triton", {"triton", "torch"}, {})
    assert len(said) == 3 and "is 2.00 times as fast as" in said[0] and "triton stays" in said[2]
    request = Request("layer_norm_forward", (42, 24), torch.float32, Rows())
    assert choice.choose(request, CPU).num_warps == 8
    assert tuned.load(IDENTITY).ops.keys() == {key}  # and so for the next process


def test_a_second_run_measures_nothing(table, monkeypatch):
    tune.tune_call(norm_call(), CPU, FakeClock(price_of(lambda bound: False)))
    monkeypatch.setitem(tuned._tables, CPU, tuned.load(IDENTITY))
    clock = FakeClock(None)
    assert tune.tune([norm_call()], CPU, clock) == 0
    assert not clock.timed
    tune.tune_call(norm_call(grad=True), CPU, clock := FakeClock(price_of(lambda bound: False)))
    assert clock.timed  # other gradients, another call
    timed = {getattr(run.args[0], "num_warps", None) for run in clock.timed}
    assert timed


@pytest.mark.parametrize("stop", [KeyboardInterrupt, tune.OutOfTime])
def test_what_was_decided_before_an_interruption_is_kept(table, stop, monkeypatch):
    said = []

    def say(line):
        said.append(line)
        if stop is KeyboardInterrupt and len(said) == 2:
            raise KeyboardInterrupt

    now = iter([0.0, 0.0 if stop is KeyboardInterrupt else 99.0])
    monkeypatch.setattr(tune, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
    with pytest.raises(stop):
        tune.tune([norm_call(grad=True)], CPU, FakeClock(price_of(lambda bound: False)), say, deadline=10.0)
    kept = tuned._read(table.path, IDENTITY, ())
    assert len(kept.configs) == len(said) == (2 if stop is KeyboardInterrupt else 1) and not kept.ops


def test_a_call_that_fails_is_said_and_the_rest_goes_on(table):
    def price(run):
        if "RowConfig" in str(run.args[0]):
            raise RuntimeError("illegal memory access\nmore")
        return 1.0

    said = []
    assert tune.tune([norm_call()], CPU, FakeClock(price), said.append) == 0
    assert said[0].endswith("not tuned, RuntimeError: illegal memory access") and "triton stays" in said[1]

    def none(run):
        raise ZeroDivisionError("no device")

    assert tune.tune([norm_call(grad=True), attention_call()], CPU, FakeClock(none), said.append) == 2


def test_attention_is_measured_against_every_back_end_of_sdpa(table):
    flash = dispatch.OPS["attention"].others["sdpa flash"]
    clock = FakeClock(price_of(lambda bound: bound is flash))
    tune.tune_call(attention_call(grad=True), CPU, clock)
    assert {key.split()[0] for key in table.configs} == {
        "attention_forward",
        "attention_backward_dq",
        "attention_backward_dkdv",
    }
    ((segment, _),) = table.ops.values()
    assert segment.choice == "sdpa flash"
    # On a CPU, these two are not there.
    assert set(segment.dropped) == {"sdpa efficient", "sdpa cudnn"}
    assert set(segment.seconds) == {"triton", "torch", "sdpa flash", "sdpa math"}


def test_the_users_random_numbers_and_tensors_are_left_alone(table):
    x = torch.randn(2, 21, 24)
    call = tune.Call.like(dispatch.OPS["layer_norm"], (x, torch.ones(24), torch.zeros(24), 1e-6))
    assert all(a.is_meta for a in call.args[:3])
    state = torch.get_rng_state(), random.getstate()
    tune.tune_call(call, CPU, FakeClock(price_of(lambda bound: False)))
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]


def test_calls_of_a_model():
    config = model_entry("vit_tiny_patch16_224").config
    inference, training = (calls.calls_of(config, 8, torch.bfloat16, mode) for mode in calls.MODES)
    names = {call.op.name for call in inference}
    assert names == set(ops.OPS) - {"attention_varlen"} and len(inference) == len(names)
    attention = next(call for call in inference if call.op.name == "attention")
    assert attention.args[0].shape == (8, 197, 3, 3, 64) and attention.args[0].dtype == torch.bfloat16
    assert not any(a.requires_grad for call in inference for a in call.args if isinstance(a, torch.Tensor))
    attention = next(call for call in training if call.op.name == "attention")
    assert attention.args[0].requires_grad
    with pytest.raises(ValueError, match="mode is 'fast', expected one of inference, training"):
        calls.calls_of(config, 8, torch.bfloat16, "fast")


def test_a_residual_that_is_the_input_stays_the_input():
    """As every block has it: the kernels fuse its gradient, so another launch is to be tuned."""
    found = calls.calls_of(model_entry("vit_tiny_patch16_224").config, 1, torch.float32, "training")
    mlp = next(call for call in found if call.op.name == "layer_norm_mlp")
    requests = tune.planned(mlp, hardware.ARCHS["sm_90"])
    (backward,) = (request for request in requests if request.kernel == "layer_norm_backward")
    assert backward.parts.residual
    x, *_ = args = [torch.randn(2, 8), *(torch.ones(n) for n in (8, 8)), torch.ones(4, 8), None, torch.ones(8, 4)]
    given = [*args, None, 1e-6, "gelu"]
    own, other = (mlp.op.key([*given, residual, None, None]) for residual in (x, x.clone()))
    assert own == other.replace(" gelu float32[2x8]", " gelu first") != other


# --------------------------------------------------------------------------------------------------------------------
# The command


def fastvit_tune(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "fastvit", "tune", *arguments],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )


def test_dry_run_lists_requests_and_candidates_without_a_gpu():
    small = ("--models", "vit_tiny_patch16_224", "--batches", "8", "--device", "cpu", "--dry-run")
    done = fastvit_tune(*small, "--arch", "sm_90")
    assert (done.returncode, done.stderr) == (0, "")
    assert "attention: triton, torch, sdpa flash, sdpa efficient, sdpa cudnn, sdpa math" in done.stdout
    blocks = re.split(r"\n  (?! )", done.stdout)[1:]
    assert {block.split()[0] for block in blocks} == set(CONFIGS)
    assert all(2 <= block.count("Config ") <= tune.KEEP + 2 for block in blocks)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it would tune")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET")
    for arguments, message in {
        (): "tuning measures on a GPU, and there is none here",
        ("--arch", "sm_90"): "--arch is for --dry-run",
        ("--dry-run", "--arch", "sm_1"): "unknown architecture 'sm_1', expected one of sm_80,",
        ("--dry-run", "--models", "vit_none"): "unknown model 'vit_none'",
    }.items():
        assert cli.main(["tune", "--batches", "1", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("fastvit tune: error: ") and message in error and error.count("\n") == 1
    assert cli.main(["tune", "--show"]) == 0
    assert "no table is in force" in capsys.readouterr().out


def test_tune_reports_and_stops_in_time(table, tmp_path, monkeypatch, capsys):
    """The command as on a GPU, with a clock that measures nothing."""
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr("fastvit.commands._common.checked_device", lambda asked: "cuda")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("fastvit.environment.environment", lambda device: {"device": "Some GPU"})
    for device in (torch.device("cuda"), torch.device("cuda", 0)):
        monkeypatch.setitem(tuned._tables, device, table)
    monkeypatch.setattr(tune, "CudaClock", lambda: None)
    given = {}

    def fake(calls, device, clock, say, deadline):
        given.update(calls=calls, deadline=deadline)
        table.record("ops", "attention x", tuned.Entry("torch", "torch", {"torch": [1e-6, 1e-6, 1e-6]}))
        say("attention x: torch stays")
        if len(given["calls"]) > 7:
            raise tune.OutOfTime
        return failed

    failed = 1
    monkeypatch.setattr(tune, "tune", fake)
    output = tmp_path / "tune.json"
    small = [
        "tune",
        "--models",
        "vit_tiny_patch16_224",
        "--batches",
        "8",
        "--modes",
        "inference",
        "--json",
        str(output),
    ]
    assert cli.main(small) == 1  # one call failed
    out, err = capsys.readouterr()
    assert out == "attention x: torch stays\n" and str(table.path) in err
    assert len(given["calls"]) == 7
    written = json.loads(output.read_text())
    assert not written["finished"] and written["decisions"] == ["attention x: torch stays"]
    failed = 0
    assert cli.main(small) == 0
    assert json.loads(output.read_text())["finished"] is True
    capsys.readouterr()
    assert cli.main([*small, "--dtypes", "bf16,fp32", "--time-limit", "5"]) == 0
    assert "time limit of 5 s was reached; another run goes on" in capsys.readouterr().err
    assert not json.loads(output.read_text())["finished"]
    assert cli.main(["tune", "--show"]) == 0
    out = capsys.readouterr().out
    assert str(table.path) in out and "attention x\n  torch: torch 1.0 us" in out


def test_info_names_the_tables_in_force(table, capsys):
    assert cli.main(["info", "--device", "cpu"]) == 0
    assert "none in force; kept in " in capsys.readouterr().out
    table.record("ops", "attention x", tuned.Entry("torch", "torch", {"torch": [1e-6, 1e-6, 1e-6]}))
    assert cli.main(["info", "--device", "cpu"]) == 0
    assert re.search(rf"{table.path} +0 configs, 1 ops; fake, driver fake", capsys.readouterr().out)

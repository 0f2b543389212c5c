"""The tuner's logic, with a clock that is told what everything costs; and that ops follow what was recorded."""

import contextlib
import functools
import inspect
import itertools
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

import fastvit
from fastvit import calls, cli, decide, dispatch, ops, precompile, report, tune, tuned
from fastvit.models.registry import model_entry
from fastvit.ops import _common

CPU = torch.device("cpu")
IDENTITY = dict.fromkeys(("device", "capability", "driver", "torch", "triton", "kernels"), "fake")


class FakeClock:
    """Measures nothing: `price(run)` seconds, with noise."""

    def __init__(self, price, sigma=1e-3, captures=True):
        self.price, self.sigma, self.captures = price, sigma, captures
        self.timed = []

    def timer(self, runs, graph):
        if graph and not self.captures:
            raise RuntimeError("cannot be captured")
        self.timed.append(runs[0])
        seconds, draw = self.price(runs[0]), random.Random(len(self.timed))
        return lambda: seconds * draw.lognormvariate(0, self.sigma)


# --------------------------------------------------------------------------------------------------------------------
# One decision

TRUTH = torch.arange(1.0, 65.0)


def candidate(seconds, result=TRUTH):
    def run():
        if isinstance(result, Exception):
            raise result
        return (result.clone(),)

    run.seconds = seconds
    return [run]


def decided(sigma=1e-3, captures=True, **candidates):
    clock = FakeClock(lambda run: run.seconds, sigma, captures)
    return *decide.measure(candidates, torch.float32, 1, clock).choice(candidates), clock


@pytest.mark.parametrize(
    "challenger, sigma, winner",
    [
        (1 / 1.01, 1e-3, "ours"),  # by 1 %, beyond doubt: not worth it
        (1 / 1.03, 5e-2, "ours"),  # by 3 %, but in doubt
        (1 / 1.03, 1e-3, "theirs"),
        (1 / 1.05, 5e-3, "theirs"),
        (1.05, 5e-3, "ours"),
        (1.0, 5e-3, "ours"),
    ],
)
def test_a_challenger_must_win_clearly(challenger, sigma, winner):
    name, evidence, _ = decided(sigma, ours=candidate(1.0), theirs=candidate(challenger))
    assert name == winner
    assert set(evidence["seconds"]) == {"ours", "theirs"} and evidence["incumbent"] == "ours"
    low, median, high = evidence["seconds"]["theirs"]
    assert low < median < high and median == pytest.approx(challenger, rel=3 * sigma)


def test_quartiles_must_lie_apart_even_where_pairs_agree():
    incumbent = [1.0 + 0.1 * (i % 10) for i in range(50)]
    assert not decide.beats([t / 1.03 for t in incumbent], incumbent)
    assert decide.beats([t / 2 for t in incumbent], incumbent)
    assert not decide.beats([0.5] * 7, [1.0] * 7)  # too few rounds to call anything


def test_the_fastest_of_several_winners():
    name, *_ = decided(a=candidate(1.0), b=candidate(0.9), c=candidate(0.5), d=candidate(0.7))
    assert name == "c"


def test_what_is_wrong_is_never_timed():
    bad = TRUTH.clone()
    bad[3] *= 1.01
    name, evidence, clock = decided(
        ours=candidate(1.0),
        wrong=candidate(0.1, bad),
        nan=candidate(0.1, torch.full_like(TRUTH, float("nan"))),
        short=candidate(0.1, TRUTH[:-1]),
        half=candidate(0.1, TRUTH.half()),
        raising=candidate(0.1, RuntimeError("out of resource\nlong story")),
        none=candidate(0.1, RuntimeError()),
    )
    assert name == "ours"
    assert [run.seconds for run in clock.timed] == [1.0]
    dropped = evidence["dropped"]
    assert set(dropped) == {"wrong", "nan", "short", "half", "raising", "none"}
    assert dropped["wrong"].startswith("result 0 is wrong: off by") and "not finite" in dropped["nan"]
    assert dropped["raising"] == "RuntimeError: out of resource" and dropped["none"] == "RuntimeError: (no message)"


def test_what_rounding_explains_is_not_wrong():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        want = torch.randn(64, 64).to(dtype)
        near = (want.double() * (1 + torch.finfo(dtype).eps)).to(dtype)
        assert not decide.mismatch([near], [want], dtype, 1)
        row = want.clone()
        row[5, 7] = row[5, 7] + 1  # one element of 4096
        assert "off by" in decide.mismatch([row], [want], dtype, 1)
    with_infinity = torch.tensor([1.0, float("inf")])
    assert not decide.mismatch([with_infinity], [with_infinity.clone()], torch.float32, 1)


def test_the_incumbents_failure_is_no_decision():
    with pytest.raises(RuntimeError, match="no kernel"):
        decided(ours=candidate(1.0, RuntimeError("no kernel")), theirs=candidate(1.0))


def test_without_graphs_all_are_timed_alike():
    name, evidence, clock = decided(captures=False, ours=candidate(1.0), theirs=candidate(0.5))
    assert (name, evidence["graph"]) == ("theirs", False)
    assert "without graphs" in str(tuned.Entry(name, **evidence))


def test_candidates_that_write_into_one_buffer():
    buffer = torch.empty(8)

    def writes(value, upto=8):
        def run():
            buffer[:upto] = value
            return (buffer,)

        run.seconds = 1.0
        return [run]

    candidates = {"ours": writes(1.0, 7), "same": writes(1.0, 7)}  # neither writes the last
    candidates |= {"nothing": writes(0.0, 0), "less": writes(1.0, 6), "wrong": writes(2.0, 7)}
    clock = FakeClock(lambda run: run.seconds)
    measured = decide.measure(candidates, torch.float32, 1, clock, in_place=True)
    assert set(measured.dropped) == {"nothing", "less", "wrong"}
    assert (buffer[:7] == 1).all()  # and what others may read is as it was


def test_rounds_are_shuffled():
    order = []
    timers = {name: functools.partial(lambda name: order.append(name) or 1.0, name) for name in "abc"}
    measured = decide.interleave(timers)
    rounds = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) == 6
    assert {len(times) for times in measured.values()} == {decide.ROUNDS}


# --------------------------------------------------------------------------------------------------------------------
# A call


@pytest.fixture
def table(tmp_path, monkeypatch):
    """An empty table for the interpreter's device, in force, kept in a file."""
    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path))
    table = tuned.load(IDENTITY)
    monkeypatch.setitem(tuned._tables, CPU, table)
    monkeypatch.setattr(tune, "KEEP", 2)
    monkeypatch.setattr(tune, "MAX_COPIES", 2)
    choice.set_table(tuned.lookup)
    yield table
    choice.set_table(tuned.lookup)


@pytest.fixture
def auto(monkeypatch):
    """Under "auto" the interpreter's device is taken for a GPU."""
    monkeypatch.setattr(dispatch, "torch_without_question", lambda device_type: None)


def norm_call(grad=False):
    x = torch.randn(2, 21, 24, requires_grad=grad)
    return tune.Call.like(dispatch.OPS["layer_norm"], (x, torch.ones(24), torch.zeros(24), 1e-6))


def attention_call(grad=False):
    qkv = torch.randn(2, 21, 3, 2, 16, dtype=torch.bfloat16, requires_grad=grad)
    return tune.Call.like(dispatch.OPS["attention"], (qkv, None, None, None, 0.0))


def price_of(cheap):
    """1 ms, and half of that for a config or candidate for which `cheap` holds."""

    def price(run):
        bound = run.args[0]
        return 0.5e-3 if cheap(bound) else 1e-3

    return price


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
    assert names == set(ops.OPS) and len(inference) == len(names)
    attention = next(call for call in inference if call.op.name == "attention")
    assert attention.args[0].shape == (8, 197, 3, 3, 64) and attention.args[0].dtype == torch.bfloat16
    assert not any(a.requires_grad for call in inference for a in call.args if isinstance(a, torch.Tensor))
    attention = next(call for call in training if call.op.name == "attention")
    assert attention.args[0].requires_grad
    with pytest.raises(ValueError, match="mode is 'fast', expected one of inference, training"):
        calls.calls_of(config, 8, torch.bfloat16, "fast")


# --------------------------------------------------------------------------------------------------------------------
# What ops do with it


def record(table, call, choice):
    work = tune.Work(call, CPU, tune._random(CPU))
    seconds = {"triton": [2e-6, 2e-6, 2e-6]} | {choice: [1e-6, 1e-6, 1e-6]}
    table.record("ops", work.key, tuned.Entry(choice, "triton", seconds, {}, 50, True, "2026-01-01"))
    return work.args


@pytest.mark.parametrize("choice", ["torch", "sdpa math", "sdpa flash"])
@pytest.mark.parametrize("grad", [False, True])
def test_auto_follows_the_table_and_explain_tells(table, auto, choice, grad, monkeypatch):
    qkv = record(table, attention_call(grad), choice)[0]
    assert (qkv.requires_grad, tuned.table(CPU)) == (grad, table)
    ran = []
    for name, function in list(dispatch.OPS["attention"].others.items()):
        spied = functools.partial(lambda n, f, *args: ran.append(n) or f(*args), name, function)
        monkeypatch.setitem(dispatch.OPS["attention"].others, name, spied)
    out = ops.attention(qkv)
    assert ran == ([choice] if choice != "torch" else [])
    torch.testing.assert_close(out, fastvit.reference.attention(qkv), rtol=0, atol=0.05)
    assert "AttentionFunction" not in str(out.grad_fn)
    found = fastvit.explain("attention", qkv)
    assert (found.backend, found.candidate) == ("torch", choice)
    assert "was measured to be faster" in found.reasons[0]
    assert "triton 2.0 us" in found.evidence[0] and str(table.path) in found.evidence[1]
    assert f"attention: {choice}" in str(found) and "measured: " in str(found)

    with fastvit.use_backend("triton"):  # still forces
        if grad:
            assert "AttentionFunction" in str(ops.attention(qkv).grad_fn)
        assert fastvit.explain("attention", qkv).candidate == "triton"
    with tuned.use_tuning("off"):
        assert fastvit.explain("attention", qkv).candidate == "triton"
        assert "off" in fastvit.explain("attention", qkv).evidence[0]
    # Another shape, other gradients, other strides: nothing is known of those.
    for other in (qkv[:1].contiguous(), qkv.detach().requires_grad_(not grad)):
        found = fastvit.explain("attention", other)
        assert found.candidate == "triton" and "heuristics decide" in found.evidence[0]
    del ran[:]
    strided = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    ops.attention(strided)
    assert not ran
    found = fastvit.explain("attention", strided)
    assert found.candidate == "triton" and "not contiguous" in found.evidence[0]


@pytest.mark.parametrize("dtype, unmeasured", [(torch.float32, "torch"), (torch.bfloat16, "triton + torch.mm")])
def test_a_tie_changes_nothing(table, auto, dtype, unmeasured):
    """What would run unmeasured stays, in the table too, unless something is measured to be faster."""
    x, norm, weight = (torch.randn(*shape, dtype=dtype) for shape in ((2, 21, 24), (24,), (40, 24)))
    arguments = (x, norm, norm, weight.requires_grad_(), None, 1e-6)
    call = tune.Call.like(dispatch.OPS["layer_norm_linear"], arguments)
    assert fastvit.explain("layer_norm_linear", *arguments[:5]).candidate == unmeasured
    tune.tune_call(call, CPU, FakeClock(price_of(lambda bound: False)))
    ((segment, _),) = table.ops.values()
    assert (segment.choice, segment.incumbent) == (unmeasured, unmeasured)
    assert set(segment.seconds) == {"triton", "torch", "triton + torch.mm"}
    # The norm that the library's weight gradient needs is a launch of its own, and tuned.
    assert {key.split()[0] for key in table.configs} == {"layer_norm_statistics", "layer_norm_forward", "gemm"}


def test_the_first_launch_brings_the_table_in(table, monkeypatch, triton_backend):
    choice.set_table(None)
    asked = []
    monkeypatch.setattr(tuned, "lookup", lambda request, device: asked.append(request.kernel))
    _common._connect.cache_clear()  # as in a fresh process
    monkeypatch.setattr(inspect.getmodule(ops.layer_norm).FORWARD, "_launch", None)
    ops.layer_norm(torch.ones(2, 8), torch.ones(8), torch.ones(8))
    assert asked == ["layer_norm_forward"]


def test_an_unknown_candidate_is_no_candidate(table, auto):
    qkv = record(table, attention_call(), "sdpa magic")[0]
    assert fastvit.explain("attention", qkv).candidate == "triton"
    torch.testing.assert_close(ops.attention(qkv), fastvit.reference.attention(qkv), rtol=0, atol=0.05)


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_graphs_follow_the_table(table, auto, grad, monkeypatch):
    qkv = record(table, attention_call(grad), "sdpa math")[0]

    def read(device):  # as at the first call of a process, which no compiler can look into
        assert table.path.read_text()
        return table

    monkeypatch.setattr(tuned, "table", read)
    graphs = []

    def look(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    torch.compile(lambda x: ops.attention(x), fullgraph=True, backend=look)(qkv)
    assert "scaled_dot_product_attention" in graphs[0]
    # A graph for any batch follows no table, and stays one for any batch.
    torch._dynamo.reset()
    del graphs[:]
    compiled = torch.compile(lambda x: ops.attention(x), fullgraph=True, backend=look, dynamic=True)
    for batch in (4, 6, 5):  # not the number of heads: equal sizes are taken for one
        x = torch.randn(batch, 21, 3, 2, 16, dtype=torch.bfloat16, requires_grad=grad)
        torch.testing.assert_close(compiled(x), fastvit.reference.attention(x), rtol=0, atol=0.05)
    assert len(graphs) == 1 and "scaled_dot_product_attention" not in graphs[0]
    torch._dynamo.reset()


def test_measure_tunes_at_the_first_eager_call(table, auto, monkeypatch):
    clock = FakeClock(price_of(lambda bound: bound is dispatch.OPS["layer_norm"].torch))
    monkeypatch.setattr(tune, "CudaClock", lambda: clock)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(dispatch, "can_measure", lambda device: tuned.mode() == "measure")
    x, one = torch.randn(2, 21, 24), torch.ones(24)
    ops.layer_norm(x, one, one)
    assert not clock.timed and not table.ops
    with tuned.use_tuning("measure"):
        torch.testing.assert_close(ops.layer_norm(x, one, one), fastvit.reference.layer_norm(x, one, one))
        assert fastvit.explain("layer_norm", x, one, one).candidate == "torch"
        count = len(clock.timed)
        ops.layer_norm(x, one, one)
        with torch.inference_mode():
            ops.layer_norm(x, one, one)
        assert len(clock.timed) == count > 0

        def broken(run):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(tune, "CudaClock", lambda: FakeClock(broken))
        y = torch.randn(4, 24)
        with pytest.warns(UserWarning, match=r"float32\[4x24\].* could not be tuned: RuntimeError: out of memory") as w:
            for _ in range(2):
                torch.testing.assert_close(ops.layer_norm(y, one, one), fastvit.reference.layer_norm(y, one, one))
        assert len(w) == 1


def test_only_eager_calls_on_a_gpu_are_measured(monkeypatch):
    gpu = torch.device("cuda", 0)
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert not dispatch.can_measure(gpu)
    with tuned.use_tuning("measure"):
        assert dispatch.can_measure(gpu)
        assert not dispatch.can_measure(CPU)
        capturing = True
        assert not dispatch.can_measure(gpu)
        capturing = False
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not dispatch.can_measure(gpu)


def test_keys_tell_apart_what_may_run_differently():
    op = dispatch.OPS["layer_norm_linear"]
    x, norm, weight = torch.randn(2, 3, 8), torch.ones(8), torch.randn(4, 8, requires_grad=True)
    key = op.key((x, norm, norm, weight, None, 1e-6))
    assert key == "layer_norm_linear float32[2x3x8] float32[8] float32[8] float32[4x8]+grad -"
    with torch.no_grad():
        assert "+grad" not in op.key((x, norm, norm, weight, None, 1e-6))
    with torch.autocast("cpu", torch.bfloat16):
        assert op.key((x, norm, norm, weight, None, 1e-6)) == f"{key} autocast=bfloat16"
        call = tune.Call.like(op, (x, norm, norm, weight, None, 1e-6))
    with fastvit.use_backend("triton"):
        assert tune.Work(call, CPU, tune._random(CPU)).key == f"{key} autocast=bfloat16"


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
    assert all(2 <= block.count("Config ") <= tune.KEEP + 1 for block in blocks)


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
    monkeypatch.setattr(report, "environment", lambda device: {"device": "Some GPU"})
    for device in (torch.device("cuda"), torch.device("cuda", 0)):
        monkeypatch.setitem(tuned._tables, device, table)
    monkeypatch.setattr(tune, "CudaClock", lambda: None)
    monkeypatch.setattr(precompile.Job, "on", lambda device, calls: calls)
    monkeypatch.setattr(precompile, "ahead", lambda calls, deadline: contextlib.nullcontext(calls))
    given = {}

    def fake(calls, device, clock, say, deadline):
        given.update(calls=calls, deadline=deadline)
        table.record("ops", "attention x", tuned.Entry("torch", "torch", {"torch": [1e-6, 1e-6, 1e-6]}))
        say("attention x: torch stays")
        if len(given["calls"]) > 6:
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
    assert len(given["calls"]) == 6
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


def test_the_watcher_of_ops_is_restored():
    seen = []
    with dispatch.watching(lambda op, args: seen.append(op.name)):
        ops.layer_norm(torch.ones(2, 8), torch.ones(8), torch.ones(8))
    ops.layer_norm(torch.ones(2, 8), torch.ones(8), torch.ones(8))
    assert seen == ["layer_norm"]


def test_the_real_clock_divides_by_what_it_ran(monkeypatch):
    """On a device that is not there: a call costs 10 us from Python, 2 us in a graph."""
    now, launched, capturing = 0.0, 0, None

    def run():
        nonlocal now, launched, capturing
        launched += 1
        if capturing is None:
            now += 10e-6
        else:
            capturing += 1

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now

        def elapsed_time(self, end):
            return (end.at - self.at) * 1000

    class Graph:
        def replay(self):
            nonlocal now
            now += 2e-6 * self.calls

    @contextlib.contextmanager
    def capture(graph, pool, stream):
        nonlocal capturing
        assert stream == "ours" and pool not in pools, "a pool that others use, too"
        pools.append(pool)
        capturing = 0
        yield
        graph.calls, capturing = capturing, None

    pools, restored, handles = [], [], itertools.count()
    fakes = {"Event": Event, "CUDAGraph": Graph, "graph": capture, "synchronize": lambda: None}
    fakes |= {"graph_pool_handle": lambda: (0, next(handles))}
    streams = {"Stream": lambda: "ours", "current_stream": lambda: "user's", "set_stream": restored.append}
    for name, fake in (fakes | streams).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    clock = decide.CudaClock()
    for graph, seconds in ((True, 2e-6), (False, 10e-6)):
        timer = clock.timer([run, run, run], graph)
        before = now
        assert timer() == pytest.approx(seconds)
        assert decide.ROUND_SECONDS <= now - before < 3 * decide.ROUND_SECONDS
    assert restored == ["user's"]

"""The benchmark: honest numbers, nothing timed that is wrong, and a peer's trouble that stays in its row."""

import dataclasses
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastvit
from fastvit import cli, environment, tuned
from fastvit.dispatch import interpreting
from fastvit.verify import reference_options

pytest.importorskip("PIL")
from fastvit.benchmarks import bench, ops, peers, report, schema, suites, timing, work  # noqa: E402
from fastvit.benchmarks.cases import MODES, OPS, Case, combine  # noqa: E402
from fastvit.benchmarks.report import words  # noqa: E402

ROOT = Path(__file__).parent.parent
PHOTOS = ROOT / "benchmarks" / "photos"
MODEL = "vit_tiny_patch16_224"
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("chelsea.jpg", "coffee.jpg"):
        shutil.copy(PHOTOS / name, folder)
    return folder


@pytest.fixture
def quick(monkeypatch, photos):
    """Settings of a run that takes a second: one tiny model of two blocks, two photographs, few rounds."""
    create = fastvit.create_model
    monkeypatch.setattr(fastvit, "create_model", lambda name, **kwargs: create(name, depth=2, **kwargs))
    monkeypatch.setattr(timing, "ROUND_SECONDS", 0)
    monkeypatch.setattr(timing, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(timing, "pin_threads", torch.get_num_threads)
    ceilings = schema.Ceilings(1e10, {"fp32": 1e11, "bf16": 1e11, "fp16": 1e11})
    monkeypatch.setattr(bench.roofline, "measure_ceilings", lambda device, dtypes: ceilings)
    monkeypatch.setattr(ops, "MOST_BYTES", 1 << 20)

    def settings(*cases, **chosen):
        defaults = {"peers": ("reference",), "photos": photos, "seconds": 1e-9}
        return suites.Settings("cpu", cases or (Case(MODEL, FP32, 3),), **defaults | chosen)

    return settings


@pytest.fixture
def add_peer(monkeypatch):
    """Add a peer whose adapter is `make(case, ours, inputs) -> call`."""

    def add(name, make, note=""):
        monkeypatch.setitem(peers.PEERS, name, peers.Peer(name, name, (), "both", ("cpu", "cuda"), MODES, "invented"))
        adapter = SimpleNamespace(build=lambda peer, *given: peers.Built(make(*given), note))
        monkeypatch.setitem(sys.modules, f"fastvit.benchmarks.peers.{name}", adapter)

    return add


@pytest.fixture
def no_pictures(monkeypatch):
    """They take longer than all the rest, and have tests of their own."""
    monkeypatch.setattr(report, "write", lambda run, folder: [])


def rows_of(settings):
    measuring = bench.Bench(settings)
    return [measuring.row(case, bench.roofline.measure_ceilings("cpu", ())) for case in settings.cases]


def as_is(case, ours, inputs):
    """A peer that is ours."""
    return getattr(fastvit.ops, case.op) if case.op else ours


# --------------------------------------------------------------------------------------------------------------------
# Rows


def test_a_row_holds_speed_ratio_error_memory_and_floor(quick):
    (row,) = rows_of(quick())
    assert (row.id, row.model, row.op, row.img_size) == (f"{MODEL}/fp32/b3/inference", MODEL, "", 224)
    assert (row.tokens, row.dtype, row.batch, row.mode) == (197, "fp32", 3, "inference")
    assert (row.status, row.reason, row.items) == ("timed", "", 3)
    ours, reference = row.contestants["ours"], row.contestants["reference"]
    assert list(row.contestants) == ["ours", "reference"]
    assert (ours.ratio, ours.verdict) == (None, "")
    low, high = reference.ratio.low, reference.ratio.high
    assert low <= reference.ratio.q25 <= reference.ratio.median <= reference.ratio.q75 <= high
    assert reference.verdict == ("faster" if low > 1 else "slower" if high < 1 else "tie")
    for side in (ours, reference):
        assert side.status == "timed"
        assert 0 < side.error <= row.limit < 1e-5
        assert 0 < side.seconds.q25 <= side.seconds.median <= side.seconds.q75
        assert side.seconds.rounds == timing.MIN_ROUNDS
        assert (side.compile_seconds, side.graph, side.host, side.joules) == (None, None, None, None)
    # The median of paired ratios is near the ratio of medians.
    assert reference.ratio.median == pytest.approx(reference.seconds.median / ours.seconds.median, rel=0.5)
    cost = bench.roofline.case_cost(Case(MODEL, FP32, 3))
    assert (row.flops, row.bytes) == (cost.flops, cost.bytes)
    assert cost.flops / 1e11 <= row.floor_seconds <= cost.flops / 1e11 + cost.bytes / 1e10


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("mode", MODES)
def test_every_photograph_and_every_row_of_the_batch_is_checked(quick, add_peer, mode, batch):
    """An error in any one row of any batch is found, whichever photograph is in it."""
    case = Case(MODEL, FP32, batch, mode)
    rows = batch * -(-2 // batch)
    for bad in range(rows):
        seen = [0]

        def make(case, ours, inputs, bad=bad, seen=seen):
            def call(images):
                assert len(images) == batch
                at = torch.arange(seen[0], seen[0] + batch)[:, None]
                seen[0] = (seen[0] + batch) % rows
                out = ours(images)
                return torch.where(at == bad, out * 1.01, out)

            return call

        add_peer("peer", make)
        subject = work.Subject(MODEL, None, quick())
        ready = work.ModelWork(case, subject)
        assert "error" in ready.judge(ready.build("peer").call)[1], bad
        assert ready.judge(ready.ours, ours=True)[1] == ""


def test_timm_has_the_same_weights_and_agrees(quick, monkeypatch):
    pytest.importorskip("timm")
    # timm builds the peer from our configuration: its depth too.
    rows = rows_of(quick(Case(MODEL, FP32, 2), Case(MODEL, FP32, 2, "training"), peers=("timm",)))
    for row in rows:
        assert row.contestants["timm"].status == "timed", row.contestants["timm"].reason
        assert row.contestants["timm"].error < 1e-5


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("op", OPS)
def test_ops_are_checked_and_timed(quick, add_peer, op, dtype):
    add_peer("same", as_is)
    add_peer("off", lambda *given: lambda **inputs: as_is(*given)(**inputs) * 1.05)
    cases = [Case(MODEL, dtype, 1, mode, op) for mode in MODES]
    for row in rows_of(quick(*cases, peers=("same", "off"))):
        assert (row.status, row.reason) == ("timed", ""), row
        assert (row.op, row.items) == (op, 1)
        assert row.contestants["same"].ratio is not None
        assert row.contestants["off"].status == "wrong"
        assert row.contestants["off"].seconds is None
        assert "is more than the limit" in row.contestants["off"].reason


@pytest.mark.parametrize("op", OPS)
def test_wrong_gradients_of_an_op_are_found(quick, add_peer, op):
    """Right outputs with wrong gradients, of any tensor."""
    case = Case(MODEL, FP32, 1, "training", op)
    wanted = [name for name, value in ops.inputs(case, "cpu").items() if getattr(value, "requires_grad", False)]
    for bad in wanted:
        add_peer(
            "peer", lambda *given, bad=bad: lambda **inputs: as_is(*given)(**inputs | {bad: Doubled.apply(inputs[bad])})
        )
        ready = work.OpWork(case, quick(case))
        assert "error of d " in ready.judge(ready.build("peer").call)[1], bad


class Doubled(torch.autograd.Function):
    """The identity, with twice its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def test_a_wrong_gradient_of_ours_is_not_timed(quick, monkeypatch):
    right = fastvit.VisionTransformer.forward_head
    monkeypatch.setattr(
        fastvit.VisionTransformer, "forward_head", lambda self, tokens: right(self, Doubled.apply(tokens))
    )
    monkeypatch.setattr(timing, "interleave", lambda *args: pytest.fail("timed a wrong model"))
    (row,) = rows_of(quick(Case(MODEL, FP32, 2, "training")))
    assert row.status == "wrong"
    assert "not timed: error of d " in row.reason
    assert list(row.contestants) == ["ours"]


@pytest.mark.parametrize("bad", ["patch_embed.proj.weight", "blocks.1.norm2.bias", "head.bias"])
def test_every_gradient_of_ours_is_checked(quick, bad):
    case = Case(MODEL, FP32, 2, "training")
    ready = work.ModelWork(case, work.Subject(MODEL, None, quick()))
    ready.ours.get_parameter(bad).register_hook(lambda gradient: gradient * 1.01)
    error, reason = ready.judge(ready.ours, ours=True)
    assert f"error of d {bad} " in reason
    assert error < 1e-5, "the output is right"
    ready.ours.get_parameter(bad).requires_grad_(False)
    assert ready.judge(ready.ours, ours=True)[1] == f"has no d {bad}"


def test_gradients_of_a_peers_own_parameters_are_told_by_their_shape(quick):
    pytest.importorskip("timm")
    case = Case(MODEL, FP32, 2, "training")
    ready = work.ModelWork(case, work.Subject(MODEL, None, quick()))
    found = ready.evaluate(ready.build("timm").call)
    assert set(found) == {"out"} | {
        f"d {name}" for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "head.weight", "head.bias")
    }


def test_a_wrong_gradient_of_a_peer_is_found(quick, add_peer):
    pytest.importorskip("timm")
    case = Case(MODEL, FP32, 2, "training")
    build = peers.build

    def make(case, ours, inputs):
        right = build(peers.PEERS["timm"], case, ours, inputs).call
        right.blocks[1].register_forward_hook(lambda module, given, out: Doubled.apply(out))
        return right

    add_peer("peer", make)
    ready = work.ModelWork(case, work.Subject(MODEL, None, quick()))
    error, reason = ready.judge(ready.build("peer").call)
    assert error < 1e-5
    assert "error of d " in reason


def test_a_training_step_takes_the_gradient_of_every_parameter(quick):
    case = Case(MODEL, FP32, 2, "training")
    ready = work.ModelWork(case, work.Subject(MODEL, None, quick()))
    assert ready.ours.training
    step = ready.step(ready.ours)
    for _ in range(2):
        gradients = step()
        assert len(gradients) == len(list(ready.ours.parameters()))
    assert all(parameter.grad is None for parameter in ready.ours.parameters()), "nothing is summed up"


@pytest.mark.parametrize("mode", MODES)
def test_what_is_timed_is_what_was_checked(quick, mode):
    """Images of one kind in both: a compiler that met another kind would compile again."""
    seen = set()

    def call(images):
        seen.add(images.is_inference())
        return ready.ours(images)

    ready = work.ModelWork(Case(MODEL, FP32, 2, mode), work.Subject(MODEL, None, quick()))
    ready.judge(call)
    step = ready.step(call)
    with ready.gradients():
        step()
    assert seen == {mode == "inference"}


def test_the_step_of_an_op_takes_its_inputs_in_turn(quick, monkeypatch):
    case = Case(MODEL, FP32, 1, op="layer_norm")
    monkeypatch.setattr(ops, "MOST_BYTES", 1 << 30)
    monkeypatch.setattr(ops, "cache_bytes", lambda device: 200_000)
    ready, seen = work.OpWork(case, quick(case)), []
    step = ready.step(lambda x, **others: seen.append(x.data_ptr()))
    count = ready.turns
    assert count >= 2
    for _ in range(2 * count):
        step()
    assert len(set(seen[:count])) == count
    assert seen[:count] == seen[count:]


def test_a_model_without_a_classifier_and_of_another_size(quick):
    case = Case("vit_small_patch14_dinov2", FP32, 1, img_size=56)
    (row,) = rows_of(quick(case))
    assert row.status == "timed", row.reason
    assert (row.tokens, row.img_size, row.id) == (17, 56, "vit_small_patch14_dinov2@56/fp32/b1/inference")


def test_without_pillow_the_images_are_random_and_the_results_say_so(quick, monkeypatch):
    find_spec = suites.importlib.util.find_spec
    monkeypatch.setattr(suites.importlib.util, "find_spec", lambda name: None if name == "PIL" else find_spec(name))
    measuring = bench.Bench(quick())
    assert measuring.row(Case(MODEL, FP32, 1)).status == "timed"
    (top5,) = measuring.top5.values()
    assert top5["photos"][0] == "random 0"
    assert "Pillow is not installed" in quick().as_dict()["images"]


def test_an_unreadable_photograph_is_named_and_left_out(quick, capsys):
    settings = quick()
    (settings.photos / "bad.jpg").write_text("no image")
    measuring = bench.Bench(settings)
    assert measuring.row(settings.cases[0]).status == "timed"
    (top5,) = measuring.top5.values()
    assert top5["photos"] == ["chelsea.jpg", "coffee.jpg"]
    assert (top5["same_first"], top5["same_in_top5"]) == (2, 10)
    assert "bad.jpg: not an image" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# What is wrong or raises


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_model_is_not_timed(quick, monkeypatch, factor):
    right = fastvit.VisionTransformer.forward
    monkeypatch.setattr(fastvit.VisionTransformer, "forward", lambda self, images: right(self, images) * factor)
    monkeypatch.setattr(timing, "interleave", lambda *args: pytest.fail("timed a wrong model"))
    (row,) = rows_of(quick())
    assert (row.status, row.contestants["ours"].status) == ("wrong", "wrong")
    assert "not timed: error 1.00e-03" in row.reason or factor != factor
    assert row.contestants["ours"].seconds is None
    assert list(row.contestants) == ["ours"]
    json.dumps(schema.asdict(row), allow_nan=False)


@pytest.mark.parametrize("shape", ["fewer", "broadcast"])
def test_a_peer_of_another_shape_is_wrong(quick, add_peer, shape):
    add_peer("peer", lambda case, ours, inputs: lambda i: ours(i)[:, :10] if shape == "fewer" else ours(i)[:, None])
    (row,) = rows_of(quick(peers=("peer",)))
    assert row.contestants["peer"].status == "wrong"
    assert "expected (3, 1000)" in row.contestants["peer"].reason


def raising(error, in_build=False, after=0):
    def make(case, ours, inputs):
        if in_build:
            raise error
        calls = []

        def call(images):
            calls.append(1)
            if len(calls) > after:
                raise error
            return ours(images)

        return call

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (raising(ImportError("no such library\nat all"), in_build=True), "ImportError: no such library"),
        (raising(torch.OutOfMemoryError("tried to allocate everything\nand more")), "out of memory"),
        (raising(RuntimeError("in the middle"), after=12), "RuntimeError: in the middle"),
        (raising(RuntimeError()), "RuntimeError: (no message)"),
    ],
    ids=["cannot be built", "out of memory", "fails while it is timed", "says nothing"],
)
def test_a_peer_that_raises_stays_in_its_row(quick, add_peer, make, message):
    add_peer("peer", make)
    (row,) = rows_of(quick(peers=("peer", "reference")))
    assert row.status == "timed"
    assert (row.contestants["peer"].status, row.contestants["peer"].reason) == ("failed", message)
    assert row.contestants["peer"].seconds is None
    assert row.contestants["reference"].seconds


def test_an_absent_peer_is_listed_with_the_reason(quick, monkeypatch):
    peer = peers.Peer("gone", "gone", ("no_such_package",), "model", ("cpu",), MODES, "invented")
    monkeypatch.setitem(peers.PEERS, "gone", peer)
    cases = Case(MODEL, FP32, 1), Case(MODEL, FP32, 1, op="layer_norm"), Case(MODEL, FP32, 1, op="attention")
    model, norm, attention = (
        row.contestants for row in rows_of(quick(*cases, peers=("gone", "reference", "sdpa math")))
    )
    assert (model["gone"].status, model["gone"].reason) == ("absent", "not installed: no_such_package")
    # A peer that has nothing of the kind is not listed.
    assert [list(sides) for sides in (model, norm, attention)] == [
        ["ours", "gone", "reference"],
        ["ours"],
        ["ours", "sdpa math"],
    ]


def test_a_note_is_kept(quick, add_peer):
    add_peer("peer", as_is, note="tanh GELU")
    (row,) = rows_of(quick(peers=("peer",)))
    assert row.contestants["peer"].note == "tanh GELU"


def test_ours_out_of_memory_fails_its_batch_and_the_rest_goes_on(quick, monkeypatch):
    right = fastvit.VisionTransformer.forward

    def forward(self, images):
        if len(images) == 5:
            raise torch.OutOfMemoryError("too much")
        return right(self, images)

    monkeypatch.setattr(fastvit.VisionTransformer, "forward", forward)
    rows = rows_of(quick(Case(MODEL, FP32, 5), Case(MODEL, FP32, 1)))
    assert [(row.status, row.reason) for row in rows] == [("failed", "out of memory"), ("timed", "")]


def test_a_case_that_cannot_be_made_fails_its_row_only(quick):
    cases = Case("vit_giant_patch14_dinov2", FP32, 1, op="layer_norm_mlp"), Case(MODEL, FP32, 1, op="layer_norm")
    rows = rows_of(quick(*cases))
    assert [row.status for row in rows] == ["failed", "timed"]
    assert "has no layer_norm_mlp: its MLP is 'swiglu'" in rows[0].reason


def test_the_time_limit_skips_rows_and_peers(quick, monkeypatch):
    rows = rows_of(quick(Case(MODEL, FP32, 1), Case(MODEL, FP32, 2), time_limit=1e-9))
    assert [row.status for row in rows] == ["skipped", "skipped"]
    assert rows[0].reason == "not started: the time limit of 1e-09 s was reached"
    # Reached within a row: ours and the peers that are ready are timed.
    measuring, answers = bench.Bench(quick(peers=("reference", "timm"))), iter(["", "", "not started: late"])
    monkeypatch.setattr(measuring, "out_of_time", lambda: next(answers))
    row = measuring.row(Case(MODEL, FP32, 1))
    assert [side.status for side in row.contestants.values()] == ["timed", "timed", "absent"]
    assert row.contestants["timm"].reason == "not started: late"


def test_when_the_gpu_is_lost_the_rest_is_not_started(quick, monkeypatch):
    def clean_up():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    cases = [Case(MODEL, FP32, batch) for batch in (1, 2)]
    measuring = bench.Bench(quick())
    assert measuring.row(cases[0]).status == "timed"
    monkeypatch.setattr(bench, "_clean_up", clean_up)
    measuring.row(cases[0])
    lost = measuring.row(cases[1])
    assert (lost.status, bench._unfinished(lost)) == ("skipped", True)
    assert f"the GPU was lost in {cases[0].id}: RuntimeError: CUDA error: an illegal" in lost.reason


def test_energy_is_that_of_models_and_its_failure_costs_nothing_else(quick, monkeypatch):
    monkeypatch.setattr(timing, "energy_counter", lambda device: lambda: 0.0)
    monkeypatch.setattr(timing, "joules", lambda *args: 7.0)
    model, op = rows_of(quick(Case(MODEL, FP32, 1), Case(MODEL, FP32, 1, op="layer_norm")))
    assert (model.contestants["ours"].joules, op.contestants["ours"].joules) == (7.0, None)

    def joules(*args):
        raise RuntimeError("the counter is gone")

    monkeypatch.setattr(timing, "joules", joules)
    (row,) = rows_of(quick())
    assert (row.status, row.contestants["ours"].joules) == ("timed", None)


def test_what_cannot_be_seen_or_is_not_compiled_has_no_number(quick, add_peer, monkeypatch):
    for name in ("eager", "compiling"):
        add_peer(name, as_is)
    adapter = sys.modules["fastvit.benchmarks.peers.eager"]
    monkeypatch.setattr(adapter, "build", lambda peer, case, ours, inputs: peers.Built(ours, opaque=True))
    monkeypatch.setitem(peers.PEERS, "compiling", dataclasses.replace(peers.PEERS["compiling"], compiles=True))
    (row,) = rows_of(quick(peers=("eager", "compiling")))
    ours, eager, compiling = row.contestants.values()
    assert [side.compile_seconds is None for side in (ours, eager, compiling)] == [True, True, False]
    assert eager.peak_bytes is None
    assert (compiling.peak_bytes is None) == (ours.peak_bytes is None)


def test_each_contestant_runs_its_own_call_and_ratios_are_peer_over_ours(quick, add_peer, monkeypatch):
    ran, seen = [], {}
    for name in ("a", "b"):
        add_peer(name, lambda case, ours, inputs, name=name: lambda images: (ran.append(name), ours(images))[1])

    def interleave(calls, *_):
        for name, call in calls.items():
            ran.clear()
            call()
            seen[name] = list(ran)
        return {"ours": [1.0] * 20, "a": [2.0] * 20, "b": [0.5] * 20}, {}

    monkeypatch.setattr(timing, "interleave", interleave)
    (row,) = rows_of(quick(peers=("a", "b")))
    assert seen == {"ours": [], "a": ["a"], "b": ["b"]}
    assert [row.contestants[name].ratio.median for name in ("a", "b")] == [2.0, 0.5]
    assert [row.contestants[name].verdict for name in ("a", "b")] == ["faster", "slower"]
    assert row.contestants["a"].seconds.median == 2.0


# --------------------------------------------------------------------------------------------------------------------
# The interpreter


@pytest.mark.skipif(not interpreting(), reason="a GPU runs the kernels in the rows themselves")
def test_photographs_are_classified_on_the_kernels(quick, monkeypatch):
    """With one photograph and two blocks, to be quick; and a wrong kernel shows."""
    settings = quick(interpreted=MODEL)
    (settings.photos / "coffee.jpg").unlink()
    found = bench.classify_interpreted(settings)
    assert found["ok"]
    assert found["ours"] == [found["ours"][0]]
    assert (found["same_first"], found["photos"]) == (1, ["chelsea.jpg"])
    assert 1e-4 < found["error"] < 2 * found["plain_error"]

    from fastvit.kernels import attention

    right = attention.attention_forward
    monkeypatch.setattr(attention, "attention_forward", lambda *args: (right(*args)[0] * 1.1, right(*args)[1]))
    assert not bench.classify_interpreted(settings)["ok"]


def test_only_the_default_run_on_a_cpu_interprets():
    assert suites.settings("cpu").interpreted == MODEL
    assert suites.settings("cpu", models=(MODEL,)).interpreted is None
    assert suites.settings("cpu", quick=True).interpreted is None
    assert suites.settings("cuda").interpreted is None


# --------------------------------------------------------------------------------------------------------------------
# What is run


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick_run", [True, False])
def test_the_default_suites_name_each_case_once_and_can_be_run(device, quick_run):
    settings = suites.settings(device, quick=quick_run)
    ids = [case.id for case in settings.cases]
    assert len(set(ids)) == len(ids)
    assert all(device in peers.PEERS[peer].devices for peer in settings.peers)
    for case in settings.cases:
        assert bench.roofline.case_cost(case).flops >= 0
        assert case.op != "layer_norm_mlp" or case.config.mlp == "mlp"


def test_the_suite_of_a_gpu_has_what_is_worth_knowing():
    cases = suites.settings("cuda").cases
    assert {197, 257, 577, 1025, 1370} <= {case.tokens for case in cases}
    assert {case.dtype for case in cases} == {torch.float32, torch.bfloat16, torch.float16}
    assert {case.op for case in cases} == {"", *OPS}
    assert {case.mode for case in cases} == set(MODES)
    widths = {case.config.embed_dim for case in cases}
    assert widths == {192, 384, 768, 1024, 1280, 1536}
    assert {1, 32, 256} <= {case.batch for case in cases}
    assert all(case.dtype == torch.bfloat16 for case in cases[:30])


def test_what_is_asked_for_is_combined():
    settings = suites.settings("cpu", ops=("attention", "model"), modes=MODES, dtypes=(BF16,), batches=(2, 4))
    models = ("vit_tiny_patch16_224", "vit_base_patch16_224")
    expected = [case for op in ("attention", "") for case in combine(models, [BF16], [2, 4], MODES, [op])]
    assert list(settings.cases) == expected
    (case,) = suites.settings("cpu", models=(MODEL,), img_sizes=(64,), batches=(1,), dtypes=(FP32,)).cases
    assert (case.img_size, case.tokens) == (64, 17)
    assert len(suites.settings("cpu", models=(MODEL,), dtypes=(FP32,), batches=(1, 1)).cases) == 1
    assert {case.batch for case in suites.settings("cuda", ops=("attention",)).cases} == {256}


def test_the_same_seed_gives_the_same_inputs_in_every_mode():
    a, b = (ops.inputs(Case(MODEL, FP32, 1, mode, "linear_residual"), "cpu") for mode in MODES)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert b["x"].requires_grad and not a["x"].requires_grad
    patches = ops.inputs(Case(MODEL, FP32, 1, "training", "patch_embed"), "cpu")
    assert patches["weight"].requires_grad and not patches["image"].requires_grad


def test_an_ops_inputs_are_those_that_the_model_gives_it(monkeypatch):
    """Shapes, flags and options, caught in a forward pass of the model."""
    caught = {}
    for op in OPS:
        right = getattr(fastvit.ops, op)

        def catch(*args, op=op, right=right, **kwargs):
            caught.setdefault(op, (args, kwargs))
            return right(*args, **kwargs)

        monkeypatch.setattr(fastvit.ops, op, catch)
    for name, img_size in (("vit_small_patch14_reg4_dinov2", 56), ("deit_tiny_distilled_patch16_224", 64)):
        caught.clear()
        model = fastvit.create_model(name, img_size=img_size, depth=1)
        model(torch.randn(2, 3, img_size, img_size))
        assert set(caught) == set(OPS)
        for op, (args, kwargs) in caught.items():
            made = ops.inputs(Case(name, FP32, 2, op=op, img_size=img_size), "cpu")
            shapes = sorted(tuple(v.shape) for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
            if op == "layer_norm":  # the last one of the model
                assert made["x"].shape == args[0].shape
            assert sorted(tuple(v.shape) for v in made.values() if isinstance(v, torch.Tensor)) == shapes, op
            assert made.get("activation") == kwargs.get("activation")


# --------------------------------------------------------------------------------------------------------------------
# The command


def arguments(photos, output, *more):
    first = ["bench", "--device", "cpu", "--models", MODEL, "--peers", "reference", "--photos", str(photos)]
    return [*first, "--seconds", "1e-9", "-o", str(output), *more]


def test_command_prints_a_table_and_writes_everything(quick, photos, tmp_path, capsys):
    output = tmp_path / "results"
    typed = arguments(photos, output, "--batches", "1,2", "--dtypes", "fp32,bf16")
    assert cli.main(typed) == 0
    printed = capsys.readouterr()
    assert "weights: random, seed 0" in printed.err
    assert "With random weights the classes mean nothing" in printed.out
    assert printed.out.count(words.INTERVAL) == 1 and printed.out.index(words.INTERVAL) > printed.out.rindex("/b2/")
    assert "\x1b" not in printed.out + printed.err
    run = schema.load(output / "bench.json")
    assert run.finished is True
    assert [(row.dtype, row.batch) for row in run.rows] == [("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)]
    for row in run.rows:
        assert row.id in printed.out
    assert run.environment["seed"] == 0
    assert run.environment["torch_threads"] == torch.get_num_threads()
    assert {"commit", "device", "packages"} <= set(run.environment)
    assert run.settings["command"] == shlex.join(["fastvit", *typed])
    assert run.ceilings.bytes_per_s == 1e10
    assert set(run.extra["top5"]) == {f"{MODEL}@224/fp32", f"{MODEL}@224/bf16"}
    assert (output / "bench.csv").exists()
    assert (output / "index.html").exists()
    if importlib.util.find_spec("matplotlib"):
        assert list(output.glob("*.png"))
    else:
        assert "No pictures" in printed.err


@pytest.mark.parametrize("rate", [1.0, 1e30])
def test_a_limit_that_a_side_beats_is_said_at_the_end(quick, no_pictures, photos, monkeypatch, tmp_path, capsys, rate):
    """In the page's words, once, under the table."""
    ceilings = schema.Ceilings(rate, {"fp32": rate})
    monkeypatch.setattr(bench.roofline, "measure_ceilings", lambda device, dtypes: ceilings)
    assert cli.main(arguments(photos, tmp_path, "--batches", "1,2", "--dtypes", "fp32")) == 0
    printed, caveats = capsys.readouterr().out, words.caveats(schema.load(tmp_path / "bench.json"))
    said = [sentence for sentence in caveats if sentence.startswith("Faster than the limit as measured: ours (to ")]
    assert len(said) == printed.count("Faster than the limit") == (rate == 1)
    assert all(printed.index(f"{sentence}\n") > printed.rindex("/b2/") for sentence in said)


def test_ours_says_what_it_ran_on(monkeypatch):
    def step():
        fastvit.ops.layer_norm(torch.ones(1, 2, 4), torch.ones(4), torch.zeros(4))

    assert work.run_watched(step) == "ran on: torch"
    with fastvit.use_backend("triton" if interpreting() else "torch"):
        assert work.run_watched(step) == f"ran on: {'triton' if interpreting() else 'torch'}"


def test_the_file_is_whole_after_every_row(quick, no_pictures, photos, tmp_path, monkeypatch):
    seen, write = [], bench.report.write_json
    monkeypatch.setattr(bench.report, "write_json", lambda path, value: (write(path, value), seen.append(value))[0])
    assert cli.main(arguments(photos, tmp_path / "r", "--batches", "1,2", "--dtypes", "fp32")) == 0
    assert [(len(value["rows"]), value["finished"]) for value in seen] == [
        (1, False),
        (1, False),
        (2, False),
        (2, False),
        (2, True),
    ]


def test_a_row_that_ends_the_process_is_known_to_the_next(quick, no_pictures, photos, tmp_path, monkeypatch):
    """While it runs the file says that it failed: the next run takes it last."""
    right, while_it_runs = bench.Bench._measure, []

    def measure(self, row, case):
        written = json.loads((tmp_path / "r" / "bench.json").read_text())["rows"]
        while_it_runs.append({row["batch"]: row["reason"] for row in written})
        if case.batch == 1:
            raise KeyboardInterrupt
        return right(self, row, case)

    monkeypatch.setattr(bench.Bench, "_measure", measure)
    assert cli.main(arguments(photos, tmp_path / "r", "--batches", "2,1", "--dtypes", "fp32")) == 130
    assert while_it_runs == [{2: "it ended the process"}, {2: "", 1: "it ended the process"}]
    rows = json.loads((tmp_path / "r" / "bench.json").read_text())["rows"]
    assert [(row["batch"], row["status"]) for row in rows] == [(2, "timed")], "an interrupted row has not failed"


def test_command_keeps_what_it_has_when_interrupted_and_resumes(quick, photos, monkeypatch, tmp_path, capsys):
    right, measured = bench.Bench._measure, []

    def measure(self, row, case):
        measured.append(case.batch)
        if case.batch == 2 and len(measured) < 3:
            raise KeyboardInterrupt
        return right(self, row, case)

    monkeypatch.setattr(bench.Bench, "_measure", measure)
    output = tmp_path / "results"
    typed = arguments(photos, output, "--batches", "1,2", "--dtypes", "fp32", "--resume")
    reported = []
    monkeypatch.setattr(report, "write", lambda run, folder: (reported.append(len(run.rows)), [])[1])
    assert cli.main(typed) == 130
    assert reported == [1]
    assert "Interrupted after 1 of 2 rows" in capsys.readouterr().err
    run = schema.load(output / "bench.json")
    assert (run.finished, len(run.rows)) == (False, 1)

    assert cli.main(typed) == 0
    assert measured == [1, 2, 2]
    again = schema.load(output / "bench.json")
    assert (again.finished, [row.batch for row in again.rows]) == (True, [1, 2])
    assert again.rows[0] == run.rows[0]
    # Nothing of other code, and nothing without being told.
    monkeypatch.setattr(environment, "revision", lambda: "another")
    assert cli.main(typed) == 0
    assert cli.main(typed[:-1]) == 0
    # Nor of other choices of the tuner.
    monkeypatch.setattr(tuned.Table, "fingerprint", "another")
    assert cli.main(typed) == 0
    assert measured == [1, 2, 2, 1, 2, 1, 2, 1, 2]


def test_an_interrupt_while_resuming_loses_nothing(quick, tmp_path, monkeypatch):
    """Neither rows further down nor, before the first, all of them; what failed comes last."""
    settings = quick(*(Case(MODEL, FP32, batch) for batch in (1, 2, 3)))
    before, _ = bench.record(settings, tmp_path)
    before.rows[0].status = "failed"
    measured = []

    def row(self, case, ceilings):
        measured.append(case.batch)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.Bench, "row", row)
    printed = []
    assert bench.record(settings, tmp_path, before, lambda row: printed.append(row.batch))[1]
    assert (printed, measured) == ([2, 3], [1])
    assert [row.batch for row in schema.load(tmp_path / "bench.json").rows] == [2, 3]

    def interrupted(device, dtypes):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.roofline, "measure_ceilings", interrupted)
    run, _ = bench.record(settings, tmp_path, before)
    assert [row.batch for row in schema.load(tmp_path / "bench.json").rows] == [2, 3]
    assert run.ceilings == before.ceilings


def test_the_floors_of_kept_rows_are_those_of_the_runs_ceilings(quick, tmp_path, monkeypatch):
    settings = quick()
    before, _ = bench.record(settings, tmp_path)
    floor, seconds = before.rows[0].floor_seconds, before.rows[0].contestants["ours"].seconds
    twice = schema.Ceilings(2e10, {"fp32": 2e11})
    monkeypatch.setattr(bench.roofline, "measure_ceilings", lambda device, dtypes: twice)
    (row,) = bench.record(settings, tmp_path, before)[0].rows
    assert row.floor_seconds == pytest.approx(floor / 2)
    assert row.contestants["ours"].seconds == seconds


def test_two_states_of_an_uncommitted_checkout_are_told_apart(monkeypatch, tmp_path):
    """Or the rows of one would be kept as those of the other."""
    (tmp_path / ".git").mkdir()
    (tmp_path / "kernels").mkdir()
    described = SimpleNamespace(stdout="0123456789ab-dirty\n")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "fastvit" / "environment.py"))
    monkeypatch.setattr(tuned, "KERNELS", tmp_path / "kernels")
    monkeypatch.setattr(environment.subprocess, "run", lambda *args, **kwargs: described)
    seen = set()
    for source in ("x = 1", "x = 2"):
        (tmp_path / "kernels" / "gemm.py").write_text(source)
        seen.add(environment.revision())
    assert len(seen) == 2
    assert all(revision.startswith("0123456789ab-dirty-") for revision in seen)
    described.stdout = "0123456789ab\n"
    assert environment.revision() == "0123456789ab"


def test_a_row_that_the_time_limit_cut_short_is_measured_again(quick, tmp_path):
    settings = quick(Case(MODEL, FP32, 1), peers=("reference",))
    run, _ = bench.record(settings, tmp_path)
    assert bench.record(settings, tmp_path, run)[0].rows == run.rows
    run.rows[0].contestants["reference"] = schema.Contestant("absent", "not started: the time limit of 1 s was reached")
    again, _ = bench.record(settings, tmp_path, run)
    assert again.rows[0].contestants["reference"].status == "timed"


def test_to_resume_from_another_file_is_refused(photos, tmp_path, capsys):
    (tmp_path / "bench.json").write_text('{"kind": "fastvit bench", "schema": 1}')
    assert cli.main(arguments(photos, tmp_path, "--resume")) == 2
    assert "of schema 1, expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--models", "vit_tony_patch16_224"], "unknown model 'vit_tony_patch16_224'; did you mean"),
        (["--peers", "nobody"], "unknown peer 'nobody', expected some of torch"),
        (["--photos", "absent"], "--photos absent: no such folder"),
        (["--ops", "softmax"], "unknown op 'softmax', expected some of patch_embed"),
        (["--modes", "sleeping"], "mode is 'sleeping', expected one of inference, training"),
        (["--models", MODEL, "--img-sizes", "100"], "img_size is (100, 100), expected multiples of patch_size"),
    ],
)
def test_command_refuses_what_is_unknown(given, message, tmp_path, capsys):
    assert cli.main(["bench", "--device", "cpu", "-o", str(tmp_path / "results"), *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("status", ["wrong", "failed"])
def test_a_bad_row_beside_a_timed_one_fails_the_command(quick, no_pictures, photos, monkeypatch, tmp_path, status):
    right = bench.Bench.row

    def row(self, case, ceilings):
        found = right(self, case, ceilings)
        found.status = status if case.batch == 2 else found.status
        return found

    monkeypatch.setattr(bench.Bench, "row", row)
    assert cli.main(arguments(photos, tmp_path, "--batches", "1,2", "--dtypes", "fp32")) == 1


@pytest.mark.parametrize("ok", [True, False])
def test_wrong_kernels_in_the_interpreter_fail_the_command(quick, no_pictures, monkeypatch, tmp_path, capsys, ok):
    found = {"ok": ok, "photos": [], "ours": [], "reference": [], "model": MODEL, "dtype": "bf16"}
    found |= {"error": 1.0, "plain_error": 1.0, "seconds": 1.0}
    settings = quick(Case(MODEL, FP32, 1), interpreted=MODEL)
    monkeypatch.setattr(suites, "settings", lambda device, **_: settings)
    monkeypatch.setattr(bench, "classify_interpreted", lambda settings: found)
    monkeypatch.setattr("fastvit.verify.use_interpreter", lambda: None)
    assert cli.main(["bench", "--device", "cpu", "-o", str(tmp_path)]) == (0 if ok else 1)
    assert schema.load(tmp_path / "bench.json").extra["interpreted"]["ok"] is ok
    assert ("WRONG" in capsys.readouterr().out) is not ok


def test_python_benchmarks_is_the_same_command(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks", "--peers", "nobody"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fastvit bench: error: unknown peer 'nobody'")


def test_single_ops_run_under_pytest_benchmark(tmp_path):
    pytest.importorskip("pytest_benchmark")
    options = ["--benchmark-only", "--benchmark-max-time=0.01", "-k", "layer_norm-inference", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", *options, f"--benchmark-json={tmp_path / 'b.json'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # Under xdist, which may be what runs this test, pytest-benchmark would measure nothing.
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads((tmp_path / "b.json").read_text())["benchmarks"]
    assert {entry["extra_info"]["case"].rpartition("/")[2] for entry in measured} == {"layer_norm"}


def test_the_reference_of_a_subject_is_the_model(quick):
    """The truth is of the weights and photographs as the dtype holds them: in bfloat16 another one than in float32."""
    subject = work.Subject(MODEL, None, quick())
    for dtype in (FP32, BF16):
        truth, limits = subject.truth(dtype, "inference")
        state = {name: tensor.to(dtype).double() for name, tensor in subject.model.state_dict().items()}
        images = subject.photos.to(dtype).double()
        expected = fastvit.reference.vision_transformer(images, state, **reference_options(subject.config))
        assert torch.equal(truth["out"], expected)
        assert limits["out"] < 10 * torch.finfo(dtype).eps
    assert not torch.equal(truth["out"], subject.truth(FP32, "inference")[0]["out"])


@pytest.mark.parametrize("case", [Case(MODEL, FP32, 256, "training"), Case(MODEL, FP32, 2, op="layer_norm")])
def test_every_row_on_a_gpu_is_timed_three_ways(quick, monkeypatch, case):
    """What only a GPU can do, with stand-ins for its clocks. A graph holds as many calls as there are inputs."""
    turns, eager = 4, {"ours": 1.0, "peer": 3.0, "broken": 1.0, "opaque": 1.0}
    replays = {"ours": 4.0, "peer": 2.0}

    def replayed(calls, times):
        assert (list(calls), times) == (["ours", "peer", "broken"], turns)
        error = RuntimeError("operation not permitted when stream is capturing\nmore")
        return {name: f"graph of {name}" for name in replays}, {"broken": error}

    def interleave(calls, timer, seconds):
        budgets.append(seconds)
        graphs = list(calls.values())[0] == "graph of ours"
        return {name: [(replays if graphs else eager)[name]] * 20 for name in calls}, {}

    budgets = []
    monkeypatch.setattr(timing, "replayed", replayed)
    monkeypatch.setattr(timing, "interleave", interleave)
    monkeypatch.setattr(timing, "host_seconds", lambda call, seconds: budgets.append(seconds) or [0.5] * 5)
    row = bench._row(case, None)
    row.contestants = {name: schema.Contestant(note="tanh GELU") for name in eager}
    settings = dataclasses.replace(quick(case, seconds=8.0), device="cuda")
    monkeypatch.setattr(timing, "energy_counter", lambda device: None)
    bench.Bench(settings)._time(row, dict.fromkeys(eager, lambda: None), {}, {"opaque"}, turns)
    ours, peer, broken, opaque = row.contestants.values()
    assert budgets == [8.0, 0.5, 0.5, 0.5, 0.5, 8.0]
    assert [side.seconds.median for side in row.contestants.values()] == [1.0, 3.0, 1.0, 1.0]
    assert [side.host.median for side in row.contestants.values()] == [0.5] * 4
    assert (ours.graph.median, ours.graph_ratio, ours.graph_verdict) == (1.0, None, "")
    assert (peer.ratio.median, peer.verdict) == (3.0, "faster")
    assert (peer.graph.median, peer.graph_ratio.median, peer.graph_verdict) == (0.5, 0.5, "slower")
    assert (broken.graph, broken.graph_ratio, opaque.graph) == (None, None, None)
    assert broken.note == "tanh GELU; no CUDA graph: RuntimeError: operation not permitted when stream is capturing"
    assert opaque.note == peer.note == "tanh GELU"


def test_without_a_graph_of_ours_peers_have_times_and_no_ratio(quick, monkeypatch):
    monkeypatch.setattr(
        timing, "replayed", lambda calls, times: ({"peer": calls["peer"]}, {"ours": RuntimeError("no")})
    )
    monkeypatch.setattr(timing, "interleave", lambda calls, *_: ({name: [1.0] * 20 for name in calls}, {}))
    monkeypatch.setattr(timing, "host_seconds", lambda *_: 1 / 0)
    row = bench._row(Case(MODEL, FP32, 1), None)
    row.contestants = {name: schema.Contestant() for name in ("ours", "peer")}
    bench.Bench(quick())._time_host_and_graph(row, dict.fromkeys(row.contestants, lambda: None), set(), 1)
    ours, peer = row.contestants.values()
    assert (peer.graph.median, peer.graph_ratio, ours.graph, ours.host) == (1.0, None, None, None)
    assert ours.note == "no CUDA graph: RuntimeError: no"


def test_results_from_before_graph_ratios_and_intervals_are_read(tmp_path):
    """The committed ones."""
    for path in (ROOT / "benchmarks" / "results").rglob("bench.json"):
        assert schema.load(path).rows
    row = bench._row(Case(MODEL, FP32, 1), None)
    spread = schema.Spread(1.0, 0.9, 1.1, 12)
    ratio = schema.Ratio(1.0, 0.9, 1.1, 12, 0.8, 1.2)
    row.contestants["timm"] = schema.Contestant(graph=spread, graph_ratio=ratio, graph_verdict="tie")
    run = schema.Run({}, {}, "2000", rows=[row])
    (tmp_path / "bench.json").write_text(json.dumps(run.as_dict()))
    assert schema.load(tmp_path / "bench.json").rows == [row]
    old = run.as_dict()
    for end in ("low", "high"):
        del old["rows"][0]["contestants"]["timm"]["graph_ratio"][end]
    (tmp_path / "bench.json").write_text(json.dumps(old))
    assert schema.load(tmp_path / "bench.json").rows[0].contestants["timm"].graph_ratio == schema.Ratio(1, 0.9, 1.1, 12)
    for name in ("graph_ratio", "graph_verdict"):
        del old["rows"][0]["contestants"]["timm"][name]
    (tmp_path / "bench.json").write_text(json.dumps(old))
    assert schema.load(tmp_path / "bench.json").rows[0].contestants["timm"].graph == spread


def test_the_suite_of_a_gpu_begins_with_what_is_worth_most():
    cases = suites.settings("cuda").cases
    small, base, large, tiny = (f"vit_{size}_patch16_224" for size in ("small", "base", "large", "tiny"))
    first = [(model, mode) for model in (base, small, large) for mode in MODES]
    assert [(case.model, case.mode, case.op) for case in cases[:6]] == [(*pair, "") for pair in first]
    assert [(case.mode, case.op) for case in cases[6:18]] == [(mode, op) for mode in MODES for op in OPS]
    assert {case.model for case in cases[6:18]} == {base}
    assert {case.batch for case in cases if case.op} == {case.batch for case in cases[:18]} == {256}
    models = [(model, batch) for model in (base, small, large, tiny) for batch in (1, 32)]
    assert [(case.model, case.batch) for case in cases[18:26]] == models
    assert {(case.mode, case.op) for case in cases[18:26]} == {("inference", "")}


def test_a_photograph_run_that_is_done_is_not_done_again(quick, monkeypatch, tmp_path):
    done = []
    found = {"ok": True, "model": MODEL}
    monkeypatch.setattr(bench, "classify_interpreted", lambda settings: done.append(1) or dict(found))
    settings = quick(Case(MODEL, FP32, 1), interpreted=MODEL)
    run, _ = bench.record(settings, tmp_path)
    again, _ = bench.record(settings, tmp_path, run)
    assert again.extra["interpreted"] == found and len(done) == 1
    run.extra["interpreted"]["ok"] = False
    bench.record(settings, tmp_path, run)
    assert len(done) == 2

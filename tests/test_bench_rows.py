"""The rows of the benchmark: honest numbers, and a peer's trouble that stays in its row."""

import dataclasses
import inspect
import sys

import pytest
import torch

import fastvit
from fastvit.dispatch import interpreting

pytest.importorskip("PIL")
from bench_runs import FP32, MODEL, as_is, rows_of  # noqa: E402
from fastvit.benchmarks import bench, peers, schema, suites, timing  # noqa: E402
from fastvit.benchmarks.cases import MODES, Case  # noqa: E402


def test_a_row_holds_speed_ratio_error_memory_and_bound(quick):
    (row,) = rows_of(quick())
    assert (row.id, row.model, row.op, row.img_size) == (f"{MODEL}/fp32/b3/inference", MODEL, "", 224)
    assert (row.tokens, row.dtype, row.batch, row.mode) == (197, "fp32", 3, "inference")
    assert (row.status, row.reason, row.items) == ("timed", "", 3)
    ours, reference = row.entries["ours"], row.entries["reference"]
    assert list(row.entries) == ["ours", "reference"]
    assert (ours.ratio, ours.verdict) == (None, "")
    low, high = reference.ratio.low, reference.ratio.high
    assert low <= reference.ratio.q25 <= reference.ratio.median <= reference.ratio.q75 <= high
    assert reference.verdict == ("faster" if low > 1 else "slower" if high < 1 else "tie")
    for entry in (ours, reference):
        assert entry.status == "timed"
        assert 0 < entry.error <= row.limit < 1e-5
        assert 0 < entry.seconds.q25 <= entry.seconds.median <= entry.seconds.q75
        assert entry.seconds.rounds == timing.MIN_ROUNDS
        assert (entry.compile_seconds, entry.graph, entry.host, entry.joules) == (None, None, None, None)
    # The median of paired ratios is near the ratio of medians.
    assert reference.ratio.median == pytest.approx(reference.seconds.median / ours.seconds.median, rel=0.5)
    cost = bench.roofline.case_cost(Case(MODEL, FP32, 3))
    assert (row.flops, row.bytes) == (cost.flops, cost.bytes)
    assert cost.flops / 1e11 <= row.bound_seconds <= cost.flops / 1e11 + cost.bytes / 1e10


def test_timm_has_the_same_weights_and_agrees(quick, monkeypatch):
    pytest.importorskip("timm")
    # timm builds the peer from our configuration: its depth too.
    rows = rows_of(quick(Case(MODEL, FP32, 2), Case(MODEL, FP32, 2, "training"), peers=("timm",)))
    for row in rows:
        assert row.entries["timm"].status == "timed", row.entries["timm"].reason
        assert row.entries["timm"].error < 1e-5


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
    assert (row.entries["peer"].status, row.entries["peer"].reason) == ("failed", message)
    assert row.entries["peer"].seconds is None
    assert row.entries["reference"].seconds


def test_an_absent_peer_is_listed_with_the_reason(quick, monkeypatch):
    peer = peers.Peer("gone", "gone", ("no_such_package",), "model", ("cpu",), MODES, "invented")
    monkeypatch.setitem(peers.PEERS, "gone", peer)
    cases = Case(MODEL, FP32, 1), Case(MODEL, FP32, 1, op="layer_norm"), Case(MODEL, FP32, 1, op="attention")
    model, norm, attention = (row.entries for row in rows_of(quick(*cases, peers=("gone", "reference", "sdpa math"))))
    assert (model["gone"].status, model["gone"].reason) == ("absent", "not installed: no_such_package")
    # A peer that has nothing of the kind is not listed.
    assert [list(entries) for entries in (model, norm, attention)] == [
        ["ours", "gone", "reference"],
        ["ours"],
        ["ours", "sdpa math"],
    ]


def test_a_note_is_kept(quick, add_peer):
    add_peer("peer", as_is, note="tanh GELU")
    (row,) = rows_of(quick(peers=("peer",)))
    assert row.entries["peer"].note == "tanh GELU"


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
    assert [entry.status for entry in row.entries.values()] == ["timed", "timed", "absent"]
    assert row.entries["timm"].reason == "not started: late"


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
    assert (model.entries["ours"].joules, op.entries["ours"].joules) == (7.0, None)

    def joules(*args):
        raise RuntimeError("the counter is gone")

    monkeypatch.setattr(timing, "joules", joules)
    (row,) = rows_of(quick())
    assert (row.status, row.entries["ours"].joules) == ("timed", None)


def test_what_cannot_be_seen_or_is_not_compiled_has_no_number(quick, add_peer, monkeypatch):
    for name in ("eager", "compiling"):
        add_peer(name, as_is)
    adapter = sys.modules["fastvit.benchmarks.peers.eager"]
    monkeypatch.setattr(adapter, "build", lambda peer, case, ours, inputs: peers.Built(ours, opaque=True))
    monkeypatch.setitem(peers.PEERS, "compiling", dataclasses.replace(peers.PEERS["compiling"], compiles=True))
    (row,) = rows_of(quick(peers=("eager", "compiling")))
    ours, eager, compiling = row.entries.values()
    assert [entry.compile_seconds is None for entry in (ours, eager, compiling)] == [True, True, False]
    assert eager.peak_bytes is None
    assert (compiling.peak_bytes is None) == (ours.peak_bytes is None)


def test_each_entry_runs_its_own_call_and_ratios_are_peer_over_ours(quick, add_peer, monkeypatch):
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
    assert [row.entries[name].ratio.median for name in ("a", "b")] == [2.0, 0.5]
    assert [row.entries[name].verdict for name in ("a", "b")] == ["faster", "slower"]
    assert row.entries["a"].seconds.median == 2.0


@pytest.mark.slow
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

    operator = inspect.getmodule(fastvit.ops.transformer_block).FORWARD
    right = operator.of(torch.empty(0))
    monkeypatch.setattr(operator, "of", lambda *tensors: lambda *args: (right(*args)[0] * 1.1, *right(*args)[1:]))
    assert not bench.classify_interpreted(settings)["ok"]


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
    row.entries = {name: schema.Entry(note="tanh GELU") for name in eager}
    settings = dataclasses.replace(quick(case, seconds=8.0), device="cuda")
    monkeypatch.setattr(timing, "energy_counter", lambda device: None)
    bench.Bench(settings)._time(row, dict.fromkeys(eager, lambda: None), {}, {"opaque"}, turns)
    ours, peer, broken, opaque = row.entries.values()
    assert budgets == [8.0, 0.5, 0.5, 0.5, 0.5, 8.0]
    assert [entry.seconds.median for entry in row.entries.values()] == [1.0, 3.0, 1.0, 1.0]
    assert [entry.host.median for entry in row.entries.values()] == [0.5] * 4
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
    row.entries = {name: schema.Entry() for name in ("ours", "peer")}
    bench.Bench(quick())._time_host_and_graph(row, dict.fromkeys(row.entries, lambda: None), set(), 1)
    ours, peer = row.entries.values()
    assert (peer.graph.median, peer.graph_ratio, ours.graph, ours.host) == (1.0, None, None, None)
    assert ours.note == "no CUDA graph: RuntimeError: no"

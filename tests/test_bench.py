"""The model benchmark: honest numbers, nothing timed that is wrong, and a peer's trouble that stays in its row."""

import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastvit
from fastvit import cli
from fastvit.dispatch import interpreting

pytest.importorskip("PIL")
from fastvit.benchmarks import bench, peers, timing  # noqa: E402

PHOTOS = Path(__file__).parent.parent / "benchmarks" / "photos"
MODEL = "vit_tiny_patch16_224"


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Settings of a run that takes a second: one tiny model, two photographs, few rounds."""
    monkeypatch.setattr(timing, "ROUND_SECONDS", 0)
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("chelsea.jpg", "coffee.jpg"):
        shutil.copy(PHOTOS / name, photos)

    def settings(**chosen):
        defaults = {"models": (MODEL,), "batches": (3,), "dtypes": (torch.float32,), "peers": ("reference",)}
        return bench.Settings(device="cpu", photos=photos, seconds=1e-9, **defaults | chosen)

    return settings


def broken(name):
    """A peer that cannot be made, or that raises when it runs."""

    def make(model, model_name):
        def call(images):
            raise torch.OutOfMemoryError("tried to allocate everything\nand more")

        if name == "absent":
            raise ImportError("no such library\nat all")
        return call

    return make


def test_a_row_holds_speed_ratio_error_and_memory(quick):
    (row,) = bench.run(quick())
    assert (row.model, row.dtype, row.batch, row.status) == (MODEL, "fp32", 3, "timed")
    ours, reference = row.contestants["ours"], row.contestants["reference"]
    assert ours.ratio is None
    for side in (ours, reference):
        assert 0 < side.error < 1e-5
        assert 0 < side.images_per_s["q25"] <= side.images_per_s["median"] <= side.images_per_s["q75"]
    # The median of paired ratios is near the ratio of medians.
    assert reference.ratio["median"] == pytest.approx(
        ours.images_per_s["median"] / reference.images_per_s["median"], rel=0.5
    )
    assert row.top5["photos"] == ["chelsea.jpg", "coffee.jpg"]
    assert (row.top5["same_first"], row.top5["same_in_top5"]) == (2, 10)
    json.dumps(row.as_dict(), allow_nan=False)


def test_timm_has_the_same_weights_and_agrees(quick):
    pytest.importorskip("timm")
    (row,) = bench.run(quick(peers=("timm",)))
    assert row.contestants["timm"].error < 1e-5


def test_without_pillow_the_images_are_random_and_the_results_say_so(quick, monkeypatch):
    find_spec = bench.importlib.util.find_spec
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None if name == "PIL" else find_spec(name))
    (row,) = bench.run(quick())
    assert row.status == "timed"
    assert row.top5["photos"][0] == "random 0"
    assert "Pillow is not installed" in quick().as_dict()["images"]


@pytest.mark.skipif(not interpreting(), reason="a GPU runs the kernels in the rows themselves")
def test_photographs_are_classified_on_the_kernels(quick, monkeypatch):
    """With one photograph and two blocks, to be quick; and a wrong kernel shows."""
    create = fastvit.create_model
    monkeypatch.setattr(fastvit, "create_model", lambda name, **kwargs: create(name, depth=2, **kwargs))
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
    assert bench.default_settings("cpu").interpreted == MODEL
    assert bench.default_settings("cpu", models=(MODEL,)).interpreted is None
    assert bench.default_settings("cuda").interpreted is None


def test_a_wrong_model_is_not_timed(quick, monkeypatch):
    right = fastvit.VisionTransformer.forward
    monkeypatch.setattr(fastvit.VisionTransformer, "forward", lambda self, images: right(self, images) * 1.001)
    monkeypatch.setattr(bench, "interleave", lambda *args: pytest.fail("timed a wrong model"))
    (row,) = bench.run(quick())
    assert row.status == "wrong"
    assert "not timed: error 1.00e-03" in row.reason
    assert row.contestants["ours"].images_per_s is None


def test_not_a_number_is_not_timed(quick, monkeypatch):
    right = fastvit.VisionTransformer.forward
    monkeypatch.setattr(fastvit.VisionTransformer, "forward", lambda self, images: right(self, images) * float("nan"))
    (row,) = bench.run(quick())
    assert row.status == "wrong"


@pytest.mark.parametrize(("kind", "message"), [("absent", "ImportError: no such library"), ("full", "out of memory")])
def test_a_peer_that_raises_stays_in_its_row(quick, monkeypatch, kind, message):
    monkeypatch.setitem(peers.PEERS, "peer", broken(kind))
    (row,) = bench.run(quick(peers=("peer", "reference")))
    assert row.status == "timed"
    assert row.contestants["peer"].failure == message
    assert row.contestants["reference"].images_per_s


def test_ours_out_of_memory_fails_its_batch_and_the_rest_goes_on(quick, monkeypatch):
    right = fastvit.VisionTransformer.forward

    def forward(self, images):
        if len(images) == 5:
            raise torch.OutOfMemoryError("too much")
        return right(self, images)

    monkeypatch.setattr(fastvit.VisionTransformer, "forward", forward)
    rows = list(bench.run(quick(batches=(5, 1))))
    assert [(row.status, row.reason) for row in rows] == [("failed", "out of memory"), ("timed", "")]


def test_a_model_that_cannot_be_made_fails_its_rows_only(quick):
    rows = list(bench.run(quick(models=("vit_absent", MODEL))))
    assert [row.status for row in rows] == ["failed", "timed"]
    assert "unknown model" in rows[0].reason


def test_the_time_limit_skips_rows(quick):
    rows = list(bench.run(quick(time_limit=1e-9, batches=(1, 2))))
    assert [row.status for row in rows] == ["skipped", "skipped"]


def test_interleaved_rounds_are_paired_and_drift_cancels():
    """A machine that slows down steadily must not favour either side."""
    now, calls = [0.0], {"a": 0, "b": 0}

    def slowing(name, work):
        def call():
            calls[name] += 1
            now[0] += work * (1 + now[0] / 1000)

        return call

    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patched:
        patched.setattr(timing.time, "perf_counter", lambda: now[0])
        measured = timing.interleave({"a": slowing("a", 1.0), "b": slowing("b", 2.0)}, "cpu", seconds=200.0)
    assert len(measured["a"]) == len(measured["b"]) >= timing.MIN_ROUNDS
    ratios = [b / a for a, b in zip(measured["a"], measured["b"], strict=True)]
    assert statistics.median(ratios) == pytest.approx(2.0, rel=0.01)


def test_quartiles():
    assert timing.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "q25": 2.0, "q75": 4.0}


def test_peak_memory_sees_what_a_call_takes_and_gives_back():
    megabytes = 64

    def call():
        block = torch.ones(megabytes << 20, dtype=torch.uint8)
        return block[0].item()

    peak = timing.peak_memory(call, "cpu")
    if peak is None:
        pytest.skip("this system does not tell the peak")
    assert peak == pytest.approx(megabytes << 20, rel=0.25)
    assert timing.peak_memory(lambda: None, "cpu") < 4 << 20


def test_command_prints_a_table_and_writes_json_and_a_picture(quick, tmp_path, capsys):
    photos, output = quick().photos, tmp_path / "results"
    arguments = ["bench", "--device", "cpu", "--models", MODEL, "--batches", "1,2", "--dtypes", "fp32,bf16"]
    arguments += ["--peers", "reference", "--photos", str(photos), "--seconds", "1e-9", "-o", str(output)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert "weights: random, seed 0" in printed.err
    assert "With random weights the classes mean nothing" in printed.out
    assert "\x1b" not in printed.out + printed.err
    written = json.loads((output / "bench.json").read_text())
    assert written["finished"] is True
    assert [(row["dtype"], row["batch"]) for row in written["rows"]] == [
        ("fp32", 1),
        ("fp32", 2),
        ("bf16", 1),
        ("bf16", 2),
    ]
    for row in written["rows"]:
        assert f"{row['contestants']['ours']['images_per_s']['median']:.1f}" in printed.out
    if cli.importlib.util.find_spec("matplotlib"):
        from PIL import Image

        with Image.open(output / "bench.png") as picture:
            assert min(picture.size) > 400
    else:
        assert "No picture" in printed.err


def test_command_keeps_what_it_has_when_interrupted(quick, monkeypatch, tmp_path, capsys):
    right = bench._Contestants.row

    def row(self, batch):
        if batch == 2:
            raise KeyboardInterrupt
        return right(self, batch)

    monkeypatch.setattr(bench._Contestants, "row", row)
    photos, output = quick().photos, tmp_path / "results"
    arguments = ["bench", "--device", "cpu", "--models", MODEL, "--batches", "1,2", "--dtypes", "fp32"]
    arguments += ["--peers", "reference", "--photos", str(photos), "--seconds", "1e-9", "-o", str(output)]
    assert cli.main(arguments) == 130
    assert "Interrupted after 1 of 2 rows" in capsys.readouterr().err
    written = json.loads((output / "bench.json").read_text())
    assert (written["finished"], len(written["rows"])) == (False, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "vit_tony_patch16_224"], "unknown model 'vit_tony_patch16_224'; did you mean"),
        (["--peers", "nobody"], "unknown peer 'nobody'"),
        (["--photos", "absent"], "--photos absent: no such folder"),
    ],
)
def test_command_refuses_unknown_names(arguments, message, tmp_path, capsys):
    assert cli.main(["bench", "--device", "cpu", "-o", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_each_contestant_runs_its_own_call_and_ratios_are_peer_over_ours(quick, monkeypatch):
    ran, seen = [], {}
    for name in ("a", "b"):
        monkeypatch.setitem(peers.PEERS, name, lambda model, _, name=name: lambda i: (ran.append(name), model(i))[1])

    def interleave(calls, *_):
        for name, call in calls.items():
            ran.clear()
            call()
            seen[name] = list(ran)
        return {"ours": [1.0] * 5, "a": [2.0] * 5, "b": [0.5] * 5}

    monkeypatch.setattr(bench, "interleave", interleave)
    (row,) = bench.run(quick(peers=("a", "b")))
    assert seen == {"ours": [], "a": ["a"], "b": ["b"]}
    assert [row.contestants[name].ratio["median"] for name in ("a", "b")] == [2.0, 0.5]
    assert row.contestants["a"].images_per_s["median"] == 1.5


def test_a_wrong_row_beside_a_timed_one_fails_the_command(quick, monkeypatch, tmp_path):
    right = bench._Contestants.row
    monkeypatch.setattr(
        bench._Contestants,
        "row",
        lambda self, batch: replace(right(self, batch), status="wrong" if batch == 2 else "timed"),
    )
    arguments = ["bench", "--device", "cpu", "--models", MODEL, "--batches", "1,2", "--dtypes", "fp32"]
    arguments += ["--peers", "reference", "--photos", str(quick().photos), "--seconds", "1e-9"]
    assert cli.main([*arguments, "-o", str(tmp_path / "results")]) == 1


@pytest.mark.parametrize("ok", [True, False])
def test_wrong_kernels_in_the_interpreter_fail_the_command(quick, monkeypatch, tmp_path, ok):
    found = {"ok": ok, "photos": [], "ours": [], "reference": [], "model": MODEL, "dtype": "bf16"}
    found |= {"error": 1.0, "plain_error": 1.0, "seconds": 1.0}
    monkeypatch.setattr(bench, "default_settings", lambda device, **_: quick(batches=(1,), interpreted=MODEL))
    monkeypatch.setattr(bench, "classify_interpreted", lambda settings: found)
    monkeypatch.setattr(cli, "_use_interpreter", lambda: None)
    assert cli.main(["bench", "--device", "cpu", "-o", str(tmp_path / "results")]) == (0 if ok else 1)


def test_rounds_run_in_random_order(monkeypatch):
    now, order = [0.0], []

    def call(name):
        def run():
            now[0] += 1.0
            order.append(name)

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    timing.interleave({"a": call("a"), "b": call("b")}, "cpu", seconds=60.0)
    assert {tuple(order[i : i + 2]) for i in range(4, len(order), 2)} == {("a", "b"), ("b", "a")}


def test_an_unreadable_photograph_is_named_and_left_out(quick, capsys):
    settings = quick()
    (settings.photos / "bad.jpg").write_text("no image")
    (row,) = bench.run(settings)
    assert row.status == "timed"
    assert row.top5["photos"] == ["chelsea.jpg", "coffee.jpg"]
    assert "bad.jpg: not an image" in capsys.readouterr().err

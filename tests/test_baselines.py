"""`fastvit bench --baselines`: the published figures, what is timed and written, and the picture's labels."""

import itertools

import pytest
import torch

from fastvit import cli, list_models
from fastvit.report import write_json

pytest.importorskip("PIL")
from fastvit.benchmarks import baselines, timing, top1  # noqa: E402
from fastvit.benchmarks.report import baselines as written  # noqa: E402
from fastvit.benchmarks.report import summary  # noqa: E402
from fastvit.benchmarks.schema import Entry, Row, Run, Spread, load  # noqa: E402

from fastvit import torchvision_shim  # noqa: E402

TINY, CNN = "deit_tiny_patch16_224", "test_resnet"  # timm's own network for tests


@pytest.fixture
def timm():
    torchvision_shim.install()
    return pytest.importorskip("timm")


@pytest.fixture
def tiny(timm, quick, monkeypatch):
    """Two networks that take milliseconds."""
    figures = (top1.Figure(TINY, "fb_in1k", "Ti", 72.2, "x"), top1.Figure(CNN, "r160_in1k", "CNN", 60.0, "y"))
    monkeypatch.setattr(written, "FIGURES", figures)
    monkeypatch.setattr(baselines, "NETWORKS", (TINY, CNN))


def arguments(photos, output, *more):
    first = ["bench", "--baselines", "--device", "cpu", "--photos", str(photos), "--dtypes", "fp32"]
    return [*first, "--seconds", "1e-9", "-o", str(output), *more]


def fake(*rows):
    """A run of these (dtype, mode, speed of every network, or by its name)."""
    found = []
    for dtype, mode, speed in rows:
        row = Row(f"baselines/{dtype}/b4/{mode}", "baselines", "", 224, 0, dtype, 4, mode, "timed", items=4)
        for i, name in enumerate(top1.NETWORKS):
            seconds = 4 / (speed.get(name, 1) if isinstance(speed, dict) else speed * 1.3**i)
            row.entries[name] = Entry(seconds=Spread(seconds, seconds, seconds, 12))
        found.append(row)
    return Run({"device": "d"}, {}, "2026-01-01T00:00:00", rows=found)


def test_every_figure_has_a_source_and_weights_of_a_network_that_is_timed(timm):
    known = timm.list_models(pretrained=True)
    for figure in top1.FIGURES:
        assert f"{figure.network}.{figure.weights}" in known
        assert written.is_vit(figure.network) == figure.network.startswith(("deit", "vit"))
        assert "](https://" in figure.source
    for what in ("label", "top1"):
        assert len({getattr(figure, what) for figure in top1.FIGURES}) == len(top1.FIGURES)
    assert set(top1.NETWORKS) - set(list_models()) == {"resnet18", "resnet50", "regnety_160"}


def test_figures_are_what_torchvision_says_of_its_weights(timm):
    models = pytest.importorskip("torchvision").models
    theirs = {
        "resnet18": models.ResNet18_Weights.IMAGENET1K_V1,
        "resnet50": models.ResNet50_Weights.IMAGENET1K_V1,
        "regnety_160": models.RegNet_Y_16GF_Weights.IMAGENET1K_V1,  # pycls's, trained anew
    }
    ours = {figure.network: figure.top1 for figure in top1.FIGURES if figure.weights in ("tv_in1k", "pycls_in1k")}
    for name, weights in theirs.items():
        assert ours[name] == pytest.approx(weights.meta["_metrics"]["ImageNet-1K"]["acc@1"], abs=0.2)


def test_a_run_times_all_networks_in_both_modes_and_draws_them(tiny, photos, tmp_path, capsys):
    assert cli.main(arguments(photos, tmp_path, "--batches", "2")) == 0
    run = load(tmp_path / "baselines.json")
    assert run.finished
    assert [row.id for row in run.rows] == ["baselines/fp32/b2/inference", "baselines/fp32/b2/training"]
    for row in run.rows:
        frozen = [f"frozen {TINY}"] if row.mode == "inference" else []
        assert list(row.entries) == [TINY, *frozen, CNN]
        assert all(entry.seconds.rounds >= timing.MIN_ROUNDS for entry in row.entries.values())
    table = (tmp_path / "baselines.md").read_text().splitlines()
    cells = {line.split(" | ")[0]: line.split(" | ") for line in table if line.startswith("| ")}
    assert cells["| Ti"][1:3] == [f"`{TINY}.fb_in1k`", "72.2"] and cells["| CNN"][2] == "60.0"
    assert all(cells["| Ti"][3:6]) and cells["| CNN"][4].strip() == "" and cells["| CNN"][5]
    printed = capsys.readouterr().out
    assert all(row.id in printed for row in run.rows)
    if written.installed("matplotlib"):
        png = (tmp_path / "baselines.png").read_bytes()
        assert png.startswith(b"\x89PNG") and len(png) > 5000
        written.write(run, tmp_path)
        assert (tmp_path / "baselines.png").read_bytes() == png


def test_a_training_step_computes_the_gradients_of_all_parameters(tiny):
    settings = baselines.settings("cpu", modes=("training",), batches=(1,), dtypes=(torch.float32,))
    bench, (case,) = baselines.Baselines(settings), settings.cases
    for name in bench._names(case):
        network = bench._network(name, case)
        assert network.training
        step = baselines.timed_step([lambda network=network: network(torch.ones(1, 3, 224, 224))], True)
        shapes = sorted(tuple(gradient.shape) for gradient in step())
        assert shapes == sorted(tuple(parameter.shape) for parameter in network.parameters())


def test_a_run_that_was_interrupted_keeps_its_rows_and_goes_on(tiny, photos, monkeypatch, tmp_path):
    right, measured = baselines.Baselines._measure, []

    def measure(self, row, case):
        measured.append(case.mode)
        if measured == ["inference", "training"]:
            raise KeyboardInterrupt
        right(self, row, case)

    monkeypatch.setattr(baselines.Baselines, "_measure", measure)
    monkeypatch.setattr(written, "installed", lambda package: package != "matplotlib")
    assert cli.main(arguments(photos, tmp_path)) == 130
    (kept,) = load(tmp_path / "baselines.json").rows
    assert kept.mode == "inference"
    assert cli.main(arguments(photos, tmp_path, "--resume")) == 0
    assert measured == ["inference", "training", "training"]
    assert load(tmp_path / "baselines.json").rows[0] == kept


@pytest.mark.parametrize("when", ["before the rounds", "before a network"])
def test_no_row_starts_that_does_not_fit_the_time_limit(tiny, photos, monkeypatch, tmp_path, when):
    monkeypatch.setattr(written, "installed", lambda package: package != "matplotlib")
    monkeypatch.setattr(timing, "interleave", lambda *_: pytest.fail("it started"))
    if when == "before the rounds":
        monkeypatch.setattr(timing, "interleave_seconds", lambda *_: 1000.0)
    assert cli.main(arguments(photos, tmp_path, "--time-limit", "500" if when == "before the rounds" else "1e-9")) == 1
    run = load(tmp_path / "baselines.json")
    assert not run.finished
    assert {row.status for row in run.rows} == {"skipped"}
    expected = "not started: its rounds take 16 min 40 s or more, and the time limit of 500 s leaves less"
    assert when == "before a network" or {row.reason for row in run.rows} == {expected}
    assert f"Not timed: {run.rows[0].id}: not started" in (tmp_path / "baselines.md").read_text()


def test_a_network_that_fails_does_not_stop_the_others(tiny, timm, photos, monkeypatch, tmp_path):
    def create_model(name):
        raise RuntimeError("no such weather")

    monkeypatch.setattr(timm, "create_model", create_model)
    assert cli.main(arguments(photos, tmp_path, "--modes", "training")) == 1
    (row,) = load(tmp_path / "baselines.json").rows
    assert row.entries[TINY].seconds
    assert (row.entries[CNN].status, row.entries[CNN].reason) == ("failed", "RuntimeError: no such weather")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ops", "attention"], "--baselines takes no --ops"),
        (["--img-sizes", "64"], "--baselines takes no --img-sizes"),
        (["--pretrained"], "--baselines takes no --pretrained: weights do not change a speed"),
        (["--models", "resnet*,alexnet"], "unknown baseline 'alexnet', expected some of resnet18, resnet50, "),
        (["--modes", "sleep"], "mode is 'sleep', expected one of inference, training"),
    ],
)
def test_what_it_refuses(timm, photos, tmp_path, capsys, more, message):
    assert cli.main(arguments(photos, tmp_path, *more)) == 2
    assert message in capsys.readouterr().err


def test_without_timm_it_says_so_in_a_line(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(written, "installed", lambda package: False)
    assert cli.main(arguments(photos, tmp_path)) == 2
    assert capsys.readouterr().err.strip().endswith("--baselines: timm is not installed: pip install timm")


def test_models_are_patterns_in_the_order_of_the_figures(timm):
    assert baselines.settings("cpu", ["deit_*distilled*", "resnet50"]).peers == (
        *("resnet50", "deit_tiny_distilled_patch16_224", "deit_small_distilled_patch16_224"),
        "deit_base_distilled_patch16_224",
    )
    every = baselines.settings("cuda")
    assert every.peers == top1.NETWORKS
    assert [case.id for case in every.cases] == ["baselines/bf16/b256/inference", "baselines/bf16/b256/training"]


def test_each_network_is_shown_at_its_fastest():
    run = fake(("fp32", "training", {"resnet50": 3.0, TINY: 9.0}), ("bf16", "training", {"resnet50": 5.0, TINY: 7.0}))
    assert str(written.fastest(run, "training", "resnet50")) == "5.00 (bf16, batch 4)"
    assert str(written.fastest(run, "training", TINY)) == "9.00 (fp32, batch 4)"
    assert written.fastest(run, "inference", TINY) is None
    found = {figure.label: speed for figure, speed, _ in written.points(run)["training"]}
    assert found["ResNet-50"] == found["ResNet-50, A1"] == pytest.approx(5.0)


def test_names_in_the_picture_cover_nothing(monkeypatch):
    pictures = pytest.importorskip("fastvit.benchmarks.report.pictures")
    drawn = []
    monkeypatch.setattr(pictures, "_png", lambda figure: drawn.append(figure) or b"")
    speeds = dict(zip(top1.NETWORKS, (300, 120, 33, 250, 94, 29, 248, 92, 28, 110), strict=True))
    run = fake(("fp32", "inference", speeds), ("fp32", "training", 5.0))
    assert pictures.accuracy_against_speed(run, written.points(run), written.is_vit) == b""
    (figure,) = drawn
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert [text.get_text() for text in axes.texts] == [each.label for each in top1.FIGURES]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        points = [axes.transData.transform(point) for line in axes.lines for point in line.get_xydata()]
        assert not any(box.contains(*point) for box in boxes for point in points)


def test_the_results_page_has_them(tmp_path):
    folder = tmp_path / summary.RESULTS / "imaginary"
    folder.mkdir(parents=True)
    run = fake(("fp32", "inference", 5.0))
    write_json(folder / "baselines.json", run.as_dict())
    (tmp_path / "README.md").write_text(f"{summary.BEGIN}\n{summary.END}\n")
    summary.main(tmp_path)
    text = (tmp_path / summary.RESULTS / "README.md").read_text()
    assert written.markdown(run) in text
    if written.installed("matplotlib"):
        assert 'src="imaginary/baselines.png"' in text
        assert (folder / "baselines.png").exists()

"""`fastvit bench`: what it prints and writes, what it refuses, and how it goes on where an earlier run ended."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fastvit
from fastvit import cli, environment, tuned
from fastvit.dispatch import interpreting

pytest.importorskip("PIL")
from bench_runs import FP32, MODEL, ROOT  # noqa: E402
from fastvit.benchmarks import bench, report, schema, suites, work  # noqa: E402
from fastvit.benchmarks.cases import Case  # noqa: E402
from fastvit.benchmarks.report import words  # noqa: E402


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
    assert run.peaks.bytes_per_s == 1e10
    assert set(run.extra["top5"]) == {f"{MODEL}@224/fp32", f"{MODEL}@224/bf16"}
    assert (output / "bench.csv").exists()
    assert (output / "index.html").exists()
    if importlib.util.find_spec("matplotlib"):
        assert list(output.glob("*.png"))
    else:
        assert "No pictures" in printed.err


@pytest.mark.parametrize("rate", [1.0, 1e30])
def test_an_entry_faster_than_the_bound_is_said_at_the_end(
    quick, no_pictures, photos, monkeypatch, tmp_path, capsys, rate
):
    """In the page's words, once, under the table."""
    peaks = schema.Peaks(rate, {"fp32": rate})
    monkeypatch.setattr(bench.roofline, "measure_peaks", lambda device, dtypes: peaks)
    assert cli.main(arguments(photos, tmp_path, "--batches", "1,2", "--dtypes", "fp32")) == 0
    printed, caveats = capsys.readouterr().out, words.caveats(schema.load(tmp_path / "bench.json"))
    said = [sentence for sentence in caveats if sentence.startswith("Faster than the roofline bound: ours (up to ")]
    assert len(said) == printed.count("Faster than the roofline bound") == (rate == 1)
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

    def row(self, case, peaks):
        measured.append(case.batch)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.Bench, "row", row)
    printed = []
    assert bench.record(settings, tmp_path, before, lambda row: printed.append(row.batch))[1]
    assert (printed, measured) == ([2, 3], [1])
    assert [row.batch for row in schema.load(tmp_path / "bench.json").rows] == [2, 3]

    def interrupted(device, dtypes):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.roofline, "measure_peaks", interrupted)
    run, _ = bench.record(settings, tmp_path, before)
    assert [row.batch for row in schema.load(tmp_path / "bench.json").rows] == [2, 3]
    assert run.peaks == before.peaks


def test_the_bounds_of_kept_rows_are_at_the_peaks_of_the_run(quick, tmp_path, monkeypatch):
    settings = quick()
    before, _ = bench.record(settings, tmp_path)
    bound, seconds = before.rows[0].bound_seconds, before.rows[0].entries["ours"].seconds
    twice = schema.Peaks(2e10, {"fp32": 2e11})
    monkeypatch.setattr(bench.roofline, "measure_peaks", lambda device, dtypes: twice)
    (row,) = bench.record(settings, tmp_path, before)[0].rows
    assert row.bound_seconds == pytest.approx(bound / 2)
    assert row.entries["ours"].seconds == seconds


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
    run.rows[0].entries["reference"] = schema.Entry("absent", "not started: the time limit of 1 s was reached")
    again, _ = bench.record(settings, tmp_path, run)
    assert again.rows[0].entries["reference"].status == "timed"


def test_to_resume_from_another_file_is_refused(photos, tmp_path, capsys):
    (tmp_path / "bench.json").write_text('{"kind": "fastvit bench", "schema": 2}')
    assert cli.main(arguments(photos, tmp_path, "--resume")) == 2
    assert "of schema 2, expected" in capsys.readouterr().err


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

    def row(self, case, peaks):
        found = right(self, case, peaks)
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


def test_results_from_before_graph_ratios_and_intervals_are_read(tmp_path):
    """The committed ones."""
    for path in (ROOT / "benchmarks" / "results").rglob("bench.json"):
        assert schema.load(path).rows
    row = bench._row(Case(MODEL, FP32, 1), None)
    spread = schema.Spread(1.0, 0.9, 1.1, 12)
    ratio = schema.Ratio(1.0, 0.9, 1.1, 12, 0.8, 1.2)
    row.entries["timm"] = schema.Entry(graph=spread, graph_ratio=ratio, graph_verdict="tie")
    run = schema.Run({}, {}, "2000", rows=[row])
    (tmp_path / "bench.json").write_text(json.dumps(run.as_dict()))
    assert schema.load(tmp_path / "bench.json").rows == [row]
    old = run.as_dict()
    for end in ("low", "high"):
        del old["rows"][0]["entries"]["timm"]["graph_ratio"][end]
    (tmp_path / "bench.json").write_text(json.dumps(old))
    assert schema.load(tmp_path / "bench.json").rows[0].entries["timm"].graph_ratio == schema.Ratio(1, 0.9, 1.1, 12)
    for name in ("graph_ratio", "graph_verdict"):
        del old["rows"][0]["entries"]["timm"][name]
    (tmp_path / "bench.json").write_text(json.dumps(old))
    assert schema.load(tmp_path / "bench.json").rows[0].entries["timm"].graph == spread


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


def test_triton_is_not_there_before_the_interpreter_is_asked_for(tmp_path):
    """In a process of its own, without what the tests put into the environment: `make bench` on a CPU."""
    script = (
        "import sys\n"
        "from fastvit import cli, verify\n"
        "def asked():\n"
        "    sys.exit(7 if 'triton' in sys.modules else 6)\n"
        "verify.use_interpreter = asked\n"
        f"cli.main(['bench', '--device', 'cpu', '--output', {str(tmp_path)!r}])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 6

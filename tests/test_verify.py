"""`fastvit verify` itself: sound kernels pass, and every planted fault fails its row, and only its row."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastvit
from fastvit import accuracy, cli, verify, workers
from fastvit.commands._common import VERIFIED
from fastvit.dispatch import requested_backend

needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="the small list is for the interpreter")
ROWS = {"batch": 2, "tokens": 5, "dim": 64}
SMALL = verify._op_case(torch.float32, "layer_norm", "small", 0, ROWS)


def plant(monkeypatch, op: str, fault):
    """Make op's Triton back end wrong by `fault(output)`, and leave plain PyTorch as it is."""
    right = getattr(fastvit.ops, op)

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        return fault(out) if requested_backend() == "triton" else out

    monkeypatch.setattr(fastvit.ops, op, wrong)


def test_relative_rms():
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert accuracy.relative_rms(truth * 1.25, truth) == pytest.approx(0.25)
    assert accuracy.relative_rms(truth.bfloat16(), truth) == 0
    assert accuracy.relative_rms(torch.full((4,), 2.0), torch.zeros(4)) == 2
    assert math.isnan(accuracy.relative_rms(truth * math.nan, truth))


def test_floor_is_what_one_rounding_costs():
    values = torch.rand(100_000, dtype=torch.float64) + 1
    for dtype in (torch.bfloat16, torch.float16):
        rounding = accuracy.relative_rms(values.to(dtype), values)
        assert 0.5 * accuracy.floor(dtype) < rounding <= accuracy.floor(dtype)


def test_nan_is_never_ok():
    assert not verify.TensorResult("out", math.nan, 0.1, 0.2).ok
    assert not verify.TensorResult("out", 0.1, math.nan, math.nan).ok


def test_a_sound_op_passes():
    result = verify.run_case(SMALL, "cpu")
    assert (result.status, result.reason) == ("passed", "")
    assert [t.name for t in result.tensors] == ["out", "d x", "d weight", "d bias"]
    assert all(0 < t.ours < 1e-6 for t in result.tensors)


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        (lambda out: out * 1.00001, {"out"}),
        (lambda out: out + (out - out.detach()) * 1e-5, {"d x", "d weight", "d bias"}),
        (lambda out: out * math.nan, {"out", "d x", "d weight", "d bias"}),
    ],
    ids=["forward", "backward", "nan"],
)
def test_a_planted_fault_fails(monkeypatch, fault, wrong):
    plant(monkeypatch, "layer_norm", fault)
    result = verify.run_case(SMALL, "cpu")
    assert result.status == "failed"
    assert wrong <= {t.name for t in result.tensors if not t.ok}
    assert all(name in result.reason for name in wrong)
    json.dumps(result.as_dict(), allow_nan=False)


def test_a_call_that_changes_when_it_is_repeated_fails():
    """On a GPU, where the third call is a replay; here of a case that says so."""
    truth = {"out": torch.ones(3, dtype=torch.float64), "d x": torch.ones(3, dtype=torch.float64)}
    for off in (None, 1, 2):
        calls = []

        def ours(calls=calls, off=off):
            calls.append(1)
            changed = {"d x": torch.tensor([1, 1, 1 + 1.2e-7])} if len(calls) - 2 == off else {}
            return {name: value.float() for name, value in truth.items()} | changed

        case = verify.Case("op", "case", torch.float32, lambda device, ours=ours: (lambda: truth, ours, ours))
        result = verify.run_case(case, "cuda")
        assert len(calls) == 4  # plain PyTorch's, and ours
        assert result.status == ("passed" if off is None else "failed"), off
        assert result.status == "passed" or result.reason == "d x is not the same when the call is repeated"


def test_a_wrong_dtype_or_shape_fails(monkeypatch):
    plant(monkeypatch, "layer_norm", lambda out: out.double())
    assert "torch.float64" in verify.run_case(SMALL, "cpu").reason


def test_an_exception_is_a_failed_row_and_the_rest_goes_on(monkeypatch):
    def explode(out):
        raise RuntimeError("kernel fault\nand its details")

    plant(monkeypatch, "layer_norm", explode)
    other = verify._op_case(torch.float32, "linear_residual", "small", 0, ROWS | {"out": 64})
    broken, sound = verify.run([SMALL, other], "cpu")
    assert (broken.status, broken.reason) == ("failed", "RuntimeError: kernel fault")
    assert sound.status == "passed"


def test_the_time_limit_skips_and_says_so():
    results = list(verify.run([SMALL, SMALL], "cpu", time_limit=1e-9))
    assert [result.status for result in results] == ["skipped", "skipped"]
    assert "time limit" in results[0].reason


@pytest.mark.parametrize("sizes", [verify.DEVICE, verify.INTERPRETER], ids=["device", "interpreter"])
def test_the_lists_cover_every_op_and_dtype(sizes):
    cases = verify.cases(sizes)
    assert len({case.name for case in cases}) == len(cases)
    for dtype in accuracy.FACTOR:
        assert {case.op for case in cases if case.dtype == dtype} == set(VERIFIED)
    assert [case.rank for case in cases] == sorted(case.rank for case in cases)
    assert {case.op for case in verify.cases(sizes, ops=["attention"])} == {"attention"}


def test_the_models_of_the_lists_exist():
    for sizes in (verify.DEVICE, verify.INTERPRETER):
        for name, _ in sizes.models:
            assert fastvit.list_models(name) == [name]


@pytest.mark.parametrize("name", sorted({name for name, _ in verify.DEVICE.models}))
def test_every_listed_model_agrees_with_the_reference_in_plain_pytorch(name):
    """One block of each, on PyTorch: that the list itself is right must not need a GPU to be seen."""
    patch = 14 if "patch14" in name else 32 if "patch32" in name else 16
    case = verify._model_case(name, name, torch.float32, 1, 0, img_size=2 * patch, depth=1)
    truth_of, plain_of, ours_of = case.prepare("cpu")
    with fastvit.use_backend("torch"):
        ours = ours_of()
    truth = truth_of()
    assert ours.keys() == truth.keys()
    for key in truth:
        assert accuracy.relative_rms(ours[key], truth[key]) < 1e-5, key


def test_randomise_makes_every_parameter_matter():
    model = fastvit.create_model("vit_tiny_patch16_224", img_size=32, depth=1, init_values=1e-5, reg_tokens=1)
    verify.randomise(model)
    before = model.state_dict()
    for name, parameter in model.named_parameters():
        assert parameter.std() > 0.01, name
    verify.randomise(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@needs_interpreter
def test_command_writes_json_and_says_it_is_the_interpreter(tmp_path, capsys):
    output = tmp_path / "v.json"
    chosen = ["--device", "cpu", "--ops", "layer_norm", "--dtypes", "bf16", "--jobs", "1"]
    assert cli.main(["verify", *chosen, "--json", str(output)]) == 0
    printed = capsys.readouterr()
    assert "interpreter on the CPU, not on a GPU" in printed.err
    assert "1 passed, 0 failed, 0 not run" in printed.out
    assert "\x1b" not in printed.out + printed.err
    written = json.loads(output.read_text())
    assert written["finished"] is True
    assert [row["status"] for row in written["results"]] == ["passed"]
    assert written["environment"]["torch"] == torch.__version__


@needs_interpreter
def test_command_fails_on_a_planted_fault(monkeypatch, tmp_path, capsys):
    plant(monkeypatch, "layer_norm", lambda out: out * 1.01)
    output = tmp_path / "v.json"
    assert cli.main(["verify", "--device", "cpu", "--ops", "layer_norm", "--jobs", "1", "--json", str(output)]) == 1
    printed = capsys.readouterr()
    assert "FAIL" in printed.out
    assert "0 passed, 3 failed" in printed.out
    assert {row["status"] for row in json.loads(output.read_text())["results"]} == {"failed"}


@needs_interpreter
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_command_never_calls_a_skipped_list_a_success(jobs, capsys):
    limited = ["--jobs", jobs, "--time-limit", "1e-9"]
    assert cli.main(["verify", "--device", "cpu", "--ops", "layer_norm", *limited]) == 1
    printed = capsys.readouterr()
    assert "0 passed, 0 failed, 3 not run" in printed.out
    assert "what was not run has not passed" in printed.err


@needs_interpreter
def test_command_keeps_what_it_has_when_interrupted(monkeypatch, tmp_path, capsys):
    right, output = verify.run_case, tmp_path / "v.json"

    def interrupted_at_the_second(case, device):
        if case.dtype == torch.float32:
            raise KeyboardInterrupt
        return right(case, device)

    monkeypatch.setattr(verify, "run_case", interrupted_at_the_second)
    assert cli.main(["verify", "--device", "cpu", "--ops", "layer_norm", "--jobs", "1", "--json", str(output)]) == 130
    assert "Interrupted after 1 of 3 cases" in capsys.readouterr().err
    written = json.loads(output.read_text())
    assert (written["finished"], len(written["results"])) == (False, 1)


@pytest.mark.slow
@needs_interpreter
def test_processes_verify_what_one_does():
    """The same cases, the same errors to the last digit, in whatever order they come. MKL_CBWR: MKL's sums, too, are
    then the same wherever their memory lies."""

    def rows(jobs):
        chosen = ["--device", "cpu", "--ops", "layer_norm,linear_residual", "--dtypes", "bf16,fp32", "--jobs", jobs]
        environment = os.environ | {"MKL_CBWR": "COMPATIBLE"}
        command = [sys.executable, "-m", "fastvit", "verify", *chosen]
        ran = subprocess.run(
            command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=True
        )
        return sorted(re.sub(r" +\d+\.\d+  ok$", "", line) for line in ran.stdout.splitlines()[2:-1])

    assert rows("2") == rows("1") != []


def test_what_found_no_memory_beside_others_runs_again_alone(monkeypatch):
    asked = []

    def run(groups, serve, count, seconds, deadline):
        for name in [name for group in groups for name in group]:
            asked.append((name, count))
            if name == "layer_norm small fp32" and count > 1:
                yield workers.Outcome(name, ("failed", [], "OutOfMemoryError: CUDA out of memory", 1.0))
            else:
                yield workers.Outcome(name, ("passed", [], "", 1.0))

    monkeypatch.setattr(workers, "run", run)
    other = dataclasses.replace(SMALL, label="other")
    found = list(verify.run_in_processes([SMALL, other], "cuda", 16))
    assert [(result.case.label, result.status) for result in found] == [("other", "passed"), ("small", "passed")]
    assert asked == [(SMALL.name, 16), (other.name, 16), (SMALL.name, 1)]


def test_a_case_whose_process_died_has_failed(monkeypatch):
    died = workers.Outcome(SMALL.name, died="did not end within 60 s")
    monkeypatch.setattr(workers, "run", lambda groups, *rest: iter([died] if [*groups] else []))
    (result,) = verify.run_in_processes([SMALL], "cuda", 2)
    assert (result.status, result.reason) == ("failed", "did not end within 60 s")


def test_a_process_without_its_gpu_is_not_fit_for_another_case(monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(verify, "_by_name", lambda device: {"case": SMALL})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for synchronize, status, fit in ((lambda: None, "passed", True), (lost, "failed", False)):
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        monkeypatch.setattr(verify, "run_case", lambda case, device: verify.Result(case, "passed", []))
        (found, _, reason, _), is_fit = verify.Server("cuda")("case")
        assert (found, is_fit) == (status, fit)
        assert ("illegal memory access" in reason) == (not fit)


def test_command_refuses_a_path_it_could_not_write(tmp_path, capsys):
    assert cli.main(["verify", "--device", "cpu", "--json", str(tmp_path / "absent" / "v.json")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert cli.main(["verify", "--device", "cpu", "--json", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_command_without_triton(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    assert cli.main(["verify", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "Triton is not installed" in error
    assert error.count("\n") == 1


@needs_interpreter
def test_one_failure_among_passes_fails_the_command(monkeypatch):
    plant(monkeypatch, "layer_norm", lambda out: out * 1.1 if out.dtype == torch.bfloat16 else out)
    assert cli.main(["verify", "--device", "cpu", "--ops", "layer_norm", "--jobs", "1"]) == 1


@needs_interpreter
def test_resume_runs_only_what_has_not_passed_here(monkeypatch, tmp_path, capsys):
    right, output, ran = verify.run_case, tmp_path / "v.json", []

    def run_case(case, device):
        ran.append(case.dtype)
        if interrupt and case.dtype == torch.float32:
            raise KeyboardInterrupt
        return right(case, device)

    monkeypatch.setattr(verify, "run_case", run_case)
    command = ["verify", "--device", "cpu", "--ops", "layer_norm", "--jobs", "1", "--json", str(output), "--resume"]
    interrupt = True
    assert cli.main(command) == 130
    interrupt = False
    ran.clear()
    assert cli.main(command) == 0
    assert ran == [torch.float32, torch.float16]
    assert "1 of 3 cases have passed before" in capsys.readouterr().err
    written = json.loads(output.read_text())
    assert (written["finished"], [row["dtype"] for row in written["results"]]) == (True, ["bf16", "fp32", "fp16"])

    output.write_text(output.read_text().replace(torch.__version__, "0.0.1"))
    ran.clear()
    assert cli.main(command) == 0
    assert len(ran) == 3, "what another torch passed was taken for ours"


def test_resume_needs_a_results_file_of_verify(tmp_path, capsys):
    assert cli.main(["verify", "--device", "cpu", "--resume"]) == 2
    assert "--resume needs --json" in capsys.readouterr().err
    (tmp_path / "v.json").write_text("[]")
    assert cli.main(["verify", "--device", "cpu", "--resume", "--json", str(tmp_path / "v.json")]) == 2
    assert "not a results file of fastvit verify" in capsys.readouterr().err


def test_a_slow_machine_is_no_hanging_kernel(monkeypatch):
    """In the interpreter a whole model in float32 takes over a minute on some."""
    given = {}

    def run(groups, server, processes, seconds, deadline):
        given[server.device] = seconds
        return iter(())

    monkeypatch.setattr(verify.workers, "run", run)
    for device in ("cpu", "cuda:0"):
        list(verify.run_in_processes([], device, 2))
    assert given["cpu"] >= 10 * given["cuda:0"] > 0

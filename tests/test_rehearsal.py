"""`make gpu` from end to end on a stand-in for a GPU (tests/stub_gpu): the real command, the real steps, Triton's real
launch path, invented times. In small, with kernels that go astray, and a second call."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUB = ROOT / "tests" / "stub_gpu"
MODEL = "vit_tiny_patch16_224"

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or shutil.which("make") is None, reason="needs make, and a C compiler for the stand-in"
)


@pytest.fixture
def environment(tmp_path):
    """In which python3 is the one that runs the tests, and finds a GPU."""
    program = tmp_path / "bin" / "python3"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "FASTVIT"))}
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    return kept | {"PATH": path, "PYTHONPATH": str(STUB), "STUB_GPU_COMPILE": "no"}


def make_gpu(environment, out, *arguments, fault=""):
    """The result of `make gpu`; what it wrote and printed."""
    command = ["make", "-s", "gpu", f"OUT={out}", "COMMIT=abc", f"MODELS={MODEL}", "BATCH=256", *arguments]
    environment = environment | {"STUB_GPU_FAULT": fault}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def archived(out):
    """The JSON files of the archive, by name."""
    (archive,) = out.glob("*.tgz")
    with tarfile.open(archive) as tar:
        files = {member.name.partition("/")[2]: member for member in tar.getmembers() if member.name.endswith(".json")}
        return {name: json.load(tar.extractfile(member)) for name, member in files.items()}


@pytest.mark.slow
def test_a_run_with_kernels_that_go_astray_and_a_second_call(environment, tmp_path):
    """One config of a product takes the GPU from its process, one of attention never ends: both are named, all else is
    measured, and the second call repeats nothing."""
    out = tmp_path / "out"
    illegal = "illegal:gemm_kernel.*EPILOGUE=store_activated .*BLOCK_M=128 BLOCK_N=128 .*num_warps=8 num_stages=4"
    hang = "hang:attention_kernel.*BLOCK_M=128 BLOCK_N=64 num_warps=8 num_stages=3"
    first = make_gpu(environment, out, "STEPS=micro counters", "BUDGET=500", fault=f"{illegal};{hang}")
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr
    assert sorted(path.suffix for path in out.iterdir()) == [".log", ".tgz", ".txt"]
    found = archived(out)
    micro = found["micro.json"]
    assert micro["finished"] and not micro["failed"]
    assert found["runbook.json"]["micro"]["starts"] >= 3
    (fatal,) = (value for name, value in found.items() if name.endswith(".attempts.json"))
    assert any("matrix activated" in name and "took the GPU" in why for name, why in fatal.items()), fatal
    assert any(name.startswith("attention_forward") and "ended the process" in why for name, why in fatal.items()), (
        fatal
    )
    rows = {row["request"].split(" ")[0] for row in micro["launches"]}
    assert rows == {"gemm", "attention_forward", "attention_backward_dq", "attention_backward_dkdv", "column_sum",
                    "layer_norm_statistics", "layer_norm_forward", "layer_norm_backward"}  # fmt: skip
    assert all(len(row["configs"]) + len(row["dropped"]) > 3 and row["library"] for row in micro["launches"])
    assert any(name.startswith("tuned/stub-h100-") for name in found), "the tuner's table does not come back"

    summary = (out / "summary.txt").read_text()
    assert first.stdout.rstrip().endswith(summary.rstrip())
    assert len(summary.splitlines()) <= 30 and max(map(len, summary.splitlines())) <= 158
    for words in ("fastvit on Stub H100", "micro done in", "furthest behind the library", "furthest from the bound",
                  "FATAL, left out", "next:"):  # fmt: skip
        assert words in summary, summary

    shutil.move(next(out.glob("*.tgz")), tmp_path / "before.tgz")
    before = f"FROM={tmp_path / 'before.tgz'}"
    second = make_gpu(environment, tmp_path / "again", before, "STEPS=micro counters", "BUDGET=60")
    assert second.returncode == 0
    assert archived(tmp_path / "again")["micro.json"] == micro
    assert second.stdout.count("finished by an earlier run") == 2


@pytest.mark.slow
def test_models_in_small(environment, tmp_path):
    """Time is up before everything is measured: what there is comes back, and the summary says how to go on."""
    out = tmp_path / "out"
    done = make_gpu(environment, out, "STEPS=models", "BUDGET=75")
    assert done.returncode != 0
    found = archived(out)
    models = found["bench.json"]
    assert models["rows"][0]["id"] == f"{MODEL}/bf16/b256/inference"
    ours = models["rows"][0]["entries"]["ours"]
    assert models["rows"][0]["status"] == "timed" and "ran on: triton" in ours["note"]
    assert all(ours[time] for time in ("seconds", "host", "graph"))
    assert models["environment"]["tuned"] == ""
    summary = (out / "summary.txt").read_text()
    assert f"models: {MODEL}/bf16/b256/inference" in summary and "call again to go on with models" in summary


@pytest.mark.slow
def test_verify_names_the_kernel_that_takes_the_gpu_and_goes_on(environment, tmp_path):
    """In processes: the case fails with the error, no other does, and a second call repeats just that one."""
    command = [sys.executable, "-m", "fastvit", "verify", "--ops", "layer_norm", "--dtypes", "bf16", "--jobs", "2"]
    command += ["--resume", "--json", str(tmp_path / "verify.json")]
    environment = environment | {"PYTHONPATH": f"{STUB}{os.pathsep}{ROOT}"}
    fault = {"STUB_GPU_FAULT": "illegal:layer_norm_backward_kernel.*BLOCK_D=2048"}
    done = subprocess.run(command, env=environment | fault, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "7 passed, 2 failed, 0 not run" in done.stdout
    failed = [line for line in done.stdout.splitlines() if "FAIL" in line]
    assert {line.split()[1] for line in failed} == {"H", "g"} and "illegal memory access" in failed[0]
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and "2 passed, 0 failed" in again.stdout

"""The commands of the Makefile: every one that is named exists, and the set-up chooses the right build of PyTorch."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastvit import cli

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def dry_run(target: str) -> str:
    """What `make target` would do on a fresh clone."""
    command = ["make", "-n", "--no-print-directory", "VENV=no-such-environment", target]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("target", ["bench", "verify", "test", "test-all", "static", "gpu", "pages", "clean", "help"])
def test_every_target_can_be_made(target):
    assert dry_run(target).strip()


def test_static_makes_an_environment_for_each_triton():
    steps = dry_run("static")
    for version in ("3.6.0", "3.9.0"):
        folder = f"no-such-environment-static-{version}"
        assert f"--no-deps --upgrade --target {folder} triton=={version}" in steps
    assert "PYTHONPATH=no-such-environment-static-$version:." in steps
    assert "--json results/static/$version.json" in steps
    assert "static.pages docs/static results/static/3.6.0.json results/static/3.9.0.json" in steps


def test_bench_verifies_first():
    steps = dry_run("bench")
    assert steps.index(".ci/environment") < steps.index("fastvit verify") < steps.index("fastvit bench")


def test_tests_run_pytest_last_and_on_two_processes():
    assert dry_run("test").strip().splitlines()[-1].endswith("no-such-environment/bin/pytest -n 2 -q")
    assert "OMP_NUM_THREADS=1" in dry_run("test")
    assert (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1].endswith("make --no-print-directory test")
    assert "set -euo pipefail" in (ROOT / ".ci" / "run").read_text()


def test_gpu_makes_no_environment():
    steps = dry_run("gpu")
    assert "pip" not in steps
    assert "no-such-environment" not in steps
    assert "-m fastvit.benchmarks.runbook" in steps


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_gpu_without_a_gpu_is_one_clear_line(tmp_path):
    environment = os.environ | with_this_python(tmp_path)
    done = subprocess.run(["make", "gpu"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    first, *rest = done.stderr.splitlines()
    assert re.match(r"make gpu: error: PyTorch .*(finds no GPU|is not installed)", first)
    assert len(rest) == 1, "only make's own line may follow"


def with_this_python(folder: Path) -> dict[str, str]:
    """An environment whose python3 is the one that runs the tests."""
    program = folder / "python3"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def fake_environment(folder: Path, refuse: str) -> Path:
    """A virtual environment whose pip writes down what it is asked for and refuses what matches `refuse`."""
    program = folder / "venv" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\necho "$*" >> "{folder}/asked"\ncase "$*" in {refuse}) exit 1;; esac\n')
    program.chmod(0o755)
    return folder / "venv"


def pip_calls(folder: Path, refuse: str) -> list[str]:
    venv = fake_environment(folder, refuse)
    subprocess.run([ROOT / ".ci" / "environment", venv, "bench"], check=True, capture_output=True)
    return [line.split("constraints.txt ", 1)[1] for line in (folder / "asked").read_text().splitlines()]


no_gpu = pytest.mark.skipif(
    os.path.exists("/dev/nvidia0") or os.path.exists("/dev/kfd") or shutil.which("nvidia-smi") is not None,
    reason="the set-up takes the GPU build here",
)


@no_gpu
def test_the_cpu_build_is_taken_where_pip_finds_it(tmp_path):
    calls = pip_calls(tmp_path, refuse="nothing")
    assert calls[0] == "torch==2.13.0+cpu"
    assert calls[1] == "triton==3.7.1"
    assert calls[2] == "torchvision==0.28.0+cpu --no-deps"
    assert calls[3] == "--editable .[bench]"


@no_gpu
def test_the_cpu_build_is_looked_for_in_pytorchs_own_index_without_waiting(tmp_path):
    calls = pip_calls(tmp_path, refuse="*torch==*+cpu|*torchvision==*+cpu*deps")
    assert calls[1] == "torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu --timeout 10 --retries 0"
    assert "torch==2.13.0" not in calls


@no_gpu
def test_the_plain_build_is_the_last_resort(tmp_path):
    calls = pip_calls(tmp_path, refuse="*+cpu*")
    assert calls[2] == "torch==2.13.0"
    assert "torchvision==0.28.0 --no-deps" in calls


def test_an_old_python_is_refused(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(
        [ROOT / ".ci" / "environment", tmp_path / "venv", "bench"],
        env=os.environ | {"PYTHON": str(old)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "error: Python 3.9.1 found, Python 3.10 or later is needed (PYTHON=... names another)\n"


def test_what_the_readme_tells_to_type_exists():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"\bmake ([a-z-]+)", "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.S))))
    assert {"bench", "test"} <= named
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert named <= targets
    for command in set(re.findall(r"^\$? ?fastvit ([a-z]+)", text, re.M)):
        with pytest.raises(SystemExit) as left:
            cli.main([command, "--help"])
        assert left.value.code == 0, command

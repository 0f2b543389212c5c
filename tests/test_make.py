"""The commands of the Makefile: every one that is named exists, and the set-up chooses the right build of PyTorch."""

import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
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
    assert "PYTHONPATH=no-such-environment-static-$version:build/path " in steps
    assert "--json results/static/$version.json" in steps
    # From the folder that holds fastvit alone: `-m` puts the one it starts in on the path.
    (pages,) = re.findall(r"cd build/path && \S+ -m fastvit\.benchmarks\.static\.pages(.*?)&&", steps, re.S)
    found = [Path(path).relative_to(ROOT).as_posix() for path in pages.replace("\\\n", " ").split()]
    assert found == ["docs/static", "results/static/3.6.0.json", "results/static/3.9.0.json"]


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
    assert "python3 benchmarks/runbook.py" in steps


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


# Has every process write down what it is, where its fastvit is and where it would find the package `kernels`.
PROBE = """
import os, sys
from importlib.machinery import PathFinder

class Probe:
    def find_spec(name, path=None, target=None):
        if name == "fastvit":
            worker = "worker" if "--multiprocessing-fork" in sys.orig_argv else "process"
            places = (str(spec and spec.origin) for spec in map(PathFinder.find_spec, ("fastvit", "kernels")))
            with open(os.environ["PROBED"], "a") as file:
                print(worker, *places, sep="\\t", file=file)

sys.meta_path.insert(0, Probe)
if "STUB" in os.environ:
    sys.path.append(os.environ["STUB"])
    import stub_gpu
    stub_gpu.install()
"""


def probed(folder: Path) -> dict[str, str]:
    """The environment of commands whose processes write to folder/probed, if they have `folder` on their path."""
    (folder / "sitecustomize.py").write_text(PROBE)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "FASTVIT", "PYTHON"))}
    return kept | {"PROBED": str(folder / "probed")}


def text_of(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def check_probed(folder: Path, kinds: set[str]) -> None:
    """Every process found this checkout's fastvit, and none our `kernels`."""
    found = [line.split("\t") for line in text_of(folder / "probed").splitlines()]
    assert {kind for kind, *_ in found} == kinds
    assert {os.path.realpath(place) for _, place, _ in found} == {str(ROOT / "fastvit" / "__init__.py")}
    assert all(os.path.realpath(place) != str(ROOT / "kernels" / "__init__.py") for *_, place in found), found


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the stand-in for a GPU")
def test_gpu_has_nobody_find_our_kernels(tmp_path):
    """Neither by the path nor by the working directory, in none of its processes. It is stopped as all have spoken."""
    outside = probed(tmp_path) | with_this_python(tmp_path)
    outside |= {"PYTHONPATH": str(tmp_path), "STUB": str(ROOT / "tests" / "stub_gpu"), "STUB_GPU_COMPILE": "no"}
    command = ["make", "-s", "gpu", f"OUT={tmp_path / 'out'}", "STEPS=verify", "BUDGET=300"]
    with open(tmp_path / "printed", "w") as printed:
        make = subprocess.Popen(command, cwd=ROOT, env=outside, stdout=printed, stderr=printed, start_new_session=True)
    while make.poll() is None and "worker" not in text_of(tmp_path / "probed"):
        time.sleep(0.2)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(make.pid, signal.SIGINT)
    make.wait()
    assert "interrupted" in text_of(tmp_path / "printed"), text_of(tmp_path / "printed")
    check_probed(tmp_path, {"process", "worker"})


def test_gpu_puts_no_root_on_an_empty_path(tmp_path):
    """Where PYTHONPATH is not set: an empty entry would be the working directory."""
    (tmp_path / "tell.py").write_text("import sys; print(*sys.path, sep='\\n')")
    (tmp_path / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path / "tell.py"}"\n')
    (tmp_path / "python3").chmod(0o755)
    outside = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["make", "-s", "gpu"], cwd=ROOT, env=outside, capture_output=True, text=True, check=True)
    assert str(ROOT / "build" / "path") in done.stdout.splitlines()
    assert str(ROOT) not in done.stdout.splitlines()


def test_static_has_nobody_find_our_kernels(tmp_path):
    """The real command, but for a Python that compiles one case only. Workers are forks: they have the same path."""
    environment, tritons = tmp_path / "venv", tmp_path / "venv-static-present"
    (environment / "bin").mkdir(parents=True)
    tritons.mkdir()
    one = '--match "attention d=16 bf16" --arch sm_90 --configs shipped'
    (environment / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$1" {one}\n')
    (environment / "bin" / "python").chmod(0o755)
    for stamp in (environment / ".bench", tritons / ".installed"):
        stamp.touch()
    command = ["make", "-s", "static", f"VENV={environment}", "TRITONS=present"]
    done = subprocess.run(command, cwd=ROOT, env=probed(tritons), capture_output=True, text=True)
    assert "3 kernels, 0 failures" in done.stdout, done.stdout + done.stderr
    check_probed(tritons, {"process"})


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

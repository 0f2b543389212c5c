"""What is installed: the package, all of it and nothing else, built as pip builds it."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", "70.1")

ROOT = Path(__file__).parents[1]
FOLDERS = {"fastvit": "fastvit", "kernels": "fastvit/kernels", "benchmarks": "fastvit/benchmarks"}
TOOLS = (
    "block_launches",
    "frozen_steps",
    "__main__",
    "test_ops",
    "runbook",
    "on_gpu",
    "micro",
    "peaks",
    "report/gpu",
    "report/summary",
    "static_report",
)
MODEL = "vit_tiny_patch16_224"


def pip(*arguments) -> None:
    """Run pip, which builds with what is installed here and downloads nothing."""
    command = [
        sys.executable,
        "-m",
        "pip",
        *map(str, arguments),
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*command, "--disable-pip-version-check"], check=True, cwd=ROOT.parent)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of what the package is built from, which takes up what is built; and a subpackage that nobody named."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        (copy / name / "planted").mkdir()
        (copy / name / "planted" / "__init__.py").write_text("")
    return copy


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", sources, "--wheel-dir", folder)
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel in a folder, and beside it the package `kernels` of somebody else."""
    site = tmp_path_factory.mktemp("site")
    pip("install", wheel, "--target", site)
    assert {path.name for path in site.iterdir()} <= {"bin", "fastvit", "fastvit-0.1.0.dist-info"}
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("")
    return site


def run(installed: Path, *command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FASTVIT", "TRITON"))}
    environment["PYTHONPATH"] = str(installed)
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=installed.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_has_every_file_but_a_checkouts_tools(sources, wheel):
    expected = set()
    for folder, package in FOLDERS.items():
        expected |= {f"{package}/{path.relative_to(sources / folder)}" for path in (sources / folder).rglob("*.py")}
    expected = {name for name in expected if not name.startswith("fastvit/benchmarks/static/")}
    expected -= {f"fastvit/benchmarks/{tool}.py" for tool in TOOLS}
    with zipfile.ZipFile(wheel) as built:
        names = built.namelist()
        assert {name for name in names if name.endswith(".py")} == expected
        assert built.read("fastvit/kernels/__init__.py") == (ROOT / "kernels" / "__init__.py").read_bytes()
        assert built.read("fastvit/benchmarks/__init__.py") == (ROOT / "benchmarks" / "__init__.py").read_bytes()
    data = {name for name in names if name.startswith("fastvit/") and not name.endswith(".py")}
    photos = {f"fastvit/benchmarks/photos/{path.name}" for path in (ROOT / "benchmarks" / "photos").iterdir()}
    assert data == photos | {"fastvit/models/imagenet_classes.txt"}


REVISIONS = """
import pathlib
from fastvit import environment
site = pathlib.Path({site!r})
assert pathlib.Path(environment.__file__).parents[1] == site, environment.__file__
def revision_with(name):
    before = (site / name).read_bytes()
    (site / name).write_text("x = 1")
    found = environment.revision()
    (site / name).write_bytes(before)
    return found
print(environment.revision(), *(revision_with(name) for name in {names}))
"""


def test_the_revision_is_of_our_files_alone(installed):
    names = ["kernels/__init__.py", *(f"fastvit/{name}.py" for name in ("cli", "kernels/gemm", "benchmarks/schema"))]
    found = run(installed, "-c", REVISIONS.format(site=str(installed), names=names)).split()
    assert all(re.fullmatch("source-[0-9a-f]{12}", revision) for revision in found)
    assert found[0] == found[1], "somebody else's package counts"
    assert len({*found}) == 4


def test_every_command_runs(installed, tmp_path):
    def fastvit(*arguments: str) -> str:
        return run(installed, "-m", "fastvit", *arguments)

    assert json.loads(fastvit("info", "--json"))["commit"].startswith("source-")
    assert "0 failed" in fastvit("verify", "--device", "cpu", "--ops", "layer_norm", "--dtypes", "fp32")
    assert "gemm" in fastvit("tune", "--dry-run", "--models", MODEL, "--batches", "1", "--modes", "inference")
    pytest.importorskip("PIL")
    few = (
        "--ops",
        "layer_norm",
        "--models",
        MODEL,
        "--batches",
        "1",
        "--dtypes",
        "fp32",
        "--modes",
        "inference",
        "--peers",
        "reference",
    )
    assert "results:" in fastvit("bench", "--device", "cpu", *few, "--seconds", "0.1", "-o", str(tmp_path))
    fastvit("bench", "compare", str(tmp_path / "bench.json"), str(tmp_path / "bench.json"))


EDITABLE = """
import site, sys
site.addsitedir(sys.argv[1])
import importlib.util as u
for name in sys.argv[2:]:
    spec = u.find_spec(name)
    print(spec and spec.origin)
"""


def test_an_editable_install_leads_to_the_same_files(sources, tmp_path):
    pip("install", "--editable", sources, "--target", tmp_path)
    names = ["fastvit", "fastvit.kernels.gemm", "fastvit.kernels.planted", "fastvit.benchmarks.schema"]
    none = ["kernels", "fastvit.fastvit", "fastvit.setup"]
    # -S: without what is installed for this Python.
    command = [sys.executable, "-S", "-c", EDITABLE, str(tmp_path), *names, *none]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    files = ["fastvit/__init__.py", "kernels/gemm.py", "kernels/planted/__init__.py", "benchmarks/schema.py"]
    assert done.stdout.split() == [*(str(sources / file) for file in files), *["None"] * len(none)]

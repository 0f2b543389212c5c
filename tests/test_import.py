"""`import fastvit` is cheap and changes nothing."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SCRIPT = """
import json, os, sys, time
import torch

def state():
    return [torch.get_default_dtype(), torch.get_num_threads(), torch.get_num_interop_threads(),
            torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.benchmark, torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
            dict(os.environ), list(sys.path)]

before, modules = state(), set(sys.modules)
start = time.perf_counter()
import fastvit
seconds = time.perf_counter() - start
new = {name.partition(".")[0] for name in set(sys.modules) - modules} - sys.stdlib_module_names
print(json.dumps({"seconds": seconds, "new": sorted(new), "unchanged": before == state(),
                  "cuda": torch.cuda.is_initialized(), "names": fastvit.__all__}))
"""


def run(code: str, cwd=ROOT, **environment: str) -> subprocess.CompletedProcess:
    # Not this process's environment: importing fastvit here could have changed it already.
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment = {**kept, "OMP_NUM_THREADS": "2", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=True
    )


@pytest.fixture(scope="module")
def imports() -> list[dict]:
    """What three fresh processes saw of `import fastvit` after `import torch`."""
    return [json.loads(run(SCRIPT).stdout) for _ in range(3)]


def test_imports_nothing_but_itself(imports):
    assert imports[0]["new"] == ["fastvit"]


def test_changes_no_global_state(imports):
    assert imports[0]["unchanged"] and not imports[0]["cuda"]


def test_adds_at_most_300_ms(imports):
    assert min(result["seconds"] for result in imports) <= 0.3


def test_prints_nothing():
    done = run("import fastvit")
    assert (done.stdout, done.stderr) == ("", "")


def test_every_public_name_is_there():
    run("import fastvit\nfor name in fastvit.__all__: assert getattr(fastvit, name) is not None, name")


def test_kernels_is_no_top_level_import(tmp_path):
    """A well-known package has that name, and transformers imports it wherever it finds one."""
    code = "import importlib.util as u; spec = u.find_spec('kernels'); print(spec and spec.submodule_search_locations)"
    assert str(ROOT) not in run(code, cwd=tmp_path, PYTHONPATH="").stdout


def test_a_checkout_has_every_file_under_one_name():
    names = [
        "fastvit.tests",
        "fastvit.fastvit",
        "fastvit.docs",
        "fastvit.kernels.kernels",
        "fastvit.benchmarks.kernels",
    ]
    code = f"import importlib.util as u, fastvit; print([name for name in {names} if u.find_spec(name)])"
    assert run(code).stdout == "[]\n"
    code = "import importlib.util as u; print(u.find_spec('fastvit.{0}.{1}').origin, u.find_spec('fastvit.{0}').origin)"
    for folder, name in (("kernels", "gemm"), ("benchmarks", "cases")):
        found = run(code.format(folder, name)).stdout.split()
        assert found == [str(ROOT / folder / f"{name}.py"), str(ROOT / "fastvit" / folder / "__init__.py")]


def test_the_mapped_folders_do_nothing_as_they_are_imported():
    """Their `__init__.py` is run where the package is installed, and not in a checkout."""
    for folder in ("kernels", "benchmarks"):
        (docstring,) = ast.parse((ROOT / folder / "__init__.py").read_text()).body
        assert isinstance(docstring, ast.Expr)

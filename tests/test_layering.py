"""Imports point down only. Held by reading the imports of every file."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Folders of the checkout, and the packages that they are imported as.
PACKAGES = {"fastvit": "fastvit", "kernels": "fastvit.kernels", "benchmarks": "fastvit.benchmarks"}


@dataclass(frozen=True)
class Layer:
    """What of ours a package may import besides itself, at the top of a file and inside a function as well."""

    at_top: tuple[str, ...] = ()
    in_functions: tuple[str, ...] = ()
    # Where given, the only packages of others that it may import, besides the standard library.
    others: tuple[str, ...] | None = None


LAYERS = {
    "fastvit.reference": Layer(others=("torch",)),
    "fastvit.kernels": Layer(others=("torch", "triton")),
    "fastvit.interpret": Layer(others=("torch", "triton", "numpy")),
    "fastvit.measure": Layer(others=()),
    "fastvit.tuned": Layer(in_functions=("fastvit.report", "fastvit.kernels"), others=("torch",)),
    "fastvit.dispatch": Layer(("fastvit.tuned",), ("fastvit.ops",), others=("torch",)),
    # An op that nobody measured yet may call the tuner, which stands above and runs the ops.
    "fastvit.ops": Layer(
        ("fastvit.dispatch", "fastvit.tuned", "fastvit.reference"),
        ("fastvit.kernels", "fastvit.interpret", "fastvit.tune"),
        ("torch",),
    ),
    "fastvit.nn": Layer(("fastvit.dispatch", "fastvit.ops"), others=("torch",)),
    "fastvit.models": Layer(("fastvit.dispatch", "fastvit.ops", "fastvit.nn")),
    "fastvit.benchmarks": Layer(("fastvit",)),
    "fastvit.commands.bench": Layer(("fastvit",), ("fastvit.benchmarks",)),
    # The rest, which stands beside the command line, imports whatever is below and each other.
    "fastvit": Layer(("fastvit",)),
}


@dataclass(frozen=True)
class Import:
    file: Path
    line: int
    importer: str
    imported: str
    lazy: bool
    relative: bool


def modules(root: Path) -> Iterator[tuple[Path, str]]:
    for folder, package in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            yield path, ".".join([package, *(part for part in parts if part != "__init__")])


def imports(path: Path, module: str, known: set[str]) -> Iterator[Import]:
    """Every import in a file, by statement or by `import_module` of a literal name."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        found: list[tuple[str, bool]] = []
        if isinstance(node, ast.Import):
            found = [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            # `from package import name` imports a module where there is one of that name.
            names = [f"{base}.{alias.name}" for alias in node.names]
            found = [(name if name in known else base, node.level > 0) for name in names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found = [(name.value, False) for name in node.args[:1] if isinstance(name, ast.Constant)]
        for name, relative in found:
            yield Import(path, node.lineno, module, name, lazy, relative)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    yield from walk(ast.parse(path.read_text()), False)


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def layer_of(module: str) -> str:
    return max((name for name in LAYERS if within(module, (name,))), key=len)


def violations(root: Path) -> list[str]:
    """Every import under `root` that points up or outside, as `file:line importer imports what`."""
    files = list(modules(root))
    known = {module for _, module in files}
    # `kernels` and `benchmarks` are imported as parts of fastvit, and tests by nobody.
    never = {"kernels", "benchmarks", "tests", *(path.stem for path in (root / "tests").glob("*.py"))}
    found = []
    for path, module in files:
        layer = LAYERS[name := layer_of(module)]
        for entry in imports(path, module, known):
            where = f"{path.relative_to(root)}:{entry.line}"
            top = entry.imported.partition(".")[0]
            if top != "fastvit":
                allowed = layer.others is None or top in layer.others or top in sys.stdlib_module_names
                allowed = allowed and top not in never
            else:
                inside = layer.at_top + layer.in_functions if entry.lazy else layer.at_top
                allowed = layer_of(entry.imported) == name or within(entry.imported, inside)
                # Benchmarks stand above the package: only the command that runs them may reach up.
                if within(entry.imported, ("fastvit.benchmarks",)) and name != "fastvit.benchmarks":
                    allowed = name == "fastvit.commands.bench" and entry.lazy
                if name == "fastvit.kernels" and not entry.relative:
                    allowed = False
            if not allowed:
                found.append(f"{where} {module} imports {entry.imported}")
    return found


def test_imports_point_down():
    assert violations(ROOT) == []


def test_tests_import_helpers_only():
    tests = {path.stem for path in (ROOT / "tests").rglob("test_*.py")} | {"tests", "conftest"}
    for path in (ROOT / "tests").rglob("*.py"):
        for entry in imports(path, path.stem, set()):
            assert entry.imported.partition(".")[0] not in tests, f"{path.name}:{entry.line}"


PLANTED = {
    "fastvit/reference/ops.py": ["from ..dispatch import explain", "import numpy"],
    "kernels/gemm.py": ["from fastvit.kernels import _math", "from ..ops import linear", "import timm"],
    "fastvit/ops/linear.py": ["from ..kernels import gemm", "from ..nn import Block", "import triton"],
    "fastvit/nn/block.py": ["from ..models import registry", "from ..kernels import gemm", "import fastvit"],
    "fastvit/models/config.py": [
        "from fastvit import cli",
        "from .. import verify",
        "from ..kernels.gemm import launch",
    ],
    "fastvit/dispatch.py": ["from . import ops"],
    "fastvit/interpret/repair.py": ["from ..dispatch import explain"],
    "fastvit/commands/bench.py": ["from ..benchmarks import bench", "import tests.conftest"],
    "fastvit/verify.py": ["def run():\n    from fastvit.benchmarks import bench", "import kernels"],
}


@pytest.mark.parametrize("file, line", [(file, line) for file, lines in PLANTED.items() for line in lines])
def test_a_planted_import_is_found(tmp_path, file, line):
    names = [*PLANTED, "kernels/_math.py", "benchmarks/bench.py", "fastvit/models/registry.py"]
    for name in [*names, *(f"{Path(name).parent}/__init__.py" for name in names)]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert violations(tmp_path) == []
    (tmp_path / file).write_text(line)
    assert len(violations(tmp_path)) == 1


ALLOWED = {
    "kernels/gemm.py": ["from ._math import widen", "import torch, triton.language as tl, os"],
    "fastvit/ops/linear.py": ["from ..reference import ops", "def run():\n    from ..kernels import gemm"],
    "fastvit/dispatch.py": ["import importlib\ndef run():\n    importlib.import_module('fastvit.ops')"],
    "fastvit/commands/bench.py": ["from ..models import registry", "def run():\n    from ..benchmarks import bench"],
}


@pytest.mark.parametrize("file, line", [(file, line) for file, lines in ALLOWED.items() for line in lines])
def test_an_allowed_import_is_not(tmp_path, file, line):
    for name in [*PLANTED, *ALLOWED, "kernels/_math.py", "benchmarks/bench.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / file).write_text(line)
    assert violations(tmp_path) == []

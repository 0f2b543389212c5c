"""Imports point down only, and never in a circle. Held by reading the imports of every file."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import fastvit

ROOT = Path(__file__).parents[1]

# Folders of the checkout, and the packages that they are imported as.
PACKAGES = {"fastvit": "fastvit", "kernels": "fastvit.kernels", "benchmarks": "fastvit.benchmarks"}


@dataclass(frozen=True)
class Layer:
    """What of ours a file or package may import besides itself, at the top of a file and inside a function as well."""

    at_top: tuple[str, ...] = ()
    in_functions: tuple[str, ...] = ()
    # Where given, the only packages of others that it may import, besides the standard library.
    others: tuple[str, ...] | None = None


# Every file and package of fastvit, what is below first; a row counts for all that is in it and has no row of its own.
# "fastvit" in a row is the file `fastvit/__init__.py` alone; what is taken from there counts as the module it is in.
LAYERS = {
    "fastvit": Layer(others=()),
    "fastvit.reference": Layer(others=("torch",)),
    "fastvit.kernels": Layer(others=("torch", "triton")),
    "fastvit.interpret": Layer(("fastvit.kernels",), others=("torch", "triton", "numpy")),
    "fastvit.measure": Layer(others=()),
    "fastvit.workers": Layer(others=()),
    "fastvit.torchvision_shim": Layer(others=("torch",)),
    "fastvit.graphs": Layer(others=("torch",)),
    "fastvit.accuracy": Layer(others=("torch",)),
    "fastvit.examples": Layer(others=("torch",)),
    "fastvit.images": Layer(others=("torch", "numpy", "PIL")),
    "fastvit.report": Layer(others=("rich",)),
    "fastvit.attempts": Layer(("fastvit.report", "fastvit.workers"), others=("torch",)),
    "fastvit.features": Layer(("fastvit.report",), others=("numpy", "safetensors")),
    "fastvit.heatmaps": Layer(("fastvit.images", "fastvit.report"), others=("numpy", "PIL")),
    "fastvit.tuned": Layer((), ("fastvit.kernels", "fastvit.report"), ("torch",)),
    "fastvit.environment": Layer(("fastvit", "fastvit.report", "fastvit.tuned"), others=("torch",)),
    "fastvit.onednn": Layer(others=("torch",)),
    "fastvit.dispatch": Layer(("fastvit.onednn", "fastvit.tuned"), others=("torch",)),
    "fastvit.decide": Layer(
        ("fastvit.attempts", "fastvit.graphs", "fastvit.measure", "fastvit.report"), others=("torch",)
    ),
    "fastvit.tune": Layer(
        ("fastvit.attempts", "fastvit.decide", "fastvit.dispatch", "fastvit.examples", "fastvit.kernels",
         "fastvit.report", "fastvit.tuned"),
        others=("torch", "triton"),
    ),
    # They have the tuner, which knows ops by what dispatch says of them, called for what nobody measured yet.
    "fastvit.ops": Layer(
        ("fastvit.dispatch", "fastvit.onednn", "fastvit.tuned", "fastvit.reference"),
        ("fastvit.kernels", "fastvit.interpret", "fastvit.tune"),
        ("torch",),
    ),
    "fastvit.nn": Layer(("fastvit.dispatch", "fastvit.ops"), others=("torch",)),
    "fastvit.dropin": Layer(
        ("fastvit.dispatch", "fastvit.nn", "fastvit.ops", "fastvit.report"), others=("torch", "transformers")
    ),
    "fastvit.maps": Layer(("fastvit.dropin", "fastvit.nn", "fastvit.reference"), others=("torch",)),
    "fastvit.models": Layer(("fastvit.dispatch", "fastvit.ops", "fastvit.nn")),
    "fastvit.frozen": Layer(
        ("fastvit", "fastvit.accuracy", "fastvit.decide", "fastvit.dispatch", "fastvit.dropin", "fastvit.environment",
         "fastvit.graphs", "fastvit.models", "fastvit.nn", "fastvit.onednn", "fastvit.ops", "fastvit.reference",
         "fastvit.report", "fastvit.tuned"),
        others=("torch", "numpy", "onnx", "onnxruntime", "onnxscript", "openvino", "safetensors", "timm"),
    ),
    "fastvit.parity": Layer(
        ("fastvit.accuracy", "fastvit.dropin", "fastvit.models", "fastvit.nn", "fastvit.report"),
        others=("torch", "matplotlib"),
    ),
    "fastvit.training": Layer(
        ("fastvit.dispatch", "fastvit.images", "fastvit.models", "fastvit.report"),
        others=("torch", "numpy", "PIL", "timm", "safetensors", "datasets", "matplotlib", "rich"),
    ),
    "fastvit.calls": Layer(("fastvit.dispatch", "fastvit.models", "fastvit.tune"), others=("torch",)),
    "fastvit.verify": Layer(
        ("fastvit", "fastvit.accuracy", "fastvit.dispatch", "fastvit.examples", "fastvit.ops", "fastvit.report",
         "fastvit.workers"),
        ("fastvit.interpret", "fastvit.kernels", "fastvit.models", "fastvit.reference"),
        ("torch",),
    ),
    # They stand above the package: only the command that runs them may reach up.
    "fastvit.benchmarks": Layer(
        ("fastvit", "fastvit.accuracy", "fastvit.attempts", "fastvit.calls", "fastvit.decide", "fastvit.dispatch",
         "fastvit.environment", "fastvit.examples", "fastvit.frozen", "fastvit.graphs", "fastvit.images",
         "fastvit.kernels", "fastvit.measure", "fastvit.models", "fastvit.onednn", "fastvit.ops", "fastvit.report",
         "fastvit.torchvision_shim", "fastvit.tune", "fastvit.tuned", "fastvit.verify", "fastvit.workers"),
        ("fastvit.reference",),
    ),
    "fastvit.commands": Layer(
        ("fastvit", "fastvit.report"),
        ("fastvit.attempts", "fastvit.calls", "fastvit.dispatch", "fastvit.environment", "fastvit.features",
         "fastvit.frozen", "fastvit.heatmaps", "fastvit.images", "fastvit.kernels", "fastvit.maps", "fastvit.models",
         "fastvit.parity", "fastvit.torchvision_shim", "fastvit.training", "fastvit.tune", "fastvit.tuned",
         "fastvit.verify", "fastvit.workers"),
        ("torch", "PIL", "timm", "ray", "pyarrow"),
    ),
    "fastvit.commands.bench": Layer(
        ("fastvit.commands", "fastvit.report"),
        ("fastvit.benchmarks", "fastvit.environment", "fastvit.images", "fastvit.models", "fastvit.verify",
         "fastvit.workers"),
        ("torch",),
    ),
    "fastvit.cli": Layer(("fastvit", "fastvit.commands", "fastvit.commands.bench", "fastvit.report"), others=()),
    "fastvit.__main__": Layer(("fastvit.cli",), others=()),
    "fastvit.benchmarks.__main__": Layer(("fastvit.cli",), others=()),
}  # fmt: skip

# What `fastvit` hands on, and where it has it from.
PUBLIC = fastvit._PUBLIC | {name: f"fastvit.{name}" for name in fastvit._SUBMODULES}


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
    """Every import in a file: by statement, by `import_module` of a literal name, as a public name of fastvit's."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        found: list[tuple[str, bool]] = []
        if isinstance(node, ast.Import):
            found = [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            # `from package import name` imports a module where there is one of that name.
            public = PUBLIC if base == "fastvit" else {}
            names = [(f"{base}.{alias.name}", public.get(alias.name, base)) for alias in node.names]
            found = [(name if name in known else other, node.level > 0) for name, other in names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fastvit":
            found = [(PUBLIC[node.attr], False)] if node.attr in PUBLIC else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found = [(name.value, False) for name in node.args[:1] if isinstance(name, ast.Constant)]
        for name, relative in found:
            yield Import(path, node.lineno, module, name, lazy, relative)
        for child in ast.iter_child_nodes(node):
            later = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            yield from walk(child, lazy or later or for_types)

    yield from walk(ast.parse(path.read_text()), False)


def layer_of(module: str) -> str | None:
    """The row of the table that a module is in, the nearest one; None where nobody gave it a place."""
    while module not in LAYERS:
        module = module.rpartition(".")[0]
        if module in ("", "fastvit"):
            return None
    return module


def violations(root: Path) -> list[str]:
    """Every import under `root` that points up or outside, as `file:line importer imports what`, and every file that
    has no place."""
    files = list(modules(root))
    known = {module for _, module in files}
    # `kernels` and `benchmarks` are imported as parts of fastvit, and tests by nobody.
    never = {"kernels", "benchmarks", "tests", *(path.stem for path in (root / "tests").glob("*.py"))}
    found = []
    for path, module in files:
        name = layer_of(module)
        if name is None:
            found.append(f"{path.relative_to(root)}:1 {module} is not in the table")
            continue
        layer = LAYERS[name]
        for entry in imports(path, module, known):
            where = f"{path.relative_to(root)}:{entry.line}"
            top = entry.imported.partition(".")[0]
            if top != "fastvit":
                allowed = layer.others is None or top in layer.others or top in sys.stdlib_module_names
                allowed = allowed and top not in never
            else:
                inside = layer.at_top + layer.in_functions if entry.lazy else layer.at_top
                allowed = layer_of(entry.imported) in (name, *inside)
                if name == "fastvit.kernels" and not entry.relative:
                    allowed = False
            if not allowed:
                found.append(f"{where} {module} imports {entry.imported}")
    return found


Graph = dict[str, set[str]]


def graph(root: Path) -> Graph:
    """What every file of ours under `root` imports of ours, at the top and in functions."""
    files = list(modules(root))
    known = {module for _, module in files}
    found: Graph = {module: set() for module in known}
    for path, module in files:
        found[module] |= {entry.imported for entry in imports(path, module, known)} & known
    return found


def cycle(found: Graph, without: set[tuple[str, str]]) -> list[str]:
    """The modules of a circle of imports, the first of them at its end again; [] where there is none."""
    left = {module: {name for name in names if (module, name) not in without} for module, names in found.items()}
    try:
        graphlib.TopologicalSorter(left).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return []


def test_imports_point_down():
    assert violations(ROOT) == []


def test_what_is_installed_imports_nothing_that_is_not():
    """setup.py's TOOLS, which only a checkout has."""
    (names,) = re.findall(r"^TOOLS = (\(.*?\))", (ROOT / "setup.py").read_text(), re.M | re.S)
    found = graph(ROOT)
    tools = {f"fastvit.benchmarks.{name}" for name in ast.literal_eval(names)}
    tools |= {module for module in found if module.startswith("fastvit.benchmarks.static.")}
    assert tools <= {*found}
    assert [(module, found[module] & tools) for module in found if module not in tools and found[module] & tools] == []


def test_every_row_of_the_table_is_of_something():
    assert {layer_of(module) for _, module in modules(ROOT)} == {*LAYERS}


def test_no_imports_in_a_circle():
    assert cycle(graph(ROOT), set()) == []


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
    "fastvit/dispatch.py": ["from . import ops", "def run():\n    from . import tune"],
    "fastvit/commands/embed.py": ["def run():\n    from ..benchmarks import bench", "from ..models import registry"],
    "fastvit/interpret/repair.py": ["from ..dispatch import explain"],
    "fastvit/cli.py": ["from .benchmarks import bench", "from .models import registry", "import tests.conftest"],
    "fastvit/verify.py": [
        "def run():\n    from fastvit.benchmarks import bench",
        "from . import cli",
        "from fastvit import attention_maps",
        "import kernels",
    ],
    "fastvit/features.py": ["from . import verify", "import fastvit; fastvit"],
    "fastvit/report.py": ["def run():\n    from . import tuned"],
    "fastvit/environment.py": ["import fastvit\nfastvit.ops"],
    "benchmarks/bench.py": ["def run():\n    from fastvit import cli"],
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


@pytest.mark.parametrize("file", ["fastvit/new.py", "fastvit/new/__init__.py", "fastvit/new/part.py"])
def test_a_file_without_a_place_is_found(tmp_path, file):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text("")
    (found,) = violations(tmp_path)
    assert found.endswith("is not in the table")


CIRCLES = [
    {"kernels/gemm.py": "from ._math import widen", "kernels/_math.py": "def run():\n    from .gemm import launch"},
    {"fastvit/report.py": "from . import verify", "fastvit/verify.py": "from fastvit import report"},
    {
        "fastvit/ops/__init__.py": "from .linear import linear",
        "fastvit/ops/linear.py": "from ..dispatch import use_backend",
        "fastvit/dispatch.py": "import importlib\ndef run():\n    importlib.import_module('fastvit.ops')",
    },
    {"fastvit/nn/block.py": "import fastvit\ndef run():\n    fastvit.use_backend('torch')",
     "fastvit/dispatch.py": "from . import nn", "fastvit/nn/__init__.py": "from .block import Block"},
]  # fmt: skip


def plant(root: Path, files: dict[str, str]) -> Graph:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return graph(root)


@pytest.mark.parametrize("files", CIRCLES)
def test_a_planted_circle_is_found(tmp_path, files):
    found = cycle(plant(tmp_path, files), set())
    assert found[0] == found[-1] and len({*found}) == len(files)
    for importer, imported in zip(found, found[1:], strict=False):
        assert not cycle(graph(tmp_path), {(importer, imported)})


def test_what_two_files_share_is_no_circle(tmp_path):
    shared = {
        "kernels/_math.py": "",
        "kernels/gemm.py": "from . import _math",
        "kernels/reduce.py": "from . import _math",
    }
    both = {"kernels/__init__.py": "", "fastvit/ops/linear.py": "from ..kernels import gemm, reduce"}
    assert not cycle(plant(tmp_path, shared | both), set())


ALLOWED = {
    "kernels/gemm.py": ["from ._math import widen", "import torch, triton.language as tl, os"],
    "fastvit/ops/linear.py": ["from ..reference import ops", "def run():\n    from ..kernels import gemm"],
    "fastvit/ops/norm.py": ["import importlib\ndef run():\n    importlib.import_module('fastvit.tune')"],
    "fastvit/cli.py": ["from . import __version__", "from .commands import bench"],
    "fastvit/commands/bench.py": ["def run():\n    from ..benchmarks import bench"],
    "fastvit/verify.py": ["from . import ops", "import fastvit\ndef run():\n    fastvit.create_model('vit')"],
}


@pytest.mark.parametrize("file, line", [(file, line) for file, lines in ALLOWED.items() for line in lines])
def test_an_allowed_import_is_not(tmp_path, file, line):
    for name in [*PLANTED, *ALLOWED, "kernels/_math.py", "benchmarks/bench.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / file).write_text(line)
    assert violations(tmp_path) == []

"""What every command writes: tables, JSON, and the facts of the machine a number was measured on."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

# Whose versions a result may depend on: what we stand on, and the peers of the benchmark.
_PACKAGES = (
    *("triton", "numpy", "pillow", "safetensors", "timm", "torchvision", "transformers", "onnxruntime", "onnx"),
    *("openvino", "flash-attn", "xformers", "transformer-engine", "attorch", "nvidia-ml-py"),
)


class Table:
    """Rows of text in aligned columns, printed as they come; the widths are given first, so that nothing waits."""

    def __init__(self, columns: dict[str, int], out: TextIO | None = None):
        """columns: heading -> width; a negative width aligns left."""
        self._widths = [(abs(width), width < 0) for width in columns.values()]
        self._out = out
        self.row(*columns)
        self.row(*("-" * abs(width) for width in columns.values()))

    def row(self, *cells: object) -> None:
        """Print one row; a cell wider than its column pushes the rest to the right rather than being cut."""
        padded = (
            str(cell).ljust(width) if left else str(cell).rjust(width)
            for cell, (width, left) in zip(cells, self._widths, strict=True)
        )
        print("  ".join(padded).rstrip(), file=self._out or sys.stdout, flush=True)


def note(text: str) -> None:
    """Say on stderr, at once, something about the run."""
    print(text, file=sys.stderr, flush=True)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, or what it links to, by way of a file beside it: no reader ever sees half of it."""
    path = Path(os.path.realpath(path))
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o666 & ~_umask())  # mkstemp's files are for the owner alone
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        raise


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity, which JSON has not, are refused."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def progress(items: Iterable, total: int, what: str) -> Iterator:
    """`items`, with a progress bar on stderr when that is a terminal and rich is installed."""
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console
            from rich.progress import track

            items = track(items, total=total, description=what, console=Console(stderr=True), transient=True)
    yield from items


def version_of(package: str) -> str | None:
    """The installed version of a package, read without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: str) -> str:
    """What the device is called: a GPU's name, or the processor's."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def first_line(error: BaseException) -> str:
    """An exception on one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['(no message)'])[0]}"


def slug(name: str) -> str:
    """`name` as part of a path: lower-case letters and digits, hyphens between."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def revision() -> str:
    """The commit that this package's checkout is at; where its tracked files differ from it, with "-dirty-" and a hash
    of the package's Python files; where there is no git, FASTVIT_COMMIT or "source", and that hash."""
    root, base = Path(__file__).resolve().parents[1], os.environ.get("FASTVIT_COMMIT") or "source"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        # A repository that merely encloses an installed package says nothing about it.
        if (root / ".git").exists():
            base = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            if not base.endswith("-dirty"):
                return base
    digest = hashlib.sha256()
    for package in ("fastvit", "kernels", "benchmarks"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return f"{base}-{digest.hexdigest()[:12]}"


def environment(device: str) -> dict:
    """The machine and the software, as every results file records them."""
    import torch

    import fastvit

    from . import tuned

    facts = {
        "fastvit": fastvit.__version__,
        "commit": revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": device_name("cpu"),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": device_name(device),
        "tuned": "" if tuned.mode() == "off" else tuned.table(torch.device(device)).fingerprint,
        "packages": {name: version_of(name) for name in _PACKAGES},
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("FASTVIT_", "TRITON_", "CUDA_VISIBLE", "OMP_NUM"))
        },
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            **_driver(properties),
        }
    return facts


def _driver(properties) -> dict:
    """What NVIDIA's driver says of the GPU: its version, clocks (MHz, now and at most) and power limit (W); None each
    where nvidia-smi is not there or does not know."""
    fields = {
        "driver": "driver_version",
        "sm_clock": "clocks.sm",
        "sm_clock_max": "clocks.max.sm",
        "memory_clock": "clocks.mem",
        "memory_clock_max": "clocks.max.mem",
        "power_limit": "power.limit",
    }
    command = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits"]
    values = [None] * len(fields)
    with contextlib.suppress(OSError, subprocess.SubprocessError, AttributeError):
        # Its numbers of GPUs are not CUDA's; the UUID is.
        command.append(f"--id=GPU-{properties.uuid}")
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        values = [value.strip() for value in found.split(",")]
    return dict(zip(fields, values, strict=False))

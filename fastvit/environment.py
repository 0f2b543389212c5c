"""The machine and the software that a number was measured on, as every results file records them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import subprocess
from pathlib import Path

import torch

from . import __version__, tuned
from .report import version_of

# Whose versions a result may depend on: what we stand on, and the peers of the benchmark.
_PACKAGES = (
    *("triton", "numpy", "pillow", "safetensors", "timm", "torchvision", "transformers", "onnxruntime", "onnx"),
    *("openvino", "flash-attn", "xformers", "transformer-engine", "attorch", "nvidia-ml-py"),
)
_PRIVATE = ("FASTVIT_CACHE",)  # a folder of the user's, which says nothing about the numbers


def device_name(device: str) -> str:
    """What the device is called: a GPU's name, or the processor's."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def revision() -> str:
    """The commit that this package's checkout is at; where its tracked files differ from it, with "-dirty-" and a hash
    of the package's Python files; where there is no git, FASTVIT_COMMIT or "source", and that hash."""
    # The checkout's root, where kernels/ and benchmarks/ lie beside fastvit/; of an installed package, fastvit/ itself.
    root, base = tuned.KERNELS.resolve().parent, os.environ.get("FASTVIT_COMMIT") or "source"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        # A repository that merely encloses an installed package says nothing about it.
        if (root / ".git").exists():
            base = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            if not base.endswith("-dirty"):
                return base
    digest = hashlib.sha256()
    ours = (Path(__file__).resolve().parent, root / "kernels", root / "benchmarks")
    for path in sorted({path for folder in ours for path in folder.rglob("*.py")}):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return f"{base}-{digest.hexdigest()[:12]}"


def environment(device: str) -> dict:
    """The machine and the software, as every results file records them."""
    facts = {
        "fastvit": __version__,
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
            if name.startswith(("FASTVIT_", "TRITON_", "CUDA_VISIBLE", "OMP_NUM")) and name not in _PRIVATE
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

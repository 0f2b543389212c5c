"""What can run a plan: a small file each, with `prepare(plan, batch, uint8) -> run`, where run takes exactly such
images (B, C, H, W) and gives a tuple of the plan's outputs. A file is imported when it is used."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..plan import Plan

Run = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Runtime:
    """One entry of `RUNTIMES`. packages: what it imports, by import name; extra: the extra of fastvit's that installs
    them; devices: torch's device types; dtypes: what it computes in; what: one line for the reader."""

    name: str
    what: str
    packages: tuple[str, ...] = ()
    extra: str = ""
    devices: tuple[str, ...] = ("cpu",)
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)

    def why_not(self, plan: Plan, device: torch.device) -> str | None:
        """Why it cannot run the plan on the device, None where it can."""
        if missing := [package for package in self.packages if importlib.util.find_spec(package) is None]:
            return f"not installed: {', '.join(missing)}; pip install 'fastvit[{self.extra}]'"
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {device.type}"
        if plan.dtype not in self.dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f"takes {names}, not {str(plan.dtype).removeprefix('torch.')}"
        return None

    def prepare(self, plan: Plan, batch: int, uint8: bool) -> Run:
        """The plan ready to run on batches of this size, on the device of its constants."""
        plan = plan if self.name == "torch" else plan.dense()  # which it copies
        return importlib.import_module(f".{self.name}_runtime", __name__).prepare(plan, batch, uint8)


_EVERY = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# In the order of a report.
RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime(
            "torch",
            "PyTorch; on a CPU with oneDNN's packed weights",
            devices=("cpu", "cuda"),
            dtypes=_EVERY,
        ),
        Runtime(*("openvino", "OpenVINO", ("openvino",), "openvino"), dtypes=(torch.float32, torch.bfloat16)),
        Runtime("onnxruntime", "ONNX Runtime", ("onnxruntime", "onnx", "onnxscript"), "onnxruntime"),
        Runtime(
            *("triton", "fastvit's kernels, replayed from CUDA graphs", ("triton",), "all", ("cuda",)),
            (torch.float32, torch.bfloat16, torch.float16),
        ),
    )
}

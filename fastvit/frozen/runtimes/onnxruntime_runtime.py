"""A plan by ONNX Runtime on a CPU."""

from __future__ import annotations

import torch

from ..export import onnx_bytes
from ..plan import IMAGES, Plan
from . import Run


def prepare(plan: Plan, batch: int, uint8: bool) -> Run:
    """The plan as a session for one batch, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(onnx_bytes(plan, batch, uint8), options, ["CPUExecutionProvider"])
    taken = torch.uint8 if uint8 else torch.float32

    def run(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = session.run(None, {IMAGES: images.to(taken).contiguous().numpy()})
        return tuple(torch.from_numpy(value) for value in found)

    return run

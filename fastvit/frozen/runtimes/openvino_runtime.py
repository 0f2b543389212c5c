"""A plan by OpenVINO on a CPU."""

from __future__ import annotations

import os

import torch

from ..export import openvino_model
from ..openvino_import import openvino_core
from ..plan import Plan
from . import Run

_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def prepare(plan: Plan, batch: int, uint8: bool) -> Run:
    """The plan compiled for one batch, with as many threads as PyTorch has. Raises RuntimeError where OpenVINO does not
    compute in the plan's dtype on this CPU."""
    model = openvino_model(plan, batch, uint8)
    precision = _PRECISIONS[plan.dtype]
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Pinned, the threads of every process with fewer than all cores are on the same ones, the first.
        "ENABLE_CPU_PINNING": torch.get_num_threads() >= len(os.sched_getaffinity(0)),
    }
    network = openvino_core().compile_model(model, "CPU", properties)
    chosen = network.get_property("INFERENCE_PRECISION_HINT").to_string()
    if chosen != precision:
        raise RuntimeError(f"asked for {precision}, OpenVINO computes in {chosen} on this CPU")
    request = network.create_infer_request()
    taken = torch.uint8 if uint8 else torch.float32
    count = len(plan.outputs)

    def run(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = request.infer([images.to(taken).contiguous().numpy()], share_inputs=True)
        return tuple(torch.from_numpy(found[i]).to(plan.dtype) for i in range(count))

    return run

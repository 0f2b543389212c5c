"""OpenVINO on fastvit's own model, converted at the case's batch."""

from __future__ import annotations

import torch

from fastvit.frozen.openvino_import import import_openvino, openvino_core

from . import Built
from ._export import exportable

_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def build(peer, case, ours, inputs) -> Built:
    openvino = import_openvino()
    # Weights of both dtypes go in as float32, without loss; the hint says what it computes in.
    with exportable(case, ours, torch.float32) as (model, images):
        converted = openvino.convert_model(torch.export.export(model, (images,)))
    precision = _PRECISIONS[case.dtype]
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    network = openvino_core().compile_model(converted, "CPU", properties)
    chosen = network.get_property("INFERENCE_PRECISION_HINT").to_string()
    if chosen != precision:
        raise RuntimeError(f"asked for {precision}, OpenVINO computes in {chosen} on this CPU")

    def call(images):
        images = images.detach().to(torch.float32).contiguous().numpy()
        return torch.from_numpy(network(images, share_inputs=True, share_outputs=True)[0])

    return Built(call, "" if precision == "f32" else "bf16 inside, float32 images and logits")

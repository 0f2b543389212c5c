"""ONNX Runtime on fastvit's own model, exported at the case's batch. On a GPU it was never run."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from . import Built
from ._export import exportable


def unfit(peer, case, config, device) -> str | None:
    if device.type == "cpu" and case.dtype == torch.bfloat16:
        return "has no kernels for bfloat16 on a CPU"
    return None


def build(peer, case, ours, inputs) -> Built:
    import onnxruntime
    from onnx import TensorProto

    weights = next(ours.parameters())
    device = weights.device.type, weights.device.index or 0
    element = {
        torch.float32: TensorProto.FLOAT,
        torch.float16: TensorProto.FLOAT16,
        torch.bfloat16: TensorProto.BFLOAT16,
    }[weights.dtype]
    if weights.is_cuda:
        # Its default is TF32, ours is what PyTorch is set to.
        tf32 = str(int(torch.backends.cuda.matmul.fp32_precision == "tf32"))
        provider = "CUDAExecutionProvider", {"device_id": str(device[1]), "use_tf32": tf32}
    else:
        provider = "CPUExecutionProvider", {}
    if provider[0] not in onnxruntime.get_available_providers():
        raise RuntimeError(f"this build of onnxruntime has no {provider[0]}")

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    with tempfile.TemporaryDirectory() as folder, exportable(case, ours, weights.dtype) as (model, images):
        path = Path(folder) / "model.onnx"
        names = {"input_names": ["images"], "output_names": ["logits"]}
        torch.onnx.export(model, (images,), path, dynamo=True, verbose=False, **names)
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
    shape = session.get_outputs()[0].shape
    binding = session.io_binding()

    def call(images):
        images, logits = images.contiguous(), weights.new_empty(shape)
        binding.bind_input("images", *device, element, images.shape, images.data_ptr())
        binding.bind_output("logits", *device, element, shape, logits.data_ptr())
        if images.is_cuda:
            torch.cuda.current_stream().synchronize()  # it runs on a stream of its own, and waits for that itself
        session.run_with_iobinding(binding)
        return logits

    half = case.dtype == torch.float16 and not weights.is_cuda
    return Built(call, "float32 wherever it has no float16 kernel" if half else "", opaque=weights.is_cuda)

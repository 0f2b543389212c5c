"""A plan as a module of plain operators, and in the files that other runtimes read: ONNX, OpenVINO's, PyTorch's."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from .openvino_import import import_openvino
from .plan import IMAGES, OPERATIONS, Plan, Step, in_dtype


class PlainModule(nn.Module):
    """images (B, C, H, W), uint8 or floating point as said -> a tuple of the plan's outputs, in plain PyTorch."""

    def __init__(self, plan: Plan, uint8: bool):
        super().__init__()
        self.steps, self.outputs = [], tuple(plan.outputs.values())
        buffers: dict[str, str] = {}
        for step in plan.steps:
            roles = step.roles(uint8)
            for role, name in roles.items():
                if name not in buffers:
                    buffers[name] = f"constant{len(buffers)}"
                    self.register_buffer(buffers[name], in_dtype(role, plan.constants[name], plan.dtype))
            self.steps.append((step, {role: buffers[name] for role, name in roles.items()}))

    def calls(self) -> Iterator[tuple[Step, Callable[..., torch.Tensor]]]:
        """Each step with what computes it from its inputs."""
        for step, roles in self.steps:
            constants = {role: getattr(self, name) for role, name in roles.items()}
            yield step, partial(OPERATIONS[step.op], **constants, **step.options)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = {IMAGES: images}
        for step, call in self.calls():
            values[step.out] = call(*[values[name] for name in step.inputs])
        return tuple(values[name] for name in self.outputs)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """In the body exporters give no warnings, and nothing is recorded for a backward pass."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def example(plan: Plan, batch: int, uint8: bool) -> torch.Tensor:
    """Images as the plan takes them, of zeros."""
    size = (batch, plan.config.in_chans, *plan.config.img_size)
    return torch.zeros(size, dtype=torch.uint8 if uint8 else plan.dtype, device="cpu")


def program(plan: Plan, batch: int | None, uint8: bool) -> torch.export.ExportedProgram:
    """The plan as torch.export has it, for one batch or, with None, any."""
    dynamic = None if batch else ({0: torch.export.Dim("batch")},)
    with _quietly():
        module = PlainModule(plan, uint8).eval()
        return torch.export.export(module, (example(plan, batch or 2, uint8),), dynamic_shapes=dynamic)


def onnx_bytes(plan: Plan, batch: int | None, uint8: bool) -> bytes:
    """The plan as an ONNX file. Raises ImportError where onnx or onnxscript is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("exporting ONNX needs onnx and onnxscript: pip install 'fastvit[onnxruntime]'") from error
    with _quietly(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        names = {"input_names": [IMAGES], "output_names": list(plan.outputs)}
        found = torch.onnx.export(program(plan, batch, uint8), dynamo=True, verbose=False, **names)
        found.save(path, external_data=False)
        return path.read_bytes()


def openvino_model(plan: Plan, batch: int | None, uint8: bool):
    """The plan as an openvino.Model, in float32 whatever the plan's dtype: bfloat16 fits into it without loss. Raises
    ImportError where openvino is not installed."""
    try:
        openvino = import_openvino()
    except ImportError as error:
        raise ImportError("OpenVINO is not installed: pip install 'fastvit[openvino]'") from error
    with _quietly():
        model = openvino.convert_model(program(plan.rounded(torch.float32), batch, uint8))
    model.inputs[0].get_tensor().set_names({IMAGES})
    for output, name in zip(model.outputs, plan.outputs, strict=True):
        output.get_tensor().set_names({name})
    return model


def export(plan: Plan, path: str | os.PathLike, batch: int | None, uint8: bool) -> None:
    """Write the plan to a .onnx, .xml (with .bin beside it) or .pt2 file. Raises ValueError for another suffix."""
    from fastvit.report import write_atomically

    path = Path(path)
    if path.suffix == ".onnx":
        write_atomically(path, onnx_bytes(plan, batch, uint8))
    elif path.suffix == ".xml":
        model = openvino_model(plan, batch, uint8)
        # The weights first: the file that names them comes when they are there.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            import_openvino().save_model(model, Path(folder) / path.name, compress_to_fp16=False)
            for suffix in (".bin", ".xml"):
                os.replace((Path(folder) / path.name).with_suffix(suffix), path.with_suffix(suffix))
    elif path.suffix == ".pt2":
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder, _quietly():
            torch.export.save(program(plan, batch, uint8), Path(folder) / path.name)
            os.replace(Path(folder) / path.name, path)
    else:
        raise ValueError(f"path is {os.fspath(path)!r}, expected a name that ends in .onnx, .xml or .pt2")

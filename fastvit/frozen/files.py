"""A frozen model's file: safetensors, with the plan as JSON in its metadata, and a checksum of both."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os

import torch

from fastvit.models.config import ViTConfig
from fastvit.models.reading import check_path

from .plan import OPERATIONS, Plan, Step

KIND, VERSION = "fastvit frozen", 1


def save(path: str | os.PathLike, plan: Plan, facts: dict) -> None:
    """Write plan and facts (JSON) to `path`, by way of a file beside it. Raises ImportError without safetensors."""
    from fastvit.report import write_atomically

    try:
        from safetensors.torch import save as serialise
    except ImportError as error:
        raise ImportError("saving a frozen model needs safetensors: pip install 'fastvit[hub]'") from error
    steps = [dataclasses.asdict(step) for step in plan.steps]
    text = json.dumps(
        {"steps": steps, "outputs": dict(plan.outputs), "config": dataclasses.asdict(plan.config), "facts": facts},
        allow_nan=False,
    )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in plan.constants.items()}
    metadata = {"kind": KIND, "version": str(VERSION), "plan": text, "sha256": _checksum(text, tensors)}
    write_atomically(path, serialise(tensors, metadata))


def load(path: str | os.PathLike) -> tuple[Plan, dict]:
    """What `save` wrote. Raises FileNotFoundError, ImportError without safetensors, and ValueError for a file that is
    none, of another version, cut off or changed."""
    check_path("path", path)
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"reading {path} needs safetensors: pip install 'fastvit[hub]'") from error
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off or no safetensors file: {error}") from error
    if metadata.get("kind") != KIND:
        raise ValueError(f"{path} holds no frozen model; fastvit.load_checkpoint reads weights")
    if metadata.get("version") != str(VERSION):
        raise ValueError(
            f"{path} is of version {metadata.get('version')}, and this fastvit reads {VERSION}: freeze the model anew"
        )
    if metadata.get("sha256") != _checksum(metadata.get("plan", ""), tensors):
        raise ValueError(f"{path} is damaged: its checksum does not fit what it holds")
    found = json.loads(metadata["plan"])
    steps = tuple(
        Step(step["out"], step["op"], tuple(step["inputs"]), step["constants"], _tuples(step["options"]))
        for step in found["steps"]
    )
    if unknown := {step.op for step in steps} - OPERATIONS.keys():
        raise ValueError(f"{path} has steps that this fastvit has not: {', '.join(sorted(unknown))}")
    return Plan(steps, found["outputs"], tensors, ViTConfig(**_tuples(found["config"]))), found["facts"]


def _tuples(values: dict) -> dict:
    """JSON has lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _checksum(text: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

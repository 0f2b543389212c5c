"""The state of a training run on disk: tensors as safetensors, numbers as JSON, whole or not at all.

A checkpoint is a folder step-N with model.safetensors, ema.safetensors if averaged weights are kept,
optimizer.safetensors, and state.json. It is written beside and renamed, so that a folder of that name is whole. The
tensors are whole too, gathered from all processes: a run may go on with another number of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as dcp

from ..report import write_json

_WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)


def newest(folder: Path) -> Path | None:
    """The checkpoint of the most steps in `folder`."""
    return max(_all(folder), key=_steps, default=None)


def remove_all(folder: Path) -> None:
    """Remove the checkpoints in `folder`."""
    for path in _all(folder):
        _remove(path)
    for path in folder.glob(".step-*"):  # of a process that was killed at it
        shutil.rmtree(path)


def _remove(path: Path) -> None:
    """Under another name first, so that what is left of it if this is cut off is not taken for a checkpoint."""
    beside = path.with_name(f".{path.name}")
    shutil.rmtree(beside, ignore_errors=True)
    os.replace(path, beside)
    shutil.rmtree(beside)


def _number(value: object) -> object:
    """timm's LAMB counts its steps in a tensor."""
    return value.item() if torch.is_tensor(value) else value


def _all(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]


def _steps(path: Path) -> int:
    return int(path.name[5:])


def read_state(path: Path) -> dict:
    """state.json of a checkpoint. Raises ValueError where it cannot be read."""
    try:
        return json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no checkpoint of a training run: {error}") from None


def gathered(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole state of a model on the CPU of process 0, whatever each process has of it; all have to call it."""
    return {name: tensor.contiguous() for name, tensor in dcp.get_model_state_dict(model, options=_WHOLE).items()}


def save(
    folder: Path,
    step: int,
    models: dict[str, torch.nn.Module],
    optimizer: torch.optim.Optimizer,
    state: dict,
    keep: int,
) -> None:
    """Write folder/step-N and remove all but the `keep` newest; all processes have to call it.

    models: by the names of their files, the first being the one that the optimizer trains. state: what goes into
    state.json beside the optimizer's numbers.
    """
    from safetensors.torch import save_file

    tensors = {name: gathered(model) for name, model in models.items()}
    optimized = dcp.get_optimizer_state_dict(next(iter(models.values())), optimizer, options=_WHOLE)
    if is_first():
        held = {f"{of}/{name}": value for of, values in optimized["state"].items() for name, value in values.items()}
        tensors["optimizer"] = {name: value.contiguous() for name, value in held.items() if torch.is_tensor(value)}
        numbers = {
            "groups": [{name: _number(value) for name, value in group.items()} for group in optimized["param_groups"]],
            "state": {name: value for name, value in held.items() if not torch.is_tensor(value)},
        }
        beside = folder / f".step-{step}"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for name, content in tensors.items():
            save_file(content, beside / f"{name}.safetensors", {"format": "pt"})
            _to_disk(beside / f"{name}.safetensors")
        write_json(beside / "state.json", {**state, "step": step, "optimizer": numbers})
        _to_disk(beside)
        target = folder / f"step-{step}"
        if not target.exists():  # what is there is of the same numbers
            os.replace(beside, target)
            _to_disk(folder)
        shutil.rmtree(beside, ignore_errors=True)
        for old in sorted(_all(folder), key=_steps)[:-keep]:
            _remove(old)
    if dist.is_initialized():
        dist.barrier()


def load(path: Path, models: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Put what `save` wrote back; all processes have to call it, and the first reads."""
    from safetensors.torch import load_file

    several = dist.is_initialized() and dist.get_world_size() > 1
    options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=several)
    reads = is_first()
    for name, model in models.items():
        dcp.set_model_state_dict(model, load_file(path / f"{name}.safetensors") if reads else {}, options=options)
    optimized = {}
    if reads:
        numbers = read_state(path)["optimizer"]
        optimized = {"state": {}, "param_groups": numbers["groups"]}
        for name, value in (load_file(path / "optimizer.safetensors") | numbers["state"]).items():
            parameter, _, what = name.rpartition("/")
            optimized["state"].setdefault(parameter, {})[what] = value
    dcp.set_optimizer_state_dict(next(iter(models.values())), optimizer, optimized, options=options)


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

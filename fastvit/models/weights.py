"""Checkpoints: reading, renaming, resampling of the position table, checking, loading; and the hub's files."""

from __future__ import annotations

import math
import os
import re

import torch
import torch.nn.functional as F
from torch import nn

_HEADS = ("head.", "head_dist.")


def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    new_classifier: bool = False,
    grid_size: tuple[int, int] | None = None,
) -> None:
    """Load the weights in `path`, a .safetensors file or a torch file without pickled code, into a VisionTransformer.

    Names are timm's; {"model": ...} and {"state_dict": ...} wrappers, a "module." prefix, and the names of the
    original DINOv2 files are understood. Values are cast to the model's dtype. A position table of another grid is
    resampled by the config's policy: its grid is `grid_size` (rows, columns) if given, else the model's own if the
    rows agree, else a square. new_classifier: classifier tensors in the file that do not fit the model are left out
    and the model's own stay; otherwise they are an error like any other.

    Either everything is loaded or nothing: ValueError lists every missing, unexpected and misshaped tensor.
    FileNotFoundError and ValueError are for a path that is not there, or not a checkpoint.
    """
    state = convert_names(read_state_dict(path))
    wanted = model.state_dict()
    if any(tensor.is_meta for tensor in wanted.values()):
        raise ValueError("model is on the meta device, expected one with storage: call model.to_empty first")
    if "pos_embed" in state:
        state["pos_embed"] = _fit_position_table(state["pos_embed"], model.config, grid_size)
    if new_classifier:
        fits = all(name in state and state[name].shape == wanted[name].shape for name in wanted if _is_head(name))
        if not fits or not any(_is_head(name) for name in wanted):
            state = {name: tensor for name, tensor in state.items() if not _is_head(name)}
            state.update({name: tensor for name, tensor in wanted.items() if _is_head(name)})

    problems = [f"missing {name} {tuple(wanted[name].shape)}" for name in wanted if name not in state]
    problems += [f"unexpected {name} {tuple(state[name].shape)}" for name in state if name not in wanted]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError(f"{os.fspath(path)} does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(state)


def _is_head(name: str) -> bool:
    return name.startswith(_HEADS)


def read_state_dict(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or torch file by name, on the CPU, out of any wrapper.

    Raises FileNotFoundError, ImportError where safetensors is not installed, and ValueError for a file that is
    damaged, holds pickled code or holds anything but tensors.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.endswith(".safetensors"):
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"reading {path} needs safetensors: pip install 'fastvit[hub]'") from error
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on garbage the unpickler raises KeyError, IndexError, struct.error and more
        raise ValueError(
            f"{path} cannot be read as a torch file of plain tensors: it is damaged, no checkpoint, or holds pickled "
            f"code ({type(error).__name__})"
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected tensors by name")
    for name, tensor in state.items():
        real = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_complex()
        if not isinstance(name, str) or not real:
            raise ValueError(f"{path} holds {name!r}, a {type(tensor).__name__}, expected dense real tensors by name")
    return state


def convert_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` under timm's names: without "module.", and original DINOv2 files (arXiv 2304.07193) brought over.

    Those have register_tokens, mlp.w12 and mlp.w3, blocks in chunks (blocks.<chunk>.<block>), a mask_token for
    training only, and with registers a position for the class token, which timm has folded into the token. Old ViT
    files have an unused pre_logits layer.
    """
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name.removeprefix("module."))
        name = name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        if name != "mask_token" and not name.startswith("pre_logits."):
            renamed[name] = tensor
    if {"register_tokens", "cls_token", "pos_embed"} <= renamed.keys():
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
    return renamed


def _fit_position_table(table, config, grid_size):
    """The checkpoint's position table (1, rows, D) at the model's grid, by the config's policy; as it is where its rows
    are neither grid_size's, the model's nor a square, to be listed with what else does not fit."""
    prefix_rows = 0 if config.no_embed_class else config.num_prefix_tokens
    if table.dim() != 3 or table.shape[0] != 1:
        return table
    rows = table.shape[1] - prefix_rows
    if grid_size is None or grid_size[0] * grid_size[1] != rows:
        side = math.isqrt(max(rows, 0))
        if rows == config.grid_size[0] * config.grid_size[1]:
            grid_size = config.grid_size
        elif rows > 0 and side * side == rows:
            grid_size = (side, side)
        else:
            return table
    return resample_position_table(table, grid_size, config.grid_size, prefix_rows, config.pos_resampling)


def resample_position_table(
    table: torch.Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    prefix_rows: int,
    policy: str = "antialias",
) -> torch.Tensor:
    """A position table (1, prefix_rows + rows * columns, D) brought from one grid (rows, columns) to another.

    Bicubic, in float32, the prefix rows unchanged, by the `policy` of the model's family: "antialias" as timm (and
    DINOv2 with registers) does; "bicubic" without antialiasing, as Hugging Face's Dinov2; "dinov2" as the original
    DINOv2 without registers, whose sampling step is old / (new + 0.1), not antialiased.
    """
    if tuple(old_grid) == tuple(new_grid):
        return table
    prefix, grid = table[:, :prefix_rows], table[:, prefix_rows:].float()
    grid = grid.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    if policy == "dinov2":
        step = [(new + 0.1) / old for new, old in zip(new_grid, old_grid, strict=True)]
        grid = F.interpolate(grid, scale_factor=step, mode="bicubic")
    else:
        grid = F.interpolate(grid, size=tuple(new_grid), mode="bicubic", antialias=policy == "antialias")
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def fetch_pretrained(hub_id: str) -> str:
    """The local path of `hub_id`'s model.safetensors, downloaded from the Hugging Face hub unless cached.

    Raises ImportError where huggingface_hub is not installed, and RuntimeError where the file cannot be had.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError("pretrained weights need huggingface_hub: pip install 'fastvit[hub]'") from error
    try:
        return hf_hub_download(hub_id, "model.safetensors")
    except Exception as error:  # the client's own types changed between its releases, as did its HTTP library's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RuntimeError(f"could not download model.safetensors of {hub_id}: {reason}") from error

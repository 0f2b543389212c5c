"""Weights under timm's names: fitting them to the model, checking, loading; and the hub's files."""

from __future__ import annotations

import math
import operator
import os
import queue
import threading

import torch
import torch.nn.functional as F
from torch import nn

from fastvit.nn.patch_embed import resample_patch_weight

from .formats import BLOCK_NUMBER, Format, State, not_read

_HEADS = ("head.", "head_dist.")
_PATCH_WEIGHT = "patch_embed.proj.weight"


def load_weights(
    model: nn.Module,
    state: State,
    format: Format,
    path: str | os.PathLike,
    *,
    new_classifier: bool = False,
    grid_size: tuple[int, int] | None = None,
) -> None:
    """Load what `reading.read_checkpoint` found at `path` into a VisionTransformer, as `load_checkpoint` says."""
    state = dict(state)
    wanted = model.state_dict()
    if any(tensor.is_meta for tensor in wanted.values()):
        raise ValueError("model is on the meta device, expected one with storage: call model.to_empty first")
    if "pos_embed" in state:
        state["pos_embed"] = _fit_position_table(state["pos_embed"], model.config, grid_size)
    if _PATCH_WEIGHT in state:
        weight = _fit_channels(state[_PATCH_WEIGHT], model.config.in_chans)
        if weight.dim() == 4 and weight.shape[2:] != model.config.patch_size:
            weight = resample_patch_weight(weight, model.config.patch_size)
        state[_PATCH_WEIGHT] = weight
    if ("mask_token" in state) != ("mask_token" in wanted):
        state = _keep_own(state, wanted, ("mask_token",))
    if new_classifier:
        heads = [name for name in wanted if name.startswith(_HEADS)]
        if not heads or any(name not in state or state[name].shape != wanted[name].shape for name in heads):
            moved = ("fc_norm.weight" in state) != ("fc_norm.weight" in wanted)
            state = _keep_own(state, wanted, (*_HEADS, "norm.", "fc_norm.") if moved else _HEADS)

    check_fit(state, wanted, format, path)
    model.load_state_dict(state)


def check_fit(state: State, wanted: State, format: Format, path: str | os.PathLike) -> None:
    """Raise ValueError, with all names that are missing, unexpected or misshaped, unless `state`, which was found at
    `path` in `format`, has the names and shapes of `wanted`, a model's state_dict."""
    problems = _listed("missing ", {name: str(tuple(t.shape)) for name, t in wanted.items() if name not in state})
    problems += _listed("unexpected ", {name: str(tuple(t.shape)) for name, t in state.items() if name not in wanted})
    misshaped = {
        name: f"has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    }
    problems += _listed("", misshaped)
    if not problems:
        return
    if source := not_read(state):
        raise ValueError(f"{os.fspath(path)} holds a checkpoint of {source}, which fastvit does not read")
    if "norm.weight" in state and "fc_norm.weight" in wanted:
        problems.append("the file has its norm before the pool, as a model with fc_norm=False")
    if "fc_norm.weight" in state and "norm.weight" in wanted:
        problems.append("the file has its norm after the pool, as a model with fc_norm=True")
    whose = "" if format.source == "timm" else f"holds a checkpoint of {format.source}, which "
    raise ValueError(f"{os.fspath(path)} {whose}does not fit the model: {'; '.join(problems)}")


def _listed(kind: str, said_of: dict[str, str]) -> list[str]:
    """`kind`, a name and what is said of it, for every name; for names alike but for their block's number, once."""
    numbers_of: dict[tuple[str, ...], list[int]] = {}
    for name, said in said_of.items():
        number = BLOCK_NUMBER.search(name)
        alike = (name, "") if number is None else (name[: number.start()], name[number.end() :])
        numbers_of.setdefault((*alike, said), []).extend([] if number is None else [int(number.group())])
    return [f"{kind}{before}{_ranges(numbers)}{after} {said}" for (before, after, said), numbers in numbers_of.items()]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _keep_own(state, wanted, prefixes):
    """`state` with the model's own tensors, `wanted`, in place of those whose names begin with one of `prefixes`."""
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}
    return kept | {name: tensor for name, tensor in wanted.items() if name.startswith(prefixes)}


def _fit_channels(weight, in_chans):
    """An RGB patch projection (D, 3, P, P) for images of in_chans channels, as timm's adapt_input_conv makes it: the
    sum for one channel, else repeated and scaled to the same total. Others come back as they are."""
    if weight.dim() != 4 or weight.shape[1] != 3 or in_chans == 3:
        return weight
    if in_chans == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    repeated = weight.float().repeat(1, math.ceil(in_chans / 3), 1, 1)[:, :in_chans]
    return (repeated * (3 / in_chans)).to(weight.dtype)


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
    # To compare the grids would tie an exported graph to its example. "dinov2" has to: it would change an equal grid.
    exporting = torch.compiler.is_exporting() and policy != "dinov2"
    if not exporting and tuple(old_grid) == tuple(new_grid):
        return table
    if policy == "antialias" and not exporting and torch.compiler.is_compiling() and torch.is_grad_enabled():
        # A graph for each grid, as PyTorch's backward fails in one for all of them.
        new_grid = [operator.index(side) for side in new_grid]
    prefix, grid = table[:, :prefix_rows], table[:, prefix_rows:].float()
    grid = grid.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    if policy == "dinov2":
        step = [(new + 0.1) / old for new, old in zip(new_grid, old_grid, strict=True)]
        grid = F.interpolate(grid, scale_factor=step, mode="bicubic")
    else:
        grid = F.interpolate(grid, size=tuple(new_grid), mode="bicubic", antialias=policy == "antialias")
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def fetch_pretrained(hub_id: str) -> str:
    """The local path of `hub_id`'s model.safetensors, downloaded from the Hugging Face hub unless it is in its cache.

    Raises ImportError where huggingface_hub is not installed, and RuntimeError where the file cannot be had: within
    three seconds where the hub does not answer, or as many as its own variable HF_HUB_ETAG_TIMEOUT says.
    """
    try:
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    except ImportError as error:
        raise ImportError("pretrained weights need huggingface_hub: pip install 'fastvit[hub]'") from error
    cached = try_to_load_from_cache(hub_id, "model.safetensors")
    if isinstance(cached, str):
        return cached
    try:
        _await_answer(constants.ENDPOINT, float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or 3))
        return hf_hub_download(hub_id, "model.safetensors")
    except Exception as error:  # the client's own types changed between its releases, as did its HTTP library's
        said = str(error).strip() or type(error).__name__
        reason = f"{said.splitlines()[0].rstrip('.')}; a copy from elsewhere can be given as checkpoint"
        raise RuntimeError(f"could not download model.safetensors of {hub_id}: {reason}") from error


def _await_answer(url, seconds):
    """Return once a server has answered at `url`, whatever it says; raise what the attempt did, or TimeoutError.

    hf_hub_download would try for minutes. In a thread, because no timeout of the client bounds the look-up of a name.
    """
    from huggingface_hub.utils import get_session

    outcome = queue.SimpleQueue()

    def ask():
        try:
            get_session().head(url, timeout=seconds)
            outcome.put(None)
        except Exception as error:
            outcome.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} seconds from {url} (HF_HUB_ETAG_TIMEOUT sets more)") from None
    if error is not None:
        raise error

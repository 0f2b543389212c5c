"""Checkpoints: reading, renaming, fitting to the model, checking, loading; and the hub's files."""

from __future__ import annotations

import math
import operator
import os
import queue
import re
import threading

import torch
import torch.nn.functional as F
from torch import nn

from fastvit.nn.patch_embed import resample_patch_weight

from .config import ViTConfig

_HEADS = ("head.", "head_dist.")
_PATCH_WEIGHT = "patch_embed.proj.weight"
# Entries of training files that hold the weights. The first one wins: averaged weights before raw ones, as in timm, and
# DINO's teacher before its student. An entry of another name is taken where only that one has a patch projection.
_WRAPPERS = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model", "model_state_dict")
# Objects that training files hold beside the tensors, and that weights_only stops at.
_BESIDE_TENSORS = (
    "argparse.Namespace",
    *(f"{module}.{system}Path" for module in ("pathlib", "pathlib._local") for system in ("Posix", "Windows")),
    *(f"numpy.{core}.multiarray.{maker}" for core in ("core", "_core") for maker in ("scalar", "_reconstruct")),
    "numpy.ndarray",
    "numpy.dtype",
)
# Formats of other releases, and a name that tells each; where one has another's names as well, it comes first.
_OTHER_FORMATS = {
    "torchvision's VisionTransformer": r"conv_proj\.",
    "Swin": r"(layers\.\d+\.blocks|features\.\d+)\.\d+\..*relative_position_bias_table",
    "BEiT or EVA": r"attn\.q_bias",
    "DeiT III or CaiT as Meta releases it": r"blocks\.\d+\.gamma_1",
    "MAE before fine-tuning": r"decoder_(blocks|pos_embed)",
    "Segment Anything or ViTDet": r"attn\.rel_pos_h",
    "CLIP as OpenAI and OpenCLIP release it": r"transformer\.resblocks\.",
    "DINOv3 as Meta releases it": r"storage_tokens|rope_embed\.periods",
    "mmpretrain": r"layers\.\d+\.ln1\.",
    "transformers' CLIP": r"embeddings\.class_embedding",
    "transformers' SigLIP": r"embeddings\.patch_embedding\.",
    "transformers' DINOv3": r"embeddings\.patch_embeddings\.weight",
    "transformers' DeiT": r"embeddings\.distillation_token",
    "transformers' Dinov2": r"layer_scale1\.lambda1",
    "transformers' ViT": r"embeddings\.patch_embeddings\.",
    "ResNet": r"layer1\.0\.conv1\.",
    "ConvNeXt": r"stages\.0\.(blocks\.)?0\.(conv_dw|dwconv)\.",
}


def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    new_classifier: bool = False,
    grid_size: tuple[int, int] | None = None,
) -> None:
    """Load the weights in `path` into a VisionTransformer, cast to its dtype: all that the model has, or none at all.

    The file is .safetensors, or of torch.save and readable without running code; names are timm's or those of the
    original DINOv2. From a training checkpoint the first of these entries is taken: state_dict_ema, model_ema, teacher,
    state_dict, model, model_state_dict; else the only one that holds a model of such names. A prefix that the whole
    model has ("module.", "_orig_mod.", "backbone.", "model.") is removed, and what lies outside of it is left out, as
    DINO's projection head is.

    A position table of another grid is resampled by the config's policy; that grid is `grid_size` (rows, columns) if
    given, else the model's own if the rows agree, else a square. So is a projection of patches of another size. RGB
    weights are summed for a model of one channel, and repeated and scaled for other numbers, as in timm. A mask_token
    that only the file has is left out; one that only the model has stays.

    new_classifier: a classifier that the file lacks or that does not fit stays the model's own. So, with it, does a
    final norm that the file has on the other side of the pool (`norm` or `fc_norm`), as in timm. Without new_classifier
    both are errors.

    Raises ValueError for a file that cannot be read, and where tensors are missing, unexpected or of another shape,
    with the first few of each and the format if it is a known one of another library; FileNotFoundError; ImportError
    where safetensors is not installed; and TypeError for a model of another class and a path that is none.
    """
    if not isinstance(getattr(model, "config", None), ViTConfig):
        name = f"{type(model).__module__}.{type(model).__qualname__}"
        raise TypeError(f"model is a {name}, expected a fastvit.VisionTransformer")
    check_path("path", path)
    state = convert_names(read_state_dict(path))
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

    if misfit := _misfit(state, wanted):
        raise ValueError(f"{os.fspath(path)} {misfit}")
    model.load_state_dict(state)


def check_path(name: str, path) -> None:
    """Raise TypeError unless `path` is a path, ValueError for a directory."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} is a {type(path).__name__}, expected a path; load_state_dict takes tensors")
    if os.path.isdir(path):
        raise ValueError(f"{name} is {os.fspath(path)!r}, a directory, expected a .safetensors or .pth file")


def _misfit(state, wanted):
    """What keeps `state` from fitting a model whose state_dict is `wanted`, in one line; "" if nothing does."""
    missing = [f"missing {name} {tuple(wanted[name].shape)}" for name in wanted if name not in state]
    unexpected = [f"unexpected {name} {tuple(state[name].shape)}" for name in state if name not in wanted]
    misshaped = [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = []
    for kind, found in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped)):
        problems += found[:3] + ([f"{len(found) - 3} more {kind}"] if len(found) > 3 else [])
    if not problems:
        return ""
    names = "\n".join(state)
    for source, telling in _OTHER_FORMATS.items():
        if re.search(telling, names):
            return f"holds a checkpoint of {source}, expected timm's names: {'; '.join(problems)}"
    if "norm.weight" in state and "fc_norm.weight" in wanted:
        problems.append("the file has its norm before the pool, as a model with fc_norm=False")
    if "fc_norm.weight" in state and "norm.weight" in wanted:
        problems.append("the file has its norm after the pool, as a model with fc_norm=True")
    return f"does not fit the model: {'; '.join(problems)}"


def _keep_own(state, wanted, prefixes):
    """`state` with the model's own tensors, `wanted`, in place of those whose names begin with one of `prefixes`."""
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}
    return kept | {name: tensor for name, tensor in wanted.items() if name.startswith(prefixes)}


def read_state_dict(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of one model in a .safetensors or torch file by name, on the CPU, out of any wrapper and prefix.

    Raises FileNotFoundError, ImportError where safetensors is not installed, and ValueError for a file that cannot be
    read without running code or at all, and for one that holds several models or anything but tensors.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    state = _read_safetensors(path) if path.endswith(".safetensors") else _read_torch_file(path)
    while isinstance(state, dict):
        inner = next((entry for entry in map(state.get, _WRAPPERS) if isinstance(entry, dict) and entry), None)
        if inner is None:
            named = [name for name, entry in state.items() if isinstance(entry, dict) and _model_prefixes(entry)]
            if len(named) > 1:
                entries = " and ".join(map(repr, named))
                raise ValueError(f"{path} holds models as {entries}, expected one: save it alone")
            if not named:
                break
            inner = state[named[0]]
        state = inner
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected tensors by name")
    for name, tensor in state.items():
        real = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_complex()
        if not isinstance(name, str) or not real:
            raise ValueError(f"{path} holds {name!r}, a {type(tensor).__name__}, expected dense real tensors by name")

    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}  # torch.compile's, anywhere
    prefixes = _model_prefixes(state)
    if "" in prefixes or not prefixes:
        return state
    if len(prefixes) > 1:
        raise ValueError(f"{path} holds models under {' and '.join(map(repr, prefixes))}, expected one: save it alone")
    return {name.removeprefix(prefixes[0]): v for name, v in state.items() if name.startswith(prefixes[0])}


def _model_prefixes(state):
    """What stands before the patch projection's name in `state`: a prefix for each model that is in it."""
    return [name.removesuffix(_PATCH_WEIGHT) for name in map(str, state) if f".{name}".endswith(f".{_PATCH_WEIGHT}")]


def _read_safetensors(path):
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"reading {path} needs safetensors: pip install 'fastvit[hub]'") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error


class _Ignored:
    """Stands in for an object beside the tensors: whatever the file would make it from, it keeps and runs nothing."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


def _read_torch_file(path):
    if path.endswith(".npz"):
        raise ValueError(f"{path} is a NumPy archive, as JAX models come in, expected a torch or safetensors file")
    with open(path, "rb") as file:
        start = file.read(16)
    refused = f"{path} cannot be read as a torch file of plain tensors"
    if not start.startswith((b"PK", b"\x80")):  # a zip archive, or in old files a pickle
        raise ValueError(f"{refused}: it begins with {start!r}")
    try:
        with torch.serialization.safe_globals([(_Ignored, name) for name in _BESIDE_TENSORS]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on garbage the unpickler raises KeyError, IndexError, struct.error and more
        reason = _reason(error)
        advice = "; a file of model.state_dict() alone can be read" if "GLOBAL" in reason else ""
        raise ValueError(f"{refused}: {reason}{advice}") from error


def _reason(error):
    """What torch.load found wrong, in one line, without its advice to run what is in the file."""
    framing = ("Weights only load failed", "(1)", "(2)", "Check the documentation")
    for line in str(error).splitlines():
        line = re.split(r"\.? *(?:Please|In PyTorch)|\.$", line.split("WeightsUnpickler error:")[-1].strip())[0]
        if line and not line.startswith(framing):
            return line
    return type(error).__name__


def convert_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` under timm's names, with original DINOv2 files (arXiv 2304.07193) brought over.

    Those have register_tokens, mlp.w12 and mlp.w3, blocks in chunks (blocks.<chunk>.<block>), and with registers a
    position for the class token, which timm has folded into the token. Old ViT files have an unused pre_logits layer.
    """
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
        name = name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        if not name.startswith("pre_logits."):
            renamed[name] = tensor
    if {"register_tokens", "cls_token", "pos_embed"} <= renamed.keys():
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
    return renamed


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

"""Reading checkpoint files: which tensors of what training saved are the model's. Nothing in a file is run."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace

import torch

from .formats import ACTIVATION_OF, Format, State, model_prefixes, to_timm, without_prefix

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
# What transformers calls a model's file in its folder, and the list of files where it takes several.
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# What our own files say of the model beside its tensors: these fields, which those do not tell, under this key.
METADATA, UNTOLD = "fastvit", ("activation", "norm_eps", "num_heads", "rope_temperature", "mean", "std")
UNTOLD += ("crop_pct", "crop_mode", "interpolation")
CLASSES = "classes"  # the names of the classes, beside them
# Fields of ViTConfig by what transformers' config.json calls them.
_THEIR_NAMES = {"norm_eps": "layer_norm_eps", "num_heads": "num_attention_heads", "rope_temperature": "rope_theta"}
_THEIR_NAMES |= {"img_size": "image_size"}


def check_path(name: str, path) -> None:
    """Raise TypeError unless `path` is a path, ValueError for a folder without weights."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} is a {type(path).__name__}, expected a path; load_state_dict takes tensors")
    if os.path.isdir(path) and os.path.isdir(weights_file(path)):
        raise ValueError(
            f"{name} is {os.fspath(path)!r}, a directory, expected a .safetensors or .pth file, or a folder with "
            f"{_WHOLE} or {_INDEX}"
        )


def weights_file(path: str | os.PathLike) -> str:
    """The file that `path` stands for: in a folder as transformers saves one, its weights or the index of them."""
    for name in (_INDEX, _WHOLE):
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    return os.fspath(path)


def read_checkpoint(path: str | os.PathLike) -> tuple[State, Format]:
    """The tensors of one model under timm's names, on the CPU, out of any wrapper and prefix; and whose file it is.

    path: a .safetensors file, the index of several, a folder that has either, a Flax .npz, or a file of torch.save.
    Raises FileNotFoundError, ImportError where safetensors is not installed, and ValueError for a file that cannot be
    read without running code or at all, and for one that holds several models or anything but tensors.
    """
    path = weights_file(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    readers = {".safetensors": _read_safetensors, ".safetensors.index.json": _read_sharded, ".npz": _read_npz}
    read = next((reader for ending, reader in readers.items() if path.endswith(ending)), _read_torch_file)
    state, format = to_timm(one_model(path, read(path)))
    if path.endswith(".safetensors"):
        format = replace(format, facts={**format.facts, **_facts_inside(path)})
    if format.source.startswith("transformers"):
        format = replace(format, facts={**format.facts, **_facts_beside(path)})
    return state, format


def _facts_inside(path: str) -> dict[str, object]:
    """Fields of ViTConfig that a safetensors file of ours says beside its tensors."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in _said_inside(path).items()
        if name in UNTOLD
    }


def class_names(path: str | os.PathLike) -> list[str] | None:
    """The names of the classes, if a safetensors file of ours says them, as those of `fastvit train` do."""
    path = weights_file(path)
    names = _said_inside(path).get(CLASSES) if path.endswith(".safetensors") else None
    return names if isinstance(names, list) else None


def _said_inside(path: str) -> dict[str, object]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        said = (file.metadata() or {}).get(METADATA)
    try:
        found = {} if said is None else json.loads(said)
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found
    except ValueError as error:
        raise ValueError(f"{path} has metadata of fastvit that cannot be read: {error}") from error


def _facts_beside(path: str) -> dict[str, object]:
    """What the config.json beside `path`, if there is one, says of the model that shapes do not tell."""
    path = os.path.join(os.path.dirname(path), "config.json")
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            said = json.load(file)
        return facts_of(said) if "model_type" in said else {}  # others have a file of that name too
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no config of a Vision Transformer: {type(error).__name__}: {error}") from error


def facts_of(said: dict) -> dict[str, object]:
    """Fields of ViTConfig by what transformers' config.json, read, says; an activation that we have not as it is."""
    said = said.get("vision_config") or said.get("encoder") or said
    facts = {ours: said[theirs] for ours, theirs in _THEIR_NAMES.items() if theirs in said}
    if "hidden_act" in said:
        facts["activation"] = ACTIVATION_OF.get(said["hidden_act"], said["hidden_act"])
    return facts


def one_model(path, state) -> State:
    """The tensors of the one model in `state`, which is what `path` holds, without their common prefix."""
    while isinstance(state, dict):
        inner = next((entry for entry in map(state.get, _WRAPPERS) if isinstance(entry, dict) and entry), None)
        if inner is None:
            named = [name for name, entry in state.items() if isinstance(entry, dict) and model_prefixes(entry)]
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
    prefixes = model_prefixes(state)
    if "" in prefixes or not prefixes:
        return state
    if len(prefixes) > 1:
        raise ValueError(f"{path} holds models under {' and '.join(map(repr, prefixes))}, expected one: save it alone")
    return without_prefix(state, prefixes[0])


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


def _read_sharded(path):
    """The tensors of all files that the index at `path` names, which have to lie beside it."""
    try:
        with open(path, encoding="utf-8") as file:
            place_of = json.load(file)["weight_map"]
        shards = sorted({*place_of.values()})
        inside = all(os.path.basename(shard) == shard for shard in shards)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of safetensors files: {type(error).__name__}: {error}") from error
    if not inside:
        raise ValueError(f"{path} names {shards}, expected files beside it")
    state = {}
    for shard in shards:
        beside = os.path.join(os.path.dirname(path), shard)
        if not os.path.isfile(beside):
            raise FileNotFoundError(f"no {beside}, which {path} names")
        state |= _read_safetensors(beside)
    if absent := sorted(place_of.keys() - state.keys()):
        raise ValueError(
            f"{path} names {len(absent)} tensors that its files lack: {absent[0]} of {place_of[absent[0]]}"
        )
    return state


def _read_npz(path):
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        # bfloat16, which NumPy has not, comes as two bytes without a type.
        half = {name for name, array in arrays.items() if array.dtype == np.dtype("V2")}
        tensors = {
            name: torch.from_numpy(array.view(np.int16) if name in half else array) for name, array in arrays.items()
        }
    except Exception as error:  # of a damaged archive numpy raises OSError, EOFError, BadZipFile and more
        raise ValueError(f"{path} cannot be read as a NumPy archive of plain arrays: {_reason(error)}") from error
    return {name: tensor.view(torch.bfloat16) if name in half else tensor for name, tensor in tensors.items()}


class _Ignored:
    """Stands in for an object beside the tensors: whatever the file would make it from, it keeps and runs nothing."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


def _read_torch_file(path):
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
    """What was found wrong, in one line, of torch.load's without its advice to run what is in the file."""
    framing = ("Weights only load failed", "(1)", "(2)", "Check the documentation")
    for line in str(error).splitlines():
        line = re.split(r"\.? *(?:Please|In PyTorch)|\.$", line.split("WeightsUnpickler error:")[-1].strip())[0]
        if line and not line.startswith(framing):
            return line
    return type(error).__name__

"""Checkpoints of every library: into a model, into one that is built for them, and into another library's names."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, replace

import torch
from torch import nn

from .config import ViTConfig
from .formats import Format, State, from_timm, not_read, transformers_config
from .infer import classes_of, infer_config
from .reading import CLASSES, METADATA, UNTOLD, check_path, read_checkpoint
from .registry import create_model, model_entry
from .vision_transformer import VisionTransformer
from .weights import check_fit, load_weights


def load_checkpoint(
    model: nn.Module | str | None,
    path: str | os.PathLike,
    *,
    new_classifier: bool = False,
    grid_size: tuple[int, int] | None = None,
) -> VisionTransformer:
    """Load the weights in `path` into a VisionTransformer, cast to its dtype: all that the model has, or none at all.

    model: the model; or the name of one, which is built with the file's number of classes, if it has a classifier; or
    None, and names and shapes tell which model it is: `model.config` of what is returned has the guess, and
    `model.pretrained_cfg["architecture"]` its name if it is a known one. Activation, eps and heads leave no trace in
    tensors: they are the known model's, unless transformers' config.json beside the file, or `fastvit convert` in it,
    says them.

    path: a .safetensors file; a folder with model.safetensors, or with model.safetensors.index.json and the files it
    names; a Flax .npz of Google's; or a file of torch.save that can be read without running code. Names are those of
    timm, torchvision, transformers (ViT, DeiT, Dinov2 with and without registers, DINOv3, ViTMAE's encoder, CLIP and
    SigLIP; in memory and on disk), OpenAI's and OpenCLIP's CLIP, the original DINOv2 and 3, DeiT, DeiT III and MAE,
    vit_jax and big_vision: docs/checkpoints.md. From a training checkpoint the first of these entries is taken:
    state_dict_ema, model_ema, teacher, state_dict, model, model_state_dict; else the only one that holds a model of
    such names. A prefix that the whole model has ("module.", "_orig_mod.", "backbone.", "model.") is removed, and what
    lies outside of it is left out, as DINO's projection head is.

    A position table of another grid is resampled by the config's policy; that grid is `grid_size` (rows, columns) if
    given, else the model's own if the rows agree, else a square. So is a projection of patches of another size. RGB
    weights are summed for a model of one channel, and repeated and scaled for other numbers, as in timm. A mask_token
    that only the file has is left out; one that only the model has stays.

    new_classifier: a classifier that the file lacks or that does not fit stays the model's own. So, with it, does a
    final norm that the file has on the other side of the pool (`norm` or `fc_norm`), as in timm. Without new_classifier
    both are errors.

    Returns the model, with whatever was given. Raises ValueError for a file that cannot be read, that does not tell its
    model where none is given, and where tensors are missing, unexpected or of another shape, with all of them and the
    format if it is another library's; ValueError for an unknown name; FileNotFoundError; ImportError where safetensors
    is not installed; and TypeError for a model of another class and a path that is none.
    """
    check_path("path", path)
    if isinstance(model, nn.Module) and not isinstance(getattr(model, "config", None), ViTConfig):
        name = f"{type(model).__module__}.{type(model).__qualname__}"
        raise TypeError(f"model is a {name}, expected a fastvit.VisionTransformer")
    if model is not None and not isinstance(model, (nn.Module, str)):
        raise TypeError(f"model is {model!r}, expected a fastvit.VisionTransformer, the name of a model or None")
    entry = model_entry(model) if isinstance(model, str) else None
    state, format = read_checkpoint(path)
    if not isinstance(model, nn.Module):
        # What comes from the file, all of it, needs no random start, which takes longer than the rest.
        device = None if new_classifier else "meta"
        if entry is not None:
            model = create_model(model, num_classes=None if new_classifier else classes_of(state), device=device)
        else:
            config, names = _infer(state, format, path)
            model = VisionTransformer(config, device=device)
            model.pretrained_cfg.update({"architecture": names[0]} if names else {})
        if not new_classifier:
            model.to_empty(device=torch.get_default_device())
    load_weights(model, state, format, path, new_classifier=new_classifier, grid_size=grid_size)
    return model


def config_of_checkpoint(path: str | os.PathLike) -> tuple[ViTConfig, list[str]]:
    """The config of the model in `path`, as far as the file tells, and the names of the known models that it may be,
    the likeliest first. Raises what `load_checkpoint` does."""
    check_path("path", path)
    return _infer(*read_checkpoint(path), path)


@dataclass(frozen=True)
class Converted:
    """What `convert_checkpoint` made: the tensors under their new names, the model they are of, the names of known
    models that it may be, the likeliest first, and whose file it was."""

    state: State
    config: ViTConfig
    models: list[str]
    source: str

    def safetensors(self) -> bytes:
        """The tensors as the content of a safetensors file. Raises ImportError where safetensors is not installed."""
        return to_safetensors(self.state, self.config)

    def transformers_config(self) -> dict:
        """What config.json says beside tensors for transformers. Raises ValueError where it has no such model."""
        return transformers_config(self.config)


def to_safetensors(state: State, config: ViTConfig, classes: list[str] | None = None) -> bytes:
    """The content of a safetensors file: tensors, and what they do not tell of their model: of its config, and the
    names of its classes. Raises ImportError where safetensors is not installed."""
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError("writing .safetensors needs safetensors: pip install 'fastvit[hub]'") from error
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    said = {name: getattr(config, name) for name in UNTOLD} | ({} if classes is None else {CLASSES: classes})
    return save(tensors, {"format": "pt", METADATA: json.dumps(said)})  # transformers insists on the format


def convert_checkpoint(path: str | os.PathLike, model: str | None = None, to: str = "timm") -> Converted:
    """The tensors in `path` under the names of "timm", "torchvision" or "transformers", in the dtypes that they have.

    model: the name of a known model that they have to fit, apart from image size and classes; None to have it told by
    names and shapes. Raises what `load_checkpoint` does, and ValueError where `to` has no such model.
    """
    check_path("path", path)
    entry = None if model is None else model_entry(model)
    state, format = read_checkpoint(path)
    if entry is None:
        config, names = _infer(state, format, path)
    else:
        config, names = entry.config, [entry.name]
        with contextlib.suppress(ValueError):  # what keeps the file from telling its sizes is found below
            told, _ = infer_config(state)
            config = replace(config, img_size=told.img_size, num_classes=told.num_classes)
    if "cls_token" in state and "pos_embed" in state:  # a sum may be of more precision than what it is of
        state["cls_token"] = state["cls_token"].to(state["pos_embed"].dtype)
    fitting = {name: tensor for name, tensor in state.items() if name != "mask_token"}
    check_fit(fitting, VisionTransformer(config, device="meta").state_dict(), format, path)
    return Converted(from_timm(state, to, config), config, names, format.source)


def _infer(state: State, format: Format, path: str | os.PathLike) -> tuple[ViTConfig, list[str]]:
    try:
        return infer_config(state, format.facts)
    except ValueError as error:
        source = not_read(state)
        reason = f"does not tell which model it is of: {error}"
        reason = f"holds a checkpoint of {source}, which fastvit does not read" if source else reason
        raise ValueError(f"{os.fspath(path)} {reason}") from error

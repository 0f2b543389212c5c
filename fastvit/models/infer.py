"""Which model weights are of, told by their names and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from .config import ViTConfig
from .formats import State
from .registry import CLIP, DINOV3, MODELS

# The fields that shapes tell, besides image size, channels and classes. Activation, eps, the start of layer scale, and
# how images are prepared leave no trace.
_TOLD = ("embed_dim", "depth", "patch_size", "mlp", "qkv_bias", "class_token", "reg_tokens", "no_embed_class")
_TOLD += ("distilled", "pre_norm", "final_norm", "norm_after_pool", "rope_temperature")


def infer_config(state: State, facts: Mapping[str, object] | None = None) -> tuple[ViTConfig, list[str]]:
    """The config of the model that `state`, under timm's names, is of, and the names of the known models that it may
    be, the likeliest first: the config is that one's with the file's image size, channels and classes, and `facts`,
    fields that something else than shapes tells.

    Where none is known of these shapes, heads are those of known models of the same width, else 64 wide, and the rest
    is ViTConfig's. Raises ValueError where the tensors do not tell.
    """
    facts = dict(facts or {})
    found = _told_by_shapes(state, facts)
    if len(facts.get("mean", ())) != found.in_chans:
        facts = {name: value for name, value in facts.items() if name not in ("mean", "std")}
    if found.rope_temperature is None:
        facts.pop("img_size", None)  # a table of positions tells
        if found.mlp == "swiglu":
            facts.pop("activation", None)  # Dinov2 has SiLU in its gate, whatever transformers' config says
    fits = [name for name, entry in MODELS.items() if _shapes(entry.config) == _shapes(found)]
    counted = facts.keys() - {"img_size", "mean", "std"}

    def distance(name: str) -> tuple:
        config = MODELS[name].config
        return sum(getattr(config, field) != facts[field] for field in counted), config.img_size != found.img_size

    # Known models of these facts and this size first; among those alike, the order of the table.
    fits.sort(key=distance)
    if not fits:
        if found.rope_temperature is not None and "rope_temperature" not in facts:
            raise ValueError("there is no pos_embed, and no known model without one has these shapes")
        return replace(found, **facts), fits
    known = MODELS[fits[0]].config
    sizes = {"img_size": found.img_size if known.rope_temperature is None else known.img_size}
    sizes["num_classes"] = found.num_classes
    if found.in_chans != known.in_chans:
        sizes |= {field: getattr(found, field) for field in ("in_chans", "mean", "std")}
    return replace(known, **(sizes | facts)), fits


def classes_of(state: State) -> int:
    """How many classes the classifier in `state` has; 0 where it has none."""
    head = state.get("head.weight")
    return head.shape[0] if head is not None and head.dim() else 0


def _shapes(config: ViTConfig) -> tuple:
    hidden = int(config.embed_dim * config.mlp_ratio)
    derived = (hidden, config.init_values is not None, config.global_pool == "map")
    return *derived, *(getattr(config, field) for field in _TOLD)


def _told_by_shapes(state: State, facts: Mapping[str, object]) -> ViTConfig:
    def shape(name: str, dims: int) -> tuple[int, ...]:
        if name not in state or state[name].dim() != dims:
            what = f"{name} of shape {tuple(state[name].shape)}" if name in state else f"no {name}"
            raise ValueError(f"there is {what}, expected one of {dims} axes")
        return tuple(state[name].shape)

    embed_dim, in_chans, *patch = shape("patch_embed.proj.weight", 4)
    depth = len({found.group() for name in state if (found := re.match(r"blocks\.\d+\.", name))})
    (rows, _), (_, hidden) = shape("blocks.0.mlp.fc1.weight", 2), shape("blocks.0.mlp.fc2.weight", 2)
    registers = shape("reg_token", 3)[1] if "reg_token" in state else 0
    class_token, distilled = "cls_token" in state, "dist_token" in state
    prefix = class_token + distilled + registers
    scaled, pre_norm = "blocks.0.ls1.gamma" in state, "norm_pre.weight" in state
    # As DINOv3: registers are all that tells it where nobody says so.
    rotary = "pos_embed" not in state and scaled and class_token and (registers > 0 or "rope_temperature" in facts)
    if pre_norm and ("attn_pool.latent" in state or scaled or "norm.weight" not in state):
        raise ValueError("there is norm_pre beside what no model that is known has with it")
    side, bare = (16, False) if rotary else _side_of_table(shape("pos_embed", 3)[1], prefix, registers)
    ratio = rows / embed_dim
    if int(embed_dim * ratio) != rows:
        ratio = math.nextafter(ratio, math.inf)
    gated = rows == 2 * hidden
    fc_norm = "fc_norm.weight" in state
    pool = "token" if class_token and not fc_norm and not rotary else "avg"
    pool = "map" if "attn_pool.latent" in state else pool
    # What all that are known of a family have.
    family = DINOV3 if rotary else CLIP if pre_norm else {}
    if in_chans != 3:
        family = {name: value for name, value in family.items() if name not in ("mean", "std")}
    known = {entry.config.embed_dim: entry.config.num_heads for entry in reversed(MODELS.values())}
    heads = facts.get("num_heads") or known.get(embed_dim)
    if heads is None and embed_dim % 64:
        raise ValueError(f"embed_dim is {embed_dim}, which does not tell how many heads there are")
    told = {
        "img_size": (side * patch[0], side * patch[1]),
        "patch_size": tuple(patch),
        "in_chans": in_chans,
        "num_classes": classes_of(state),
        "global_pool": pool,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": heads or embed_dim // 64,
        "mlp_ratio": ratio,
        "mlp": "swiglu" if gated else "mlp",
        "activation": "silu" if gated else "gelu",
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "init_values": 1e-5 if scaled else None,
        "class_token": class_token,
        "reg_tokens": registers,
        "no_embed_class": bare and prefix > 0,
        "distilled": distilled,
        "pre_norm": pre_norm,
        "final_norm": fc_norm or "norm.weight" in state,
        "fc_norm": fc_norm,
    }
    return ViTConfig(**(family | told))


def _side_of_table(rows: int, prefix: int, registers: int) -> tuple[int, bool]:
    """How many patches a square image has on a side, by the rows of its position table, and whether none of these are
    for the prefix."""
    # Squares of patches that come with positions for the prefix, or without.
    sides = {bare: math.isqrt(max(rows - (0 if bare else prefix), 0)) for bare in (False, True)}
    squares = [bare for bare, side in sides.items() if side and side**2 + (0 if bare else prefix) == rows]
    if not squares:
        raise ValueError(f"pos_embed has {rows} rows, which are no square of patches with or without {prefix}")
    bare = squares[-1] if registers else squares[0]
    return sides[bare], bare

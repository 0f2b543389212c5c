"""Which model weights are of, told by their names and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from .config import ViTConfig
from .formats import State
from .registry import MODELS

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
    facts = facts or {}
    found = _told_by_shapes(state, facts.get("num_heads"))
    told = {
        name: value
        for name, value in facts.items()
        if not (name in ("mean", "std") and len(value) != found.in_chans)
        and not (name == "activation" and found.mlp == "swiglu")
        and not (name == "img_size" and found.rope_temperature is None)  # a table of positions tells, and holds
    }
    fits = [name for name, entry in MODELS.items() if _facts(entry.config) == _facts(found)]

    def unlike(name: str) -> tuple:
        config = MODELS[name].config
        unlike = sum(getattr(config, field) != value for field, value in told.items() if field != "img_size")
        return unlike, config.img_size != found.img_size

    # Known models of these facts and this size first; among those alike, the order of the table.
    fits.sort(key=unlike)
    if not fits:
        return replace(found, **told), fits
    known = MODELS[fits[0]].config
    sizes = {"img_size": found.img_size if known.rope_temperature is None else known.img_size}
    sizes["num_classes"] = found.num_classes
    if found.in_chans != known.in_chans:
        sizes |= {field: getattr(found, field) for field in ("in_chans", "mean", "std")}
    return replace(known, **(sizes | told)), fits


def classes_of(state: State) -> int:
    """How many classes the classifier in `state` has; 0 where it has none."""
    head = state.get("head.weight")
    return head.shape[0] if head is not None and head.dim() else 0


def _facts(config: ViTConfig) -> tuple:
    hidden = int(config.embed_dim * config.mlp_ratio)
    derived = (hidden, config.init_values is not None, config.global_pool == "map")
    return *derived, *(getattr(config, field) for field in _TOLD)


def _told_by_shapes(state: State, heads: int | None) -> ViTConfig:
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
    rotary = "pos_embed" not in state and "blocks.0.ls1.gamma" in state and registers > 0  # as DINOv3
    side, bare = (16, False) if rotary else _side_of_table(shape("pos_embed", 3)[1], prefix, registers)
    ratio = rows / embed_dim
    if int(embed_dim * ratio) != rows:
        ratio = math.nextafter(ratio, math.inf)
    gated = rows == 2 * hidden
    fc_norm = "fc_norm.weight" in state
    heads = heads or {e.config.embed_dim: e.config.num_heads for e in reversed(MODELS.values())}.get(embed_dim)
    if heads is None and embed_dim % 64:
        raise ValueError(f"embed_dim is {embed_dim}, which does not tell how many heads there are")
    return ViTConfig(
        img_size=(side * patch[0], side * patch[1]),
        patch_size=tuple(patch),
        in_chans=in_chans,
        num_classes=classes_of(state),
        global_pool="map" if "attn_pool.latent" in state else "token" if class_token and not fc_norm else "avg",
        embed_dim=embed_dim,
        depth=depth,
        num_heads=heads or embed_dim // 64,
        mlp_ratio=ratio,
        mlp="swiglu" if gated else "mlp",
        activation="silu" if gated else "gelu",
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        init_values=1e-5 if "blocks.0.ls1.gamma" in state else None,
        norm_eps=1e-5 if rotary or "norm_pre.weight" in state else 1e-6,  # as all of CLIP and DINOv3 have it
        class_token=class_token,
        reg_tokens=registers,
        no_embed_class=bare and prefix > 0,
        distilled=distilled,
        rope_temperature=100.0 if rotary else None,
        dynamic_img_size=rotary,
        pre_norm="norm_pre.weight" in state,
        final_norm=fc_norm or "norm.weight" in state,
        fc_norm=fc_norm,
    )


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

"""The known models: a table, and the functions that list and build them.

Names, sizes, input statistics and weights are those of timm's model of the same name at its default tag.
"""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass, fields, replace

from .config import ViTConfig
from .vision_transformer import VisionTransformer
from .weights import fetch_pretrained, load_checkpoint

_SIZES = {  # arXiv 2010.11929 (B, L, H), 2012.12877 (Ti, S), 2304.07193 (g)
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    # fc1 holds gate and value, each 2/3 of 4 * embed_dim rounded up to a multiple of 8.
    "giant": {
        **{"embed_dim": 1536, "depth": 40, "num_heads": 24},
        **{"mlp": "swiglu", "activation": "silu", "mlp_ratio": 2.66667 * 2},
    },
}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HEADLESS = {"num_classes": 0}
_DINOV2 = {**_IMAGENET, **_HEADLESS, "init_values": 1e-5, "crop_pct": 1.0}
_REGISTERS = {**_DINOV2, "reg_tokens": 4, "no_embed_class": True}
_FAMILIES = {
    "vit_{size}_patch{patch}_{img}": {},
    "deit_{size}_patch{patch}_{img}": _IMAGENET,
    "deit_{size}_distilled_patch{patch}_{img}": {**_IMAGENET, "distilled": True},
    "vit_{size}_patch{patch}_dinov2": _DINOV2,
    "vit_{size}_patch{patch}_reg4_dinov2": _REGISTERS,
}
_VIT, _DEIT, _DEIT_DISTILLED, _DINO2, _DINO2_REG = _FAMILIES

_AUGREG = "augreg_in21k_ft_in1k"
_TABLE = (  # family, size, patch, img, tag of timm's default weights (None: there are none), and what differs
    (_VIT, "tiny", 16, 224, _AUGREG, {}),
    (_VIT, "tiny", 16, 384, _AUGREG, {}),
    (_VIT, "small", 8, 224, "dino", {**_IMAGENET, **_HEADLESS}),
    (_VIT, "small", 16, 224, _AUGREG, {}),
    (_VIT, "small", 16, 384, _AUGREG, {}),
    (_VIT, "small", 32, 224, _AUGREG, {}),
    (_VIT, "small", 32, 384, _AUGREG, {}),
    (_VIT, "base", 8, 224, "augreg2_in21k_ft_in1k", {}),
    (_VIT, "base", 16, 224, "augreg2_in21k_ft_in1k", {}),
    (_VIT, "base", 16, 384, _AUGREG, {}),
    (_VIT, "base", 32, 224, _AUGREG, {}),
    (_VIT, "base", 32, 384, _AUGREG, {}),
    (_VIT, "large", 14, 224, None, {}),
    (_VIT, "large", 16, 224, _AUGREG, {}),
    (_VIT, "large", 16, 384, _AUGREG, {}),
    (_VIT, "large", 32, 224, "orig_in21k", _HEADLESS),
    (_VIT, "large", 32, 384, "orig_in21k_ft_in1k", {}),
    (_VIT, "huge", 14, 224, "orig_in21k", _HEADLESS),
    (_DEIT, "tiny", 16, 224, "fb_in1k", {}),
    (_DEIT, "small", 16, 224, "fb_in1k", {}),
    (_DEIT, "base", 16, 224, "fb_in1k", {}),
    (_DEIT, "base", 16, 384, "fb_in1k", {}),
    (_DEIT_DISTILLED, "tiny", 16, 224, "fb_in1k", {}),
    (_DEIT_DISTILLED, "small", 16, 224, "fb_in1k", {}),
    (_DEIT_DISTILLED, "base", 16, 224, "fb_in1k", {}),
    (_DEIT_DISTILLED, "base", 16, 384, "fb_in1k", {}),
    (_DINO2, "small", 14, 518, "lvd142m", {}),
    (_DINO2, "base", 14, 518, "lvd142m", {}),
    (_DINO2, "large", 14, 518, "lvd142m", {}),
    (_DINO2, "giant", 14, 518, "lvd142m", {}),
    (_DINO2_REG, "small", 14, 518, "lvd142m", {}),
    (_DINO2_REG, "base", 14, 518, "lvd142m", {}),
    (_DINO2_REG, "large", 14, 518, "lvd142m", {}),
    (_DINO2_REG, "giant", 14, 518, "lvd142m", {}),
)


@dataclass(frozen=True)
class ModelEntry:
    """One known model: its configuration, and the hub repository of its weights or None where there are none."""

    config: ViTConfig
    hub_id: str | None


def _entry(family, size, patch, img, tag, differs) -> tuple[str, ModelEntry]:
    name = family.format(size=size, patch=patch, img=img)
    crop = {"crop_pct": 1.0} if img == 384 else {}
    config = ViTConfig(**{"img_size": img, "patch_size": patch, **_SIZES[size], **_FAMILIES[family], **crop, **differs})
    return name, ModelEntry(config, f"timm/{name}.{tag}" if tag else None)


MODELS: dict[str, ModelEntry] = dict(_entry(*row) for row in _TABLE)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the known models that match a shell pattern ("vit_*_384"), sorted."""
    return sorted(fnmatch.filter(MODELS, pattern))


def model_entry(name: str) -> ModelEntry:
    """The table's entry of `name`. Raises ValueError with the nearest names for an unknown one."""
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "fastvit.list_models() has them all"
        raise ValueError(f"unknown model {name!r}; {hint}")
    return MODELS[name]


def create_model(name: str, pretrained: bool = False, checkpoint=None, **overrides) -> VisionTransformer:
    """Build the known model `name`, with any field of ViTConfig overridden, on the default device and in its dtype.

    pretrained: load timm's default weights of that name from the Hugging Face hub (or its local cache); checkpoint:
    load a .safetensors or .pth file instead. The position table is resampled where img_size asks for another grid. A
    classifier of another width is left at its random start if num_classes is overridden, and is an error if not.

    Raises ValueError for an unknown name (with the nearest ones), for a field's bad value, where the name has no
    weights, and for a checkpoint that does not fit; TypeError for an unknown field; and what `fetch_pretrained` does.
    """
    entry = model_entry(name)
    known = [field.name for field in fields(ViTConfig)]
    unknown = [field for field in overrides if field not in known]
    if unknown:
        raise TypeError(f"create_model got unknown {', '.join(unknown)}; the fields are {', '.join(known)}")
    if pretrained and checkpoint is not None:
        raise ValueError("pretrained=True came together with checkpoint, expected only one of them")
    if pretrained and entry.hub_id is None:
        raise ValueError(f"pretrained is True, but there are no weights of {name}")
    config = replace(entry.config, **overrides)
    if pretrained:
        checkpoint = fetch_pretrained(entry.hub_id)
    model = VisionTransformer(config)
    if checkpoint is not None:
        # Only of the hub's own files is it known which grid their position table has.
        grid_size = entry.config.grid_size if pretrained else None
        load_checkpoint(model, checkpoint, new_classifier="num_classes" in overrides, grid_size=grid_size)
    return model

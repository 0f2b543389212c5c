"""The known models: a table, and the functions that list and build them.

Names, sizes, input statistics and weights are those of timm's model of the same name at its default tag.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from fastvit.nn.block import block_indices

from .backbone import FeatureGetterNet
from .config import IMAGENET, OPENAI, ViTConfig
from .reading import check_path, read_checkpoint
from .vision_transformer import VisionTransformer
from .weights import fetch_pretrained, load_weights

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_GATED = {"mlp": "swiglu", "activation": "silu"}
_SIZES = {  # arXiv 2010.11929 (B, L, H), 2012.12877 (Ti, S), 2204.07118 (M), 2304.07193 (g)
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "medium": {"embed_dim": 512, "depth": 12, "num_heads": 8},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    # fc1 holds gate and value, each 2/3 of 4 * embed_dim rounded up to a multiple of 8.
    "giant": {"embed_dim": 1536, "depth": 40, "num_heads": 24, **_GATED, "mlp_ratio": 2.66667 * 2},
    # Of CLIP and SigLIP alone; the first word is what the name says (arXiv 2106.04560, 2305.13035, 2502.14786).
    "base plus": {"embed_dim": 896, "depth": 12, "num_heads": 14},
    "giant plain": {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11},
    "gigantic": {"embed_dim": 1664, "depth": 48, "num_heads": 16, "mlp_ratio": 64 / 13},
    "so400m": {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362},
    "giantopt": {"embed_dim": 1536, "depth": 40, "num_heads": 16},
    # Of DINOv3 alone (arXiv 2508.10104): fc1 holds gate and value.
    "small_plus": {"embed_dim": 384, "depth": 12, "num_heads": 6, **_GATED, "mlp_ratio": 8.0},
    "huge_plus": {"embed_dim": 1280, "depth": 32, "num_heads": 20, **_GATED, "mlp_ratio": 8.0},
    "7b": {"embed_dim": 4096, "depth": 40, "num_heads": 32, **_GATED, "mlp_ratio": 4.0},
}
_HEADLESS = {"num_classes": 0}
_DINOV2 = {**IMAGENET, **_HEADLESS, "init_values": 1e-5, "crop_pct": 1.0}
_REGISTERS = {**_DINOV2, "reg_tokens": 4, "no_embed_class": True}
CLIP = {**OPENAI, "pre_norm": True, "norm_eps": 1e-5}
DINOV3 = {
    **{**IMAGENET, **_HEADLESS, "init_values": 1e-5, "reg_tokens": 4, "norm_eps": 1e-5, "crop_pct": 1.0},
    **{"rope_temperature": 100.0, "dynamic_img_size": True, "global_pool": "avg", "fc_norm": False},
}
_FAMILIES = {
    "vit_{size}_patch{patch}_{img}": {},
    "deit_{size}_patch{patch}_{img}": IMAGENET,
    "deit_{size}_distilled_patch{patch}_{img}": {**IMAGENET, "distilled": True},
    "deit3_{size}_patch{patch}_{img}": {**IMAGENET, "no_embed_class": True, "init_values": 1e-6},
    "vit_{size}_patch{patch}_dinov2": _DINOV2,
    "vit_{size}_patch{patch}_reg4_dinov2": _REGISTERS,
    "vit_{size}_patch{patch}_clip_{img}": CLIP,
    "vit_{size}_patch{patch}_plus_clip_{img}": CLIP,
    "vit_{size}_patch{patch}_clip_quickgelu_{img}": {**CLIP, "activation": "quick_gelu"},
    "vit_{size}_patch{patch}_siglip_{img}": {**_HEADLESS, "class_token": False, "global_pool": "map", "crop_pct": 0.9},
    "vit_{size}_patch{patch}_dinov3": {**DINOV3, "qkv_bias": False},
    "vit_{size}_patch{patch}_dinov3_qkvb": DINOV3,
}
_VIT, _DEIT, _DEIT_DISTILLED, _DEIT3, _DINO2, _DINO2_REG = list(_FAMILIES)[:6]
_CLIP, _CLIP_PLUS, _CLIP_QUICK, _SIGLIP, _DINO3, _DINO3_BIAS = list(_FAMILIES)[6:]

_AUGREG = "augreg_in21k_ft_in1k"
_UNTRAINED = "untrained"  # timm's tag where there are no weights
_LAION_FT = "laion2b_ft_in12k_in1k"
# CLIP's own classifier is the projection to what it shares with text; none of these crops.
_PROJECTED = {width: {"num_classes": width, "crop_pct": 1.0} for width in (512, 640, 768, 1024, 1280)}
_LAION_L = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0}
_SQUASHED = {"crop_pct": 1.0, "crop_mode": "squash"}
_WEBLI = "v2_webli"
_TANH = {"activation": "gelu_tanh"}
_TABLE = (  # family, size, patch, img, timm's default tag, and what differs
    (_VIT, "tiny", 16, 224, _AUGREG, {}),
    (_VIT, "tiny", 16, 384, _AUGREG, {}),
    (_VIT, "small", 8, 224, "dino", {**IMAGENET, **_HEADLESS}),
    (_VIT, "small", 16, 224, _AUGREG, {}),
    (_VIT, "small", 16, 384, _AUGREG, {}),
    (_VIT, "small", 32, 224, _AUGREG, {}),
    (_VIT, "small", 32, 384, _AUGREG, {}),
    (_VIT, "base", 8, 224, "augreg2_in21k_ft_in1k", {}),
    (_VIT, "base", 16, 224, "augreg2_in21k_ft_in1k", {}),
    (_VIT, "base", 16, 384, _AUGREG, {}),
    (_VIT, "base", 32, 224, _AUGREG, {}),
    (_VIT, "base", 32, 384, _AUGREG, {}),
    (_VIT, "large", 14, 224, _UNTRAINED, {}),
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
    (_DEIT3, "small", 16, 224, "fb_in1k", {}),
    (_DEIT3, "small", 16, 384, "fb_in1k", {}),
    (_DEIT3, "medium", 16, 224, "fb_in1k", {}),
    (_DEIT3, "base", 16, 224, "fb_in1k", {}),
    (_DEIT3, "base", 16, 384, "fb_in1k", {}),
    (_DEIT3, "large", 16, 224, "fb_in1k", {}),
    (_DEIT3, "large", 16, 384, "fb_in1k", {}),
    (_DEIT3, "huge", 14, 224, "fb_in1k", {}),
    (_DINO2, "small", 14, 518, "lvd142m", {}),
    (_DINO2, "base", 14, 518, "lvd142m", {}),
    (_DINO2, "large", 14, 518, "lvd142m", {}),
    (_DINO2, "giant", 14, 518, "lvd142m", {}),
    (_DINO2_REG, "small", 14, 518, "lvd142m", {}),
    (_DINO2_REG, "base", 14, 518, "lvd142m", {}),
    (_DINO2_REG, "large", 14, 518, "lvd142m", {}),
    (_DINO2_REG, "giant", 14, 518, "lvd142m", {}),
    (_CLIP, "base", 32, 224, _LAION_FT, {}),
    (_CLIP, "base", 32, 256, "datacompxl", _PROJECTED[512]),
    (_CLIP, "base", 32, 384, _LAION_FT, {}),
    (_CLIP, "base", 32, 448, _LAION_FT, {"crop_pct": 1.0}),
    (_CLIP, "base", 16, 224, _LAION_FT, {"crop_pct": 0.95}),
    (_CLIP, "base", 16, 384, _LAION_FT, _SQUASHED),
    (_CLIP_PLUS, "base plus", 16, 240, "laion400m_e32", _PROJECTED[640]),
    (_CLIP, "large", 14, 224, _LAION_FT, _LAION_L),
    (_CLIP, "large", 14, 336, _LAION_FT, {**_LAION_L, **_SQUASHED}),
    (_CLIP, "huge", 14, 224, _LAION_FT, {"crop_pct": 1.0}),
    (_CLIP, "huge", 14, 336, _LAION_FT, _SQUASHED),
    (_CLIP, "huge", 14, 378, "dfn5b", _PROJECTED[1024]),
    (_CLIP, "giant plain", 14, 224, "laion2b", _PROJECTED[1024]),
    (_CLIP, "gigantic", 14, 224, "laion2b", _PROJECTED[1280]),
    (_CLIP, "gigantic", 14, 378, "metaclip2_worldwide", {**_PROJECTED[1280], **_SQUASHED}),
    (_CLIP_QUICK, "base", 32, 224, "laion400m_e32", {"num_classes": 512}),
    (_CLIP_QUICK, "base", 16, 224, "metaclip_2pt5b", _PROJECTED[512]),
    (_CLIP_QUICK, "large", 14, 224, "dfn2b", _PROJECTED[768]),
    (_CLIP_QUICK, "large", 14, 336, "openai", _PROJECTED[768]),
    (_CLIP_QUICK, "huge", 14, 224, "dfn5b", _PROJECTED[1024]),
    (_CLIP_QUICK, "huge", 14, 378, "dfn5b", _PROJECTED[1024]),
    (_CLIP_QUICK, "gigantic", 14, 224, "metaclip_2pt5b", _PROJECTED[1280]),
    (_SIGLIP, "base", 32, 256, _WEBLI, _TANH),
    (_SIGLIP, "base", 16, 224, _WEBLI, {}),
    (_SIGLIP, "base", 16, 256, _WEBLI, {}),
    (_SIGLIP, "base", 16, 384, _WEBLI, {}),
    (_SIGLIP, "base", 16, 512, _WEBLI, {}),
    (_SIGLIP, "large", 16, 256, _WEBLI, {}),
    (_SIGLIP, "large", 16, 384, _WEBLI, {}),
    (_SIGLIP, "large", 16, 512, _WEBLI, _TANH),
    (_SIGLIP, "so400m", 14, 224, _WEBLI, {}),
    (_SIGLIP, "so400m", 14, 378, _WEBLI, {}),
    (_SIGLIP, "so400m", 16, 256, _WEBLI, _TANH),
    (_SIGLIP, "so400m", 16, 384, _WEBLI, _TANH),
    (_SIGLIP, "so400m", 16, 512, _WEBLI, _TANH),
    (_SIGLIP, "giantopt", 16, 256, _WEBLI, _TANH),
    (_SIGLIP, "giantopt", 16, 384, _WEBLI, _TANH),
    (_DINO3_BIAS, "tiny", 16, 256, "eupe_lvd1689m", {}),
    (_DINO3, "small", 16, 256, "lvd1689m", {}),
    (_DINO3_BIAS, "small", 16, 256, "lvd1689m", {}),
    (_DINO3, "small_plus", 16, 256, "lvd1689m", {}),
    (_DINO3_BIAS, "small_plus", 16, 256, "lvd1689m", {}),
    (_DINO3, "base", 16, 256, "lvd1689m", {}),
    (_DINO3_BIAS, "base", 16, 256, "lvd1689m", {}),
    (_DINO3, "large", 16, 256, "lvd1689m", {}),
    (_DINO3_BIAS, "large", 16, 256, "lvd1689m", {}),
    (_DINO3, "huge_plus", 16, 256, "lvd1689m", {}),
    (_DINO3_BIAS, "huge_plus", 16, 256, "lvd1689m", {}),
    (_DINO3, "7b", 16, 256, "lvd1689m", {}),
)


def _tagged(*tags: str, **differs) -> dict[str, dict]:
    return dict.fromkeys(tags, differs)


# timm's other tags of these names, and what differs from the default tag's.
_IN21K = {"num_classes": 21843}
_SATELLITE = {"mean": (0.430, 0.411, 0.296), "std": (0.213, 0.156, 0.143)}
_METACLIP = ("metaclip_2pt5b", "metaclip_400m")
_SELF_SUPERVISED = {**IMAGENET, **_HEADLESS}
_OTHER_TAGS = {
    "vit_tiny_patch16_224": {"augreg_in21k": _IN21K},
    "vit_small_patch16_224": {"augreg_in1k": {}, "augreg_in21k": _IN21K, "dino": _SELF_SUPERVISED},
    "vit_small_patch16_384": {"augreg_in1k": {}},
    "vit_small_patch32_224": {"augreg_in21k": _IN21K},
    "vit_base_patch8_224": {"augreg_in21k_ft_in1k": {}, "augreg_in21k": _IN21K, "dino": _SELF_SUPERVISED},
    "vit_base_patch16_224": {
        **{"augreg_in21k_ft_in1k": {}, "orig_in21k_ft_in1k": {}, "augreg_in1k": {}, "sam_in1k": {}},
        **{"orig_in21k": _HEADLESS, "augreg_in21k": _IN21K, "dino": _SELF_SUPERVISED, "mae": _SELF_SUPERVISED},
        "bamboo": {**OPENAI, "num_classes": 115217, "crop_pct": 1.0},
    },
    "vit_base_patch16_384": {"orig_in21k_ft_in1k": {}, "augreg_in1k": {}},
    "vit_base_patch32_224": {"augreg_in1k": {}, "sam_in1k": {}, "orig_in21k": _HEADLESS, "augreg_in21k": _IN21K},
    "vit_base_patch32_384": {"augreg_in1k": {}},
    "vit_large_patch16_224": {"orig_in21k": _HEADLESS, "augreg_in21k": _IN21K, "mae": _SELF_SUPERVISED},
    "vit_huge_patch14_224": {_UNTRAINED: {"num_classes": 1000}, "mae": _SELF_SUPERVISED},
    **{
        f"deit3_{size}": {"fb_in22k_ft_in1k": {"crop_pct": 1.0}}
        for size in (
            *("small_patch16_224", "small_patch16_384", "medium_patch16_224", "base_patch16_224"),
            *("base_patch16_384", "large_patch16_224", "large_patch16_384", "huge_patch14_224"),
        )
    },
    "vit_base_patch32_clip_224": {
        **_tagged("laion2b_ft_in1k", "openai_ft_in1k"),
        **_tagged("laion2b", "laion400m_e32", "openai", num_classes=512),
        **_tagged("datacompxl", *_METACLIP, **_PROJECTED[512]),
    },
    "vit_base_patch32_clip_384": _tagged("openai_ft_in12k_in1k", crop_pct=0.95, crop_mode="squash"),
    "vit_base_patch16_clip_224": {
        **_tagged("openai_ft_in12k_in1k"),
        **_tagged("laion2b_ft_in1k", crop_pct=1.0),
        **_tagged("openai_ft_in1k", crop_pct=0.9),
        **_tagged("laion2b_ft_in12k", "openai_ft_in12k", num_classes=11821, crop_pct=0.9),
        **_tagged("laion2b", "laion400m_e32", "datacompxl", "dfn2b", *_METACLIP, **_PROJECTED[512]),
        **_tagged("openai", num_classes=512, crop_pct=0.9),
    },
    "vit_base_patch16_clip_384": {
        **_tagged("openai_ft_in12k_in1k", crop_pct=0.95),
        **_tagged("laion2b_ft_in1k", "openai_ft_in1k"),
    },
    "vit_large_patch14_clip_224": {
        **_tagged("laion2b_ft_in1k"),
        **_tagged("laion2b_ft_in12k", num_classes=11821),
        **_tagged("laion2b", num_classes=768),
        **_tagged("openai_ft_in12k_in1k", "openai_ft_in1k", **OPENAI),
        **_tagged("openai_ft_in12k", **OPENAI, num_classes=11821),
        **_tagged(*_METACLIP, "laion400m_e32", "datacompxl", "dfn2b_s39b", "dfn2b", **OPENAI, num_classes=768),
        **_tagged("openai", "apple_mclip2_dfndr2b", **OPENAI, num_classes=768),
    },
    "vit_large_patch14_clip_336": {
        **_tagged("openai_ft_in12k_in1k", **OPENAI),
        **_tagged("laion2b_ft_in1k"),
        **_tagged("openai", **OPENAI, num_classes=768, crop_mode="center"),
    },
    "vit_huge_patch14_clip_224": {
        **_tagged("laion2b_ft_in1k"),
        **_tagged("laion2b_ft_in12k", num_classes=11821),
        **_tagged("laion2b", "dfn5b", "metaclip2_worldwide", "metaclip_2pt5b", "metaclip_altogether", num_classes=1024),
    },
    "vit_huge_patch14_clip_378": _tagged("metaclip2_worldwide", crop_mode="squash"),
    "vit_gigantic_patch14_clip_224": _tagged("metaclip2_worldwide", "metaclip_2pt5b"),
    "vit_base_patch32_clip_quickgelu_224": {**_tagged("openai"), **_tagged(*_METACLIP, crop_pct=1.0)},
    "vit_base_patch16_clip_quickgelu_224": {**_tagged("metaclip_400m"), **_tagged("openai", crop_pct=0.9)},
    "vit_large_patch14_clip_quickgelu_224": _tagged(*_METACLIP, "openai"),
    "vit_huge_patch14_clip_quickgelu_224": _tagged("metaclip2_worldwide", "metaclip_2pt5b"),
    **{
        f"vit_{size}_siglip_{img}": _tagged("webli")
        for size, img in (
            *(("base_patch16", 224), ("base_patch16", 384), ("base_patch16", 512), ("large_patch16", 256)),
            *(("large_patch16", 384), ("so400m_patch14", 224)),
        )
    },
    "vit_base_patch16_siglip_256": _tagged("webli", "webli_i18n"),
    "vit_so400m_patch14_siglip_378": {
        **_tagged("webli"),
        **_tagged("webli_ft_in1k", num_classes=1000, crop_pct=1.0, crop_mode="squash"),
    },
    "vit_so400m_patch16_siglip_256": _tagged("webli_i18n"),
    "vit_small_patch16_dinov3_qkvb": _tagged("eupe_lvd1689m"),
    "vit_base_patch16_dinov3_qkvb": _tagged("eupe_lvd1689m"),
    **{f"vit_{size}_patch16_dinov3": _tagged("sat493m", **_SATELLITE) for size in ("large", "7b")},
    "vit_large_patch16_dinov3_qkvb": _tagged("sat493m", **_SATELLITE),
}


@dataclass(frozen=True)
class ModelEntry:
    """One known model: its name, its configuration, and the tag of timm's weights that are meant."""

    name: str
    config: ViTConfig
    tag: str

    @property
    def hub_id(self) -> str | None:
        """The hub repository of the weights, or None where there are none."""
        # OpenAI's activation makes another model of the same weights.
        return None if self.tag == _UNTRAINED else f"timm/{self.name.replace('_quickgelu', '')}.{self.tag}"


def _entry(family, size, patch, img, tag, differs) -> ModelEntry:
    crop = {"crop_pct": 1.0} if img == 384 else {}
    config = ViTConfig(**{"img_size": img, "patch_size": patch, **_SIZES[size], **crop, **_FAMILIES[family], **differs})
    return ModelEntry(family.format(size=size.split()[0], patch=patch, img=img), config, tag)


MODELS: dict[str, ModelEntry] = {entry.name: entry for entry in (_entry(*row) for row in _TABLE)}


def list_models(
    filter: str | Sequence[str] = "*", exclude_filters: str | Sequence[str] = (), *, weights: bool = False
) -> list[str] | dict[str, dict[str, str]]:
    """Names of the known models, sorted: those that match a shell pattern ("vit_*_384") or any of a list of them, less
    those that match one of exclude_filters. weights: a dict of them, with the tags that each has weights of, the
    default one first, and the repositories on the Hugging Face hub. Raises TypeError for anything else."""
    chosen, excluded = _matching("filter", filter), _matching("exclude_filters", exclude_filters)
    names = sorted(chosen - excluded)
    return {name: _weights(name) for name in names} if weights else names


def _weights(name: str) -> dict[str, str]:
    tags = [MODELS[name].tag, *_OTHER_TAGS.get(name, {})]
    ids = {tag: ModelEntry(name, MODELS[name].config, tag).hub_id for tag in tags}
    return {tag: hub_id for tag, hub_id in ids.items() if hub_id is not None}


def _matching(name: str, patterns: str | Sequence[str]) -> set[str]:
    several = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(several, (list, tuple, set)) or not all(isinstance(pattern, str) for pattern in several):
        raise TypeError(f"{name} is {patterns!r}, expected a shell pattern or a list of them")
    return {model for pattern in several for model in fnmatch.filter(MODELS, pattern)}


def model_entry(name: str) -> ModelEntry:
    """The table's entry of `name`, which may end in "." and one of timm's tags; without, the default one is meant.

    Raises TypeError for what is no string, and ValueError for an unknown name, with the nearest ones, or tag.
    """
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}, expected the name of a model, as fastvit.list_models() has them")
    known, _, tag = name.partition(".")
    if known not in MODELS:
        near = difflib.get_close_matches(known, MODELS, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(f"unknown model {name!r}; {hint}fastvit.list_models() has them all")
    entry, others = MODELS[known], _OTHER_TAGS.get(known, {})
    if tag in ("", entry.tag):
        return entry
    if tag not in others:
        tags = ", ".join([entry.tag, *others])
        raise ValueError(f"name is {name!r}, expected no tag of {known} or one of {tags}; checkpoint loads any file")
    return ModelEntry(known, replace(entry.config, **others[tag]), tag)


def create_model(
    name: str,
    pretrained: bool = False,
    checkpoint: str | os.PathLike | None = None,
    *,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides,
) -> VisionTransformer | FeatureGetterNet:
    """Build the known model `name`, with any field of ViTConfig overridden, on `device` and in `dtype`.

    name: one of `list_models()`; one of timm's tags may follow it ("vit_base_patch16_224.augreg_in21k"), else its
    default one is meant. pretrained: load timm's weights of that name and tag from the Hugging Face hub (or its local
    cache); checkpoint: load a file instead, of any format that `load_checkpoint` reads. The position table is resampled
    where img_size asks for another grid. A classifier of another width is left at its random start if num_classes is
    overridden, and is an error if not.

    features_only: a `FeatureGetterNet` over the blocks `out_indices`, the last n for an int, 3 for None. device and
    dtype default to torch's. An override of None leaves the field as it is. Where in_chans differs from the table's,
    mean and std are, unless given, the average over the table's channels in each, as in timm's scripts.

    Raises ValueError for an unknown name (with the nearest ones), for a field's bad value, where the name has no
    weights, and for a checkpoint that does not fit; TypeError for an unknown field (with the nearest one) and an
    argument of another type; and what `fetch_pretrained` does.
    """
    entry = model_entry(name)
    overrides = {field: value for field, value in overrides.items() if value is not None}
    known = [field.name for field in fields(ViTConfig)]
    for field in overrides:
        if field not in known:
            near = difflib.get_close_matches(field, [*inspect.signature(create_model).parameters, *known], n=1)
            hint = f"did you mean {near[0]}?" if near else "the fields are those of fastvit.ViTConfig"
            raise TypeError(f"create_model got unknown {field}; {hint}")
    for option, value in (("pretrained", pretrained), ("features_only", features_only)):
        if not isinstance(value, bool):
            raise TypeError(f"{option} is {value!r}, expected a bool")
    if checkpoint is not None:
        check_path("checkpoint", checkpoint)
    if out_indices is not None and not features_only:
        raise ValueError(f"out_indices is {out_indices}, but features_only is False; expected both or neither")
    if pretrained and checkpoint is not None:
        raise ValueError("pretrained=True came together with checkpoint, expected only one of them")
    if pretrained and entry.hub_id is None:
        raise ValueError(f"pretrained is True, but there are no weights of {name}")
    if dtype is not None and dtype not in _DTYPES:
        raise TypeError(f"dtype is {dtype!r}, expected a floating-point torch.dtype of 16 to 64 bits")

    config = replace(_for_channels(entry.config, overrides.get("in_chans")), **overrides)
    if features_only:
        out_indices = block_indices(3 if out_indices is None else out_indices, config.depth, "out_indices")
    if pretrained:
        checkpoint = fetch_pretrained(entry.hub_id)
    model = VisionTransformer(config, device=device, dtype=dtype)
    model.pretrained_cfg.update(architecture=entry.name, tag=entry.tag)
    if entry.hub_id is not None:
        model.pretrained_cfg.update(hf_hub_id=entry.hub_id)
    if checkpoint is not None:
        # Only of the hub's own files is it known which grid their position table has.
        grid_size = entry.config.grid_size if pretrained else None
        new_classifier = features_only or "num_classes" in overrides
        found = read_checkpoint(checkpoint)
        load_weights(model, *found, checkpoint, new_classifier=new_classifier, grid_size=grid_size)
    return FeatureGetterNet(model, out_indices) if features_only else model


def _for_channels(config: ViTConfig, in_chans: int | None) -> ViTConfig:
    """`config` for in_chans channels; mean and std, where their number differs, averaged over the channels."""
    if not isinstance(in_chans, int) or in_chans == config.in_chans:
        return config
    mean, std = ((sum(values) / config.in_chans,) * in_chans for values in (config.mean, config.std))
    return replace(config, in_chans=in_chans, mean=mean, std=std)

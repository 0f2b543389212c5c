"""What a Vision Transformer is made of: one frozen dataclass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastvit.nn.layers import ACTIVATION_LAYERS, is_integer, is_number
from fastvit.nn.mlp import Mlp, SwiGLU
from fastvit.nn.patch_embed import to_pair

POOLS = ("", "token", "avg", "avgmax", "max", "map")
AVERAGING_POOLS = ("avg", "avgmax", "max")
MLPS = {"mlp": Mlp, "swiglu": SwiGLU}
# How a position table is brought to another grid; see `fastvit.models.weights.resample_position_table`.
POS_RESAMPLING = ("antialias", "bicubic", "dinov2")
# Pillow's filters, by timm's names.
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
# timm's names: with the proportions of the image, or without.
CROP_MODES = ("center", "squash")
# How images were normalised that CLIP was trained on, and most other models but Google's.
OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_FLAGS = ("qkv_bias", "class_token", "no_embed_class", "distilled", "pre_norm", "final_norm")
_FLAGS += ("dynamic_img_size", "dynamic_img_pad", "mask_token")
_RATES = ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")


@dataclass(frozen=True)
class ViTConfig:
    """A Vision Transformer's shape, regularisation and input. Field names are timm's wherever timm has the field.

    img_size and patch_size, pixels, are an int or (height, width) and are kept as the pair. num_classes 0 means no
    classifier. global_pool: "token" (the class token), "avg", "max" or "avgmax" over the patch tokens, "map" for
    `nn.AttentionPoolLatent` over them, "" for none. init_values: first value of layer scale (arXiv 2103.17239), None
    for no layer scale. reg_tokens: registers (arXiv 2309.16588). no_embed_class: prefix tokens have no position.
    pre_norm: a norm before the blocks, and patches without a bias, as in CLIP. fc_norm: the last norm comes after
    pooling; None means it does for the pools over patches. dynamic_img_size: images of any size that the patch divides,
    the position table being resampled to each; dynamic_img_pad: and of any other, filled up with zeros at the right and
    the bottom. distilled: a second token and head (arXiv 2012.12877). mask_token: a learned token for masked patches,
    as DINOv2 and iBOT (arXiv 2111.07832) have it. mlp: "mlp" or "swiglu", whose gate has activation "silu". norm_eps:
    of every LayerNorm. rope_temperature: of a rotary position embedding (arXiv 2508.10104), see
    `patches.rotary_tables`, in place of a table of positions; None for none. The *_rate fields are dropout rates, that
    of whole patches (arXiv 2212.00794) and the largest drop-path rate. pos_resampling: a policy for position tables of
    another grid. mean, std, crop_pct, crop_mode, interpolation: how images are prepared, as `images.resize_and_crop`
    says; mean and std are per channel, for pixels in [0, 1], None for 0.5 in each.

    Raises ValueError, or TypeError for a flag that is no bool, naming the field, what came and what was expected.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    in_chans: int = 3
    num_classes: int = 1000
    global_pool: str = "token"
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    mlp: str = "mlp"
    activation: str = "gelu"
    qkv_bias: bool = True
    init_values: float | None = None
    class_token: bool = True
    reg_tokens: int = 0
    no_embed_class: bool = False
    distilled: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool | None = None
    dynamic_img_size: bool = False
    dynamic_img_pad: bool = False
    mask_token: bool = False
    norm_eps: float = 1e-6
    rope_temperature: float | None = None
    drop_rate: float = 0.0
    pos_drop_rate: float = 0.0
    patch_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    pos_resampling: str = "antialias"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float = 0.9
    crop_mode: str = "center"
    interpolation: str = "bicubic"

    def __post_init__(self):
        for name in ("img_size", "patch_size"):
            object.__setattr__(self, name, to_pair(name, getattr(self, name)))
        for name, least in (
            ("in_chans", 1),
            ("num_classes", 0),
            ("embed_dim", 1),
            ("depth", 1),
            ("num_heads", 1),
            ("reg_tokens", 0),
        ):
            value = getattr(self, name)
            if not is_integer(value) or value < least:
                raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}, expected a bool")
        if self.fc_norm is not None and not isinstance(self.fc_norm, bool):
            raise TypeError(f"fc_norm is {self.fc_norm!r}, expected a bool or None")
        for name in _RATES:
            if not (is_number(getattr(self, name)) and 0 <= getattr(self, name) < 1):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a rate in [0, 1)")
        for name in ("mlp_ratio", "norm_eps", "crop_pct"):
            if not (is_number(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a positive number")
        rope = self.rope_temperature
        if rope is not None and not (is_number(rope) and rope > 0):
            raise ValueError(f"rope_temperature is {rope!r}, expected a positive number or None")
        if self.init_values is not None and not is_number(self.init_values):
            raise ValueError(f"init_values is {self.init_values!r}, expected a number or None")
        for name in ("mean", "std"):
            value = (0.5,) * self.in_chans if getattr(self, name) is None else getattr(self, name)
            if not isinstance(value, Sequence) or len(value) != self.in_chans or not all(map(is_number, value)):
                raise ValueError(f"{name} is {value!r}, expected one number for each channel, {self.in_chans}")
            object.__setattr__(self, name, tuple(value))
        for name, known in (
            ("global_pool", POOLS),
            ("mlp", tuple(MLPS)),
            ("activation", tuple(ACTIVATION_LAYERS)),
            ("pos_resampling", POS_RESAMPLING),
            ("interpolation", INTERPOLATIONS),
            ("crop_mode", CROP_MODES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {known}")

        if any(side % patch for side, patch in zip(self.img_size, self.patch_size, strict=True)):
            raise ValueError(f"img_size is {self.img_size}, expected multiples of patch_size, {self.patch_size}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}, expected a divisor of embed_dim, {self.embed_dim}")
        if rope is not None and self.embed_dim // self.num_heads % 4:
            width = self.embed_dim // self.num_heads
            raise ValueError(f"rope_temperature is {rope}, expected None for heads of {width}, no multiple of 4")
        if rope is not None and self.patch_drop_rate:
            raise ValueError(f"patch_drop_rate is {self.patch_drop_rate}, expected 0 with rope_temperature")
        if any(not value > 0 for value in self.std):
            raise ValueError(f"std is {self.std}, expected positive numbers")
        if self.mlp == "swiglu" and self.activation != "silu":
            raise ValueError(f"activation is {self.activation!r}, expected 'silu' for mlp 'swiglu', whose gate it is")
        if self.global_pool == "token" and not self.class_token:
            raise ValueError("global_pool is 'token', expected another pool where class_token is False")
        if self.distilled and (not self.class_token or self.reg_tokens or self.global_pool != "token"):
            raise ValueError("distilled is True, expected class_token=True, reg_tokens=0 and global_pool='token'")
        if self.distilled and self.fc_norm:
            raise ValueError("fc_norm is True, expected False or None where distilled is True")

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens, which come before the patches."""
        return self.class_token + self.distilled + self.reg_tokens

    @property
    def norm_after_pool(self) -> bool:
        """Whether the last LayerNorm is `fc_norm`, after pooling, and not `norm`, before it."""
        return self.global_pool in AVERAGING_POOLS if self.fc_norm is None else self.fc_norm

"""Example calls of every op: its tensors by argument name, at any sizes, in any dtypes, with any of the optional ones.

`fastvit verify`, the benchmarks, the static report and the tests all call the ops with these. What an op takes besides
tensors (eps, activation, scale, mean, std) is the caller's to add.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

SCALES = ("layer_scale", "drop_path_scale")
BLOCK_SCALES = tuple(f"{name}{branch}" for name in SCALES for branch in (1, 2))
TABLES = ("pos_embed", "prefix")
ROPE = ("rope_cos", "rope_sin")
LONGER = 13  # tokens that each packed sequence has more than the one before; the first has none


@dataclass(frozen=True)
class Draw:
    """Draws tensors: random normal values rounded to `dtype`, weights scaled by their inputs, vectors small.

    dtypes: what is of another dtype, by the argument's name (an image in uint8 has pixels); generator: the process's
    own, if None; trained: whether floating-point tensors require a gradient, except drop_path_scale; channels_last: the
    layout of an image. On the device "meta" tensors have no memory.
    """

    dtype: torch.dtype
    device: str = "cpu"
    generator: torch.Generator | None = None
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    trained: bool = False
    channels_last: bool = False

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor for the argument `name`."""
        dtype = self.dtypes.get(name, self.dtype)
        if name == "key_padding_mask":  # the first image attends to nothing, each further one to more
            lengths = torch.arange(shape[0], device=self.device) * shape[1] // shape[0]
            return torch.arange(shape[1], device=self.device) < lengths[:, None]
        if name == "cu_seqlens":
            return (LONGER * torch.arange(shape[0], device=self.device).sub_(1).clamp_(0)).cumsum(0, dtype=torch.int32)
        if name in ("rope_cos", "rope_sin"):  # of the token's number times a frequency
            tokens, pairs = (torch.arange(size, device=self.device, dtype=torch.float32) for size in shape[-2:])
            angle = tokens[:, None] * 30 ** -(pairs / shape[-1])
            return (angle.cos() if name == "rope_cos" else angle.sin()).expand(shape).to(dtype)
        if name.startswith("drop_path_scale"):  # the second of every three images is dropped
            return (torch.arange(*shape, device=self.device) % 3 != 1).to(dtype) * 1.25
        where = self.device if self.generator is None else self.generator.device
        values = torch.randn(shape, generator=self.generator, device=where)
        if len(shape) == 1 and not name.startswith("layer_scale"):
            values = values * 0.2 + (1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("weight"):
            values = values * max(1, math.prod(shape[1:])) ** -0.5
        elif name == "x":
            values = values + 0.5
        elif dtype == torch.uint8:
            values = (values * 50 + 120).clamp(0, 255)
        layout = torch.channels_last if name == "image" and self.channels_last else torch.preserve_format
        tensor = values.to(self.device, dtype, memory_format=layout)
        return tensor.requires_grad_(self.trained and dtype.is_floating_point)


def tensors(op: str, draw: Draw, also: Collection[str] = (), bias: bool = True, **sizes) -> dict:
    """The tensors of `op`: what it requires, and of the optional ones those in `also`, in that order. Without bias, its
    linear layers' are None. sizes: the arguments of the op's function in SHAPES."""
    required, optional = SHAPES[op](**sizes)
    shapes = required | {name: optional[name] for name in also}
    without = () if bias else ("bias", "qkv_bias", "proj_bias", "fc1_bias", "fc2_bias")
    return {name: None if name in without else draw(name, *shape) for name, shape in shapes.items()}


def _layer_norm(batch, tokens, dim):
    return {"x": (batch, tokens, dim), "weight": (dim,), "bias": (dim,)}, {}


def _layer_norm_linear(batch, tokens, dim, out):
    normalisation = {"x": (batch, tokens, dim), "norm_weight": (dim,), "norm_bias": (dim,)}
    return normalisation | {"weight": (out, dim), "bias": (out,)}, {}


def _linear_residual(batch, tokens, dim, out):
    linear = {"x": (batch, tokens, dim), "weight": (out, dim), "bias": (out,)}
    return linear | {"residual": (batch, tokens, out)}, {"layer_scale": (out,), "drop_path_scale": (batch,)}


def _layer_norm_mlp(batch, tokens, dim, hidden):
    x = (batch, tokens, dim)
    normalisation = {"x": x, "norm_weight": (dim,), "norm_bias": (dim,)}
    fc1, fc2 = {"fc1_weight": (hidden, dim), "fc1_bias": (hidden,)}, {"fc2_weight": (dim, hidden), "fc2_bias": (dim,)}
    return normalisation | fc1 | fc2, {"residual": x, "layer_scale": (dim,), "drop_path_scale": (batch,)}


def _attention(batch, tokens, heads, head_dim):
    """The rotary embedding is of all tokens but the first."""
    optional = {"key_padding_mask": (batch, tokens), "attn_bias": (heads, tokens, tokens)}
    optional |= {name: (tokens - 1, head_dim // 2) for name in ROPE}
    return {"qkv": (batch, tokens, 3, heads, head_dim)}, optional


def _attention_varlen(sequences, heads, head_dim):
    tokens = LONGER * sequences * (sequences - 1) // 2
    required = {"qkv": (tokens, 3, heads, head_dim), "cu_seqlens": (sequences + 1,)}
    return required, {name: (tokens, head_dim // 2) for name in ROPE}


def _patch_embed(batch, size, patch, dim, channels=3, prefix=1, prefix_has_positions=True):
    positions = (size[0] // patch[0]) * (size[1] // patch[1]) + (prefix if prefix_has_positions else 0)
    required = {"image": (batch, channels, *size), "weight": (dim, channels, *patch), "bias": (dim,)}
    return required, {"pos_embed": (positions, dim), "prefix": (prefix, dim)}


def _transformer_block(batch, tokens, dim, heads, hidden, gated=False):
    layers = {"norm1": (), "qkv": (3 * dim, dim), "proj": (dim, dim)}
    layers |= {"norm2": (), "fc1": (hidden * (1 + gated), dim), "fc2": (dim, hidden)}
    required = {"x": (batch, tokens, dim)}
    for name, shape in layers.items():
        required |= {f"{name}_weight": shape or (dim,), f"{name}_bias": shape[:1] or (dim,)}
    optional = {name: (batch if name.startswith("drop") else dim,) for name in BLOCK_SCALES}
    return required, optional | _attention(batch, tokens, heads, dim // heads)[1]


# Of each op, the shapes of its tensors: those that it requires, and the optional ones.
SHAPES = {
    "patch_embed": _patch_embed,
    "attention": _attention,
    "attention_varlen": _attention_varlen,
    "layer_norm": _layer_norm,
    "layer_norm_linear": _layer_norm_linear,
    "linear_residual": _linear_residual,
    "layer_norm_mlp": _layer_norm_mlp,
    "transformer_block": _transformer_block,
}

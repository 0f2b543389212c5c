"""A frozen model's plan: a list of steps that a person can read, and the tensors that they need.

A step makes one value out of others. `OPERATIONS` says what each kind of step computes, in plain PyTorch: this is what
rewrites are checked against, what is exported, and what a runtime may do in a faster way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from fastvit.models.config import ViTConfig
from fastvit.models.patches import rotary_tables
from fastvit.models.weights import resample_position_table
from fastvit.reference.ops import ACTIVATIONS, rotate

IMAGES = "images"  # the value that every plan begins with
ROPE = ("rope.cos", "rope.sin")  # the constants that say how patches are rotated
_ANGLES = ("cos", "sin")  # what they are to a step
PIXEL = "pixel_"  # before the role of a constant that takes another's place where images are uint8


@dataclass(frozen=True)
class Step:
    """out = op(*inputs), with constants (role -> name in the plan) and options."""

    out: str
    op: str
    inputs: tuple[str, ...]
    constants: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)

    def roles(self, uint8: bool) -> dict[str, str]:
        """The constants' names by role, for images that are uint8 or floating point."""
        own = {role: name for role, name in self.constants.items() if not role.startswith(PIXEL)}
        if uint8:
            own |= {r.removeprefix(PIXEL): name for r, name in self.constants.items() if r.startswith(PIXEL)}
        return own


@dataclass(frozen=True)
class Plan:
    """Steps in order; outputs: what the caller gets, name -> value; constants: tensors by name; config: the model's,
    with the size of image that the plan is for."""

    steps: tuple[Step, ...]
    outputs: Mapping[str, str]
    constants: Mapping[str, torch.Tensor]
    config: ViTConfig

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self._patch_weight.dtype

    @property
    def device(self) -> torch.device:
        """Where its constants are."""
        return self._patch_weight.device

    @property
    def _patch_weight(self) -> torch.Tensor:
        return self.constants[next(step for step in self.steps if step.op == "patch_embed").constants["weight"]]

    def users(self, value: str) -> list[Step]:
        """The steps that take this value."""
        return [step for step in self.steps if value in step.inputs]

    def maker(self, value: str) -> Step | None:
        """The step that makes this value; None for the images."""
        return next((step for step in self.steps if step.out == value), None)

    def only_user(self, value: str) -> Step | None:
        """The one step that takes this value, once, and is all that does."""
        users = self.users(value)
        single = len(users) == 1 and users[0].inputs.count(value) == 1 and value not in self.outputs.values()
        return users[0] if single else None

    def run(self, images: torch.Tensor, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """The outputs for images (B, C, H, W), which may also be of fewer patches, in plain PyTorch; computed in
        `dtype`, if not the plan's own."""
        values = self.values(images, dtype)
        return {name: values[value] for name, value in self.outputs.items()}

    def values(self, images: torch.Tensor, dtype: torch.dtype | None = None, every: bool = False) -> dict:
        """As `run`, by the names of the values: those that are returned, or every one."""
        values = {IMAGES: images}
        last = {value: i for i, step in enumerate(self.steps) for value in step.inputs}
        kept = set(self.outputs.values())
        for i, step in enumerate(self.steps):
            constants = {
                role: in_dtype(role, _dense(self.constants[name]).to(images.device), dtype or self.dtype)
                for role, name in step.roles(images.dtype == torch.uint8).items()
            }
            values[step.out] = OPERATIONS[step.op](*[values[name] for name in step.inputs], **constants, **step.options)
            for name in step.inputs:
                if not every and last[name] == i and name not in kept:
                    values.pop(name, None)
        return values

    def resized(self, height: int, width: int) -> Plan:
        """The plan for images of another size: positions resampled once. Raises ValueError where the model takes one
        size only or the patch does not divide this one."""
        config = self.config
        if (height, width) == config.img_size:
            return self
        if not config.dynamic_img_size:
            own = " x ".join(map(str, config.img_size))
            raise ValueError(f"images are {height} x {width}, expected {own}")
        patch = config.patch_size
        if not height or not width:
            raise ValueError(f"images are {height} x {width}, expected at least one patch, {patch[0]} x {patch[1]}")
        if not config.dynamic_img_pad and (height % patch[0] or width % patch[1]):
            raise ValueError(f"images are {height} x {width}, expected multiples of the patch, {patch[0]} x {patch[1]}")
        grid = -(-height // patch[0]), -(-width // patch[1])
        step = next(step for step in self.steps if step.op == "assemble")
        tables = {
            name: resample_position_table(
                self.constants[name][None], config.grid_size, grid, step.options["prefix_rows"], config.pos_resampling
            )[0]
            for role, name in step.constants.items()
            if role.removeprefix(PIXEL) == "positions"
        }
        if config.rope_temperature is not None:
            old = self.constants[ROPE[0]]
            how = (config.embed_dim // config.num_heads, config.rope_temperature, old.device, old.dtype)
            tables |= dict(zip(ROPE, rotary_tables(grid, *how), strict=True))
        # An image that is filled up has no config of its own: whole patches stand for it.
        size = grid[0] * patch[0], grid[1] * patch[1]
        return replace(self, constants={**self.constants, **tables}, config=replace(config, img_size=size))

    def rounded(self, dtype: torch.dtype, copy: bool = False) -> Plan:
        """The plan with its constants in `dtype`; positions in float32 at least, since they may be resampled, and what
        `in_dtype` keeps. copy: it shares no memory with this one."""
        wide = torch.promote_types(dtype, torch.float32)
        used = {name: role.removeprefix(PIXEL) for step in self.steps for role, name in step.constants.items()}
        constants = {
            name: self.constants[name].to(wide if role in ("positions", *_ANGLES) else dtype, copy=copy)
            for name, role in sorted(used.items())
        }
        return replace(self, constants=constants)

    def dense(self) -> Plan:
        """The plan with its constants in PyTorch's own layout."""
        return replace(self, constants={name: _dense(tensor) for name, tensor in self.constants.items()})

    def on(self, device: torch.device) -> Plan:
        """The plan with its constants on the device."""
        return replace(self, constants={name: tensor.to(device) for name, tensor in self.constants.items()})

    def shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """The shape of every value for a batch of images of the plan's size, found without computing."""
        found = {IMAGES: (batch, self.config.in_chans, *self.config.img_size)}
        for step in self.steps:
            weight = step.constants.get("weight")
            weight = () if weight is None else tuple(self.constants[weight].shape)
            found[step.out] = _shape(step, found[step.inputs[0]], weight)
        return found

    def costs(self, batch: int = 1) -> list[tuple[Step, int, int]]:
        """(step, FLOPs, bytes) of each step: the multiply-adds of products, twice; bytes of its inputs, constants and
        result, each once; none of a step that only looks at its input otherwise."""
        shapes, found = self.shapes(batch), []
        for step in self.steps:
            out = shapes[step.out]
            flops = 0
            if step.op in ("linear", "patch_embed"):
                flops = 2 * math.prod(self.constants[step.constants["weight"]].shape[1:]) * math.prod(out)
            elif step.op == "attention":
                keys = shapes[step.inputs[-1]][1]
                flops = 4 * math.prod(out) * keys
            moved = sum(math.prod(shapes[name]) for name in (*step.inputs, step.out))
            moved += sum(self.constants[name].numel() for name in step.roles(False).values())
            found.append((step, flops, 0 if step.op in VIEWS else moved * self.dtype.itemsize))
        return found

    def totals(self) -> tuple[int, int, int]:
        """Launches, FLOPs and bytes of one image."""
        costs = self.costs()
        moved = [bytes for _, _, bytes in costs if bytes]
        return len(moved), sum(flops for _, flops, _ in costs), sum(moved)

    def __str__(self) -> str:
        shapes, lines = self.shapes(1), []
        width = max(len(step.out) for step in self.steps)
        for step in self.steps:
            weight = step.constants.get("weight")
            between = ""
            if step.op == "linear":
                rows, columns = self.constants[weight].shape
                between = f"{columns} -> {rows}"
            facts = [between] + [f"{name} {_short(value)}" for name, value in step.options.items()]
            facts += [role for role in step.constants if role != "weight" or not between]
            shape = " x ".join(map(str, shapes[step.out][1:]))
            facts = ", ".join(filter(None, facts))
            lines.append(f"{step.out:{width}}  {shape:>12}  = {step.op}({', '.join(step.inputs)})  {facts}".rstrip())
        returned = ", ".join(f"{name}: {value}" if name != value else name for name, value in self.outputs.items())
        return "\n".join([*lines, f"returns {returned}"])


def in_dtype(role: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A step's constant as it goes into a computation in `dtype`: cos and sin in float32 at least, as in the model."""
    return tensor.to(torch.promote_types(dtype, torch.float32) if role in _ANGLES else dtype)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_dense() if tensor.is_mkldnn else tensor


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --------------------------------------------------------------------------------------------------------------------
# What each kind of step computes


def _normalise(images, mean, std):
    """uint8 (B, C, H, W) as (pixel / 255 - mean) / std, in float32 or wider; other images as they are."""
    if images.dtype != torch.uint8:
        return images
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std))
    return (images.float() / 255 - mean) / std


def centred(images: torch.Tensor, centre: tuple[int, ...] | None, dtype: torch.dtype) -> torch.Tensor:
    """Images in `dtype`; of uint8 ones, where a centre is given, what they differ from it, by channel: exact."""
    if centre is None or images.dtype != torch.uint8:
        return images.to(dtype)
    return images.to(dtype) - torch.tensor(centre, dtype=dtype, device=images.device)[:, None, None]


def _patch_embed(images, weight, bias=None, pad=False, centre=None):
    """Images (B, C, H, W), `centred` -> patch tokens (B, N, D); pad: filled up with zeros at the right and the
    bottom."""
    patch, images = weight.shape[2:], centred(images, centre, weight.dtype)
    if pad:
        images = F.pad(images, (0, -images.shape[3] % patch[1], 0, -images.shape[2] % patch[0]))
    return F.conv2d(images, weight, bias, stride=patch).flatten(2).transpose(1, 2)


def _assemble(patches, prefix_rows, prefix_tokens, positions=None, prefix=None):
    """Patch tokens (B, N, D) with positions (prefix_rows + N, D), if there are any, after `prefix_tokens` rows: prefix
    (P, D), with the table's first rows where it has any for them, or those rows alone."""
    count = patches.shape[1]
    tokens = patches if positions is None else patches + positions[prefix_rows : prefix_rows + count]
    if not prefix_tokens:
        return tokens
    before = positions[:prefix_rows] if prefix is None else prefix
    if prefix is not None and prefix_rows:
        before = before + positions[:prefix_rows]
    return torch.cat([before.expand(patches.shape[0], -1, -1), tokens], dim=1)


def _layer_norm(x, eps, weight=None, bias=None):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _linear(x, residual=None, *, weight, bias=None, activation=None):
    """x W^T + b, then the activation, then the residual."""
    y = F.linear(x, weight, bias)
    y = y if activation is None else ACTIVATIONS[activation](y)
    return y if residual is None else residual + y


def _swiglu(x):
    """silu(gate) * value of [gate; value] (arXiv 2002.05202)."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def _rotate(qkv, cos, sin, num_heads, prefix_tokens):
    """Packed q, k, v (B, N, 3 D) with q and k of all tokens but the prefix rotated, see `reference.rotate`."""
    q, k, v = split_heads(qkv, 3, num_heads)
    cos, sin = (angle[: qkv.shape[1] - prefix_tokens] for angle in (cos, sin))
    rotated = torch.stack([rotate(q, cos, sin), rotate(k, cos, sin), v])
    return rotated.permute(1, 3, 0, 2, 4).flatten(2)


def _attention(qkv, kv=None, *, num_heads, scale):
    """softmax(q k^T * scale) v by head, of packed (B, N, 3 D), or q (B, R, D) and kv (B, N, 2 D) -> (B, N or R, D)."""
    if kv is None:
        q, k, v = split_heads(qkv, 3, num_heads)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:  # in products: OpenVINO 2026.4 gets its own attention wrong for two queries and a fixed batch
        (q,), (k, v) = split_heads(qkv, 1, num_heads), split_heads(kv, 2, num_heads)
        mixed = (q * scale @ k.transpose(2, 3)).softmax(-1) @ v
    return mixed.transpose(1, 2).flatten(2)


def split_heads(packed: torch.Tensor, parts: int, num_heads: int) -> tuple[torch.Tensor, ...]:
    """packed (B, N, parts * H * d) -> views (B, H, N, d), one a part."""
    return packed.unflatten(2, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _latent(x, weight):
    """A learned row (1, 1, D) for each of x (B, ...) -> (B, 1, D)."""
    return weight.expand(x.shape[0], -1, -1)


def _pool(x, kind):
    """(B, N, D) -> (B, D): "avg", "max", or half the sum of both."""
    if kind == "avg":
        return x.mean(dim=1)
    return x.amax(dim=1) if kind == "max" else 0.5 * (x.amax(dim=1) + x.mean(dim=1))


def _shape(step: Step, x: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what a step makes, by those of its first input and its weight. PyTorch's meta tensors would say it
    too, but import its compiler for that, which takes two seconds."""
    if step.op == "patch_embed":
        return x[0], math.prod(-(-side // patch) for side, patch in zip(x[2:], weight[2:], strict=True)), weight[0]
    if step.op == "latent":
        return x[0], *weight[1:]
    if step.op == "assemble":
        return x[0], step.options["prefix_tokens"] + x[1], x[2]
    if step.op == "linear":
        return *x[:-1], weight[0]
    if step.op == "swiglu":
        return *x[:-1], x[-1] // 2
    if step.op == "attention":
        return *x[:-1], x[-1] // (3 if len(step.inputs) == 1 else 1)
    if step.op == "rows":
        return x[0], len(range(x[1])[step.options["start"] : step.options["stop"]]), x[2]
    if step.op == "flatten":
        return x[0], math.prod(x[1:])
    return (x[0], x[2]) if step.op == "pool" else x


OPERATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "normalise": _normalise,
    "patch_embed": _patch_embed,
    "assemble": _assemble,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "activation": lambda x, kind: ACTIVATIONS[kind](x),
    "swiglu": _swiglu,
    "scale": lambda x, gamma: x * gamma,
    "add": lambda x, y: x + y,
    "rotate": _rotate,
    "attention": _attention,
    "rows": lambda x, start, stop: x[:, start:stop],
    "flatten": lambda x: x.flatten(1),
    "latent": _latent,
    "pool": _pool,
    "mean": lambda *values: sum(values) / len(values),
}
# Of each row on its own: rows may be left out before such a step, in place of after it.
ROW_WISE = frozenset(("layer_norm", "linear", "activation", "swiglu", "scale", "add"))
# Look at what is there in another way: no launch, no bytes.
VIEWS = frozenset(("rows", "flatten", "latent"))

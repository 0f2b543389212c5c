"""What takes the place of a known module's forward pass: the ops, where nobody can tell, else that pass itself."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from fastvit import dispatch, ops
from fastvit.nn.attention import masks
from fastvit.nn.layers import (
    FUSED_ACTIVATION,
    activation_name,
    can_fuse,
    dropout_active,
    forward_is_its_classes,
    norm_complete,
    submodules,
    weights,
)

from .layouts import AttentionLayout, BlockLayout, MlpLayout

Otherwise = Callable[[], torch.Tensor]
_NO_ROPE = (None, None, False)
_PLAIN = (torch.Tensor, nn.Parameter, FakeTensor, FunctionalTensor)


def plain(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether none of the tensors is of a class that stands for other numbers than it holds: quantised, distributed."""
    return not any([tensor is not None and type(tensor) not in _PLAIN for tensor in tensors])


def may_run(x) -> bool:
    """Whether the kernels are not out of the question for x."""
    return (
        type(x) in _PLAIN
        and x.device.type in ("cuda", "cpu")
        and dispatch.may_fuse_blocks(x)
        and not torch.jit.is_tracing()
    )


def packed(layers: list[nn.Module]) -> list[torch.Tensor | None]:
    """The weight and the bias of linear layers that read the same input, as one layer's."""
    if len(layers) == 1:
        return weights(layers[0])
    found = weights(*layers)
    rows, biases = found[::2], found[1::2]
    if all([bias is None for bias in biases]):
        return [torch.cat(rows), None]
    filled = [w.new_zeros(w.shape[0]) if bias is None else bias for w, bias in zip(rows, biases, strict=True)]
    return [torch.cat(rows), torch.cat(filled)]


def qkv_of(attention: nn.Module, layout: AttentionLayout) -> list[torch.Tensor | None]:
    """The weight and the bias of q, k and v, packed."""
    if not layout.qkv:
        return [attention.in_proj_weight, attention.in_proj_bias]
    weight, bias = packed(submodules(attention, layout.qkv))
    if layout.biases is not None:
        biases = layout.biases(attention)
        bias = (
            None
            if biases[0] is None
            else torch.cat([b if b is not None else torch.zeros_like(biases[0]) for b in biases])
        )
    return [weight, bias]


def _records_nothing(module: nn.Module) -> bool:
    """Whether all that waits on a module's output are hooks that transformers leaves behind once it was asked for
    attention probabilities, and that nobody asks for them now."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    hooks = module._forward_hooks.values()
    if capturing is None or any([getattr(hook, "__module__", None) != capturing.__name__ for hook in hooks]):
        return False
    wanted = capturing._active_collector.get()
    return not wanted or not [key for key in wanted if "hidden_states" not in key]


def _unseen(modules: list[nn.Module], roles: tuple[tuple[type, ...], ...]) -> bool:
    """Whether nobody can tell that these modules are not called, as `can_fuse` has it, and they hold plain numbers."""
    for module in modules:
        if not plain(module._parameters.values()) or (type(module) is nn.Dropout and dropout_active(module)):
            return False
    if can_fuse(modules, roles):
        return True
    quiet = {module for module in modules if module._forward_hooks and _records_nothing(module)}
    pairs = list(zip(modules, roles, strict=True))
    if not quiet or any([type(m) not in types or not forward_is_its_classes(m) for m, types in pairs if m in quiet]):
        return False
    return can_fuse(*zip(*[pair for pair in pairs if pair[0] not in quiet], strict=True))


def _masks(given: tuple, x: torch.Tensor, heads: int) -> tuple | None:
    """(key_padding_mask, attn_bias) of a call; None for masks that no op takes."""
    attn_mask, is_causal, *_ = given
    try:
        return masks(attn_mask, is_causal, x.shape[0], heads, x.shape[1], x)
    except (TypeError, ValueError):
        return None


@dataclass(frozen=True)
class Branch:
    """One residual branch of a block: the names of its norm, of the linear layers and the activation, and of what else
    a call would go through; the types that all of these have; layer-scale's module ("" for the block) and attribute,
    and what draws for drop path, if any."""

    norm: str
    layers: tuple[str, ...]
    others: tuple[str, ...]
    roles: tuple[tuple[type, ...], ...] = ()
    layer_scale: tuple[str, str] | None = None
    drop_path: tuple[str, Callable] | None = None

    def modules(self, block: nn.Module) -> list[nn.Module]:
        """Those of the branch: the norm, the layers, the others."""
        return submodules(block, (self.norm, *self.layers, *self.others))

    def unseen(self, modules: list[nn.Module]) -> bool:
        """Whether nobody can tell that the branch's modules are not called."""
        return _unseen(modules, self.roles) and norm_complete(modules[0])

    def scales(self, block: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The factors of each channel, and of each sample."""
        own = block._modules
        gamma = None
        if self.layer_scale:
            name, attribute = self.layer_scale
            gamma = getattr(own[name] if name else block, attribute)
        return gamma, self.drop_path and self.drop_path[1](own[self.drop_path[0]], x)


def _activation(module: nn.Module, found: str) -> str:
    return activation_name(module) if type(module) in FUSED_ACTIVATION else found


@dataclass(frozen=True)
class BlockPlan:
    """A block as one op: `ops.transformer_block`."""

    kind: ClassVar[str | None] = "block"

    layout: BlockLayout
    attention: AttentionLayout
    mlp: MlpLayout
    first: Branch
    second: Branch
    activation: str

    def run(self, block: nn.Module, otherwise: Otherwise, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """The block's output for x (B, N, D)."""
        first, second = self.first.modules(block), self.second.modules(block)
        norm1, *layers = first
        norm2, *mlp_layers = second
        attention, mlp = submodules(block, (self.layout.attention, self.layout.mlp))
        given = None if self.layout.own_way(block) else self.layout.arguments(attention, x, *args, **kwargs)
        heads = self.attention.num_heads(attention)
        dim = norm1.normalized_shape[0]
        if (
            given is None
            or x.dim() != 3
            or x.shape[2] != dim
            or not x.is_floating_point()
            or not self.first.unseen(first)
            or not self.second.unseen(second)
            or not plain(block._parameters.values())
            or self.attention.dropping(attention)
            or self.attention.refuse(attention) is not None
            or self.mlp.refuse(mlp) is not None
            or (found := _masks(given, x, heads)) is None
        ):
            return otherwise()
        count, split = len(self.attention.qkv), len(self.mlp.fc1)
        parameters = [
            *weights(norm1),
            *qkv_of(attention, self.attention),
            *weights(layers[count]),
            *weights(norm2),
            *packed(mlp_layers[:split]),
            *weights(mlp_layers[split + bool(self.mlp.act)]),
        ]
        linear = parameters[2:5:2] + parameters[8:11:2]
        if not ops.takes_block(x, linear, lambda: [*block.parameters(), found[1]]):
            return otherwise()
        (scale1, drawn1), (scale2, drawn2) = self.first.scales(block, x), self.second.scales(block, x)
        activation = _activation(mlp_layers[split], self.activation) if self.mlp.act else self.activation
        how = (heads, self.attention.scale(attention), norm1.eps, norm2.eps, activation)
        given = (x, *parameters, *how, scale1, scale2, drawn1, drawn2, *found, *(given[2:] or _NO_ROPE), False)
        if self.layout.in_tuple:
            return (ops.run_transformer_block(given, lambda: otherwise()[0]),)
        return ops.run_transformer_block(given, otherwise)


@dataclass(frozen=True)
class MlpPlan:
    """A block whose second branch is one op, `ops.layer_norm_mlp`, and whose first is the block's own."""

    kind: ClassVar[str | None] = "mlp"

    layout: BlockLayout
    mlp: MlpLayout
    second: Branch
    before: tuple[str, ...]  # what comes after the attention
    activation: str

    def run(self, block: nn.Module, otherwise: Otherwise, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """The block's output for x (B, N, D)."""
        modules = self.second.modules(block)
        norm, *layers = modules
        norm1, attention, mlp = submodules(block, (self.layout.norm1, self.layout.attention, self.layout.mlp))
        if (
            self.layout.own_way(block)
            or (self.layout.in_tuple and self.layout.arguments(attention, x, *args, **kwargs) is None)
            or not self.second.unseen(modules)
            or self.mlp.refuse(mlp) is not None
        ):
            return otherwise()
        y = self.layout.attend(attention, norm1(x), args, kwargs)
        y = y[0] if isinstance(y, tuple) else y
        for module in submodules(block, self.before):
            y = module(y)
        x = x + y
        scale, drawn = self.second.scales(block, x)
        fc1, act, fc2 = layers[:3]
        out = ops.layer_norm_mlp(
            x,
            *weights(norm, fc1, fc2),
            eps=norm.eps,
            activation=_activation(act, self.activation),
            residual=x,
            layer_scale=scale,
            drop_path_scale=drawn,
        )
        return (out,) if self.layout.in_tuple else out


@dataclass(frozen=True)
class AttentionPlan:
    """Self-attention whose middle, between its linear layers, is one op: `ops.attention`."""

    kind: ClassVar[str | None] = "attention"

    layout: AttentionLayout
    layers: tuple[str, ...]
    roles: tuple[tuple[type, ...], ...]

    def run(self, attention: nn.Module, otherwise: Otherwise, x: torch.Tensor, *args, **kwargs):
        """What the module returns for x (B, N, D)."""
        layout = self.layout
        given = layout.arguments(attention, x, *args, **kwargs)
        layers = submodules(attention, self.layers)
        heads = layout.num_heads(attention)
        if (
            given is None
            or x.dim() != 3
            or not _unseen(layers, self.roles)
            or layout.dropping(attention)
            or layout.refuse(attention) is not None
            or not layout.alone(attention)
            or not plain(attention._parameters.values())
            or (found := _masks(given, x, heads)) is None
        ):
            return otherwise()
        qkv = F.linear(x, *qkv_of(attention, layout)).unflatten(2, (3, heads, -1))
        names = ("key_padding_mask", "attn_bias", "rope_cos", "rope_sin", "rope_interleaved")
        options = dict(zip(names, (*found, *(given[2:] or _NO_ROPE)), strict=True))
        mixed = ops.attention(qkv, scale=layout.scale(attention), **options)
        out = F.linear(mixed, *weights(layers[len(layout.qkv)]))
        return (out, None) if layout.paired else out


@dataclass(frozen=True)
class PatchPlan:
    """A convolution of patches that do not overlap: `ops.patch_embed`. What it returns has the channels innermost, so
    that flattening it to tokens copies nothing."""

    kind: ClassVar[str | None] = "patch_embed"

    def run(self, proj: nn.Module, otherwise: Otherwise, image: torch.Tensor) -> torch.Tensor:
        """image (B, C, H, W) -> (B, D, H / ph, W / pw)."""
        weight, bias = weights(proj)
        ph, pw = proj.kernel_size
        if (
            image.dim() != 4
            or not is_patch_projection(proj)
            or not plain([weight, bias])
            or image.shape[1] != proj.in_channels
            or image.shape[2] % ph
            or image.shape[3] % pw
            or not (image.dtype == weight.dtype or dispatch.autocasting(image))
        ):
            return otherwise()
        run, args = dispatch.choose(dispatch.OPS["patch_embed"], (image, weight, bias, None, None, None, None))
        if run is dispatch.OPS["patch_embed"].torch:
            return otherwise()
        grid = (image.shape[2] // ph, image.shape[3] // pw)
        return run(*args).transpose(1, 2).unflatten(2, grid)


def is_patch_projection(proj: nn.Conv2d) -> bool:
    """Whether a convolution is a projection of patches that do not overlap."""
    return (
        proj.kernel_size == proj.stride
        and max(proj.kernel_size) > 1
        and proj.padding in ((0, 0), "valid")
        and proj.dilation == (1, 1)
        and proj.groups == 1
    )


@dataclass(frozen=True)
class SequencePlan:
    """Blocks in a row, each of which hands on to the next what it knows of its output: `ops.carrying`."""

    kind: ClassVar[str | None] = None

    def run(self, blocks: nn.Sequential, otherwise: Otherwise, x: torch.Tensor) -> torch.Tensor:
        """The last block's output for x (B, N, D)."""
        alone = can_fuse(blocks, [(type(block),) for block in blocks]) and not torch.compiler.is_compiling()
        with ops.carrying() if alone else contextlib.nullcontext():
            return otherwise()


Plan = BlockPlan | MlpPlan | AttentionPlan | PatchPlan | SequencePlan

"""A model's layers as two models are compared by them, and what each of them read and returned in a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from fastvit.dropin.layouts import BLOCKS, BlockLayout, known_layout
from fastvit.dropin.swap import original_class
from fastvit.nn import Block


@dataclass(frozen=True)
class Layer:
    """A layer of a model: its name here, the module, what kind it is ("norm", "attention", "mlp" or "block"), and the
    layout of the block that it is, or is in, where that is known."""

    name: str
    module: nn.Module
    kind: str
    layout: BlockLayout | None


def block_layout(module: nn.Module) -> BlockLayout | None:
    """How a block of ours, or of a library that is known, is put together."""
    if isinstance(module, Block):
        return BLOCKS["timm block"]  # whose names ours has
    return known_layout(BLOCKS, module, original_class(module))


def layers_of(model: nn.Module) -> list[Layer]:
    """Its layers in the order in which they run: of each block the two norms, attention and MLP, and the block itself.

    Blocks are those whose forward pass is known, or, where there is none, the longest row of modules of one class.
    Raises ValueError for a model without a row of blocks.
    """
    blocks = [module for module in model.modules() if block_layout(module) is not None]
    if not blocks:
        rows = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) > 1]
        rows = [[*row] for row in rows if len({type(module) for module in row}) == 1]
        blocks = max(rows, key=len, default=[])
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no row of blocks to compare")
    layers = []
    for number, block in enumerate(blocks):
        layout, name = block_layout(block), f"block {number}"
        if layout is not None:
            for part, kind in (
                (layout.norm1, "norm"),
                (layout.attention, "attention"),
                (layout.norm2, "norm"),
                (layout.mlp, "mlp"),
            ):
                if not part:
                    continue  # its layers are the block's own
                which = {layout.norm1: " norm1", layout.norm2: " norm2"}.get(part, f" {kind}")
                layers.append(Layer(name + which, block._modules[part], kind, layout))
        layers.append(Layer(name, block, "block", layout))
    return layers


@dataclass
class Call:
    """A layer's call: its arguments, and the tensor that it returned."""

    args: tuple
    kwargs: dict
    out: torch.Tensor

    @property
    def read(self) -> torch.Tensor:
        """The first tensor among the arguments."""
        return next(tensors_in((self.args, self.kwargs)))

    def again(self, module: nn.Module, read: torch.Tensor) -> torch.Tensor:
        """What module returns for the same arguments with `read` in place of what was read."""
        old = self.read

        def other(value):
            if value is old:
                return read
            if isinstance(value, (tuple, list)):
                return type(value)(map(other, value))
            return value

        kwargs = {name: other(value) for name, value in self.kwargs.items()}
        return next(tensors_in(module(*map(other, self.args), **kwargs)))


@dataclass
class Trace:
    """A run: each layer's call by name, the first block's input, and what the model returned."""

    calls: dict[str, Call] = field(default_factory=dict)
    tokens: torch.Tensor | None = None
    out: torch.Tensor | None = None


def tensors_in(value) -> Iterator[torch.Tensor]:
    """The floating-point tensors in what a module takes or returns, in order."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for name in ("logits", *value):  # of transformers' outputs what a classifier is asked for
            if name in value:
                yield from tensors_in(value[name])
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def run(model: nn.Module, layers: list[Layer], images: torch.Tensor, instead: torch.Tensor | None = None) -> Trace:
    """A run of model on images. instead: what the last block is to have returned."""
    trace = Trace()

    def note(layer: Layer, module, args, kwargs, out):
        found = next(tensors_in(out))
        trace.calls.setdefault(layer.name, Call(args, kwargs, found))
        if trace.tokens is None and layer.kind == "block":
            trace.tokens = trace.calls[layer.name].read
        if instead is not None and layer is layers[-1]:
            return instead if isinstance(out, torch.Tensor) else type(out)((instead, *list(out)[1:]))
        return None

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for layer in layers:
            hook: Callable = partial(note, layer)
            hooks.enter_context(layer.module.register_forward_hook(hook, with_kwargs=True))
        trace.out = next(tensors_in(model(images)))
    return trace

"""A module's class swapped for a subclass of it with another forward pass, and back."""

from __future__ import annotations

import copy
import functools
import inspect

from torch import nn

from fastvit.nn.layers import forward_is_its_classes

from .plans import Plan, may_run

_ORIGINAL, _KIND = "_fastvit_original", "_fastvit_kind"  # in a made class, what it was made of, and its plan's kind


@functools.cache
def swapped_class(original: type[nn.Module], plan: Plan) -> type[nn.Module]:
    """The subclass of `original` that runs by `plan` wherever the kernels may run.

    It has the name and the module of `original`, by which wrappers, tracers and reports choose what to do with a
    module.
    """
    first = list(inspect.signature(original.forward).parameters)[1]

    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        x = args[0] if args else kwargs.get(first)
        if not may_run(x):
            return original.forward(self, *args, **kwargs)
        rest = kwargs if args else {name: value for name, value in kwargs.items() if name != first}
        return plan.run(self, lambda: original.forward(self, *args, **kwargs), x, *args[1:], **rest)

    def reduce_ex(self, protocol):
        # By its own library's class: pickle finds no other, and whoever reads it needs no fastvit.
        _, _, *state = original.__reduce_ex__(self, protocol)
        return object.__new__, (original,), *state

    def deepcopy(self, memo):
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def prepare_scriptable(self):
        raise RuntimeError(
            f"torch.jit.script cannot compile {original.__name__}, which fastvit.accelerate has swapped: call "
            "fastvit.restore(model) before"
        )

    return type(
        original.__name__,
        (original,),
        {
            "__module__": original.__module__,
            "__qualname__": f"Accelerated{original.__name__}",
            "__doc__": original.__doc__,
            "__deepcopy__": deepcopy,
            "__reduce_ex__": reduce_ex,
            "__prepare_scriptable__": prepare_scriptable,
            "forward": forward,
            _ORIGINAL: original,
            _KIND: plan.kind,
        },
    )


def swap(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class."""
    if forward_is_its_classes(module):
        module.__dict__.pop("forward", None)  # which would still be the old class's
    module.__class__ = cls


def original_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that a swapped module had before; None for any other."""
    return type(module).__dict__.get(_ORIGINAL)


def swapped_kind(module: nn.Module) -> str | None:
    """What a swapped module was swapped as; None for any other, and for what only holds swapped ones."""
    return getattr(type(module), _KIND, None)


def is_wrapped(module: nn.Module) -> bool:
    """Whether a swapped module's class was made another by somebody else since."""
    return original_class(module) is None and hasattr(type(module), _ORIGINAL)

"""What the ops share: checks of arguments, autocast, and the kernels' launchers as operators of torch."""

from __future__ import annotations

import functools
import importlib
import math
import numbers
from collections.abc import Callable
from types import ModuleType

import torch

from fastvit import dispatch, tuned
from fastvit.dispatch import autocasting

_LIBRARY = torch.library.Library("fastvit", "DEF")
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


class Operator:
    """A launcher of the kernels, its calls replayed, called straight, or as an operator of torch's,
    `torch.ops.fastvit.<name>`, by what traces: compilers, exports, modes that look at every operator.

    schema: the operator's, `name(arguments) -> results`. fake: its results without values. launch: the launcher;
    fastvit.kernels.<module>'s of the operator's name, if not said. As an operator it returns empty tensors, like its
    first argument, for None, and no two that share memory.
    """

    def __init__(self, module: str, schema: str, fake: Callable, launch: Callable | None = None):
        self.name = schema.partition("(")[0]
        self._module, self._launch = module, launch
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastvit::{self.name}", fake, lib=_LIBRARY)
        self.operator = getattr(torch.ops.fastvit, self.name).default

    def of(self, *tensors: torch.Tensor | None) -> Callable:
        """What to call with these tensors."""
        if (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._get_tracing_state() is not None
            or not _PLAIN.issuperset(map(type, tensors))  # a wrapper's memory holds something else
            or tensors[0].is_neg()  # an upstream gradient's: dispatch sees to arguments
        ):
            return self.operator
        return self.replayed

    @functools.cached_property
    def replayed(self) -> Callable:
        """The launcher, its calls replayed."""
        launch = self._launch or getattr(launchers(self._module), self.name)
        return launchers("launch.replay").replaying(launch)

    def _run(self, *args):
        with torch.no_grad():  # an exported program calls it with gradients on
            found = self.replayed(*args)
        if isinstance(found, torch.Tensor):
            return found
        memory: set[int] = set()
        results = []
        for value in found:
            value = args[0].new_empty(0) if value is None else value
            where = value.untyped_storage().data_ptr()
            results.append(value.clone() if where in memory or value.storage_offset() else value)
            memory.add(where)
        return tuple(results)


def launchers(module: str) -> ModuleType:
    """fastvit.kernels.<module>, its launches following the tables of what was measured, in a repaired interpreter if in
    one."""
    _connect()
    return importlib.import_module(f"fastvit.kernels.{module}")


@functools.cache
def _connect() -> None:
    choice = importlib.import_module("fastvit.kernels.launch.choice")

    def follow() -> None:  # and forget what was chosen
        choice.set_table(tuned.lookup, library=dispatch.requested_backend() != "triton")

    follow()
    tuned.on_change(follow)
    if dispatch.interpreting():
        importlib.import_module("fastvit.interpret").repaired()


def launches(op: dispatch.Op, args: tuple) -> tuple[str, ...]:
    """A line for each launch of a call on the kernels, and of its backward pass where one can come, found on tensors
    without memory."""
    empty: dict[int, torch.Tensor] = {}
    for value in args:
        if dispatch.is_drawn(value):
            like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            empty.setdefault(id(value), like.requires_grad_(value.requires_grad))
    given = [empty.get(id(value), value) for value in args]
    device = args[0].device
    with launchers("launch.rehearsal").listing(device) as lines, dispatch.standing_for(device.type):
        out = op.kernels(*given)
        wanted = [tensor for tensor in empty.values() if tensor.requires_grad]
        if wanted and out.requires_grad:
            torch.autograd.grad(out, wanted, torch.empty_like(out), allow_unused=True)
    return tuple(lines)


def check_tensors(op: str, optional: tuple[str, ...] = (), **tensors: torch.Tensor | None) -> None:
    """Raise TypeError unless each is a floating-point tensor (or None, those that are optional), ValueError unless all
    are on one device."""
    device = first = None
    for name, tensor in tensors.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} must have a floating-point dtype, got {tensor.dtype}")
        if first is None:
            device, first = tensor.device, name
        elif tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but {first} is on {device}")


def check_number(op: str, name: str, value: float, positive: bool = False) -> None:
    """Raise TypeError unless value is a number, ValueError unless it is finite (and positive)."""
    known = type(value) is float or isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat))
    if not known or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    if not -math.inf < value < math.inf or (positive and value <= 0):
        raise ValueError(f"{op}: {name} must be {'positive and ' if positive else ''}finite, got {value}")


def check_shape(op: str, name: str, tensor: torch.Tensor | None, expected: tuple[int, ...], letters: str) -> None:
    """Raise ValueError unless the tensor (if there is one) has the shape `expected`, spelled out by `letters`."""
    if tensor is not None and tensor.shape != expected:
        raise ValueError(f"{op}: {name} must have shape {letters} = {tuple(expected)}, got {tuple(tensor.shape)}")


def check_matrix(op: str, name: str, weight: torch.Tensor, letters: str, inputs: int) -> None:
    """Raise ValueError unless weight is a matrix of `inputs` columns."""
    if weight.dim() != 2 or weight.shape[1] != inputs:
        raise ValueError(f"{op}: {name} must have shape {letters} with {inputs} columns, got {tuple(weight.shape)}")


def check_operands(op: str, x: torch.Tensor, **weights: torch.Tensor | None) -> None:
    """Raise TypeError unless the weights share a dtype that is x's or narrower. Under autocast any will do."""
    dtypes = {weight.dtype for weight in weights.values() if weight is not None}
    if dtypes == {x.dtype} or autocasting(x):
        return
    (first_name, first), *rest = [(name, weight) for name, weight in weights.items() if weight is not None]
    for name, weight in rest:
        if weight.dtype != first.dtype:
            raise TypeError(f"{op}: {name} is {weight.dtype}, but {first_name} is {first.dtype}; expected one dtype")
    if torch.promote_types(x.dtype, first.dtype) != x.dtype:
        raise TypeError(f"{op}: x is {x.dtype}, but {first_name} is {first.dtype}; expected x of that dtype or wider")


def check_scales(op: str, x: torch.Tensor, outputs: int, layer_scale, drop_path_scale) -> None:
    """Raise ValueError unless layer_scale is one per output channel and drop_path_scale one per sample."""
    check_shape(op, "layer_scale", layer_scale, (outputs,), "(O,)")
    check_shape(op, "drop_path_scale", drop_path_scale, (x.shape[0],), "(B,)")
    if drop_path_scale is not None and drop_path_scale.requires_grad:
        raise ValueError(f"{op}: drop_path_scale requires grad, but is not differentiable")


def cast(x: torch.Tensor, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors as autocast would feed them to a linear layer beside x: in its dtype when it is on."""
    if not autocasting(x):
        return list(tensors)
    dtype = torch.get_autocast_dtype(dispatch.autocast_device(x))
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def compute_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The dtype in which a product of x and weight runs."""
    return torch.get_autocast_dtype(dispatch.autocast_device(x)) if autocasting(x) else weight.dtype


def unsupported_dtypes(*dtypes: torch.dtype) -> list[str]:
    """Why the kernels cannot take these dtypes."""
    supported = [torch.float16, torch.bfloat16, torch.float32]
    if dispatch.interpreting():
        supported.append(torch.float64)  # for gradient checks; no GPU kernel is meant for it
    names = sorted({str(dtype) for dtype in dtypes if dtype not in supported})
    return [f"no kernels for dtype {name}" for name in names]


def statistics_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which sums over x are kept."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., D) as (M, D) with unit stride along D; copied only where its strides leave no other way."""
    x = x.flatten(0, -2)
    return x if x.stride(1) == 1 else x.contiguous()


def shaped(y: torch.Tensor, *shape: int) -> torch.Tensor:
    """What a Function's forward returns for y: of that shape, and to autograd no view, or it could not be changed in
    place."""
    return y.view(shape).detach()


def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A parameter in the layout that the kernels read: contiguous."""
    return None if tensor is None else tensor.contiguous()


def gradients(values, likes) -> tuple[torch.Tensor, ...]:
    """A launcher's gradients in the dtypes of what they are the gradients of; None where there is none."""
    return tuple(
        [
            value if value is None or value.dtype == like.dtype else value.to(like.dtype)
            for value, like in zip(values, likes, strict=True)
        ]
    )


def fake_gradients(given: torch.Tensor, likes, needed) -> tuple[torch.Tensor, ...]:
    """What an operator returns of `gradients`, as far as shapes and dtypes go; given: its first argument."""
    return tuple(
        like.new_empty(like.shape) if need else given.new_empty(0) for like, need in zip(likes, needed, strict=True)
    )


def differentiating_again(dout: torch.Tensor) -> bool:
    """Whether a backward pass runs with create_graph=True, or with a batch of upstream gradients in one, where
    gradients have to come from `again_differentiable`. A compiled graph has no such pass."""
    if torch.compiler.is_compiling():
        return False
    batched = torch._C._functorch.is_legacy_batchedtensor(dout)  # of torch.autograd.grad(is_grads_batched=True)
    return torch.is_grad_enabled() or batched or dispatch.transforming()


def again_differentiable(function: Callable, inputs: tuple, needs, dout: torch.Tensor) -> list[torch.Tensor | None]:
    """The gradients of function(*inputs) for dout by PyTorch's own operators, which can be differentiated again where
    gradients are on; None for each that is not needed."""
    if not any(needs):
        return [None for _ in needs]
    again = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(dout.device.type, enabled=False):
        # Views, so that the gradient of one input does not go on through what the other inputs were made of.
        inputs = [value if value is None else value.view_as(value) for value in inputs]
        out = function(*inputs).to(dout.dtype)
        wanted = [value for value, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(out, wanted, dout, create_graph=again))
    return [next(found) if need else None for need in needs]


def or_none(values, needed) -> tuple[torch.Tensor | None, ...]:
    """None for each gradient that was not needed, where an operator has an empty tensor."""
    return tuple([value if need else None for value, need in zip(values, needed, strict=True)])

"""What the ops share: checks of arguments, dispatch, autocast, and the device that a launch runs on."""

import contextlib
import importlib
import math
import numbers
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensor

from fastvit import dispatch, tuned

# The candidate that is all kernels, and the one whose weight gradients are the library's.
KERNELS, LIBRARY_GRADIENTS = "triton", "triton + torch.mm"


@dataclass(frozen=True)
class Op:
    """One op: functions of the same arguments.

    check raises ValueError or TypeError for arguments that no back end takes; unsupported lists every reason why the
    kernels cannot take them; torch and triton run it. product, of an op that makes matrix products: their dtype, and
    the weights whose gradients are such products; where there are any, triton takes by_library=True, to have those by
    the library. others: further ways to run it in PyTorch, by name, that may be measured against the rest.
    """

    name: str
    check: Callable[..., None]
    unsupported: Callable[..., list[str]]
    torch: Callable[..., torch.Tensor]
    triton: Callable[..., torch.Tensor]
    product: Callable[..., tuple[torch.dtype, tuple[torch.Tensor, ...]]] | None = None
    others: dict[str, Callable[..., torch.Tensor]] = field(default_factory=dict)

    def candidates(self, args) -> dict[str, Callable[..., torch.Tensor]]:
        """Every way to run a call, by name, ours first."""
        found = {KERNELS: self.triton, "torch": self.torch, **self.others}
        if self.product is not None and needs_grad(*self.product(*args)[1]):
            found[LIBRARY_GRADIENTS] = partial(self.triton, by_library=True)
        return found

    def unmeasured(self, args) -> tuple[str, str]:
        """The candidate under "auto" where nothing was measured, and why it is not all kernels."""
        if self.product is None:
            return KERNELS, ""
        dtype, weights = self.product(*args)
        if dtype == torch.float32:
            return "torch", "no measurement says that the kernels' products are faster in float32"
        if needs_grad(*weights):
            return LIBRARY_GRADIENTS, "no measurement says that the kernels' weight gradients are faster"
        return KERNELS, ""

    def __call__(self, *args):
        self.check(*args)
        if _watcher is not None:
            _watcher(self, args)
        if dispatch.torch_without_question(args[0].device.type):
            return self.torch(*args)
        if not dispatch.wants_triton(self.name, self.unsupported(*args)):
            return self.torch(*args)
        name = self._choice(args, measure=True)
        if name == KERNELS:
            return self.triton(*args)
        if name == LIBRARY_GRADIENTS:
            return self.triton(*args, by_library=True)
        return self.torch(*args) if name == "torch" else self.others[name](*args)

    def _choice(self, args, measure: bool = False) -> str:
        """The candidate to run where the kernels can: under "auto", the one that was measured to be the fastest, if any
        was. measure: it may be measured now."""
        device = args[0].device
        tracing = torch.compiler.is_compiling() or isinstance(args[0], FakeTensor)
        if measure and tuned.mode() == "measure" and not tracing and dispatch.can_measure(device):
            importlib.import_module("fastvit.tune").tune_missing(self, args)
        if dispatch.requested_backend() != "auto":
            return KERNELS
        unmeasured, _ = self.unmeasured(args)
        # Tables are read while tracing too, but by `measured_candidate` alone, which the compiler does not look into.
        if tuned.mode() == "off" or not (tracing or tuned.table(device).choices.get(self.name, set()) - {unmeasured}):
            return unmeasured
        if self._strided(args) or (tracing and not self._static(args)):
            return unmeasured
        name = dispatch.measured_candidate(device, self.key(args))
        return name if name in self.candidates(args) else unmeasured

    def _strided(self, args) -> bool:
        """Whether a tensor is not dense, as all that were measured are."""
        return not all(a.is_contiguous() for a in args if isinstance(a, torch.Tensor))

    def _static(self, args) -> bool:
        """Whether all sizes are known while tracing: a graph for any size cannot follow what was measured at one."""
        from torch.fx.experimental.symbolic_shapes import (
            has_static_value,  # slow to import, but the compiler has done it
        )

        return all(has_static_value(size) for a in args if isinstance(a, torch.Tensor) for size in a.shape)

    def key(self, args) -> str:
        """What a measurement of this call stands for: calls of the same op, shapes, dtypes and gradients; "first" is
        the first tensor once more: x as its own residual, which the kernels fuse."""
        parts = [self.name]
        gradients = torch.is_grad_enabled()
        for value in args:
            if value is args[0] and len(parts) > 1:
                parts.append("first")
            elif isinstance(value, torch.Tensor):
                sizes = "x".join([str(size) for size in value.shape])
                gradient = "+grad" if gradients and value.requires_grad else ""
                parts.append(f"{str(value.dtype).removeprefix('torch.')}[{sizes}]{gradient}")
            elif value is None or isinstance(value, str):
                parts.append(value or "-")
        if autocasting(args[0]):
            parts.append(f"autocast={str(torch.get_autocast_dtype(args[0].device.type)).removeprefix('torch.')}")
        return " ".join(parts)

    def explain(self, *args) -> dispatch.Explanation:
        """What a call would do under "auto", and why; under "triton", a call for which there are reasons raises them.
        Raises what `check` raises."""
        self.check(*args)
        device = args[0].device
        at_once = dispatch.torch_without_question(device.type)
        if reasons := ([at_once] if at_once else []) + self.unsupported(*args):
            return dispatch.Explanation(self.name, "torch", tuple(reasons), "torch", ())
        if dispatch.requested_backend() != "auto":
            return dispatch.Explanation(self.name, KERNELS, (), KERNELS, ())
        if self._strided(args):
            evidence = ("nothing for tensors that are not contiguous: heuristics decide",)
        else:
            evidence = dispatch.evidence(device, self.key(args))
        name, (unmeasured, why) = self._choice(args), self.unmeasured(args)
        if name != unmeasured:
            why = f"{name} was measured to be faster"
        backend = KERNELS if name in (KERNELS, LIBRARY_GRADIENTS) else "torch"
        return dispatch.Explanation(self.name, backend, () if name == KERNELS else (why,), name, evidence)


_watcher: Callable[[Op, tuple], None] | None = None


@contextlib.contextmanager
def watching(callback: Callable[[Op, tuple], None]) -> Iterator[None]:
    """In the `with` body, callback(op, args) is called at every call of an op, before it runs."""
    global _watcher
    before, _watcher = _watcher, callback
    try:
        yield
    finally:
        _watcher = before


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


def autocasting(x: torch.Tensor) -> bool:
    """Whether autocast is on for x's device and would cast what goes into a linear layer."""
    device = x.device.type
    return device in ("cuda", "cpu", "mps", "xpu") and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def cast(x: torch.Tensor, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors as autocast would feed them to a linear layer beside x: in its dtype when it is on."""
    if not autocasting(x):
        return list(tensors)
    dtype = torch.get_autocast_dtype(x.device.type)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def compute_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The dtype in which a product of x and weight runs."""
    return torch.get_autocast_dtype(x.device.type) if autocasting(x) else weight.dtype


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


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward pass through these tensors may come."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., D) as (M, D) with unit stride along D; copied only where its strides leave no other way."""
    x = x.flatten(0, -2)
    return x if x.stride(1) == 1 else x.contiguous()


def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A parameter in the layout that the kernels read: contiguous."""
    return None if tensor is None else tensor.contiguous()


_one_at_a_time = threading.RLock()


def on_device_of(tensor: torch.Tensor):
    """Context in which Triton launches on the tensor's device, with the configs that were measured for it; in the
    interpreter, repaired, which knows one launch only, other threads wait."""
    tuned.install()
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    if dispatch.interpreting():
        from fastvit import interpret

        interpret.repaired()
    return _one_at_a_time


def gradients(values, likes) -> tuple[torch.Tensor, ...]:
    """A launcher's gradients in the dtypes of what they are the gradients of; an empty tensor where there is none,
    because a custom op cannot return None."""
    absent = likes[0]
    return tuple(
        absent.new_empty(0) if value is None else value.to(like.dtype)
        for value, like in zip(values, likes, strict=True)
    )


def fake_gradients(likes, needed) -> tuple[torch.Tensor, ...]:
    """What `gradients` returns, as far as shapes and dtypes go."""
    return tuple(
        like.new_empty(like.shape) if need else likes[0].new_empty(0) for like, need in zip(likes, needed, strict=True)
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
    """Undo `gradients`: None for each that was not needed."""
    return tuple(value if need else None for value, need in zip(values, needed, strict=True))

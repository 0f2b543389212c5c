"""What the ops share: checks of arguments, dispatch, autocast, and the device that a launch runs on."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import FakeTensor

from fastvit import dispatch, tuned


@dataclass(frozen=True)
class Op:
    """One op: four functions of the same arguments.

    check raises ValueError or TypeError for arguments that no back end takes; unsupported lists every reason why the
    kernels cannot take them; torch and triton run it. others: further ways to run it in PyTorch, by name, that may be
    measured against these two.
    """

    name: str
    check: Callable[..., None]
    unsupported: Callable[..., list[str]]
    torch: Callable[..., torch.Tensor]
    triton: Callable[..., torch.Tensor]
    others: dict[str, Callable[..., torch.Tensor]] = field(default_factory=dict)

    @property
    def candidates(self) -> dict[str, Callable[..., torch.Tensor]]:
        """Every way to run it, by name, ours first."""
        return {"triton": self.triton, "torch": self.torch, **self.others}

    def __call__(self, *args):
        self.check(*args)
        if _watcher is not None:
            _watcher(self, args)
        if dispatch.torch_without_question(args[0].device.type):
            return self.torch(*args)
        if not dispatch.wants_triton(self.name, self.unsupported(*args)):
            return self.torch(*args)
        name = self._choice(args, measure=True)
        return self.triton(*args) if name == "triton" else self.candidates[name](*args)

    def _choice(self, args, measure: bool = False) -> str:
        """The candidate to run where the kernels can: under "auto", the one that was measured to be the fastest, if any
        was. measure: it may be measured now."""
        device = args[0].device
        tracing = torch.compiler.is_compiling() or isinstance(args[0], FakeTensor)
        if measure and tuned.mode() == "measure" and not tracing and dispatch.can_measure(device):
            importlib.import_module("fastvit.tune").tune_missing(self, args)
        if dispatch.requested_backend() != "auto" or tuned.mode() == "off":
            return "triton"
        # Tables are read while tracing too, but by `measured_candidate` alone, which the compiler does not look into.
        if not tracing and self.name not in tuned.table(device).lost:
            return "triton"
        if self._strided(args) or (tracing and not self._static(args)):
            return "triton"
        name = dispatch.measured_candidate(device, self.key(args))
        return name if name in self.candidates else "triton"

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
            return dispatch.Explanation(self.name, "triton", (), "triton", ())
        if self._strided(args):
            evidence = ("nothing for tensors that are not contiguous: heuristics decide",)
        else:
            evidence = dispatch.evidence(device, self.key(args))
        if (name := self._choice(args)) == "triton":
            return dispatch.Explanation(self.name, "triton", (), "triton", evidence)
        return dispatch.Explanation(self.name, "torch", (f"{name} was measured to be faster",), name, evidence)


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


def check_tensors(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise TypeError unless each is a floating-point tensor (or None), ValueError unless all are on one device."""
    device = first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} must have a floating-point dtype, got {tensor.dtype}")
        if first is None:
            device, first = tensor.device, name
        elif tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but {first} is on {device}")


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


def on_device_of(tensor: torch.Tensor):
    """Context in which Triton launches on the tensor's device, with the configs that were measured for it."""
    tuned.install()
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


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


def or_none(values, needed) -> tuple[torch.Tensor | None, ...]:
    """Undo `gradients`: None for each that was not needed."""
    return tuple(value if need else None for value, need in zip(values, needed, strict=True))

"""What the ops share: checks of arguments, dispatch, autocast, and the device that a launch runs on."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastvit import dispatch


@dataclass(frozen=True)
class Op:
    """One op: four functions of the same arguments.

    check raises ValueError or TypeError for arguments that no back end takes; unsupported lists every reason why the
    kernels cannot take them; torch and triton run it.
    """

    name: str
    check: Callable[..., None]
    unsupported: Callable[..., list[str]]
    torch: Callable[..., torch.Tensor]
    triton: Callable[..., torch.Tensor]

    def __call__(self, *args):
        self.check(*args)
        if dispatch.torch_without_question(args[0].device.type):
            return self.torch(*args)
        return self.triton(*args) if dispatch.wants_triton(self.name, self.unsupported(*args)) else self.torch(*args)

    def explain(self, *args) -> dispatch.Explanation:
        """What a call would do under "auto", and why; under "triton", a call for which there are reasons raises them.
        Raises what `check` raises."""
        self.check(*args)
        at_once = dispatch.torch_without_question(args[0].device.type)
        reasons = ([at_once] if at_once else []) + self.unsupported(*args)
        return dispatch.Explanation(self.name, "torch" if reasons else "triton", tuple(reasons))


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
    """Context in which Triton launches on the tensor's device."""
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

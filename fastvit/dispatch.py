"""Which back end runs an op, and why: the one place that decides.

Back ends: "triton" (our kernels; on CPU tensors through Triton's interpreter when TRITON_INTERPRET=1) and "torch"
(plain PyTorch). Asked for "auto", an op takes the kernels for GPU tensors that they support and PyTorch otherwise.
Where `fastvit tune` has measured the call, it takes the fastest candidate: the kernels, the kernels with the weight
gradients by torch.mm, PyTorch, or one of attention's back ends there ("sdpa flash"). Where nothing was measured,
float32 products are PyTorch's, and weight gradients torch.mm's.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from . import tuned

BACKENDS = ("auto", "triton", "torch")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown back end {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


_requested = _checked(os.environ.get("FASTVIT_BACKEND", "auto"), "FASTVIT_BACKEND")
_has_triton = importlib.util.find_spec("triton") is not None


def use_backend(name: str) -> tuned.Setting:
    """Run every op on back end `name`, "auto", "triton" or "torch", from now on, or in the `with` body.

    The choice is the process's, not the thread's. Asked for "triton", an op that the kernels do not support raises a
    RuntimeError with all the reasons instead of falling back. Raises ValueError for an unknown name.
    """
    before = _requested
    _set_requested(_checked(name, "use_backend"))
    return tuned.Setting(lambda: _set_requested(before), lambda: use_backend(name))


def _set_requested(name: str) -> None:
    global _requested
    _requested = name


def requested_backend() -> str:
    """The back end asked for: "auto", "triton" or "torch"."""
    return _requested


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def transforming() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) or forward-mode differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def missing_requirements(tensor: torch.Tensor) -> list[str]:
    """Why no Triton kernel at all can run on the tensor's device, or now; empty if one can."""
    if not _has_triton:
        return ["Triton is not installed"]
    if transforming():
        return ["a torch.func transform or forward-mode differentiation is active, and the kernels have none"]
    device = tensor.device
    if device.type == "cuda":
        if interpreting():
            return ["TRITON_INTERPRET=1 runs kernels on CPU tensors only"]
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is None and properties.major < 8:
            return [f"compute capability {properties.major}.{properties.minor}, and the kernels need 8.0"]
        return []
    if device.type == "cpu":
        return [] if interpreting() else ["the tensors are on the CPU and TRITON_INTERPRET is not set"]
    return [f"no kernels for device {device.type!r}"]


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the back end that would run `op`, and each reason why not the kernels alone; the candidate
    of that back end ("triton", "triton + torch.mm", "torch" or, of PyTorch's, "sdpa flash"), and on what evidence it
    was chosen."""

    op: str
    backend: str
    reasons: tuple[str, ...]
    candidate: str
    evidence: tuple[str, ...]

    def __str__(self) -> str:
        head = f"{self.op}: {self.candidate}" + (", because" if self.reasons else "")
        return "\n  - ".join([head, *self.reasons]) + "".join(f"\n  measured: {line}" for line in self.evidence)


_ON_CPU = "the tensors are on the CPU, where kernels run only in the interpreter, when back end 'triton' is asked for"


def torch_without_question(device_type: str) -> str | None:
    """Why an op on this type of device runs in PyTorch whatever its arguments, or None when those decide."""
    if _requested == "torch":
        return "back end 'torch' was asked for"
    if _requested == "auto" and device_type == "cpu":
        return _ON_CPU
    return None


def wants_triton(op: str, reasons: list[str]) -> bool:
    """Whether to launch kernels, given all `reasons` why they cannot take the call. Raises RuntimeError with them when
    "triton" was asked for."""
    if reasons and _requested == "triton":
        raise RuntimeError(f"back end 'triton' was asked for, but {op} cannot run on it: {'; '.join(reasons)}")
    return not reasons


def measured_candidate(device: torch.device, key: str) -> str | None:
    """The candidate that was measured to be the fastest for calls of this key (see `ops.Op.key`), if any was. Called
    by the compiler itself, once, when it traces an op: a table is no part of a graph."""
    found = tuned.table(device).segments.get(key)
    return found and found[0].choice


# As torch.compiler.assume_constant_result does, which takes a second to import the compiler.
measured_candidate._dynamo_marked_constant = True


def evidence(device: torch.device, key: str) -> tuple[str, ...]:
    """What there is to say for the candidate of a call on `device`: the times, and where they are from."""
    if tuned.mode() == "off":
        return ("nothing: tuning is off, heuristics decide",)
    found = tuned.table(device).segments.get(key)
    if found is None:
        return (f"nothing for {key!r} on this device with these versions and kernels: heuristics decide",)
    entry, file = found
    return (str(entry), f"{file.versions}; {file.path}")


def can_measure(device: torch.device) -> bool:
    """Whether an op called now may stop to be tuned: on a GPU, neither traced nor captured into a CUDA graph."""
    return (
        tuned.mode() == "measure"
        and device.type == "cuda"
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )


def explain(op: str, *args, **kwargs) -> Explanation:
    """The back end that `fastvit.ops.<op>(*args, **kwargs)` would run on, and every reason why not another. A backward
    pass with create_graph=True, or with a batch of upstream gradients, is PyTorch's whatever the forward pass was.

    Raises ValueError for an unknown op, and whatever the op itself raises for bad arguments; launches nothing.
    """
    ops = importlib.import_module("fastvit.ops")
    if op not in ops.OPS:
        raise ValueError(f"explain: unknown op {op!r}, expected one of {', '.join(ops.OPS)}")
    return ops.explain(op, *args, **kwargs)

"""Which candidate runs an op, and why: the one place that decides.

Back ends: "triton" (our kernels; on CPU tensors through Triton's interpreter when TRITON_INTERPRET=1) and "torch"
(plain PyTorch). Asked for "auto", an op takes the kernels for GPU tensors that they support and PyTorch otherwise.
Where `fastvit tune` has measured the call, it takes the fastest candidate: the kernels, PyTorch, or one of attention's
back ends there ("sdpa flash"). Where nothing was measured, float32 products are PyTorch's. On the kernels, each product
may be the library's all the same: see `kernels.launch.choice`. On a CPU, in inference mode, float32 products are
oneDNN's where that is faster than PyTorch's own.

A decision is made once for all calls that are alike, and remembered (`choose`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from . import onednn, tuned

BACKENDS = ("auto", "triton", "torch")
KERNELS = "triton"  # the candidate that is ours
ONEDNN = "onednn"  # PyTorch's, but its linear layers by oneDNN


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown back end {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


_requested = _checked(os.environ.get("FASTVIT_BACKEND", "auto"), "FASTVIT_BACKEND")
_has_triton = importlib.util.find_spec("triton") is not None


def use_backend(name: str) -> tuned.Setting:
    """Run every op on back end `name`, "auto", "triton" or "torch", from now on, or in the `with` body.

    The choice is the process's, not the thread's. Asked for "triton", an op that the kernels do not support raises a
    RuntimeError with all the reasons instead of falling back, and no product is the library's. Raises ValueError for an
    unknown name.
    """
    before = _requested
    _set_requested(_checked(name, "use_backend"))
    return tuned.Setting(lambda: _set_requested(before), lambda: use_backend(name))


def _set_requested(name: str) -> None:
    global _requested
    _requested = name
    tuned.changed()


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
    of that back end ("triton", "torch" or, of PyTorch's, "sdpa flash"), and on what evidence it was chosen; on the
    kernels a line for each launch."""

    op: str
    backend: str
    reasons: tuple[str, ...]
    candidate: str
    evidence: tuple[str, ...]
    launches: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"{self.op}: {self.candidate}" + (", because" if self.reasons else "")
        lines = [f"\n  measured: {line}" for line in self.evidence] + [f"\n  launch: {line}" for line in self.launches]
        return "\n  - ".join([head, *self.reasons]) + "".join(lines)


_ON_CPU = "the tensors are on the CPU, where kernels run only in the interpreter, when back end 'triton' is asked for"


def torch_without_question(device_type: str) -> str | None:
    """Why an op on this type of device runs in PyTorch whatever its arguments, or None when those decide."""
    if _requested == "torch":
        return "back end 'torch' was asked for"
    if _requested == "auto" and device_type == "cpu":
        return _ON_CPU
    return None


def may_fuse_blocks(x: torch.Tensor) -> bool:
    """Whether a block is asked for as one op: wherever the kernels are not out of the question, and by who watches."""
    return torch_without_question(x.device.type) is None or _watcher is not None


def onednn_pays(op: Op, args: tuple) -> bool:
    """Whether a call on the CPU under "auto" runs on oneDNN: in inference mode, all in float32, of an op that has it,
    where it was measured to be faster in this process."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    return (
        op.onednn is not None
        and _requested == "auto"
        and not torch.compiler.is_compiling()
        and torch.is_inference_mode_enabled()
        and not (transforming() or autocasting(args[0]))
        and torch._C._get_tracing_state() is None
        and all(
            type(t) in _PLAIN and t.dtype == torch.float32 and t.device.type == "cpu" and t.numel() for t in tensors
        )
        and onednn.speedup() > onednn.GAIN
    )


def measured_candidate(device: torch.device, key: str) -> str | None:
    """The candidate that was measured to be the fastest for calls of this key (see `ops.Op.key`), if any was. Called
    by the compiler itself, once, when it traces an op: a table is no part of a graph."""
    found = tuned.table(device).ops.get(key)
    return found and found[0].choice


# As torch.compiler.assume_constant_result does, which takes a second to import the compiler.
measured_candidate._dynamo_marked_constant = True


def evidence(device: torch.device, key: str) -> tuple[str, ...]:
    """What there is to say for the candidate of a call on `device`: the times, and where they are from."""
    if tuned.mode() == "off":
        return ("nothing: tuning is off, heuristics decide",)
    found = tuned.table(device).ops.get(key)
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


# ---------------------------------------------------------------------------------------------------------------------
# Ops


class _Nothing:
    """In place of an autograd.Function's ctx where no backward pass can come: keeps nothing."""

    def save_for_backward(self, *tensors) -> None:
        pass

    def __setattr__(self, name: str, value) -> None:
        pass


@dataclass(eq=False)
class Op:
    """One op: functions of the same arguments, all, in order.

    check raises ValueError or TypeError for arguments that no back end takes; unsupported lists every reason why the
    kernels cannot take them; torch runs it in PyTorch. On the kernels it is function, applied to what prepare makes of
    the arguments. product, of an op that makes matrix products: their dtype. others: further ways to run it in PyTorch,
    by name, that may be measured against the rest. onednn: on a CPU by oneDNN's linear layers.
    """

    name: str
    check: Callable[..., None]
    unsupported: Callable[..., list[str]]
    torch: Callable[..., torch.Tensor]
    function: type[torch.autograd.Function]
    prepare: Callable[..., tuple]
    product: Callable[..., torch.dtype] | None = None
    others: dict[str, Callable[..., torch.Tensor]] = field(default_factory=dict)
    onednn: Callable[..., torch.Tensor] | None = None

    def __post_init__(self):
        OPS[self.name] = self
        self.parameters = tuple(inspect.signature(self.check).parameters)
        self._without_gradient = partial(self.function.forward, _Nothing())

    def candidates(self, args: tuple) -> dict[str, Callable[..., torch.Tensor]]:
        """Every way to run a call, by name, ours first."""
        return {KERNELS: self.kernels, "torch": self.torch, **self.others}

    def kernels(self, *args) -> torch.Tensor:
        """The call on the kernels."""
        return self.function.apply(*self.prepare(*args))

    def unmeasured(self, args: tuple) -> tuple[str, str]:
        """The candidate under "auto" where nothing was measured, and why it is not all kernels."""
        if self.product is not None and self.product(*args) == torch.float32:
            return "torch", "no measurement says that the kernels' products are faster in float32"
        return KERNELS, ""

    def is_random(self, args: tuple) -> bool:
        """Whether a call draws dropout: its results cannot be compared, so it is not measured."""
        return "dropout_p" in self.parameters and args[self.parameters.index("dropout_p")] > 0

    def key(self, args: tuple) -> str:
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
            elif value is None or isinstance(value, (str, int)):
                parts.append("-" if value is None else str(value))
        if autocasting(args[0]):
            parts.append(f"autocast={str(torch.get_autocast_dtype(args[0].device.type)).removeprefix('torch.')}")
        return " ".join(parts)

    def explain(self, *args) -> Explanation:
        """What a call would do under "auto", and why; under "triton", a call for which there are reasons raises them.
        Raises what `check` raises."""
        self.check(*args)
        device = args[0].device
        at_once = torch_without_question(device.type)
        if at_once and onednn_pays(self, args):
            speed = f"oneDNN multiplies float32 {onednn.speedup():.2f} times as fast as PyTorch's own product here"
            return Explanation(self.name, "torch", (at_once,), ONEDNN, (speed,))
        if reasons := ([at_once] if at_once else []) + self.unsupported(*args):
            return Explanation(self.name, "torch", tuple(reasons), "torch", ())
        if _requested != "auto":
            return Explanation(self.name, KERNELS, (), KERNELS, ())
        if self.is_random(args):
            found = ("nothing for calls with dropout: heuristics decide",)
        elif _strided(args):
            found = ("nothing for tensors that are not contiguous: heuristics decide",)
        else:
            found = evidence(device, self.key(args))
        unmeasured, why = self.unmeasured(args)
        name = unmeasured if self.is_random(args) else _follow_table(self, args)
        if name != unmeasured:
            why = f"{name} was measured to be faster"
        backend = KERNELS if name == KERNELS else "torch"
        return Explanation(self.name, backend, () if name == KERNELS else (why,), name, found)


OPS: dict[str, Op] = {}  # every op, by name; filled as the ops are made


def choose(op: Op, args: tuple) -> tuple[Callable[..., torch.Tensor], tuple]:
    """What runs a call of `op`, and the arguments that it takes. Raises what the op's check raises, and RuntimeError
    with every reason where "triton" was asked for and the kernels cannot take the call."""
    alike = _alike(op, args)
    if alike is None and not torch.compiler.is_compiling():
        args = tuple([a.resolve_neg() if isinstance(a, torch.Tensor) and a.is_neg() else a for a in args])
    try:
        decision = None if alike is None else _decisions.get(alike)
    except TypeError:  # of what cannot be hashed
        alike = decision = None
    if decision is None:
        name = _decide(op, args)
        gradient = torch.compiler.is_compiling() or needs_grad(*[a for a in args if isinstance(a, torch.Tensor)])
        if name == KERNELS:
            decision = (op.function.apply if gradient else op._without_gradient), op.prepare
        else:
            decision = {"torch": op.torch, ONEDNN: op.onednn, **op.others}[name], None
        # What may be measured is asked for again.
        if alike is not None and tuned.mode() != "measure":
            if len(_decisions) >= REMEMBERED:
                _decisions.clear()
            _decisions[alike] = decision
    if _watcher is not None:
        _watcher(op, args)
    run, prepare = decision
    return run, args if prepare is None else prepare(*args)


REMEMBERED = 4096  # decisions that are kept; then all are forgotten
_decisions: dict[tuple, tuple] = {}
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def forget() -> None:
    """Have every decision made anew: something that decisions follow has changed."""
    _decisions.clear()


tuned.on_change(forget)


def _alike(op: Op, args: tuple) -> tuple | None:
    """What a decision depends on; None where it must not be remembered: while something traces, whose shapes may be
    symbols, and for tensors whose memory does not hold their numbers as they are."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return None
    first = args[0]
    parts: list = [op.name, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), transforming()]
    for value in args:
        kind = type(value)
        if kind in _PLAIN:
            if value.layout is not torch.strided or value.is_neg():
                return None
            parts += (value.shape, value.dtype, value.device, value.requires_grad, value.is_contiguous())
            if value is first:
                parts.append("first")
        elif value is None:
            parts.append(None)
        elif isinstance(value, torch.Tensor):
            return None
        else:
            parts += (kind, *map(type, value), *value) if kind in (tuple, list) else (kind, value)
    autocast = first.device.type if isinstance(first, torch.Tensor) else ""
    if autocast in _AUTOCAST and torch.is_autocast_enabled(autocast):
        parts.append(torch.get_autocast_dtype(autocast))
    return tuple(parts)


def _decide(op: Op, args: tuple) -> str:
    """The candidate for a call."""
    op.check(*args)
    if torch_without_question(args[0].device.type):
        return ONEDNN if args[0].device.type == "cpu" and onednn_pays(op, args) else "torch"
    if reasons := op.unsupported(*args):
        if _requested == "triton":
            raise RuntimeError(f"back end 'triton' was asked for, but {op.name} cannot run on it: {'; '.join(reasons)}")
        return "torch"
    device = args[0].device
    tracing = torch.compiler.is_compiling() or isinstance(args[0], FakeTensor)
    if op.is_random(args):
        return KERNELS if _requested != "auto" else op.unmeasured(args)[0]
    if _tuner is not None and tuned.mode() == "measure" and not tracing and can_measure(device):
        _tuner(op, args)
    return KERNELS if _requested != "auto" else _follow_table(op, args)


def _follow_table(op: Op, args: tuple) -> str:
    """The candidate that was measured to be the fastest, if any was."""
    device = args[0].device
    tracing = torch.compiler.is_compiling() or isinstance(args[0], FakeTensor)
    unmeasured, _ = op.unmeasured(args)
    # Tables are read while tracing too, but by `measured_candidate` alone, which the compiler does not look into.
    if tuned.mode() == "off" or not (tracing or tuned.table(device).choices.get(op.name, set()) - {unmeasured}):
        return unmeasured
    if _strided(args) or (tracing and not _static(args)):
        return unmeasured
    name = measured_candidate(device, op.key(args))
    return name if name in op.candidates(args) else unmeasured


def _strided(args: tuple) -> bool:
    """Whether a tensor is not dense, as all that were measured are."""
    return not all(a.is_contiguous() for a in args if isinstance(a, torch.Tensor))


def _static(args: tuple) -> bool:
    """Whether all sizes are known while tracing: a graph for any size cannot follow what was measured at one."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # slow to import, but the compiler has done it

    return all(has_static_value(size) for a in args if isinstance(a, torch.Tensor) for size in a.shape)


_tuner: Callable[[Op, tuple], None] | None = None
_watcher: Callable[[Op, tuple], None] | None = None


def set_tuner(tuner: Callable[[Op, tuple], None]) -> None:
    """Have tuner(op, args) called before a call that may be measured now, with FASTVIT_TUNING=measure."""
    global _tuner
    _tuner = tuner


@contextlib.contextmanager
def watching(callback: Callable[[Op, tuple], None]) -> Iterator[None]:
    """In the `with` body, callback(op, args) is called at every call of an op, before it runs."""
    global _watcher
    before, _watcher = _watcher, callback
    try:
        yield
    finally:
        _watcher = before


_AUTOCAST = frozenset(("cuda", "cpu", "mps", "xpu"))


_stood_for = threading.local()  # .device_type, if any


@contextlib.contextmanager
def standing_for(device_type: str) -> Iterator[None]:
    """In the `with` body this thread's tensors without memory follow the autocast of a type of device."""
    _stood_for.device_type = device_type
    try:
        yield
    finally:
        del _stood_for.device_type


def autocast_device(x: torch.Tensor) -> str:
    """The type of device whose autocast x follows."""
    device = x.device.type
    return device if device != "meta" else getattr(_stood_for, "device_type", device)


def autocasting(x: torch.Tensor) -> bool:
    """Whether autocast is on for x's device and would cast what goes into a linear layer."""
    device = autocast_device(x)
    return device in _AUTOCAST and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def is_drawn(value) -> bool:
    """Whether it is a tensor whose numbers do not matter to what a call launches: not one of where sequences begin."""
    return isinstance(value, torch.Tensor) and value.dtype not in (torch.int32, torch.int64)


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward pass through these tensors may come."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)

"""Calls of a launcher that are alike are replayed.

A launcher chooses configs, allocates and launches: several microseconds of Python for each allocation, and tens for
each launch, where Triton binds and specialises anew. All of it follows from the dtypes, shapes, strides and alignment
of its tensors, and from its other arguments. So of the second call that is alike in these, it is noted what is done
with memory (allocations, launches, PyTorch's operators), and written down as a Python function
without a branch, which later calls run; small tensors that only launches see share one allocation there. That relies on
three things in Triton:

- `JITFunction.run` returns the compiled kernel that it launched, and launches it by the very call that is written here;
- a kernel is specialised on nothing but what the key holds: of a pointer the dtype and whether 16 divides it (only such
  as 16 divides are replayed), of an integer its value, of a float nothing;
- a compiled kernel's launcher takes an address in place of a tensor.

Where the first cannot be seen in Triton's source, on AMD, whose kernels depend on the size of a tensor too, in the
interpreter, and while a profiler or a tuner listens, every launch is Triton's own. What the environment tells Triton of
compiling counts when a call is noted.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .._math import float32_precision
from . import choice, launcher

_CALL = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata, "
    "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values()) return kernel"
)
_RUN = JITFunction.run
_kernel_hooks: list[list] = []  # of each kernel that was noted
_SET = knobs.runtime.__dict__, knobs.compilation.__dict__  # knobs that the program set
_HOOKS = [getattr(type(knobs.runtime), name, None) for name in ("launch_enter_hook", "launch_exit_hook")]
try:
    _KNOWN = _CALL in " ".join(inspect.getsource(_RUN).split()) and all(hasattr(hook, "calls") for hook in _HOOKS)
except (OSError, TypeError):  # Triton without its source
    _KNOWN = False
_KNOWN = _KNOWN and inspect.unwrap(_RUN) is _RUN and not knobs.runtime.interpret

_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
REMEMBERED = 512  # programs of a launcher that are kept; then all are forgotten
SMALL = 8 << 20  # bytes of a tensor that is not worth an allocation of its own
_CALLED, _UNKNOWN = "called once", "does what is not known"  # in place of a program

_EMPTY = [
    getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
]


def replaying(function: Callable) -> Callable:
    """`function`, a launcher that returns a tensor, or a tuple of tensors and None, with its calls replayed."""
    programs: dict[tuple, Callable | str] = {}
    choice.on_change(programs.clear)  # configs are part of a program

    @functools.wraps(function)
    def call(*args):
        if not _KNOWN or JITFunction.run is not _RUN or choice.watched() or _listening():
            return function(*args)
        key, tensors = [], []
        for arg in args:
            if arg is None:
                key.append(None)
            elif type(arg) in _TENSORS:
                tensors.append(arg)
                key += (arg.dtype, arg.shape, arg.is_contiguous() or arg.stride())
            elif isinstance(arg, torch.Tensor):
                return function(*args)
            else:
                key += (type(arg), tuple(arg) if type(arg) is list else arg)
        addresses = [tensor.data_ptr() for tensor in tensors]
        driver, device = triton.runtime.driver.active, tensors[0].device
        current = driver.get_current_device()
        if functools.reduce(operator.or_, addresses) & 15 or device.index not in (None, current):
            return function(*args)
        shared = None if len(set(addresses)) == len(addresses) else tuple(map(addresses.index, addresses))
        key = (*key, shared, device, current, driver, float32_precision())
        program = programs.get(key)
        if callable(program):
            return program(tensors, addresses, driver.get_current_stream(current))
        if program == _CALLED:
            recorder, before = _Recorder(tensors), choice.changes()
            found = recorder.record(function, args)
            program = recorder.program(found, len(tensors), function.__name__) or _UNKNOWN
            if choice.changes() == before and not _listening():
                programs[key] = program
            return found
        if program is None:
            if len(programs) >= REMEMBERED:
                programs.clear()
            programs[key] = _CALLED
        return function(*args)

    call.programs = programs
    return call


def _listening() -> bool:
    """Whether a profiler wants to be told of launches, or the program has told Triton to compile otherwise."""
    if not (_SET[0] or _SET[1]):  # reading knobs takes longer
        return bool(_HOOKS[0].calls or _HOOKS[1].calls or any(_kernel_hooks))
    runtime = knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)  # each a chain of hooks, one hook, or None
    heard = any(getattr(hook, "calls", hook) for hook in hooks) or any(_kernel_hooks)
    stages = getattr(runtime, "add_stages_inspection_hook", None)
    return bool(heard or stages or runtime.debug or knobs.compilation.instrumentation_mode)


class _Owner(NamedTuple):
    """A tensor that was given (x0, x1, ...) or made (t0, t1, ...); from its first byte in its storage to its last."""

    name: str
    at: int
    end: int
    geometry: tuple
    dense: bool


def _geometry(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tuple(tensor.shape), tensor.stride()


def _first_byte(tensor: torch.Tensor) -> int:
    return tensor.storage_offset() * tensor.element_size()


class _Recorder(TorchDispatchMode):
    """Notes what is done with memory while a launcher runs, a line of Python each. The address of t0 is pt0."""

    def __init__(self, given: list[torch.Tensor]):
        super().__init__()
        self.known = True  # whether the lines say all that was done
        self._lines: list[str] = []
        self._like = given[0]
        self._constants: dict[str, object] = {"descriptor": _descriptor}
        self._named: dict[int, str] = {}
        self._numbers = 0  # tensors that have a name
        self._empty: dict[str, tuple[int, int]] = {}  # made without values: on which line, and bytes
        self._owners: dict[int, list[_Owner]] = {}  # by the identity of their storage
        self._storages: list[StorageWeakRef] = []  # while these are held, no other storage has such an identity
        for number, tensor in enumerate(given):
            self._own(tensor, f"x{number}")

    def record(self, function: Callable, args: tuple):
        """function(*args), noted."""
        launcher.here.recorder = self._launched
        try:
            with self:
                return function(*args)
        finally:
            launcher.here.recorder = None

    def program(self, found, given: int, name: str) -> Callable | None:
        """The call that was noted, of `given` tensors, and returned `found`, as a function of these tensors, their
        addresses and the stream; None where not all is known."""
        one = isinstance(found, torch.Tensor)
        results = ", ".join(map(self._value, [found] if one else found))
        lines = [*self._lines, f"return {results}" + ("" if one else ",")]
        last = {made: number for number, line in enumerate(lines) for made in re.findall(r"\bp?(t\d+)\b", line)}
        places, size = self._workspace(lines, last)
        for made, number in last.items():
            if made in places:
                lines[self._empty[made][0]] = f"p{made} = workspace + {places[made]}"
            elif number < len(lines) - 1:
                lines[number] += f"; del {made}"
        if places:
            whole = f"x0.new_empty_strided(({size},), (1,), dtype={self._constant(torch.uint8)})"
            lines.insert(0, f"whole = {whole}; workspace = whole.data_ptr()")
        inputs = [f"x{number}" for number in range(given)]
        body = [f"[{', '.join(inputs)}] = tensors", f"[{', '.join('p' + name for name in inputs)}] = addresses", *lines]
        source = "\n    ".join(["def program(tensors, addresses, stream):", *body])
        if not self.known:
            return None
        exec(compile(source, f"<{name}, replayed>", "exec"), self._constants)
        return self._constants.pop("program")  # no circle: what is forgotten is free

    def _workspace(self, lines: list[str], last: dict[str, int]) -> tuple[dict[str, int], int]:
        """Where in one workspace the small tensors are that only launches see, and its bytes. last: the line on which
        each is read last; before a tensor that is made after it may have its place."""
        placed: list[tuple[int, int, int]] = []  # from byte to byte, until line
        places = {}
        for name, (number, size) in self._empty.items():
            others = lines[:number] + lines[number + 1 :]
            if size > SMALL or any(re.search(rf"\b{name}\b", line) for line in others):
                continue
            at = 0
            for start, end, until in sorted(placed):
                if until >= number and start < at + size:
                    at = end
            placed.append((at, at + size, last[name]))
            places[name] = at
        return places, max((end for _, end, _ in placed), default=0)

    def _launched(self, kernel: JITFunction, compiled, grid: tuple, args: tuple, constants: dict) -> None:
        if type(compiled) is not CompiledKernel or compiled.metadata.target.backend != "cuda":
            self.known = False
            return
        if not any(kernel.pre_run_hooks is hooks for hooks in _kernel_hooks):
            _kernel_hooks.append(kernel.pre_run_hooks)
        self._constant(compiled)  # the newest Triton unloads one that nobody holds
        how = map(self._constant, (compiled.function, compiled.packed_metadata, None, None, None))
        tail = [self._constant(constants[name]) for name in kernel.arg_names[len(args) :]]
        values = [*map(str, grid), "stream", *how, *map(self._argument, args), *tail]
        self._lines.append(f"{self._constant(compiled.run)}({', '.join(values)})")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(part, torch.Tensor):
                    self._owners_of(part)
        found = function(*args, **kwargs)
        values = (found,) if isinstance(found, torch.Tensor) else found
        if not isinstance(values, (tuple, list)) or not all(isinstance(value, torch.Tensor) for value in values):
            self.known = False
            return found
        new = [value.untyped_storage()._cdata not in self._owners for value in values]
        if not any(new) and not function._schema.is_mutable:
            return found  # a view
        if all(new) and function.overloadpacket in _EMPTY:
            dtype, shape, strides = _geometry(found)
            self.known = self.known and found.device == self._like.device
            how = "" if dtype == self._like.dtype else f", dtype={self._constant(dtype)}"
            call = f"x0.new_empty_strided({shape}, {strides}{how})"  # the quickest way
            self._empty[f"t{self._numbers}"] = len(self._lines), -(-found.untyped_storage().nbytes() // 256) * 256
        else:
            given = [*map(self._value, args), *[f"{name}={self._value(value)}" for name, value in kwargs.items()]]
            # What is noted is past autocast, which a replay may be under.
            call = f"{self._constant(_past_autocast(function))}({', '.join(given)})"
        if any(new):
            made = [self._own(value, f"t{self._numbers}") for value in values]
            left = made[0] if isinstance(found, torch.Tensor) else f"[{', '.join(made)}]"
            call = "; ".join([f"{left} = {call}", *[f"p{name} = {name}.data_ptr()" for name in made]])
        self._lines.append(call)
        return found

    def _own(self, tensor: torch.Tensor, name: str) -> str:
        self._numbers += 1
        storage = tensor.untyped_storage()
        self._storages.append(StorageWeakRef(storage))
        dtype, shape, strides = _geometry(tensor)
        last = sum([(size - 1) * stride for size, stride in zip(shape, strides, strict=True)])
        at, size = _first_byte(tensor), (1 + last) * dtype.itemsize if tensor.numel() else 0
        owner = _Owner(name, at, at + size, (dtype, shape, strides), tensor.is_contiguous())
        self._owners.setdefault(storage._cdata, []).append(owner)
        return name

    def _owners_of(self, tensor: torch.Tensor) -> list[_Owner]:
        """The tensors that share memory with this one. Memory that was neither given nor made was there before: a
        constant, which the program holds."""
        storage = tensor.untyped_storage()._cdata
        if storage not in self._owners:
            name = self._own(tensor, f"k{self._numbers}")
            self._constants |= {name: tensor, f"p{name}": tensor.data_ptr()}
        return self._owners[storage]

    def _owner(self, tensor: torch.Tensor) -> tuple[_Owner, int]:
        """Of what a tensor is a part, and from which byte on."""
        at, sharing = _first_byte(tensor), self._owners_of(tensor)
        owners = [owner for owner in sharing if owner.at <= at < owner.end]
        owners = owners or [owner for owner in sharing if owner.at == at]  # empty ones, of which nothing is read
        if not owners or any(owner.at != owners[0].at for owner in owners):  # a part of which of several that overlap?
            self.known = False
            return _Owner("x0", 0, 0, (), False), 0
        return owners[0], at - owners[0].at

    def _constant(self, value) -> str:
        if value is None or type(value) in (int, bool):
            return repr(value)
        name = self._named.setdefault(id(value), f"c{len(self._named)}")
        self._constants[name] = value  # which keeps it, and its id
        return name

    def _argument(self, value) -> str:
        """What a launch is given for `value`."""
        if isinstance(value, tuple):
            return f"({''.join([self._argument(part) + ', ' for part in value])})"
        if isinstance(value, TensorDescriptor):
            return f"descriptor({self._constant(vars(value) | {'base': None})}, {self._argument(value.base)})"
        if not isinstance(value, torch.Tensor):
            return self._constant(value)
        owner, first = self._owner(value)
        self.known = self.known and first % 16 == 0
        return f"p{owner.name} + {first}" if first else f"p{owner.name}"

    def _value(self, value) -> str:
        """What an operator of PyTorch's is given, or the caller is returned, for `value`."""
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(map(self._value, value))}]"
        if not isinstance(value, torch.Tensor):
            return self._constant(value)
        owner, first = self._owner(value)
        if owner.geometry == _geometry(value) and not first:
            return owner.name
        dtype, shape, strides = _geometry(value)
        self.known = self.known and owner.geometry[:1] == (dtype,)
        if owner.dense and value.is_contiguous() and value.numel() == math.prod(owner.geometry[1]):
            return f"{owner.name}.view({shape})"
        offset = f"{owner.name}.storage_offset() + {first // dtype.itemsize}"
        return f"{owner.name}.as_strided({shape}, {strides}, {offset})"


@functools.cache
def _past_autocast(function: Callable) -> Callable:
    def call(*args, **kwargs):
        with torch._C._DisableAutocast():
            return function(*args, **kwargs)

    return call


class _At:
    """In place of a tensor where only its address is asked for."""

    __slots__ = ("_address",)

    def __init__(self, address: int):
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def _descriptor(like: dict, address: int) -> TensorDescriptor:
    """A TMA descriptor of the attributes `like`, unchecked, of memory at `address`."""
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(like, base=_At(address))
    return made

"""Checks every memory access of every launch in Triton's interpreter.

Bounds: each element that a lane not masked off touches must belong to one of the tensors given to the launch; the
gaps between the rows of a sliced view do not. Races: no element may be stored by one program and loaded, stored or
updated atomically by another; atomics may meet each other. Programs run one after the other here, so a race never
shows in the numbers. Programs that synchronise through atomics on purpose are reported too.
"""

from __future__ import annotations

import functools
import linecache
import os
import sys

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

# In place of a program's number, in the record of who touched an element.
_NOBODY, _SEVERAL = -1, -2

# Reads of a tensor that nothing wrote yet are only kept; so many of them are entered in the record at a time.
_KEPT_READS = 1 << 22

_NOT_KERNELS = (os.path.dirname(triton.__file__) + os.sep, os.path.dirname(__file__) + os.sep)


class KernelFault(RuntimeError):
    """A kernel touched memory it must not, or two of its programs race."""


class _View:
    """The memory of one tensor argument: bytes `start` to `end`, with gaps unless `dense`."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name = name
        self.itemsize = tensor.element_size()
        dims = sorted(((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1 and s), reverse=True)
        self.start = tensor.data_ptr()
        self.end = self.start + (1 + sum(stride * (size - 1) for stride, size in dims)) * self.itemsize
        self.dims = dims
        # Where the rows of a view overlap one another (a sliding window), the division below would not find them all.
        nested = all(s >= t * n for (s, _), (t, n) in zip(dims, dims[1:], strict=False))
        elements = int(np.prod([size for _, size in dims], dtype=np.int64))
        self.dense = not nested or elements * self.itemsize == self.end - self.start

    def holds(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Which accesses of `size` bytes lie inside the view."""
        inside = (addresses >= self.start) & (addresses + np.uint64(size) <= self.end)
        if self.dense:
            return inside
        offset = np.where(inside, addresses - np.uint64(self.start), 0).astype(np.int64) // self.itemsize
        for stride, length in self.dims:
            index = np.minimum(offset // stride, length - 1)
            offset -= index * stride
        return inside & (offset == 0)


class _Region:
    """Views that overlap, and who touched their elements."""

    def __init__(self, views: list[_View]) -> None:
        self.views = views
        self.start, self.end = min(view.start for view in views), max(view.end for view in views)
        self.itemsize = min(view.itemsize for view in views)
        self.dense = all(view.dense for view in views)
        self.name = "/".join(dict.fromkeys(view.name for view in views))
        self.kept_reads: list[tuple[np.ndarray, int, int]] = []
        self.kept_count = 0
        self.touched: dict[str, np.ndarray] = {}

    def holds(self, addresses: np.ndarray, size: int) -> np.ndarray:
        return functools.reduce(np.logical_or, (view.holds(addresses, size) for view in self.views))

    def elements(self, addresses: np.ndarray, size: int) -> np.ndarray:
        first = (addresses - np.uint64(self.start)).astype(np.int64) // self.itemsize
        width = -(-size // self.itemsize)
        return first if width == 1 else np.add.outer(np.arange(width), first).ravel()

    def keep_read(self, addresses: np.ndarray, size: int, program: int) -> None:
        self.kept_reads.append((addresses, size, program))
        self.kept_count += addresses.size
        if self.kept_count > _KEPT_READS:
            self.enter_kept_reads()

    def enter_kept_reads(self) -> None:
        for addresses, size, program in self.kept_reads:
            self.enter("load", self.elements(addresses, size), program)
        self.kept_reads, self.kept_count = [], 0

    def enter(self, action: str, elements: np.ndarray, program: int) -> None:
        """Record that `program` did `action` to `elements`."""
        if action not in self.touched:
            count = -(-(self.end - self.start) // self.itemsize)
            self.touched[action] = np.full(count, _NOBODY, np.int32)
        who = self.touched[action]
        before = who[elements]
        who[elements] = np.where((before == _NOBODY) | (before == program), program, _SEVERAL)

    def other_program(self, action: str, elements: np.ndarray, program: int) -> tuple[int, int] | None:
        """An element that another program did `action` to, and that program's number; None without one."""
        if action not in self.touched:
            return None
        who = self.touched[action][elements]
        clashes = np.flatnonzero((who != _NOBODY) & (who != program))
        return (int(elements[clashes[0]]), int(who[clashes[0]])) if clashes.size else None


# What must not meet, on one element, by two programs.
_CLASHES = {"load": ("store", "update"), "store": ("store", "load", "update"), "update": ("store", "load")}


class _Launch:
    """The launch under way: its tensors and the program that runs."""

    def __init__(self, kernel: str, views: list[_View], races: bool) -> None:
        self.kernel = kernel
        self.races = races
        self.programs: list[tuple[int, int, int]] = []
        self.regions: list[_Region] = []
        overlapping: list[_View] = []
        for view in sorted(views, key=lambda view: view.start):
            if overlapping and view.start >= max(v.end for v in overlapping):
                self.regions.append(_Region(overlapping))
                overlapping = []
            overlapping.append(view)
        if overlapping:
            self.regions.append(_Region(overlapping))

    def access(self, action: str, pointers, mask, size: int) -> None:
        """Check one `action` of the current program on `size` bytes at each of `pointers` where `mask` holds."""
        pointers, mask = np.asarray(pointers), np.asarray(mask, bool)
        if mask.all():
            addresses = pointers.ravel()
        else:
            pointers, mask = np.broadcast_arrays(pointers, mask)
            addresses = pointers[mask]
        if not addresses.size:
            return
        for region, inside in self._located(action, addresses, size):
            if self.races:
                self._check_race(action, region, inside, size)

    def _located(self, action: str, addresses: np.ndarray, size: int) -> list[tuple[_Region, np.ndarray]]:
        lowest, highest = int(addresses.min()), int(addresses.max()) + size
        for region in self.regions:
            if region.dense and region.start <= lowest and highest <= region.end:
                return [(region, addresses)]
        outside = np.ones(addresses.shape, bool)
        found = []
        for region in self.regions:
            inside = region.holds(addresses, size)
            if inside.any():
                found.append((region, addresses[inside]))
                outside &= ~inside
        if outside.any():
            self._out_of_bounds(action, addresses[outside])
        return found

    def _out_of_bounds(self, action: str, addresses: np.ndarray) -> None:
        first = int(addresses[0])
        views = [view for region in self.regions for view in region.views]
        if not views:
            raise self._fault(f"{action} of memory, but the launch was given no tensor with elements")
        view = min(views, key=lambda view: max(view.start - first, first - view.end, -1))
        element = (first - view.start) // view.itemsize
        where = (
            f"a gap of the strided view `{view.name}`, {element} elements after its start"
            if view.start <= first < view.end
            else f"element {element} of `{view.name}`, which spans {(view.end - view.start) // view.itemsize}"
        )
        raise self._fault(f"{action} out of bounds of {addresses.size} element(s), the first being {where}")

    def _check_race(self, action: str, region: _Region, addresses: np.ndarray, size: int) -> None:
        program = len(self.programs) - 1
        if action == "load" and not ({"store", "update"} & region.touched.keys()):
            region.keep_read(addresses, size, program)
            return
        region.enter_kept_reads()
        elements = region.elements(addresses, size)
        for other_action in _CLASHES[action]:
            clash = region.other_program(other_action, elements, program)
            if clash is not None:
                element, other = clash
                who = "several programs" if other == _SEVERAL else f"program {self.programs[other]}"
                what = "an update" if other_action == "update" else f"a {other_action}"
                raise self._fault(f"race, {action} of element {element} of `{region.name}` after {what} by {who}")
        region.enter(action, elements, program)

    def _fault(self, what: str) -> KernelFault:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_KERNELS):
            frame = frame.f_back
        path, line = frame.f_code.co_filename, frame.f_lineno
        source = linecache.getline(path, line).strip()
        program = self.programs[-1]
        return KernelFault(f"{self.kernel}, program {program}: {what} [{os.path.basename(path)}:{line}: {source}]")


def _views(name: str, argument) -> list[_View]:
    if isinstance(argument, tuple):
        return [view for i, item in enumerate(argument) for view in _views(f"{name}[{i}]", item)]
    if isinstance(argument, interpreter.TensorDescriptor):
        argument = argument.base
    argument = interpreter._unwrap_tensor(argument)
    return [_View(name, argument)] if isinstance(argument, torch.Tensor) and argument.numel() else []


class _CheckedMemory:
    """Triton's native load and store functions, each access checked against the launch under way first."""

    def __init__(self, native) -> None:
        self._native = native
        self.launch: _Launch | None = None

    def __getattr__(self, name: str):
        return getattr(self._native, name)

    def load(self, pointers, mask, other, dtype):
        self.launch.access("load", pointers, mask, np.dtype(dtype).itemsize)
        return self._native.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        self.launch.access("store", pointers, mask, value.itemsize)
        return self._native.store(pointers, value, mask)

    def atomic_rmw(self, operation, pointers, value, mask, semantic):
        self.launch.access("update", pointers, mask, value.itemsize)
        return self._native.atomic_rmw(operation, pointers, value, mask, semantic)

    def atomic_cas(self, pointers, compare, value, semantic):
        self.launch.access("update", pointers, True, value.itemsize)
        return self._native.atomic_cas(pointers, compare, value, semantic)


def _poison(dtype: np.dtype, triton_dtype: tl.dtype):
    if triton_dtype == tl.bfloat16:
        return 0x7FC0
    if dtype.kind == "f":
        return np.nan
    return True if dtype.kind == "b" else np.iinfo(dtype).max


def sanitize_launches(races: bool) -> None:
    """Check every launch in the interpreter, which `repair` must have checked, for the rest of the process."""
    memory = interpreter._interpreter = _CheckedMemory(interpreter._interpreter)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    builder.set_grid_idx = _counting_programs(builder.set_grid_idx, memory)
    builder.create_masked_load = _leaving_undefined(builder.create_masked_load)
    executor.__call__ = _sanitized(executor.__call__, memory, races)


def _counting_programs(original, memory: _CheckedMemory):
    def set_grid_idx(self, x, y, z):
        memory.launch.programs.append((x, y, z))
        original(self, x, y, z)

    return set_grid_idx


def _leaving_undefined(original):
    """A GPU leaves lanes undefined that are masked off without `other=`; zeros would hide that a kernel uses them."""

    def create_masked_load(self, pointers, mask, other, *policy, **policies):
        if other is None and not np.asarray(mask.data).all():
            triton_dtype = pointers.get_element_ty()
            dtype = interpreter._get_np_dtype(triton_dtype)
            undefined = np.full(pointers.data.shape, _poison(dtype, triton_dtype), dtype)
            other = interpreter.TensorHandle(undefined, triton_dtype)
        return original(self, pointers, mask, other, *policy, **policies)

    return create_masked_load


def _sanitized(original, memory: _CheckedMemory, races: bool):
    @functools.wraps(original)
    def call(self, *args, **kwargs):
        arguments = [*zip(self.arg_names, args, strict=False), *kwargs.items()]
        views = [view for name, argument in arguments for view in _views(name, argument)]
        memory.launch = _Launch(self.fn.__name__, views, races)
        try:
            return original(self, *args, **kwargs)
        except interpreter.InterpreterError as error:
            # The interpreter wraps what a kernel raises, once for every call of a jitted helper on the way.
            cause = error
            while isinstance(cause, interpreter.InterpreterError):
                cause = cause.__cause__
            if isinstance(cause, KernelFault):
                raise cause from None
            raise
        finally:
            memory.launch = None

    return call

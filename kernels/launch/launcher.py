"""Launches kernels: through Triton the first time, then by what that prepared.

Triton's own launch binds, specialises and looks up anew at every call, which takes longer than a small kernel runs. All
of it follows from the request, the config, the dtypes and alignment of the tensors and the values of the integers; so
the compiled kernel is kept by these, and launched with new pointers. That relies on three things in Triton:

- `JITFunction.run` returns the compiled kernel that it launched, and launches it by the very call that is written here;
- a kernel is specialised on nothing but what the key holds: of a pointer the dtype and whether 16 divides it (only such
  as 16 divides are kept), of an integer its value, of a float nothing;
- a launcher takes an address in place of a tensor.

Where the first cannot be seen in Triton's source, on AMD, whose kernels depend on the size of a tensor too, in the
interpreter, and while a profiler listens, every launch is Triton's own. What the environment tells Triton of compiling
counts when a launch is prepared.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from .choice import REMEMBERED
from .request import Config, Request

_CALL = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata, "
    "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values()) return kernel"
)
_RUN = JITFunction.run
_SET = knobs.runtime.__dict__, knobs.compilation.__dict__  # knobs that the program set
_HOOKS = [getattr(type(knobs.runtime), name, None) for name in ("launch_enter_hook", "launch_exit_hook")]
try:
    _KNOWN = _CALL in " ".join(inspect.getsource(_RUN).split()) and all(hasattr(hook, "calls") for hook in _HOOKS)
except (OSError, TypeError):  # Triton without its source
    _KNOWN = False

_prepared: dict[tuple, tuple] = {}
_one_at_a_time = threading.RLock()
_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))


def launch(
    kernel: JITFunction,
    constants: Callable[[Request, Config], dict],
    request: Request,
    config: Config,
    device: torch.device,
    grid: tuple[int, int, int],
    args: tuple,
) -> None:
    """Launch kernel[grid](*args, **constants(request, config)) on `device`, where the tensors are.

    args: the kernel's arguments before its constants: tensors, numbers, None, and tuples of these. constants: its
    constants in their order, then num_warps and num_stages.
    """
    if not isinstance(kernel, JITFunction):
        with _one_at_a_time:  # the interpreter knows one launch only
            kernel[grid](*args, **constants(request, config))
        return
    driver = triton.runtime.driver.active
    current = driver.get_current_device()
    if device.index not in (None, current):
        with torch.cuda.device(device):
            return launch(kernel, constants, request, config, device, grid, args)
    key: list = [request, config, driver, current]
    bits, values = _bind(args, key)
    key, aligned = tuple(key), not bits & 15
    prepared = _prepared.get(key)
    replayable = _KNOWN and aligned and JITFunction.run is _RUN and not kernel.pre_run_hooks and not _listening()
    if prepared is not None and replayable:
        _, run, function, metadata, tail = prepared
        run(*grid, driver.get_current_stream(current), function, metadata, None, None, None, *values, *tail)
        return
    given = constants(request, config)
    compiled = kernel[grid](*args, **given)
    if replayable and type(compiled) is CompiledKernel and compiled.metadata.target.backend == "cuda":
        if len(_prepared) >= REMEMBERED:
            _prepared.clear()
        tail = tuple(given[name] for name in kernel.arg_names[len(args) :])
        _prepared[key] = compiled, compiled.run, compiled.function, compiled.packed_metadata, tail


def _listening() -> bool:
    """Whether a profiler wants to be told of launches, or the program has told Triton to compile otherwise."""
    if not (_SET[0] or _SET[1]):  # reading knobs takes longer
        return bool(_HOOKS[0].calls or _HOOKS[1].calls)
    runtime = knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)  # each a chain of hooks, one hook, or None
    heard = any(getattr(hook, "calls", hook) for hook in hooks)
    return bool(heard or runtime.debug or knobs.compilation.instrumentation_mode)


def _bind(args: tuple, key: list) -> tuple[int, tuple]:
    """All addresses or-ed together, and args with an address in place of each tensor; what a compiled kernel depends on
    is appended to the key."""
    bits, values, note = 0, [], key.append
    for arg in args:
        kind = type(arg)
        if kind in _TENSORS:
            note(arg.dtype)
            arg = arg.data_ptr()
            bits |= arg
        elif kind is int or arg is None:
            note(arg)
        elif kind is tuple:
            parts = []
            for part in arg:  # as above, without a call: most arguments are parts of tuples
                kind = type(part)
                if kind in _TENSORS:
                    note(part.dtype)
                    part = part.data_ptr()
                    bits |= part
                elif kind is int or part is None:
                    note(part)
                else:
                    inner, (part,) = _bind((part,), key)
                    bits |= inner
                parts.append(part)
            arg = tuple(parts)
        elif isinstance(arg, torch.Tensor):
            note(arg.dtype)
            arg = arg.data_ptr()
            bits |= arg
        else:
            note(arg.value if kind is tl.constexpr else kind)
        values.append(arg)
    return bits, tuple(values)

"""A stand-in for an H100 on a machine without a GPU, so that what is written for a GPU runs from end to end.

Two layers. `install_driver` gives Triton a CUDA driver that does nothing (libcuda.c): kernels are specialised, compiled
for sm_90, loaded and launched by Triton's own code, and a launch only counts. `install` also has PyTorch find a GPU:
tensors "on cuda" are meta tensors that say otherwise, so that they take no memory and no time, and torch.cuda's events
tell an invented time, the same in every run. Nothing is computed: numbers read back from such a tensor are zeros, and
comparisons hold. So it finds what breaks before a kernel starts or between two of them, and no wrong result.

With this folder on PYTHONPATH it is in every Python process (sitecustomize.py). The environment makes faults:

    STUB_GPU_FAULT="illegal:REGEX;hang:REGEX;..."   what a launch that matches does: it leaves the process without its
                                                    GPU, as an illegal memory access does, or never ends
    STUB_GPU_COMPILE=no                             kernels are parsed and specialised, not compiled
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
import zlib
from pathlib import Path

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler, driver

NAME = "Stub H100"
# What the invented time is made of: a kernel of ours takes half to one and a half times what its tensors do.
LAUNCH_SECONDS, BYTES_PER_S, FLOPS_PER_S = 5e-6, 3e12, 7e14
GPU, NOWHERE = torch.device("cuda", 0), torch.device("meta")


class State:
    """The GPU of this process: its clock in seconds, how many of our kernels it was given, whether a fault took it, and
    the graph that is being captured."""

    seconds, launches, lost, graph = 0.0, 0, False, None
    faults = [fault.partition(":")[::2] for fault in os.environ.get("STUB_GPU_FAULT", "").split(";") if fault]


def work(seconds: float) -> None:
    """Let the GPU do something that takes so long."""
    if State.lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if State.graph is None:
        State.seconds += seconds
    else:
        State.graph.seconds += seconds


def seconds(value, flops: float = 0.0) -> float:
    """The invented time of something done with all tensors in `value`."""
    return LAUNCH_SECONDS + max(_bytes(value) / BYTES_PER_S, flops / FLOPS_PER_S)


def _bytes(value) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, (tuple, list)) else 0


def synchronize(*_) -> None:
    work(0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Triton's driver


def build() -> Path:
    """The folder with the driver that does nothing, compiled once for each version of its source."""
    source = Path(__file__).with_name("libcuda.c")
    folder = Path(tempfile.gettempdir()) / f"stub-gpu-{os.getuid()}-{zlib.crc32(source.read_bytes()):08x}"
    target = folder / "libcuda.so.1"
    if not target.exists():
        folder.mkdir(exist_ok=True)
        made = folder / f"{os.getpid()}.so"
        command = ["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", made, source]
        subprocess.run(command, check=True)
        made.replace(target)
    return folder


class Launcher(driver.CudaLauncher):
    """Triton's own, which also says what it launches: the kernel's name and constants."""

    def __init__(self, src, metadata):
        super().__init__(src, metadata)
        names, constants = src.fn.arg_names, []
        for key, value in src.constants.items():
            name = names[key[0]] if isinstance(key, tuple) else key
            constants.append(f"{name}={getattr(value, '__name__', value)}")
        options = f"num_warps={metadata.num_warps} num_stages={metadata.num_stages}"
        self.description = " ".join([src.fn.__name__, *constants, options])
        self.factor = 0.5 + (zlib.crc32(self.description.encode()) & 0xFFFF) / 0x10000
        self.seconds = 0.0

    def __call__(self, *args):
        # Only a kernel's first launch is given its tensors, later ones their addresses.
        self.seconds = max(self.seconds, seconds(args))
        work(self.factor * self.seconds)
        State.launches += 1
        super().__call__(*args)
        for kind, pattern in State.faults:
            if re.search(pattern, self.description):
                if kind == "hang":  # as a wait for CUDA does, it hears of no Ctrl-C
                    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                    time.sleep(1e6)
                State.lost = True


class Driver:
    launcher_cls = Launcher

    def __init__(self):
        self.utils = driver.CudaUtils()

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return GPU


def install_driver() -> None:
    """Have Triton launch on the driver that does nothing."""
    folder = build()
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    ctypes.CDLL(str(folder / "libcuda.so.1"), ctypes.RTLD_GLOBAL)  # found by its name from now on
    triton.runtime.driver.set_active(Driver())
    if os.environ.get("STUB_GPU_COMPILE") == "no":
        os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")  # no real launch may find such a kernel
        compiler.CUDABackend.add_stages = _no_stages


def _no_stages(self, stages, options, language=None) -> None:
    """In place of the compiler's stages: a binary that holds nothing, and what loading it asks for."""

    def binary(module, metadata) -> bytes:
        names = re.findall(r"tt\.func public @(\w+)", str(module))
        scratch = {f"{kind}_scratch_{what}": 0 for kind in ("global", "profile") for what in ("size", "align")}
        metadata.update(name=names[0], shared=1024, tmem_size=0, **scratch)
        return b"nothing"

    stages["ttir"] = lambda module, metadata: module
    stages["cubin"] = binary


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch's GPU


class Event:
    def __init__(self, enable_timing: bool = False):
        self.seconds = 0.0

    def record(self, *_) -> None:
        self.seconds = State.seconds

    def synchronize(self) -> None:
        synchronize()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * max(end.seconds - self.seconds, 1e-6)


class Stream:
    cuda_stream = 0

    def __init__(self, *_, **__):
        pass

    def wait_stream(self, other) -> None:
        pass

    wait_event = wait_stream

    synchronize = staticmethod(synchronize)


class Generator(torch.Generator):
    def __new__(cls, device=None):
        return super().__new__(cls, "cpu")


class CUDAGraph:
    def __init__(self):
        self.seconds = 0.0

    def replay(self) -> None:
        work(self.seconds)

    def pool(self):
        return (0, 0)

    def reset(self) -> None:
        pass


@contextlib.contextmanager
def graph(captured: CUDAGraph, pool=None, stream=None, **_):
    before, State.graph = State.graph, captured
    try:
        yield
    finally:
        State.graph = before


def _properties(*_):
    return types.SimpleNamespace(
        name=NAME,
        major=9,
        minor=0,
        total_memory=80 << 30,
        multi_processor_count=132,
        L2_cache_size=50 << 20,
        uuid="stub",
    )


def _torch_cuda() -> dict[str, object]:
    """What is put in place of torch.cuda's functions and classes."""
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": _properties,
        "is_bf16_supported": lambda *_: True,
        "is_current_stream_capturing": lambda: State.graph is not None,
        "synchronize": synchronize,
        "empty_cache": lambda: None,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 1 << 20,
        "reset_peak_memory_stats": lambda *_: None,
        "mem_get_info": lambda *_: (80 << 30, 80 << 30),
        "graph_pool_handle": lambda: (0, 0),
        "current_stream": lambda *_: Stream(),
        "set_stream": lambda stream: None,
        "stream": contextlib.nullcontext,
        "device": lambda device: contextlib.nullcontext(),
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
    }


class Pretence(TorchFunctionMode):
    """Tensors that are asked for on "cuda" are made on "meta" and say that they are on "cuda". What such a tensor is
    asked for by value is zero or true."""

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == torch.Tensor.device.__get__:
            device = function(*args)
            return GPU if device == NOWHERE else device
        if function == torch.Tensor.is_cuda.__get__:
            return args[0].is_meta
        if function == torch.Tensor.is_meta.__get__:
            return False
        if function is torch.device:
            return function(*args, **kwargs)
        if op := _custom_op(function):
            with self:  # the op's own code must find a GPU too
                return op._init_fn(*args, **kwargs)
        if function is torch.Tensor.backward:
            with self:
                return torch.autograd.backward(*args, **kwargs)
        args, kwargs = tuple(_elsewhere(value) for value in args), {k: _elsewhere(v) for k, v in kwargs.items()}
        if not _on_gpu((args, kwargs)):
            return function(*args, **kwargs)
        matrices = [value for value in args if isinstance(value, torch.Tensor) and value.dim() > 1]
        flops = 2 * matrices[0].numel() * matrices[1].shape[-1] if function in _PRODUCTS and len(matrices) > 1 else 0
        work(seconds((args, kwargs), flops))
        if function in _READ:
            return _READ[function](*args)
        if function in _TO_CPU or "cpu" in (*args, kwargs.get("device")):
            found = [torch.zeros(a.shape, dtype=kwargs.get("dtype", a.dtype)) for a in args if torch.is_tensor(a)]
            return found[0]
        kwargs.pop("generator", None)
        kwargs.pop("pin_memory", None)
        try:
            return function(*args, **kwargs)
        except NotImplementedError:  # a function whose result depends on values
            return _elsewhere_deep(function(*_zeros(args), **_zeros(kwargs)))


def _custom_op(function):
    """The definition of one of fastvit's custom ops, whose fake would stand in for it on meta tensors."""
    if not isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return None
    name = getattr(function, "_qualified_op_name", None) or function._schema.name
    return torch._library.custom_ops.OPDEFS.get(name) if name.startswith("fastvit::") else None


def _elsewhere(value):
    if isinstance(value, torch.device):
        return NOWHERE if value.type == "cuda" else value
    if isinstance(value, str) and re.fullmatch(r"cuda(:\d+)?", value):
        return NOWHERE
    return value


def _elsewhere_deep(value):
    if isinstance(value, torch.Tensor):
        return value.to(NOWHERE)
    return type(value)(map(_elsewhere_deep, value)) if isinstance(value, (tuple, list)) else value


def _zeros(value):
    if isinstance(value, torch.Tensor):
        return torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value
    if isinstance(value, dict):
        return {name: _zeros(item) for name, item in value.items()}
    return type(value)(map(_zeros, value)) if isinstance(value, (tuple, list)) else value


def _on_gpu(value) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_meta
    if isinstance(value, torch.device):
        return value == NOWHERE
    if isinstance(value, dict):
        return any(map(_on_gpu, value.values()))
    return isinstance(value, (tuple, list)) and any(map(_on_gpu, value))


def _attend(q, k, v, *args, **kwargs):
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


_READ = {
    torch.Tensor.item: lambda x: torch.zeros((), dtype=x.dtype).item(),
    torch.Tensor.tolist: lambda x: torch.zeros(x.shape, dtype=x.dtype).tolist(),
    torch.Tensor.__bool__: lambda x: True,
    torch.Tensor.__float__: lambda x: 0.0,
    torch.Tensor.__int__: lambda x: 0,
    torch.equal: lambda x, y: x.shape == y.shape,
    torch.nn.functional.scaled_dot_product_attention: _attend,
}
_PRODUCTS = {torch.mm, torch.matmul, torch.addmm, torch.Tensor.matmul, torch.Tensor.__matmul__}
_TO_CPU = {torch.Tensor.cpu, torch.Tensor.numpy}


def install() -> None:
    """Have PyTorch and Triton find a GPU in this process."""
    install_driver()
    for name, value in _torch_cuda().items():
        setattr(torch.cuda, name, value)
    torch.cuda.graphs.graph, torch.cuda.graphs.CUDAGraph = graph, CUDAGraph
    torch.Generator = Generator
    torch.compile = lambda model=None, **_: model if model is not None else (lambda model: model)
    # The backward pass is to run under the mode too, and not within its own handling of `grad`.
    torch.autograd.has_torch_function = lambda *_: False
    torch.Tensor.__reduce_ex__ = _truthfully(torch.Tensor.__reduce_ex__)  # a meta tensor travels as what it is
    Pretence().__enter__()


def _truthfully(function):
    def called(*args):
        with torch._C.DisableTorchFunction():
            return function(*args)

    return called


if __name__ == "__main__":
    print(build(), file=sys.stderr)

"""What the ops launch, as JSON: run by tests/test_launch_path.py in processes of their own, because pytest's interprets
the kernels. The tensors are on the CPU, the driver does nothing (see stub_gpu.py), all between is the real thing.

    launch_ops.py launches DTYPE...    of each sample, the kernels of a forward pass, of a backward pass with everything
                                       to train, and of one with each input alone; a second DTYPE: of the wide tensors
    launch_ops.py variants BATCH...    of each sample, how many kernels were compiled once it had run, forward and
                                       backward, at this and all earlier batch sizes
    launch_ops.py replays              of each sample, the launches of a third pass that are handed what Triton's own
                                       launches of the second were, and those that are replayed
    launch_ops.py tuning               what `tune.tune_call` has compiled ahead, in threads, and what it compiles itself
    launch_ops.py frozen               of a frozen model of three blocks, for each step on the kernels, the launches
    launch_ops.py hops                 of each launch of a block's forward pass, the functions of ours on the way there
    launch_ops.py host [FILE]          of a model of 12 blocks, the launches of a pass and the host's milliseconds; also
                                       written to FILE, as `make host` does
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import statistics
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import samples
import stub_gpu
import torch
from fastvit.kernels import layer_norm
from fastvit.kernels.launch.hardware import ARCHS
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from fastvit import create_model, dispatch, nn, ops, use_backend
from fastvit.environment import environment
from fastvit.report import write_json

ROOT, ARCH = Path(__file__).parents[2], ARCHS["sm_90"]

# What may be wider than the weights: the residual stream, images, what is added to tokens or to scores.
WIDE = ("x", "residual", "image", "pos_embed", "prefix", "attn_bias")

launched: list[Recorder] = []


class Recorder(stub_gpu.Launcher):
    """There is one of each compiled kernel."""

    def __init__(self, src, metadata):
        super().__init__(src, metadata)
        self.constants = dict(part.split("=", 1) for part in self.description.split() if "=" in part)

    def __call__(self, *args):
        super().__call__(*args)
        launched.append(self)

    def __str__(self):
        """The kernel's name; of a product with its loaders, its epilogue and the dtype that it runs in."""
        name = self.description.split()[0]
        told = [
            self.constants[key] for key in ("LOAD_A", "LOAD_B", "SECTION", "EPILOGUE", "DTYPE") if key in self.constants
        ]
        return f"{name}({', '.join(told)})" if told else name


def launches(run: Callable[[], object]) -> tuple[list[Recorder], object]:
    """The launches of run(), in their order, and what it returns."""
    count = ctypes.CDLL("libcuda.so.1").stub_launches
    before = count()
    launched.clear()
    result = run()
    assert count() - before == len(launched), "what Triton was asked to launch is not what it told the driver to"
    return launched.copy(), result


def passes(sample: samples.Sample, tensors: dict[str, torch.Tensor]) -> tuple[list[Recorder], list[Recorder]]:
    """The launches of a forward and of a backward pass."""
    forward, out = launches(lambda: sample.run(tensors))
    backward, _ = launches(lambda: samples.gradients(out, tensors, torch.ones_like(out)))
    return forward, backward


def report_launches(dtype: str, wide: str | None = None) -> dict[str, dict]:
    found = {}
    for sample in samples.SAMPLES:
        if (sample.op, dtype) == ("transformer_block", "float16"):
            continue  # which the op refuses
        tensors = sample.tensors(getattr(torch, dtype))
        if wide is not None:
            wider = sample.tensors(getattr(torch, wide))
            tensors |= {name: wider[name] for name in WIDE if name in wider}
        forward, backward = passes(sample, tensors)
        explained = ops.explain(sample.op, **tensors, **sample.options).launches
        ours = [line for line in explained if ": the library" not in line]
        assert len(ours) == len(forward) + len(backward), explained
        report = found[sample.name] = {"forward": forward, "backward": backward}
        for name in [name for name, tensor in tensors.items() if tensor.requires_grad]:
            alone = {n: t.detach().requires_grad_(n == name) for n, t in tensors.items()}
            report[name] = passes(sample, alone)[1]
    return found


def report_variants(*batches: str) -> dict[str, list[int]]:
    found = {}
    for sample in samples.SAMPLES:
        if sample.op == "attention_varlen":
            continue  # which has no batch
        compiled, counts = set(), []
        for batch in map(int, batches):
            tensors = sample.tensors(torch.bfloat16)
            for name in samples.BATCHED:
                if name in tensors:
                    one = tensors[name].detach()[:1]
                    tensors[name] = torch.cat(batch * [one]).requires_grad_(tensors[name].requires_grad)
            for launches_of_pass in passes(sample, tensors):
                compiled.update(launches_of_pass)
            counts.append(len(compiled))
        found[sample.name] = counts
    return found


def told(value, names: dict[int, object]):
    """What a launcher was given, each address as its name; a new one gets the number of those before as its name."""
    if isinstance(value, torch.Tensor):
        return names.setdefault(value.data_ptr(), len(names))
    if isinstance(value, tuple):
        return tuple(told(part, names) for part in value)
    if isinstance(value, TensorDescriptor):
        return told(value.base.data_ptr(), names), {**vars(value), "base": None}
    if isinstance(value, int) and value > MOST:
        return names.setdefault(value, len(names))
    return getattr(value, "value", value)  # of a tl.constexpr


MOST = 1 << 20  # no size or stride of a sample is larger, every address is


def has_tensors(value) -> bool:
    value = getattr(value, "base", value)  # of a descriptor
    return isinstance(value, torch.Tensor) or isinstance(value, tuple) and any(map(has_tensors, value))


def operators(op: str):
    """The module of an op, whose name in `fastvit.ops` is the op's; that of packed sequences has no own."""
    return importlib.import_module(f"fastvit.ops.{op.removesuffix('_varlen')}")


def program_alive(sample: samples.Sample, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether a program's kernels outlive Triton's caches: the newest Triton unloads those that nobody holds."""
    operators("layer_norm").FORWARD.replayed.programs.clear()
    for _ in range(2):
        passes(sample, tensors)
    (program,) = operators("layer_norm").FORWARD.replayed.programs.values()
    (alive,) = [weakref.ref(value) for value in program.__globals__.values() if type(value) is CompiledKernel]
    launched.clear()
    layer_norm.layer_norm_kernel.device_caches.clear()
    gc.collect()
    return alive() is not None


def told_apart() -> list[int]:
    """How many programs there are for calls of the same shapes that are not alike, then for the first once more."""
    op = operators("layer_norm_linear")
    x, norm, weight, bias = (torch.randn(*shape, dtype=torch.bfloat16) for shape in ((42, 32), (32,), (48, 32), (48,)))
    calls = [
        (x, norm, norm, weight, bias),
        (x, norm.float(), norm, weight, bias),  # a vector's dtype
        (torch.randn(42, 64, dtype=torch.bfloat16)[:, :32], norm, norm, weight, bias),  # a stride
        (x, norm, norm, weight, None),  # a tensor that is none
        (x, norm, norm.clone(), weight, bias),  # what shares memory
        (x, norm, norm, weight, bias),
    ]
    counts, programs = [], op.FORWARD.replayed.programs
    programs.clear()
    for call in calls:
        before = len(programs)
        op.layer_norm_linear(*call)
        counts.append(len(programs) - before)
    return counts


def workspaces() -> list[int]:
    """Of the programs of all samples: how many there are, how many calls have none though they were noted, and how
    often two tensors had the same bytes at a time."""
    from fastvit.kernels.launch import replay

    plan, plans, clashes = replay._Recorder._workspace, [], []

    def noting(self, lines, last):
        places, size = plan(self, lines, last)
        plans.append(size)
        for one in places:
            for other in places:
                (made, count), start = self._empty[one], places[one]
                before = self._empty[other][0] < made <= last[other]
                shared = start < places[other] + self._empty[other][1] and places[other] < start + count
                if start + count > size or (before and shared):
                    clashes.append((one, other))
        return places, size

    replay._Recorder._workspace = noting
    for sample in samples.SAMPLES:
        tensors = sample.tensors(torch.bfloat16)
        for _ in range(2):
            passes(sample, tensors)
    replay._Recorder._workspace = plan
    known = [
        callable(program)
        for sample in samples.SAMPLES
        for operator in (operators(sample.op).FORWARD, operators(sample.op).BACKWARD)
        for program in operator.replayed.programs.values()
    ]
    return [len(plans), known.count(False), len(clashes), max(plans)]


def report_replays() -> dict[str, list[int]]:
    """Of each sample, and under other conditions from the third pass on: [launches of a pass; how many of the third are
    handed what the second's were; how many of the third are replayed]."""
    from fastvit.kernels.launch import choice, replay
    from fastvit.kernels.launch.request import TmaConfig

    found = {"workspaces": workspaces()}
    given, held = [], []

    def note(self, *args) -> None:
        *grid, stream, function, metadata, _, _, _ = args[:9]
        given.append(((grid, stream, function, metadata, told(args[9:], names)), has_tensors(args[9:])))

    def holding(make):
        """torch's function, whose tensors are kept, so that no other has the same address."""
        return lambda *args, **how: held.append(make(*args, **how)) or held[-1]

    def one_pass(sample, tensors) -> list[tuple]:
        names.clear()
        names.update((tensor.data_ptr(), name) for name, tensor in tensors.items())
        given.clear()
        out = sample.run(tensors)
        samples.gradients(out, tensors, upstream.setdefault(sample.name, torch.ones_like(out)))
        return given.copy()

    def three_passes(sample, tensors, between=lambda: None) -> list[int]:
        choice._changed()
        first, second = one_pass(sample, tensors), one_pass(sample, tensors)
        between()
        third = one_pass(sample, tensors)
        differing = [(one, other) for (one, _), (other, _) in zip(first, second, strict=True) if one != other]
        assert not differing and all(own for _, own in (*first, *second)), differing
        alike = sum(one == other for (one, _), (other, _) in zip(second, third, strict=True))
        return [len(second), alike, sum(not own for _, own in third)]

    Recorder.__call__ = note
    for where, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty_strided")):
        setattr(where, name, holding(getattr(where, name)))
    replay.SMALL = -1  # memory that is used twice would be told as one
    names, upstream = {}, {}
    for sample in samples.SAMPLES:
        found[sample.name] = three_passes(sample, sample.tensors(torch.bfloat16))
        held.clear()
    by_tma = TmaConfig(64, 64, 16, 4, 2, SUBTILES=1)
    with choice.forcing(lambda request: by_tma if getattr(request.parts, "tma", False) else None):
        block = samples.BY_NAME["transformer_block"]
        found["by TMA"] = three_passes(block, block.tensors(torch.bfloat16))
    norm = samples.BY_NAME["layer_norm"]
    tensors = norm.tensors(torch.bfloat16)
    odd = torch.empty(25, dtype=torch.bfloat16)[1:].copy_(tensors["weight"].detach()).requires_grad_()
    runtime, compilation, heard = replay.knobs.runtime, replay.knobs.compilation, []
    chain, hooks = runtime.launch_enter_hook, layer_norm.layer_norm_kernel.pre_run_hooks
    # What happens after the second pass, and what undoes it; the last number is of the pass that follows.
    for name, given_tensors, begin, end in (
        ("a profiler", tensors, lambda: chain.add(heard.append), chain.calls.clear),
        ("a hook", tensors, lambda: runtime.__setattr__("launch_enter_hook", heard.append),
         lambda: runtime.__setattr__("launch_enter_hook", chain)),
        ("a knob", tensors, lambda: compilation.__setattr__("instrumentation_mode", "gsan"),
         lambda: compilation.__setattr__("instrumentation_mode", "")),
        ("an address that 16 does not divide", {**tensors, "weight": odd}, lambda: None, lambda: None),
        ("a Triton that is not known", tensors, lambda: vars(replay).update(_KNOWN=False),
         lambda: vars(replay).update(_KNOWN=True)),
        ("a kernel's own hook", tensors, lambda: hooks.append(lambda *args, **how: None), hooks.clear),
        ("other tables", tensors, choice._changed, lambda: None),
    ):  # fmt: skip
        found[name] = [*three_passes(norm, given_tensors, begin), end()]
        found[name].append(sum(not own for _, own in one_pass(norm, tensors)))
    found["still alive"] = program_alive(norm, tensors)
    found["apart"] = told_apart()
    return found


def report_tuning() -> dict[str, list]:
    """Of a linear layer in training, with one tile among the candidates that cannot be compiled."""
    from fastvit.kernels.launch import hardware
    from fastvit.kernels.launch.request import GemmConfig
    from triton.runtime.jit import JITFunction

    from fastvit import tune, tuned

    class Clock:
        def timer(self, runs, graph):
            return lambda: 1.0

    cpu, said = torch.device("cpu"), []
    compiled = {"ahead": [], "itself": []}
    compile, pruned = JITFunction._do_compile, tune.pruned

    def noting(kernel, key, signature, device, constants, *rest):
        main = threading.current_thread() is threading.main_thread()
        tile = {kernel.arg_names[index]: value for (index, *_), value in constants.items()}.get("BLOCK_M")
        compiled["itself" if main else "ahead"].append(f"{kernel.fn.__name__} {tile}")
        return compile(kernel, key, signature, device, constants, *rest)

    odd = {GemmConfig(100, 128, 64, 8, 3): 1.0}
    tune.pruned = lambda request, *rest: pruned(request, *rest) | (odd if request.kernel == "gemm" else {})
    tune.KEEP = tune.MAX_COPIES = 1
    hardware.num_sms = lambda device: 2  # so few that the heuristic takes other tiles than `search_space` goes on with
    shapes = ((2, 70, 64), (72, 64), (72,), (2, 70, 72))
    tensors = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    call = tune.Call.like(dispatch.OPS["linear_residual"], (*tensors, None, None))
    with tempfile.TemporaryDirectory() as folder:
        tuned._tables[cpu] = tuned.Table({}, Path(folder) / "table.json")
        JITFunction._do_compile = noting
        before = launches(lambda: tune.compile_all([lambda: tune.requests_of([tune.bind(call, cpu, ARCH)[0]])], cpu))[0]
        tune.tune_call(call, cpu, Clock(), said.append)
    return compiled | {"launched ahead": before, "said": said}


def report_frozen() -> list[list]:
    """By the last value that each call of an op makes."""
    from fastvit.frozen import freeze
    from fastvit.frozen.runtimes.triton_runtime import Program

    model = create_model("vit_tiny_patch16_224", img_size=32, depth=3).bfloat16().eval()
    with use_backend("torch"):  # the driver computes nothing, and `freeze` checks
        program = Program(freeze(model, runtime="torch").plan.dense(), False)
    values = {"images": torch.empty(2, 3, 32, 32, dtype=torch.bfloat16)}
    found = []
    with torch.inference_mode():
        for out, call in program.calls:
            made = []
            found.append([out, list(map(str, launches(lambda: made.append(call(values)))[0]))])  # noqa: B023
            (values[out],) = made
    return found


def report_hops() -> list[list[list[str]]]:
    """Each way from `nn.Block.forward`, in training, to a kernel: the functions that call each other, then it. Of the
    first call, and of the third, a replay."""
    block = nn.Block(192, 3, qkv_bias=True, init_values=1e-5).bfloat16()
    calls = []

    def way(self, *args) -> None:
        found, frame = [], sys._getframe(1)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("fastvit", "kernels"):
                found.append(f"{path.relative_to(ROOT)}: {frame.f_code.co_name}")
            elif path.name.endswith("replayed>"):
                found.append(path.name)
            frame = frame.f_back
        calls[-1].append([*found[::-1], str(self)])

    Recorder.__call__ = way
    for _ in range(3):
        calls.append([])
        block(torch.randn(2, 21, 192, dtype=torch.bfloat16, requires_grad=True))
    return [calls[0], calls[2]]


def report_host(*file: str) -> list[dict]:
    """Python's time in a ViT-Ti of 12 blocks and four patches, one image: what a GPU that takes none would wait for."""
    model = create_model("vit_tiny_patch16_224", img_size=32).bfloat16()
    images, parameters = torch.empty(1, 3, 32, 32, dtype=torch.bfloat16), list(model.parameters())

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    def training() -> None:
        torch.autograd.grad(model(images).sum(), parameters)

    rows = []
    for name, run, rounds in (("forward", forward, 50), ("forward and backward", training, 20)):
        launches_of_pass, _ = launches(run)
        Recorder.__call__ = stub_gpu.driver.CudaLauncher.__call__  # noting them takes time
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        Recorder.__call__ = noting
        ms = round(1e3 * statistics.median(seconds), 2)
        rows.append({"pass": name, "launches": len(launches_of_pass), "ms": ms})
    facts = environment("cpu")
    facts["variables"].pop("TRITON_LIBCUDA_PATH")  # where this machine has the driver that does nothing
    for path in file:
        write_json(path, {"environment": facts, "rows": rows})
    return rows


noting = Recorder.__call__

if __name__ == "__main__":
    torch.set_num_threads(1)
    stub_gpu.Driver.launcher_cls = Recorder
    stub_gpu.install_driver()
    dispatch.missing_requirements = lambda tensor: []
    what, *arguments = sys.argv[1:]
    if what == "auto":
        dispatch.torch_without_question = lambda device_type: None
    reports = {"launches": report_launches, "auto": report_launches, "variants": report_variants}
    reports |= {"replays": report_replays, "tuning": report_tuning, "hops": report_hops, "host": report_host}
    reports |= {"frozen": report_frozen}
    with use_backend("auto" if what == "auto" else "triton"):
        print(json.dumps(reports[what](*arguments), default=str))

"""Every launch of a model's training step by itself: each config worth trying, beside the library's equivalent.

For each launch with a choice that a forward and backward pass makes (`fastvit.tune` finds them): all configs of its
search space, checked against the heuristic's before they are timed, and what PyTorch offers for the same work, by
replays of CUDA graphs, interleaved. Then what explains the best config's time: a product without what its loads compute
and without its epilogue, attention at other numbers of tokens. It is the tuner with the whole search space, and keeps
what it decides in the same table.

A launch and its equivalent are not always the same work: the library's product has neither our prologue nor our
epilogue, and its backward pass of attention stands for both of ours. What fusion saves is in the whole models' times.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TextIO

import torch
from fastvit.kernels import gemm, tiles
from fastvit.kernels.launch import choice, cost, hardware
from fastvit.kernels.launch.request import Config, LibraryConfig, Request, config_from
from fastvit.kernels.layer_norm_mlp import ACTIVATED, ACTIVATED_AND_KEPT, ACTIVATION_GRADIENT
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.jit import JITFunction

from fastvit import report, tune, tuned
from fastvit.attempts import Attempts
from fastvit.calls import calls_of
from fastvit.decide import Clock, Measured, Run, measure
from fastvit.measure import quartiles
from fastvit.models.registry import model_entry
from fastvit.verify import SHORT

from .static.estimate import config_text

FILE = "micro.json"
DTYPE = torch.bfloat16
ROUNDS = 15
OTHER_TOKENS = (192, 256)  # a whole number of tiles, below and above a ViT's 197


def run(
    folder: Path, deadline: float, model: str, batch: int, rates: cost.Rates, device: torch.device, clock: Clock
) -> bool:
    """Measure what micro.json in `folder` has not; past `deadline` (`time.monotonic()`) nothing new is started.

    rates: the device's, in bfloat16, for the bound that each launch's time is held against. False where an op could not
    be measured, which stops no other. Raises GpuLost.
    """
    path, arch = folder / FILE, hardware.current_arch()
    found = _before(path, arch.name, model, batch)
    calls = calls_of(model_entry(model).config, batch, DTYPE, "training")
    attempts, failures = Attempts(tuned.table(device).attempts, watched=True), []

    def save(finished: bool) -> None:
        written = {"model": model, "batch": batch, "dtype": SHORT[DTYPE], "arch": arch.name}
        rows = {"launches": list(found.values()), "failed": failures, "finished": finished}
        report.write_json(path, written | rows)

    def measure() -> None:
        for call in calls:
            try:
                for row in measure_launches(call, device, arch, rates, attempts, deadline, found, clock):
                    found[row["launch"]] = row
                    print(line(row), flush=True)
                    save(finished=False)
            except tune.OutOfTime:
                raise
            except Exception as error:  # whatever a launch raises, or running out of memory
                tune.go_on_without(error)
                failures.append(f"{call.op.name}: {report.first_line(error)}")
                print(failures[-1], flush=True)

    def explain() -> None:
        for call in calls:
            for row, without in explanations(call, device, arch, attempts, deadline, found, clock):
                row["without"] = without
                save(finished=False)

    finished = False
    try:
        measure()
        explain()  # last: what it launches is compiled here, one by one
        finished = True
    except tune.OutOfTime:
        print("no time for the rest", flush=True)
    finally:
        save(finished and not failures)
    if found:
        table(list(found.values()))
    return not failures


def _before(path: Path, arch: str, model: str, batch: int) -> dict[str, dict]:
    """The rows that an earlier call measured of the same, by launch."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
        written = json.loads(path.read_text(encoding="utf-8"))
        if (written["arch"], written["model"], written["batch"]) == (arch, model, batch):
            return {row["launch"]: row for row in written["launches"]}
    return {}


def measure_launches(
    call: tune.Call,
    device: torch.device,
    arch: hardware.Arch,
    rates: cost.Rates,
    attempts: Attempts,
    deadline: float,
    known: dict[str, dict],
    clock: Clock,
) -> Iterator[dict]:
    """A row for each launch of one call that `known` has none for. Raises OutOfTime past the deadline."""
    table = tuned.table(device)
    with tuned.use_tuning("read-only"), torch.inference_mode(False), torch.no_grad():
        bound, launches = tune.launches_of(call, device, arch, attempts)
        for request, runs in launches.items():
            name = f"{call.op.name}: {request.key}"
            if name in known:
                continue
            if same := next((row for row in known.values() if row["request"] == request.key), None):
                yield same | {"launch": name, "op": call.op.name}  # another op launches the very same
                continue
            if time.monotonic() > deadline:
                raise tune.OutOfTime
            choices = tune.pruned(request, arch, hardware.num_sms(device), keep=tune.ALL)
            labels = {tune.label(config): config for config in choices}
            tune.compile_all([partial(runs[0], config) for config in choices], device)
            compiled: dict[str, object] = {}
            candidates = {
                text: [partial(_recorded, run, config, compiled, text) for run in runs[: len(bound)]]
                for text, config in labels.items()
            }
            key = f"{request.key}: library"
            beside = {}
            if key not in attempts.fatal:
                with attempts.trying(key):
                    beside = equivalents(request, device, clock)
            measured = measure(
                *(candidates, request.dtype, tune.LAUNCH_ROUNDINGS, clock),
                in_place=True,
                beside=beside,
                attempts=attempts,
                key=request.key,
                rounds=ROUNDS,
            )
            chosen, evidence = measured.choice(candidates)
            table.record("configs", request.key, tuned.Entry(tune.as_dict(labels[chosen]), **evidence))
            needs = cost.request_cost(request)
            ours = {text: config for text, config in labels.items() if type(config) is not LibraryConfig}
            best = min((text for text in ours if text in measured.times), key=lambda text: _median(measured, text))
            heuristic = next(iter(ours))
            yield {
                "launch": name,
                "request": request.key,
                "op": call.op.name,
                "direction": direction(request),
                "flops": needs.flops,
                "bytes": needs.bytes,
                "bound_seconds": cost.bound_seconds(needs, rates),
                "heuristic": config_text(ours[heuristic]),
                "best": config_text(ours[best]),
                "seconds": _median(measured, best),
                "heuristic_seconds": _median(measured, heuristic),
                "library": {
                    "twin" if text in labels else text: _median(measured, text)
                    for text in measured.times
                    if text not in ours
                },
                "configs": [
                    _config_row(config, measured, text, choices[config], compiled.get(text))
                    for text, config in ours.items()
                    if text in measured.times
                ],
                "dropped": measured.dropped,
                "graph": measured.graph,
            }


def _recorded(run: Callable, config: Config, compiled: dict, text: str):
    """Run, and keep the first kernel that Triton launches for it."""
    if text in compiled:
        return run(config)
    launch = JITFunction.run

    def recording(kernel, *args, **kwargs):
        found = launch(kernel, *args, **kwargs)
        compiled.setdefault(text, found)
        return found

    JITFunction.run = recording
    try:
        return run(config)
    finally:
        JITFunction.run = launch


def _config_row(config: Config, measured: Measured, text: str, estimate: float, kernel) -> dict:
    """estimate: seconds, of `cost.request_seconds`; registers and bytes of local memory (spills, a stack) a thread and
    bytes of shared memory a block, as the driver loaded the kernel."""
    low, median, high = quartiles(measured.times[text])
    loaded = {} if kernel is None else {"registers": kernel.n_regs, "local": 4 * kernel.n_spills}  # Triton counts words
    shared = {} if kernel is None else {"shared": kernel.metadata.shared}
    times = {"seconds": median, "q25": low, "q75": high, "estimate": estimate}
    return {"config": config._asdict()} | times | loaded | shared


def _median(measured: Measured, name: str) -> float:
    return quartiles(measured.times[name]).median


# ---------------------------------------------------------------------------------------------------------------------
# What a launch does, and the library's way


def direction(request: Request) -> str:
    """ "forward", "input gradient" or "weight gradient" of a product, else the kernel's name."""
    if request.kernel != "gemm":
        return request.kernel
    if request.parts.epilogue.sums:
        return "weight gradient"
    return "input gradient" if request.parts.epilogue.input_gradient else "forward"


def equivalents(request: Request, device: torch.device, clock: Clock) -> dict[str, list[Run]]:
    """What PyTorch offers for the same product or sum, on random tensors of its own."""

    draw = _drawing(request.dtype, device)

    def calls(**functions: Callable) -> dict[str, list[Run]]:
        return {f"library {name.replace('_', ' ')}": [partial(_tuple, call)] for name, call in functions.items()}

    if request.kernel == "gemm":
        m, n, k = request.shape
        if request.parts.epilogue.sums:
            dy, x = draw(k, m), draw(k, n)
            return calls(mm=lambda: torch.mm(dy.t(), x))
        x, weight, bias = draw(m, k), draw(n, k), draw(n)
        if direction(request) == "forward":
            return calls(mm=lambda: torch.mm(x, weight.t()), addmm=lambda: torch.addmm(bias, x, weight.t()))
        weight = draw(k, n)
        return calls(mm=lambda: torch.mm(x, weight))
    if request.kernel.startswith("attention"):
        return calls(**_attention_equivalents(request, draw, clock))
    x = draw(*request.shape)
    if request.kernel == "column_sum":
        return calls(sum=lambda: x.sum(dim=0, dtype=torch.float32))
    shape, weight, bias, dy = [request.shape[1]], draw(request.shape[1]), draw(request.shape[1]), draw(*request.shape)
    out, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, 1e-6)
    if request.kernel == "layer_norm_backward":
        backward = torch.ops.aten.native_layer_norm_backward
        return calls(layer_norm_backward=lambda: backward(dy, x, shape, mean, rstd, weight, bias, [True] * 3))
    return calls(layer_norm=lambda: torch.native_layer_norm(x, shape, weight, bias, 1e-6))


def _attention_equivalents(request: Request, draw: Callable, clock: Clock) -> dict[str, Callable]:
    """SDPA's fast back ends on views of a packed qkv. The whole backward pass stands beside each of our two kernels."""
    batch, tokens, heads, dim = request.shape
    qkv = draw(batch, tokens, 3, heads, dim)
    found = {}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        q, k, v = (part.transpose(1, 2).detach().requires_grad_() for part in qkv.unbind(2))

        def forward(backend=backend, q=q, k=k, v=v):
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        if request.kernel == "attention_forward":
            found[f"sdpa_{name}"] = forward
            continue
        with warnings.catch_warnings(), contextlib.suppress(RuntimeError):  # of a back end that cannot take it
            warnings.simplefilter("ignore")
            # A backward pass runs on the stream of its forward pass: it can be captured on no other.
            with torch.enable_grad(), _captured_stream(qkv.device, clock):
                out = forward()
            dout = draw(*out.shape)
            found[f"sdpa_{name}_backward"] = partial(torch.autograd.grad, out, (q, k, v), dout, retain_graph=True)
    return found


def _drawing(dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    """Random normal tensors by shape. By a generator of their own: a capture that failed spoils the device's."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    return draw


def _captured_stream(device: torch.device, clock: Clock) -> contextlib.AbstractContextManager:
    if device.type != "cuda":
        return contextlib.nullcontext()
    torch.cuda.synchronize()  # what it reads was made on another
    return torch.cuda.stream(clock.stream)


def _tuple(call: Callable) -> tuple[torch.Tensor, ...]:
    out = call()
    return out if isinstance(out, tuple) else (out,)


# ---------------------------------------------------------------------------------------------------------------------
# What explains a launch's time


def explanations(
    call: tune.Call,
    device: torch.device,
    arch: hardware.Arch,
    attempts: Attempts,
    deadline: float,
    known: dict[str, dict],
    clock: Clock,
) -> Iterator[tuple[dict, dict[str, float]]]:
    """For each row in `known` of the call's launches that is not explained yet, seconds of the launch with its best
    config without one of its parts, or at another number of tokens. Raises OutOfTime past the deadline."""
    for request in tune.planned(call, arch):
        row = known.get(f"{call.op.name}: {request.key}")
        if row is None or "without" in row:
            continue
        best = next(entry["config"] for entry in row["configs"] if config_text(entry["config"]) == row["best"])
        config = config_from(request.kernel, best)
        times = {}
        with tuned.use_tuning("read-only"), torch.inference_mode(False), torch.no_grad():
            for name, launch in _lesser_launches(request, call, device, arch, attempts).items():
                if time.monotonic() > deadline:
                    raise tune.OutOfTime
                key = f"{request.key} {name}: {config}"
                with contextlib.suppress(RuntimeError):  # one that cannot run explains nothing
                    if key not in attempts.fatal:
                        with attempts.trying(key):
                            timer = clock.timer([partial(launch, config)], True)
                            times[name] = quartiles([timer() for _ in range(ROUNDS)]).median
        yield row, times


def _lesser_launches(request, call, device, arch, attempts: Attempts) -> dict[str, Callable]:
    if request.kernel == "gemm":
        return lesser_products(request, device)
    key = f"{request.key}: other lengths"
    if not request.kernel.startswith("attention") or key in attempts.fatal:
        return {}
    with attempts.trying(key):
        return other_tokens(request, call, device, arch)


def lesser_products(request: Request, device: torch.device) -> dict[str, Callable]:
    """The same product with plain loads in place of those that compute, with a plain store in place of its epilogue,
    and with both, as far as it has them: what launches each with a config. None of a patch embedding's."""
    m, n, k = request.shape
    left, right, epilogue, activation, *_ = request.parts

    draw = _drawing(request.dtype, device)
    if epilogue.sums:
        if right is not tiles.NORMALISED:
            return {}
        dy, x = draw(k, m), draw(k, n)
        plain = partial(gemm.weight_gradient, dy, tiles.MATRIX, tiles.plain(x), n, request.dtype)
        return {"no prologue": _captured(plain)}

    x, out, other, bias, channels = draw(m, k), draw(m, n), draw(m, n), draw(n), draw(k)
    mean, rstd = (draw(m, dtype=torch.float32) for _ in range(2))
    loads = {
        tiles.MATRIX: tiles.plain(x),
        tiles.NORMALISED: (x, mean, rstd, channels, channels, k),
        tiles.SCALED: (x, None, channels, 1, k),
    }
    stores = {
        tiles.INPUT_GRADIENT: (out,),
        tiles.LINEAR: (out, bias, None, None, None, 1, 0),
        tiles.LINEAR_RESIDUAL: (out, bias, None, None, other, 1, n),
        ACTIVATED: (out, None, bias),
        ACTIVATED_AND_KEPT: (out, other, bias),
        ACTIVATION_GRADIENT: (out, torch.empty_like(out), other),
    }
    if left not in loads or epilogue not in stores:
        return {}
    weight = tiles.plain(draw(k, n)) if epilogue.input_gradient else tiles.transposed(draw(n, k))
    # The store of an input's gradient is the one that does nothing else; the right operand stays as it is.
    bare = tiles.INPUT_GRADIENT if epilogue.input_gradient else replace(tiles.INPUT_GRADIENT, input_gradient=False)
    stores[bare] = (out,)
    plain_load, plain_store = left is tiles.MATRIX, epilogue is tiles.INPUT_GRADIENT
    found = {}
    for name, load, store in (
        ("no prologue", tiles.MATRIX, epilogue),
        ("no epilogue", left, bare),
        ("plain", tiles.MATRIX, bare),
    ):
        if (load, store) != (left, epilogue) and not (name == "plain" and (plain_load or plain_store)):
            product = (load, loads[load], tiles.MATRIX, weight, store, stores[store], request.shape, request.dtype)
            found[name] = _captured(partial(gemm.launch, *product, activation if store is epilogue else None))
    return found


def other_tokens(request: Request, call: tune.Call, device, arch: hardware.Arch) -> dict[str, Callable]:
    """The same kernel on as many heads of other lengths."""
    qkv, *others = call.args
    found = {}
    for tokens in OTHER_TOKENS:
        shape = (qkv.shape[0], tokens, *qkv.shape[2:])
        other = torch.empty(shape, dtype=qkv.dtype, device="meta", requires_grad=qkv.requires_grad)
        (bound, *_) = tune.bind(tune.Call(call.op, (other, *others), call.autocast), device, arch)
        for same, runs in tune.requests_of([bound]).items():
            if same.kernel == request.kernel:
                found[f"{tokens} tokens"] = runs[0]
    return found


def _captured(launch: Callable) -> Callable:
    """What repeats, with a config, the one launch that `launch` would make: with the heuristic's it is not made."""

    def show(request: Request, run: Callable) -> None:
        raise _Shown(run)

    try:
        with choice.watching(show):
            launch()
    except _Shown as shown:
        return shown.args[0]
    raise ValueError("launch made no launch with a choice")


class _Shown(Exception):
    """Carries what repeats a launch."""


# ---------------------------------------------------------------------------------------------------------------------
# In words


def line(row: dict) -> str:
    """A row as one line: our time, beside the library's and the bound."""
    beside = ", ".join(f"{name.removeprefix('library ')} {us(value)}" for name, value in row["library"].items())
    less = ", ".join(f"{name} {us(value)}" for name, value in row.get("without", {}).items())
    best = next(entry for entry in row["configs"] if config_text(entry["config"]) == row["best"])
    code = f"{best['registers']} registers, {best['local']} B local" if "registers" in best else ""
    parts = [
        f"{us(row['seconds'])} us ({row['best']}; heuristic {us(row['heuristic_seconds'])})",
        f"bound {us(row['bound_seconds'])}, reached {row['bound_seconds'] / row['seconds']:.0%}",
        *([f"library: {beside}"] if beside else []),
        *([code] if code else []),
        *([less] if less else []),
    ]
    return f"{row['launch']}: {'; '.join(parts)}"


def table(launches: list[dict], out: TextIO | None = None) -> None:
    """All launches, in the order of a step, and their sums: microseconds, and what explains them."""
    times = {"ours": 6, "heur.": 6, "library": 7, "x": 5, "bound": 6, "of it": 5}
    code = {"regs": 4, "local": 5, "est.": 5, "best config, and without": -20}
    rows = report.Table({"launch": -50} | times | code, out)
    sums = [0.0] * 4
    for row in merged(launches):
        best = next((entry for entry in row["configs"] if config_text(entry["config"]) == row["best"]), {})
        library = library_seconds(row)
        times = (row["seconds"], row["heuristic_seconds"], library, row["bound_seconds"])
        sums = [total + value for total, value in zip(sums, times, strict=True)]
        less = [f"{name} {us(value)}" for name, value in row.get("without", {}).items()]
        code = (best.get("registers", ""), best.get("local", ""))
        estimate = f"{best['estimate'] / row['seconds']:.2f}" if best else ""
        rows.row(short(row), *_times(*times), *code, estimate, "; ".join([row["best"], *less]))
    rows.row("all", *_times(*sums), "", "", "", "")


def _times(ours: float, heuristic: float, library: float, bound: float) -> tuple[str, ...]:
    known = math.isfinite(library)
    beside = (us(library), f"{ours / library:.2f}") if known else ("", "")
    return (us(ours), us(heuristic), *beside, us(bound), f"{bound / ours:.0%}" if ours else "")


def short(row: dict) -> str:
    """A launch in a few words: the op, what of it, its shape."""
    what = row["direction"].removeprefix(f"{row['op']}_")
    if " dq + dkdv" in row["launch"]:
        what = "backward"
    extra = [word for word in ("preactivation", "residual", "store_activation_gradient") if word in row["request"]]
    return " ".join([row["op"], what, row["request"].split(" ")[1], *extra]).replace("store_activation_", "activation ")


def us(seconds: float) -> str:
    return f"{1e6 * seconds:.0f}" if seconds >= 1e-5 else f"{1e6 * seconds:.1f}"


def library_seconds(row: dict) -> float:
    """The fastest of the library's ways; infinity where it has none."""
    return min(row["library"].values(), default=math.inf)


def merged(launches: list[dict]) -> list[dict]:
    """Attention's two backward kernels as one row, as the library has one pass for both."""
    rows = {row["launch"]: row for row in launches}
    for first in launches:
        if not first["request"].startswith("attention_backward_dq "):
            continue
        name = first["launch"].replace("attention_backward_dq ", "attention_backward_dkdv ")
        name = name.replace(" bias_gradient", "")
        if name in rows:
            second = rows.pop(name)
            sums = ("seconds", "heuristic_seconds", "bound_seconds", "flops", "bytes")
            both = {key: first[key] + second[key] for key in sums}
            label = {"launch": first["launch"].replace("backward_dq", "backward dq + dkdv"), "without": {}}
            rows[first["launch"]] = first | both | label | {"best": f"{first['best']} + {second['best']}"}
    return list(rows.values())

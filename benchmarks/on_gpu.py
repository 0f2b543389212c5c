"""What only a GPU can tell, for `make gpu`: its own limits, what its driver makes of the kernels, how fast each is.

    python3 -m fastvit.benchmarks.on_gpu {ceilings,loaded,profile} FOLDER SECONDS

Each writes a file into FOLDER as it goes, with "finished" when nothing is left; past SECONDS nothing new is started.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Container, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import triton
from fastvit.kernels import configs, cost, hardware

from fastvit import report, tune
from fastvit.measure import quartiles
from fastvit.models.registry import model_entry
from fastvit.verify import SHORT

from . import roofline
from .schema import Ceilings

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Profiled, in order of worth.
MODELS = tuple(f"vit_{size}_patch16_224" for size in ("base", "small", "large"))
BATCH, DTYPE = 64, torch.bfloat16
ROUNDS = 9


def ceilings(folder: Path, deadline: float) -> bool:
    """ceilings.json: bytes/s of a copy, FLOP/s of a large matrix product by dtype."""
    found = roofline.measure_ceilings("cuda", DTYPES)
    report.write_json(folder / "ceilings.json", asdict(found) | {"finished": True})
    print(f"copy {found.bytes_per_s / 1e12:.2f} TB/s; ", end="")
    print(", ".join(f"{dtype} {rate / 1e12:.0f} TFLOP/s" for dtype, rate in found.flops_per_s.items()))
    return True


def loaded(folder: Path, deadline: float) -> bool:
    """loaded.json: registers of each shipped kernel, and whether it has local memory (spills, a stack), as the driver
    loads it, beside what the static report reads off the same code. False where they differ: then the report cannot be
    believed."""
    from .static import cases, compile

    path, arch = folder / "loaded.json", hardware.current_arch()
    found = compile.launches(cases.cases(), arch.name)
    rows = []
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        rows = before["kernels"] if before["triton"] == triton.__version__ else []
    left = found[len(rows) :]  # they come in the same order every time
    utils, device = triton.runtime.driver.active.utils, torch.cuda.current_device()
    # Meanwhile Triton's cache is the report's own, so that ptxas is heard, and what it made is found again here.
    with contextlib.closing(compile.compile_all(left)) as records:
        for launch, record in zip(left, records, strict=False):
            row = {"kernel": record.kernel, "case": record.case, "options": record.options, "error": record.error}
            if not record.error:
                with compile.compiling_for(arch.name):
                    compiled = launch.kernel.run(*launch.args, grid=None, warmup=True, **launch.kwargs)
                _, _, registers, spills, *_ = utils.load_binary(
                    compiled.name, compiled.kernel, compiled.metadata.shared, device
                )
                local = max(record.spill_bytes, record.stack_bytes) > 0  # a driver's spills are all local memory
                row |= {"registers": [record.registers, registers], "local memory": [local, spills > 0]}
                row["same"] = all(static == real for static, real in (row["registers"], row["local memory"]))
            rows.append(row)
            if time.monotonic() > deadline:
                break
    differ = [row for row in rows if not row.get("same")]
    written = {"arch": arch.name, "triton": triton.__version__, "kernels": rows, "finished": len(rows) == len(found)}
    report.write_json(path, written)
    for row in differ:
        print(f"{row['kernel']} ({row['case']}; {row['options']}): {row['error'] or row}")
    print(f"{len(rows)} of {len(found)} kernels loaded; {len(differ)} differ from the static report")
    return not differ


def profile(folder: Path, deadline: float) -> bool:
    """kernels.json: each launch that has a choice, with the config in force, on cold buffers: seconds, FLOP/s, bytes/s
    and the fraction of its floor; the slowest are printed. What an earlier call measured is not measured again. False
    where an op failed, which stops no other. `static.estimate` reads the file."""
    path, device, arch = folder / "kernels.json", _device(), hardware.current_arch()
    limits = roofline.measure_ceilings(device, (DTYPE,))
    rows = {}
    if path.exists():
        rows = {row["request"]: row for row in json.loads(path.read_text(encoding="utf-8"))["kernels"]}

    def save(finished: bool) -> None:
        written = {"batch": BATCH, "ceilings": asdict(limits), "kernels": list(rows.values()), "finished": finished}
        report.write_json(path, written)

    well, clock = True, tune.CudaClock()
    for name, mode, call in _calls():
        try:
            for row in measure_launches(call, device, arch, clock, limits, deadline, rows.keys()):
                rows[row["request"]] = {"model": name, "mode": mode, "arch": arch.name} | row
        except Exception as error:  # whatever a launch raises, or running out of memory
            well = False
            print(f"{name} {mode} {call.op.name}: not profiled, {type(error).__name__}: {error}")
        save(finished=False)
        if time.monotonic() > deadline:
            break
    else:
        save(finished=True)
    _print(rows.values())
    return well


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _calls() -> Iterator[tuple[str, str, tune.Call]]:
    for name in MODELS:
        for mode in tune.MODES:
            for call in tune.calls_of(model_entry(name).config, BATCH, DTYPE, mode):
                yield name, mode, call


def measure_launches(
    call: tune.Call,
    device: torch.device,
    arch: hardware.Arch,
    clock: tune.Clock,
    limits: Ceilings,
    deadline: float = math.inf,
    known: Container[str] = (),
) -> Iterator[dict]:
    """Each launch with a choice of one call of an op, but those whose key is in `known`, measured by itself with the
    config in force."""
    with torch.inference_mode(False), torch.no_grad():
        for request, runs in tune.requests_of(tune.works_of(call, device, arch)).items():
            if request.key in known:
                continue
            if time.monotonic() > deadline:
                return
            config = configs.choose(request, device)
            time_once = clock.timer([partial(run, config) for run in runs], graph=True)
            spread = quartiles([time_once() for _ in range(ROUNDS)])
            needs = cost.request_cost(request)
            floor = cost.floor_seconds(needs, roofline.rates(limits, SHORT[DTYPE]))
            yield {
                "request": request.key,
                "config": asdict(config),
                "seconds": spread.median,
                "q25": spread.q25,
                "q75": spread.q75,
                "flops_per_s": needs.flops / spread.median,
                "bytes_per_s": needs.bytes / spread.median,
                "fraction_of_floor": floor / spread.median,
            }


def _print(rows: Iterable[dict]) -> None:
    table = report.Table({"us": 9, "TFLOP/s": 8, "GB/s": 7, "of floor": 8, "model": -22, "launch": -60})
    for row in sorted(rows, key=lambda row: -row["seconds"])[:25]:
        speeds = (f"{row['flops_per_s'] / 1e12:.0f}", f"{row['bytes_per_s'] / 1e9:.0f}")
        table.row(
            f"{row['seconds'] * 1e6:.1f}", *speeds, f"{row['fraction_of_floor']:.0%}", row["model"], row["request"]
        )


MEASUREMENTS = {function.__name__: function for function in (ceilings, loaded, profile)}


def main(arguments: list[str] | None = None) -> int:
    """0 when all is well, 1 when a check failed, 2 without a GPU or for unknown arguments."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 3 or arguments[0] not in MEASUREMENTS:
        print(f"usage: on_gpu {{{','.join(MEASUREMENTS)}}} FOLDER SECONDS", file=sys.stderr)
        return 2
    name, folder, seconds = arguments
    if not torch.cuda.is_available():
        print(f"on_gpu {name}: error: PyTorch {torch.__version__} finds no GPU", file=sys.stderr)
        return 2
    return 0 if MEASUREMENTS[name](Path(folder), time.monotonic() + float(seconds)) else 1


if __name__ == "__main__":
    sys.exit(main())

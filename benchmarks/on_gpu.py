"""What only a GPU can tell, for `make gpu`: its peaks, the time of each launch, a profiler's counters, the driver's
facts.

python3 -m fastvit.benchmarks.on_gpu {peaks,micro,counters,launches,loaded} FOLDER SECONDS --models A,B --batch N

Each writes a file into FOLDER as it goes, with "finished" when nothing is left; past SECONDS nothing new is started.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import triton
from fastvit.kernels.launch import hardware
from fastvit.kernels.launch.search import search_space

from fastvit import report, tune, tuned, workers
from fastvit.attempts import Attempts, GpuLost
from fastvit.calls import calls_of
from fastvit.decide import CudaClock
from fastvit.models.registry import model_entry
from fastvit.verify import SHORT

from . import micro, peaks, roofline
from .static.estimate import config_text

SAVE_EVERY = 25  # kernels of `loaded`
COUNTED = 16  # how many launches a profiler counts, the longest ones
# Sections of Nsight Compute, and what of them goes into the table: heading -> metric.
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis",
            "SchedulerStats", "WarpStateStats")  # fmt: skip
COUNTERS = {
    "us": "Duration",
    "SM %": "Compute (SM) Throughput",
    "mem %": "Memory Throughput",
    "DRAM %": "DRAM Throughput",
    "L2 hit %": "L2 Hit Rate",
    "regs": "Registers Per Thread",
    "occ. %": "Achieved Occupancy",
    "issue %": "Issue Slots Busy",
}


def measure_peaks(folder: Path, deadline: float, models: list[str], batch: int) -> bool:
    """peaks.json: see `peaks`."""
    return peaks.run(folder, deadline, models, batch)


def measure_micro(folder: Path, deadline: float, models: list[str], batch: int) -> bool:
    """micro.json: see `micro`; of the first model."""
    rates = roofline.rates(peaks.read_or_measure(folder), SHORT[micro.DTYPE])
    device = torch.device("cuda", torch.cuda.current_device())
    return micro.run(folder, deadline, models[0], batch, rates, device, CudaClock())


def loaded(folder: Path, deadline: float, models: list[str], batch: int) -> bool:
    """loaded.json: for each shipped kernel the registers and whether it uses local memory (spills, a stack), as the
    driver loads it and as the static report reads them from the same code. False if they differ: then the report is
    wrong."""
    from .static import cases, compile

    path, arch = folder / "loaded.json", hardware.current_arch()
    found = compile.launches(cases.cases(), arch.name)
    rows = []
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        rows = before["kernels"] if before["triton"] == triton.__version__ else []
    left = found[len(rows) :]  # they come in the same order every time
    utils, device = triton.runtime.driver.active.utils, torch.cuda.current_device()

    def save() -> None:
        finished = len(rows) == len(found)
        written = {"arch": arch.name, "triton": triton.__version__, "kernels": rows, "finished": finished}
        report.write_json(path, written)

    # The report compiles in a Triton cache of its own, so that ptxas always runs; the code is reloaded from there.
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
            if len(rows) % SAVE_EVERY == 0:
                save()
                print(f"{len(rows)} of {len(found)} loaded", flush=True)
            if time.monotonic() > deadline:
                break
    save()
    differ = [row for row in rows if not row.get("same")]
    for row in differ:
        print(f"{row['kernel']} ({row['case']}; {row['options']}): {row['error'] or row}")
    print(f"{len(rows)} of {len(found)} kernels loaded; {len(differ)} differ from the static report")
    return not differ


# ---------------------------------------------------------------------------------------------------------------------
# Counters


def counters(folder: Path, deadline: float, models: list[str], batch: int) -> bool:
    """counters.csv: Nsight Compute's counters for the longest launches of micro.json, each with its best config;
    counters.json: whether that worked. False if the profiler failed or ran out of time."""
    path, seconds = folder / "counters.json", max(1.0, deadline - time.monotonic())
    if shutil.which("ncu") is None:
        print("no counters: Nsight Compute (ncu) is not on the PATH")
        report.write_json(path, {"kernels": 0, "why": "ncu is not on the PATH", "finished": True})
        return True
    command = ["ncu", "--csv", "--page", "details", "--clock-control", "none", "--profile-from-start", "off"]
    command += [part for section in SECTIONS for part in ("--section", section)]
    # The profiler prints only when the program ends, so the program gets less time than the profiler.
    command += [sys.executable, "-m", "fastvit.benchmarks.on_gpu", "launches", str(folder), f"{0.6 * seconds:.0f}"]
    command += ["--models", ",".join(models), "--batch", str(batch)]
    with open(folder / "counters.csv", "w", encoding="utf-8") as out:
        profiler = subprocess.Popen(command, stdout=out, preexec_fn=workers.leave_group)
        try:
            status = profiler.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(profiler.pid, signal.SIGKILL)  # and the program that it profiles
            profiler.wait()
    counted = read_counters(folder / "counters.csv")
    rows = report.Table({"kernel": -44} | {heading: max(7, len(heading)) for heading in COUNTERS})
    for kernel, metrics in counted:
        rows.row(kernel[:44], *(metrics.get(name, "") for name in COUNTERS.values()))
    why = {0: "", None: "out of time"}.get(status, f"ncu ended with {status}")
    report.write_json(path, {"kernels": len(counted), "why": why, "finished": status is not None})
    if why:
        print(f"counters: {why}")
    return not why


def read_counters(path: Path) -> list[tuple[str, dict[str, str]]]:
    """(kernel, {metric: value}) of each launch in Nsight Compute's CSV, skipping other output before it."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for row in csv.DictReader(lines[start:]):
        if row.get("Metric Name"):
            found.setdefault(row["ID"], (row["Kernel Name"], {}))[1][row["Metric Name"]] = row["Metric Value"]
    return list(found.values())


def launches(folder: Path, deadline: float, models: list[str], batch: int) -> bool:
    """The program that `counters` profiles: each launch once, between the profiler's start and stop."""
    written = json.loads((folder / micro.FILE).read_text(encoding="utf-8"))
    longest = sorted(written["launches"], key=lambda row: -row["seconds"])[:COUNTED]
    device, arch = torch.device("cuda", torch.cuda.current_device()), hardware.current_arch()
    known, attempts = Attempts(tuned.table(device).attempts).fatal, Attempts()
    attempts.fatal |= known  # what is fatal only under a profiler is not recorded for others
    calls = {call.op.name: call for call in calls_of(model_entry(models[0]).config, batch, micro.DTYPE, "training")}
    for op in dict.fromkeys(row["op"] for row in longest):
        best = {row["request"]: row["best"] for row in longest if row["op"] == op}
        with torch.no_grad(), contextlib.suppress(RuntimeError):  # a call that is known to be fatal
            _, found = tune.launches_of(calls[op], device, arch, attempts)
            for request, (run, *_) in found.items():
                if request.key not in best:
                    continue
                if time.monotonic() > deadline:
                    return False
                space = search_space(request, arch, hardware.num_sms(device))
                config = next(c for c in space if config_text(c) == best[request.key])
                run(config)  # compiles
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                run(config)
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
    return True


MEASUREMENTS = {"peaks": measure_peaks, "micro": measure_micro, "counters": counters, "loaded": loaded,
                "launches": launches}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """0 when all is well, 1 when a check failed, 2 without a GPU or for unknown arguments, 3 when a kernel took the GPU
    from this process: another call goes on, without that kernel."""
    parser = argparse.ArgumentParser(prog="on_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=MEASUREMENTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--models", type=lambda text: text.split(","), required=True, help="the first matters most")
    parser.add_argument("--batch", type=int, required=True)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"on_gpu {options.what}: error: PyTorch {torch.__version__} finds no GPU", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.seconds
    try:
        return 0 if MEASUREMENTS[options.what](options.folder, deadline, options.models, options.batch) else 1
    except GpuLost as error:
        print(f"the GPU is lost: {error}", flush=True)
        return workers.GPU_LOST


if __name__ == "__main__":
    sys.exit(main())

"""`make gpu`: what is worth knowing about a GPU, in one unattended run of a few minutes, in order of worth.

    python3 -m fastvit.benchmarks.runbook [--budget SECONDS] [--output FOLDER] [--only STEP ...]

Each step is a process of its own, so that one that hangs or breaks the GPU's context leaves the others whole. It gets
its share of the time that is left, is asked to end in good order, and is interrupted, then killed, when it does not.
Everything lies under <output>/<device>/<commit>/ as soon as it is known. A second call goes on where the first stopped.
Installs nothing and needs no network.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 510.0  # seconds; with what ends a process that hangs, under nine minutes
MODELS = ",".join(f"vit_{size}_patch16_224" for size in ("base", "small", "large"))
# Those that are strong and soon ready: max-autotune alone would take the whole time.
PEERS = "torch,timm,timm amp,timm compiled,compiled,sdpa flash,sdpa efficient,sdpa cudnn,flash-attn"
GRACE = 10.0  # seconds from an interrupt to a kill
NO_GPU = 2  # the exit status of a command that was asked for a device that is not there


@dataclass(frozen=True)
class Step:
    """One part of the run. share: of the time, against the shares of the steps still to come; command: what python3 is
    given, from the results folder and the seconds after which no new work should start; result: the file that it
    writes, whose "finished" says whether a further call has anything to add."""

    name: str
    what: str
    share: float
    command: Callable[[Path, float], list[str]]
    result: str

    def finished(self, folder: Path) -> bool:
        try:
            return json.loads((folder / self.result).read_text(encoding="utf-8"))["finished"] is True
        except (OSError, ValueError, KeyError, TypeError):
            return False


def _fastvit(*arguments: str) -> Callable[[Path, float], list[str]]:
    """A command of fastvit's; {folder} in its arguments is where results go."""

    def command(folder: Path, seconds: float) -> list[str]:
        placed = [argument.format(folder=folder) for argument in arguments]
        return ["-m", "fastvit", *placed, "--device", "cuda", "--time-limit", f"{seconds:.0f}"]

    return command


def _measurement(name: str) -> Callable[[Path, float], list[str]]:
    return lambda folder, seconds: ["-m", "fastvit.benchmarks.on_gpu", name, str(folder), f"{seconds:.0f}"]


STEPS = (
    Step("verify", "every kernel against the reference", 30,
         _fastvit("verify", "--json", "{folder}/verify.json", "--resume"), "verify.json"),
    Step("loaded", "what the driver loads against the static report", 5, _measurement("loaded"), "loaded.json"),
    Step("ceilings", "the device's own limits", 3, _measurement("ceilings"), "ceilings.json"),
    Step("tune", "candidates at the shapes of S, B and L", 25,
         _fastvit("tune", "--models", MODELS, "--batches", "256,32,1", "--json", "{folder}/tune.json"), "tune.json"),
    Step("bench", "models and ops against their peers", 27,
         _fastvit("bench", "--peers", PEERS, "--resume", "--output", "{folder}"), "bench.json"),
    Step("profile", "the slowest kernels against their floors", 10, _measurement("profile"), "kernels.json"),
)  # fmt: skip


def run(steps: tuple[Step, ...], folder: Path, budget: float, environment: dict[str, str] | None = None) -> dict:
    """Run what is not finished; returns {step: {"state", "status", "seconds"}}, kept in <folder>/runbook.json.

    state: "done", "unfinished" (its time was up: a further call goes on), "failed" (it ended by itself, and not well)
    or "kept" (finished by an earlier call).
    """
    from fastvit import report

    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    states: dict[str, dict] = {}
    for i, step in enumerate(steps):
        if step.finished(folder):
            states[step.name] = {"state": "kept", "status": 0, "seconds": 0.0}
            _say(f"{step.name}: finished by an earlier run")
            continue
        coming = [later for later in steps[i:] if not later.finished(folder)]
        left = budget - (time.monotonic() - start)
        allowed = left * step.share / sum(later.share for later in coming)
        if allowed < 1:
            states[step.name] = {"state": "unfinished", "status": None, "seconds": 0.0}
            _say(f"{step.name}: no time left")
            continue
        _say(f"{step.name}: {step.what}, {allowed:.0f} s at most")
        began = time.monotonic()
        # A case that is under way when the soft limit comes needs time to end.
        command = [sys.executable, *step.command(folder, max(1.0, 0.85 * allowed))]
        status, overdue = _run(command, allowed, environment)
        if overdue or (status == 0 and not step.finished(folder)):
            state = "unfinished"
        else:
            state = "done" if status == 0 else "failed"
        states[step.name] = {"state": state, "status": status, "seconds": round(time.monotonic() - began, 1)}
        report.write_json(folder / "runbook.json", states)
        _say(f"{step.name}: {state} after {states[step.name]['seconds']:.0f} s")
        if status == NO_GPU:
            break
    report.write_json(folder / "runbook.json", states)
    return states


def _run(command: list[str], seconds: float, environment: dict[str, str] | None) -> tuple[int, bool]:
    """Run to the end: its exit status, and whether it had to be stopped."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        return process.wait(seconds), False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(GRACE), True
        process.kill()
        return process.wait(), True
    except KeyboardInterrupt:  # the terminal has told the process too
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        raise
    finally:
        process.kill()


def _say(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """0 when every step is done or kept, 1 when one failed or is unfinished, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="runbook", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"in all, {BUDGET:.0f}")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], metavar="STEP",
                        help=", ".join(step.name for step in STEPS))  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        import torch
    except ImportError:
        return _no_gpu("PyTorch is not installed: pip install torch")
    if not torch.cuda.is_available():
        return _no_gpu(f"PyTorch {torch.__version__} finds no GPU")
    from fastvit import report

    facts = report.environment("cuda")
    folder = options.output.resolve() / report.slug(facts["device"]) / report.revision()
    steps = tuple(step for step in STEPS if options.only is None or step.name in options.only)
    # What is tuned here is used by the steps that follow, and lies with the results.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    places = {"FASTVIT_CACHE": str(folder / "tuned"), "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    _say(f"{facts['device']}; results: {folder}")
    try:
        states = run(steps, folder, options.budget, os.environ | places)
    except KeyboardInterrupt:
        _say("interrupted; what was measured is kept, and a further call goes on from there")
        return 130
    for name, state in states.items():
        print(f"{name:10} {state['state']:10} {state['seconds']:6.0f} s")
    if any(state["status"] == NO_GPU for state in states.values()):
        return NO_GPU
    return 0 if all(state["state"] in ("done", "kept") for state in states.values()) else 1


def _no_gpu(why: str) -> int:
    print(f"make gpu: error: {why}", file=sys.stderr)
    return NO_GPU


if __name__ == "__main__":
    sys.exit(main())

"""`make gpu`: what is worth knowing about a GPU, in one unattended run of a few minutes, in order of worth.

python3 benchmarks/runbook.py [--out FOLDER] [--from ARCHIVE] [--commit NAME] [--budget SECONDS] [--models NAME,...]
[--batch N] [--only STEP ...]

Each step is processes of its own: one that hangs, or that a kernel left without its GPU, is ended and started again,
goes on where it stopped and leaves out what ended it. A step gets its share of the time that is left and is told when
to stop; if it does not, it is interrupted, then killed. FOLDER holds all results so far, rewritten every few seconds:
an archive of every result, gpu.log and summary.txt, which is also the last thing printed. A second call finds that
archive, or the one of --from, and goes on. Needs no network, installs nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import fastvit
from fastvit.report import slug, write_atomically, write_json
from fastvit.workers import GPU_LOST

ROOT = Path(__file__).resolve().parent.parent
FASTVIT = Path(fastvit.__file__).parents[1]  # where every step finds it, too
BUDGET = 510.0  # seconds; with GRACE for a process that hangs, under nine minutes in all
MODELS = "vit_base_patch16_224,vit_small_patch16_224,vit_large_patch16_224"
BATCH = 256
# Strong peers that are soon ready: max-autotune alone would take the whole time.
PEERS = "torch,timm,timm amp,timm compiled,compiled,sdpa flash,sdpa efficient,sdpa cudnn,flash-attn"
GRACE = 10.0  # seconds from an interrupt to a kill
STALL = 150.0  # seconds without output after which a process is taken to hang: longer than any compilation
PACK_SECONDS = 15.0  # how often the archive is written: the most that is lost if the machine goes away
AGAIN, MOST_AGAIN = 15.0, 5  # a step is restarted if this many seconds are left; the most starts of a step
NO_GPU = 2


@dataclass(frozen=True)
class Step:
    """One part of the run. share: of the time that is left, relative to the shares of the steps still to come; command:
    the arguments of python3, made from the results folder and the seconds after which no new work should start; result:
    the file that it writes, whose "finished" says whether a further call has anything to add; environment: its own
    environment variables."""

    name: str
    what: str
    share: float
    command: Callable[[Path, float], list[str]]
    result: str
    environment: dict[str, str] = field(default_factory=dict)

    def found(self, folder: Path) -> bytes:
        """What it has written so far."""
        try:
            return (folder / self.result).read_bytes()
        except OSError:
            return b""

    def finished(self, folder: Path) -> bool:
        try:
            return json.loads(self.found(folder))["finished"] is True
        except (ValueError, KeyError, TypeError):
            return False


def steps(models: str = MODELS, batch: int = BATCH) -> tuple[Step, ...]:
    """The steps for these models, the most important first, at this batch."""
    from fastvit.benchmarks.cases import OPS  # which imports torch

    def fastvit(*arguments: str) -> Callable[[Path, float], list[str]]:
        """A command of fastvit's; {folder} in its arguments is where results go."""

        def command(folder: Path, seconds: float) -> list[str]:
            placed = [argument.format(folder=folder) for argument in arguments]
            return ["-m", "fastvit", *placed, "--device", "cuda", "--time-limit", f"{seconds:.0f}"]

        return command

    def measurement(name: str) -> Callable[[Path, float], list[str]]:
        options = ["--models", models, "--batch", str(batch)]
        return lambda folder, seconds: [
            *("-m", "fastvit.benchmarks.on_gpu", name, str(folder), f"{seconds:.0f}", *options)
        ]

    # The first steps measure what a user has without tuning; so they also stay finished when tuning changes the table.
    untuned = {"FASTVIT_TUNING": "off"}
    first = models.partition(",")[0]
    bench = ("bench", "--resume", "--dtypes", "bf16", "--seconds", "2")
    few = ("--peers", "torch,timm")
    both = ("--modes", "inference,training", "--batches", str(batch))
    return (
        Step("verify", "every kernel against the reference", 60,
             fastvit("verify", "--json", "{folder}/verify.json", "--resume"), "verify.json", untuned),
        Step("peaks", "what the device and the library reach", 40, measurement("peaks"), "peaks.json"),
        Step("micro", "every launch of a training step, every config, beside the library", 100,
             measurement("micro"), "micro.json"),
        Step("models", "whole models, then single ops, against their peers", 150,
             fastvit(*bench, *both, "--peers", PEERS, "--models", models, "--ops", f"model,{','.join(OPS)}",
                     "--output", "{folder}"),
             "bench.json", untuned),
        Step("tune", "configs and candidates at the same shapes", 60,
             fastvit("tune", "--models", models, "--batches", f"{batch},1,32", "--json", "{folder}/tune.json"),
             "tune.json"),
        Step("tuned", "the first model with what was tuned", 30,
             fastvit(*bench, *both, *few, "--models", first, "--output", "{folder}/after-tuning"),
             "after-tuning/bench.json"),
        Step("small", "models at small batches", 30,
             fastvit(*bench, *few, "--batches", "1,32", "--models", models, "--output", "{folder}/small-batches"),
             "small-batches/bench.json", untuned),
        Step("counters", "what a profiler counts of the longest launches", 25, measurement("counters"),
             "counters.json"),
        Step("loaded", "what the driver loads against the static report", 20, measurement("loaded"), "loaded.json"),
    )  # fmt: skip


class Out:
    """What a run leaves: everything that was printed, in gpu.log, and all results so far, in one archive."""

    def __init__(self, out: Path, name: str):
        """name: of the archive, and of the one folder in it."""
        out.mkdir(parents=True, exist_ok=True)
        self.folder, self.archive = out, out / f"{name}.tgz"
        self._name, self._log, self._packed = name, out / "gpu.log", 0.0

    def say(self, text: str) -> None:
        print(text, flush=True)
        with open(self._log, "a", encoding="utf-8") as log:
            print(text, file=log)

    def unpack(self, results: Path, other: Path | None) -> None:
        """Unpack what an earlier call left: here, or in the archive `other`."""
        for archive in (self.archive, other):
            if archive is not None and archive.exists():
                with tarfile.open(archive) as tar:
                    members = [member for member in tar.getmembers() if member.name.startswith(f"{self._name}/")]
                    # Not by extractall, whose filters came only with Python 3.10.12 and 3.11.4.
                    for member in filter(tarfile.TarInfo.isfile, members):
                        path = results / member.name.removeprefix(f"{self._name}/")
                        if not path.resolve().is_relative_to(results.resolve()):
                            raise ValueError(f"{archive}: {member.name!r} lies outside of it")
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(tar.extractfile(member).read())
                if members:
                    self.say(f"== goes on from {archive}")
                    return
                self.say(f"== {archive} is of another device or commit: nothing of it is taken up")

    def pack(self, results: Path, every: float = 0.0) -> None:
        """Write the archive, if the last one is older than `every` seconds. With `every`, a step may be running: the
        record of what it is trying at this moment (.trying) is left out."""
        if time.monotonic() - self._packed < every:
            return
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=3) as tar:
            for path in sorted(results.rglob("*")):
                if path.is_dir() or path.name.startswith(".") or (every and path.suffix == ".trying"):
                    continue
                with contextlib.suppress(OSError):  # a step may just have removed or replaced it
                    data = path.read_bytes()
                    member = tarfile.TarInfo(f"{self._name}/{path.relative_to(results).as_posix()}")
                    member.size, member.mtime = len(data), int(time.time())
                    tar.addfile(member, io.BytesIO(data))
        write_atomically(self.archive, buffer.getvalue())
        self._packed = time.monotonic()


def run(
    todo: tuple[Step, ...], results: Path, budget: float, out: Out, environment: dict[str, str] | None = None
) -> dict[str, dict]:
    """Run what is not finished; returns {step: {"state", "status", "seconds", "starts"}}, kept in runbook.json.

    state: "done", "unfinished" (its time was up: a further call goes on), "failed" (it ended by itself, and not well)
    or "kept" (finished by an earlier call).
    """
    start = time.monotonic()
    states: dict[str, dict] = {}
    for i, step in enumerate(todo):
        if step.finished(results):
            states[step.name] = {"state": "kept", "status": 0, "seconds": 0.0, "starts": 0}
            out.say(f"== {step.name}: finished by an earlier run")
            continue
        coming = [later for later in todo[i:] if not later.finished(results)]
        left = budget - (time.monotonic() - start)
        allowed = left * step.share / sum(later.share for later in coming)
        states[step.name] = state = {"state": "unfinished", "status": None, "seconds": 0.0, "starts": 0}
        if allowed < 1:
            out.say(f"== {step.name}: no time left")
            continue
        out.say(f"== {step.name}: {step.what}, {allowed:.0f} s at most")
        began = time.monotonic()
        ends = began + allowed
        while True:
            seconds = ends - time.monotonic()
            # A case that is running at the step's own limit needs time to end.
            command = [sys.executable, *step.command(results, max(1.0, 0.85 * seconds))]
            before = step.found(results)
            variables = (os.environ if environment is None else environment) | step.environment
            status, overdue = _run(command, seconds, variables, out, lambda: out.pack(results, PACK_SECONDS))
            state |= {"status": status, "starts": state["starts"] + 1}
            done = step.finished(results)
            # A process that ended by itself without a new result would do so again. After one that was killed or lost
            # the GPU, the next one knows what to leave out.
            ended = overdue or status < 0 or status == GPU_LOST
            again = not done and (ended or (status in (0, 1) and step.found(results) != before))
            if not again or state["starts"] == MOST_AGAIN or ends - time.monotonic() < max(AGAIN, 0.15 * allowed):
                break
            out.say(f"== {step.name}: {'hung' if overdue else f'ended with status {status}'}; goes on")
        if status == 0 and done:
            state["state"] = "done"
        elif status not in (0, GPU_LOST) and not overdue:
            state["state"] = "failed"
        state["seconds"] = round(time.monotonic() - began, 1)
        write_json(results / "runbook.json", states)
        out.say(f"== {step.name}: {state['state']} after {state['seconds']:.0f} s")
        out.pack(results)
    write_json(results / "runbook.json", states)
    return states


def _run(
    command: list[str], seconds: float, environment: dict[str, str], out: Out, meanwhile: Callable[[], None]
) -> tuple[int, bool]:
    """Run a command, handing every line to `out`; returns its exit status, and whether it had to be stopped because its
    time was up or it printed nothing for too long. meanwhile: called about once a second."""
    process = subprocess.Popen(command, cwd=FASTVIT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printed = _Lines(process.stdout.fileno(), out.say)
    end, overdue = time.monotonic() + seconds, False
    try:
        while printed.listen(1.0) and process.poll() is None:
            meanwhile()
            if time.monotonic() > min(end, printed.heard + STALL):
                overdue = True
                process.send_signal(signal.SIGINT)
                break
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    except KeyboardInterrupt:  # the terminal has told the process too
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        raise
    finally:
        process.kill()
        process.wait()
        printed.rest()
        process.stdout.close()
    return process.returncode, overdue


class _Lines:
    """Hands on what a process prints, line by line; heard: when it last printed."""

    def __init__(self, descriptor: int, say: Callable[[str], None]):
        self._descriptor, self._say, self._pending, self.heard = descriptor, say, b"", time.monotonic()
        os.set_blocking(descriptor, False)

    def listen(self, seconds: float) -> bool:
        """Hand on what comes within `seconds`; False once the output is closed."""
        ready, _, _ = select.select([self._descriptor], [], [], seconds)
        if not ready:
            return True
        text = os.read(self._descriptor, 1 << 16)
        *lines, self._pending = (self._pending + text).split(b"\n")
        self.heard = time.monotonic()
        for line in lines:
            self._say(line.decode(errors="replace"))
        return bool(text)

    def rest(self) -> None:
        """Hand on what is there, without waiting for what child processes may still print."""
        while select.select([self._descriptor], [], [], 0)[0] and self.listen(0):
            pass
        if self._pending:
            self._say(self._pending.decode(errors="replace"))


def main(arguments: list[str] | None = None) -> int:
    """0 when every step is done or kept, 1 when one failed or is unfinished, 2 without a GPU or for wrong arguments."""
    try:
        import torch
    except ImportError:
        return _no_gpu("PyTorch is not installed: pip install torch")
    names = [step.name for step in steps()]
    parser = argparse.ArgumentParser(prog="runbook", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu", metavar="FOLDER")
    parser.add_argument("--from", type=Path, dest="before", metavar="ARCHIVE", help="go on from what a call left here")
    parser.add_argument("--commit", metavar="NAME", help="of the sources, where there is no git to tell")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"in all, {BUDGET:.0f}")
    parser.add_argument("--models", default=MODELS, help="the first matters most")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help=", ".join(names))
    options = parser.parse_args(arguments)
    if options.before is not None and not options.before.exists():
        parser.error(f"--from {options.before}: no such file")
    if not torch.cuda.is_available():
        return _no_gpu(f"PyTorch {torch.__version__} finds no GPU")
    if options.commit:
        os.environ["FASTVIT_COMMIT"] = options.commit
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM ends it as Ctrl-C does
    from fastvit.benchmarks.report import gpu

    from fastvit.environment import environment

    facts = environment("cuda")
    out = Out(options.out.resolve(), f"{slug(facts['device'])}-{slug(facts['commit'])}")
    todo = tuple(
        step for step in steps(options.models, options.batch) if options.only is None or step.name in options.only
    )
    path = os.pathsep.join(filter(None, [str(FASTVIT), os.environ.get("PYTHONPATH")]))
    places = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    status = 130
    with tempfile.TemporaryDirectory(prefix="fastvit-gpu-") as folder:
        results = Path(folder)
        out.say(f"== {facts['device']}, fastvit at {facts['commit']}; all that is found goes to {out.folder}")
        try:
            out.unpack(results, options.before)
            write_json(results / "environment.json", facts)
            # The tuned table lies with the results, and the steps that follow use it.
            places["FASTVIT_CACHE"] = str(results / "tuned")
            states = run(todo, results, options.budget, out, os.environ | places)
            well = all(state["state"] in ("done", "kept") for state in states.values())
            status = 0 if well else 1
        except KeyboardInterrupt:
            out.say("== interrupted; what was measured is kept, and a further call goes on from there")
        finally:
            out.pack(results)
            summary = gpu.summary(results)
            (results / "summary.txt").write_text(summary, encoding="utf-8")
            out.pack(results)
            write_atomically(out.folder / "summary.txt", summary.encode())
            out.say(summary)
    return status


def _no_gpu(why: str) -> int:
    print(f"make gpu: error: {why}", file=sys.stderr)
    return NO_GPU


if __name__ == "__main__":
    sys.exit(main())

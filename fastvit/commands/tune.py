"""`fastvit tune`: configs and candidates chosen by measuring them; or what would be measured, or what was chosen."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

from . import _common
from ._common import DONE, DTYPES, FAILED, UsageError, list_of, names, positive, some_of

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
MODES = ("inference", "training")


def add(commands: argparse._SubParsersAction) -> None:
    text = "choose configs and candidates by measuring them on this machine's GPU"
    parser = _common.add_command(commands, "tune", text, run)
    parser.add_argument("--models", type=names, default=MODELS, help="comma-separated; patterns as in list_models")
    parser.add_argument(
        "--batches", type=list_of(positive(int)), default=(1, 32, 256), help="comma-separated batch sizes"
    )
    parser.add_argument("--dtypes", type=some_of(DTYPES), default=("bf16",), help="e.g. bf16,fp32")
    parser.add_argument("--modes", type=some_of(MODES), default=MODES, help=f"of {','.join(MODES)}")
    parser.add_argument(
        "--time-limit", type=positive(float), metavar="SECONDS", help="start no decision after this long"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write here what this run decided, and if all is done"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="only list what would be measured; needs no GPU")
    what.add_argument("--show", action="store_true", help="only print the decisions in force, with their evidence")
    parser.add_argument(
        "--arch", help="with --dry-run: of which architecture, e.g. sm_90 (default: this GPU's, or sm_90)"
    )


def run(arguments: argparse.Namespace) -> int:
    device = _common.checked_device(arguments.device)
    _common.check_triton()
    from ..dispatch import interpreting

    if interpreting():
        raise UsageError("TRITON_INTERPRET=1 is set, which runs kernels on the CPU: unset it to tune for a GPU")
    if arguments.arch and not arguments.dry_run:
        raise UsageError("--arch is for --dry-run: tuning is for the GPU that it runs on")
    if arguments.show:
        return _show_table(device)
    on_gpu = device.startswith("cuda")
    if not on_gpu and not arguments.dry_run:
        raise UsageError("tuning measures on a GPU, and there is none here; --dry-run lists what it would measure")

    from ..calls import calls_of
    from ..kernels.launch import hardware
    from ..models.registry import model_entry

    if arguments.arch is not None and arguments.arch not in hardware.ARCHS:
        raise UsageError(f"unknown architecture {arguments.arch!r}, expected one of {', '.join(hardware.ARCHS)}")
    with _common.as_usage_error(ValueError):
        found = [model_entry(name).config for name in _common.models_named(arguments.models)]
    calls = [
        call
        for mode in arguments.modes  # a time limit cuts the end off: every model comes before the next batch
        for batch in arguments.batches
        for dtype in _common.torch_dtypes(arguments.dtypes)
        for config in found
        for call in calls_of(config, batch, dtype, mode)
    ]
    if arguments.dry_run:
        here = hardware.current_arch() if on_gpu else hardware.ARCHS["sm_90"]
        return _list_plan(calls, hardware.ARCHS.get(arguments.arch, here))
    return _measure(arguments, device, calls)


def _measure(arguments: argparse.Namespace, device: str, calls: list) -> int:
    import torch

    from .. import report
    from .. import tune as tuner
    from ..attempts import GpuLost
    from ..tuned import table
    from ..workers import GPU_LOST

    current = torch.device("cuda", torch.cuda.current_device())
    path = table(current).path
    _common.make_folder(path.parent, "the table")
    _common.check_writable(path, "the table")
    output = arguments.json and _common.check_writable(arguments.json, "--json")
    from ..environment import environment

    facts = environment(device)
    report.note(f"Tuning {len(calls)} calls of ops on {facts['device']}; decisions go to {path}.")
    said = []

    def say(line: str) -> None:
        said.append(line)
        print(line, flush=True)

    finished, failed = False, 0
    deadline = time.monotonic() + (arguments.time_limit or math.inf)
    try:
        failed = tuner.tune(calls, current, tuner.CudaClock(), say, deadline)
        finished = not failed  # what failed may not another time
    except GpuLost as error:
        report.note(f"The GPU is lost: {error}. Another run goes on from here, without that.")
        return GPU_LOST
    except tuner.OutOfTime:
        report.note(f"The time limit of {arguments.time_limit:g} s was reached; another run goes on from here.")
    finally:
        if output:
            written = {"environment": facts, "table": str(path), "decisions": said, "finished": finished}
            report.write_json(output, written)
    return FAILED if failed else DONE


def _list_plan(calls: list, known) -> int:
    """What tuning would measure: every launch with its configs, most promising first, and every op's candidates."""
    from .. import tune as tuner

    print(f"For {known.name} ({known.gpu}); microseconds are estimates, by which candidates were kept.")
    seen, candidates = set(), 0
    for call in calls:
        print(f"\n{call.op.name}: {', '.join(call.op.candidates(call.args))}")
        for request, estimates in tuner.planned(call, known).items():
            if request in seen:
                continue
            seen.add(request)
            candidates += len(estimates)
            print(f"  {request.key}")
            for config, seconds in estimates.items():
                print(f"    {1e6 * seconds:9.1f}  {tuner.label(config)}")
    print(f"\n{len(calls)} calls of ops, {len(seen)} distinct launches, {candidates} configs")
    return DONE


def _show_table(device: str) -> int:
    import torch

    from .. import tuned

    table = tuned.table(torch.device(device))
    for file in table.files:
        print(f"{file.path}: {file.versions}")
    for kind in tuned.KINDS:
        for key, (entry, _) in sorted(getattr(table, kind).items()):
            print(f"{key}\n  {entry.chosen}: {entry}")
    if not table.files:
        print(f"no table is in force for {device}: heuristics decide; tables are kept in {tuned.folder()}")
    return DONE

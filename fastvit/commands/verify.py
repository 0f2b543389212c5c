"""`fastvit verify`: every kernel against the reference, on this machine."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from . import _common
from ._common import DONE, DTYPES, FAILED, INTERRUPTED, VERIFIED, UsageError, positive, some_of

# What must be equal for results of an earlier run to stand for this one's.
SAME_MACHINE = ("fastvit", "commit", "device", "tuned", "torch", "packages")


def add(commands: argparse._SubParsersAction) -> None:
    parser = _common.add_command(commands, "verify", "check every kernel against the reference on this machine", run)
    parser.add_argument("--ops", type=some_of(VERIFIED), default=(), help=f"only these, of {','.join(VERIFIED)}")
    parser.add_argument("--dtypes", type=some_of(DTYPES), default=(), help="only these, e.g. bf16,fp32")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results here, row by row; {device}: the device's name"
    )
    parser.add_argument("--time-limit", type=positive(float), metavar="SECONDS", help="start no case after this long")
    parser.add_argument("--resume", action="store_true", help="do not repeat what FILE of --json says has passed here")
    parser.add_argument("--jobs", type=positive(int), metavar="N", help="verify in N processes; one a core if not said")
    parser.add_argument(
        "--model", metavar="NAME", help="in place of the kernels this model, layer by layer beside timm's"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="--model's weights; drawn at random if not said"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.model:
        return _beside_timm(arguments)
    if arguments.checkpoint:
        raise UsageError("--checkpoint has no use without --model")
    if not arguments.device.startswith("cuda"):
        # The interpreter's arrays are small: threads cost it twice the time. Read when numpy and torch are imported.
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")
    device = _common.checked_device(arguments.device)
    _common.check_triton()
    on_gpu = device.startswith("cuda")
    from ..dispatch import interpreting

    if on_gpu and interpreting():
        raise UsageError("TRITON_INTERPRET=1 is set, which runs kernels on the CPU: unset it to verify a GPU")
    from .. import report
    from .. import verify as checks

    jobs = arguments.jobs or len(os.sched_getaffinity(0))
    if not on_gpu and jobs == 1:
        checks.use_interpreter()

    output = arguments.json
    if output and "{device}" in str(output):
        output = _common.with_device_name(output, device)
        _common.make_folder(output.parent, "--json")
    output = output and _common.check_writable(output, "--json")
    from ..environment import environment

    facts = environment(device)
    dtypes = _common.torch_dtypes(arguments.dtypes) or tuple(checks.FACTOR)
    cases = checks.cases(checks.sizes_for(device), dtypes, arguments.ops)
    kept = _passed_before(arguments, output, facts)
    if kept:
        report.note(f"Resuming: {sum(case.name in kept for case in cases)} of {len(cases)} cases have passed before.")
        cases = [case for case in cases if case.name not in kept]
    if on_gpu:
        report.note(f"Verifying {len(cases)} cases with compiled Triton kernels on {facts['device']}.")
    else:
        report.note(
            f"Verifying {len(cases)} cases with Triton's interpreter on the CPU, not on a GPU: this checks the "
            "kernels' arithmetic and memory accesses, at small sizes, and says nothing about speed."
        )

    table = report.Table({"case": -62, "worst tensor": -18, "ours": 9, "PyTorch": 9, "ratio": 6, "s": 5, "": -4})
    results = []

    def save(finished: bool) -> None:
        if output:
            rows = [*kept.values(), *(result.as_dict() for result in results)]
            report.write_json(output, {"environment": facts, "finished": finished, "results": rows})

    # On a GPU always in processes of their own: a kernel that goes astray leaves its process without one.
    if on_gpu or jobs > 1:
        running = checks.run_in_processes(cases, device, min(jobs, len(cases)), arguments.time_limit)
    else:
        running = checks.run(cases, device, arguments.time_limit)
    start = time.perf_counter()
    try:
        for result in report.progress(running, len(cases), "verifying"):
            results.append(result)
            save(finished=False)
            if result.status == "skipped":
                continue
            worst, verdict = result.worst, "ok" if result.status == "passed" else "FAIL"
            if worst is None:
                table.row(result.case.name, "", "", "", "", f"{result.seconds:.1f}", f"{verdict} {result.reason}")
                continue
            ratio = f"{worst.ours / worst.plain:.2f}" if worst.plain else "-"
            errors = (f"{worst.ours:.2e}", f"{worst.plain:.2e}", ratio)
            table.row(result.case.name, worst.name, *errors, f"{result.seconds:.1f}", verdict)
    except KeyboardInterrupt:
        report.note(f"Interrupted after {len(results)} of {len(cases)} cases.")
    counts = {status: sum(r.status == status for r in results) for status in ("passed", "failed", "skipped")}
    # What failed may not another time: a case that its process was killed for, say.
    save(finished=len(results) == len(cases) and not counts["skipped"] and not counts["failed"])
    print(
        f"{counts['passed']} passed, {counts['failed']} failed, "
        f"{counts['skipped'] + len(cases) - len(results)} not run, in {time.perf_counter() - start:.0f} s"
    )
    if len(results) < len(cases):
        return INTERRUPTED
    if counts["skipped"]:
        report.note(f"The time limit of {arguments.time_limit:g} s was reached; what was not run has not passed:")
        for result in results:
            if result.status == "skipped":
                report.note(f"  {result.case.name}")
    return DONE if counts["passed"] + len(kept) and not counts["failed"] else FAILED


def _beside_timm(arguments: argparse.Namespace) -> int:
    """A model of ours beside timm's of that name, with the same weights."""
    for option in ("ops", "dtypes", "time_limit", "resume", "jobs"):
        if getattr(arguments, option):
            raise UsageError(f"--{option.replace('_', '-')} is of the kernels, and has no use beside --model")
    device = _common.checked_device(arguments.device)
    output = arguments.json and _common.check_writable(arguments.json, "--json")
    from .. import torchvision_shim

    torchvision_shim.install()
    try:
        import timm
    except ImportError:
        raise UsageError("--model needs timm: pip install timm") from None
    import torch

    from .. import create_model, parity_report, report
    from ..verify import randomise

    with _common.as_usage_error(ValueError, OSError):
        ours = create_model(arguments.model, checkpoint=arguments.checkpoint)
    if not arguments.checkpoint:
        randomise(ours)
    theirs = timm.create_model(arguments.model, num_classes=ours.num_classes)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, *ours.config.img_size, generator=torch.Generator().manual_seed(0)).to(device)
    found = parity_report(theirs.to(device).eval(), ours.to(device).eval(), images)
    if output:
        report.write_json(output, found.as_dict())
    print(found)
    return DONE if found.same else FAILED


def _passed_before(arguments: argparse.Namespace, output: Path | None, environment: dict) -> dict[str, dict]:
    """With --resume, what the results file says has passed: name of the case -> its row. Nothing of another device or
    other versions counts, nor of other sources."""
    if not arguments.resume:
        return {}
    if output is None:
        raise UsageError("--resume needs --json, the file to go on from")
    if not output.exists():
        return {}
    try:
        before = json.loads(output.read_text(encoding="utf-8"))
        same = all(before["environment"].get(key) == environment.get(key) for key in SAME_MACHINE)
        rows = {f"{row['op']} {row['case']} {row['dtype']}": row for row in before["results"]}
        passed = {name: row for name, row in rows.items() if row["status"] == "passed"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"--json {output}: not a results file of fastvit verify; nothing to resume") from None
    return passed if same else {}

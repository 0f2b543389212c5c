"""The command line: info, verify, tune, bench, embed, classify, attention.

Exit status: 0 done, 1 something failed (a check, an image, a download), 2 asked for wrongly (an unknown model; a file,
device or package that is not there), 3 a kernel took the GPU from `tune`, which can be run again. What a time limit
left out is named and does not count as failed. Results go to stdout, everything about the run to stderr. torch is
imported by the commands, not here, so that `fastvit --help` answers at once.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

from . import __version__

DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16",
          "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # fmt: skip
OPS = ("patch_embed", "attention", "layer_norm", "layer_norm_linear", "linear_residual", "layer_norm_mlp", "model")
TUNED_MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
TUNED_MODES = ("inference", "training")
# What must be equal for results of an earlier run to stand for this one's.
SAME_MACHINE = ("fastvit", "commit", "device", "tuned", "torch", "packages")
SAVE_SECONDS = 60  # how much of `embed` a power cut may cost


class UsageError(Exception):
    """The command was asked for something that cannot be, with exit status 2."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    if argv is None:  # run from a shell, not from Python
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed before we came, as some services do: what we say is not asked for
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        codecs.register_error("fastvit", _encode_anyway)
        sys.stdout.reconfigure(errors="fastvit")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends a command as Ctrl-C does
    arguments = _parser().parse_args(argv)
    arguments.typed = sys.argv[1:] if argv is None else argv
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()  # here, where what goes wrong with it is caught
        return status
    except UsageError as error:
        return _complain(arguments, error, 2)
    except KeyboardInterrupt:
        return _complain(arguments, "interrupted", 130)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        return 1
    except ImportError as error:
        missing = "PyTorch is not installed: pip install torch" if error.name == "torch" else error
        return _complain(arguments, missing, 2)
    except (ValueError, OSError, RuntimeError) as error:
        return _complain(arguments, error, 1)
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # known by now; Python would try once more as it ends, and complain again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(arguments: argparse.Namespace, error: object, status: int) -> int:
    print(f"fastvit {arguments.command}: error: {error}", file=sys.stderr)
    return status


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _encode_anyway(error: UnicodeEncodeError) -> tuple[str | bytes, int]:
    """File names that are not UTF-8 come out as they are; what the terminal's encoding lacks, as \\u and its number."""
    error.end = error.start + 1
    surrogate = 0xDC80 <= ord(error.object[error.start]) <= 0xDCFF
    return codecs.lookup_error("surrogateescape" if surrogate else "backslashreplace")(error)


@contextlib.contextmanager
def _undisturbed():
    """Ctrl-C and polite kills are ignored in the `with` body."""
    # Python hands signals to its main thread only, and lets only that one say what becomes of them.
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------------------------
# Arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastvit", description="Custom Triton kernels for Vision Transformers.")
    parser.add_argument("--version", action="version", version=f"fastvit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.set_defaults(run=run)
        sub.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
        return sub

    sub = command(info, "what is here: device, versions, back ends")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command(verify, "check every kernel against the reference on this machine")
    sub.add_argument("--ops", type=_list_of(OPS), default=(), help=f"only these, of {','.join(OPS)}")
    sub.add_argument("--dtypes", type=_list_of(DTYPES), default=(), help="only these, e.g. bf16,fp32")
    sub.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results here, row by row; {device}: the device's name"
    )
    sub.add_argument("--time-limit", type=_positive(float), metavar="SECONDS", help="start no case after this long")
    sub.add_argument("--resume", action="store_true", help="do not repeat what FILE of --json says has passed here")
    sub.add_argument("--jobs", type=_positive(int), metavar="N", help="verify in N processes; one a core if not said")

    sub = command(tune, "choose configs and candidates by measuring them on this machine's GPU")
    sub.add_argument("--models", type=_names, default=TUNED_MODELS, help="comma-separated; patterns as in list_models")
    sub.add_argument("--batches", type=_list(_positive(int)), default=(1, 32, 256), help="comma-separated batch sizes")
    sub.add_argument("--dtypes", type=_list_of(DTYPES), default=("bf16",), help="e.g. bf16,fp32")
    sub.add_argument("--modes", type=_list_of(TUNED_MODES), default=TUNED_MODES, help=f"of {','.join(TUNED_MODES)}")
    sub.add_argument("--time-limit", type=_positive(float), metavar="SECONDS", help="start no decision after this long")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write here what this run decided, and if all is done")
    what = sub.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="only list what would be measured; needs no GPU")
    what.add_argument("--show", action="store_true", help="only print the decisions in force, with their evidence")
    sub.add_argument("--arch", help="with --dry-run: of which architecture, e.g. sm_90 (default: this GPU's, or sm_90)")

    sub = command(bench, "models and ops against their peers: speed, error, memory")
    sub.add_argument("--quick", action="store_true", help="a little of everything, in two minutes")
    sub.add_argument("--models", type=_names, default=(), help="comma-separated; patterns as in fastvit.list_models")
    sub.add_argument("--img-sizes", type=_list(_positive(int)), default=(), help="other sizes than the models' own")
    sub.add_argument("--ops", type=_names, default=(), help=f"single ops instead of whole models, of {','.join(OPS)}")
    sub.add_argument("--modes", type=_names, default=(), help="inference,training")
    sub.add_argument("--batches", type=_list(_positive(int)), default=(), help="comma-separated batch sizes")
    sub.add_argument("--dtypes", type=_list_of(DTYPES), default=(), help="e.g. bf16,fp32")
    sub.add_argument(
        "--peers", type=_names, default=(), help="comma-separated names, as in the results; all if not said"
    )
    sub.add_argument("--photos", type=Path, metavar="FOLDER", help="photographs to use instead of the shipped ones")
    sub.add_argument("--pretrained", action="store_true", help="download weights instead of drawing random ones")
    sub.add_argument("--seconds", type=_positive(float), help="time spent on each row's timing")
    sub.add_argument(
        "--time-limit", type=_positive(float), metavar="SECONDS", help="start no row and no peer after this long"
    )
    sub.add_argument("--resume", action="store_true", help="do not repeat rows that FOLDER/bench.json has from here")
    sub.add_argument(
        "-o",
        "--output",
        default="results/{device}",
        metavar="FOLDER",
        help="where bench.json, tables and pictures go; {device} stands for the device's name",
    )
    sub = sub.add_subparsers(metavar="compare").add_parser(
        "compare",
        help="what changed between two results files",
        description="What changed between two results files. Exit status 1 if any of ours got slower or wrong; 2 if "
        "the runs cannot be compared: files that do not fit, or peers that moved against each other by 1.5 or more.",
    )
    sub.set_defaults(run=bench_compare, command="bench compare")
    sub.add_argument("before", type=Path, metavar="A.json")
    sub.add_argument("after", type=Path, metavar="B.json")
    sub.add_argument(
        "--threshold",
        type=_positive(float),
        default=0.05,
        help="a smaller change counts as none; %(default)s if not said",
    )
    sub.add_argument(
        "--relative",
        metavar="PEER",
        help="judge our times by this peer's, whatever the machine did; one that most peers moved with",
    )

    sub = command(embed, "features of a folder of images")
    sub.add_argument("folder", type=Path, help="searched at any depth")
    sub.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help=".npz or .safetensors")
    sub.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from OUT.partial, left by an interrupted run, or start anew; it goes on if not said",
    )
    _model_arguments(sub)
    sub.add_argument("--batch-size", type=_positive(int), default=32)

    sub = command(classify, "the five likeliest classes of images: ImageNet's, or those of a checkpoint, by number")
    sub.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    sub.add_argument("--json", action="store_true", help="print JSON")
    _model_arguments(sub)
    sub.add_argument("--batch-size", type=_positive(int), default=32)

    sub = command(attention, "a picture of where the class token of a block attends to in an image")
    sub.add_argument("image", type=Path, metavar="IMAGE")
    sub.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help=".png, .jpg, .webp")
    sub.add_argument("--block", type=int, default=-1, help="its number, from 0; the last if not said")
    sub.add_argument("--head", type=int, help="only this head, from 0; their mean and each of them if not said")
    _model_arguments(sub)
    return parser


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="vit_base_patch16_224", help="see fastvit.list_models()")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--pretrained", action="store_true", help="download timm's weights from the Hugging Face hub")
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights in a .safetensors or .pth file")
    parser.add_argument("--img-size", type=_positive(int), help="another image size than the model's own")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")


def _positive(kind):
    def number(text: str):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not positive and finite")
        return value

    number.__name__ = f"positive {kind.__name__}"  # argparse names it in its error
    return number


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    return names


def _list(kind):
    def items(text: str) -> tuple:
        return tuple(kind(name) for name in _names(text))

    items.__name__ = f"list of {kind.__name__}"
    return items


def _list_of(known):
    def checked(text: str) -> tuple[str, ...]:
        for name in _names(text):
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {name!r}, expected some of {','.join(known)}")
        return _names(text)

    return checked


def _dtypes(names: tuple[str, ...]) -> tuple:
    import torch

    return tuple(getattr(torch, DTYPES[name]) for name in names)


def _device(asked: str) -> str:
    """The device to use, checked: raises UsageError where it is not there, and for a back end that is none."""
    import torch

    try:
        importlib.import_module(f"{__package__}.dispatch")
    except ValueError as error:  # of an environment variable
        raise UsageError(error) from None
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {asked!r}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"device {asked!r} was asked for, but PyTorch {torch.__version__} finds no GPU")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"device {asked!r} was asked for, but there are {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    return asked


def _writable(path: Path, what: str) -> Path:
    """Fail before the work, not after it, where the result could not be written."""
    if path.exists() and not path.is_file():  # /dev/null too: what is written takes the place of what was there
        raise UsageError(f"{what} {path} is {'a folder' if path.is_dir() else 'no regular file'}, expected a file")
    parent = Path(os.path.realpath(path)).parent if path.is_symlink() else path.parent
    if not parent.is_dir():
        raise UsageError(f"{what} {path}: no such folder as {parent}")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{what} {path}: the folder {parent} cannot be written to")
    return path


def _make_folder(path: Path, what: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{what}: the folder {path} cannot be made: {error.strerror}") from None


# --------------------------------------------------------------------------------------------------------------------
# info


def info(arguments: argparse.Namespace) -> int:
    device = _device(arguments.device)
    import fastvit

    from .dispatch import interpreting, requested_backend
    from .environment import environment
    from .tuned import folder, mode

    facts = environment(device)
    backends = {"torch": "PyTorch's own operators, on every device"}
    if importlib.util.find_spec("triton") is None:
        backends["triton"] = "not available: Triton is not installed"
    elif device.startswith("cuda") and not interpreting():
        backends["triton"] = "the Triton kernels, compiled for this GPU"
    else:
        backends["triton"] = "the Triton kernels in Triton's interpreter, on the CPU: for checking, not for speed"
    files = {
        str(file.path): f"{len(file.configs)} configs, {len(file.segments)} ops; {file.versions}"
        for file in _table(device).files
    }
    facts |= {"tuning": mode(), "tables": files or f"none in force; kept in {folder()}"}
    facts |= {"backends": backends, "requested_backend": requested_backend(), "models": len(fastvit.list_models())}
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, item in value.items():
                print(f"  {key:<18} {'not installed' if item is None else item}")
        else:
            print(f"{name:<20} {value}")
    return 0


# --------------------------------------------------------------------------------------------------------------------
# verify


def verify(arguments: argparse.Namespace) -> int:
    if not arguments.device.startswith("cuda"):
        # The interpreter's arrays are small: threads cost it twice the time. Read when numpy and torch are imported.
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")
    device = _device(arguments.device)
    if importlib.util.find_spec("triton") is None:
        raise UsageError("Triton is not installed: pip install triton (it has wheels for Linux)")
    on_gpu = device.startswith("cuda")
    from .dispatch import interpreting

    if on_gpu and interpreting():
        raise UsageError("TRITON_INTERPRET=1 is set, which runs kernels on the CPU: unset it to verify a GPU")
    from . import report
    from . import verify as checks
    from .environment import environment as describe

    jobs = arguments.jobs or len(os.sched_getaffinity(0))
    if not on_gpu and jobs == 1:
        checks.use_interpreter()

    output = arguments.json
    if output and "{device}" in str(output):
        output = Path(str(output).replace("{device}", _slug(device)))
        _make_folder(output.parent, "--json")
    output = output and _writable(output, "--json")
    environment = describe(device)
    dtypes = _dtypes(arguments.dtypes) or tuple(checks.FACTOR)
    cases = checks.cases(checks.sizes_for(device), dtypes, arguments.ops)
    kept = _passed_before(arguments, output, environment)
    if kept:
        _note(f"Resuming: {sum(case.name in kept for case in cases)} of {len(cases)} cases have passed before.")
        cases = [case for case in cases if case.name not in kept]
    if on_gpu:
        _note(f"Verifying {len(cases)} cases with compiled Triton kernels on {environment['device']}.")
    else:
        _note(
            f"Verifying {len(cases)} cases with Triton's interpreter on the CPU, not on a GPU: this checks the "
            "kernels' arithmetic and memory accesses, at small sizes, and says nothing about speed."
        )

    table = report.Table({"case": -62, "worst tensor": -18, "ours": 9, "PyTorch": 9, "ratio": 6, "s": 5, "": -4})
    results = []

    def save(finished: bool) -> None:
        if output:
            rows = [*kept.values(), *(result.as_dict() for result in results)]
            report.write_json(output, {"environment": environment, "finished": finished, "results": rows})

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
        _note(f"Interrupted after {len(results)} of {len(cases)} cases.")
    counts = {status: sum(r.status == status for r in results) for status in ("passed", "failed", "skipped")}
    # What failed may not another time: a case that its process was killed for, say.
    save(finished=len(results) == len(cases) and not counts["skipped"] and not counts["failed"])
    print(
        f"{counts['passed']} passed, {counts['failed']} failed, "
        f"{counts['skipped'] + len(cases) - len(results)} not run, in {time.perf_counter() - start:.0f} s"
    )
    if len(results) < len(cases):
        return 130
    if counts["skipped"]:
        _note(f"The time limit of {arguments.time_limit:g} s was reached; what was not run has not passed:")
        for result in results:
            if result.status == "skipped":
                _note(f"  {result.case.name}")
    return 0 if counts["passed"] + len(kept) and not counts["failed"] else 1


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


def _slug(device: str) -> str:
    from .environment import device_name
    from .report import slug

    return slug(device_name(device))


# --------------------------------------------------------------------------------------------------------------------
# tune


def tune(arguments: argparse.Namespace) -> int:
    device = _device(arguments.device)
    if importlib.util.find_spec("triton") is None:
        raise UsageError("Triton is not installed: pip install triton (it has wheels for Linux)")
    from .dispatch import interpreting

    if interpreting():
        raise UsageError("TRITON_INTERPRET=1 is set, which runs kernels on the CPU: unset it to tune for a GPU")
    if arguments.arch and not arguments.dry_run:
        raise UsageError("--arch is for --dry-run: tuning is for the GPU that it runs on")
    if arguments.show:
        return _show_table(device)
    on_gpu = device.startswith("cuda")
    if not on_gpu and not arguments.dry_run:
        raise UsageError("tuning measures on a GPU, and there is none here; --dry-run lists what it would measure")

    from . import list_models, report
    from . import tune as tuner
    from .kernels import hardware
    from .models.registry import model_entry

    if arguments.arch is not None and arguments.arch not in hardware.ARCHS:
        raise UsageError(f"unknown architecture {arguments.arch!r}, expected one of {', '.join(hardware.ARCHS)}")
    names = [name for pattern in arguments.models for name in list_models(pattern) or [pattern]]
    try:
        found = [model_entry(name).config for name in dict.fromkeys(names)]
    except ValueError as error:
        raise UsageError(error) from None
    calls = [
        call
        for mode in arguments.modes  # a time limit cuts the end off: every model comes before the next batch
        for batch in arguments.batches
        for dtype in _dtypes(arguments.dtypes)
        for config in found
        for call in tuner.calls_of(config, batch, dtype, mode)
    ]
    if arguments.dry_run:
        here = hardware.current_arch() if on_gpu else hardware.ARCHS["sm_90"]
        return _list_plan(tuner, calls, hardware.ARCHS.get(arguments.arch, here))

    import torch

    from . import precompile
    from .attempts import GpuLost
    from .environment import environment as describe
    from .tuned import table
    from .workers import GPU_LOST

    current = torch.device("cuda", torch.cuda.current_device())
    path = table(current).path
    _make_folder(path.parent, "the table")
    _writable(path, "the table")
    output = arguments.json and _writable(arguments.json, "--json")
    environment = describe(device)
    _note(f"Tuning {len(calls)} calls of ops on {environment['device']}; decisions go to {path}.")
    said = []

    def say(line: str) -> None:
        said.append(line)
        print(line, flush=True)

    finished, failed = False, 0
    deadline = time.monotonic() + (arguments.time_limit or math.inf)
    try:
        with precompile.ahead(precompile.Job.on(current, calls), deadline) as compiled:
            failed = tuner.tune(compiled, current, tuner.CudaClock(), say, deadline)
        finished = not failed  # what failed may not another time
    except GpuLost as error:
        _note(f"The GPU is lost: {error}. Another run goes on from here, without that.")
        return GPU_LOST
    except tuner.OutOfTime:
        _note(f"The time limit of {arguments.time_limit:g} s was reached; another run goes on from here.")
    finally:
        if output:
            written = {"environment": environment, "table": str(path), "decisions": said, "finished": finished}
            report.write_json(output, written)
    return 1 if failed else 0


def _list_plan(tuner, calls: list, known) -> int:
    """What tuning would measure: every launch with its configs, most promising first, and every op's candidates."""
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
    return 0


def _show_table(device: str) -> int:
    from . import tuned

    table = _table(device)
    for file in table.files:
        print(f"{file.path}: {file.versions}")
    for kind in tuned.KINDS:
        for key, (entry, _) in sorted(getattr(table, kind).items()):
            print(f"{key}\n  {entry.chosen}: {entry}")
    if not table.files:
        print(f"no table is in force for {device}: heuristics decide; tables are kept in {tuned.folder()}")
    return 0


def _table(device: str):
    import torch

    from . import tuned

    return tuned.table(torch.device(device))


# --------------------------------------------------------------------------------------------------------------------
# bench


def bench(arguments: argparse.Namespace) -> int:
    device = _device(arguments.device)
    from . import list_models
    from .benchmarks import suites
    from .models.registry import model_entry

    matches = [list_models(pattern) or [pattern] for pattern in arguments.models]
    axes = {name: getattr(arguments, name) for name in ("quick", "img_sizes", "ops", "modes", "batches", "peers")}
    axes |= {"models": tuple(dict.fromkeys(name for names in matches for name in names))}
    others = {name: getattr(arguments, name) for name in ("photos", "seconds", "time_limit", "pretrained")}
    others = {name: value for name, value in others.items() if value is not None}
    others["command"] = shlex.join(["fastvit", *arguments.typed])
    try:
        settings = suites.settings(device, dtypes=_dtypes(arguments.dtypes), **axes, **others)
    except ValueError as error:
        raise UsageError(error) from None
    if not settings.photos.is_dir():
        raise UsageError(f"--photos {settings.photos}: no such folder")
    if importlib.util.find_spec("PIL") is not None:
        from .images import find_images

        if not find_images(settings.photos):
            raise UsageError(f"--photos {settings.photos}: no images in it")
    if settings.pretrained:
        for case in settings.cases:
            if model_entry(case.model).hub_id is None:
                raise UsageError(f"--pretrained: there are no weights of {case.model}")
    if settings.interpreted:
        from .verify import use_interpreter

        use_interpreter()
    from .benchmarks import command, schema

    folder = Path(arguments.output.replace("{device}", _slug(device)))
    _make_folder(folder, "--output")
    before = None
    if arguments.resume and (folder / command.FILE).exists():
        try:
            before = schema.load(folder / command.FILE)
        except (ValueError, OSError) as error:
            raise UsageError(f"--resume: {error}") from None
    return command.run(settings, folder, before)


def bench_compare(arguments: argparse.Namespace) -> int:
    from .benchmarks import command

    try:
        return command.compare_files(arguments.before, arguments.after, arguments.threshold, arguments.relative)
    except (ValueError, OSError) as error:
        raise UsageError(error) from None


# --------------------------------------------------------------------------------------------------------------------
# embed, classify, attention


def _config(arguments: argparse.Namespace):
    """The ViTConfig of the model that is asked for, without building it."""
    from .models.registry import model_entry

    try:
        config = model_entry(arguments.model).config
        return config if arguments.img_size is None else dataclasses.replace(config, img_size=arguments.img_size)
    except ValueError as error:
        raise UsageError(error) from None


def _model(arguments: argparse.Namespace, device: str, **overrides):
    import torch

    from . import create_model, load_checkpoint

    if arguments.img_size is not None:
        overrides["img_size"] = arguments.img_size
    try:
        model = create_model(arguments.model, arguments.pretrained, **overrides)
        if arguments.checkpoint:  # create_model would leave a classifier that does not fit as it was drawn
            load_checkpoint(model, arguments.checkpoint, new_classifier=overrides.get("num_classes") == 0)
    except (ValueError, OSError) as error:
        raise UsageError(error) from None
    return model.to(device, getattr(torch, DTYPES[arguments.dtype])).eval()


def _classes(arguments: argparse.Namespace, config) -> int:
    """How many classes there are: those of the checkpoint's classifier if it has one, else the model's own."""
    if arguments.pretrained:
        return config.num_classes
    from .models.weights import read_state_dict

    try:
        head = read_state_dict(arguments.checkpoint).get("head.weight")
    except (ValueError, OSError) as error:
        raise UsageError(error) from None
    return len(head) if head is not None and head.dim() else config.num_classes


def _weights(arguments: argparse.Namespace) -> str:
    """What tells these weights from others: the checkpoint's path, size and modification time."""
    if arguments.pretrained:
        return "pretrained"
    try:
        status = arguments.checkpoint.stat()
    except OSError:
        raise UsageError(f"no checkpoint at {arguments.checkpoint}") from None
    return f"{arguments.checkpoint.resolve()}, {status.st_size} bytes, modified {status.st_mtime_ns} ns"


def _quiet_about_large_images() -> None:
    """fastvit.images refuses what Pillow only warns of."""
    import warnings

    from PIL import Image

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class _Skipped(list):
    """Why images were skipped; each is named on stderr as it comes."""

    def __call__(self, reason: object) -> None:
        self.append(reason)
        _note(f"skipped {reason}")


def _finite(arguments: argparse.Namespace, model, paths: list[Path], rows, skip: _Skipped) -> tuple[list[Path], object]:
    """paths and rows (B, n) of those images whose numbers are all finite; the others are skipped, with the reason."""
    finite = rows.isfinite().all(dim=1)
    if finite.all():
        return paths, rows
    reason = _not_finite(arguments, model)
    good = []
    for path, is_finite in zip(paths, finite.tolist(), strict=True):
        if is_finite:
            good.append(path)
        else:
            skip(f"{path}: {reason}")
    return good, rows[finite]


def _not_finite(arguments: argparse.Namespace, model) -> str:
    dtype = DTYPES[arguments.dtype]
    reason = f"the model's output is not finite in {dtype}"
    bad = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        reason += f", nor are the weights of {arguments.checkpoint or arguments.model}: {bad[0]}{more}"
    return reason + ("; --dtype bfloat16 and float32 reach further" if dtype == "float16" else "")


def embed(arguments: argparse.Namespace) -> int:
    output = _writable(arguments.output, "OUT")
    from . import features

    try:
        features.check_format(output)
    except ValueError as error:
        raise UsageError(error) from None
    device = _device(arguments.device)
    config = _config(arguments)
    facts = {"model": arguments.model, "weights": _weights(arguments), "img_size": config.img_size[0]}
    facts |= {"dtype": DTYPES[arguments.dtype], "folder": str(arguments.folder.resolve())}
    from . import images, report

    _quiet_about_large_images()
    skip = _Skipped()
    try:
        paths = images.find_images(arguments.folder, skip)
    except NotADirectoryError as error:
        raise UsageError(error) from None
    if not paths and not skip:
        raise UsageError(f"no images in {arguments.folder}")
    names, stamps = {}, {}
    for path in paths:
        try:
            status = path.stat()  # before it is read: what is overwritten in between is seen as changed by the next run
        except OSError as error:
            skip(f"{path}: {error.strerror}")
            continue
        names[path] = path.relative_to(arguments.folder).as_posix()
        stamps[names[path]] = (status.st_size, status.st_mtime_ns)
    table = features.Features(output, facts, stamps)
    _writable(table.partial, "OUT.partial")
    left_out = 0
    if arguments.resume:
        try:
            left_out = table.resume()
        except ValueError as error:
            raise UsageError(f"{error}; --no-resume starts anew") from None
    model = _model(arguments, device, num_classes=0)  # a checkpoint's classifier, of whatever size, is not used
    if left_out:
        _note(f"Left out {left_out} rows of {table.partial}: their images are gone or have changed.")
    if table.rows:
        _note(f"Resuming: {len(table.rows)} of {len(paths)} images are done.")
    if output.exists():
        _note(f"{output} exists: it is replaced when this run is through.")
    todo = [path for path, name in names.items() if name not in table.rows]
    import torch

    def save_partial() -> bool:
        try:
            return table.save_partial()
        except OSError as error:  # a full disk may have room again later
            _note(f"{table.partial} could not be written and is as it was: {error.strerror}")
            return False

    batches = images.read_batches(todo, config, arguments.batch_size, skip)
    saved = time.monotonic()
    try:
        with torch.inference_mode():
            for batch_paths, pixels in report.progress(batches, -(-len(todo) // arguments.batch_size), "embedding"):
                tokens = model.forward_features(pixels.to(device))
                pooled = model.forward_head(tokens, pre_logits=True).float()
                good, rows = _finite(arguments, model, batch_paths, pooled, skip)
                table.rows |= zip((names[path] for path in good), rows.cpu().numpy(), strict=True)
                if time.monotonic() - saved > SAVE_SECONDS:
                    save_partial()
                    saved = time.monotonic()
        if table.rows:
            table.save()
    except BaseException:
        with _undisturbed():
            if table.rows:
                _note(f"Saving {len(table.rows)} images; another Ctrl-C does not stop that.")
            if save_partial():
                _note(f"Stopped: {len(table.rows)} images are kept in {table.partial}; the same command goes on.")
        raise
    if not table.rows:
        raise ValueError("no image gave features; nothing written")
    print(f"{len(table.rows)} images, {len(skip)} skipped: {output}")
    return 1 if skip else 0


def classify(arguments: argparse.Namespace) -> int:
    device = _device(arguments.device)
    config = _config(arguments)
    num_classes = _classes(arguments, config)
    if not num_classes:
        raise UsageError(f"{arguments.model} has no classifier")
    from . import images

    _quiet_about_large_images()
    model = _model(arguments, device, num_classes=num_classes)
    import torch

    labels = imagenet_classes() if num_classes == 1000 else range(num_classes)
    skip = _Skipped()
    results = []
    try:
        with torch.inference_mode():
            for paths, pixels in images.read_batches(arguments.images, config, arguments.batch_size, skip):
                paths, logits = _finite(arguments, model, paths, model(pixels.to(device)).float(), skip)
                scores, classes = logits.softmax(dim=-1).topk(min(5, num_classes))
                for path, chances, indices in zip(paths, scores.tolist(), classes.tolist(), strict=True):
                    top = [
                        {"class": i, "label": str(labels[i]), "probability": p}
                        for p, i in zip(chances, indices, strict=True)
                    ]
                    results.append({"image": str(path), "top5": top})
                    if not arguments.json:
                        lines = [f"  {entry['probability']:6.1%}  {entry['label']}" for entry in top]
                        print(path, *lines, sep="\n", flush=True)
    finally:  # what an interrupted run has done is printed too
        if arguments.json:
            print(json.dumps(results, indent=2, allow_nan=False))
    return 1 if skip else 0


def attention(arguments: argparse.Namespace) -> int:
    output = _writable(arguments.output, "OUT")
    device = _device(arguments.device)
    config = _config(arguments)
    if not -config.depth <= arguments.block < config.depth:
        raise UsageError(f"--block is {arguments.block}, expected one of {arguments.model}'s, 0 to {config.depth - 1}")
    heads = range(config.num_heads)
    if arguments.head is not None and arguments.head not in heads:
        raise UsageError(f"--head is {arguments.head}, expected one of {arguments.model}'s, 0 to {heads[-1]}")
    from . import heatmaps, images

    try:
        heatmaps.check_format(output)
    except ValueError as error:
        raise UsageError(error) from None
    _quiet_about_large_images()
    pixels = images.read(arguments.image, config)
    model = _model(arguments, device, num_classes=0)
    import torch

    from . import attention_maps

    block = arguments.block % config.depth
    with torch.inference_mode():
        weights = attention_maps(model, pixels[None].to(device), [block])[0][0]  # (heads, queries, keys)
    if not (weights.sum(dim=-1) > 0.5).all():  # a row sums to 1, unless what it was made of is not finite
        raise ValueError(f"{arguments.image}: {_not_finite(arguments, model)}")
    queries = weights[:, :1] if config.class_token else weights
    maps = queries[..., config.num_prefix_tokens :].mean(dim=1).unflatten(1, config.grid_size).cpu().numpy()
    shown = {f"head {head}": maps[head] for head in (heads if arguments.head is None else [arguments.head])}
    if arguments.head is None:
        shown = {f"mean of {len(heads)} heads": maps.mean(axis=0)} | shown
    query = "the class token" if config.class_token else "all tokens"
    title = f"{arguments.model}, block {block}: attention of {query} to each patch"
    heatmaps.save(output, pixels.permute(1, 2, 0).numpy(), shown, title)
    print(f"block {block}, {', '.join(shown)}: {output}")
    return 0


def imagenet_classes() -> list[str]:
    """The names of the 1000 ImageNet-1k classes, in the order of the logits."""
    lines = (Path(__file__).parent / "models" / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]

"""The command line: info, verify, tune, bench, embed, classify.

Exit status: 0 done, 1 something failed (a check, an image, a download), 2 asked for wrongly (an unknown model, a device
that is not there), 3 a kernel took the GPU from `tune`, which can be run again. What a time limit left out is named and
does not count as failed. Results go to stdout, everything about the run to stderr. torch is imported by the commands,
not here, so that `fastvit --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shlex
import signal
import sys
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
    arguments = _parser().parse_args(argv)
    arguments.typed = sys.argv[1:] if argv is None else argv
    if argv is None:  # run from a shell, not from Python: a polite kill ends a command as Ctrl-C does, work kept
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return arguments.run(arguments)
    except UsageError as error:
        return _complain(arguments, error, 2)
    except KeyboardInterrupt:
        return _complain(arguments, "interrupted", 130)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if getattr(error, "name", None) == "torch":
            return _complain(arguments, "PyTorch is not installed: pip install torch", 2)
        return _complain(arguments, error, 1)


def _complain(arguments: argparse.Namespace, error: object, status: int) -> int:
    print(f"fastvit {arguments.command}: error: {error}", file=sys.stderr)
    return status


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
        description="What changed between two results files. Exit status 1 if any of ours got slower or wrong.",
    )
    sub.set_defaults(run=bench_compare)
    sub.add_argument("before", type=Path, metavar="A.json")
    sub.add_argument("after", type=Path, metavar="B.json")
    sub.add_argument(
        "--threshold",
        type=_positive(float),
        default=0.05,
        help="a smaller change counts as none; %(default)s if not said",
    )
    sub.add_argument("--relative", metavar="PEER", help="judge our times by this peer's, whatever the machine did")

    sub = command(embed, "features of a folder of images")
    sub.add_argument("folder", type=Path, help="searched at any depth")
    sub.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help=".npz or .safetensors")
    sub.add_argument("--resume", action="store_true", help="go on from OUT.partial, left by an interrupted run")
    _model_arguments(sub)

    sub = command(classify, "the five likeliest ImageNet classes of images")
    sub.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    sub.add_argument("--json", action="store_true", help="print JSON")
    _model_arguments(sub)
    return parser


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="vit_base_patch16_224", help="see fastvit.list_models()")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--pretrained", action="store_true", help="download timm's weights from the Hugging Face hub")
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights in a .safetensors or .pth file")
    parser.add_argument("--img-size", type=_positive(int), help="another image size than the model's own")
    parser.add_argument("--batch-size", type=_positive(int), default=32)
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
    return tuple(name.strip() for name in text.split(",") if name.strip())


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
    """The device to use, checked: raises UsageError where it is not there."""
    import torch

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
    if path.is_dir():
        raise UsageError(f"{what} {path} is a folder, expected a file")
    if not path.parent.is_dir():
        raise UsageError(f"{what} {path}: no such folder as {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{what} {path}: the folder {path.parent} cannot be written to")
    return path


# --------------------------------------------------------------------------------------------------------------------
# info


def info(arguments: argparse.Namespace) -> int:
    device = _device(arguments.device)
    import fastvit

    from .dispatch import interpreting, requested_backend
    from .report import environment
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

    jobs = arguments.jobs or len(os.sched_getaffinity(0))
    if not on_gpu and jobs == 1:
        checks.use_interpreter()

    output = arguments.json
    if output and "{device}" in str(output):
        output = Path(str(output).replace("{device}", _slug(device)))
        output.parent.mkdir(parents=True, exist_ok=True)
    output = output and _writable(output, "--json")
    environment = report.environment(device)
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
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"--json {output}: not a results file of fastvit verify; nothing to resume") from None
    return passed if same else {}


def _slug(device: str) -> str:
    from .report import device_name, slug

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
    from .tuned import table
    from .workers import GPU_LOST

    current = torch.device("cuda", torch.cuda.current_device())
    path = table(current).path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"no folder for the table can be made: {error}") from None
    _writable(path, "the table")
    output = arguments.json and _writable(arguments.json, "--json")
    environment = report.environment(device)
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
        print(f"\n{call.op.name}: {', '.join(call.op.candidates)}")
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
    if settings.interpreted:
        from .verify import use_interpreter

        use_interpreter()
    from .benchmarks import command, schema

    folder = Path(arguments.output.replace("{device}", _slug(device)))
    before = None
    if arguments.resume and (folder / command.FILE).exists():
        try:
            before = schema.load(folder / command.FILE)
        except ValueError as error:
            raise UsageError(f"--resume: {error}") from None
    return command.run(settings, folder, before)


def bench_compare(arguments: argparse.Namespace) -> int:
    from .benchmarks import command

    try:
        return command.compare_files(arguments.before, arguments.after, arguments.threshold, arguments.relative)
    except (ValueError, OSError) as error:
        raise UsageError(error) from None


# --------------------------------------------------------------------------------------------------------------------
# embed and classify


def _model(arguments: argparse.Namespace, device: str, **overrides):
    import torch

    from . import create_model
    from .models.registry import model_entry

    try:
        model_entry(arguments.model)
    except ValueError as error:
        raise UsageError(error) from None
    if arguments.img_size is not None:
        overrides["img_size"] = arguments.img_size
    model = create_model(arguments.model, arguments.pretrained, arguments.checkpoint, **overrides)
    return model.to(device, getattr(torch, DTYPES[arguments.dtype])).eval()


def _quiet_about_large_images() -> None:
    """fastvit.images refuses what Pillow only warns of."""
    import warnings

    from PIL import Image

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def embed(arguments: argparse.Namespace) -> int:
    output = _writable(arguments.output, "OUT")
    from . import features

    try:
        features.check_format(output)
    except ValueError as error:
        raise UsageError(error) from None
    device = _device(arguments.device)
    from . import images, report

    _quiet_about_large_images()
    paths = images.find_images(arguments.folder)
    if not paths:
        raise ValueError(f"no images in {arguments.folder}")
    weights = "pretrained"
    if arguments.checkpoint:
        weights = f"{arguments.checkpoint.resolve()} of {arguments.checkpoint.stat().st_mtime_ns}"
    facts = {"model": arguments.model, "weights": weights, "img_size": arguments.img_size, "dtype": arguments.dtype}
    table = features.Features(output, facts)
    if arguments.resume:
        table.resume()
    names = {path: path.relative_to(arguments.folder).as_posix() for path in paths}
    todo = [path for path in paths if names[path] not in table.done]
    if len(todo) < len(paths):
        _note(f"Resuming: {len(paths) - len(todo)} of {len(paths)} images are done.")
    model = _model(arguments, device, num_classes=0)  # a checkpoint's classifier, of whatever size, is not used
    import torch

    failures = []

    def failed(error: images.ImageError) -> None:
        failures.append(error)
        _note(f"skipped {error}")

    batches = images.read_batches(todo, model.config, arguments.batch_size, failed)
    total = -(-len(todo) // arguments.batch_size)
    saved = time.monotonic()
    try:
        with torch.inference_mode():
            for batch_paths, pixels in report.progress(batches, total, "embedding"):
                tokens = model.forward_features(pixels.to(device))
                pooled = model.forward_head(tokens, pre_logits=True)
                table.add([names[path] for path in batch_paths], pooled.float().cpu().numpy())
                if time.monotonic() - saved > SAVE_SECONDS:
                    table.save_partial()
                    saved = time.monotonic()
    except BaseException:
        if table.save_partial():
            _note(f"Stopped: {len(table.done)} images are kept in {table.partial}; --resume goes on from there.")
        raise
    if not table.done:
        raise ValueError("none of the images could be read; nothing written")
    table.save()
    print(f"{len(table.done)} images, {len(failures)} skipped: {output}")
    return 1 if failures else 0


def classify(arguments: argparse.Namespace) -> int:
    device = _device(arguments.device)
    from . import images

    _quiet_about_large_images()
    model = _model(arguments, device)
    if not model.config.num_classes:
        raise UsageError(f"{arguments.model} has no classifier")
    import torch

    labels = imagenet_classes() if model.config.num_classes == 1000 else range(model.config.num_classes)
    failures = []

    def failed(error: images.ImageError) -> None:
        failures.append(error)
        _note(f"skipped {error}")

    results = []
    with torch.inference_mode():
        for paths, pixels in images.read_batches(arguments.images, model.config, arguments.batch_size, failed):
            scores, classes = model(pixels.to(device)).float().softmax(dim=-1).topk(5)
            for path, chances, indices in zip(paths, scores.tolist(), classes.tolist(), strict=True):
                top = [
                    {"class": i, "label": str(labels[i]), "probability": p}
                    for p, i in zip(chances, indices, strict=False)
                ]
                results.append({"image": str(path), "top5": top})
                if not arguments.json:
                    print(path)
                    for entry in top:
                        print(f"  {entry['probability']:6.1%}  {entry['label']}")
    if arguments.json:
        print(json.dumps(results, indent=2))
    return 1 if failures else 0


def imagenet_classes() -> list[str]:
    """The names of the 1000 ImageNet-1k classes, in the order of the logits."""
    lines = (Path(__file__).parent / "models" / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]

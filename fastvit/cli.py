"""The command line: info, verify, bench, embed, classify.

Exit status: 0 done, 1 something failed (a check, an image, a download), 2 asked for wrongly (an unknown model, a device
that is not there). What a time limit left out is named and does not count as failed. Results go to stdout, everything
about the run to stderr. torch is imported by the commands, not here, so that `fastvit --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from . import __version__

DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16",
          "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # fmt: skip
OPS = ("patch_embed", "attention", "layer_norm", "layer_norm_linear", "linear_residual", "layer_norm_mlp", "model")
SAVE_SECONDS = 60  # how much of `embed` a power cut may cost


class UsageError(Exception):
    """The command was asked for something that cannot be, with exit status 2."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = _parser().parse_args(argv)
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

    sub = command(bench, "models against their peers: speed, error, memory")
    sub.add_argument("--models", type=_names, help="comma-separated; patterns as in fastvit.list_models")
    sub.add_argument("--batches", type=_list(_positive(int)), help="comma-separated batch sizes")
    sub.add_argument("--dtypes", type=_list_of(DTYPES), help="e.g. bf16,fp32")
    sub.add_argument("--peers", type=_names, help="comma-separated: timm, reference")
    sub.add_argument("--photos", type=Path, metavar="FOLDER", help="photographs to use instead of the shipped ones")
    sub.add_argument("--pretrained", action="store_true", help="download weights instead of drawing random ones")
    sub.add_argument("--seconds", type=_positive(float), help="time spent on each row's timing")
    sub.add_argument("--time-limit", type=_positive(float), metavar="SECONDS", help="start no row after this long")
    sub.add_argument(
        "-o",
        "--output",
        default="results/{device}",
        metavar="FOLDER",
        help="where bench.json and bench.png go; {device} stands for the device's name",
    )

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

    facts = environment(device)
    backends = {"torch": "PyTorch's own operators, on every device"}
    if importlib.util.find_spec("triton") is None:
        backends["triton"] = "not available: Triton is not installed"
    elif device.startswith("cuda") and not interpreting():
        backends["triton"] = "the Triton kernels, compiled for this GPU"
    else:
        backends["triton"] = "the Triton kernels in Triton's interpreter, on the CPU: for checking, not for speed"
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
    if not on_gpu:
        _use_interpreter()

    from . import report
    from . import verify as checks

    output = arguments.json
    if output and "{device}" in str(output):
        output = Path(str(output).replace("{device}", _slug(device)))
        output.parent.mkdir(parents=True, exist_ok=True)
    output = output and _writable(output, "--json")
    environment = report.environment(device)
    dtypes = _dtypes(arguments.dtypes) or tuple(checks.FACTOR)
    cases = checks.cases(checks.DEVICE if on_gpu else checks.INTERPRETER, dtypes, arguments.ops)
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
            rows = [result.as_dict() for result in results]
            report.write_json(output, {"environment": environment, "finished": finished, "results": rows})

    start = time.perf_counter()
    try:
        for result in report.progress(checks.run(cases, device, arguments.time_limit), len(cases), "verifying"):
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
    save(finished=len(results) == len(cases) and not counts["skipped"])
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
    return 0 if counts["passed"] and not counts["failed"] else 1


def _use_interpreter() -> None:
    """Let the kernels run on the CPU, repaired and guarded. Nothing may have imported Triton before."""
    os.environ["TRITON_INTERPRET"] = "1"
    from .interpret import install

    install(os.environ.get("FASTVIT_GUARD", "race"))


def _slug(device: str) -> str:
    from .report import device_name, slug

    return slug(device_name(device))


# --------------------------------------------------------------------------------------------------------------------
# bench


def bench(arguments: argparse.Namespace) -> int:
    device = _device(arguments.device)
    from . import list_models, report
    from .benchmarks import bench as models
    from .models.registry import model_entry

    chosen = {name: getattr(arguments, name) for name in ("batches", "peers", "photos", "seconds", "time_limit")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if arguments.models:
        matches = [list_models(pattern) or [pattern] for pattern in arguments.models]
        chosen["models"] = tuple(dict.fromkeys(name for names in matches for name in names))
    if arguments.dtypes:
        chosen["dtypes"] = _dtypes(arguments.dtypes)
    settings = models.default_settings(device, pretrained=arguments.pretrained, **chosen)
    for name in settings.models:
        try:
            model_entry(name)
        except ValueError as error:
            raise UsageError(error) from None
    for peer in settings.peers:
        if peer not in models.PEERS:
            raise UsageError(f"unknown peer {peer!r}, expected some of {', '.join(models.PEERS)}")

    if not settings.photos.is_dir():
        raise UsageError(f"--photos {settings.photos}: no such folder")

    if settings.interpreted:
        _use_interpreter()
    folder = Path(arguments.output.replace("{device}", _slug(device)))
    folder.mkdir(parents=True, exist_ok=True)
    environment = report.environment(device)
    backend = "Triton kernels" if device.startswith("cuda") else "PyTorch back end; the Triton kernels need a GPU"
    _note(
        f"Timing on {environment['device']} ({backend}); weights: {settings.weights}; images: {settings.images}. "
        "images/s: median. ours/this: our speed over this peer's in paired rounds, median [quartiles]. error: of the "
        "logits, relative rms against the float64 reference. peak MB: what a forward pass takes beyond weights and "
        "input."
    )
    table = report.Table(
        {"model": -24, "dtype": -5, "batch": 5, "by": -9, "images/s": 9, "ours/this": 19, "error": 8, "peak MB": 8}
    )
    rows = []
    interpreted = None

    def save(finished: bool) -> None:
        settled = {"environment": environment, "settings": settings.as_dict(), "finished": finished}
        found = {"rows": [row.as_dict() for row in rows], "interpreted": interpreted}
        report.write_json(folder / "bench.json", settled | found)

    total = len(settings.models) * len(settings.dtypes) * len(settings.batches)
    try:
        for row in report.progress(models.run(settings), total, "timing"):
            rows.append(row)
            save(finished=False)
            _print_row(table, row)
    except KeyboardInterrupt:
        _note(f"Interrupted after {len(rows)} of {total} rows.")
    _print_top5(rows, settings)
    if settings.interpreted and len(rows) == total:
        _note(
            f"Classifying the photographs on the Triton kernels in the interpreter, {settings.interpreted}: a minute."
        )
        interpreted = models.classify_interpreted(settings)
        _print_interpreted(interpreted)
    save(finished=len(rows) == total and all(row.status != "skipped" for row in rows))
    print(f"results: {folder / 'bench.json'}")
    timed = [row for row in rows if row.status == "timed"]
    if timed and importlib.util.find_spec("matplotlib") is None:
        _note("No picture: matplotlib is not installed.")
    elif timed:
        from .benchmarks.plot import picture

        title = f"{environment['device']}, torch {environment['torch']}; weights: {settings.weights}"
        report.write_atomically(folder / "bench.png", picture(rows, title))
        print(f"picture: {folder / 'bench.png'}")
    if len(rows) < total:
        return 130
    right = interpreted is None or interpreted["ok"]
    return 0 if timed and right and all(row.status in ("timed", "skipped") for row in rows) else 1


def _print_row(table, row) -> None:
    """One line a contestant; or one for a row that was not timed, with the reason."""
    cells = [row.model, row.dtype, row.batch]
    if row.status != "timed":
        table.row(*cells, f"{row.status}: {row.reason}", "", "", "", "")
        return
    for name, side in row.contestants.items():
        if side.failure:
            table.row(*cells, name, side.failure, "", "", "")
        else:
            speed = f"{side.images_per_s['median']:.1f}"
            ratio = "{median:.2f} [{q25:.2f}, {q75:.2f}]".format(**side.ratio) if side.ratio else ""
            peak = "n/a" if side.peak_bytes is None else f"{side.peak_bytes / 1e6:.1f}"
            table.row(*cells, name, speed, ratio, f"{side.error:.1e}", peak)
        cells = ["", "", ""]


def _print_top5(rows: list, settings) -> None:
    """How far the classes of the photographs by ours and by the float64 reference agree, once a model and dtype."""
    from .report import Table

    seen = {(row.model, row.dtype): row.top5 for row in rows if row.top5}
    if not seen:
        return
    print()
    if not settings.pretrained:
        print("With random weights the classes mean nothing; that both sides name the same ones is the check.")
    table = Table({"model": -24, "dtype": -5, "same top class": 14, "shared top-5 classes": 20})
    for (model, dtype), top5 in seen.items():
        photos = len(top5["photos"])
        table.row(model, dtype, f"{top5['same_first']} of {photos}", f"{top5['same_in_top5']} of {5 * photos}")
    print()


def _print_interpreted(found: dict) -> None:
    """The class of each photograph by the kernels and by the reference, and both errors."""
    from .report import Table

    table = Table({"photograph": -24, "class by the kernels": 20, "by the reference": 16, "shared top-5": 12})
    for photo, ours, truth in zip(found["photos"], found["ours"], found["reference"], strict=True):
        table.row(photo, ours[0], truth[0], len({*ours} & {*truth}))
    print(
        f"{found['model']} {found['dtype']}: error of the kernels {found['error']:.1e}, of plain PyTorch "
        f"{found['plain_error']:.1e}; {'ok' if found['ok'] else 'WRONG'}; {found['seconds']:.0f} s in the interpreter\n"
    )


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

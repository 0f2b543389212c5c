"""`fastvit bench`: models and ops against their peers. What it does once its arguments are read is
`fastvit.benchmarks.command`, above the package, which only this file reaches up to."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
from pathlib import Path

from . import _common
from ._common import DTYPES, OPS, UsageError, list_of, names, positive, some_of


def add(commands: argparse._SubParsersAction) -> None:
    parser = _common.add_command(commands, "bench", "models and ops against their peers: speed, error, memory", run)
    parser.add_argument("--quick", action="store_true", help="a little of everything, in two minutes")
    parser.add_argument("--models", type=names, default=(), help="comma-separated; patterns as in fastvit.list_models")
    parser.add_argument("--img-sizes", type=list_of(positive(int)), default=(), help="other sizes than the models' own")
    parser.add_argument("--ops", type=names, default=(), help=f"single ops instead of whole models, of {','.join(OPS)}")
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="ViTs beside ResNets and RegNetY of timm instead: images/s against published top-1",
    )
    parser.add_argument("--modes", type=names, default=(), help="inference,training")
    parser.add_argument("--batches", type=list_of(positive(int)), default=(), help="comma-separated batch sizes")
    parser.add_argument("--dtypes", type=some_of(DTYPES), default=(), help="e.g. bf16,fp32")
    parser.add_argument(
        "--peers", type=names, default=(), help="comma-separated names, as in the results; all if not said"
    )
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="photographs to use instead of the shipped ones")
    parser.add_argument("--pretrained", action="store_true", help="download weights instead of drawing random ones")
    parser.add_argument("--seconds", type=positive(float), help="time spent on each row's timing")
    parser.add_argument(
        "--time-limit", type=positive(float), metavar="SECONDS", help="start no row and no peer after this long"
    )
    parser.add_argument("--resume", action="store_true", help="do not repeat rows that FOLDER/bench.json has from here")
    parser.add_argument(
        "-o",
        "--output",
        default="results/{device}",
        metavar="FOLDER",
        help="where bench.json, tables and pictures go; {device} stands for the device's name",
    )
    _add_compare(parser.add_subparsers(metavar="compare"))


def _add_compare(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "compare",
        help="what changed between two results files",
        description="What changed between two results files. Exit status 1 if any of ours got slower or wrong; 2 if "
        "the runs cannot be compared: files that do not fit, or peers that moved against each other by 1.5 or more.",
    )
    parser.set_defaults(run=run_compare, command="bench compare")
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument(
        "--threshold",
        type=positive(float),
        default=0.05,
        help="a smaller change counts as none; %(default)s if not said",
    )
    parser.add_argument(
        "--relative",
        metavar="PEER",
        help="judge our times by this peer's, whatever the machine did; one that most peers moved with",
    )


def run(arguments: argparse.Namespace) -> int:
    device = _common.checked_device(arguments.device)
    from ..benchmarks import suites
    from ..models.registry import model_entry

    axes = {name: getattr(arguments, name) for name in ("quick", "img_sizes", "ops", "modes", "batches", "peers")}
    axes |= {"models": _common.models_named(arguments.models), "dtypes": _common.torch_dtypes(arguments.dtypes)}
    kind = suites
    if arguments.baselines:
        from ..benchmarks import baselines  # Triton comes with it, and that not before `use_interpreter` below

        kind = baselines
        axes["models"] = arguments.models
        for name in ("quick", "img_sizes", "ops", "peers"):
            if axes.pop(name):
                raise UsageError(f"--baselines takes no --{name.replace('_', '-')}")
        if arguments.pretrained:
            raise UsageError("--baselines takes no --pretrained: weights do not change a speed")
    others = {name: getattr(arguments, name) for name in ("photos", "seconds", "time_limit", "pretrained")}
    others = {name: value for name, value in others.items() if value is not None}
    others["command"] = shlex.join(["fastvit", *arguments.typed])
    with _common.as_usage_error(ValueError):
        settings = kind.settings(device, **axes, **others)
    if not settings.photos.is_dir():
        raise UsageError(f"--photos {settings.photos}: no such folder")
    if importlib.util.find_spec("PIL") is not None:
        from ..images import find_images

        if not find_images(settings.photos):
            raise UsageError(f"--photos {settings.photos}: no images in it")
    if settings.pretrained:
        for case in settings.cases:
            if model_entry(case.model).hub_id is None:
                raise UsageError(f"--pretrained: there are no weights of {case.model}")
    if settings.interpreted:
        from ..verify import use_interpreter

        use_interpreter()
    from ..benchmarks import command, schema

    command = baselines if arguments.baselines else command
    folder = _common.with_device_name(arguments.output, device)
    _common.make_folder(folder, "--output")
    before = None
    if arguments.resume and (folder / command.FILE).exists():
        try:
            before = schema.load(folder / command.FILE)
        except (ValueError, OSError) as error:
            raise UsageError(f"--resume: {error}") from None
    return command.run(settings, folder, before)


def run_compare(arguments: argparse.Namespace) -> int:
    from ..benchmarks import command

    with _common.as_usage_error(ValueError, OSError):
        return command.compare_files(arguments.before, arguments.after, arguments.threshold, arguments.relative)

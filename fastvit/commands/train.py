"""`fastvit train`: a ViT on a folder of images, by a recipe; alone or as one of the processes of torchrun."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
from pathlib import Path

from . import _common
from ._common import DONE, UsageError, positive


def add(commands: argparse._SubParsersAction) -> None:
    parser = _common.add_command(commands, "train", "train a ViT on labelled images, by DeiT's recipe or another", run)
    what = "with train/ and val/: class folders or WebDataset's .tar files; or a Hugging Face dataset saved to disk"
    parser.add_argument("data", type=Path, metavar="DATA", help=what)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder for everything")
    parser.add_argument("--model", default="deit_small_patch16_224", help="see fastvit.list_models()")
    parser.add_argument("--img-size", type=positive(int), help="another image size than the model's own")
    changes = "fields of fastvit.ViTConfig to change: patch_size=4 depth=6"
    parser.add_argument("--model-kwargs", nargs="+", default=[], metavar="FIELD=VALUE", help=changes)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--pretrained", action="store_true", help="start from timm's weights, downloaded")
    start.add_argument("--checkpoint", type=Path, metavar="FILE", help="start from the weights in a file")
    parser.add_argument("--teacher", metavar="NAME", help="a classifier of timm's to learn from: regnety_160")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--teacher-pretrained", action="store_true", help="download the teacher's weights")
    source.add_argument("--teacher-checkpoint", type=Path, metavar="FILE", help="the teacher's weights")
    parser.add_argument("--precision", help="float32, amp-bfloat16, bfloat16 or amp-float16; by default float32 on a "
                        "CPU, amp-bfloat16 on a GPU")  # fmt: skip
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="how processes share the work")
    parser.add_argument("--recompute", choices=("none", "blocks", "fc1"), default="none",
                        help="what backward computes again instead of keeping")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--workers", type=int, default=4, help="processes that load images, for each that trains")
    parser.add_argument("--seed", type=_seed, default=0)
    parser.add_argument("--save-every", type=positive(int), metavar="STEPS", help="an epoch if not said")
    parser.add_argument("--keep", type=positive(int), default=3, help="checkpoints to keep (default: %(default)s)")
    parser.add_argument("--eval-every", type=positive(int), default=1, metavar="EPOCHS")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                        help="go on from OUT's newest checkpoint, or start anew; it goes on if not said")  # fmt: skip
    parser.add_argument(
        "--profile", action="store_true", help="write a trace of three steps, after five others, to OUT/trace.json"
    )
    _add_recipe(parser)


def _seed(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """--recipe, and an option for every field of a recipe."""
    group = parser.add_argument_group("recipe", "a preset, and values to change in it; all are shown at the start")
    group.add_argument("--recipe", default="deit", help="deit, deit-finetune, deit3 or deit3-finetune")
    from dataclasses import fields

    from ..training.recipes import Recipe

    for entry in fields(Recipe):
        name, kind = f"--{entry.name.replace('_', '-')}", type(entry.default)
        group.add_argument(name, type=kind, metavar=kind.__name__.upper(), help=entry.metadata["help"])


def run(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict, replace

    from .. import report
    from ..training.recipes import PRECISIONS, RECIPES

    device = _common.checked_device(arguments.device)
    if arguments.recipe not in RECIPES:
        raise UsageError(f"unknown recipe {arguments.recipe!r}, expected one of {', '.join(RECIPES)}")
    with _common.as_usage_error(ValueError, TypeError):
        preset = RECIPES[arguments.recipe]
        said = {name: getattr(arguments, name) for name in asdict(preset) if getattr(arguments, name) is not None}
        recipe = replace(preset, **said)
    precision = arguments.precision or ("float32" if device == "cpu" else "amp-bfloat16")
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if not arguments.teacher and (arguments.teacher_pretrained or arguments.teacher_checkpoint):
        raise UsageError("--teacher-pretrained and --teacher-checkpoint need --teacher NAME")
    if arguments.teacher and not (arguments.teacher_pretrained or arguments.teacher_checkpoint):
        raise UsageError("--teacher needs --teacher-pretrained or --teacher-checkpoint FILE")
    from .. import torchvision_shim

    if importlib.util.find_spec("timm") is None:
        raise UsageError("training needs timm: pip install 'fastvit[train]'")
    torchvision_shim.install()
    from .. import training

    with _common.as_usage_error(ValueError, NotADirectoryError):
        images = training.find(arguments.data, "train")
        if images is None:
            raise UsageError(f"{arguments.data} has no folder or split named train")
        validation = training.find(arguments.data, "val", images.classes)
    _common.make_folder(arguments.output, "--output")
    if arguments.checkpoint and arguments.checkpoint.resolve().is_relative_to(arguments.output.resolve()):
        raise UsageError(f"--checkpoint {arguments.checkpoint} is in OUT, which the run writes to: choose another OUT")
    with training.processes(device) as place:
        with _common.as_usage_error(ValueError, TypeError, OSError):
            model = _model(arguments, len(images.classes), recipe, place)
        settings = training.Settings(
            arguments.output,
            **{name: getattr(arguments, name) for name in ("seed", "parallel", "recompute", "compile", "workers")},
            **{name: getattr(arguments, name) for name in ("keep", "eval_every", "profile")},
            precision=precision,
            save_every=arguments.save_every or 0,
        )
        facts = {"data": str(arguments.data.resolve()), "model": arguments.model, "teacher": arguments.teacher}
        files = {name: getattr(arguments, name) for name in ("checkpoint", "teacher_checkpoint")}
        facts |= {name: path and _common.stamp(path) for name, path in files.items()}
        facts |= {"img_size": list(model.config.img_size), "model_kwargs": " ".join(sorted(arguments.model_kwargs))}
        teacher, how = _teacher(arguments, len(images.classes), place)
        with _common.as_usage_error(ValueError):
            trainer = training.Trainer(model, images, validation, recipe, settings, teacher, **how, facts=facts)
            # Those that torchrun starts again are given the same arguments.
            if arguments.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
                trainer.resume()
        first = trainer.rank == 0
        if first:
            _show(arguments, recipe, preset, trainer, images, validation, precision)
        trainer.run()
        if first:
            best = f"best top-1 {trainer.best:.2%}, " if trainer.best >= 0 else ""
            print(f"{best}{trainer.steps} steps: {arguments.output / 'model.safetensors'}")
            if (count := len(report.lines_of(arguments.output / "skipped.txt"))) > 0:
                report.note(f"{count} images could not be read: {arguments.output / 'skipped.txt'}")
    return DONE


def _model(arguments: argparse.Namespace, classes: int, recipe, device):
    """The model at the start of the run, the same in every process."""
    import torch

    from .. import create_model, load_checkpoint

    options = dict(_field(text) for text in arguments.model_kwargs)
    if decided := options.keys() & {"num_classes", "drop_path_rate", "drop_rate", "img_size"}:
        raise ValueError(f"--model-kwargs has {', '.join(sorted(decided))}, which data, recipe or --img-size decide")
    if arguments.img_size is not None:
        options["img_size"] = arguments.img_size
    torch.manual_seed(arguments.seed)
    options |= {"drop_path_rate": recipe.drop_path, "drop_rate": recipe.dropout, "num_classes": classes}
    model = create_model(arguments.model, arguments.pretrained, **options)
    if arguments.checkpoint:
        load_checkpoint(model, arguments.checkpoint, new_classifier=True)
    return model.to(device)


def _field(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--model-kwargs has {text!r}, expected FIELD=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _teacher(arguments: argparse.Namespace, classes: int, device) -> tuple:
    """The teacher in evaluation and how its images are normalised, or None and nothing."""
    if not arguments.teacher:
        return None, {}
    import timm

    with _common.as_usage_error(RuntimeError, ValueError, OSError):
        teacher = timm.create_model(arguments.teacher, pretrained=arguments.teacher_pretrained, num_classes=classes)
        if arguments.teacher_checkpoint:
            timm.models.load_checkpoint(teacher, str(arguments.teacher_checkpoint), weights_only=True)
    if arguments.teacher_pretrained and teacher.pretrained_cfg["num_classes"] != classes:
        trained = teacher.pretrained_cfg["num_classes"]
        raise UsageError(
            f"--teacher-pretrained: {arguments.teacher} knows {trained} classes, the images have {classes}"
        )
    how = {f"teacher_{name}": tuple(teacher.pretrained_cfg[name]) for name in ("mean", "std")}
    return teacher.to(device).eval().requires_grad_(False), how


def _show(arguments, recipe, preset, trainer, images, validation, precision) -> None:
    """Every value of the run."""
    from dataclasses import fields

    from ..report import note

    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    note(f"model       {arguments.model}, {count:,} parameters, {trainer.flops / 1e9:.3g} GFLOP an image, {precision}")
    tested = f"{len(validation)} for validation" if validation else "none for validation"
    note(f"images      {len(images)}, {tested}, {len(images.classes)} classes: {arguments.data}")
    note(f"steps       {trainer.steps}, {trainer.batches.steps_per_epoch} an epoch, on {trainer.world} process(es), "
         f"{trainer.device}")  # fmt: skip
    note(f"teacher     {arguments.teacher or 'none'}")
    note(f"recipe      {arguments.recipe}; highest learning rate {recipe.peak_lr:g}")
    if recipe.warmup_epochs >= recipe.epochs:
        note("  the learning rate only rises: warmup_epochs is not less than epochs")
    for entry in fields(recipe):
        value = getattr(recipe, entry.name)
        changed = "" if value == getattr(preset, entry.name) else f"   ({getattr(preset, entry.name)} in the recipe)"
        note(f"  {entry.name:<26}{value}{changed}")

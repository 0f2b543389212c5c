"""`fastvit classify`: the five likeliest classes of images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import _common
from ._common import DONE, FAILED, UsageError, positive
from ._model import Skipped, add_model_arguments, build, config_of, finite, name_of, quiet_about_large_images, served


def add(commands: argparse._SubParsersAction) -> None:
    text = "the five likeliest classes of images: ImageNet's, or those of a checkpoint"
    parser = _common.add_command(commands, "classify", text, run)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_model_arguments(parser)
    parser.add_argument("--batch-size", type=positive(int), default=32)


def run(arguments: argparse.Namespace) -> int:
    device = _common.checked_device(arguments.device)
    config = config_of(arguments)
    num_classes = _classes(arguments, config)
    if not num_classes:
        raise UsageError(f"{name_of(arguments)} has no classifier")
    from .. import images

    quiet_about_large_images()
    model = build(arguments, config, device, num_classes)
    import torch

    logits_of = served(model, "logits", arguments.batch_size, len(arguments.images))
    labels = class_labels(arguments.checkpoint, num_classes)
    skip = Skipped()
    results = []
    try:
        with torch.inference_mode():
            for paths, pixels in images.read_batches(arguments.images, config, arguments.batch_size, skip):
                paths, logits = finite(arguments, model, paths, logits_of(pixels.to(device)).float(), skip)
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
    return FAILED if skip else DONE


def _classes(arguments: argparse.Namespace, config) -> int:
    """How many classes there are: those of the checkpoint's classifier if it has one, else the model's own."""
    if arguments.pretrained:
        return config.num_classes
    from ..models.infer import classes_of
    from ..models.reading import read_checkpoint

    with _common.as_usage_error(ValueError, OSError):
        return classes_of(read_checkpoint(arguments.checkpoint)[0]) or config.num_classes


def class_labels(checkpoint: Path | None, num_classes: int) -> list[str]:
    """The names of the classes: those that the checkpoint says; ImageNet's of a thousand; else their numbers."""
    from ..models.reading import class_names

    names = class_names(checkpoint) if checkpoint else None
    if names is not None and len(names) == num_classes:
        return names
    return imagenet_classes() if num_classes == 1000 else [str(number) for number in range(num_classes)]


def imagenet_classes() -> list[str]:
    """The names of the 1000 ImageNet-1k classes, in the order of the logits."""
    path = Path(__file__).parents[1] / "models" / "imagenet_classes.txt"
    return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]

"""`fastvit validate`: how good a model is on labelled images: its classifier, or its features by k-NN and a linear
probe."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import _common
from ._common import DONE, FAILED, UsageError, positive
from ._model import Skipped, add_model_arguments, build, config_of, name_of, quiet_about_large_images, served


def add(commands: argparse._SubParsersAction) -> None:
    parser = _common.add_command(commands, "validate", "how good a model is on labelled images", run)
    what = "with val/, and train/ for --knn and --linear-probe, as of fastvit train"
    parser.add_argument("data", type=Path, metavar="DATA", help=what)
    parser.add_argument("--knn", action="store_true", help="top-1 of the 20 nearest training images, by features")
    parser.add_argument("--linear-probe", action="store_true", help="top-1 of a linear classifier of the features")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_model_arguments(parser)
    parser.add_argument("--batch-size", type=positive(int), default=32)
    parser.add_argument("--workers", type=int, default=2, help="processes that load images")


def run(arguments: argparse.Namespace) -> int:
    device = _common.checked_device(arguments.device)
    config = config_of(arguments)
    from ..training.data import evaluation_loader, find

    quiet_about_large_images()
    of_features = arguments.knn or arguments.linear_probe
    with _common.as_usage_error(ValueError, NotADirectoryError):
        classes = None if of_features else _class_order(arguments, config.num_classes)
        sources = {"train": find(arguments.data, "train")} if of_features else {}
        sources["val"] = find(arguments.data, "val", sources["train"].classes if sources.get("train") else classes)
    if missing := [split for split, source in sources.items() if source is None]:
        raise UsageError(f"{arguments.data} has no folder or split named {' or '.join(missing)}")
    if not of_features and not config.num_classes:
        raise UsageError(f"{name_of(arguments)} has no classifier: --knn and --linear-probe do without")
    count = len(sources["val"].classes)
    fits = count <= config.num_classes if sources["val"].numbered else count == config.num_classes
    if not of_features and not fits:
        raise UsageError(f"{name_of(arguments)} has {config.num_classes} classes, {arguments.data} has {count}")
    model = build(arguments, config, device, 0 if of_features else config.num_classes)
    import torch

    from ..training import evaluate

    place, skip = torch.device(device), Skipped()
    count = sum(len(source) for source in sources.values())
    call = served(model, "features" if of_features else "logits", arguments.batch_size, count)
    loaders = {
        split: evaluation_loader(source, config, arguments.batch_size, arguments.workers, place.type == "cuda")
        for split, source in sources.items()
    }
    with torch.no_grad():  # what is made in inference mode could not be learned from
        if not of_features:
            found = evaluate.accuracy(call, loaders["val"], place, len(sources["val"]), skip)
        else:
            rows = {split: evaluate.features(call, loader, place, skip) for split, loader in loaders.items()}
    if of_features:
        parts = (*rows["train"], *rows["val"], len(sources["val"].classes))
        found = {"knn": evaluate.knn(*parts)} if arguments.knn else {}
        found |= {"linear_probe": evaluate.linear_probe(*parts)} if arguments.linear_probe else {}
        found["images"] = len(rows["val"][0])
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        words = {"top1": "top-1", "top5": "top-5", "knn": "k-NN top-1", "linear_probe": "linear probe top-1"}
        print(", ".join([f"{words[name]} {found[name]:.2%}" for name in words if name in found]
                        + [f"{found['images']} images"]))  # fmt: skip
    return FAILED if skip else DONE


def _class_order(arguments: argparse.Namespace, num_classes: int) -> list[str] | None:
    """The names of the model's classes, if its file says them, in the order of its logits."""
    from ..models.reading import class_names

    names = class_names(arguments.checkpoint) if arguments.checkpoint else None
    return names if names is not None and len(names) == num_classes else None

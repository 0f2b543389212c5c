"""`fastvit embed`: features of a folder of images, in a file that an interrupted run goes on with.

With `--engine ray`, of inputs of any size on many processes: embed_ray.py.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from . import _common
from ._common import DONE, DTYPES, FAILED, UsageError, positive
from ._model import (
    SHARDS,
    Skipped,
    add_model_arguments,
    build,
    config_of,
    finite,
    name_of,
    quiet_about_large_images,
    served,
)

SAVE_SECONDS = 60  # how much a power cut may cost


def add(commands: argparse._SubParsersAction) -> None:
    parser = _common.add_command(commands, "embed", "features of a folder of images", run)
    parser.add_argument(
        "folder", type=Path, help="searched at any depth; --engine ray takes Parquet and .tar files too"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help=".npz or .safetensors; of --engine ray a folder"
    )
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from what an interrupted run left, or start anew; it goes on if not said",
    )
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: a pool of Ray Data's actors")
    parser.add_argument(
        "--actors", type=positive(int), help="of --engine ray, if not said one for each GPU, or for every 4 CPUs"
    )
    add_model_arguments(parser)
    parser.add_argument("--batch-size", type=positive(int), default=32)


def run(arguments: argparse.Namespace) -> int:
    if arguments.engine == "ray":
        from . import embed_ray

        return embed_ray.run(arguments, _facts(arguments, config_of(arguments)))
    if arguments.actors:
        raise UsageError("--actors needs --engine ray")
    if arguments.folder.suffix.lower() in SHARDS:
        raise UsageError(f"{arguments.folder}: Parquet and .tar files need --engine ray")
    output = _common.check_writable(arguments.output, "OUT")
    from .. import features

    with _common.as_usage_error(ValueError):
        features.check_format(output)
    device = _common.checked_device(arguments.device)
    config = config_of(arguments)
    facts = _facts(arguments, config)
    from .. import images
    from ..report import note, progress

    quiet_about_large_images()
    skip = Skipped()
    with _common.as_usage_error(NotADirectoryError):
        paths = images.find_images(arguments.folder, skip)
    if not paths and not skip:
        shards = any(images.walk(arguments.folder, skip, SHARDS))
        more = "; its Parquet and .tar files need --engine ray" if shards else ""
        raise UsageError(f"no images in {arguments.folder}{more}")
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
    _common.check_writable(table.partial, "OUT.partial")
    left_out = 0
    if arguments.resume:
        try:
            left_out = table.resume()
        except ValueError as error:
            raise UsageError(f"{error}; --no-resume starts anew") from None
    model = build(arguments, config, device, num_classes=0)  # a checkpoint's classifier, of whatever size, is not used
    if left_out:
        note(f"Left out {left_out} rows of {table.partial}: their images are gone or have changed.")
    if table.rows:
        note(f"Resuming: {len(table.rows)} of {len(paths)} images are done.")
    if output.exists():
        note(f"{output} exists: it is replaced when this run is through.")
    todo = [path for path, name in names.items() if name not in table.rows]
    import torch

    def save_partial() -> bool:
        try:
            return table.save_partial()
        except OSError as error:  # a full disk may have room again later
            note(f"{table.partial} could not be written and is as it was: {error.strerror}")
            return False

    features_of = served(model, "features", arguments.batch_size, len(todo))
    batches = images.read_batches(todo, config, arguments.batch_size, skip)
    saved = time.monotonic()
    try:
        with torch.inference_mode():
            for batch_paths, pixels in progress(batches, -(-len(todo) // arguments.batch_size), "embedding"):
                pooled = features_of(pixels.to(device)).float()
                good, rows = finite(arguments, model, batch_paths, pooled, skip)
                table.rows |= zip((names[path] for path in good), rows.cpu().numpy(), strict=True)
                if time.monotonic() - saved > SAVE_SECONDS:
                    save_partial()
                    saved = time.monotonic()
        if table.rows:
            table.save()
    except BaseException:
        with _undisturbed():
            if table.rows:
                note(f"Saving {len(table.rows)} images; another Ctrl-C does not stop that.")
            if save_partial():
                note(f"Stopped: {len(table.rows)} images are kept in {table.partial}; the same command goes on.")
        raise
    if not table.rows:
        raise ValueError("no image gave features; nothing written")
    print(f"{len(table.rows)} images, {len(skip)} skipped: {output}")
    return FAILED if skip else DONE


def _facts(arguments: argparse.Namespace, config) -> dict:
    """What makes the rows, of a model of `config`."""
    facts = {"model": name_of(arguments), "weights": _weights(arguments), "img_size": config.img_size[0]}
    return facts | {"dtype": DTYPES[arguments.dtype], "folder": str(arguments.folder.resolve())}


def _weights(arguments: argparse.Namespace) -> str:
    """What tells these weights from others: the checkpoint's path, size and modification time."""
    if arguments.pretrained:
        return "pretrained"
    from ..models.reading import weights_file

    path = Path(weights_file(arguments.checkpoint))
    if not path.exists():
        raise UsageError(f"no checkpoint at {arguments.checkpoint}")
    return _common.stamp(path)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C and polite kills are ignored in the `with` body."""
    # Python hands signals to its main thread only, and lets only that one say what becomes of them.
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

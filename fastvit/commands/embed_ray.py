"""`fastvit embed --engine ray`: inputs of any size, on a pool of Ray Data actors that have a frozen model each.

The inputs are cut into units: 512 images of a folder, as many rows of Parquet (whole row groups), or a .tar file. A
unit is named by its place, its inputs with their sizes and times, and the facts of the run. OUT/.units has a line of
JSON for each, of which the driver keeps the name and where it starts. What an actor makes of one is a file in
OUT/features, which takes its place when it is whole, after the file in OUT/bad of the unit's bad images. So a unit is
done when its file is there: what was lost with an actor or a whole run is done anew, and what is there is not.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import signal
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..report import first_line, note, progress, replacing, write_atomically, write_json
from ._common import DONE, FAILED, UsageError, make_folder
from ._model import MANY, SHARDS, Skipped, build, config_of, quiet_about_large_images, served, why_not_finite

if TYPE_CHECKING:
    from .. import images

UNIT = 512  # images: what a killed actor costs, and the rows of a file
TASKS = 4096  # at most, each of one unit or more: Ray's driver keeps some 10 kB for each
ATTEMPTS = 4  # at a unit with which the process dies
SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # WebDataset's key and extension


def run(arguments: argparse.Namespace, facts: dict) -> int:
    for package in ("ray", "pyarrow"):
        if importlib.util.find_spec(package) is None:
            raise ImportError("--engine ray needs Ray Data: pip install 'fastvit[ray]'")
    source, output = arguments.folder, arguments.output
    if not source.exists():
        raise UsageError(f"{source}: no such folder")
    if source.is_file() and source.suffix.lower() not in SHARDS:
        raise UsageError(f"{source}: expected a folder, or a .parquet or .tar file")
    if output.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"OUT {output} is inside of {source}, expected a folder elsewhere")
    if arguments.device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--engine ray takes --device auto, cpu or cuda, not {arguments.device}")
    _begin(output, facts, arguments.resume)
    todo, count, total = _plan(source, output, facts)
    if todo:
        # Ray says on stdout, from a thread, that an actor died.
        with contextlib.redirect_stdout(sys.stderr), _ray(arguments.device):
            _embed(arguments, todo, count)
    _remove_begun(output)
    import pyarrow.dataset

    rows, bad = (pyarrow.dataset.dataset(output / part, format="parquet").count_rows() for part in ("features", "bad"))
    if len(list((output / "features").glob("*.parquet"))) != total:
        raise RuntimeError(f"files are missing in {output / 'features'}; the same command goes on")
    print(f"{rows} images, {bad} skipped: {output}")
    if bad:
        note(f"{output / 'bad'} has which images were skipped, and why.")
    return FAILED if bad or not rows else DONE


def _begin(output: Path, facts: dict, resume: bool) -> None:
    """The output's folders and its about.json; raises UsageError for what other facts made, and for others' folders."""
    about = output / "about.json"
    if about.exists():
        try:
            found = dict(json.loads(about.read_text()))
        except (ValueError, TypeError):
            found = {}
        others = {name: found.get(name) for name in facts if found.get(name) != facts[name]}
        if others and resume:
            differ = ", ".join(f"{name} {value} (now {facts[name]})" for name, value in others.items())
            raise UsageError(f"{output} was made with {differ}; --no-resume starts anew")
    elif output.is_dir() and any(output.iterdir()):
        raise UsageError(f"{output} is no result of fastvit embed, nor empty: expected a new folder")
    for part in ("features", "bad"):
        make_folder(output / part, "OUT")
        for path in () if resume else (output / part).iterdir():
            path.unlink()
    _remove_begun(output)
    write_json(about, facts)


def _remove_begun(output: Path) -> None:
    """Remove the files of processes that were killed at them."""
    for path in output.glob("*/.*"):
        path.unlink(missing_ok=True)


def _plan(source: Path, output: Path, facts: dict) -> tuple[list[int], int, int]:
    """Write OUT/.units; where in it the units start that are to be done, the number of images, a .tar file's guessed,
    and that of units. Removes what is of no unit: its inputs are gone or have changed."""
    skip, todo, names, count = Skipped(), [], {"listing.parquet"}, 0
    done = {path.name for path in (output / "features").iterdir()}
    with replacing(output / ".units") as file:
        for unit in _units(source, skip):
            digest = hashlib.sha256(json.dumps([facts, unit]).encode()).hexdigest()[:16]
            name = f"{len(names) - 1:07}-{digest}.parquet"
            names.add(name)
            count += unit["count"]
            if name not in done:
                todo.append(file.tell())
            file.write(json.dumps({"name": name, **unit}).encode() + b"\n")
    if len(names) == 1 and not skip:
        raise UsageError(f"no images in {source}")
    for path in (path for part in ("features", "bad") for path in (output / part).iterdir()):
        if path.name not in names:
            path.unlink()
    if stale := len(done - names):
        note(f"Removed {stale} files of {output / 'features'}: their inputs are gone or have changed.")
    if kept := len(done & names):
        note(f"Resuming: {kept} of {len(names) - 1} files are there.")
    _write_bad(output / "bad" / "listing.parquet", [("", _text(str(reason))) for reason in skip])
    return todo, count, len(names) - 1


def _units(source: Path, skip: Skipped) -> Iterator[dict]:
    """The images of a folder where it has any, else its Parquet and .tar files. count: of images, at least."""
    from .. import images

    def unit(paths: list[Path], **more: object) -> dict:
        files = []
        for path in paths:
            try:
                status = path.stat()  # before it is read: what is overwritten in between is seen by the next run
                stamp = [status.st_size, status.st_mtime_ns]
            except OSError:  # which the actor will meet too, and name
                stamp = [0, 0]
            files.append([path.relative_to(root).as_posix(), *stamp])
        return {"root": str(root.resolve()), "files": files, "count": len(files), **more}

    root = source if source.is_dir() else source.parent
    shards, some = [], []
    found = False
    for path in images.walk(source, skip, images.EXTENSIONS | SHARDS) if source.is_dir() else [source]:
        (shards if path.suffix.lower() in SHARDS else some).append(path)
        if len(some) == UNIT:
            found = True
            yield unit(some)
            some = []
    if some:
        yield unit(some)
    elif not found:
        for path in shards:
            if path.suffix.lower() == ".tar":
                yield unit([path], count=MANY)
            else:
                with _named(path, skip):
                    for part in _row_groups(path):
                        yield unit([path], **part)
        return
    if shards:
        note(f"{len(shards)} Parquet and .tar files beside the images are left alone.")


@contextlib.contextmanager
def _named(path: Path, skip: Callable[[object], None]) -> Iterator[None]:
    """A file that cannot be read, or not to its end, goes to `skip` with the reason."""
    try:
        yield
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:  # ArrowInvalid is a ValueError
        skip(f"{path}: {(str(error).splitlines() or [type(error).__name__])[0]}")


def _row_groups(path: Path) -> Iterator[dict]:
    """Neighbouring row groups of a Parquet file that have UNIT rows or more together; row: the first one's number."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        if "image" not in file.schema_arrow.names:
            raise UsageError(f"{path}: no column 'image', but {', '.join(file.schema_arrow.names)}")
        groups, rows, row = [], 0, 0
        for group in range(file.num_row_groups):
            groups.append(group)
            rows += file.metadata.row_group(group).num_rows
            if rows >= UNIT or group == file.num_row_groups - 1:
                yield {"groups": groups, "row": row, "count": rows}
                groups, rows, row = [], 0, row + rows


@contextlib.contextmanager
def _ray(device: str) -> Iterator[None]:
    """Ray in the `with` body: the one that is there, in this process or by RAY_ADDRESS, or a quiet one of our own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    ray.data.DataContext.get_current().enable_progress_bars = False
    if ray.is_initialized():
        yield
        return
    ours = {}
    if "RAY_ADDRESS" not in os.environ:
        import torch

        gpus = 0 if device == "cpu" else torch.cuda.device_count()
        # What goes by way of the object store are numbers of units.
        ours = {"include_dashboard": False, "num_gpus": gpus, "object_store_memory": 256 << 20}
    before = signal.getsignal(signal.SIGTERM)
    try:
        with _silenced():  # that it heard of RAY_BACKEND_LOG_LEVEL
            ray.init(log_to_driver=False, logging_level="error", **ours)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray has put its own there
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Nobody in this process, library or not, writes to stderr in the `with` body."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _embed(arguments: argparse.Namespace, todo: list[int], count: int) -> None:
    """Do the units that start at `todo`. Raises RuntimeError with what an actor raised."""
    import ray
    import torch

    gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
    device = arguments.device if arguments.device != "auto" else "cuda" if gpus else "cpu"
    if device == "cuda" and not gpus:
        raise UsageError("device 'cuda' was asked for, but Ray has no GPU")
    actors = arguments.actors or (gpus if device == "cuda" else max(1, cpus // 4))
    threads = max(1, cpus // actors)
    # Here too, for what is wrong with the weights, and to choose a runtime once for all.
    threads_here = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = build(arguments, config_of(arguments), "cpu", num_classes=0)
        runtime = None
        if device == "cpu":
            runtime = getattr(served(model, "features", arguments.batch_size, count), "runtime", None)
    finally:
        torch.set_num_threads(threads_here)
    del model
    each = max(1, -(-actors // gpus)) if gpus else 1
    note(f"{actors} actors on {device}, {threads} threads each.")
    done = ray.data.from_items(todo, override_num_blocks=min(len(todo), TASKS)).map_batches(
        Embed,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
        num_cpus=min(1, cpus / actors * 0.9),
        num_gpus=1 / each if device == "cuda" else None,
        fn_constructor_args=(arguments, device, runtime, threads, actors),
    )
    try:
        for unit in progress(done.iter_rows(), len(todo), "embedding"):
            if unit["error"]:
                raise RuntimeError(unit["error"])
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"Ray gave up: {first_line(error)}") from None


class Embed:
    """The actor: from where units start in OUT/.units to their files. What it raises is what it gives, "" if nothing:
    Ray would say more than a line, and try a model that cannot be built again and again."""

    def __init__(self, arguments: argparse.Namespace, device: str, runtime: str | None, threads: int, actors: int):
        self.arguments, self.device, self.runtime = arguments, device, runtime
        self.threads, self.actors = threads, actors
        self.output, self.config, self.model = arguments.output.resolve(), config_of(arguments), None

    def __call__(self, batch: dict) -> dict:
        try:
            if self.model is None:
                self.start()
            for start in batch["item"].tolist():
                with open(self.output / ".units", "rb") as file:
                    file.seek(start)
                    unit = json.loads(file.readline())
                path = self.output / "features" / unit["name"]
                if not path.exists():
                    self.embed(unit, path)
            return {"error": [""]}
        except Exception as error:
            return {"error": [first_line(error)]}

    def start(self) -> None:
        """Build the model."""
        import torch

        begun = self.output / "features"
        # A process that was killed at it has left its file; other actors may be at it too.
        if len(list(begun.glob(".model.*"))) >= ATTEMPTS + self.actors - 1:
            raise RuntimeError(f"{ATTEMPTS} processes died while they built the model")
        with tempfile.NamedTemporaryFile(prefix=".model.", dir=begun):
            torch.set_num_threads(self.threads)
            quiet_about_large_images()
            batch_size = self.arguments.batch_size
            model = build(self.arguments, self.config, self.device, num_classes=0)
            self.features_of = served(model, "features", batch_size, batch_size, self.runtime)
        self.model = model  # last: it is whole

    def embed(self, unit: dict, path: Path) -> None:
        """Write the unit's rows to `path`, those of its bad images beside."""
        import pyarrow as pa
        import pyarrow.parquet
        import torch

        from .. import images

        # A process that was killed at it has left its file.
        if len(list(path.parent.glob(f".{path.name}.*"))) >= ATTEMPTS:
            raise RuntimeError(f"{ATTEMPTS} processes died at unit {unit['name']}, from {unit['files'][0][0]} on")
        root = Path(unit["root"])
        ids, rows, bad = [], [], []

        def id_of(source: Path | images.ImageBytes) -> str:
            return _text(source.id if isinstance(source, images.ImageBytes) else source.relative_to(root).as_posix())

        def skip(error: images.ImageError) -> None:
            name = error.source.name if isinstance(error.source, images.ImageBytes) else error.source
            bad.append((id_of(error.source), _text(str(error).removeprefix(f"{name}: "))))

        schema = pa.schema({"id": pa.string(), "features": pa.list_(pa.float32(), self.config.embed_dim)})
        sources = self.sources(unit, root, bad)
        batches = images.read_batches(sources, self.config, self.arguments.batch_size, skip, max(4, self.threads))
        with replacing(path) as file, pyarrow.parquet.ParquetWriter(file, schema) as writer, torch.inference_mode():

            def write() -> None:
                values = pa.array(torch.cat(rows).numpy().ravel())
                features = pa.FixedSizeListArray.from_arrays(values, self.config.embed_dim)
                writer.write_table(pa.table([pa.array(ids, pa.string()), features], schema=schema))
                ids.clear()
                rows.clear()

            for good, pixels in batches:
                pooled = self.features_of(pixels.to(self.device)).float().cpu()
                fine = pooled.isfinite().all(dim=1)
                rows.append(pooled[fine])
                reason = None if fine.all() else why_not_finite(self.arguments, self.model)
                for source, is_fine in zip(good, fine.tolist(), strict=True):
                    if is_fine:
                        ids.append(id_of(source))
                    else:
                        bad.append((id_of(source), reason))
                if len(ids) >= UNIT:
                    write()
            if ids:
                write()
            _write_bad(self.output / "bad" / path.name, bad)

    def sources(self, unit: dict, root: Path, bad: list[tuple[str, str]]) -> Iterator[Path | images.ImageBytes]:
        """The unit's images; what is none, and a file that breaks off, goes to `bad`."""
        name = unit["files"][0][0]
        if Path(name).suffix.lower() not in SHARDS:
            yield from (root / name for name, *_ in unit["files"])
            return
        with _named(root / name, lambda reason: bad.append((_text(name), _text(reason)))):
            yield from (_rows(root / name, name, unit, bad) if "groups" in unit else _members(root / name, name))


def _rows(path: Path, name: str, unit: dict, bad: list[tuple[str, str]]) -> Iterator[images.ImageBytes]:
    """The images in the unit's row groups of a Parquet file, by its column "id" or as "name:row"."""
    import pyarrow.parquet

    from .. import images

    row = unit["row"]
    with pyarrow.parquet.ParquetFile(path) as file:
        columns = [column for column in ("id", "image") if column in file.schema_arrow.names]
        for batch in file.iter_batches(32, row_groups=unit["groups"], columns=columns):
            for values in batch.to_pylist():
                id, image = values.get("id"), values["image"]
                id, row = f"{name}:{row}" if id is None else str(id), row + 1
                kind = id
                if isinstance(image, dict):  # of the Hugging Face's datasets
                    image, kind = image.get("bytes"), image.get("path") or id
                if isinstance(image, bytes):
                    yield images.ImageBytes(image, kind, id)
                else:
                    bad.append((_text(id), "no bytes of an image file in the column 'image'"))


def _members(path: Path, name: str) -> Iterator[images.ImageBytes]:
    """The images in a .tar file, as "name:key", after a sample's first one with the extension."""
    from .. import images

    last = None
    with tarfile.open(path, "r|*") as tar:
        for member in tar:
            match = SAMPLE.fullmatch(member.name)
            if match and member.isfile() and Path(member.name).suffix.lower() in images.EXTENSIONS:
                key = match[1] if match[1] != last else member.name
                last = match[1]
                yield images.ImageBytes(tar.extractfile(member).read(), member.name, f"{name}:{key}")


def _write_bad(path: Path, bad: list[tuple[str, str]]) -> None:
    """Rows of id and reason; no file where there are none."""
    import pyarrow as pa
    import pyarrow.parquet

    if not bad:
        path.unlink(missing_ok=True)
        return
    file = io.BytesIO()
    columns = [pa.array(column, pa.string()) for column in zip(*bad, strict=True)]
    pyarrow.parquet.write_table(pa.table(columns, ["id", "reason"]), file)
    write_atomically(path, file.getvalue())


def _text(name: str) -> str:
    """A file's name that is not UTF-8 with backslashes, as Parquet has only text."""
    return name.encode("utf-8", "backslashreplace").decode()

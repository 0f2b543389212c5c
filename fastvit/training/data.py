"""Images with labels, from a folder, WebDataset shards or a Hugging Face dataset, as batches that a run can return to.

Everything random about a batch follows from the seed and its place in the run: the order of the epoch, and the
augmentation of each image. So a run that was interrupted goes on with the very batches that it would have had, however
many processes load them.
"""

from __future__ import annotations

import abc
import contextlib
import json
import random
import signal
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from .. import images
from .recipes import Recipe

_SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
_MANY_BAD = 100  # images in a row that cannot be read: then it is not the images


class Source(abc.ABC):
    """Labelled images, by their index. classes: the names of the classes. numbered: whether labels are the model's own
    numbers, of which not all have to be there."""

    classes: list[str]
    numbered = False

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def label(self, index: int) -> int: ...

    @abc.abstractmethod
    def name(self, index: int) -> str: ...

    @abc.abstractmethod
    def open(self, index: int) -> Path | images.ImageBytes:
        """What `images.load_image` takes."""


class Folder(Source):
    """A folder with one folder of images, at any depth, for each class."""

    def __init__(self, folder: Path, classes: list[str] | None = None):
        found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        self.classes = found if classes is None else classes
        if unknown := sorted(set(found) - set(self.classes)):
            raise ValueError(
                f"{folder} has unknown classes: {', '.join(unknown[:5])}, expected {', '.join(classes[:5])}, ..."
            )
        per_class = [(images.find_images(folder / name) if name in found else []) for name in self.classes]
        self._files = [(path, label) for label, paths in enumerate(per_class) for path in paths]
        if not self._files:
            raise ValueError(f"{folder} has no folders of images, one for each class")

    def __len__(self) -> int:
        return len(self._files)

    def label(self, index: int) -> int:
        return self._files[index][1]

    def name(self, index: int) -> str:
        return str(self._files[index][0])

    def open(self, index: int) -> Path:
        return self._files[index][0]


class Shards(Source):
    """WebDataset's .tar files: an image and KEY.cls, its class as a number, or KEY.json with a "label", for each key.

    classes.txt beside them, if there is one, has the names. The members are found once, at the start; images are then
    read from where they lie in the files, in any order.
    """

    def __init__(self, shards: list[Path], classes: list[str] | None = None):
        self._shards = shards
        self._members: list[tuple[int, int, int, str, int]] = []  # shard, offset, bytes, key, label
        for number, shard in enumerate(shards):
            parts: dict[str, dict[str, tarfile.TarInfo]] = {}
            with _opened(shard) as tar:
                for member in tar:
                    if member.isfile():
                        stem, _, ending = member.name.rpartition("/")[2].partition(".")
                        key = f"{member.name.rpartition('/')[0]}/{stem}".lstrip("/")
                        parts.setdefault(key, {})[f".{ending.lower()}"] = member
                for key, by_ending in parts.items():
                    image = next((by_ending[end] for end in by_ending if end in images.EXTENSIONS), None)
                    if image is not None:
                        label = _label(shard, key, {end: tar.extractfile(m).read() for end, m in by_ending.items()
                                                    if end in (".cls", ".json")})  # fmt: skip
                        self._members.append((number, image.offset_data, image.size, key, label))
        if not self._members:
            raise ValueError(f"{shards[0].parent} has no images in its .tar files")
        names = shards[0].parent / "classes.txt"
        count = max(member[-1] for member in self._members) + 1
        if classes is None:
            classes = names.read_text(encoding="utf-8").split("\n") if names.is_file() else map(str, range(count))
            classes = [name for name in classes if name]
        self.classes, self.numbered = list(classes), not names.is_file()
        if count > len(self.classes):
            raise ValueError(f"{shards[0].parent} has class {count - 1}, expected less than {len(self.classes)}")

    def __len__(self) -> int:
        return len(self._members)

    def label(self, index: int) -> int:
        return self._members[index][-1]

    def name(self, index: int) -> str:
        number, _, _, key, _ = self._members[index]
        return f"{self._shards[number]}:{key}"

    def open(self, index: int) -> images.ImageBytes:
        number, offset, size, _, _ = self._members[index]
        with open(self._shards[number], "rb") as file:
            file.seek(offset)
            return images.ImageBytes(file.read(size), self.name(index))


@contextlib.contextmanager
def _opened(shard: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(shard, "r:") as tar:
            yield tar
    except tarfile.TarError as error:
        raise ValueError(f"{shard} cannot be read as an uncompressed .tar file: {error}") from None


def _label(shard: Path, key: str, parts: dict[str, bytes]) -> int:
    try:
        said = parts[".cls"].decode() if ".cls" in parts else json.loads(parts[".json"])["label"]
        label = int(said)
    except (KeyError, ValueError, TypeError):
        raise ValueError(
            f"{shard}: {key} has no class: neither a number in {key}.cls nor a label in its .json"
        ) from None
    if label < 0:
        raise ValueError(f"{shard}: {key} has class {label}, expected 0 or more")
    return label


class HuggingFace(Source):
    """A dataset that Hugging Face's `datasets` saved to disk, with an image column and a label column."""

    def __init__(self, table, where: str, classes: list[str] | None = None):
        import datasets

        pictures = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
        labels = [name for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
        if len(pictures) != 1 or len(labels) != 1:
            kinds = ", ".join(f"{name}: {type(kind).__name__}" for name, kind in table.features.items())
            raise ValueError(f"{where} has {kinds}, expected one Image and one ClassLabel")
        self._where, self._picture, self._label = where, pictures[0], labels[0]
        self._table = table.cast_column(pictures[0], datasets.Image(decode=False))
        self._labels = list(self._table[labels[0]])
        if min(self._labels, default=0) < 0:
            raise ValueError(f"{where} has images without a label")
        self.classes = list(table.features[labels[0]].names)
        if classes is not None and classes != self.classes:
            raise ValueError(f"{where} has other classes than the training images")

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, index: int) -> int:
        return self._labels[index]

    def name(self, index: int) -> str:
        return f"{self._where}:{index}"

    def open(self, index: int) -> images.ImageBytes:
        picture = self._table[index][self._picture]
        content = picture["bytes"]
        return images.ImageBytes(Path(picture["path"]).read_bytes() if content is None else content, self.name(index))


def find(data: str | Path, split: str, classes: list[str] | None = None) -> Source | None:
    """The images of `split`, "train" or "val", in the folder `data`; None where there is no such split.

    A folder named train, or val (also training; validation, valid, test), of class folders or of .tar files; or what
    `datasets` saved to disk, with splits of those names. classes: those of the training images, which others have to
    have. Raises NotADirectoryError, ValueError for a folder that is none of these, ImportError without `datasets`.
    """
    data = Path(data)
    if not data.is_dir():
        raise NotADirectoryError(f"{data}: {'not a folder' if data.exists() else 'no such folder'}")
    if (data / "dataset_dict.json").is_file():
        try:
            import datasets
        except ImportError as error:
            raise ImportError(f"{data} is a Hugging Face dataset, and needs: pip install datasets") from error
        splits = datasets.load_from_disk(str(data))
        name = next((name for name in _SPLITS[split] if name in splits), None)
        return None if name is None else HuggingFace(splits[name], f"{data}/{name}", classes)
    folder = next((data / name for name in _SPLITS[split] if (data / name).is_dir()), None)
    if folder is None:
        return None
    shards = sorted(folder.glob("*.tar"))
    return Shards(shards, classes) if shards else Folder(folder, classes)


# The order

_ORDER, _PIXELS = 1, 2  # what an epoch's seeds are for


def epoch_order(count: int, epoch: int, seed: int, repeats: int) -> torch.Tensor:
    """Which image comes when in an epoch, `count` of `count` images; with repeats, each that comes comes so often, one
    after the other, and the others do not (repeated augmentation, arXiv 1902.05509, as DeiT has it)."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(mixed(seed, epoch, _ORDER)))
    return order.repeat_interleave(repeats)[:count]


def mixed(*numbers: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class Batches:
    """The indices of every batch that one process works on, from an optimizer step to the end of the run.

    Of a step's images, `rank` has every world-th, so that all together have the same whatever `world` is. An index is a
    pair: which image, and the seed of its augmentation.
    """

    count: int
    recipe: Recipe
    seed: int
    start: int = 0
    rank: int = 0
    world: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.recipe.batch_size

    def __len__(self) -> int:
        return (self.steps_per_epoch * self.recipe.epochs - self.start) * self.recipe.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size, epoch = self.recipe.batch_size, None
        for step in range(self.start, self.steps_per_epoch * self.recipe.epochs):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = epoch_order(self.count, epoch, self.seed, self.recipe.repeats).tolist()
                generator = torch.Generator().manual_seed(mixed(self.seed, epoch, _PIXELS))
                seeds = torch.randint(2**62, (self.count,), generator=generator).tolist()
            first = (step % self.steps_per_epoch) * size
            places = range(first + self.rank, first + size, self.world)
            mine = [(order[place], seeds[place]) for place in places]
            part = len(mine) // self.recipe.accumulate
            yield from (mine[i : i + part] for i in range(0, len(mine), part))


# Batches


@dataclass
class Batch:
    """images, uint8 (B, 3, H, W), their labels (B,) and indices, and the indices of those that could not be read, with
    the reason."""

    images: torch.Tensor
    labels: torch.Tensor
    indices: list[int]
    bad: list[tuple[int, str]]

    def pin_memory(self) -> Batch:
        self.images, self.labels = self.images.pin_memory(), self.labels.pin_memory()
        return self


class Read(Dataset):
    """Images of a source as uint8 tensors (3, H, W), by a pair (index, seed), as `read` makes them of what
    `images.load_image` takes. In the place of one that cannot be read comes the next that can."""

    def __init__(self, source: Source, read: Callable[[Path | images.ImageBytes], torch.Tensor]):
        self.source, self.read = source, read

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, int, int, list[tuple[int, str]]]:
        index, seed = item
        bad = []
        while True:
            random.seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)
            torch.manual_seed(seed)
            try:
                return self.read(self.source.open(index)), self.source.label(index), index, bad
            except images.ImageError as error:
                bad.append((index, str(error)))
                if len(bad) == min(_MANY_BAD, len(self.source)):
                    raise ValueError(f"{len(bad)} images in a row cannot be read, the last of them: {error}") from None
                index = (index + 1) % len(self.source)


def _collate(samples: list[tuple]) -> Batch:
    pixels, labels, indices, bad = zip(*samples, strict=True)
    return Batch(torch.stack(pixels), torch.tensor(labels), list(indices), [entry for some in bad for entry in some])


def augmentation(config, recipe: Recipe) -> Augmented:
    """timm's augmentation of a recipe for a model of `config`. Raises AssertionError for a policy it does not know."""
    from timm.data import create_transform

    return Augmented(
        create_transform(
            (3, *config.img_size),
            is_training=True,
            scale=(recipe.crop_scale, 1.0),
            hflip=recipe.hflip,
            color_jitter=recipe.color_jitter or None,
            auto_augment=None if recipe.auto_augment == "none" else recipe.auto_augment,
            interpolation=config.interpolation,
            mean=config.mean,  # the colour that shears and rotations fill with
            use_prefetcher=True,  # leaves the pixels as they are
        )
    )


class Augmented:
    """What `images.load_image` takes, through timm's transform, as uint8 (3, H, W)."""

    def __init__(self, transform: Callable):
        self.transform = transform
        for step in transform.transforms:
            for op in [*getattr(step, "ops", []), *(op for ops in getattr(step, "policy", []) for op in ops)]:
                if getattr(op, "name", "").startswith("Posterize"):
                    op.aug_fn = _posterize

    def __call__(self, source: Path | images.ImageBytes) -> torch.Tensor:
        return torch.as_tensor(np.ascontiguousarray(self.transform(images.load_image(source))))


def _posterize(image, bits: int, **_):
    """Pillow's, of which timm at its strongest asks to keep no bit at all: black, which Pillow 13 takes for an
    error."""
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def training_loader(source: Source, config, batches: Batches, workers: int, pin: bool) -> DataLoader:
    return _loader(Read(source, augmentation(config, batches.recipe)), batches, workers, pin)


def evaluation_loader(
    source: Source, config, batch_size: int, workers: int, pin: bool, rank: int = 0, world: int = 1
) -> DataLoader:
    """Every image once, prepared as `fastvit embed` and `classify` do; in process `rank` of `world` every world-th, and
    some of the first again at the end, so that all have as many: `Batch.indices` tells them."""
    count = -(-len(source) // world)
    mine = [((rank + i * world) % len(source), 0) for i in range(count)]
    batches = [mine[i : i + batch_size] for i in range(0, count, batch_size)]
    return _loader(Read(source, partial(images.read, config=config)), batches, workers, pin)


def _loader(dataset: Read, batches, workers: int, pin: bool) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        worker_init_fn=_deaf,
    )


def _deaf(_: int) -> None:
    """Of a Ctrl-C the process that trains decides what becomes of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

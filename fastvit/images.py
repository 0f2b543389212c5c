"""From image files to batches for a model, numerically as timm's evaluation transform does it. Needs Pillow.

Resize the shorter side to img_size / crop_pct, crop the centre, and leave the normalisation to the model, which
takes uint8 images.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

try:
    import PIL
    from PIL import Image, ImageOps
except ImportError as error:
    raise ImportError("reading images needs Pillow: pip install 'fastvit[images]'") from error

# What is clearly an image. Which of them Pillow reads depends on how it was built; `load_image` refuses the others by
# name, because of a camera's raw file Pillow would take the thumbnail.
EXTENSIONS = frozenset({
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".png", ".qoi",
    ".tga", ".tif", ".tiff", ".webp",
    ".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx", ".pbm", ".pgm", ".pnm", ".ppm", ".psd",
    ".dcm", ".exr", ".hdr", ".heic", ".heif", ".hif", ".jxl", ".jxr", ".svg", ".svgz",
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mef", ".mrw", ".nef",
    ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f",
})  # fmt: skip
MAX_PIXELS = 80_000_000  # of a file, and of a resized image: 240 MB as RGB. A small file can claim far more.


class ImageBytes(io.BytesIO):
    """An image file in memory. name: the file's, whose ending tells its kind; id: another one for it."""

    def __init__(self, data: bytes, name: str, id: str | None = None):
        super().__init__(data)
        self.name, self.id = name, id or name


class ImageError(ValueError):
    """An image file that cannot be read: not an image, truncated, too large, or of an unknown kind.

    source: of those from `read_batches`, what it could not read.
    """

    source: str | Path | BinaryIO | None = None


def find_images(folder: str | Path, on_error: Callable[[ImageError], None] | None = None) -> list[Path]:
    """All files under `folder`, at any depth and behind links, whose names end like an image's, sorted.

    Those of a kind that is not read are among them: `load_image` says so. A folder inside that cannot be listed, and a
    pipe, socket or device, which may never end, go to `on_error`, or are raised as ImageError. Raises
    NotADirectoryError for a `folder` that is none.
    """
    return sorted(walk(folder, on_error))


def walk(
    folder: str | Path,
    on_error: Callable[[ImageError], None] | None = None,
    extensions: frozenset[str] = EXTENSIONS,
) -> Iterator[Path]:
    """What `find_images` finds, of these extensions, as it is found: a folder's own files sorted, then its folders."""
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")

    def refuse(path: str | Path, reason: str) -> None:
        problem = ImageError(f"{path}: {reason}")
        if on_error is None:
            raise problem
        on_error(problem)

    def not_listed(error: OSError) -> None:
        refuse(error.filename, error.strerror)

    for root, folders, names in os.walk(folder, onerror=not_listed, followlinks=True):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        if links:
            above = {parent.resolve() for parent in (Path(root), *Path(root).absolute().parents)}
            folders[:] = [name for name in folders if name not in links or Path(root, name).resolve() not in above]
        folders.sort()
        for path in (Path(root, name) for name in sorted(names) if Path(name).suffix.lower() in extensions):
            if os.path.isfile(path) or not os.path.exists(path):  # a link to nothing is for `load_image` to name
                yield path
            else:
                refuse(path, "no regular file")


def _name(source: str | Path | BinaryIO) -> str | Path:
    return source if isinstance(source, (str, Path)) else source.name


def load_image(source: str | Path | BinaryIO) -> Image.Image:
    """The image at a path or in a binary file, whose `name` tells its kind, turned upright by its EXIF orientation, as
    RGB. Raises ImageError naming the file.

    Transparency is dropped, as timm does; 16-bit grey is scaled to 8 bits, which Pillow's own conversion would clip.
    """
    path = _name(source)
    kind = Path(path).suffix.lower()
    if kind in EXTENSIONS and kind not in Image.registered_extensions():
        raise ImageError(f"{path}: {kind} is not read by Pillow {PIL.__version__}: convert it to .jpg or .png")
    try:
        with Image.open(source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
            return _to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{path}: a folder, not an image") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not an image"
        raise ImageError(f"{path}: {reason}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # "I;16", "I;16B", ... and "I", Pillow's older name for a 16-bit PNG
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ImageError("integer pixels outside 16 bits")
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ImageError("floating-point pixels have no defined range")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def resize_and_crop(
    image: Image.Image,
    img_size: int | tuple[int, int],
    crop_pct: float = 0.875,
    interpolation: str = "bicubic",
    crop_mode: str = "center",
) -> Image.Image:
    """timm's evaluation geometry: shorter side to img_size / crop_pct, then the central img_size.

    img_size: one side, or (height, width). crop_mode "squash": both sides to img_size / crop_pct, whatever the image's
    proportions. Raises ImageError for an image so long and thin that it would be huge.
    """
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    scaled_height, scaled_width = math.floor(height / crop_pct), math.floor(width / crop_pct)
    if crop_mode == "squash":
        size = (scaled_width, scaled_height)
    elif scaled_height == scaled_width:
        short = min(image.size)
        size = tuple(int(scaled_width * side / short) for side in image.size)
    else:
        ratio = min(image.height / scaled_height, image.width / scaled_width)
        size = (round(image.width / ratio), round(image.height / ratio))
    if size[0] * size[1] > MAX_PIXELS:
        raise ImageError(f"{image.width} x {image.height} pixels are too long and thin to crop a centre from")
    if size != image.size:
        image = image.resize(size, Image.Resampling[interpolation.upper()])
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as a uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def read(source: str | Path | BinaryIO, config) -> torch.Tensor:
    """The image that `load_image` takes as the uint8 tensor (3, H, W) that a model of `config` (a ViTConfig) takes."""
    image = load_image(source)
    try:
        return to_tensor(
            resize_and_crop(image, config.img_size, config.crop_pct, config.interpolation, config.crop_mode)
        )
    except ImageError as error:
        raise ImageError(f"{_name(source)}: {error}") from None


def read_batches(
    paths: Iterable[str | Path | BinaryIO],
    config,
    batch_size: int,
    on_error: Callable[[ImageError], None],
    workers: int = 4,
) -> Iterator[tuple[list[Path | BinaryIO], torch.Tensor]]:
    """Batches of (paths, uint8 images (B, 3, H, W)), in order; an unreadable file goes to `on_error` and is left out.

    paths: or binary files, as `load_image` takes them; taken from the iterable a batch ahead. While the caller works on
    one batch, threads read the next. A batch is smaller than `batch_size` where files in it
    were unreadable, and never empty. A thread that waits for a file which gives nothing keeps nobody from ending: not
    the caller who is interrupted, nor the process.
    """
    paths = (Path(path) if isinstance(path, str) else path for path in paths)
    tasks, stopped = queue.SimpleQueue(), threading.Event()

    def work() -> None:
        while (task := tasks.get()) and not stopped.is_set():
            path, future = task
            try:
                future.set_result(read(path, config))
            except BaseException as error:
                future.set_exception(error)

    def submit() -> list[tuple[Path | BinaryIO, Future]]:
        ahead = [(path, Future()) for path in itertools.islice(paths, batch_size)]
        for task in ahead:
            tasks.put(task)
        return ahead

    # No ThreadPoolExecutor: Python waits for its threads as it ends.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        ahead = submit()
        while ahead:
            wait([future for _, future in ahead])
            done, ahead = ahead, submit()
            good = []
            for path, future in done:
                try:
                    good.append((path, future.result()))
                except ImageError as error:
                    error.source = path
                    on_error(error)
            if good:
                yield [path for path, _ in good], torch.stack([image for _, image in good])
    finally:
        stopped.set()
        for _ in threads:
            tasks.put(None)
        deadline = time.monotonic() + 1  # whoever is at work, and not stuck, should not be cut off inside of PyTorch
        for thread in threads:
            thread.join(max(0, deadline - time.monotonic()))

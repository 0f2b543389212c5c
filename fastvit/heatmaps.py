"""Maps over the patches of an image, such as attention's, as one picture. Needs Pillow."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np

from .images import Image  # by way of the module that says what is missing where Pillow is
from .report import write_atomically

# Black to violet, orange and pale yellow: matplotlib's "inferno" at five points, dark to light also when printed grey.
_COLOURS = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])
_HEAT = 0.65  # of a pixel's colour; the rest is the image, in grey


def check_format(path: Path) -> None:
    """Raise ValueError for a name that ends like no picture that Pillow writes."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{path}: unknown format {path.suffix!r}, expected .png, .jpg or .webp")


def save(path: Path, image: np.ndarray, maps: dict[str, np.ndarray], title: str) -> None:
    """Write the picture that `draw` makes to `path`, in the format of its name."""
    file = io.BytesIO()
    draw(image, maps, title).save(file, Image.registered_extensions()[path.suffix.lower()])
    write_atomically(path, file.getvalue())


def draw(image: np.ndarray, maps: dict[str, np.ndarray], title: str) -> Image.Image:
    """image (H, W, 3) uint8 and, beside it, each of `maps`, (rows, columns) shares by caption, laid over it.

    Each map has its own scale, from 0 to its largest share, which its caption tells: heads differ a hundredfold.
    """
    from PIL import ImageDraw, ImageFont

    enlarged = max(1, round(256 / image.shape[0]))
    image = image.repeat(enlarged, axis=0).repeat(enlarged, axis=1)
    height, width = image.shape[:2]
    panels = {"the image": image}
    for caption, shares in maps.items():
        panels[f"{caption}: up to {100 * shares.max():.2g} %"] = _overlay(image, shares)

    size = max(14, height // 20)  # of letters; also what the space between things is made of
    font = ImageFont.load_default(size)
    columns = math.ceil(math.sqrt(1.5 * len(panels)))
    rows = math.ceil(len(panels) / columns)
    top, line = 2 * size + size // 2, height + 2 * size
    canvas_width = max(columns * (width + size), round(font.getlength(title)) + size) + size
    canvas = Image.new("RGB", (canvas_width, top + rows * (line + size // 2) + 2 * size), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((size, size // 2), title, "black", font)
    for i, (caption, panel) in enumerate(panels.items()):
        left, above = size + i % columns * (width + size), top + i // columns * (line + size // 2)
        pen.text((left, above), caption, "black", font)
        canvas.paste(Image.fromarray(panel), (left, above + size + size // 2))

    legend = _overlay(np.full((size, 12 * size, 3), 128), np.linspace(0, 1, 12 * size)[None])
    above = canvas.height - 2 * size
    pen.text((size, above), "0", "black", font)
    canvas.paste(Image.fromarray(legend), (2 * size + size // 4, above))
    pen.text((15 * size - size // 4, above), "the largest share in that map", "black", font)
    return canvas


def _overlay(image: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """image (H, W, 3) in grey under the colours of shares (rows, columns)."""
    heat = _colours(shares / max(shares.max(), np.finfo(np.float32).tiny))
    heat = heat.repeat(image.shape[0] // len(heat), axis=0).repeat(image.shape[1] // heat.shape[1], axis=1)
    return (_HEAT * heat + (1 - _HEAT) * image.mean(axis=2, keepdims=True)).astype(np.uint8)


def _colours(values: np.ndarray) -> np.ndarray:
    """values (H, W) in [0, 1] -> colours (H, W, 3) in [0, 255]."""
    points = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(values, points, channel) for channel in _COLOURS.T], axis=-1)

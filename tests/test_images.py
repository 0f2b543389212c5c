"""Image files: timm's transform exactly, every mode and orientation, and nothing but one clear error for a bad file."""

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from fastvit.benchmarks.work import normalise  # noqa: E402
from PIL import Image, ImageOps, features  # noqa: E402

from fastvit import images  # noqa: E402

PHOTOS = Path(__file__).parent.parent / "benchmarks" / "photos"


@dataclass
class Config:
    """What `images.read` needs of a ViTConfig."""

    img_size: tuple[int, int] = (224, 224)
    crop_pct: float = 0.9
    interpolation: str = "bicubic"
    crop_mode: str = "center"


def gradient(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """An image no flip or rotation maps to itself."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = x * 255 // max(1, width - 1), y * 255 // max(1, height - 1)
    return Image.fromarray(np.stack([red, green, (red + green) // 3], -1).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize(
    ("size", "crop_pct", "interpolation"),
    [
        ((224, 224), 0.9, "bicubic"),
        ((384, 384), 1.0, "bicubic"),
        ((518, 518), 1.0, "bicubic"),
        ((224, 224), 0.875, "bilinear"),
        ((96, 160), 0.95, "lanczos"),
    ],
)
def test_equals_timms_evaluation_transform(size, crop_pct, interpolation):
    data = pytest.importorskip("timm.data")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    transform = data.create_transform(
        (3, *size), interpolation=interpolation, mean=mean, std=std, crop_pct=crop_pct, is_training=False
    )
    files = sorted(PHOTOS.glob("*.jpg"))
    assert len(files) >= 5
    for file in files:
        with Image.open(file) as image:
            expected = transform(image.convert("RGB"))
        ours = normalise(images.read(file, Config(size, crop_pct, interpolation)), mean, std)
        # The pixels are the same; the floats may be rounded in another order.
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6, msg=file.name)


@pytest.mark.parametrize("crop_pct", [1.0, 0.95])
@pytest.mark.parametrize("size", [(224, 224), (24, 40)])
def test_squashed_as_timm_squashes(size, crop_pct):
    data = pytest.importorskip("timm.data")
    how = {"interpolation": "bicubic", "crop_pct": crop_pct, "crop_mode": "squash", "use_prefetcher": True}
    transform = data.create_transform((3, *size), **how)
    for file in sorted(PHOTOS.glob("*.jpg")):
        with Image.open(file) as image:
            expected = torch.as_tensor(transform(image.convert("RGB")))
        assert torch.equal(images.read(file, Config(size, crop_pct, crop_mode="squash")), expected), file.name


@pytest.mark.parametrize("size", [(7, 300), (300, 7), (225, 223), (31, 31), (1, 1)])
def test_equals_timms_transform_at_awkward_sizes(size):
    data = pytest.importorskip("timm.data")
    transform = data.create_transform((3, 32, 32), interpolation="bicubic", crop_pct=0.9, use_prefetcher=True)
    image = gradient(*size)
    ours = images.to_tensor(images.resize_and_crop(image, 32, 0.9, "bicubic"))
    assert torch.equal(ours, torch.as_tensor(transform(image)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, orientation):
    image = gradient(40, 24)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    loaded = images.load_image(tmp_path / "turned.png")
    turn = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }[orientation]
    expected = image if turn is None else image.transpose(turn)
    assert loaded.size == expected.size
    assert np.array_equal(np.asarray(loaded), np.asarray(expected))


def test_a_turned_photograph_gives_the_same_tensor(tmp_path):
    upright = images.load_image(PHOTOS / "coffee.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "coffee.png", exif=exif)
    assert torch.equal(images.read(tmp_path / "coffee.png", Config()), images.read(PHOTOS / "coffee.jpg", Config()))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = gradient(20, 30).convert(mode)
    file = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(file)
    loaded = images.load_image(file)
    assert (loaded.mode, loaded.size) == ("RGB", (20, 30))
    assert np.array_equal(np.asarray(loaded), np.asarray(image.convert("RGB")))


def test_palette_with_transparency_keeps_its_colours(tmp_path):
    image = gradient(20, 30).quantize(16)
    image.save(tmp_path / "image.png", transparency=3)
    assert np.array_equal(np.asarray(images.load_image(tmp_path / "image.png")), np.asarray(image.convert("RGB")))


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    grey = np.array([[0, 128, 129, 257], [514, 32896, 65407, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    loaded = np.asarray(images.load_image(tmp_path / "grey.png"))
    assert loaded[..., 0].tolist() == [[0, 0, 1, 1], [2, 128, 255, 255]]
    assert (loaded[..., 0] == loaded[..., 2]).all()


def huge_png(path: Path, width: int, height: int) -> None:
    """A file of 67 bytes that claims to be enormous."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def bad_files(folder: Path) -> dict[str, str]:
    """Bad image files by name, with what their error must say."""
    photo = (PHOTOS / "coffee.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(photo[: len(photo) // 2])
    (folder / "text.jpg").write_text("no image at all\n")
    (folder / "empty.png").write_bytes(b"")
    huge_png(folder / "bomb.png", 60000, 60000)
    huge_png(folder / "large.png", 10000, 8100)
    Image.fromarray(np.zeros((1, 60000, 3), np.uint8)).save(folder / "thin.png")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(folder / "float.tif")
    return {
        "bomb.png": "pixels",
        "empty.png": "not an image",
        "float.tif": "floating-point pixels",
        "large.png": "10000 x 8100 pixels are more than 80,000,000",
        "text.jpg": "not an image",
        "thin.png": "too long and thin",
        "truncated.jpg": "truncated",
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files_raise_one_line_that_names_them(tmp_path):
    for name, message in bad_files(tmp_path).items():
        with pytest.raises(images.ImageError, match=message) as caught:
            images.read(tmp_path / name, Config((1600, 1600), 1.0))
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(images.ImageError, match="no such file"):
        images.load_image(tmp_path / "absent.jpg")


def test_batches_keep_order_and_leave_out_what_cannot_be_read(tmp_path):
    for i in range(7):
        gradient(10 + i, 20).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_text("broken")
    (tmp_path / "6.png").write_text("broken")
    errors = []
    batches = list(images.read_batches(images.find_images(tmp_path), Config((8, 8)), 3, errors.append))
    assert [[path.name for path in paths] for paths, _ in batches] == [["0.png", "1.png", "2.png"], ["4.png", "5.png"]]
    assert [error.args[0].split(":")[0] for error in errors] == [str(tmp_path / "3.png"), str(tmp_path / "6.png")]
    for paths, pixels in batches:
        assert pixels.dtype == torch.uint8
        assert torch.equal(pixels, torch.stack([images.read(path, Config((8, 8))) for path in paths]))
    assert list(images.read_batches([], Config(), 3, errors.append)) == []


def names_below(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in images.find_images(folder)]


def test_find_images_walks_folders_and_ignores_other_files(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.JPG", "a.png", "b/c.webp", "notes.txt", "x.heic", "b/RAW.CR2"):
        (tmp_path / name).touch()
    assert names_below(tmp_path) == ["a.png", "b/RAW.CR2", "b/c.webp", "x.heic", "z.JPG"]
    with pytest.raises(NotADirectoryError, match="no such folder"):
        images.find_images(tmp_path / "absent")
    with pytest.raises(NotADirectoryError, match="not a folder"):
        images.find_images(tmp_path / "a.png")


def test_find_images_follows_links_and_ends(tmp_path):
    for name in ("photos/a", "photos/b", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.png").touch()
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "up").symlink_to("..")
    (tmp_path / "photos" / "a" / "b").symlink_to("../b")
    (tmp_path / "photos" / "b" / "a").symlink_to("../a")
    below = ["a/b/x.png", "a/x.png", "b/a/x.png", "b/x.png", "link/x.png"]
    assert names_below(tmp_path / "photos") == below
    (tmp_path / "photos2").symlink_to("photos")
    assert names_below(tmp_path / "photos2") == below


def test_find_images_names_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.png").touch()
    right = images.os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return right(path)

    monkeypatch.setattr(images.os, "scandir", scandir)
    errors = []
    assert images.find_images(tmp_path, errors.append) == [tmp_path / "a.png"]
    assert [str(error) for error in errors] == [f"{tmp_path / 'locked'}: Permission denied"]
    with pytest.raises(images.ImageError, match="locked: Permission denied"):
        images.find_images(tmp_path)


def test_find_images_names_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "null.jpg").symlink_to("/dev/null")
    (tmp_path / "nothing.jpg").symlink_to("absent")
    (tmp_path / "a.png").touch()
    errors = []
    found = images.find_images(tmp_path, errors.append)
    assert [path.name for path in found] == ["a.png", "nothing.jpg"]
    assert sorted(map(str, errors)) == [f"{tmp_path / name}: no regular file" for name in ("null.jpg", "pipe.jpg")]
    with pytest.raises(images.ImageError, match="no regular file"):
        images.find_images(tmp_path)


@pytest.mark.parametrize("name", ["x.heic", "x.jxl", "x.svg", "x.NEF", "x.dng"])
def test_a_kind_that_is_not_read_is_refused_by_its_name(name, tmp_path):
    """Also where Pillow would find something in it, as in most raw files, which are TIFFs with a thumbnail."""
    gradient(20, 30).save(tmp_path / name, "TIFF")
    with pytest.raises(images.ImageError, match=f"{name}: .* is not read by Pillow") as caught:
        images.load_image(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "feature"),
    [("x.avif", "avif"), ("x.webp", "webp"), ("x.jp2", "jpg_2000"), ("x.jfif", None), ("x.tga", None), ("x.pgm", None)],
)
def test_what_the_installed_pillow_reads_is_read(name, feature, tmp_path, monkeypatch):
    image = gradient(32, 48, "L" if name == "x.pgm" else "RGB")
    if feature is None or features.check(feature):
        image.save(tmp_path / name, "JPEG" if name == "x.jfif" else None)
        assert images.find_images(tmp_path) == [tmp_path / name]
        error = np.asarray(images.load_image(tmp_path / name)).astype(int) - np.asarray(image.convert("RGB"))
        assert abs(error).mean() < 4
    # A Pillow that was built without it.
    known = {kind: found for kind, found in Image.registered_extensions().items() if kind != Path(name).suffix}
    monkeypatch.setattr(Image, "registered_extensions", lambda: known)
    with pytest.raises(images.ImageError, match="is not read by Pillow"):
        images.load_image(tmp_path / name)


def test_an_error_without_a_message_is_named_by_its_type(tmp_path, monkeypatch):
    def fail(*arguments):
        raise EOFError

    gradient(4, 4).save(tmp_path / "x.png")
    monkeypatch.setattr(images.ImageOps, "exif_transpose", fail)
    with pytest.raises(images.ImageError, match="x.png: EOFError$"):
        images.load_image(tmp_path / "x.png")


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(images.ImageError, match="a folder, not an image"):
        images.load_image(tmp_path)


def test_the_shipped_photographs_are_small_and_sourced():
    sources = (PHOTOS / "SOURCES.md").read_text()
    for file in PHOTOS.glob("*.jpg"):
        assert file.stat().st_size <= 60 * 1024, file.name
        assert f"`{file.name}`" in sources
        assert max(ImageOps.exif_transpose(images.load_image(file)).size) <= 512

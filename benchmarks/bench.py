"""The model benchmark behind `fastvit bench`: images per second, error and memory of whole models on photographs.

One row is a model, a dtype and a batch size. Ours and its peers hold the same weights, take the same images and run
interleaved. No model is timed whose output is wrong: its error against the float64 reference may be at most what
`fastvit.verify` allows beside plain PyTorch's in the same dtype.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import fastvit
from fastvit.verify import FACTOR, SHORT, floor, randomise, reference_options, relative_rms

from .peers import PEERS
from .timing import interleave, peak_memory, quartiles

PHOTOS = Path(__file__).parent / "photos"
SEED = 0
TOP = 5


@dataclass(frozen=True)
class Settings:
    """What to run. `seconds` is spent on timing each row; past `time_limit` seconds in all no row is started."""

    device: str
    models: tuple[str, ...]
    batches: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    peers: tuple[str, ...] = tuple(PEERS)
    photos: Path = PHOTOS
    pretrained: bool = False
    interpreted: str | None = None  # the model that classifies the photographs on the kernels, in the interpreter
    seconds: float = 5.0
    time_limit: float | None = None

    @property
    def weights(self) -> str:
        return "pretrained" if self.pretrained else f"random, seed {SEED}"

    @property
    def images(self) -> str:
        if importlib.util.find_spec("PIL") is None:
            return f"random pixels, seed {SEED}, because Pillow is not installed"
        return "the shipped photographs" if self.photos == PHOTOS else f"photographs in {self.photos}"

    def as_dict(self) -> dict:
        """For JSON: the settings, and what they mean here."""
        described = {"dtypes": [SHORT[d] for d in self.dtypes], "weights": self.weights, "images": self.images}
        photos = "benchmarks/photos" if self.photos == PHOTOS else str(self.photos)
        return asdict(self) | {"photos": photos} | described


def read_pixels(config, settings: Settings) -> tuple[list[str], torch.Tensor]:
    """Names and uint8 images (B, 3, H, W) of the photographs, prepared as a model of `config` takes them."""
    if importlib.util.find_spec("PIL") is None:
        generator = torch.Generator().manual_seed(SEED)
        shape = (6, config.in_chans, *config.img_size)
        return [f"random {i}" for i in range(6)], torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    from fastvit import images

    paths = images.find_images(settings.photos)
    if not paths:
        raise ValueError(f"no images in {settings.photos}")
    readable = {}
    for path in paths:
        try:
            readable[path.name] = images.read(path, config)
        except images.ImageError as error:
            print(f"skipped {error}", file=sys.stderr)
    if not readable:
        raise ValueError(f"no readable images in {settings.photos}")
    return list(readable), torch.stack(list(readable.values()))


def normalise(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 images (..., C, H, W) as the floats that every peer takes: (image / 255 - mean) / std."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std))
    return (images.float() / 255 - mean) / std


def default_settings(device: str, **chosen) -> Settings:
    """What is worth measuring on this kind of device in a few minutes; `chosen` overrides any of it."""
    if device.startswith("cuda"):
        defaults = {
            "models": tuple(f"vit_{size}_patch16_224" for size in ("base", "small", "large", "tiny")),
            "batches": (1, 32, 256),
            "dtypes": (torch.bfloat16, torch.float16, torch.float32),
        }
    else:
        defaults = {
            "models": tuple(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base")),
            "batches": (1, 8),
            "dtypes": (torch.float32, torch.bfloat16),
        }
        if "models" not in chosen and importlib.util.find_spec("triton"):
            defaults["interpreted"] = "vit_tiny_patch16_224"
    return Settings(device=device, **defaults | chosen)


@dataclass
class Contestant:
    """One side of a row. `images_per_s` and `ratio` (ours over this peer, in paired rounds) are medians and quartiles;
    `error` is against the float64 reference; `failure` the first line of what it raised."""

    error: float | None = None
    images_per_s: dict | None = None
    ratio: dict | None = None
    peak_bytes: int | None = None
    failure: str | None = None


@dataclass
class Row:
    """A model, a dtype and a batch size: "ours" and every peer. `status`: "timed", "wrong", "failed" or "skipped"."""

    model: str
    dtype: str
    batch: int
    status: str
    reason: str = ""
    contestants: dict[str, Contestant] = field(default_factory=dict)
    top5: dict | None = None

    def as_dict(self) -> dict:
        return asdict(self)


def first_line(error: BaseException) -> str:
    """An exception as one line; running out of memory as just that."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['(no message)'])[0]}"


def run(settings: Settings) -> Iterator[Row]:
    """Rows as they are measured. A model that cannot be made, and a contestant that raises, fail in their rows."""
    start = time.perf_counter()
    for name in settings.models:
        subject = None
        for dtype in settings.dtypes:
            contestants = None
            for batch in settings.batches:
                if settings.time_limit is not None and time.perf_counter() - start > settings.time_limit:
                    reason = f"not started: the time limit of {settings.time_limit:g} s was reached"
                    yield Row(name, SHORT[dtype], batch, "skipped", reason)
                    continue
                try:
                    subject = subject or _Subject(name, settings)
                    contestants = contestants or _Contestants(subject, dtype, settings)
                    yield contestants.row(batch)
                except Exception as error:  # one row must not stop the others
                    yield Row(name, SHORT[dtype], batch, "failed", first_line(error))


class _Subject:
    """One model in float32 with its weights, the photographs as it takes them, and the true logits."""

    def __init__(self, name: str, settings: Settings):
        self.name = name
        self.model = fastvit.create_model(name, pretrained=settings.pretrained).eval()
        if not settings.pretrained:
            randomise(self.model, SEED)
        config = self.model.config
        self.names, pixels = read_pixels(config, settings)
        self.model.to(settings.device)
        self.photos = normalise(pixels.to(settings.device), config.mean, config.std)
        state = {key: tensor.double() for key, tensor in self.model.state_dict().items()}
        with torch.inference_mode():
            self.truth = fastvit.reference.vision_transformer(self.photos.double(), state, **reference_options(config))

    def top5(self, logits: torch.Tensor) -> dict:
        """The five likeliest classes of every photograph by `logits` and by the reference, and how far they agree."""
        ours, truth = (scores.float().topk(TOP).indices.tolist() for scores in (logits, self.truth))
        return {
            "photos": self.names,
            "ours": ours,
            "reference": truth,
            "same_first": sum(a[0] == b[0] for a, b in zip(ours, truth, strict=True)),
            "same_in_top5": sum(len({*a} & {*b}) for a, b in zip(ours, truth, strict=True)),
        }


def classify_interpreted(settings: Settings) -> dict:
    """Classify the photographs on the kernels themselves, in Triton's interpreter: no speed, but the same code that a
    GPU runs. bfloat16; the errors are of the logits, relative rms against the float64 reference."""
    start = time.perf_counter()
    subject = _Subject(settings.interpreted, settings)
    model, images = subject.model.to(torch.bfloat16), subject.photos.bfloat16()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the interpreter's arrays are small
    try:
        with torch.inference_mode():
            plain = model(images)
            with fastvit.use_backend("triton"):
                logits = model(images)
    finally:
        torch.set_num_threads(threads)
    error, plain_error = (relative_rms(found, subject.truth) for found in (logits, plain))
    return {
        "model": subject.name,
        "dtype": SHORT[torch.bfloat16],
        "error": error,
        "plain_error": plain_error,
        "ok": error <= max(FACTOR[torch.bfloat16] * plain_error, floor(torch.bfloat16)),
        "seconds": round(time.perf_counter() - start, 1),
        **subject.top5(logits),
    }


class _Contestants:
    """Ours and the peers in one dtype, each with its error on the photographs."""

    def __init__(self, subject: _Subject, dtype: torch.dtype, settings: Settings):
        self.subject, self.dtype, self.settings = subject, dtype, settings
        ours = copy.deepcopy(subject.model).to(dtype)
        self.calls = {"ours": ours}
        self.errors: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        for peer in settings.peers:
            try:
                self.calls[peer] = PEERS[peer](ours, subject.name)
            except Exception as error:  # not installed, or it has no such model
                self.failures[peer] = first_line(error)
        images = subject.photos.to(dtype)
        with torch.inference_mode():
            plain = PEERS["reference"](ours, subject.name)
            self.limit = max(FACTOR[dtype] * relative_rms(plain(images), subject.truth), floor(dtype))
            for name in list(self.calls):
                try:
                    logits = self.calls[name](images)
                except Exception as error:
                    if name == "ours":
                        raise
                    self.failures[name] = first_line(error)
                    del self.calls[name]
                    continue
                self.errors[name] = relative_rms(logits, subject.truth)
                if name == "ours":
                    self.top5 = subject.top5(logits)

    def row(self, batch: int) -> Row:
        """Verify, then time one batch size."""
        row = Row(self.subject.name, SHORT[self.dtype], batch, "timed", top5=self.top5)
        row.contestants = {name: Contestant(error=error) for name, error in self.errors.items()}
        row.contestants |= {name: Contestant(failure=failure) for name, failure in self.failures.items()}
        if not self.errors["ours"] <= self.limit:
            row.status = "wrong"
            row.reason = f"not timed: error {self.errors['ours']:.2e} is more than the limit {self.limit:.2e}"
            return row

        photos = self.subject.photos
        images = photos[torch.arange(batch, device=photos.device) % len(photos)].to(self.dtype)
        runnable = {}
        with torch.inference_mode():
            for name, call in self.calls.items():
                runnable[name] = lambda call=call: call(images)
                try:
                    row.contestants[name].peak_bytes = peak_memory(runnable[name], self.settings.device)
                except Exception as error:  # most often: this batch does not fit in memory
                    row.contestants[name].failure = first_line(error)
                    del runnable[name]
            if "ours" not in runnable:
                row.status, row.reason = "failed", row.contestants["ours"].failure
                return row
            seconds = interleave(runnable, self.settings.device, self.settings.seconds)
        for name, durations in seconds.items():
            row.contestants[name].images_per_s = quartiles([batch / duration for duration in durations])
            if name != "ours":
                pairs = zip(durations, seconds["ours"], strict=True)
                row.contestants[name].ratio = quartiles([peer / ours for peer, ours in pairs])
        return row

"""What commands share: exit statuses, the error of a wrong request, types of arguments, and checks before the work."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

# Exit statuses; one more, workers.GPU_LOST, says that a kernel took the GPU from `tune`, which can be run again.
DONE = 0  # what a time limit left out is named and does not count as failed
FAILED = 1  # a check, an image, a download
WRONG_USAGE = 2  # an unknown model; a file, device or package that is not there
INTERRUPTED = 130

DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16",
          "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # fmt: skip
OPS = ("patch_embed", "attention", "layer_norm", "layer_norm_linear", "linear_residual", "layer_norm_mlp", "model")
VERIFIED = (*OPS, "attention_varlen", "transformer_block")


class UsageError(Exception):
    """The command was asked for something that cannot be, with exit status WRONG_USAGE."""


@contextlib.contextmanager
def as_usage_error(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds in the `with` body are raised as UsageError."""
    try:
        yield
    except kinds as error:
        raise UsageError(error) from None


def add_command(
    commands: argparse._SubParsersAction,
    name: str,
    text: str,
    run: Callable[[argparse.Namespace], int],
    device: bool = True,
) -> argparse.ArgumentParser:
    """The parser of a new command, which does `run`; `text` is its line in `fastvit --help`. device: whether it
    computes anything, on a device that can be chosen."""
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(run=run)
    if device:
        parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    return parser


# Types of arguments


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """A positive, finite number of this kind."""

    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not positive and finite")
        return value

    number.__name__ = f"positive {kind.__name__}"  # argparse names it in its error
    return number


def names(text: str) -> tuple[str, ...]:
    """What stands between the commas, at least one."""
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    return found


def list_of(kind: Callable[[str], object]) -> Callable[[str], tuple]:
    """Values of this kind with commas between."""

    def items(text: str) -> tuple:
        return tuple(kind(name) for name in names(text))

    items.__name__ = f"list of {kind.__name__}"
    return items


def some_of(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """Names out of `known` with commas between."""

    def checked(text: str) -> tuple[str, ...]:
        for name in names(text):
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {name!r}, expected some of {','.join(known)}")
        return names(text)

    return checked


# What arguments stand for


def torch_dtypes(dtypes: tuple[str, ...]) -> tuple:
    """The torch.dtypes of these names of DTYPES."""
    import torch

    return tuple(getattr(torch, DTYPES[name]) for name in dtypes)


def models_named(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The models that match, each once; a pattern that none matches stands for itself."""
    from .. import list_models

    return tuple(dict.fromkeys(name for pattern in patterns for name in list_models(pattern) or [pattern]))


def with_device_name(path: str | Path, device: str) -> Path:
    """The path with the device's name in the place of "{device}"."""
    from ..environment import device_name
    from ..report import slug

    return Path(str(path).replace("{device}", slug(device_name(device))))


# Checks: each raises UsageError


def checked_device(asked: str) -> str:
    """The device to use; it must be there, and the back end that the environment asks for must be one."""
    import torch

    with as_usage_error(ValueError):  # of an environment variable
        importlib.import_module("fastvit.dispatch")
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {asked!r}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"device {asked!r} was asked for, but PyTorch {torch.__version__} finds no GPU")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"device {asked!r} was asked for, but there are {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    return asked


def check_triton() -> None:
    """Triton must be installed."""
    if importlib.util.find_spec("triton") is None:
        raise UsageError("Triton is not installed: pip install triton (it has wheels for Linux)")


def check_writable(path: Path, what: str) -> Path:
    """`path`, to which a result could be written: to fail before the work, not after it."""
    if path.exists() and not path.is_file():  # /dev/null too: what is written takes the place of what was there
        raise UsageError(f"{what} {path} is {'a folder' if path.is_dir() else 'no regular file'}, expected a file")
    parent = Path(os.path.realpath(path)).parent if path.is_symlink() else path.parent
    if not parent.is_dir():
        raise UsageError(f"{what} {path}: no such folder as {parent}")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{what} {path}: the folder {parent} cannot be written to")
    return path


def stamp(path: Path) -> str:
    """What tells the file at `path` from one that took its place."""
    with as_usage_error(OSError):
        status = path.stat()
    return f"{path.resolve()}, {status.st_size} bytes, modified {status.st_mtime_ns} ns"


def make_folder(path: Path, what: str) -> None:
    """Make a folder for results, with those above it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{what}: the folder {path} cannot be made: {error.strerror}") from None

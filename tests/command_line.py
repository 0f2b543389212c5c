"""Calls of the command line, and what tests look at afterwards."""

import json
from pathlib import Path

import numpy as np

from fastvit import cli

ROOT = Path(__file__).parent.parent
PHOTOS = ROOT / "benchmarks" / "photos"
MODEL = "vit_tiny_patch16_224"


def run(*arguments: str) -> int:
    """`main`'s exit status, also where argparse exits by itself."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        return exit.code


def one_line(capsys) -> str:
    """What was printed on stderr, which must be one line and no traceback."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def complaints(error: str, frozen: bool = True) -> str:
    """stderr without the line that says that the model is frozen, or that it is not, which must be there once."""
    start = "The model is frozen, on torch: " if frozen else "The model runs as it is, not frozen: "
    lines = error.splitlines(keepends=True)
    assert [line.startswith("The model ") for line in lines].count(True) == 1, error
    assert any(line.startswith(start) for line in lines), error
    return "".join(line for line in lines if not line.startswith(start))


def weights(checkpoint: Path) -> list[str]:
    return ["--device", "cpu", "--model", MODEL, "--checkpoint", str(checkpoint)]


def add_bad_files(folder: Path) -> None:
    photo = (PHOTOS / "coffee.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(photo[: len(photo) // 2])
    (folder / "text.jpg").write_text("no image at all\n")


def read_npz(path: Path) -> tuple[list[str], np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return file["files"].tolist(), file["features"]


def strict_json(text: str):
    def refuse(name: str):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)

"""The file of features that `fastvit embed` writes: image names and one row of floats each.

.npz holds the arrays "files" and "features" and the facts of the run as JSON in "about"; .safetensors the tensor
"features" and, in its metadata, "files" (a JSON list) and "about".
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np

from .report import write_atomically

FORMATS = (".npz", ".safetensors")


def check_format(path: Path) -> None:
    """Raise ValueError for a name of no known format, ImportError where its library is missing."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: unknown format {path.suffix!r}, expected {' or '.join(FORMATS)}")
    if path.suffix == ".safetensors":
        try:
            import safetensors.numpy  # noqa: F401
        except ImportError as error:
            raise ImportError("writing .safetensors needs safetensors: pip install 'fastvit[cli]'") from error


class Features:
    """Rows as they are computed, and the file they go to. `facts` say what made them: rows of others are refused."""

    def __init__(self, path: Path, facts: dict):
        self.path, self.partial = path, path.with_name(f"{path.name}.partial")
        self.facts = facts
        self.done: dict[str, None] = {}  # an ordered set
        self._blocks: list[np.ndarray] = []

    def add(self, names: list[str], rows: np.ndarray) -> None:
        """Append one row for each of `names`."""
        self.done |= dict.fromkeys(names)
        self._blocks.append(rows)

    def resume(self) -> None:
        """Take over the rows in the partial file. Raises ValueError where another model or dtype made them."""
        if not self.partial.exists():
            return
        try:
            with np.load(self.partial, allow_pickle=False) as file:
                names, rows, facts = file["files"].tolist(), file["features"], json.loads(str(file["about"]))
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.partial}: not a file of features") from error
        if facts != self.facts:
            raise ValueError(f"{self.partial} was made with {facts}, expected {self.facts}: delete it to start anew")
        self.add(names, rows)

    def save_partial(self) -> bool:
        """Keep what there is beside the output, as .npz; False where there is nothing."""
        if self.done:
            write_atomically(self.partial, self._npz())
        return bool(self.done)

    def save(self) -> None:
        """Write the output and remove the partial file."""
        write_atomically(self.path, self._npz() if self.path.suffix == ".npz" else self._safetensors())
        self.partial.unlink(missing_ok=True)

    def _npz(self) -> bytes:
        file = io.BytesIO()
        about = np.array(json.dumps(self.facts))
        np.savez(file, files=np.array(list(self.done)), features=np.concatenate(self._blocks), about=about)
        return file.getvalue()

    def _safetensors(self) -> bytes:
        from safetensors.numpy import save

        metadata = {"files": json.dumps(list(self.done)), "about": json.dumps(self.facts)}
        return save({"features": np.concatenate(self._blocks)}, metadata)

"""The file of features that `fastvit embed` writes: image names and one row of floats each.

.npz holds the arrays "files" and "features" and the facts of the run as JSON in "about"; .safetensors the tensor
"features" and, in its metadata, "files" (a JSON list) and "about". A partial file, of an interrupted run, is .npz with
"stamps" too, the size and modification time (ns) of each image.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np

from .report import write_atomically

FORMATS = (".npz", ".safetensors")


def check_format(path: Path) -> None:
    """Raise ValueError for a name of no known format, ImportError where its library is missing."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: unknown format {path.suffix!r}, expected {' or '.join(FORMATS)}")
    if path.suffix.lower() == ".safetensors":
        try:
            import safetensors.numpy  # noqa: F401
        except ImportError as error:
            raise ImportError("writing .safetensors needs safetensors: pip install 'fastvit[cli]'") from error


class Features:
    """Rows as they are computed, by their image's name, and the file they go to.

    facts: what makes the rows; those that other facts made are refused. images: the name of every image of the run, in
    the order of the output, and the file's size and modification time, by which a row is known to be of that very file.
    """

    def __init__(self, path: Path, facts: dict, images: dict[str, tuple[int, int]]):
        self.path, self.partial = path, path.with_name(f"{path.name}.partial")
        self.facts, self.images = facts, images
        self.rows: dict[str, np.ndarray] = {}

    def resume(self) -> int:
        """Take up the rows in the partial file, and return how many were left out: their image is gone or has changed.

        Raises ValueError for rows that other facts made, and for what is no partial file.
        """
        if not self.partial.exists():
            return 0
        try:
            with np.load(self.partial, allow_pickle=False) as file:
                names, rows, stamps = file["files"].tolist(), file["features"], file["stamps"].tolist()
                facts = json.loads(str(file["about"]))
            found = {
                name: row
                for name, row, stamp in zip(names, rows, stamps, strict=True)
                if self.images.get(name) == tuple(stamp)
            }
            others = {name: facts.get(name) for name in self.facts if facts.get(name) != self.facts[name]}
        except Exception as error:  # of a damaged archive numpy raises OSError, EOFError, BadZipFile and more
            raise ValueError(f"{self.partial} is no partial result of this version of fastvit") from error
        if others:
            differ = ", ".join(f"{name} {value} (now {self.facts[name]})" for name, value in others.items())
            raise ValueError(f"{self.partial} was made with {differ}")
        self.rows = found
        return len(names) - len(found)

    def save_partial(self) -> bool:
        """Keep the rows beside the output, as .npz; False where there are none."""
        if self.rows:
            names, rows = self._table()
            write_atomically(self.partial, self._npz(names, rows, stamps=np.array([self.images[n] for n in names])))
        return bool(self.rows)

    def save(self) -> None:
        """Write the output and remove the partial file."""
        names, rows = self._table()
        write = self._npz if self.path.suffix.lower() == ".npz" else self._safetensors
        write_atomically(self.path, write(names, rows))
        self.partial.unlink(missing_ok=True)

    def _table(self) -> tuple[list[str], np.ndarray]:
        names = [name for name in self.images if name in self.rows]
        return names, np.stack([self.rows[name] for name in names])

    def _npz(self, names: list[str], rows: np.ndarray, **more: np.ndarray) -> bytes:
        file = io.BytesIO()
        np.savez(file, files=np.array(names), features=rows, about=np.array(json.dumps(self.facts)), **more)
        return file.getvalue()

    def _safetensors(self, names: list[str], rows: np.ndarray) -> bytes:
        from safetensors.numpy import save

        return save({"features": rows}, {"files": json.dumps(names), "about": json.dumps(self.facts)})

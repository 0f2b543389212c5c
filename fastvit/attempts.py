"""What is being tried on a GPU, on disk: a kernel that takes the GPU from its process, or never ends, leaves its name
behind, and the next process leaves it alone."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from .report import first_line, write_json
from .workers import GPU_LOST

TRY_SECONDS = 20.0  # what no attempt takes, compiling included


class GpuLost(BaseException):
    """A kernel left this process without its GPU: only another process can go on.

    No Exception, so that nothing that handles one candidate's failure takes it for one and goes on in vain.
    """


class Attempts:
    """The attempts of one device. fatal: why each that ended its process is not to be tried again, by name."""

    def __init__(self, path: Path | None = None, watched: bool = False):
        """path: a JSON file that keeps them; None, or where nothing can be written: they last as long as this object.
        Two processes that measure at once must not share it. watched: an attempt that does not end in time ends the
        process, with status `GPU_LOST`."""
        self.fatal: dict[str, str] = {}
        self._watched = watched
        self._path, self._now = path, path and path.with_suffix(".trying")
        if path is None:
            return
        with contextlib.suppress(OSError, ValueError):
            self.fatal = {str(name): str(why) for name, why in json.loads(path.read_text(encoding="utf-8")).items()}
        with contextlib.suppress(OSError):
            self.fatal[self._now.read_text(encoding="utf-8")] = "ended the process that tried it"
            self._keep("", fatal=True)

    @contextlib.contextmanager
    def trying(self, name: str, seconds: float = TRY_SECONDS) -> Iterator[None]:
        """Try `name` in the `with` body and wait for the GPU, for `seconds` at most.

        An exception there is the caller's to handle, unless the GPU went with it: then `GpuLost` is raised.
        """
        self._keep(name)
        watchdog = threading.Timer(seconds, _give_up, (name, seconds))
        watchdog.daemon = True
        try:
            if self._watched:
                watchdog.start()
            yield
            _wait()
        except Exception as error:
            if not gpu_is_lost():
                raise
            self.fatal[name] = f"took the GPU from its process: {first_line(error)}"
            raise GpuLost(f"{name} {self.fatal[name]}") from error
        finally:
            watchdog.cancel()
            self._keep("", fatal=name in self.fatal)

    def _keep(self, now: str, fatal: bool = False) -> None:
        """Write down what is being tried now, if anything, and what was fatal."""
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if fatal:
                write_json(self._path, self.fatal)
            if now:
                self._now.write_text(now, encoding="utf-8")
            else:
                self._now.unlink()


def _give_up(name: str, seconds: float) -> None:
    """End the process: waiting for a kernel that does not end, its main thread does not hear of anything."""
    print(f"the GPU is lost: {name} did not end within {seconds:g} s", file=sys.stderr, flush=True)
    os._exit(GPU_LOST)


def gpu_is_lost() -> bool:
    """Whether CUDA does nothing more for this process."""
    try:
        _wait()
    except RuntimeError:
        return True
    return False


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

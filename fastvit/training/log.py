"""What a training run shows: a progress bar, CSV files, TensorBoard where it is installed, and a picture of it all."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import sys
import time
from pathlib import Path

from ..report import note, write_atomically

STEPS = ("step", "epoch", "loss", "lr", "images_per_s", "mfu")
EPOCHS = ("epoch", "step", "loss", "top1", "top5", "ema_top1", "ema_top5", "seconds")


class Log:
    """log.csv, a row a step, and epochs.csv, a row an epoch, in `folder`.

    A run that goes on from `step` has the rows up to there, and writes the others anew.
    """

    def __init__(self, folder: Path, step: int, steps: int):
        self.folder = folder
        self._files = {"log": STEPS, "epochs": EPOCHS}
        for name, columns in self._files.items():
            path = folder / f"{name}.csv"
            kept = [row for row in read(path) if int(row["step"]) <= step] if step else []
            lines = [columns, *([row[column] for column in columns] for row in kept)]
            write_atomically(path, "".join(",".join(line) + "\n" for line in lines).encode())
        self._out = {name: open(folder / f"{name}.csv", "a", newline="") for name in self._files}  # noqa: SIM115
        self._flushed = time.monotonic()
        self._board = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._bar = _bar(step, steps)

    def step(self, **row) -> None:
        self._write("log", row)
        if self._bar is not None:
            bar, task = self._bar
            mfu = f", MFU {row['mfu']:.0%}" if row["mfu"] else ""
            said = f"epoch {row['epoch']}, loss {row['loss']:.3f}, {row['images_per_s']:.0f} images/s{mfu}"
            bar.update(task, completed=row["step"], description=said)

    def epoch(self, **row) -> None:
        self._write("epochs", row)
        self.flush()
        said = [f"epoch {row['epoch']}", f"loss {row['loss']:.4f}"]
        for name, words in (("top1", "top-1"), ("top5", "top-5"), ("ema_top1", "EMA top-1")):
            said += [f"{words} {row[name]:.2%}"] if row[name] != "" else []
        note(", ".join([*said, f"{row['seconds']:.0f} s"]))

    def _write(self, name: str, row: dict) -> None:
        csv.writer(self._out[name], lineterminator="\n").writerow([row[column] for column in self._files[name]])
        if self._board is not None:
            for column, value in row.items():
                if isinstance(value, float) and column != "seconds":
                    self._board.add_scalar(f"{name}/{column}", value, row["step"])
        if time.monotonic() - self._flushed > 5:
            self.flush()

    def flush(self) -> None:
        for file in self._out.values():
            file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        for file in self._out.values():
            file.close()
        if self._board is not None:
            self._board.close()
        if self._bar is not None:
            self._bar[0].stop()


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, without one that was cut off; none where there is no file."""
    with contextlib.suppress(FileNotFoundError):
        text = path.read_text(encoding="utf-8")
        return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
    return []


def _bar(step: int, steps: int):
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    parts = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    bar = Progress(*parts, console=Console(stderr=True), transient=True, refresh_per_second=2)
    bar.start()
    return bar, bar.add_task("starting", total=steps, completed=step)


def picture(folder: Path) -> bytes:
    """The curves of log.csv and epochs.csv as a PNG: loss and learning rate by step, accuracy by epoch."""
    import io

    from matplotlib.figure import Figure

    rows, epochs = read(folder / "log.csv"), read(folder / "epochs.csv")
    steps, losses = [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]
    tested = [row for row in epochs if row["top1"]]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    left.plot(steps, _smooth(losses), color="tab:blue", label="loss, smoothed")
    left.set(xlabel="step", ylabel="loss")
    rate = left.twinx()
    rate.plot(steps, [float(row["lr"]) for row in rows], color="tab:orange", linestyle="--", label="learning rate")
    rate.set_ylabel("learning rate")
    left.legend(handles=[*left.lines[1:], *rate.lines], loc="upper right")
    for column, words in (("top1", "top-1"), ("top5", "top-5"), ("ema_top1", "top-1, averaged weights")):
        found = [(int(row["epoch"]), 100 * float(row[column])) for row in tested if row[column]]
        if found:
            right.plot(*zip(*found, strict=True), label=words, marker="." if len(found) < 60 else None)
    right.set(xlabel="epoch", ylabel="validation accuracy, %")
    if tested:
        right.legend(loc="lower right")
    right.grid(alpha=0.3)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _smooth(values: list[float]) -> list[float]:
    """A running mean over the last fiftieth of them."""
    window, total, smooth = max(1, len(values) // 50), 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0)
        smooth.append(total / min(i + 1, window))
    return smooth

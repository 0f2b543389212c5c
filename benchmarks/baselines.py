"""`fastvit bench --baselines`: timm's convolutional networks beside our ViTs of the same accuracy, images a second
against published top-1, as in Figure 1 of DeiT's paper (arXiv 2012.12877).

A row holds all networks, which take turns. They are different networks: no output is checked here; what is checked of
ours, and against whom it is timed on the same weights, is the suite's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from itertools import product
from pathlib import Path

import torch

import fastvit
from fastvit import torchvision_shim
from fastvit.environment import device_name
from fastvit.models.registry import model_entry
from fastvit.report import Table, note
from fastvit.verify import SHORT, randomise

from . import timing
from .bench import Bench, first_line, record
from .cases import MODES
from .plan import Plan
from .report import baselines as written
from .report.words import minutes, number, rate
from .schema import Entry, Row, Run
from .suites import AXES, SEED, Settings
from .top1 import NETWORKS, SIZE
from .work import normalise, read_pixels, timed_step

FILE = written.FILE


@dataclass(frozen=True)
class Together:
    """One row: all networks at this dtype, batch and mode."""

    dtype: torch.dtype
    batch: int
    mode: str

    @property
    def id(self) -> str:
        return f"baselines/{SHORT[self.dtype]}/b{self.batch}/{self.mode}"


def settings(
    device: str,
    models: Iterable[str] = (),
    modes: Iterable[str] = (),
    batches: Iterable[int] = (),
    dtypes: Iterable[torch.dtype] = (),
    **others,
) -> Settings:
    """The settings of a run: every combination of the axes, with the first of `suites.AXES` for dtypes or batches that
    are not given. models: patterns, of `top1.NETWORKS`. others: fields of Settings.

    Raises ValueError for an unknown network or mode, and without timm.
    """
    if not written.installed("timm"):
        raise ValueError("--baselines: timm is not installed: pip install timm")
    for pattern in models:
        if not any(fnmatch(name, pattern) for name in NETWORKS):
            raise ValueError(f"unknown baseline {pattern!r}, expected some of {', '.join(NETWORKS)}")
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
    axes = AXES["cuda" if device.startswith("cuda") else "cpu"]
    cases = product(modes or MODES, dtypes or axes["dtypes"][:1], batches or axes["batches"][:1])
    chosen = [name for name in NETWORKS if not models or any(fnmatch(name, pattern) for pattern in models)]
    return Settings(
        device, tuple(Together(dtype, batch, mode) for mode, dtype, batch in cases), tuple(chosen), **others
    )


class Baselines(Bench):
    """Measures one row for each case of `settings`, whose peers are the networks."""

    file = FILE

    def peaks(self) -> None:
        return None

    def plan(self, cases: list[Together], peaks: None, interprets: bool) -> Plan:
        return Plan()  # whether a row fits is seen when its networks have run once

    def blank(self, case: Together, peaks: None) -> Row:
        dtype = SHORT[case.dtype]
        return Row(case.id, "baselines", "", SIZE, 0, dtype, case.batch, case.mode, "timed", items=case.batch)

    def _measure(self, row: Row, case: Together) -> None:
        device, training = self.settings.device, case.mode == "training"
        images = self._images(case)
        timer, limit, steps, singles = timing.timer(device), self.settings.time_limit or math.inf, {}, []
        with torch.enable_grad() if training else torch.inference_mode():
            for name in self._names(case):
                if reason := self.out_of_time():
                    self._skip(row, reason)
                    return
                entry = row.entries[name] = Entry()
                try:
                    step = timed_step([partial(self._network(name, case), images)], training)
                    step()
                    singles.append(timer(step, 1))
                    steps[name] = step
                except Exception as error:  # the others go on
                    entry.status, entry.reason = "failed", first_line(error)
                    continue
                mean = statistics.mean(singles)
                seconds = timing.interleave_seconds(mean, len(steps), self.settings.seconds, device)
                if self.spent() + seconds > limit:
                    left = f"{minutes(seconds)} or more, and the time limit of {limit:g} s leaves less"
                    self._skip(row, f"not started: its rounds take {left}")
                    return
            measured, failures = timing.interleave(steps, timer, self.settings.seconds)
        for name, error in failures.items():
            row.entries[name].status, row.entries[name].reason = "failed", first_line(error)
        for name, durations in measured.items():
            row.entries[name].seconds = timing.spread(durations)
        if not measured:
            row.status, row.reason = "failed", next(iter(row.entries.values())).reason

    def _skip(self, row: Row, reason: str) -> None:
        row.status, row.reason, row.entries = "skipped", reason, {}

    def _names(self, case: Together) -> list[str]:
        """The entries of a row. On a CPU ours frozen come too: on PyTorch alone, as everything else here."""
        found = []
        for name in self.settings.peers:
            found.append(name)
            if written.is_vit(name) and case.mode == "inference" and not self.settings.device.startswith("cuda"):
                found.append(written.FROZEN + name)
        return found

    def _images(self, case: Together) -> torch.Tensor:
        config = model_entry("deit_tiny_patch16_224").config
        photos = normalise(read_pixels(config, self.settings)[1], config.mean, config.std)
        return photos[torch.arange(case.batch) % len(photos)].to(self.settings.device, case.dtype)

    def _network(self, name: str, case: Together) -> torch.nn.Module:
        """The network, ready to be called with images; random weights, which do not change its speed."""
        plain, training = name.removeprefix(written.FROZEN), case.mode == "training"
        with torch.inference_mode(False):
            if written.is_vit(plain):
                model = fastvit.create_model(plain)
                randomise(model, SEED)
            else:
                torchvision_shim.install()
                import timm

                torch.manual_seed(SEED)
                model = timm.create_model(plain)
            model = model.to(self.settings.device, case.dtype).train(training)
        if plain != name:
            return fastvit.freeze(model, runtime="torch", batch_sizes=(case.batch,))
        if not written.is_vit(plain) and self.settings.device.startswith("cuda"):
            return model.to(memory_format=torch.channels_last)  # which a GPU's convolutions want
        return model


def run(settings: Settings, folder: Path, before: Run | None = None) -> int:
    """Measure what `before` has not, print and write everything into `folder`; returns the exit status: 0 when
    something was timed and nothing failed, 1 otherwise, 130 after Ctrl-C."""
    rows = f"{len(settings.cases)} rows, {len(settings.peers)} networks that take turns in each"
    note(f"Timing on {device_name(settings.device)}: {rows}; weights: random; images: {settings.images}.")
    found, interrupted = record(settings, folder, before, _print, kind=Baselines)
    print(f"results: {folder / FILE}")
    if not written.installed("matplotlib"):
        note("No picture: matplotlib is not installed.")
    for path in written.write(found, folder):
        print(f"written: {path}")
    if interrupted:
        return 130
    statuses = {row.status for row in found.rows}
    statuses |= {entry.status for row in found.rows for entry in row.entries.values()}
    return 0 if "timed" in statuses and statuses <= {"timed", "skipped"} else 1


def _print(row: Row) -> None:
    print(f"{row.id}{f'  {row.status}: {row.reason}' if row.reason else ''}")
    if not row.entries:
        return
    table = Table({"network": -40, "images/s": 9, "quartiles": 20})
    for name, entry in row.entries.items():
        if entry.seconds:
            median, low, high = map(number, rate(row, entry))
            table.row(name, median, f"{low} – {high}")
        else:
            table.row(name, entry.status, entry.reason)
    print()

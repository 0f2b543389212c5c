"""The pictures of a run, as PNG: drawn for a phone's width, and the same bytes from the same run. Needs matplotlib."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator
from itertools import product

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # no pyplot: no display, no global state
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox
from PIL import Image  # matplotlib brings it

from .. import top1
from ..schema import OURS, Entry, Row, Run
from .words import device, duration, number, peers_of, quantity, rate, score, subject, timed, versions, weights

WIDTH, DPI = 4.3, 200  # inches: on a phone about 80 pixels each, so that 9 points are 10 pixels
ACCENT, INK, QUIET, GRID = "#0b62a8", "#1d2329", "#6b7580", "#dfe3e7"
BAR, WORSE = "#b4bdc6", "#b5470b"
# For lines and dots of peers: Okabe and Ito's colours, which most colour-blind readers can tell apart, except the blue,
# which is ours. Each peer has a marker of its own as well.
PEER_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a6a00", "#6b7580", "#7b3fa0", "#333333")
PEER_MARKERS = "svD^<>PXh"
# The steps of a waterfall, as far as a case has them.
EAGER_TO_FUSED = ("timm amp", "timm", "torch", "timm compiled", "timm max-autotune", OURS)
ROOFLINE = "roofline bound"


def pictures(run: Run) -> dict[str, bytes]:
    """File name -> PNG, of the pictures that the run has data for."""
    rows = timed(run.rows)
    found = {}
    for stem, draw in DRAWN.items():
        for suffix, figure in draw(run, rows):
            found[f"{stem}{suffix}.png"] = _png(figure)
    return found


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    small = (
        io.BytesIO()
    )  # a palette takes a third of the bytes and no metadata, so that the same run gives the same file
    Image.open(file).convert("RGB").quantize(128).save(small, format="png", optimize=True)
    return small.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# What the pictures share


def _figure(run: Run, title: str, what: str, heights: list[float]) -> tuple[Figure, list[Axes]]:
    """A figure with one column of axes of these heights in inches, under title, subject and the run's facts."""
    facts = [part for part in (device(run), versions(run), weights(run)) if part]
    lines = [*textwrap.wrap(what, 68), *textwrap.wrap("; ".join(facts), 68)]
    head = 0.34 + 0.155 * len(lines) + 0.12
    height = head + sum(heights)
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    figure.text(0.015, 1 - 0.08 / height, title, fontsize=12, weight="bold", color=INK, va="top")
    figure.text(0.015, 1 - 0.34 / height, "\n".join(lines), fontsize=8, color=QUIET, va="top", linespacing=1.35)
    figure.get_layout_engine().set(rect=(0.01, 0.0, 0.975, 1 - head / height), hspace=0.06)
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.spines[["left", "bottom"]].set_color(QUIET)
        each.tick_params(labelsize=9, labelcolor=INK, color=QUIET)
        each.set_axisbelow(True)
    return figure, list(axes)


def _plain_log(axis, text: Callable[[float], str]) -> None:
    """Ticks on a logarithmic axis as plain numbers, more in each decade the fewer decades it spans. Set its limits
    first."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    subs = (1,) if decades > 3 else (1, 3) if decades > 1.2 else (1, 1.5, 2, 3, 5, 7) if decades > 0.3 else range(1, 10)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_locator(NullLocator())


def _colour(name: str, peers: list[str]) -> str:
    return ACCENT if name == OURS else PEER_COLOURS[peers.index(name) % len(PEER_COLOURS)]


def _marker(name: str, peers: list[str]) -> str:
    return "o" if name == OURS else PEER_MARKERS[peers.index(name) % len(PEER_MARKERS)]


def _apart(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Places near those wanted and in the same order, at least `gap` apart, between low and high if they all fit."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    clusters: list[tuple[float, int]] = []  # groups of touching places: middle and number
    for i in order:
        middle, n = wanted[i], 1
        while clusters and middle - clusters[-1][0] < gap * (n + clusters[-1][1]) / 2:
            before, m = clusters.pop()
            middle, n = (middle * n + before * m) / (n + m), n + m
        clusters.append((middle, n))
    places = [middle + gap * (i - (n - 1) / 2) for middle, n in clusters for i in range(n)]
    last = len(places) - 1
    places = [min(place, high - gap * (last - i)) for i, place in enumerate(places)]
    places = [max(place, low + gap * i) for i, place in enumerate(places)]
    return [places[order.index(i)] for i in range(len(wanted))]


def _round(value: float) -> str:
    """A tick's number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:g}"


def _name_bars(axes: Axes, names: list[str], widest: float) -> None:
    """Names beside horizontal bars, the first on top; no horizontal axis, because the bars are labelled with values."""
    axes.set_yticks(range(len(names)), names, fontsize=9)
    for tick in axes.get_yticklabels():
        if tick.get_text().startswith(OURS):
            tick.set(color=ACCENT, weight="bold")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.55 * widest)  # room for the values
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _by_mode_and_dtype(rows: list[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    """(mode, dtype, rows) of whole models: what one picture compares."""
    models = [row for row in rows if not row.op]
    for mode, dtype in dict.fromkeys((row.mode, row.dtype) for row in models):
        yield mode, dtype, [row for row in models if (row.mode, row.dtype) == (mode, dtype)]


def _by_subject(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(subject(row), []).append(row)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Bars: throughput and memory


def _bars(axes: Axes, row: Row, value: Callable[[Entry], tuple | None], label: Callable[[str], str]) -> None:
    """One case: a bar for each entry, with whiskers. `value` gives (median, lower, upper quartile) of an entry, or
    None."""
    names = [name for name, entry in row.entries.items() if entry.status != "absent"]
    found = {name: value(row.entries[name]) for name in names}
    widest = max(high for _, _, high in filter(None, found.values()))
    for y, name in enumerate(names):
        colour = ACCENT if name == OURS else INK
        if found[name] is None:
            axes.text(0.01 * widest, y, row.entries[name].status, fontsize=8.5, color=WORSE, va="center_baseline")
            continue
        middle, low, high = found[name]
        axes.barh(y, middle, 0.68, color=ACCENT if name == OURS else BAR)
        if high > low:
            axes.errorbar(middle, y, xerr=[[middle - low], [high - middle]], color=INK, lw=1.1, capsize=2.5)
        text = label(name)
        weight = "bold" if name == OURS else "normal"
        axes.text(high + 0.02 * widest, y, text, fontsize=8.5, color=colour, va="center_baseline", weight=weight)
    _name_bars(axes, names, widest)
    axes.set_title(f"{subject(row)}, batch {row.batch}", fontsize=9.5, loc="left", color=INK, pad=3)


def _bar_pictures(run, rows, title, what, value, label) -> Iterator[tuple[str, Figure]]:
    """A picture for each mode and dtype, with the largest batch of each model."""
    for mode, dtype, some in _by_mode_and_dtype(rows):
        largest = [max(found, key=lambda row: row.batch) for found in _by_subject(some).values()]
        largest = [row for row in largest if sum(_positive(value(row, s)) for s in row.entries.values()) > 1]
        if not largest:
            continue
        present = [sum(entry.status != "absent" for entry in row.entries.values()) for row in largest]
        heights = [0.35 + 0.21 * n for n in present]
        figure, all_axes = _figure(run, f"{title}: {mode}, {dtype}", what, heights)
        for axes, row in zip(all_axes, largest, strict=True):
            _bars(axes, row, lambda entry, row=row: value(row, entry), lambda name, row=row: label(row, name))
        yield f"-{mode}-{dtype}", figure


def _positive(value: tuple | None) -> bool:
    return value is not None and value[0] > 0


def _throughput(run: Run, rows: list[Row]) -> Iterator[tuple[str, Figure]]:
    def label(row: Row, name: str) -> str:
        entry = row.entries[name]
        speed = number(rate(row, entry)[0])
        if name == OURS or entry.ratio is None:
            return speed
        return f"{speed}   tie" if entry.verdict == "tie" else f"{speed}   ours {score(entry.ratio, entry.verdict)}x"

    what = "Images a second at each model's largest batch, median and quartiles; more is better."
    return _bar_pictures(run, rows, "Throughput", what, rate, label)


def _memory(run: Run, rows: list[Row]) -> Iterator[tuple[str, Figure]]:
    def value(row: Row, entry: Entry):
        return None if entry.peak_bytes is None else (entry.peak_bytes,) * 3

    def label(row: Row, name: str) -> str:
        return quantity(row.entries[name].peak_bytes, "B")

    what = "Peak memory of a call beyond weights and input, at each model's largest batch; less is better."
    return _bar_pictures(run, rows, "Memory", what, value, label)


# ---------------------------------------------------------------------------------------------------------------------
# Roofline


def _roofline(run: Run, rows: list[Row]) -> Iterator[tuple[str, Figure]]:
    rows = [row for row in rows if row.flops and row.bytes]
    if not rows or run.peaks is None:
        return
    peaks = run.peaks
    dtypes = [dtype for dtype in peaks.flops_per_s if any(row.dtype == dtype for row in rows)]
    what = "FLOP/s that ours reached, against the FLOPs a byte that the case needs. Lines: what this device "
    what += "reached in a large copy and large matrix products."
    figure, (axes,) = _figure(run, "Roofline", what, [4.3])
    intensities = [row.flops / row.bytes for row in rows]
    reached = [row.flops / row.entries[OURS].seconds.median for row in rows]
    ridges = [peaks.flops_per_s[dtype] / peaks.bytes_per_s for dtype in dtypes]
    low, high = min(*intensities, *ridges) / 2, max(*intensities, *ridges)
    high = low * (high / low) ** (1 / 0.5)  # room for the peaks' labels
    top = max(peaks.flops_per_s[dtype] for dtype in dtypes)
    # A peak that was measured while the machine was busy may lie below what ours reached.
    bottom, height = min(*reached, *peaks.flops_per_s.values()) / 2, 2.2 * max(top, *reached)
    decades = math.log(height / bottom)
    wanted = [math.log(peaks.flops_per_s[dtype] / bottom) / decades + 0.03 for dtype in dtypes]
    for i, (dtype, place) in enumerate(zip(dtypes, _apart(wanted, 0.05, 0.0, 0.97), strict=True)):
        colour = (ACCENT, *PEER_COLOURS)[i]
        peak = peaks.flops_per_s[dtype]
        axes.plot([ridges[i], high], [peak, peak], color=colour, lw=1.6)
        label = f"{dtype}: {quantity(peak, 'FLOP/s')}"
        axes.text(0.995, place, label, transform=axes.transAxes, ha="right", va="center", fontsize=9, color=colour,
                  weight="bold")  # fmt: skip
        for op, marker in ((False, "o"), (True, "^")):
            at = [j for j, row in enumerate(rows) if row.dtype == dtype and bool(row.op) == op]
            axes.scatter([intensities[j] for j in at], [reached[j] for j in at], s=26, marker=marker, color=colour,
                         alpha=0.75, linewidths=0.5, edgecolors="white", zorder=3)  # fmt: skip
    axes.plot([low, top / peaks.bytes_per_s], [low * peaks.bytes_per_s, top], color=QUIET, lw=1.6)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, height))
    axes.text(0.02, 0.98, f"memory: {quantity(peaks.bytes_per_s, 'B/s')}", transform=axes.transAxes, fontsize=9,
              color=QUIET, weight="bold", va="top")  # fmt: skip
    shapes = [name for name, op in (("dots: whole models", False), ("triangles: single ops", True))
              if any(bool(row.op) == op for row in rows)]  # fmt: skip
    axes.text(0.98, 0.03, "\n".join(shapes), transform=axes.transAxes, fontsize=9, color=QUIET, ha="right")
    axes.set_xlabel("FLOPs a byte", fontsize=9, color=INK)
    axes.grid(color=GRID, lw=0.6)
    _plain_log(axes.xaxis, _round)
    _plain_log(axes.yaxis, lambda value: quantity(value, "FLOP/s", _round))
    yield "", figure


# ---------------------------------------------------------------------------------------------------------------------
# Latency against batch


def _latency(run: Run, rows: list[Row]) -> Iterator[tuple[str, Figure]]:
    peers = peers_of(rows)
    for mode, dtype, some in _by_mode_and_dtype(rows):
        series = {name: found for name, found in _by_subject(some).items() if len({row.batch for row in found}) > 1}
        if not series:
            continue
        what = "Time of a call divided by its images, median, against the batch, both logarithmic; less is better."
        figure, all_axes = _figure(run, f"Latency against batch: {mode}, {dtype}", what, [2.9] * len(series))
        for axes, (name, found) in zip(all_axes, series.items(), strict=True):
            _latency_axes(axes, sorted(found, key=lambda row: row.batch), peers)
            axes.set_title(f"{name}, time an image", fontsize=9.5, loc="left", color=INK, pad=3)
        all_axes[-1].set_xlabel("batch", fontsize=9, color=INK)
        yield f"-{mode}-{dtype}", figure


def _latency_axes(axes: Axes, rows: list[Row], peers: list[str]) -> None:
    batches = [row.batch for row in rows]
    axes.set(xscale="log", yscale="log")
    axes.margins(y=0.14)
    ends = {}
    for name in [*peers_of(rows), OURS]:  # ours last, on top
        entries = {row.batch: row.entries[name] for row in rows if name in row.entries}
        points = [(batch, entry.seconds.median / batch) for batch, entry in entries.items() if entry.seconds]
        if points:
            ends[name] = points[-1]
            axes.plot(*zip(*points, strict=True), color=_colour(name, peers), marker=_marker(name, peers),
                      ms=5.5 if name == OURS else 4, lw=2.2 if name == OURS else 1.1)  # fmt: skip
    graphs = [(row.batch, row.entries[OURS].graph.median / row.batch) for row in rows if row.entries[OURS].graph]
    if graphs:
        axes.plot(*zip(*graphs, strict=True), ":o", color=ACCENT, ms=5.5, mfc="white")
        axes.annotate("CUDA graph", graphs[0], xytext=(-3, -6), textcoords="offset points", fontsize=8.5,
                      color=ACCENT, va="top", bbox={"color": "white", "alpha": 0.8, "pad": 0.5})  # fmt: skip
    axes.set_xlim(batches[0] / 1.15, batches[-1] * (batches[-1] / batches[0]) ** 0.03)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.xaxis.set_minor_locator(NullLocator())
    _plain_log(axes.yaxis, lambda value: duration(value, _round))
    axes.grid(color=GRID, lw=0.6)
    # Names at the curves' ends, pushed apart where the curves are not.
    bottom, top = (math.log(limit) for limit in axes.get_ylim())
    wanted = [(math.log(y) - bottom) / (top - bottom) for _, y in ends.values()]
    for place, (name, point) in zip(_apart(wanted, 0.075, 0.0, 1.0), ends.items(), strict=True):
        axes.annotate(name, point, xytext=(1.08, place), textcoords="axes fraction", fontsize=8.5, va="center",
                      color=_colour(name, peers), weight="bold" if name == OURS else "normal",
                      arrowprops={"arrowstyle": "-", "color": _colour(name, peers), "lw": 0.6, "shrinkA": 1,
                                  "shrinkB": 3, "relpos": (0, 0.5)})  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Waterfall


def _waterfall(run: Run, rows: list[Row]) -> Iterator[tuple[str, Figure]]:
    """From eager timm over the steps that a case has to ours and the roofline bound. Of each mode the case with the
    most steps is drawn, of those the one with the most FLOPs."""
    for mode in dict.fromkeys(row.mode for row in rows):
        found = [row for row in rows if row.mode == mode and not row.op and _steps(row)]
        if not found:
            continue
        row = max(found, key=lambda row: (len(_steps(row)), row.flops or 0, row.batch))
        steps = _steps(row)
        if graph := row.entries[OURS].graph:
            steps.append((f"{OURS}, CUDA graph", graph.median))
        if row.bound_seconds:
            steps.append((ROOFLINE, row.bound_seconds))
        what = (
            f"Time of a call of {subject(row)}, {row.dtype}, batch {row.batch}. Hatched: what a step takes off (blue) "
        )
        what += "or adds (orange)."
        figure, (axes,) = _figure(run, f"From eager to fused: {mode}", what, [0.4 + 0.42 * len(steps)])
        _waterfall_axes(axes, steps)
        yield f"-{mode}", figure


def _steps(row: Row) -> list[tuple[str, float]]:
    """Names and seconds; empty without eager timm to start from, or with nothing between it and ours."""
    entries = {name: row.entries[name] for name in EAGER_TO_FUSED if name in row.entries}
    steps = [(name, entry.seconds.median) for name, entry in entries.items() if entry.seconds]
    return steps if len(steps) > 2 and steps[0][0] in EAGER_TO_FUSED[:2] else []


def _waterfall_axes(axes: Axes, steps: list[tuple[str, float]]) -> None:
    widest = max(seconds for _, seconds in steps)
    before = None
    for y, (name, seconds) in enumerate(steps):
        ours = name.startswith(OURS)
        style = {"color": ACCENT if ours else BAR}
        if name == ROOFLINE:
            style = {"color": "white", "edgecolor": QUIET, "lw": 1, "ls": "--"}
        axes.barh(y, min(seconds, before or seconds), 0.6, **style)
        text = duration(seconds)
        edge = seconds
        if before is not None:
            change = seconds - before
            low, high = sorted((seconds, before))
            colour = WORSE if change > 0 else "#8fb8dc"
            axes.barh(y, high - low, 0.6, left=low, color=colour, alpha=0.55, hatch="///", edgecolor="white", lw=0)
            axes.plot([before, before], [y - 1 + 0.3, y + 0.3], color=QUIET, lw=0.8)
            text += f"  ({'+' if change > 0 else '-'}{duration(abs(change))})" if change else ""
            edge = high
        axes.text(edge + 0.02 * widest, y, text, fontsize=8.5, va="center_baseline", color=ACCENT if ours else INK,
                  weight="bold" if ours else "normal")  # fmt: skip
        before = seconds
    _name_bars(axes, [name for name, _ in steps], widest)


# ---------------------------------------------------------------------------------------------------------------------
# Error beside speed


def _error(run: Run, rows: list[Row]) -> Iterator[tuple[str, Figure]]:
    peers = peers_of(rows)
    models = [row for row in rows if not row.op and row.limit]
    dots: dict[str, list[tuple[float, float]]] = {}
    wrong: dict[str, list[float]] = {}
    for row in models:
        for name, entry in row.entries.items():
            if not entry.error:
                continue
            if entry.ratio or name == OURS:
                dots.setdefault(name, []).append(
                    (1 / entry.ratio.median if entry.ratio else 1.0, entry.error / row.limit)
                )
            elif entry.status == "wrong":
                wrong.setdefault(name, []).append(entry.error / row.limit)
    if len(dots) < 2:
        return
    names = [name for name in (OURS, *peers) if name in dots or name in wrong]
    what = "Each dot is an entry in one case of a whole model: its speed over ours, to the right is faster; its "
    what += "error over the limit, below is more exact."
    key = 0.2 * math.ceil(len(names) / 2)
    figure, (axes, legend) = _figure(run, "Error beside speed", what, [3.6, key])
    for name in reversed(names):  # ours on top
        style = {"color": _colour(name, peers), "marker": _marker(name, peers), "linewidths": 0.5, "alpha": 0.8}
        if name in dots:
            axes.scatter(*zip(*dots[name], strict=True), s=30, edgecolors="white", **style)
    speeds = [speed for found in dots.values() for speed, _ in found]
    left = min(speeds) / 1.25
    for name, found in wrong.items():
        axes.scatter([left] * len(found), found, s=34, marker="x", color=_colour(name, peers), lw=1.6)
        axes.annotate("wrong: not timed", (left, max(found)), xytext=(6, 0), textcoords="offset points", fontsize=8.5,
                      color=WORSE, va="center")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(left / 1.08, max(speeds) * 1.12))
    axes.axhline(1, color=WORSE, lw=1.2)
    axes.annotate("the limit", (0, 1), xycoords=("axes fraction", "data"), xytext=(3, 3), textcoords="offset points",
                  fontsize=8.5, color=WORSE)  # fmt: skip
    axes.axvline(1, color=ACCENT, lw=1, alpha=0.5)
    axes.set_xlabel("speed over ours", fontsize=9, color=INK)
    axes.set_ylabel("error over the limit", fontsize=9, color=INK)
    _plain_log(axes.xaxis, _round)
    _plain_log(axes.yaxis, _round)
    axes.grid(color=GRID, lw=0.6)
    legend.axis("off")
    legend.set(xlim=(0, 2), ylim=(-math.ceil(len(names) / 2), 0))
    for i, name in enumerate(names):
        x, y = i % 2, -(i // 2) - 0.5
        legend.scatter(x + 0.05, y, s=30, color=_colour(name, peers), marker=_marker(name, peers))
        legend.text(x + 0.12, y, name, fontsize=9, va="center", color=_colour(name, peers),
                    weight="bold" if name == OURS else "normal")  # fmt: skip
    yield "", figure


# In the order of the page.
DRAWN = {
    "throughput": _throughput,
    "latency": _latency,
    "waterfall": _waterfall,
    "roofline": _roofline,
    "memory": _memory,
    "error": _error,
}


# ---------------------------------------------------------------------------------------------------------------------
# Baselines: published accuracy against speed

CONVOLUTIONAL = "#d55e00"


def accuracy_against_speed(
    run: Run, points: dict[str, list[tuple[top1.Figure, float, float | None]]], is_vit: Callable[[str], bool]
) -> bytes | None:
    """A PNG with a panel for each mode, of what `report.baselines.points` gives; None without points."""
    if not points:
        return None
    what = "Published top-1 on ImageNet against images a second measured here, each network at its fastest dtype and "
    what += "batch; up and to the right is better. Blue: fastvit's ViTs; orange: timm's convolutional networks."
    if any(frozen for found in points.values() for _, _, frozen in found):
        what += " Hollow: the ViT frozen."

    def colour(one: top1.Figure) -> str:
        return ACCENT if is_vit(one.network) else CONVOLUTIONAL

    figure, all_axes = _figure(run, "Accuracy against speed", what, [3.4] * len(points))
    for axes, (mode, found) in zip(all_axes, points.items(), strict=True):
        every = [speed for _, *speeds in found for speed in speeds if speed]
        for one, speed, frozen in found:
            if frozen:
                axes.plot([speed, frozen], [one.top1] * 2, "-", color=colour(one), lw=0.8)
                axes.plot(frozen, one.top1, "o", color=colour(one), mfc="white", ms=5)
            axes.plot(speed, one.top1, "o" if is_vit(one.network) else "s", color=colour(one), ms=5)
        room = 1.1 * (max(every) / min(every)) ** 0.12
        axes.set(xscale="log", xlim=(min(every) / room, max(every) * room))
        axes.margins(y=0.16)
        axes.set_title("training step" if mode == "training" else mode, fontsize=9.5, loc="left", color=INK, pad=3)
        axes.set_ylabel("top-1, %", fontsize=9, color=INK)
        axes.grid(color=GRID, lw=0.6)
        _plain_log(axes.xaxis, _round)
    all_axes[-1].set_xlabel("images a second", fontsize=9, color=INK)
    figure.draw_without_rendering()  # the layout is settled, and with it where a text lies
    for axes, found in zip(all_axes, points.values(), strict=True):
        names = [(one.label, colour(one), one.top1, [x for x in speeds if x]) for one, *speeds in found]
        _label(axes, names)
    return _png(figure)


def _label(axes: Axes, names: list[tuple[str, str, float, list[float]]]) -> None:
    """Names beside points: (name, colour, y, xs of its one or two points), each at the first place where it covers
    nothing, else the last. Call it when the layout is settled."""
    taken = []
    for _, _, y, xs in names:
        (left, bottom), (right, top) = axes.transData.transform([(min(xs), y), (max(xs), y)]) + [[-5, -5], [5, 5]]
        taken.append(Bbox.from_extents(left, bottom, right, top))
    places, away = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)], (5, 8, 12, 17, 23)
    for name, colour, y, xs in names:
        middle = math.sqrt(min(xs) * max(xs))
        for far, (h, v) in product(away, places):
            text = axes.annotate(name, ((middle, max(xs), min(xs))[h], y), xytext=(far * h, far * v), fontsize=8,
                                 textcoords="offset points", ha=("center", "left", "right")[h], color=colour,
                                 va=("center", "bottom", "top")[v], in_layout=False)  # fmt: skip
            box = text.get_window_extent()
            inside = axes.bbox.fully_contains(box.x0, box.y0) and axes.bbox.fully_contains(box.x1, box.y1)
            if (inside and not box.count_overlaps(taken)) or (far, h, v) == (away[-1], *places[-1]):
                taken.append(box)
                break
            text.remove()

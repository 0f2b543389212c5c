"""The picture of a benchmark run. Needs matplotlib."""

from __future__ import annotations

import io

from .bench import Row


def picture(rows: list[Row], title: str) -> bytes:
    """A PNG: images per second (bars, quartiles as whiskers) over the error, one group a timed row."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    timed = [row for row in rows if row.status == "timed"]
    names = [name for name in timed[0].contestants if any(row.contestants[name].images_per_s for row in timed)]
    figure = Figure(figsize=(max(7.0, 0.8 * len(timed) + 2), 7.5), layout="constrained")
    speed, error = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        offset = (i - (len(names) - 1) / 2) * width
        points = [(x, row.contestants[name]) for x, row in enumerate(timed) if row.contestants[name].images_per_s]
        at = [x + offset for x, _ in points]
        rates = [contestant.images_per_s for _, contestant in points]
        medians = [rate["median"] for rate in rates]
        whiskers = [
            [rate["median"] - rate["q25"] for rate in rates],
            [rate["q75"] - rate["median"] for rate in rates],
        ]
        speed.bar(at, medians, width, yerr=whiskers, label=name, color=f"C{i}", error_kw={"lw": 1, "capsize": 2})
        error.plot(at, [contestant.error for _, contestant in points], "o", color=f"C{i}", label=name)
    speed.set_yscale("log")
    speed.set_ylabel("images per second")
    speed.set_title(title, fontsize=10)
    speed.legend()
    error.set_yscale("log")
    error.set_ylabel("relative rms error of the\nlogits against float64")
    short = [row.model.removeprefix("vit_").removesuffix("_patch16_224") for row in timed]
    labels = [f"{name}\n{row.dtype}\nbatch {row.batch}" for name, row in zip(short, timed, strict=True)]
    error.set_xticks(range(len(timed)), labels, fontsize=8)
    for axes in (speed, error):
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()

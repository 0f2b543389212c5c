"""A parity report as a picture: errors against depth."""

from __future__ import annotations

import io
from collections.abc import Sequence


def draw(rows: Sequence, diagnosis: str) -> bytes:
    """A PNG of the errors in a report's rows, on a logarithmic axis; what departs by itself is marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    depth = range(len(rows))
    least = 1e-18  # what 0 is drawn as
    for label, name, style in (
        ("model_b against model_a", "difference", "o-"),
        ("model_a against the truth", "error_a", "s--"),
        ("model_b against the truth", "error_b", "^--"),
        ("the layer alone, in float64", "own", "x:"),
    ):
        axes.plot(depth, [max(getattr(row, name), least) for row in rows], style, label=label, markersize=4)
    for place, row in enumerate(rows):
        if row.departs:
            axes.axvspan(place - 0.5, place + 0.5, color="tab:red", alpha=0.15, lw=0)
    shown = [place for place, row in enumerate(rows) if row.layer.startswith("block") and row.layer.count(" ") == 1]
    shown = shown[:: max(1, len(shown) // 12)]
    axes.set_xticks(shown, [rows[place].layer for place in shown], rotation=60, ha="right", fontsize=8)
    axes.set_yscale("log")
    axes.set_ylabel("relative error")
    axes.set_title(diagnosis if len(diagnosis) < 90 else diagnosis[:87] + "...", fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    return file.getvalue()

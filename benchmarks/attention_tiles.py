"""The part of docs/kernels.md about attention's tiles: what of a head's scores each tile makes, and how much of that is
padding, from the kernel's own tiling (`kernels.launch.request.tiling`)."""

from __future__ import annotations

from pathlib import Path

import torch
from fastvit.kernels.launch.hardware import ARCHS, Arch
from fastvit.kernels.launch.heuristic import heuristic
from fastvit.kernels.launch.request import AttentionConfig, Request, Scores, Tiling, split_head, tiling

DRAWN = (197, 257)
TOKENS = (50, 197, 257, 577, 1025, 1370)
HEAD_DIMS = (32, 64, 72, 80, 88, 96, 104, 112, 128)


def of_head(tokens: int, arch: Arch) -> tuple[AttentionConfig, Tiling, float]:
    """Of ViT-B at batch 256, bfloat16, forward: the config, the tiles, and scores made over scores asked for."""
    request = Request("attention_forward", (256, tokens, 12, 64), torch.bfloat16, Scores())
    fit = tiling(request, config := heuristic(request, arch, arch.sms))
    return config, fit, fit.tiles * config.BLOCK_ROWS * sum(fit.widths) / tokens**2


def table() -> list[str]:
    lines = ["| tokens | GPU | form | queries | keys | scores made over asked for |", f"|{'---|' * 6}"]
    for tokens in TOKENS:
        for arch in (ARCHS["sm_90"], ARCHS["sm_80"], ARCHS["sm_120"]):
            config, fit, area = of_head(tokens, arch)
            form = "all keys on chip" if config.ROW_TILES > 1 else "a tile of queries a program"
            first = "1 + " * fit.peeled
            queries, keys = f"{first}{fit.tiles} x {config.BLOCK_ROWS}", first + _in_words(fit.widths)
            lines.append(f"| {tokens} | {arch.name} | {form} | {queries} | {keys} | {area:.2f} |")
    return lines


def _in_words(widths: tuple[int, ...]) -> str:
    return " + ".join(
        f"{widths.count(width)} x {width}" if widths.count(width) > 1 else str(width) for width in dict.fromkeys(widths)
    )


def head_dims() -> list[str]:
    parts = [(head_dim, split_head(head_dim)) for head_dim in HEAD_DIMS]
    lines = ["| head | parts | columns multiplied over asked for |", "|---|---|---|"]
    return lines + [f"| {d} | {' + '.join(map(str, part))} | {sum(part) / d:.2f} |" for d, part in parts]


def picture(path: Path) -> None:
    """A head's scores, queries down and keys across, in tiles."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(DRAWN), figsize=(6.2 * len(DRAWN), 6.4), layout="constrained")
    for axis, tokens in zip(axes, DRAWN, strict=True):
        config, fit, area = of_head(tokens, ARCHS["sm_90"])
        right, bottom = fit.peeled + sum(fit.widths), fit.peeled + fit.tiles * config.BLOCK_ROWS
        for row in range(fit.tiles):
            top, left = fit.peeled + row * config.BLOCK_ROWS, int(fit.peeled)
            for width in fit.widths:
                tile = plt.Rectangle((left, top), width, config.BLOCK_ROWS, facecolor="#bee3f8", edgecolor="#2b6cb0")
                axis.add_patch(tile)
                axis.text(left + width / 2, top + config.BLOCK_ROWS / 2, f"{config.BLOCK_ROWS} x {width}",
                          ha="center", va="center", fontsize=8, rotation=90 * (width < 40))  # fmt: skip
                left += width
        if fit.peeled:
            for size in ((tokens, 1), (1, tokens)):
                axis.add_patch(plt.Rectangle((0, 0), *size, facecolor="#dd6b20"))
        for corner, size in (((tokens, 0), (right - tokens, bottom)), ((0, tokens), (tokens, bottom - tokens))):
            axis.add_patch(
                plt.Rectangle(corner, *size, facecolor="none", edgecolor="#c53030", hatch="////", linewidth=0)
            )
        apart = ", the class token apart (orange)" if fit.peeled else ", padding hatched"
        axis.set_title(f"{tokens} tokens: {area:.2f} of the scores asked for{apart}", fontsize=10)
        axis.set(xlim=(-2, bottom + 2), ylim=(bottom + 2, -2), xlabel="keys", ylabel="queries", aspect="equal")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)

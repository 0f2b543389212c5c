"""What docs/kernels.md shows: the launches of a block as one op, what each does, must move and is estimated to take on
an H100, as tables and as a picture; and attention's tiles. Nothing here was measured.

    python benchmarks/block_launches.py        # or: make kernels

Made from the code: the launchers run on tensors without memory, and every launch is noted in place of being made. The
estimates are `kernels.launch.cost`'s: products and memory traffic, and not what an epilogue computes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from fastvit.benchmarks import attention_tiles
from fastvit.benchmarks.report.summary import between
from fastvit.benchmarks.static.cases import whole_block
from fastvit.kernels import attention, gemm, tiles, twin
from fastvit.kernels.launch import choice, cost, rehearsal
from fastvit.kernels.launch.absent import target_of, without_gpu
from fastvit.kernels.launch.hardware import ARCHS
from fastvit.kernels.launch.request import LibraryConfig, TmaConfig

from fastvit import report, use_backend

PAGE = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
ARCH, BATCH, TOKENS = ARCHS["sm_90"], 256, 197
MODELS = {"Ti": (192, 12), "S": (384, 12), "B": (768, 12), "L": (1024, 24)}  # embed_dim, depth
PLAN = {("B", "inference"): 14.0, ("B", "training"): 44.0}  # milliseconds at batch 256, as planned
WITH_CHOICE = (gemm.gemm_kernel, gemm.tma_kernel, twin.apply_kernel, attention.attention_kernel,
               attention.attention_backward_dq_kernel, attention.attention_backward_dkdv_kernel)  # fmt: skip


# What a product is for, by its function and N / D, K / D, or of a weight gradient M / D, N / D.
ROLES = {
    ("store_folded", 3, 1): "LN + QKV",
    ("store_folded", 4, 1): "LN + fc1 + activation",
    ("store_stream", 1, 1): "proj + residual, statistics",
    ("store_stream", 1, 4): "fc2 + residual, statistics",
    ("store_derivative", 4, 1): "fc2 input gradient, activation's",
    ("store_norm_gradient", 1, 4): "fc1 input gradient, LN's, residual's",
    ("store_norm_gradient", 1, 3): "QKV input gradient, LN's, residual's",
    ("store_with_delta", 1, 1): "proj input gradient",
    ("torch.mm", 1, 4): "fc2 weight gradient",
    ("torch.mm", 4, 1): "fc1 weight gradient",
    ("torch.mm", 1, 1): "proj weight gradient",
    ("torch.mm", 3, 1): "QKV weight gradient",
}
OTHERS = {
    "fold_rows": "fold the norms into the weights",
    "attention_kernel": "attention",
    "scaled_gradient_kernel": "bias sums of the incoming gradient",
    "attention_backward_dq_kernel": "attention backward, queries",
    "attention_backward_dkdv_kernel": "attention backward, keys",
    "sum_columns": "partial sums of biases and norms",
    "unfold_columns": "weight and norm gradients out of products",
}


def role(function: str, shape: tuple[int, ...], dim: int) -> str:
    """What a launch of a block of `dim` channels is for."""
    if len(shape) != 3:
        return OTHERS.get(function, function)
    m, n, k = (size // dim for size in shape)
    sums = shape[2] == BATCH * TOKENS
    if function == "torch.mm" and not sums:
        return "the product of the next"
    return ROLES[(function, m, n) if sums else (function, n, k)]


@dataclass
class Launch:
    """One launch: its Triton function, or the library's, the shape of its request, what the function says it does,
    whose it is, FLOPs, bytes of matrices, seconds by estimate."""

    name: str
    shape: tuple[int, ...]
    does: str
    form: str
    flops: float
    bytes: float
    seconds: float

    @property
    def bound(self) -> float:
        """Seconds at the rates that the best code reaches."""
        rates = cost.Rates(cost.REACHED_FLOPS * ARCH.flops_16, cost.REACHED_BANDWIDTH * ARCH.bandwidth)
        return cost.bound_seconds(cost.Cost(self.flops, self.bytes), rates)


@contextlib.contextmanager
def noting() -> Iterator[list[Launch]]:
    """Collects, in place of making them, the launches of the `with` body on `ARCH`, as "auto" would have them."""
    found: list[Launch] = []
    chosen: list[tuple] = []

    def note(kernel, args, constants) -> None:
        function = next((constants[key] for key in ("EPILOGUE", "SECTION") if key in constants), kernel)
        moved, flops, seconds = cost._matrix_bytes(*_flat(args)), 0.0, 0.0
        shape, form = tuple(getattr(args[0], "shape", ())), "ours"
        if kernel in WITH_CHOICE:
            request, config, _ = chosen[-1]
            shape = request.shape
            form = {TmaConfig: "ours, by TMA", LibraryConfig: "around the library's"}.get(type(config), "ours")
            if kernel is not twin.apply_kernel:
                flops = cost.request_cost(request).flops
                seconds = cost.request_seconds(request, config, ARCH)
            if request.kernel in cost._ATTENTION:
                moved = cost.request_cost(request).bytes  # of the gradient of q, k and v each kernel writes a part
        seconds = max(seconds, cost.LAUNCH_SECONDS + moved / (cost.REACHED_BANDWIDTH * ARCH.bandwidth))
        found.append(Launch(function.__name__, shape, _first(function), form, flops, moved, seconds))

    def product(x, y, dtype, out=None):
        m, k, n = *x.shape, y.shape[1]
        moved = cost._matrix_bytes(x, y) + m * n * dtype.itemsize
        bare = tiles.SUMS if out is not None else tiles.LINEAR
        request = gemm.Request(
            "gemm", (m, n, k), x.dtype, gemm.Product(*[tiles.MATRIX] * 2, bare, None, *[x.dtype] * 3)
        )
        seconds = cost.request_seconds(request, LibraryConfig(), ARCH)
        found.append(
            Launch("torch.mm", (m, n, k), "The library's product.", "library", 2.0 * m * n * k, moved, seconds)
        )
        return torch.empty(m, n, dtype=dtype, device=x.device) if out is None else out

    going = rehearsal.Rehearsal(torch.device("meta"), lambda *choice: chosen.append(choice), note)
    products = [(module, module.matrix_product) for module in (tiles, twin)]
    try:
        for module, _ in products:
            module.matrix_product = product
        with without_gpu(target_of(ARCH)), use_backend("auto"), torch.no_grad(), rehearsal.rehearsing(going):
            choice.set_table(None, library=True)
            yield found
    finally:
        for module, original in products:
            module.matrix_product = original
        choice.set_table(None)


def _flat(value) -> Iterator:
    for part in value:
        if isinstance(part, tuple):
            yield from _flat(part)
        else:
            yield getattr(part, "base", part)  # of a descriptor


def _first(function) -> str:
    """The first sentence of what a Triton function says of itself."""
    text = " ".join((function.fn.__doc__ or "").split())
    return re.split(r"(?<=[.;])\s", text)[0].rstrip(";.") + "." if text else ""


def of_block(dim: int, training: bool) -> list[Launch]:
    """The launches of a later block of a row, bf16: forward, in training also backward."""
    with noting() as found:
        whole_block(TOKENS, dim, torch.bfloat16, batch=BATCH, backward=training)
    # The first of a row has its statistics made, as a launch of their own; a backward pass needs a second forward.
    first = next(number for number, one in enumerate(found) if one.name == "fold_rows" and number) if training else 0
    return [one for one in found[first:] if one.name != "stream_kernel"]


def milliseconds(launches: list[Launch]) -> float:
    return 1e3 * sum(launch.seconds for launch in launches)


def table(launches: list[Launch], dim: int) -> list[str]:
    lines = ["| | for | function | which does | whose | GFLOP | MB | bound, us | estimate, us |", f"|{'---|' * 9}"]
    for number, one in enumerate(launches, 1):
        figures = f"{one.flops / 1e9:.1f} | {one.bytes / 1e6:.0f} | {1e6 * one.bound:.0f} | {1e6 * one.seconds:.0f}"
        lines.append(
            f"| {number} | {role(one.name, one.shape, dim)} | `{one.name}` | {one.does} | {one.form} | {figures} |"
        )
    total = f"{1e6 * sum(one.bound for one in launches):.0f} | {1e3 * milliseconds(launches):.0f}"
    return [*lines, f"| | all | | | | | | {total} |"]


def models() -> list[str]:
    lines = ["| model, batch 256 | blocks forward, ms | forward and backward, ms |", "|---|---|---|"]
    for name, (dim, depth) in MODELS.items():
        cells = []
        for training in (False, True):
            planned = PLAN.get((name, "training" if training else "inference"))
            ours = depth * milliseconds(of_block(dim, training))
            cells.append(f"{ours:.1f}" + (f" (planned for the whole model: {planned:g})" if planned else ""))
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return lines


def picture(forward: list[Launch], both: list[Launch], path: Path) -> None:
    """Bars of estimate and bound, a launch a row, forward above backward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"ours, by TMA": "#2b6cb0", "ours": "#63b3ed", "library": "#dd6b20", "around the library's": "#f6ad55"}
    launches = [*both]
    figure, axis = plt.subplots(figsize=(11, 0.42 * len(launches) + 1.2), layout="constrained")
    for row, one in enumerate(launches):
        axis.barh(row, 1e6 * one.seconds, color=colours[one.form], height=0.7)
        axis.plot([1e6 * one.bound] * 2, [row - 0.35, row + 0.35], color="black", linewidth=2)
    axis.axhline(len(forward) - 0.5, color="grey", linestyle=":")
    axis.set_yticks(range(len(launches)), [role(one.name, one.shape, MODELS["B"][0]) for one in launches], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlabel("microseconds, estimated (black: the roofline bound); H100, bf16, batch 256, ViT-B; not measured")
    axis.set_title("One block: forward, below the dotted line backward")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    axis.legend(handles, colours, loc="lower right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def filled(page: str) -> str:
    """The page with the tables as the code has them."""
    dim, _ = MODELS["B"]
    parts = {
        "inference": table(of_block(dim, False), dim),
        "training": table(of_block(dim, True), dim),
        "models": models(),
        "tiles": attention_tiles.table(),
        "heads": attention_tiles.head_dims(),
    }
    for name, lines in parts.items():
        page = between(page, f"<!-- {name}:begin -->", f"<!-- {name}:end -->", "\n".join(lines), PAGE.name)
    return page


def main() -> None:
    both = of_block(MODELS["B"][0], True)
    kept = next(i for i, one in enumerate(both) if one.name == "scaled_gradient_kernel")
    picture(both[:kept], both, PAGE.parent / "kernels" / "block.png")
    attention_tiles.picture(PAGE.parent / "kernels" / "attention.png")
    report.write_atomically(PAGE, filled(PAGE.read_text(encoding="utf-8")).encode())
    print(PAGE)


if __name__ == "__main__":
    main()

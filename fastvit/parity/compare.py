"""Two models side by side, layer by layer."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from fastvit.accuracy import relative_rms
from fastvit.report import Table, write_atomically, write_json

from . import trials
from .trace import Trace, layers_of, run

# What a layer may be off in float64 and still be the same: rounding. Some libraries' attention has steps in float32.
ROUNDING = {"norm": 1e-10}
ROUNDING_ELSEWHERE = 2e-7


@dataclass(frozen=True)
class Row:
    """One layer. difference, largest: of what model_b returned there to what model_a did, relative rms and the largest
    of all; error_a, error_b: of each to model_a in float64, relative rms; own: of the layer alone, in float64, on what
    model_a's read: what it departs by itself. departs: whether that is more than rounding."""

    layer: str
    difference: float
    largest: float
    error_a: float
    error_b: float
    own: float
    departs: bool


@dataclass(frozen=True)
class ParityReport:
    """What `parity_report` found: a row for each layer in the order in which they run; the first that departs by more
    than rounding, None if none does; what explains that, if anything that was tried does; and, if none departs, which
    model is nearer to the truth. As text it is a table."""

    model_a: str
    model_b: str
    dtype: str
    rows: tuple[Row, ...]
    first_departure: str | None
    diagnosis: str
    explained: float = 0.0

    @property
    def same(self) -> bool:
        """Whether the two are one model, up to rounding."""
        return self.first_departure is None

    def __str__(self) -> str:
        text = io.StringIO()
        text.write(f"model_a: {self.model_a}\nmodel_b: {self.model_b}, against model_a, in {self.dtype}\n\n")
        widest = max(len(row.layer) for row in self.rows)
        columns = {"layer": -widest, "difference": 10, "largest": 9, "a's error": 9, "b's error": 9, "own": 9, "": -7}
        table = Table(columns, text)
        for row in self.rows:
            numbers = (row.difference, row.largest, row.error_a, row.error_b, row.own)
            table.row(row.layer, *(f"{number:.1e}" for number in numbers), "departs" if row.departs else "")
        text.write(f"\n{self.diagnosis}\n")
        return text.getvalue().rstrip("\n")

    def as_dict(self) -> dict:
        """Everything, as JSON has it: None for a number that is not finite."""
        found = asdict(self) | {"same": self.same}
        # JSON has no NaN.
        found["rows"] = [
            {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
            for row in found["rows"]
        ]
        return found

    def save(self, path: str | Path) -> None:
        """Write the report to a file, by its name: .json; .png, the errors against depth, for which matplotlib is
        needed; else the table as text. Raises OSError, ImportError without matplotlib."""
        path = Path(path)
        if path.suffix == ".json":
            write_json(path, self.as_dict())
        elif path.suffix == ".png":
            from .picture import draw

            write_atomically(path, draw(self.rows, self.diagnosis))
        else:
            write_atomically(path, f"{self}\n".encode())


def parity_report(model_a: nn.Module, model_b: nn.Module, images: torch.Tensor) -> ParityReport:
    """Run two models that should be one on the same images (B, C, H, W), and say, layer by layer, how far they differ.

    The models may be ours, of timm, torchvision, transformers or of code like theirs, each in evaluation mode and with
    weights of its own; images have the dtype and the device of their parameters. Each is also run in float64, as a
    copy: a layer departs where there, on the same input, it returns other numbers than the other model's, which
    rounding cannot make it do. For the first one that does, what could be the cause is tried: eps, activation, the
    order of q, k and v, the heads, layer-scale, the images' normalisation, the position table, other weights.

    Images of noise will do, two at least: one cannot tell a difference in positions from one in anything else. Takes
    some ten runs of a model, and memory for both in float64. Raises TypeError for what is no model, ValueError for
    models without blocks or of other shapes, or in training mode.
    """
    for name, model in (("model_a", model_a), ("model_b", model_b)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} is a {type(model).__name__}, expected a torch.nn.Module")
        if model.training:
            raise ValueError(f"{name} is in training mode, expected one in evaluation mode: call {name}.eval()")
    if not isinstance(images, torch.Tensor) or images.dim() != 4 or not images.is_floating_point():
        raise ValueError("images must be a floating-point tensor of shape (B, C, H, W)")
    given = [(model, layers_of(model)) for model in (model_a, model_b)]
    a, b = (run(model, layers, images) for model, layers in given)
    wide_models = [copy.deepcopy(model).double() for model, _ in given]
    wide_layers = [layers_of(model) for model in wide_models]
    wide_images = images.double()
    truth, wide_b = (run(m, layers, wide_images) for m, layers in zip(wide_models, wide_layers, strict=True))
    _check_shapes(truth, wide_b)

    rows: list[Row] = []

    def add(name: str, kind: str, mine, theirs, precise, own: float) -> None:
        departs = not own <= ROUNDING.get(kind, ROUNDING_ELSEWHERE)  # NaN does
        errors = relative_rms(mine, precise), relative_rms(theirs, precise)
        largest = (theirs.double() - mine.double()).abs().max().item()
        rows.append(Row(name, relative_rms(theirs, mine), largest, *errors, own, departs))

    add("tokens", "tokens", a.tokens, b.tokens, truth.tokens, relative_rms(wide_b.tokens, truth.tokens))
    of_b = {layer.name: layer for layer in wide_layers[1]}
    for layer in wide_layers[0]:
        if layer.name not in of_b or layer.name not in truth.calls or layer.name not in wide_b.calls:
            continue
        name, call = layer.name, truth.calls[layer.name]
        with torch.no_grad():
            again = wide_b.calls[name].again(of_b[name].module, call.read)
        add(name, layer.kind, a.calls[name].out, b.calls[name].out, call.out, relative_rms(again, call.out))
    if a.out.shape == b.out.shape:
        again = run(wide_models[1], wide_layers[1], wide_images, instead=truth.calls[wide_layers[0][-1].name].out).out
        add("output", "output", a.out, b.out, truth.out, relative_rms(again, truth.out))
    first = next((row.layer for row in rows if row.departs), None)
    if first is None:
        diagnosis, explained = _nearer(rows[-1]), 1.0
    else:
        context = trials.Context(truth, wide_b, *wide_layers, wide_images, wide_models[1])
        diagnosis, explained = trials.diagnose(first, context)
    names = [f"{type(m).__module__}.{type(m).__qualname__}" for m in (model_a, model_b)]
    dtype = str(a.tokens.dtype).removeprefix("torch.")
    return ParityReport(*names, dtype, tuple(rows), first, diagnosis, explained)


def _check_shapes(a: Trace, b: Trace) -> None:
    if a.tokens.shape != b.tokens.shape:
        raise ValueError(
            f"model_a's first block reads {tuple(a.tokens.shape)}, but model_b's {tuple(b.tokens.shape)}: they differ "
            "in tokens or width"
        )
    if _depth(a) != _depth(b):
        raise ValueError(f"model_a has {_depth(a)} blocks, but model_b has {_depth(b)}")


def _depth(trace: Trace) -> int:
    return len({name.split()[1] for name in trace.calls})


def _nearer(last: Row) -> str:
    """What to say of two models that are one."""
    same = "No layer departs by more than rounding"
    if last.error_a == last.error_b:
        return f"{same}; both are as near to the truth."
    errors = {"a": last.error_a, "b": last.error_b}
    nearer, other = sorted(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return (
        f"{same}. In the end model_{nearer} is nearer to the truth: its error is {errors[nearer]:.1e}, model_{other}'s "
        f"{errors[other]:.1e}."
    )

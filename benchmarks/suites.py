"""What a run measures: the settings of one run, and the default cases."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastvit.verify import SHORT

from .cases import MODES, OPS, Case, combine
from .peers import PEERS

PHOTOS = Path(__file__).parent / "photos"
SEED = 0
WHOLE = "model"  # beside the names of ops: the whole model

_TINY, _SMALL, _BASE, _LARGE = (f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large"))
_HUGE, _GIANT = "vit_huge_patch14_224", "vit_giant_patch14_dinov2"
_FP32, _BF16, _FP16 = torch.float32, torch.bfloat16, torch.float16
# Default values of the axes that were not given, where another axis was: {device: {axis: values}}. OP_BATCHES: the
# default batches of single ops.
AXES = {
    "cuda": {"models": (_BASE, _SMALL, _LARGE, _TINY), "dtypes": (_BF16, _FP16, _FP32), "batches": (256, 1, 32)},
    "cpu": {"models": (_TINY, _BASE), "dtypes": (_FP32, _BF16), "batches": (1, 8)},
}
QUICK_AXES = {"models": (_TINY,), "dtypes": (_FP32, _BF16), "batches": (1,)}
OP_BATCHES = {"cuda": (256,), "cpu": (8,)}
# The peers of a quick run: those that need no compilation.
QUICK_PEERS = ("torch", "reference", "timm", "torchvision", "sdpa math")


@dataclass(frozen=True)
class Settings:
    """The settings of one run. seconds: spent on timing each row. time_limit: after this many seconds in all, no row
    and no peer is started; on a CPU, rows that would not fit are left out from the start. interpreted: the model that
    classifies the photographs by the kernels in the interpreter. command: the command line that was typed.
    """

    device: str
    cases: tuple[Case, ...]
    peers: tuple[str, ...]
    photos: Path = PHOTOS
    pretrained: bool = False
    interpreted: str | None = None
    seconds: float = 5.0
    time_limit: float | None = None
    command: str = field(default="fastvit bench", compare=False)

    @property
    def weights(self) -> str:
        return "pretrained" if self.pretrained else f"random, seed {SEED}"

    @property
    def images(self) -> str:
        if importlib.util.find_spec("PIL") is None:
            return f"random pixels, seed {SEED}, because Pillow is not installed"
        return "the shipped photographs" if self.photos == PHOTOS else f"photographs in {self.photos}"

    def as_dict(self) -> dict:
        """The settings for JSON, with weights and images described."""
        return {
            "command": self.command,
            "device": self.device,
            "cases": [case.id for case in self.cases],
            "peers": list(self.peers),
            "weights": self.weights,
            "images": self.images,
            "interpreted": self.interpreted,
            "seconds": self.seconds,
            "time_limit": self.time_limit,
        }


def settings(
    device: str,
    quick: bool = False,
    models: Iterable[str] = (),
    img_sizes: Iterable[int] = (),
    ops: Iterable[str] = (),
    modes: Iterable[str] = (),
    batches: Iterable[int] = (),
    dtypes: Iterable[torch.dtype] = (),
    peers: Iterable[str] = (),
    **others,
) -> Settings:
    """The settings of a run: every combination of the axes that are given, with the defaults of AXES for the rest; the
    device's default suite if no axis is given. ops: of `cases.OPS`, or "model". others: fields of Settings.

    Raises ValueError for an unknown model, op, mode, size or peer, naming the valid ones.
    """
    kind = "cuda" if device.startswith("cuda") else "cpu"
    for op in ops:
        if op not in (*OPS, WHOLE):
            raise ValueError(f"unknown op {op!r}, expected some of {', '.join((*OPS, WHOLE))}")
    for peer in peers:
        if peer not in PEERS:
            raise ValueError(f"unknown peer {peer!r}, expected some of {', '.join(PEERS)}")
    if any((models, img_sizes, ops, modes, batches, dtypes)):
        axes = QUICK_AXES if quick else AXES[kind]
        axes = axes | {"models": models or axes["models"], "dtypes": dtypes or axes["dtypes"]}
        axes |= {"modes": modes or ("inference",), "img_sizes": img_sizes or (None,)}
        cases = []
        for op in ops or (WHOLE,):
            usual = axes["batches"] if op == WHOLE else OP_BATCHES[kind]
            cases += combine(**axes | {"ops": ("" if op == WHOLE else op,), "batches": batches or usual})
    else:
        cases = quick_suite(kind) if quick else default_suite(kind)
        if kind == "cpu" and not quick and importlib.util.find_spec("triton"):
            others = {"interpreted": _TINY} | others
    if quick:
        others = {"seconds": 2.0} | others
    return Settings(device, tuple(dict.fromkeys(cases)), tuple(peers or default_peers(kind, quick)), **others)


def default_peers(kind: str, quick: bool = False) -> tuple[str, ...]:
    """The peers that run on this kind of device, installed or not."""
    return tuple(name for name, peer in PEERS.items() if kind in peer.devices and (not quick or name in QUICK_PEERS))


def quick_suite(kind: str) -> list[Case]:
    """A few cases of each kind: two minutes on two cores."""
    return [
        *combine(**QUICK_AXES),
        Case(_TINY, _FP32, 1, "training"),
        Case(_TINY, _FP32, OP_BATCHES[kind][0], op="attention"),
    ]


def default_suite(kind: str) -> list[Case]:
    """The most important cases come first: a time limit cuts off the last."""
    axes = AXES[kind]
    models, dtypes, batches = axes["models"], axes["dtypes"], axes["batches"]
    if kind == "cpu":
        # On two cores a row of ViT-B at batch 8 takes as long as all of these together.
        return [*combine([_TINY], dtypes, batches), *combine([_BASE], dtypes, [1])]
    (dtype, *other_dtypes), (large, *smaller), (op_batch,) = dtypes, batches, OP_BATCHES[kind]
    return [
        *combine(models[:3], [dtype], [large], MODES),
        *combine([_BASE], [dtype], [op_batch], MODES, OPS),
        *combine(models, [dtype], smaller),
        *combine(models[3:], [dtype], [large]),
        *combine(models[1:3], [dtype], [op_batch], MODES, OPS),
        # Other numbers of tokens: 577, 257 and 1370, then 1025.
        *combine(["vit_base_patch16_384", _HUGE, "vit_base_patch14_dinov2"], [dtype], [32]),
        *combine([_BASE], [dtype], [32], img_sizes=[512]),
        *combine([_GIANT], [dtype], [8]),
        *combine(models, other_dtypes, batches),
        *combine(models[:3], other_dtypes, [large], ["training"]),
    ]


def describe(settings: Settings) -> str:
    """The settings in a sentence, for the terminal."""
    backend = (
        "Triton kernels" if settings.device.startswith("cuda") else "PyTorch back end; the Triton kernels need a GPU"
    )
    dtypes = ", ".join(dict.fromkeys(SHORT[case.dtype] for case in settings.cases))
    return (
        f"{len(settings.cases)} cases ({dtypes}; ours: {backend}); weights: {settings.weights}; "
        f"images: {settings.images}."
    )

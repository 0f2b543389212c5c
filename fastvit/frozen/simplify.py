"""All rewrites on a plan, one after the other, with what each saved and how far it moved the outputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from fastvit import accuracy

from .plan import Plan
from .rewrites import REWRITES

_SAMPLE = 16  # patches of the images on which each rewrite is checked


@dataclass(frozen=True)
class Change:
    """What a rewrite did: launches, FLOPs and bytes of one image before less those after, and how far the outputs in
    float32 moved (relative rms error); None for a rewrite that was left out or found nothing to do."""

    name: str
    steps: int
    flops: int
    bytes: int
    error: float | None


def noise(plan: Plan, batch: int, patches: int | None = None) -> torch.Tensor:
    """Normalised images of noise, the same every time; of the plan's size, or one row of so many patches."""
    config = plan.config
    ph, pw = config.patch_size
    size = config.img_size if patches is None else (ph, min(patches, config.grid_size[1]) * pw)
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(batch, config.in_chans, *size, generator=generator, device="cpu").to(plan.device)


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Images as uint8, from their darkest to their brightest."""
    low, high = images.amin(), images.amax()
    return ((images - low) / (high - low) * 255).to(torch.uint8)


def simplify(plan: Plan, without: Iterable[str]) -> tuple[Plan, tuple[Change, ...]]:
    """The plan after all rewrites but some, and what each did."""
    images = noise(plan, 1, _SAMPLE)
    samples = {"float": images, "uint8": pixels(images)}
    rounded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # constants, and what they are in float32

    def outputs(plan: Plan, kinds: Iterable[str]) -> dict[str, list[torch.Tensor]]:
        for name, tensor in plan.constants.items():
            if name not in rounded or rounded[name][0] is not tensor:
                rounded[name] = tensor, tensor.float()
        narrow = replace(plan, constants={name: rounded[name][1] for name in plan.constants})
        return {kind: list(narrow.run(samples[kind], torch.float32).values()) for kind in kinds}

    changes, before, values = [], plan.totals(), outputs(plan, {"float"})
    for name, rewrite in REWRITES.items():
        new = plan if name in without else rewrite.apply(plan)
        if new.steps == plan.steps and all(new.constants[n] is t for n, t in plan.constants.items()):
            changes.append(Change(name, 0, 0, 0, None))
            continue
        # What pixels go through is checked with them where it changed; all else does not depend on the kind of image.
        kinds = {"float", "uint8"} if _entry(new) != _entry(plan) else {"float"}
        values |= outputs(plan, kinds - values.keys())
        after, found = new.totals(), outputs(new, kinds)
        pairs = [pair for kind in kinds for pair in zip(found[kind], values[kind], strict=True)]
        error = max(accuracy.relative_rms(got, want) for got, want in pairs)
        changes.append(Change(name, *(was - now for was, now in zip(before, after, strict=True)), error))
        plan, before, values = new, after, found
    return plan, tuple(changes)


def _entry(plan: Plan) -> list:
    """The steps from images to tokens, with the identity of their constants."""
    steps = [step for step in plan.steps if step.op in ("normalise", "patch_embed", "assemble")]
    return [(step, [id(plan.constants[name]) for name in step.constants.values()]) for step in steps]

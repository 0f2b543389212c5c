"""A case made ready: who can run it, what the right answer is, and the call that is timed.

What is right is `fastvit.accuracy`'s to say: the truth is `fastvit.reference` in float64. Of a training step the
gradients count too.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import itertools
import math
import sys
from collections.abc import Callable

import torch

import fastvit
from fastvit import accuracy, dispatch
from fastvit.verify import randomise, reference_options

from . import ops, timing
from .cases import Case
from .peers import PEERS, Built, build
from .suites import SEED, Settings

TOP = 5
OUT = "out"  # beside "d <name>" of gradients


class _Work:
    """What a case needs whatever it is of. `truth` and `limits` are by tensor: OUT, and "d <name>" in training."""

    case: Case
    ours: Callable[..., torch.Tensor]
    items: int  # images a call
    turns = 1  # calls of a step until it comes back to its first input
    truth: dict[str, torch.Tensor]
    limits: dict[str, float]

    @property
    def training(self) -> bool:
        return self.case.mode == "training"

    def gradients(self) -> contextlib.AbstractContextManager:
        """In which every call of the case runs."""
        return torch.enable_grad() if self.training else torch.inference_mode()

    def judge(self, call: Callable[..., torch.Tensor], ours: bool = False) -> tuple[float | None, str]:
        """Run it: the error of its output, None where that is not finite, and what is wrong with it or "".

        Gradients of a peer's own parameters are told by their shapes, where only one has it: the patch embedding's
        and the classifier's weights and the position table, in a whole model. Of ours, all are held to their limits.
        """
        found = self.evaluate(call)
        missing = [name for name in self.truth if ours and name not in found]
        if missing:
            return None, f"has no {', '.join(missing)}"
        errors = {}
        for name, tensor in found.items():
            if tensor.shape != self.truth[name].shape:
                return None, f"{name} is {tuple(tensor.shape)}, expected {tuple(self.truth[name].shape)}"
            errors[name] = accuracy.relative_rms(tensor, self.truth[name])
        error = errors[OUT] if math.isfinite(errors[OUT]) else None
        wrong = [name for name in errors if not errors[name] <= self.limits[name]]
        if not wrong:
            return error, ""
        worst = max(wrong, key=lambda name: accuracy.excess(errors[name], self.limits[name]))
        what = "error" if worst == OUT else f"error of {worst}"
        return error, f"{what} {errors[worst]:.2e} is more than the limit {self.limits[worst]:.2e}"

    def build(self, peer: str) -> Built:
        raise NotImplementedError

    def evaluate(self, call: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of `truth`, as far as they can be told, as `call` gives them."""
        raise NotImplementedError

    def step(self, call: Callable[..., torch.Tensor]) -> timing.Call:
        """What is timed: the forward pass, in training with the backward pass."""
        raise NotImplementedError


class ModelWork(_Work):
    """A whole model on photographs, repeated to the batch."""

    def __init__(self, case: Case, subject: Subject):
        self.case, self.subject, self.items = case, subject, case.batch
        self.ours = copy.deepcopy(subject.model).to(case.dtype).train(self.training)
        self._images = subject.photos.to(case.dtype)
        self._names = {id(parameter): name for name, parameter in self.ours.named_parameters()}
        # As many whole batches as it takes to see every photograph.
        count = len(self._images)
        rows = torch.arange(case.batch * -(-count // case.batch), device=self._images.device) % count
        self._chunks = rows.split(case.batch)
        truth, self.limits = subject.truth(case.dtype, case.mode)
        self.truth = truth | {OUT: truth[OUT][rows]}

    def top5(self) -> dict:
        """What ours takes the photographs for."""
        return self.subject.top5(self.evaluate(self.ours)[OUT][: len(self._images)], self.case.dtype)

    def build(self, peer):
        return build(PEERS[peer], self.case, self.ours, None)

    def evaluate(self, call):
        upstream = self.subject.upstream if self.training else None
        shapes = _unique_shapes({name: tensor.shape for name, tensor in self.truth.items() if name != OUT})
        with self.gradients():
            return _evaluate(call, self._images, self._chunks, upstream, self._names, shapes)

    def step(self, call):
        with self.gradients():  # as in `evaluate`: a compiler would compile anew for a tensor made outside
            images = self._images[self._chunks[0]]
        return timed_step([lambda: call(images)], self.training)


class Subject:
    """One model in float32 with its weights, the photographs as it takes them, and the truth about both."""

    def __init__(self, name: str, img_size: int | None, settings: Settings):
        self.name, self.img_size = name, img_size
        self.model = fastvit.create_model(
            name, pretrained=settings.pretrained, **({} if img_size is None else {"img_size": img_size})
        ).eval()
        if not settings.pretrained:
            randomise(self.model, SEED)
        self.config = self.model.config
        self.names, pixels = read_pixels(self.config, settings)
        self.model.to(settings.device)
        self.photos = normalise(pixels.to(settings.device), self.config.mean, self.config.std)
        width = self.config.num_classes or self.config.embed_dim
        generator = torch.Generator().manual_seed(SEED)
        self.upstream = torch.randn(len(self.photos), width, generator=generator).to(settings.device)
        self._known: dict[tuple, tuple[dict, dict]] = {}

    def truth(self, dtype: torch.dtype, mode: str) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """In float64, of weights and photographs as `dtype` holds them: each tensor, and the most that its error may
        be in `dtype`."""
        if (dtype, mode) not in self._known:
            truth, plain = (
                self._by_the_reference(dtype, torch.float64, mode),
                self._by_the_reference(dtype, dtype, mode),
            )
            self._known[dtype, mode] = truth, limits(dtype, plain, truth)
        return self._known[dtype, mode]

    def _by_the_reference(self, given: torch.dtype, computed: torch.dtype, mode: str) -> dict[str, torch.Tensor]:
        training = mode == "training"
        state = {
            name: tensor.detach().to(given).to(computed, copy=True).requires_grad_(training)
            for name, tensor in self.model.state_dict().items()
        }
        names = {id(tensor): name for name, tensor in state.items()}
        images, options = self.photos.to(given).to(computed), reference_options(self.config)
        chunks = (torch.arange(len(images), device=images.device),)
        with torch.enable_grad() if training else torch.inference_mode():
            return _evaluate(
                lambda images: fastvit.reference.vision_transformer(images, state, **options),
                *(images, chunks, self.upstream if training else None, names, {}),
            )

    def top5(self, logits: torch.Tensor, dtype: torch.dtype) -> dict:
        """The five likeliest classes of every photograph by `logits` of a model in `dtype` and by the reference, and
        how far they agree."""
        true = self.truth(dtype, "inference")[0][OUT]
        ours, truth = (scores.float().topk(TOP).indices.tolist() for scores in (logits, true))
        return {
            "photos": self.names,
            "ours": ours,
            "reference": truth,
            "same_first": sum(a[0] == b[0] for a, b in zip(ours, truth, strict=True)),
            "same_in_top5": sum(len({*a} & {*b}) for a, b in zip(ours, truth, strict=True)),
        }


class OpWork(_Work):
    """One op at a model's shape, on random data, each call on inputs that are in no cache."""

    items = 1

    def __init__(self, case: Case, settings: Settings):
        self.case, self.ours = case, getattr(fastvit.ops, case.op)
        self._inputs = ops.inputs(case, settings.device)
        self._copies = ops.cold(self._inputs, settings.device)
        self.turns = len(self._copies)
        generator = torch.Generator().manual_seed(SEED)
        self._upstream = functools.cache(
            lambda shape: torch.randn(shape, generator=generator).to(settings.device, case.dtype)
        )
        with self.gradients():
            inputs = accuracy.precise(self._inputs)
            out = getattr(fastvit.reference, case.op)(**inputs)
            self.truth = accuracy.results(out, inputs, self._upstream)
            with fastvit.use_backend("torch"):
                plain = self.evaluate(self.ours)
        self.limits = limits(case.dtype, plain, self.truth)

    def build(self, peer):
        return build(PEERS[peer], self.case, None, self._inputs)

    def evaluate(self, call):
        with self.gradients():
            return accuracy.results(call(**self._inputs), self._inputs, self._upstream)

    def step(self, call):
        return timed_step([lambda inputs=inputs: call(**inputs) for inputs in self._copies], self.training)


def run_watched(step: timing.Call) -> str:
    """Run a step of ours once, and say which candidates its ops ran on: the kernels, PyTorch, or one of its ways that a
    tuned table prefers."""
    found: dict[str, None] = {}
    with dispatch.watching(lambda op, args: found.setdefault(op.explain(*args).candidate)):
        step()
    return f"ran on: {', '.join(found)}" if found else ""


def limits(dtype: torch.dtype, plain: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, float]:
    """The most that the error of each tensor may be, from plain PyTorch's in the same dtype."""
    return {name: accuracy.limit(dtype, accuracy.relative_rms(plain[name], truth[name])) for name in truth}


def _evaluate(call, images, chunks, upstream, names, shapes) -> dict[str, torch.Tensor]:
    """The output for all chunks (rows of `images`) and, with upstream gradients, "d <name>" of every leaf that can be
    named, summed over them in float64: by identity in `names`, else by its shape in `shapes`.

    A photograph that comes several times has its share of its upstream gradient each time: the sums are those of every
    photograph once.
    """
    outs, sums = [], {}
    times = torch.bincount(torch.cat(chunks))
    for chunk in chunks:
        out = call(images[chunk])
        outs.append(out.detach().clone())  # the next call may overwrite it
        if upstream is None:
            continue
        leaves = _leaves(out)
        alone = _unique_shapes({id(leaf): leaf.shape for leaf in leaves})
        gradient = (upstream[chunk] / times[chunk, None]).to(out.dtype)
        for leaf, found in zip(leaves, torch.autograd.grad(out, leaves, gradient), strict=True):
            name = (
                f"d {names[id(leaf)]}" if id(leaf) in names else shapes.get(leaf.shape) if leaf.shape in alone else None
            )
            if name:
                sums[name] = sums.get(name, 0) + found.double()
    return {OUT: torch.cat(outs)} | sums


def _unique_shapes(shapes: dict) -> dict:
    """{shape: key} of the shapes that only one has."""
    counts = collections.Counter(shapes.values())
    return {shape: key for key, shape in shapes.items() if counts[shape] == 1}


def _leaves(out: torch.Tensor) -> list[torch.Tensor]:
    """Every tensor that `out` has a gradient for, whoever's parameter it is: the ends of its autograd graph."""
    found, seen, waiting = [], set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            found.append(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return found


def timed_step(forwards: list[Callable[[], torch.Tensor]], training: bool) -> timing.Call:
    """One of `forwards` a call, in turn; in training with the gradients of all that it depends on."""
    if not training:
        turns = itertools.cycle(forwards)
        return lambda: next(turns)()
    turns, known = itertools.cycle(enumerate(forwards)), {}

    def run():
        turn, forward = next(turns)
        out = forward()
        if turn not in known:  # walking the graph takes time that is not the entry's
            # Not drawn on the GPU: a CUDA graph that failed to be captured leaves its generator unusable.
            known[turn] = _leaves(out), torch.randn(out.shape).to(out)
        return torch.autograd.grad(out, *known[turn])

    return run


# --------------------------------------------------------------------------------------------------------------------
# Photographs


def read_pixels(config, settings: Settings) -> tuple[list[str], torch.Tensor]:
    """Names and uint8 images (B, 3, H, W) of the photographs, prepared as a model of `config` takes them."""
    if settings.images.startswith("random"):  # Pillow is not installed
        generator = torch.Generator().manual_seed(SEED)
        shape = (6, config.in_chans, *config.img_size)
        return [f"random {i}" for i in range(6)], torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    from fastvit import images

    paths = images.find_images(settings.photos)
    if not paths:
        raise ValueError(f"no images in {settings.photos}")
    readable = {}
    for path in paths:
        try:
            readable[path.name] = images.read(path, config)
        except images.ImageError as error:
            print(f"skipped {error}", file=sys.stderr)
    if not readable:
        raise ValueError(f"no readable images in {settings.photos}")
    return list(readable), torch.stack(list(readable.values()))


def normalise(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 images (..., C, H, W) as the floats that every peer takes: (image / 255 - mean) / std."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std))
    return (images.float() / 255 - mean) / std

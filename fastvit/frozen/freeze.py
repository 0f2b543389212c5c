"""`freeze`: a trained model as a plan that was simplified exactly, and what runs it."""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from fastvit.nn.layers import check_positive

from . import choice, files
from .describe import describe
from .export import export
from .plan import OPERATIONS, Plan
from .recognise import OUTPUTS, our_model, plan_of
from .rewrites import REWRITES
from .runtimes import RUNTIMES, Run
from .runtimes.torch_runtime import packed
from .serving import undisturbed
from .simplify import Change, noise, pixels, simplify

_PREPARED = 8  # how many plans are kept ready to run, one a runtime, batch, size and kind of image
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def freeze(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    output: str | Sequence[str] = "logits",
    runtime: str = "auto",
    batch_sizes: Sequence[int] | None = None,
    without: Sequence[str] = (),
) -> Frozen:
    """A model that only serves: everything simplified that can be exactly, on the runtime that is the fastest here.

    model: a `fastvit.VisionTransformer`, or another library's that it can be, with its output (of transformers, logits,
    image_embeds or last_hidden_state) held to ours: docs/frozen.md has which; in evaluation; it is left as it is, and
    what happens to it later does not matter. dtype, device: to compute in and on, the model's if not given. output:
    "logits" (what `model(images)` gives), "features" (pooled, before the classifier), "tokens" (`forward_features`),
    or a list of these, for a dict. runtime: "torch", "openvino", "onnxruntime", "triton", or "auto": the fastest of
    those installed, which is measured once for each of batch_sizes (1 if not given) and remembered on disk; other
    batches take the answer of the nearest. without: rewrites to leave out, names of `fastvit.frozen.REWRITES`.

    Raises TypeError for another model or dtype; ValueError for a model in training mode, with hooks, active dropout,
    modules that it has no step for or weights that are not finite, for unknown names and wrong sizes; ImportError, with
    what to install, for a runtime that is not there; RuntimeError where the result is further from the model's than
    allowed.
    """
    if isinstance(without, str):
        raise ValueError(f"without is {without!r}, expected a list of names")
    outputs = (output,) if isinstance(output, str) else tuple(output)
    if not outputs or not set(outputs) <= set(OUTPUTS):
        raise ValueError(f"output is {output!r}, expected one of {', '.join(OUTPUTS)}, or a list of them")
    if unknown := set(without) - REWRITES.keys():
        raise ValueError(f"without names {', '.join(sorted(unknown))}, expected some of {', '.join(REWRITES)}")
    if dtype is not None and dtype not in _DTYPES:
        raise TypeError(f"dtype is {dtype}, expected one of {', '.join(map(str, _DTYPES))}")
    _check_runtime(runtime)
    batch_sizes = _checked_batches(batch_sizes)
    for name, tensor in model.state_dict().items() if isinstance(model, nn.Module) else ():
        if tensor.is_meta:
            raise ValueError("model has no weights: its parameters are on the meta device")
        if not tensor.isfinite().all():
            raise ValueError(f"model.{name} is not finite, expected weights without NaN and infinity")
    ours = our_model(model)
    first = next(ours.parameters())
    dtype, device = dtype or first.dtype, torch.device(first.device if device is None else device)
    with undisturbed(device), torch.device("cpu"):
        start = plan_of(ours, outputs)
        frozen = Frozen(*_simplified(start, without, dtype, device), runtime, isinstance(output, str))
        # What has not our methods was held to ours already.
        peer = model if hasattr(model, "forward_head") else ours
        frozen._settle(batch_sizes, _truth(peer, start, dtype, device))
    return frozen


def load_frozen(
    path: str | os.PathLike,
    *,
    device: torch.device | str | None = None,
    runtime: str = "auto",
    batch_sizes: Sequence[int] | None = None,
) -> Frozen:
    """What `Frozen.save` wrote, on a device (the CPU if not given) and a runtime as `freeze` has it.

    Raises FileNotFoundError, and ValueError for a file that is none, of another version, cut off or damaged.
    """
    _check_runtime(runtime)
    plan, facts = files.load(path)
    changes = tuple(Change(**change) for change in facts["changes"])
    device = torch.device(device or "cpu")
    with undisturbed(device), torch.device("cpu"):
        frozen = Frozen(plan.on(device), changes, runtime, facts["single"])
        frozen._settle(_checked_batches(batch_sizes), frozen._right(frozen.plan, uint8=False))
    return frozen


class Frozen:
    """A frozen model; `freeze` and `load_frozen` make it. Any number of threads may call it, one at a time runs."""

    def __init__(self, plan: Plan, changes: tuple[Change, ...], runtime: str, single: bool):
        self.plan, self.changes, self.device = packed(plan), changes, plan.device
        self._asked, self._single = runtime, single
        self._answers: dict[int, choice.Answer] = {}
        self._prepared: OrderedDict[tuple, Run] = OrderedDict()
        self._resized: dict[tuple[int, int], Plan] = {plan.config.img_size: self.plan}
        self._lock = threading.RLock()

    def __getstate__(self) -> dict:
        """For copies and pickles: all but what is prepared, which is prepared anew, and the lock."""
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_prepared", "_resized")}
        return kept | {"plan": self.plan.dense()}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["plan"], state["changes"], state["_asked"], state["_single"])
        self._answers = state["_answers"]

    @property
    def config(self):
        """The model's config."""
        return self.plan.config

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.plan.dtype

    @property
    def runtime(self) -> str:
        """What runs the smallest of the batch sizes that were asked for."""
        return self._answer(min(self._answers, default=1)).name

    def __call__(self, images: torch.Tensor):
        """Images (B, C, H, W) -> the output, or a dict of the outputs by name.

        uint8 images are normalised with the config's mean and std, floating-point ones are taken as normalised; a
        batch of none gives outputs of none; NaN in an image gives NaN for that image. Of another size than the model's
        own only with `dynamic_img_size`. Raises TypeError and ValueError for images of another kind, shape or device.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "a frozen model is not for torch.compile or torch.export, but has an export() of its own"
            )
        self._check_images(images)
        with self._lock, undisturbed(self.device):
            images = self._filled_up(images)
            batch, size = len(images), tuple(images.shape[2:])
            plan = self._for_size(size)
            if batch == 0:
                shapes = plan.shapes(1)
                sizes = [(0, *shapes[value][1:]) for value in plan.outputs.values()]
                found = [images.new_empty(size, dtype=self.dtype) for size in sizes]
            else:
                name = self._answer(batch).name
                whole = self._padded(name, batch)
                if whole > batch:
                    images = torch.cat([images, images.new_zeros(whole - batch, *images.shape[1:])])
                found = self._run(name, whole, size, images.dtype == torch.uint8)(images)
        found = tuple(value[:batch].clone() for value in found)
        return found[0] if self._single else dict(zip(plan.outputs, found, strict=True))

    def describe(self) -> str:
        """What was rewritten, with what it saved and how far it moved the outputs; the plan; which runtime, and why."""
        return describe(self.plan, self.changes, self._answers)

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a .safetensors file that `load_frozen` reads; the runtime is chosen anew there."""
        files.save(
            path, self.plan.dense(), {"changes": [asdict(change) for change in self.changes], "single": self._single}
        )

    def export(self, path: str | os.PathLike, *, batch_size: int | None = None, uint8: bool = False) -> None:
        """Write the plan, in plain operators, to a file for another runtime: .onnx, .xml (OpenVINO's, with .bin beside
        it) or .pt2 (torch.export).

        batch_size: the only one that the file takes, None for any. uint8: it takes pixels, not normalised images. The
        input is called "images", outputs as here. Raises ValueError for another suffix, ImportError with what to
        install.
        """
        if batch_size is not None:
            check_positive("batch_size", batch_size)
        with undisturbed(torch.device("cpu")), torch.device("cpu"):
            export(self.plan.dense().on(torch.device("cpu")), path, batch_size, uint8)

    def _check_images(self, images) -> None:
        config = self.plan.config
        if not isinstance(images, torch.Tensor):
            raise TypeError(f"images is a {type(images).__name__}, expected a torch.Tensor (batch, channels, H, W)")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"images has dtype {images.dtype}, expected floating point or uint8")
        if images.dim() != 4 or images.shape[1] != config.in_chans:
            raise ValueError(f"images has shape {tuple(images.shape)}, expected (batch, {config.in_chans}, H, W)")
        if images.device != self.device:
            raise ValueError(f"images is on {images.device}, expected {self.device}")

    def _settle(self, batch_sizes: tuple[int, ...], truth: tuple) -> None:
        """Find the runtime for each of the batch sizes. truth: images, what is right for them, and what gives what the
        unfrozen model in this dtype makes of them. Raises RuntimeError where none gives that."""
        size = self.plan.config.img_size

        def judge(run: Run, batch: int) -> str:
            return _wrong(run, batch, self.plan, *truth)

        def prepare(name: str, batch: int) -> Run:
            key = name, batch, size, False
            if key not in self._prepared:
                self._prepared[key] = RUNTIMES[name].prepare(self.plan, batch, False)
            return self._prepared[key]

        for batch in batch_sizes:
            if self._asked == "auto":
                self._answers[batch] = choice.choose(self.plan, batch, self.device, prepare, judge)
                continue
            runtime = RUNTIMES[self._asked]
            if reason := runtime.why_not(self.plan, self.device):
                raise (ImportError if reason.startswith("not installed") else ValueError)(f"{self._asked}: {reason}")
            if reason := judge(prepare(self._asked, batch), batch):
                raise RuntimeError(f"{self._asked}: {reason}")
            self._answers[batch] = choice.Answer(self._asked, (f"{self._asked}: asked for",))
        chosen = {answer.name for answer in self._answers.values()}
        for key in [key for key in self._prepared if key[0] not in chosen]:
            del self._prepared[key]  # each holds the weights once more

    def _filled_up(self, images: torch.Tensor) -> torch.Tensor:
        """Images with zeros at the right and the bottom, up to whole patches, where the config says so; pixels are
        normalised before that."""
        config = self.plan.config
        below, right = (-side % patch for side, patch in zip(images.shape[2:], config.patch_size, strict=True))
        if not config.dynamic_img_pad or not (below or right):
            return images
        return F.pad(OPERATIONS["normalise"](images, config.mean, config.std), (0, right, 0, below))

    def _right(self, plan: Plan, uint8: bool) -> tuple:
        """An image of noise, what the plan makes of it in float64, and what gives what it does in its own dtype, in
        plain PyTorch."""
        images = noise(plan, 1)
        images = pixels(images) if uint8 else images
        return images, plan.run(images, torch.float64), functools.cache(lambda: plan.run(images))

    def _for_size(self, size: tuple[int, int]) -> Plan:
        if size not in self._resized:
            resized = self.plan.resized(*size)
            if len(self._resized) >= _PREPARED:
                self._resized = {self.plan.config.img_size: self.plan}
            self._resized[size] = resized
        return self._resized[size]

    def _run(self, name: str, batch: int, size: tuple[int, int], uint8: bool) -> Run:
        """The plan ready to run, the last ones kept. What another library compiles is checked, and PyTorch takes its
        place, with a warning, where its outputs are wrong."""
        key = name, batch, size, uint8
        if key not in self._prepared:
            plan = self._for_size(size)
            run = RUNTIMES[name].prepare(plan, batch, uint8)
            if name != "torch" and (reason := _wrong(run, batch, plan, *self._right(plan, uint8))):
                warnings.warn(
                    f"{name} is not used for batches of {batch}, {size[0]} x {size[1]}: {reason}", stacklevel=4
                )
                run = RUNTIMES["torch"].prepare(plan, batch, uint8)
            self._prepared[key] = run
            if len(self._prepared) > _PREPARED:
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(key)
        return self._prepared[key]

    def _padded(self, name: str, batch: int) -> int:
        """The batch that runs for one of `batch`: of a runtime that compiles for each, the next larger one that was
        asked for, if it is not twice as large; on CUDA graphs else the next power of two."""
        if name == "torch":
            return batch
        fitting = [size for size in self._answers if batch <= size < 2 * batch]
        if fitting:
            return min(fitting)
        return 1 << (batch - 1).bit_length() if name == "triton" else batch

    def _answer(self, batch: int) -> choice.Answer:
        """The runtime for a batch: that of the nearest that was asked for."""
        return self._answers[min(self._answers, key=lambda known: abs(known - batch))]


# --------------------------------------------------------------------------------------------------------------------
# Simplifying, and what is right


def _check_runtime(runtime: str) -> None:
    if runtime not in ("auto", *RUNTIMES):
        raise ValueError(f"runtime is {runtime!r}, expected 'auto' or one of {', '.join(RUNTIMES)}")


def _checked_batches(batch_sizes: Sequence[int] | None) -> tuple[int, ...]:
    if isinstance(batch_sizes, int):
        raise ValueError(f"batch_sizes is {batch_sizes}, expected a list of positive integers")
    sizes = (1,) if batch_sizes is None else tuple(batch_sizes)
    if not sizes:
        raise ValueError("batch_sizes is empty, expected at least one")
    for size in sizes:
        check_positive("batch_sizes", size)
    return sizes


def _simplified(start: Plan, without: Iterable[str], dtype: torch.dtype, device: torch.device) -> tuple:
    """The plan after all rewrites but some, rounded, and what each did. Its float64 constants are gone on return: they
    are twice a float32 model."""
    plan, changes = simplify(start, without)
    return plan.rounded(dtype, copy=True).on(device), changes


def _truth(model: nn.Module, start: Plan, dtype: torch.dtype, device: torch.device) -> tuple:
    """An image of noise, what the model makes of it in float64, and what gives what it does in `dtype`. Raises
    RuntimeError where the plan from before any rewrite is not what the model itself computes."""
    images = noise(start, 1)
    truth = start.run(images, torch.float64)

    @functools.cache
    def plain(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return start.rounded(dtype).run(images)

    theirs = _outputs(model, images.to(start.dtype), start.outputs)
    if reason := choice.wrong(theirs.values(), truth, partial(plain, start.dtype), start.dtype):
        raise RuntimeError(f"the model does something that a frozen model would not: {reason}")
    return images.to(device), {name: value.to(device) for name, value in truth.items()}, partial(plain, dtype)


def _wrong(run: Run, batch: int, plan: Plan, images, truth, plain) -> str:
    """Why what runs such batches of the plan is not right for an image so many times; empty if it is."""
    return choice.wrong(run(images.expand(batch, -1, -1, -1).contiguous()), truth, plain, plan.dtype)


def _outputs(model: nn.Module, images: torch.Tensor, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The unfrozen model's outputs by name."""
    found = {}
    if "tokens" in names or "features" in names:
        tokens = model.forward_features(images)
        found = {"tokens": tokens, "features": model.forward_head(tokens, pre_logits=True)}
    if "logits" in names:
        found["logits"] = model(images)
    return {name: found[name] for name in names}

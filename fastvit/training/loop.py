"""The training loop: steps over one process or many, validation, checkpoints, and going on after an end of any kind.

Nothing random is kept from one step to the next: a step's batch, its mixing and its dropout follow from the seed and
the step's number. So weights, the optimizer's state and the step are all that a run needs to go on as if it had never
been stopped.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ..dispatch import use_backend
from ..models.loading import to_safetensors
from ..models.vision_transformer import VisionTransformer
from ..report import lines_of, note, write_atomically, write_json
from . import checkpoints, log
from .checkpoints import is_first
from .data import Batch, Batches, Source, augmentation, evaluation_loader, mixed, training_loader
from .evaluate import accuracy
from .losses import label_loss, total_loss
from .recipes import Recipe

_AUTOCAST = {"amp-bfloat16": torch.bfloat16, "amp-float16": torch.float16}
# Steps of --profile: what comes before has to settle.
_PROFILED = {"wait": 3, "warmup": 2, "active": 3}
_AT_ONCE = 2.0  # seconds within which a second signal is the same one, which came by two ways
_LEFT = ("model.safetensors", "skipped.txt", "curves.png", "trace.json", "not-finite-*.txt", "tensorboard/events.*")
_STEP = 3  # what a step's seeds are for; see data.py


class NotFinite(RuntimeError):
    """The loss is infinite or no number; the message says when, of which images, and where to go on from."""


@dataclass(frozen=True)
class Settings:
    """How a run is done, beside its recipe.

    out: the folder for everything. precision: one of recipes.PRECISIONS. parallel: how several processes share the
    work, "ddp" or "fsdp" (FSDP2, by block). recompute: what backward computes again rather than keeps, "none",
    "blocks" or "fc1". save_every: steps between checkpoints, 0 for one an epoch; `keep` of them are kept. eval_every:
    epochs between validations. workers: processes that load images, for each process that trains.
    """

    out: Path
    seed: int = 0
    precision: str = "float32"
    parallel: str = "ddp"
    recompute: str = "none"
    compile: bool = False
    workers: int = 4
    save_every: int = 0
    keep: int = 3
    eval_every: int = 1
    profile: bool = False


@contextlib.contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """The device of this process, one of those that torchrun started or the only one, which can talk to the others in
    the `with` body."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield torch.device(device)
        return
    kind = torch.device(device).type
    if kind == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    rank, world, how = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), {}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1":
        # After a restart, torchrun's own store still has the addresses of the processes that are gone. (On several
        # nodes the restarts are counted apart: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is for torchrun to be given.)
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=False)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        how = {"store": dist.PrefixStore(f"restart {attempt}", store), "rank": rank, "world_size": world}
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", **how)
    yield torch.device(device)
    dist.destroy_process_group()  # not after an error: it may wait for what the others will never send


class Trainer:
    """A run of `recipe` on one model: `run()` does all of it that is left.

    model: in float32, on its device. training, validation: labelled images; without the latter nothing is validated.
    teacher: a model from normalised images (B, 3, H, W) to logits (B, K), in evaluation; `teacher_mean` and
    `teacher_std` are what it was trained with. facts: what else the numbers of the run depend on, by name: a checkpoint
    of other facts is refused. Raises ValueError for what does not fit together.
    """

    def __init__(
        self,
        model: VisionTransformer,
        training: Source,
        validation: Source | None,
        recipe: Recipe,
        settings: Settings,
        teacher: nn.Module | None = None,
        teacher_mean: tuple[float, ...] | None = None,
        teacher_std: tuple[float, ...] | None = None,
        facts: dict | None = None,
    ):
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.model, self.training, self.validation = model, training, validation
        self.recipe, self.settings, self.teacher = recipe, settings, teacher
        self.config, self.device = model.config, next(model.parameters()).device
        self._check()
        self.batches = Batches(len(training), recipe, settings.seed, 0, self.rank, self.world)
        self.steps = self.batches.steps_per_epoch * recipe.epochs
        self.facts = {"recipe": asdict(recipe), "seed": settings.seed, "precision": settings.precision}
        self.facts |= {"classes": training.classes, "images": _digest(training), **(facts or {})}
        self._mean, self._std = self._channels(self.config.mean), self._channels(self.config.std)
        if teacher is not None:
            mean, std = (self._channels(values) for values in (teacher_mean, teacher_std))
            self._to_teacher = (self._std / std, (self._mean - mean) / std)
        self._augment_on_device()
        self._try_augmentation()
        self.flops = forward_flops(model)
        self._peak = peak_flops(self.device, settings.precision)
        self._wrap()
        self.step, self.best, self._losses = 0, -1.0, []
        self._stopping, self._told = False, 0.0  # when the process was told to end
        self._skipped: set[str] = set()

    def _check(self) -> None:
        recipe, count = self.recipe, len(self.training)
        if recipe.batch_size > count:
            raise ValueError(f"batch_size is {recipe.batch_size}, expected at most the {count} training images")
        if recipe.batch_size % (self.world * recipe.accumulate):
            parts = f"{self.world} processes x {recipe.accumulate} parts"
            raise ValueError(f"batch_size is {recipe.batch_size}, expected a multiple of {parts}")
        if recipe.mixes and recipe.batch_size // (self.world * recipe.accumulate) % 2:
            raise ValueError(f"batch_size is {recipe.batch_size}: mixup needs an even number of images a process")
        if self.config.num_classes != len(self.training.classes):
            raise ValueError(
                f"the model has {self.config.num_classes} classes, the images {len(self.training.classes)}"
            )
        if self.config.in_chans != 3:
            raise ValueError(f"in_chans is {self.config.in_chans}, expected 3: images are read as RGB")

    def _try_augmentation(self) -> None:
        """What timm does not know, and what the teacher cannot take, is found here rather than at the first step."""
        try:
            augmentation(self.config, self.recipe)
        except AssertionError as error:
            raise ValueError(f"auto_augment is {self.recipe.auto_augment!r}, which timm does not know") from error
        if self.teacher is None:
            return
        try:
            with torch.no_grad():
                shape = tuple(self.teacher(torch.zeros(1, 3, *self.config.img_size, device=self.device)).shape)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"the teacher takes no images of {self.config.img_size}: {error}") from error
        if shape != (1, self.config.num_classes):
            raise ValueError(f"the teacher's output is {shape}, expected (1, {self.config.num_classes}), the classes")

    def _channels(self, values: tuple[float, ...]) -> torch.Tensor:
        return torch.tensor(values, device=self.device).view(1, -1, 1, 1)

    def _augment_on_device(self) -> None:
        self._erase = self._mix = None
        recipe = self.recipe
        if recipe.erase:
            from timm.data.random_erasing import RandomErasing

            self._erase = RandomErasing(recipe.erase, mode="pixel", device=str(self.device))
        if recipe.mixes:
            from timm.data import Mixup

            self._mix = Mixup(
                recipe.mixup,
                recipe.cutmix,
                prob=recipe.mixup_prob,
                switch_prob=recipe.mixup_switch_prob,
                label_smoothing=recipe.smoothing,
                num_classes=len(self.training.classes),
            )

    def _wrap(self) -> None:
        """The model in its precision, spread over the processes, with its optimizer and averaged weights."""
        from timm.optim import create_optimizer_v2
        from timm.scheduler import CosineLRScheduler

        recipe, settings, model = self.recipe, self.settings, self.model
        if model.config.distilled:
            model.set_distilled_training(self.teacher is not None)
        if model.mask_token is not None:
            model.mask_token.requires_grad_(False)  # nothing here is masked
        model.set_grad_checkpointing({"none": False, "blocks": True, "fc1": "fc1"}[settings.recompute])
        self.ema = copy.deepcopy(model).requires_grad_(False).eval() if recipe.ema else None
        if settings.precision == "bfloat16":
            model.to(torch.bfloat16)
        spread = self.world > 1 and settings.parallel == "fsdp"
        if spread:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.world,))
            for one in filter(None, (model, self.ema)):
                for part in (*one.blocks, one):
                    # The whole too, so that its parameters are always what is to be averaged.
                    fully_shard(part, mesh=mesh, reshard_after_forward=True)
        if settings.compile:
            model.compile()
        self._called: Callable = model
        if self.world > 1 and not spread:
            self._called = nn.parallel.DistributedDataParallel(model)
        fused = {"fused": True} if recipe.optimizer == "adamw" else {}
        self.optimizer = create_optimizer_v2(
            model,
            recipe.optimizer,
            lr=recipe.peak_lr,
            weight_decay=recipe.weight_decay,
            layer_decay=None if recipe.layer_decay == 1 else recipe.layer_decay,
            **fused,
        )
        self._schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=self.steps,
            lr_min=min(recipe.min_lr, recipe.peak_lr),
            warmup_t=round(recipe.warmup_epochs * self.batches.steps_per_epoch),
            warmup_lr_init=min(recipe.warmup_lr, recipe.peak_lr),
            t_in_epochs=False,
        )
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "amp-float16")
        self._loss = label_loss(recipe)

    # The run

    def resume(self) -> None:
        """Go on from the newest checkpoint in the folder, if there is one. Raises ValueError for one of another run."""
        found = [self._found() if is_first() else None]
        if self.world > 1:
            dist.broadcast_object_list(found, 0)
        path, state, reason = found[0]
        if reason:
            raise ValueError(reason)
        if path is None:
            return
        checkpoints.load(path, self._models(), self.optimizer)
        self.step, self.best, self._losses = state["step"], state["best"], state["losses"]
        self._scaler.load_state_dict(state["scaler"])
        if is_first():
            note(f"Going on after step {self.step} of {self.steps}.")
            if state["world"] != self.world and self._chance_per_process:
                note(f"There were {state['world']} processes, now {self.world}: mixing, erasing and drop path differ.")

    def _found(self) -> tuple[Path | None, dict, str]:
        """The newest checkpoint, its state without the optimizer's, and why this run cannot go on there or ""."""
        out = self.settings.out
        path = checkpoints.newest(out)
        try:
            state = {} if path is None else checkpoints.read_state(path)
            before = state["facts"] if path else self._facts_of_folder()
        except (ValueError, KeyError) as error:
            return path, {}, f"{path or out} is of no run of this version of fastvit: {error}; --no-resume starts anew"
        if before is None:
            foreign = (out / "model.safetensors").exists()
            return None, {}, f"{out} has a model.safetensors of no run; --no-resume replaces it" if foreign else ""
        before, now = _flat(before), _flat(self.facts)
        differ = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if not differ:
            return path, {name: value for name, value in state.items() if name != "optimizer"}, ""
        changes = ", ".join(f"{name} {_short(before.get(name))} (now {_short(now.get(name))})" for name in differ)
        return path, {}, f"{path or out} is of a run with {changes}; --no-resume starts anew"

    def _facts_of_folder(self) -> dict | None:
        """What is in run.json: None without one, nothing for one that cannot be read."""
        path = self.settings.out / "run.json"
        with contextlib.suppress(ValueError):
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        return {}

    @property
    def _chance_per_process(self) -> bool:
        """Whether processes draw random numbers of their own, beside those of each image."""
        return bool(self.recipe.mixes or self.recipe.erase or self.recipe.drop_path or self.recipe.dropout)

    def run(self) -> None:
        """Do what is left of the run: all of it, and what an earlier one left in the folder goes, unless `resume` was
        called. Raises NotFinite; KeyboardInterrupt after a checkpoint was saved, when the process was told to end."""
        with self._told_to_stop():
            if is_first():
                self._begin()
            if self.world > 1:
                dist.barrier()
            self._skipped = lines_of(self.settings.out / "skipped.txt")
            self._log = log.Log(self.settings.out, self.step, self.steps) if is_first() else None
            batches = replace(self.batches, start=self.step)
            pin = self.device.type == "cuda"
            loader = training_loader(self.training, self.config, batches, self.settings.workers, pin)
            try:
                with self._profiler() as profiler:
                    self._run(iter(loader), profiler)
            finally:
                if self._log is not None:
                    self._log.close()

    def _begin(self) -> None:
        """Make the folder ready: without what an earlier run left there, unless this one goes on with it."""
        out = self.settings.out
        out.mkdir(parents=True, exist_ok=True)
        if not self.step:
            checkpoints.remove_all(out)
        if not self.step and self._facts_of_folder() != self.facts:  # the same run will write the same
            for name in _LEFT:
                for path in out.glob(name):
                    path.unlink()
        write_json(out / "run.json", self.facts)

    def _run(self, batches: Iterator[Batch], profiler) -> None:
        per_epoch, save_every = self.batches.steps_per_epoch, self.settings.save_every or self.batches.steps_per_epoch
        pending = deque()  # the last step's numbers, which are read once the device is at the next
        began, self._read_at = time.monotonic(), deque([time.monotonic()], maxlen=20)
        while self.step < self.steps:
            pending.append(self._one_step(batches))
            self.step += 1
            if profiler is not None:
                profiler.step()
            if len(pending) > 1:
                self._read(pending.popleft())
            ends = self.step % per_epoch == 0
            if ends or self.step % save_every == 0 or self._stopping:
                while pending:
                    self._read(pending.popleft())
                self._check_weights()
                if ends:
                    self._end_of_epoch(began)
                    self._losses, began = [], time.monotonic()
                if not ends or self.step % save_every == 0 or self._stopping or self.step == self.steps:
                    self._save()
                self._read_at = deque([time.monotonic()], maxlen=20)
                if self._stopping:
                    if is_first():
                        note(f"Stopped at step {self.step} of {self.steps}, which is saved: the same command goes on.")
                    raise KeyboardInterrupt
        if is_first():
            try:
                write_atomically(self.settings.out / "curves.png", log.picture(self.settings.out))
            except ImportError:
                note("No picture: matplotlib is not installed.")

    def _one_step(self, batches: Iterator[Batch]) -> dict:
        """Forward, backward and the optimizer for one batch; returns what is to be read of it later."""
        recipe, number, indices, total = self.recipe, self.step, [], None
        self._schedule.step_update(number)
        self.model.train()
        for part in range(recipe.accumulate):
            batch = next(batches)
            self._note_skipped(batch)
            indices += batch.indices
            seed = mixed(self.settings.seed, number, _STEP, part, self.rank)
            random.seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)
            torch.manual_seed(seed)
            with self._summed_later(part + 1 < recipe.accumulate):
                loss = self._forward(batch) / recipe.accumulate
                self._scaler.scale(loss).backward()
            total = loss.detach() if total is None else total + loss.detach()
        if recipe.clip_grad:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_grad)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        mine = total.float().reshape(1)
        everyone = torch.cat([mine, torch.full_like(mine, float(self._told > 0))])
        if self.world > 1:
            dist.all_reduce(everyone, dist.ReduceOp.SUM)
        numbers, event = torch.cat([mine, everyone]), None
        if self.device.type == "cuda":  # reading them later must not wait for what comes in between
            numbers, event = numbers.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        return {"step": number + 1, "numbers": numbers, "event": event, "lr": lr, "indices": indices}

    def _forward(self, batch: Batch) -> torch.Tensor:
        images, targets = (tensor.to(self.device, non_blocking=True) for tensor in (batch.images, batch.labels))
        teacher = None
        if self.teacher is not None or self._erase is not None or self._mix is not None:
            normalised = (images.float() / 255 - self._mean) / self._std
            if self._erase is not None:
                normalised = self._erase(normalised)
            if self._mix is not None:
                normalised, targets = self._mix(normalised, targets)
            images = normalised
        dtype = _AUTOCAST.get(self.settings.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            if self.teacher is not None:
                scale, shift = self._to_teacher
                with torch.no_grad():
                    teacher = self.teacher(images * scale + shift)
            if images.is_floating_point() and self.settings.precision == "bfloat16":
                images = images.to(torch.bfloat16)
            logits = self._called(images)  # uint8 images are normalised in the first kernel
        return total_loss(logits, targets, teacher, self._loss, self.recipe)

    @contextlib.contextmanager
    def _summed_later(self, later: bool) -> Iterator[None]:
        """Gradients of this part are not yet summed over the processes."""
        if hasattr(self.model, "set_requires_gradient_sync"):
            self.model.set_requires_gradient_sync(not later)
            yield
        elif later and self.world > 1:
            with self._called.no_sync():
                yield
        else:
            yield

    @torch.no_grad()
    def _average(self) -> None:
        """averaged = decay averaged + (1 - decay) weights, in float32."""
        if self.ema is not None:
            ours = [_local(parameter) for parameter in self.ema.parameters()]
            theirs = [_local(parameter).to(torch.float32) for parameter in self.model.parameters()]
            torch._foreach_lerp_(ours, theirs, 1 - self.recipe.ema)

    def _read(self, entry: dict) -> None:
        """Wait for a step's numbers, and log them; raises NotFinite for a loss that is not."""
        if entry["event"] is not None:
            entry["event"].synchronize()
        mine, total, told = entry["numbers"].tolist()
        loss = total / self.world
        self._stopping = self._stopping or told > 0
        if not math.isfinite(loss):
            raise self._not_finite(entry["step"], mine, entry["indices"])
        self._losses.append(loss)
        self._read_at.append(time.monotonic())
        speed = self.recipe.batch_size * (len(self._read_at) - 1) / (self._read_at[-1] - self._read_at[0])
        if self._log is not None:
            mfu = 3 * self.flops * speed / (self._peak * self.world)
            epoch = (entry["step"] - 1) // self.batches.steps_per_epoch + 1
            self._log.step(
                step=entry["step"], epoch=epoch, loss=loss, lr=entry["lr"], images_per_s=round(speed, 2),
                mfu=round(mfu, 4),
            )  # fmt: skip

    def _not_finite(self, step: int, mine: float, indices: list[int]) -> NotFinite:
        saved = checkpoints.newest(self.settings.out)
        after = f"the last good checkpoint is {saved}" if saved else "no checkpoint was saved before"
        if math.isfinite(mine):
            return NotFinite(f"the loss of step {step} is not finite in another process; {after}")
        path = self.settings.out / f"not-finite-step-{step}-process-{self.rank}.txt"
        names = "".join(f"{self.training.name(index)}\n" for index in indices)
        write_atomically(path, names.encode(errors="surrogateescape"))
        return NotFinite(f"the loss of step {step} is {mine}; its images: {path}; {after}")

    def _check_weights(self) -> None:
        """Raise NotFinite for weights that the last step made infinite or no numbers, whatever its loss was."""
        fine = torch.stack([_local(parameter.detach()).isfinite().all() for parameter in self.model.parameters()]).all()
        fine = fine.float().reshape(1)
        if self.world > 1:
            dist.all_reduce(fine, dist.ReduceOp.MIN)
        if not fine.item():
            saved = checkpoints.newest(self.settings.out) or "none"
            raise NotFinite(f"the weights are not finite after step {self.step}; the last good checkpoint: {saved}")

    def _note_skipped(self, batch: Batch) -> None:
        for _, reason in batch.bad:
            self._skip(reason)

    def _skip(self, reason: str) -> None:
        """Say once of an image that it cannot be read."""
        if reason not in self._skipped:
            self._skipped.add(reason)
            note(f"skipped {reason}")
            with open(self.settings.out / "skipped.txt", "a", errors="surrogateescape") as file:
                file.write(f"{reason}\n")

    # Epochs and checkpoints

    def _end_of_epoch(self, began: float) -> None:
        row = {"epoch": self.step // self.batches.steps_per_epoch, "step": self.step}
        row |= {"loss": sum(self._losses) / max(len(self._losses), 1)}
        row |= dict.fromkeys(("top1", "top5", "ema_top1", "ema_top5"), "")
        if self.validation is not None and (row["epoch"] % self.settings.eval_every == 0 or self.step == self.steps):
            row["top1"], row["top5"] = self._accuracy(self.model)
            if self.ema is not None:
                row["ema_top1"], row["ema_top5"] = self._accuracy(self.ema)
        row["seconds"] = round(time.monotonic() - began, 2)
        if self._log is not None:
            self._log.epoch(**row)
        self._write_model(row)

    def _accuracy(self, model: nn.Module) -> tuple[float, float]:
        dtype = _AUTOCAST.get(self.settings.precision)
        size = max(1, self.recipe.batch_size // (self.world * self.recipe.accumulate))
        loader = evaluation_loader(
            self.validation,
            self.config,
            size,
            self.settings.workers,
            self.device.type == "cuda",
            self.rank,
            self.world,
        )
        model.eval()
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            found = accuracy(model, loader, self.device, len(self.validation), self._skip)
        return found["top1"], found["top5"]

    def _write_model(self, row: dict) -> None:
        """model.safetensors: the weights that did best in validation, averaged or not; without one, the last."""
        candidates = [("top1", self.model), ("ema_top1", self.ema)]
        scores = [(row[name], model) for name, model in candidates if row[name] != ""]
        if scores:
            score, model = max(scores, key=lambda pair: pair[0])
            if score <= self.best:
                return
            self.best = score
        elif self.validation is None and self.step == self.steps:
            model = self.model
        else:
            return
        state = checkpoints.gathered(model)
        if is_first():
            content = to_safetensors(state, self.config, self.training.classes)
            write_atomically(self.settings.out / "model.safetensors", content)

    def _models(self) -> dict[str, nn.Module]:
        return {"model": self.model} | ({} if self.ema is None else {"ema": self.ema})

    def _save(self) -> None:
        if self._log is not None:
            self._log.flush()
        state = {"facts": self.facts, "best": self.best, "scaler": self._scaler.state_dict(), "losses": self._losses}
        state["world"] = self.world
        checkpoints.save(self.settings.out, self.step, self._models(), self.optimizer, state, self.settings.keep)

    @contextlib.contextmanager
    def _told_to_stop(self) -> Iterator[None]:
        """A first Ctrl-C or polite kill ends the run after a checkpoint, a second at once."""

        def stop(number, frame) -> None:
            if self._told and time.monotonic() - self._told > _AT_ONCE:
                raise KeyboardInterrupt
            self._told = self._told or time.monotonic()

        here = threading.current_thread() is threading.main_thread()
        before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM) if here}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _profiler(self) -> Iterator:
        """A trace of a few steps in trace.json, for chrome://tracing or Perfetto."""
        if not self.settings.profile or not is_first():
            yield None
            return
        from torch.profiler import profile, schedule

        def write(profiler) -> None:
            profiler.export_chrome_trace(str(self.settings.out / "trace.json"))
            note(f"The trace is in {self.settings.out / 'trace.json'}.")

        with profile(schedule=schedule(**_PROFILED, repeat=1), on_trace_ready=write) as profiler:
            yield profiler


def forward_flops(model: nn.Module) -> int:
    """Multiplications and additions of one image's forward pass, in matrix products and attention."""
    from torch.utils.flop_counter import FlopCounterMode

    size = (1, model.config.in_chans, *model.config.img_size)
    shadow = copy.deepcopy(model).to("meta").eval()
    with use_backend("torch"), FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.empty(size, device="meta", dtype=next(shadow.parameters()).dtype))
    return counter.get_total_flops()


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s that a large matrix product reaches on this device, in the precision of a run's products."""
    dtype = _AUTOCAST.get(precision, getattr(torch, precision, torch.float32))
    size, best = 8192 if device.type == "cuda" else 512, 0.0
    left = torch.randn(size, size, device=device).to(dtype)

    def finish() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for _ in range(4):
        began = finish()
        torch.mm(left, left)
        best = max(best, 2 * size**3 / (finish() - began))
    return best


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """What this process has of it."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _flat(facts: dict) -> dict:
    recipe = facts.get("recipe", {})
    return {**{name: value for name, value in facts.items() if name != "recipe"}, **recipe}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-17:]}"


def _digest(source: Source) -> str:
    """What tells labelled images from others, by their names and labels."""
    found = hashlib.sha256()
    for index in range(len(source)):
        found.update(f"{Path(source.name(index)).name}\0{source.label(index)}\n".encode(errors="surrogateescape"))
    return f"{len(source)}, {found.hexdigest()[:16]}"

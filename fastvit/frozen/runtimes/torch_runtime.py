"""A plan by PyTorch. On a CPU its linear steps are oneDNN's, on weights that were reordered once, with the activation
or the residual sum in the same pass. Attention is PyTorch's fused one, or two batched products around a softmax where
that was measured to be faster, as in bfloat16."""

from __future__ import annotations

import functools
import math
import time
from dataclasses import replace

import torch

from fastvit import onednn

from ..export import PlainModule
from ..plan import IMAGES, OPERATIONS, Plan, Step, in_dtype
from . import Run


def prepare(plan: Plan, batch: int, uint8: bool) -> Run:
    """The plan for one batch; as `packed` gives it, it shares the weights."""
    if plan.device.type == "cpu" and onednn.available(plan.dtype):
        return _Program(packed(plan), batch, uint8)
    return PlainModule(plan, uint8).eval()


def packed(plan: Plan) -> Plan:
    """The plan with the weights of its linear steps as oneDNN takes them, which is the same for any number of rows but
    one; as it is where oneDNN does not."""
    if plan.device.type != "cpu" or not onednn.available(plan.dtype):
        return plan
    names = {step.constants["weight"] for step in plan.steps if _by_onednn(step)}
    tensors = {n: t if t.is_mkldnn or n not in names else onednn.pack(t) for n, t in plan.constants.items()}
    return replace(plan, constants=tensors)


def _by_onednn(step: Step) -> bool:
    return step.op == "linear" and step.options.get("activation") in onednn.ACTIVATIONS


class _Program:
    """images -> outputs; each step a call, its result forgotten after the last step that takes it."""

    def __init__(self, plan: Plan, batch: int, uint8: bool):
        self.outputs = tuple(plan.outputs.values())
        shapes = plan.shapes(batch)
        last = {name: i for i, step in enumerate(plan.steps) for name in step.inputs}
        self.calls, attentions = [], {}
        for i, step in enumerate(plan.steps):
            constants = {role: plan.constants[name] for role, name in step.roles(uint8).items()}
            done = [name for name in dict.fromkeys(step.inputs) if last[name] == i and name not in self.outputs]
            if _by_onednn(step):
                call = functools.partial(_linear, **constants, **step.options)
            else:
                constants = {role: in_dtype(role, tensor, plan.dtype) for role, tensor in constants.items()}
                make = {"patch_embed": _Patches, "assemble": _assemble}.get(step.op)
                make = make if make and not step.options.get("pad") and "prefix" not in constants else None
                call = functools.partial(make or OPERATIONS[step.op], **constants, **step.options)
                call = call() if make is _Patches else call
            if step.op == "attention" and len(step.inputs) == 1:
                alike = shapes[step.inputs[0]], plan.dtype, step.options["num_heads"], step.options["scale"]
                if _products_win(*alike):
                    call = attentions[alike] = attentions.get(alike) or _Products(*alike)
            self.calls.append((step.out, step.inputs, call, done))

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = {IMAGES: images}
        for out, inputs, call, done in self.calls:
            values[out] = call(*[values[name] for name in inputs])
            for name in done:
                del values[name]
        return tuple(values[name] for name in self.outputs)


def _linear(x, residual=None, *, weight, bias=None, activation=None) -> torch.Tensor:
    return onednn.linear(x, weight, bias, activation, residual)


class _Patches:
    """The patch projection as a linear step, on patches that are copied, and uint8 ones converted, in one pass."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, centre: tuple[int, ...] | None = None):
        self.patch, self.rows = weight.shape[2:], weight.new_empty(0)
        self.weight, self.bias = onednn.pack(weight.flatten(1)), bias
        self.centre = None if centre is None else torch.tensor(centre, dtype=weight.dtype, device="cpu")[:, None, None]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        (batch, channels, height, width), (ph, pw) = images.shape, self.patch
        grid = height // ph, width // pw
        if self.rows.shape[:3] != (batch, *grid):
            self.rows = self.rows.new_empty(batch, *grid, channels, ph, pw)
        self.rows.copy_(images.reshape(batch, channels, grid[0], ph, grid[1], pw).permute(0, 2, 4, 1, 3, 5))
        if self.centre is not None and images.dtype == torch.uint8:  # see `plan.centred`
            self.rows -= self.centre
        return onednn.linear(self.rows.view(batch, grid[0] * grid[1], -1), self.weight, self.bias)


def _assemble(patches, positions, prefix_rows: int, prefix_tokens: int) -> torch.Tensor:
    """`plan._assemble` of a table that holds the prefix, in one pass."""
    batch, count, width = patches.shape
    tokens = patches.new_empty(batch, prefix_tokens + count, width)
    tokens[:, :prefix_tokens] = positions[:prefix_tokens]
    torch.add(patches, positions[prefix_rows:], out=tokens[:, prefix_tokens:])
    return tokens


SCRATCH_BYTES = 8 << 20  # what attention by products may take for itself, where one image, and one head, fit into it
_TRIES = 5


class _Products:
    """Attention of packed (B, N, 3 D) by two batched products around a softmax, of some images at a time and some of
    their heads, in buffers that stay."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, num_heads: int, scale: float):
        batch, tokens, width = shape
        size = width // (3 * num_heads)
        head = tokens * (tokens + 4 * size) * dtype.itemsize
        most = max(1, min(batch, SCRATCH_BYTES // (num_heads * head)))
        count = -(-batch // -(-batch // most))  # images at a time, about equally many
        heads = max(1, min(count * num_heads, SCRATCH_BYTES // head))
        how = {"dtype": dtype, "device": "cpu"}
        packed = torch.empty(3, count, num_heads, tokens, size, **how)
        mixed = torch.empty(count, num_heads, tokens, size, **how)
        scores = torch.empty(heads, tokens, tokens, **how)
        self.shape, self.scale, self.rounds = (batch, tokens, num_heads, size), scale, []
        for i in range(0, batch, count):
            images = slice(i, min(i + count, batch))
            now, (q, k, v), out = images.stop - i, packed.flatten(1, 2), mixed.flatten(0, 1)
            parts = []
            for j in range(0, now * num_heads, heads):
                some = slice(j, min(j + heads, now * num_heads))
                parts.append((q[some], k[some].transpose(1, 2), v[some], out[some], scores[: some.stop - j]))
            self.rounds.append((images, packed[:, :now], parts, mixed[:now].transpose(1, 2)))

    def __call__(self, qkv: torch.Tensor) -> torch.Tensor:
        batch, tokens, num_heads, size = self.shape
        heads = qkv.view(batch, tokens, 3, num_heads, size).permute(2, 0, 3, 1, 4)
        result = qkv.new_empty(batch, tokens, num_heads, size)
        for images, packed, parts, mixed in self.rounds:
            packed.copy_(heads[:, images])
            for q, k, v, out, scores in parts:
                torch.bmm(q, k, out=scores)
                if self.scale != 1:
                    scores *= self.scale
                torch.softmax(scores, -1, out=scores)
                torch.bmm(scores, v, out=out)
            result[images].copy_(mixed)
        return result.flatten(2)


@functools.lru_cache(maxsize=256)
def _products_win(shape: tuple[int, ...], dtype: torch.dtype, num_heads: int, scale: float) -> bool:
    """Whether attention by products is faster here than PyTorch's own: measured once."""
    qkv = torch.zeros(shape, dtype=dtype, device="cpu")
    products = _Products(shape, dtype, num_heads, scale)
    fused = functools.partial(OPERATIONS["attention"], num_heads=num_heads, scale=scale)
    seconds = {products: math.inf, fused: math.inf}
    with torch.inference_mode():
        for _ in range(_TRIES):
            for run in seconds:
                start = time.perf_counter()
                run(qkv)
                seconds[run] = min(seconds[run], time.perf_counter() - start)
    return seconds[products] < seconds[fused]

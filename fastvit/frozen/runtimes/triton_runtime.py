"""A plan on fastvit's kernels: one op for each group of steps that it fuses, replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastvit import graphs, ops

from ..plan import IMAGES, OPERATIONS, PIXEL, Plan, Step, centred, in_dtype
from . import Run


def prepare(plan: Plan, batch: int, uint8: bool) -> Run:
    """The plan captured for one batch, on the CUDA device of its constants, with buffers that stay."""
    program = Program(plan, uint8)
    device = next(iter(plan.constants.values())).device
    size = (batch, plan.config.in_chans, *plan.config.img_size)
    with torch.cuda.device(device), torch.inference_mode():
        images = torch.zeros(size, dtype=torch.uint8 if uint8 else plan.dtype, device=device)
        outputs = program(images)  # compiles
        torch.cuda.synchronize()

        def work() -> None:
            nonlocal outputs
            outputs = program(images)

        replay = graphs.capture(work, torch.cuda.graph_pool_handle())
        through = torch.cuda.Event()

    def run(given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.cuda.device(device):
            torch.cuda.current_stream().wait_event(through)  # another stream's replay uses the same buffers
            images.copy_(given)
            replay()
            found = tuple(output.clone() for output in outputs)  # the next replay overwrites them
            through.record()
            return found

    return run


_PIXEL_TABLE = {f"{PIXEL}positions"}


class Program:
    """The plan's steps as calls of `fastvit.ops`, which choose between kernels and library: images -> outputs."""

    def __init__(self, plan: Plan, uint8: bool):
        self.outputs = tuple(plan.outputs.values())
        self.calls: list[tuple[str, Callable[[dict], torch.Tensor]]] = []
        merged: set[str] = set()
        for step in plan.steps:
            if step.out in merged:
                continue
            group = _group(plan, step)
            merged |= {other.out for other in group}
            constants = [
                {role: in_dtype(role, plan.constants[name], plan.dtype) for role, name in one.roles(uint8).items()}
                for one in group
            ]
            self.calls.append((group[-1].out, _call(group, constants)))

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = {IMAGES: images}
        for out, call in self.calls:
            values[out] = call(values)
        return tuple(values[name] for name in self.outputs)


def _group(plan: Plan, first: Step) -> list[Step]:
    """The steps from `first` on that one op computes."""
    second = plan.only_user(first.out)
    if second is None:
        return [first]
    if (first.op, second.op) == ("patch_embed", "assemble") and len(second.constants.keys() - _PIXEL_TABLE) < 2:
        return [first, second]
    if (first.op, second.op) == ("rotate", "attention"):
        return [first, second]
    if (first.op, second.op) != ("layer_norm", "linear") or second.inputs[0] != first.out or len(second.inputs) > 1:
        return [first]
    third = plan.only_user(second.out)
    if second.options.get("activation") is None:
        return [first, second]
    if third is None or third.op != "linear" or third.inputs[0] != second.out or third.options.get("activation"):
        return [first]
    return [first, second, third]


def _call(group: list[Step], constants: list[dict]) -> Callable[[dict], torch.Tensor]:
    """The call of an op that computes the group, from values by name."""
    first, last = group[0], group[-1]
    if first.op == "patch_embed" and len(group) == 2:
        (embed, table), rows = constants, last.options["prefix_tokens"]
        positions, prefix = table.get("positions"), table.get("prefix")
        if positions is not None:
            positions, prefix = positions[rows:], positions[:rows] if rows else None
        weight, bias, centre = embed["weight"], embed.get("bias"), first.options.get("centre")
        return lambda values: ops.patch_embed(
            centred(values[first.inputs[0]], centre, weight.dtype), weight, bias, pos_embed=positions, prefix=prefix
        )
    if first.op == "layer_norm":
        return _normalised(group, constants)
    if first.op == "linear" and len(first.inputs) == 2 and not first.options.get("activation"):
        x, residual = first.inputs
        weight, bias = constants[0]["weight"], constants[0].get("bias")
        return lambda values: ops.linear_residual(values[x], weight, bias, values[residual])
    if last.op == "attention" and len(last.inputs) == 1:
        (qkv,), heads, scale = first.inputs, last.options["num_heads"], last.options["scale"]
        rope = {f"rope_{role}": tensor for role, tensor in constants[0].items()}
        return lambda values: ops.attention(values[qkv].unflatten(2, (3, heads, -1)), scale=scale, **rope)
    function, options = OPERATIONS[first.op], dict(first.options)
    return lambda values: function(*[values[name] for name in first.inputs], **constants[0], **options)


def _normalised(group: list[Step], constants: list[dict]) -> Callable[[dict], torch.Tensor]:
    norm, eps = group[0], group[0].options["eps"]
    x = norm.inputs[0]
    affine: list[torch.Tensor] = []  # made at the first call, which knows the width

    def weights(value: torch.Tensor) -> list[torch.Tensor]:
        if not affine:
            ones, zeros = value.new_ones(value.shape[-1]), value.new_zeros(value.shape[-1])
            affine.extend((constants[0].get("weight", ones), constants[0].get("bias", zeros)))
        return affine

    if len(group) == 1:
        return lambda values: ops.layer_norm(values[x], *weights(values[x]), eps)
    first = constants[1]["weight"], constants[1].get("bias")
    if len(group) == 2:
        return lambda values: ops.layer_norm_linear(values[x], *weights(values[x]), *first, eps=eps)
    second = constants[2]["weight"], constants[2].get("bias")
    activation, residual = group[1].options["activation"], group[2].inputs[1:]
    return lambda values: ops.layer_norm_mlp(
        *(values[x], *weights(values[x]), *first, *second),
        eps=eps,
        activation=activation,
        residual=values[residual[0]] if residual else None,
    )

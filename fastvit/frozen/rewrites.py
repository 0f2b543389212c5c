"""The rewrites: each takes a plan and returns one that computes the same with less.

Each is exact in real numbers, by the one line of proof beside it. Constants that a rewrite touches become float64 and
stay so; `Plan.rounded` rounds each once, when all rewrites are through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from .plan import PIXEL, ROW_WISE, Plan, Step


@dataclass(frozen=True)
class Rewrite:
    """One of `REWRITES`: its name, what it does and why that changes nothing, the pass."""

    name: str
    what: str
    proof: str
    apply: Callable[[Plan], Plan]


class _Draft:
    """A plan while a rewrite changes it: steps replaced or dropped by what they make, constants by name."""

    def __init__(self, plan: Plan):
        self.plan, self.steps, self.constants = plan, list(plan.steps), dict(plan.constants)

    def wide(self, step: Step, role: str) -> torch.Tensor | None:
        """A constant of a step in float64; None where it has none in that role."""
        name = step.constants.get(role)
        return None if name is None else self.constants[name].double()

    def put(self, step: Step, drop: str | None = None, inputs=None, out=None, options=None, **tensors) -> None:
        """Give the step `step.out` other tensors by role (None: none of that role), and other inputs, another name or
        further options where they are given; leave out the step that makes `drop`."""
        constants = dict(step.constants)
        for role, tensor in tensors.items():
            constants.pop(role, None)
            if tensor is not None:
                constants[role] = step.constants.get(role, f"{step.out}.{role}")
                self.constants[constants[role]] = tensor
        new = Step(
            *(out or step.out, step.op, step.inputs if inputs is None else inputs, constants),
            {**step.options, **(options or {})},
        )
        self.steps = [new if s.out == step.out else s for s in self.steps if s.out != drop]

    def done(self) -> Plan:
        return replace(self.plan, steps=tuple(self.steps), constants=self.constants)


def _dead(plan: Plan) -> Plan:
    needed = set(plan.outputs.values())
    for step in reversed(plan.steps):
        if step.out in needed:
            needed |= set(step.inputs)
    return replace(plan, steps=tuple(step for step in plan.steps if step.out in needed))


def _normalisation(plan: Plan) -> Plan:
    draft = _Draft(plan)
    for step in plan.steps:
        embed = plan.only_user(step.out) if step.op == "normalise" else None
        if embed is None or embed.op != "patch_embed" or embed.options.get("pad"):
            continue  # a patch that is filled up has zeros in it that no pixel stands for
        weight, bias = draft.wide(embed, "weight"), draft.wide(embed, "bias")
        how = {"dtype": torch.float64, "device": weight.device}
        mean, std = (torch.tensor(step.options[name], **how)[:, None, None] for name in ("mean", "std"))
        # Pixels go in as they differ from the nearest integer to the mean: products of the pixels themselves would be
        # rounded before a much larger shift is taken from them.
        centre = (255 * mean).round()
        weight = weight / (255 * std)
        shift = (weight * (centre - 255 * mean)).flatten(1).sum(1)
        draft.put(
            embed,
            drop=step.out,
            inputs=step.inputs,
            options={"centre": tuple(int(value) for value in centre.flatten())},
            **{f"{PIXEL}weight": weight, f"{PIXEL}bias": shift if bias is None else bias + shift},
        )
    return draft.done()


def _layer_scale(plan: Plan) -> Plan:
    draft = _Draft(plan)
    for step in plan.steps:
        linear = plan.maker(step.inputs[0]) if step.op == "scale" else None
        if linear is None or linear.op != "linear" or plan.only_user(linear.out) is not step:
            continue
        gamma, bias = draft.wide(step, "gamma"), draft.wide(linear, "bias")
        weight = gamma[:, None] * draft.wide(linear, "weight")
        draft.put(linear, drop=step.out, out=step.out, weight=weight, bias=None if bias is None else gamma * bias)
    return draft.done()


def _norm_into_linear(plan: Plan, through: tuple[str, ...]) -> Plan:
    """Weight and bias of each LayerNorm into the linear steps that take it, by way of steps of the kinds `through`."""
    draft = _Draft(plan)
    for norm in plan.steps:
        if norm.op != "layer_norm" or not norm.constants:
            continue
        linears, between = _readers(plan, norm.out, through)
        if linears is None or bool(between) != bool(through):
            continue
        gamma, beta = draft.wide(norm, "weight"), draft.wide(norm, "bias")
        for linear in linears:
            weight, bias = draft.wide(linear, "weight"), draft.wide(linear, "bias")
            shift = None if beta is None else weight @ beta
            bias = shift if bias is None else bias if shift is None else bias + shift
            draft.put(linear, weight=weight if gamma is None else weight * gamma, bias=bias)
        draft.put(norm, weight=None, bias=None)
    return draft.done()


def _readers(plan: Plan, value: str, through: tuple[str, ...]) -> tuple[list[Step] | None, list[Step]]:
    """The linear steps that alone read a value, and the steps on the way to them; (None, []) where others read it."""
    if value in plan.outputs.values():
        return None, []
    linears, between = [], []
    for user in plan.users(value):
        if user.op == "linear" and user.inputs[0] == value and user.inputs.count(value) == 1:
            linears.append(user)
        elif user.op in through and user.options.get("kind", "avg") == "avg":
            further, more = _readers(plan, user.out, through)
            if further is None:
                return None, []
            linears, between = linears + further, [*between, user, *more]
        else:
            return None, []
    return linears, between


def _heads_averaged(plan: Plan) -> Plan:
    draft = _Draft(plan)
    for mean in plan.steps:
        heads = [plan.maker(name) for name in mean.inputs] if mean.op == "mean" else []
        flats = [plan.maker(head.inputs[0]) for head in heads if head.op == "linear"]
        rows = [plan.maker(flat.inputs[0]) for flat in flats if flat.op == "flatten"]
        if not heads or not len(rows) == len(flats) == len(heads):
            continue
        starts = [step.options["start"] for step in rows]
        one_after_the_other = starts == list(range(starts[0], starts[0] + len(rows)))
        if len({step.inputs for step in rows}) > 1 or not one_after_the_other:
            continue
        if any(step.op != "rows" for step in rows) or not all(plan.only_user(s.out) for s in (*rows, *flats, *heads)):
            continue
        share = len(heads)
        weight = torch.cat([draft.wide(head, "weight") for head in heads], dim=1) / share
        biases = [bias for head in heads if (bias := draft.wide(head, "bias")) is not None]
        first = replace(rows[0], options={"start": starts[0], "stop": starts[0] + share})
        steps = [first if step is rows[0] else step for step in plan.steps]
        gone = {step.out for step in (*rows[1:], *flats[1:], *heads)}
        # The joined head stands where the mean did.
        joined = Step(mean.out, "linear", (flats[0].out,), {"weight": f"{mean.out}.weight"})
        draft.constants[f"{mean.out}.weight"] = weight
        if biases:
            joined = replace(joined, constants={**joined.constants, "bias": f"{mean.out}.bias"})
            draft.constants[f"{mean.out}.bias"] = sum(biases) / share
        draft.steps = [joined if step is mean else step for step in steps if step.out not in gone]
        return draft.done()
    return plan


def _of_attention(plan: Plan):
    """(attention, the linear step that makes its packed q, k, v) wherever that does nothing else."""
    for step in plan.steps:
        linear = plan.maker(step.inputs[0]) if step.op == "attention" and len(step.inputs) == 1 else None
        if linear is not None and linear.op == "linear" and plan.only_user(linear.out) is step:
            yield step, linear


def _softmax_scale(plan: Plan) -> Plan:
    draft = _Draft(plan)
    for attention, linear in _of_attention(plan):
        tensors = {}
        for role in linear.constants:
            tensors[role] = draft.wide(linear, role).clone()
            tensors[role][: len(tensors[role]) // 3] *= attention.options["scale"]
        draft.put(linear, **tensors)
        draft.put(attention, options={"scale": 1.0})
    return draft.done()


def _learned_query(plan: Plan) -> Plan:
    draft = _Draft(plan)
    for latent in plan.steps:
        linear = plan.only_user(latent.out) if latent.op == "latent" else None
        if linear is None or linear.op != "linear":
            continue
        row, bias = draft.wide(latent, "weight") @ draft.wide(linear, "weight").T, draft.wide(linear, "bias")
        draft.put(latent, drop=linear.out, out=linear.out, weight=row if bias is None else row + bias)
    return draft.done()


def _key_bias(plan: Plan) -> Plan:
    draft = _Draft(plan)
    for _, linear in _of_attention(plan):
        bias = draft.wide(linear, "bias")
        if bias is not None:
            third = len(bias) // 3
            bias = bias.clone()
            bias[third : 2 * third] = 0
            draft.put(linear, bias=bias)
    return draft.done()


def _value_bias(plan: Plan) -> Plan:
    draft = _Draft(plan)
    for attention, linear in _of_attention(plan):
        bias, proj = draft.wide(linear, "bias"), plan.only_user(attention.out)
        if bias is None or proj is None or proj.op != "linear":
            continue
        third = len(bias) // 3
        moved = draft.wide(proj, "weight") @ bias[2 * third :]
        own, bias = draft.wide(proj, "bias"), bias.clone()
        bias[2 * third :] = 0
        draft.put(proj, bias=moved if own is None else own + moved)
        draft.put(linear, bias=bias)
    return draft.done()


def _position_table(plan: Plan) -> Plan:
    draft = _Draft(plan)
    for embed in plan.steps:
        assemble = plan.only_user(embed.out) if embed.op == "patch_embed" else None
        if assemble is None or assemble.op != "assemble" or "positions" not in assemble.constants:
            continue
        table, prefix = draft.wide(assemble, "positions"), draft.wide(assemble, "prefix")
        rows, count = assemble.options["prefix_rows"], assemble.options["prefix_tokens"]
        before = table[:rows]
        if prefix is not None:
            before = prefix + before if rows else prefix
        tensors = {}
        for kind in ("", PIXEL):
            bias = draft.wide(embed, f"{kind}bias")
            if bias is not None or not kind:
                patches = table[rows:] if bias is None else table[rows:] + bias
                tensors[f"{kind}positions"] = torch.cat([before, patches])
        draft.put(embed, bias=None, **{f"{PIXEL}bias": None})
        draft.put(assemble, prefix=None, options={"prefix_rows": count}, **tensors)
    return draft.done()


def _rows_read(plan: Plan) -> Plan:
    """Leave rows out as early as can be: before steps that treat each row alone, and, of queries, before attention."""
    while True:
        for rows in plan.steps:
            stop = rows.options.get("stop") if rows.op == "rows" else None
            if stop is None:  # of nearly all rows there is nothing to gain
                continue
            moved = _move_up(plan, rows)
            if moved is not None:
                plan = moved
                break
        else:
            return plan


def _move_up(plan: Plan, rows: Step) -> Plan | None:
    """The plan with this step moved before what makes its input; None where it cannot be."""
    value = rows.inputs[0]
    made, users = plan.maker(value), plan.users(value)
    if made is None or value in plan.outputs.values():
        return None
    alike = all(user.op == "rows" and user.options == rows.options for user in users)
    if not alike:
        return None
    draft = _Draft(plan)
    for other in users:
        if other is not rows:  # the same rows of the same value
            draft.steps = [
                replace(s, inputs=tuple(rows.out if name == other.out else name for name in s.inputs))
                for s in draft.steps
                if s.out != other.out
            ]
    if len(users) > 1:
        return draft.done()
    at = draft.steps.index(made)

    def cut(name: str) -> Step:
        return Step(f"{name}[{rows.options['start']}:{rows.options['stop']}]", "rows", (name,), {}, rows.options)

    draft.steps = [s for s in draft.steps if s is not rows]
    if made.op in ROW_WISE:
        before = [cut(name) for name in dict.fromkeys(made.inputs)]
        new = replace(made, out=rows.out, inputs=tuple(cut(name).out for name in made.inputs))
        there = {step.out for step in draft.steps}
        draft.steps[at : at + 1] = [step for step in before if step.out not in there] + [new]
        return _in_order(draft.done())
    linear = plan.maker(made.inputs[0])
    single = len(made.inputs) == 1 and plan.only_user(made.inputs[0]) is made
    if made.op != "attention" or not single or linear is None or linear.op != "linear" or len(linear.inputs) > 1:
        return None
    weight, bias = draft.wide(linear, "weight"), draft.wide(linear, "bias")
    third = len(weight) // 3
    few = cut(linear.inputs[0])
    new = []
    for name, source, part in (("q", few.out, slice(0, third)), ("kv", linear.inputs[0], slice(third, None))):
        constants = {}
        for role, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                constants[role] = f"{linear.out}.{name}.{role}"
                draft.constants[constants[role]] = tensor[part]
        new.append(Step(f"{linear.out}.{name}", "linear", (source,), constants))
    attention = replace(made, out=rows.out, inputs=tuple(step.out for step in new))
    draft.steps[at : at + 1] = [few, *new, attention]
    draft.steps.remove(linear)
    return draft.done()


def _in_order(plan: Plan) -> Plan:
    """Steps sorted so that each comes after what it takes, otherwise as they are."""
    waiting, done, steps = list(plan.steps), set(), []
    made = {step.out for step in plan.steps}
    while waiting:
        step = next(s for s in waiting if all(name in done or name not in made for name in s.inputs))
        waiting.remove(step)
        done.add(step.out)
        steps.append(step)
    return replace(plan, steps=tuple(steps))


def _fused(plan: Plan) -> Plan:
    draft = _Draft(plan)
    for linear in plan.steps:
        user = plan.only_user(linear.out) if linear.op == "linear" else None
        if user is None:
            continue
        if user.op == "activation":
            draft.put(linear, drop=user.out, out=user.out, options={"activation": user.options["kind"]})
        elif user.op == "add":
            (other,) = [name for name in user.inputs if name != linear.out]
            step = replace(linear, out=user.out, inputs=(*linear.inputs, other))
            draft.steps = [step if s is user else s for s in draft.steps if s.out != linear.out]
    return draft.done()


REWRITES: Mapping[str, Rewrite] = {
    rewrite.name: rewrite
    for rewrite in (
        Rewrite(
            "dead outputs",
            "steps whose result nobody reads are left out",
            "what is not read changes nothing",
            _dead,
        ),
        Rewrite(
            "normalisation",
            "uint8 pixels go into the patch projection as integers",
            "with V = W / (255 std): W ((x / 255 - mean) / std) + b = V (x - c) + (b + V (c - 255 mean))",
            _normalisation,
        ),
        Rewrite(
            "layer scale",
            "layer-scale into proj and fc2",
            "gamma * (W x + b) = (diag(gamma) W) x + gamma * b",
            _layer_scale,
        ),
        Rewrite(
            "norm into linear",
            "weight and bias of a LayerNorm into the linear layer after it",
            "W (gamma * n + beta) + b = (W diag(gamma)) n + (W beta + b)",
            lambda plan: _norm_into_linear(plan, ()),
        ),
        Rewrite(
            "norm into head",
            "those of the last LayerNorm through pooling into the head",
            "a row, or the mean of rows, of gamma * n + beta is gamma * (that of n) + beta",
            lambda plan: _norm_into_linear(plan, ("rows", "flatten", "pool")),
        ),
        Rewrite(
            "heads averaged",
            "a distilled model's two heads into one",
            "(W1 x1 + b1 + W2 x2 + b2) / 2 = [W1 / 2, W2 / 2] [x1; x2] + (b1 + b2) / 2",
            _heads_averaged,
        ),
        Rewrite(
            "softmax scale",
            "the scale of attention into q",
            "scale * (q k^T) = (scale * q) k^T",
            _softmax_scale,
        ),
        Rewrite(
            "learned query",
            "the projection of an attention pool's query is computed once",
            "it does not depend on the image",
            _learned_query,
        ),
        Rewrite(
            "key bias",
            "the bias of k is dropped",
            "q (k + b)^T = q k^T + q b^T, one number for a whole row of scores, and softmax(s + c) = softmax(s)",
            _key_bias,
        ),
        Rewrite(
            "value bias",
            "the bias of v into that of proj",
            "each row of P sums to 1: W (P (v + b)) = W (P v) + W b",
            _value_bias,
        ),
        Rewrite(
            "position table",
            "the patch projection's bias and the prefix tokens into the position table",
            "(W x + b) + p = W x + (b + p), and [prefix + p0; ...] does not depend on the image",
            _position_table,
        ),
        Rewrite(
            "rows read",
            "the last block for the tokens that are read, keys and values of all",
            "every step but attention treats each row alone, and a row of attention needs its own query only",
            _rows_read,
        ),
        Rewrite(
            "fused",
            "activation and residual sum into the linear step before them",
            "the same numbers, in one step",
            _fused,
        ),
    )
}

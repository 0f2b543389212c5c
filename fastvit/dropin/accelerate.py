"""`accelerate` and `restore`: which modules of a model are swapped, and a table that says what and why."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from fastvit.nn.layers import forward_is_its_classes, submodules
from fastvit.report import Table

from .forwards import known_forward
from .layouts import (
    ATTENTIONS,
    BLOCKS,
    MLPS,
    AttentionLayout,
    BlockLayout,
    MlpLayout,
    activation_of,
    draw_of,
    gamma_name,
    is_drop_path,
    is_dropout,
    is_layer_scale,
    is_linear,
    is_norm,
    is_nothing,
    known_layout,
)
from .plans import AttentionPlan, BlockPlan, Branch, MlpPlan, PatchPlan, Plan, SequencePlan, is_patch_projection, plain
from .swap import is_wrapped, original_class, swap, swapped_class, swapped_kind

_NOTHING = "it has no module that fastvit knows"
KINDS = ("patch_embed", "attention", "mlp", "block")


class NotTaken(Exception):
    """Why a module is left alone."""


@dataclass(frozen=True)
class Entry:
    """One module: its name in the model, one of KINDS, its class, whether it was swapped, the options that were found
    in it, and if it was not swapped, why."""

    name: str
    kind: str
    cls: str
    swapped: bool
    options: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Summary:
    """What `accelerate` did: an entry for each module, options of the whole model, and the accelerated model. As text
    it is a table, with alike modules in one row."""

    model: nn.Module = field(repr=False)
    entries: tuple[Entry, ...]
    options: tuple[str, ...] = ()

    @property
    def swapped(self) -> tuple[Entry, ...]:
        """The modules that now run on the ops."""
        return tuple(entry for entry in self.entries if entry.swapped)

    @property
    def left_alone(self) -> tuple[Entry, ...]:
        """The modules that run as before, each with its reason."""
        return tuple(entry for entry in self.entries if not entry.swapped)

    def __str__(self) -> str:
        name = type(self.model).__name__
        if not self.entries:
            return f"{name}: nothing swapped; {_NOTHING}"
        alike: dict[tuple, list[str]] = {}
        for entry in self.entries:
            what = (entry.kind, entry.cls, "swapped" if entry.swapped else "left alone", entry.reason or entry.options)
            alike.setdefault(what, []).append(entry.name)
        cells = [(_names(names), *what) for what, names in alike.items()]
        headings = ("modules", "kind", "class", "what", "options, or why not")
        text = io.StringIO()
        text.write(f"{name}: {len(self.swapped)} modules swapped, {len(self.left_alone)} left alone\n")
        text.write("".join(f"{line}\n" for line in self.options))
        table = Table(
            {heading: -max(len(row[i]) for row in (headings, *cells)) for i, heading in enumerate(headings)}, text
        )
        for row in cells:
            table.row(*row)
        return text.getvalue().rstrip("\n")


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})"


def accelerate(
    model: nn.Module, *, inplace: bool = True, modules: Iterable[str] = KINDS, strict: bool = False
) -> Summary:
    """Run the Vision Transformer blocks of a model from timm, torchvision or transformers on fastvit's kernels.

    model may be, or hold, any model of theirs, or of code copied from theirs; it keeps its class, parameters, buffers,
    hooks, state_dict and options. Each module whose structure and forward pass are known gets a subclass of its class,
    whose forward pass is one op wherever the kernels may run and nobody can tell, and else its own: on a CPU the
    numbers are the same to the bit. inplace=False leaves model alone and swaps a deep copy, the summary's `model`.
    modules: what to swap, of "block" (whole blocks as `ops.transformer_block`), "attention" and "mlp" (where a block is
    not swapped whole: the attention itself, and a block's second branch with its LayerNorm) and "patch_embed".

    Returns a `Summary`, to be printed. With strict=True a model of which anything asked for would be left alone is an
    error. Raises TypeError for a model that is no module, ValueError for names that are not in modules, and with strict
    for a model that is not wholly taken, with every reason; then nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    kinds = [modules] if isinstance(modules, str) or not isinstance(modules, Iterable) else list(modules)
    if isinstance(modules, str) or not kinds or any(kind not in KINDS for kind in kinds):
        raise ValueError(f"modules is {modules!r}, expected some of {', '.join(KINDS)}")
    found = list(_find(model, kinds))
    summary = Summary(model, tuple(entry for entry, _, _ in found if entry is not None), _model_options(model))
    if strict and (summary.left_alone or not summary.swapped):
        reasons = [f"{entry.name}: {entry.reason}" for entry in summary.left_alone] or [_NOTHING]
        raise ValueError("strict is True, but model is not wholly taken:\n" + "\n".join(dict.fromkeys(reasons)))
    if not inplace:
        model = copy.deepcopy(model)
        summary = Summary(model, summary.entries, summary.options)
    for _, name, plan in found:
        if plan is not None:
            module = model.get_submodule(name)
            swap(module, swapped_class(type(module), plan))
    return summary


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`: every module that it swapped gets its own class back, in place. Returns the model; one that
    was not accelerated is left as it is.

    Raises TypeError for a model that is no module, ValueError for one whose swapped modules somebody else has given yet
    another class since, as FSDP does; then nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    for name, module in model.named_modules():
        if is_wrapped(module):
            where = f"model.{name}" if name else "model"
            raise ValueError(f"{where} is a {type(module).__name__} now, which no longer can be restored")
    for module in model.modules():
        if (original := original_class(module)) is not None:
            swap(module, original)
    return model


# --------------------------------------------------------------------------------------------------------------------
# What is found in a model


def _find(model: nn.Module, kinds: list[str]) -> Iterator[tuple[Entry | None, str, Plan | None]]:
    """(entry, name, plan) of each module that is swapped or, with no plan, left alone."""
    inside: tuple[str, ...] = ()  # names of modules whose parts are not looked at begin with these
    widths: set[int] = set()
    whole: set[str] = set()
    selves: set[nn.Module] = set()  # the attentions of known blocks: what else is nn.MultiheadAttention may be any
    for name, module in model.named_modules():
        if name.startswith(inside):  # () begins nothing
            continue
        where = name or "the model itself"
        cls = f"{type(module).__module__}.{type(module).__qualname__}"
        if (kind := swapped_kind(module)) is not None:
            yield Entry(where, kind, cls, False, reason="it is accelerated already"), name, None
            inside += (_prefix(name),)
        elif (block := known_layout(BLOCKS, module)) is not None:
            widths |= _widths(module)
            selves.add(module._modules.get(block.attention))
            for kind in [kind for kind in ("block", "mlp") if kind in kinds]:
                part = where if kind == "block" or not block.mlp else f"{where}.{block.mlp}"
                entry, plan = _tried(part, kind, cls, _PLANNERS[kind], module)
                yield entry, name, plan
                if plan is None:
                    continue
                if kind == "block":
                    inside += (_prefix(name),)
                    whole.add(name)
                break
        elif known_layout(ATTENTIONS, module) is not None:
            if "attention" in kinds and (type(module) is not nn.MultiheadAttention or module in selves):
                entry, plan = _tried(where, "attention", cls, _attention_plan, module)
                yield entry, name, plan
        elif _looks_like_block(module):
            widths |= _widths(module)
            if "block" in kinds:
                yield Entry(where, "block", cls, False, reason=_unknown(module)), name, None
    for name, module in model.named_modules():
        if type(module) is nn.Sequential and len(module) > 1:
            if all(f"{_prefix(name)}{child}" in whole for child in module._modules):
                yield None, name, SequencePlan()
        elif "patch_embed" in kinds and _is_patch_embedding(module, widths):
            ph, pw = module.kernel_size
            options = f"patches of {ph} x {pw}, {_bias('bias', module.bias)}"
            yield Entry(name, "patch_embed", "torch.nn.Conv2d", True, options), name, PatchPlan()


def _unknown(block: nn.Module) -> str:
    """Why a block is left alone whose forward pass is not known, as far as its arguments tell."""
    if type(block).__module__.startswith("fastvit."):
        return "it is fastvit's own"
    asked = inspect.signature(type(block).forward).parameters
    positions = [what for name, what in _POSITIONS.items() if name in asked]
    return "; ".join(["fastvit does not know its forward pass", *positions])


_POSITIONS = {
    "rope": "it takes rotary positions",
    "position_embeddings": "it takes rotary positions",
    "shared_rel_pos_bias": "it takes relative positions",
}


def _prefix(name: str) -> str:
    return f"{name}." if name else ""


def _tried(where: str, kind: str, cls: str, planner: Callable, module: nn.Module) -> tuple[Entry, Plan | None]:
    try:
        if not forward_is_its_classes(module):
            raise NotTaken("it has a forward of its own")
        plan, options = planner(module)
    except NotTaken as reason:
        return Entry(where, kind, cls, False, reason=str(reason)), None
    return Entry(where, kind, cls, True, options), plan


def _is_patch_embedding(module: nn.Module, widths: set[int]) -> bool:
    """Whether it projects patches to tokens as wide as blocks are."""
    plain_conv = type(module) is nn.Conv2d and module.out_channels in widths
    return plain_conv and is_patch_projection(module) and plain(module.parameters())


def _looks_like_block(module: nn.Module) -> bool:
    """Whether it may be a block of a transformer, to be named among what is left alone: norms and other parts side by
    side, linear layers in them, and no block inside."""
    norms = [child for child in module.children() if "Norm" in type(child).__name__]
    if len(norms) < 2 or sum(isinstance(child, nn.Linear) for child in module.modules()) < 4:
        return False
    inner = [child for child in module.modules() if child is not module]
    return not any(known_layout(BLOCKS, child) is not None or _looks_like_block(child) for child in inner)


def _widths(block: nn.Module) -> set[int]:
    return {norm.normalized_shape[-1] for norm in block.children() if isinstance(norm, nn.LayerNorm)}


def _has(module: nn.Module, name: str) -> nn.Module | None:
    """The module inside, itself for ""; None where there is none."""
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _part(module: nn.Module, name: str, test: Callable[[nn.Module], bool], expected: str) -> nn.Module:
    part = _has(module, name)
    if part is None or not test(part):
        raise NotTaken(f"its {name} is a {type(part).__name__}, expected {expected}")
    return part


def _inner(block: nn.Module, name: str, layouts: dict):
    """The module `name` of a block, and its layout."""
    inner = _has(block, name)
    if inner is not None and swapped_kind(inner) is not None:
        raise NotTaken(f"its {name} is accelerated already")
    layout = None if inner is None else known_layout(layouts, inner)
    if layout is None:
        raise NotTaken(f"fastvit does not know the forward pass of its {name}, a {type(inner).__name__}")
    if reason := layout.refuse(inner):
        raise NotTaken(f"of its {name}: {reason}")
    return inner, layout


def _layers(inner: nn.Module, linear: tuple[str, ...], layout: AttentionLayout | MlpLayout) -> tuple[str, ...]:
    """Look at linear layers, and at what else a call goes through, of which the names are returned."""
    for name in linear:
        _part(inner, name, is_linear, "nn.Linear")
    # What a library's older version has not.
    nothing = tuple(name for name in layout.nothing if hasattr(inner, name))
    for name in layout.dropouts:
        _part(inner, name, is_dropout, "nn.Dropout")
    for name in nothing:
        _part(inner, name, is_nothing, "nn.Identity")
    for name, known in layout.inside:
        _part(inner, name, lambda part, known=known: known_forward(type(part)) == known, "one that is known")
    return (*layout.dropouts, *nothing, *[name for name, _ in layout.inside])


def _named(inner: str, names: Iterable[str]) -> tuple[str, ...]:
    """The names of an inner module's parts in the module around it."""
    return tuple(f"{_prefix(inner)}{name}" for name in names)


def _after(block: nn.Module, layout: BlockLayout, number: int) -> dict:
    """The part of a `Branch` that comes after the module inside it."""
    found: dict = {"others": layout.dropouts, "layer_scale": None, "drop_path": None}
    for name in layout.dropouts:
        _part(block, name, is_dropout, "nn.Dropout")
    if layout.layer_scales and layout.layer_scales[number] in block._parameters:
        found["layer_scale"] = ("", layout.layer_scales[number])
    elif layout.layer_scales and getattr(block, layout.layer_scales[number], block) is not None:
        name = layout.layer_scales[number]
        module = _part(block, name, is_layer_scale, "a layer-scale")
        found["others"] += (name,)
        found["layer_scale"] = None if is_nothing(module) else (name, gamma_name(module))
    if layout.drop_paths:
        name = layout.drop_paths[number]
        module = _part(block, name, is_drop_path, "drop path")
        found["others"] += (name,)
        found["drop_path"] = None if is_nothing(module) else (name, draw_of(module))
    return found


def _branch(block: nn.Module, norm: str, inner: str, layers, others, after: dict) -> Branch:
    """layers and others as in `Branch`, of the module `inner`."""
    _part(block, norm, is_norm, "a LayerNorm with weight and bias")
    others = (*((inner,) if inner else ()), *_named(inner, others), *after["others"])
    branch = Branch(norm, _named(inner, layers), **{**after, "others": others})
    modules = branch.modules(block)
    for module in modules:
        if not plain(module._parameters.values()):
            kinds = sorted({type(p).__name__ for p in module._parameters.values() if not plain([p])})
            raise NotTaken(f"it holds {', '.join(kinds)}, quantised or distributed")
    return replace(branch, roles=tuple((type(module),) for module in modules))


def _first(block: nn.Module, layout: BlockLayout, attention: nn.Module, inside: AttentionLayout) -> Branch:
    names = (*inside.qkv, inside.proj)
    others = _layers(attention, names, inside)
    return _branch(block, layout.norm1, layout.attention, names, others, _after(block, layout, 0))


def _second(block: nn.Module, layout: BlockLayout) -> tuple[Branch, MlpLayout, str]:
    mlp, inside = _inner(block, layout.mlp, MLPS)
    others = _layers(mlp, (*inside.fc1, inside.fc2), inside)
    acts = (inside.act,) if inside.act else ()
    act = _part(mlp, inside.act, lambda act: True, "an activation") if acts else None
    activation = activation_of(act) if acts else "silu"
    if activation is None:
        raise NotTaken(f"its activation is a {type(act).__name__}, which the ops have not")
    layers = (*inside.fc1, *acts, inside.fc2)
    branch = _branch(block, layout.norm2, layout.mlp, layers, others, _after(block, layout, 1))
    return branch, inside, activation


def _block_plan(block: nn.Module) -> tuple[BlockPlan, str]:
    layout = known_layout(BLOCKS, block)
    attention, inside = _inner(block, layout.attention, ATTENTIONS)
    first = _first(block, layout, attention, inside)
    second, mlp, activation = _second(block, layout)
    dim, heads = block._modules[layout.norm1].normalized_shape, inside.num_heads(attention)
    rows = [layer.weight for layer in submodules(attention, inside.qkv)] or [attention.in_proj_weight]
    proj = attention.get_submodule(inside.proj).weight
    if len(dim) != 1 or sum(w.shape[0] for w in rows) != 3 * dim[0] or tuple(proj.shape) != dim * 2 or dim[0] % heads:
        raise NotTaken("its attention's width is not its own")
    plan = BlockPlan(layout, inside, mlp, first, second, activation)
    options = [f"{heads} heads of {dim[0] // heads}", _eps(block, layout.norm1, layout.norm2), activation]
    options.append(_bias("qkv bias", _qkv_biases(attention, inside)))
    return plan, ", ".join([*options, *_branch_options(block, second)])


def _mlp_plan(block: nn.Module) -> tuple[MlpPlan, str]:
    layout = known_layout(BLOCKS, block)
    second, mlp, activation = _second(block, layout)
    fc1, fc2 = submodules(block.get_submodule(layout.mlp), (mlp.fc1[0], mlp.fc2))
    if len(mlp.fc1) > 1 or fc1.out_features != fc2.in_features:
        raise NotTaken("it is gated, which only whole blocks may be")
    first = _after(block, layout, 0)
    if first["layer_scale"] and not first["layer_scale"][0]:
        raise NotTaken("its layer-scale is no module, which only whole blocks may have")
    plan = MlpPlan(layout, mlp, second, first["others"], activation)
    return plan, ", ".join([_eps(block, layout.norm2), activation, *_branch_options(block, second)])


def _attention_plan(attention: nn.Module) -> tuple[AttentionPlan, str]:
    layout = known_layout(ATTENTIONS, attention)
    if reason := layout.refuse(attention):
        raise NotTaken(reason)
    names = (*layout.qkv, layout.proj)
    names += _layers(attention, names, layout)
    rows, heads = {layer.out_features for layer in submodules(attention, layout.qkv)}, layout.num_heads(attention)
    if len(rows) > 1 or sum(rows) % heads:
        raise NotTaken("its queries, keys and values have not all as many heads")
    if not plain(attention.parameters()):
        raise NotTaken("its weights are quantised or distributed")
    roles = tuple((type(module),) for module in submodules(attention, names))
    options = f"{heads} heads, {_bias('qkv bias', _qkv_biases(attention, layout))}"
    return AttentionPlan(layout, names, roles), options


_PLANNERS = {"block": _block_plan, "mlp": _mlp_plan}


# --------------------------------------------------------------------------------------------------------------------
# Options


def _eps(block: nn.Module, *norms: str) -> str:
    found = dict.fromkeys(f"{block._modules[norm].eps:g}" for norm in norms)
    return f"eps {' and '.join(found)}"


def _qkv_biases(attention: nn.Module, layout: AttentionLayout) -> list[torch.Tensor | None]:
    if layout.biases is not None:
        return layout.biases(attention)
    return [layer.bias for layer in submodules(attention, layout.qkv)] or [attention.in_proj_bias]


def _bias(what: str, bias) -> str:
    there = [value is not None for value in (bias if isinstance(bias, list) else [bias])]
    return what if all(there) else f"some {what}" if any(there) else f"no {what}"


def _branch_options(block: nn.Module, branch: Branch) -> list[str]:
    found = []
    if branch.layer_scale:
        found.append("layer-scale")
    if branch.drop_path:
        found.append(f"drop path {block._modules[branch.drop_path[0]].drop_prob:g}")
    return found


_TABLES = ("pos_embed", "pos_embedding", "position_embeddings")


def _model_options(model: nn.Module) -> tuple[str, ...]:
    """Registers and positions, which stay as they are."""
    counts = [getattr(module, "num_patches", None) for module in model.modules()]
    patches = next((count for count in counts if isinstance(count, int)), None)
    found = []
    for name, tensor in model.named_parameters():
        last = name.rpartition(".")[2]
        if last in ("reg_token", "register_tokens"):
            found.append(f"{name}: {tensor.shape[-2]} registers")
        elif last in _TABLES or name.endswith("position_embedding.weight"):
            rows = tensor.shape[-2]
            others = f", {rows - patches} of them for other tokens than patches" if patches and rows >= patches else ""
            found.append(f"{name}: {rows} learned positions{others}, added and resampled as the model does")
    return tuple(found)

"""`fastvit.accelerate`: the numbers of every family, on the kernels, against the model as it was and the same in
float64."""

from __future__ import annotations

import copy

import pytest
import torch
from dropin_models import BY_NAME, every_family, gradients_of, images

import fastvit
from fastvit import dispatch
from fastvit.accuracy import FACTOR, relative_rms
from fastvit.dropin import plans

EXACT = 2e-6  # what float32 outputs may be off by, relative rms, where the library's are as near


def errors(family, dtype, model=None) -> dict[str, tuple[float, float]]:
    """By name of an output or gradient the relative error in `dtype` of the accelerated model and of the library's."""
    model = (model or family.model()).to(dtype)
    x = images(6, dtype)
    truth = gradients_of(family, copy.deepcopy(model).double(), x.double())
    before = gradients_of(family, model, x)
    summary = fastvit.accelerate(model, strict=True)
    assert len(summary.swapped) == 3
    ran = []
    with fastvit.use_backend("triton"), dispatch.watching(lambda op, args: ran.append(op.name)):
        after = gradients_of(family, model, x)
    assert ran == ["patch_embed", "transformer_block", "transformer_block"]
    assert after.keys() == before.keys() == truth.keys()
    assert [value.dtype for value in after.values()] == [value.dtype for value in before.values()]

    def error(found, name):
        if not name.endswith("k_proj.bias"):
            return relative_rms(found[name], truth[name])
        # Softmax cannot see it: its gradient is zero, and what is left of it is judged beside its like of the queries.
        size = truth[name.replace("k_proj", "q_proj")].norm()
        return (found[name].double().norm() / size).item()

    return {name: (error(after, name), error(before, name)) for name in truth}


def too_large(found: dict[str, tuple[float, float]], dtype) -> list[str]:
    """What is wrong: outputs by name, and of all gradients together the rms or the largest error."""
    outputs = {name: pair for name, pair in found.items() if not name.startswith("d ")}
    wrong = [
        name
        for name, (ours, theirs) in outputs.items()
        if not ours <= (EXACT if dtype == torch.float32 and theirs <= EXACT else FACTOR[dtype] * theirs)
    ]
    ours, theirs = torch.tensor([pair for name, pair in found.items() if name not in outputs]).T
    for what in ("rms", "largest"):
        mine, its = (e.square().mean().sqrt() if what == "rms" else e.max() for e in (ours, theirs))
        wrong += [] if mine <= FACTOR[dtype] * its else [f"{what} of the gradients, {mine:.2g} beside {its:.2g}"]
    return wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_family
def test_outputs_and_gradients(family, dtype):
    assert too_large(errors(family, dtype), dtype) == []


@every_family
def test_options_are_what_the_model_has(family):
    blocks = [entry for entry in fastvit.accelerate(family.model()).entries if entry.kind == "block"]
    assert [entry.options for entry in blocks] == [f"3 heads of 16, {family.options}"] * 2


packed, scales, run = plans.packed, plans.Branch.scales, fastvit.ops.run_transformer_block
EPS = dispatch.OPS["transformer_block"].parameters.index("eps1")
FAULTS = {
    "keys for queries": (plans, "packed", lambda layers: packed([layers[1], layers[0], *layers[2:]])),
    "tanh": (plans, "_activation", lambda module, found: "gelu_tanh"),
    "no layer-scale": (plans.Branch, "scales", lambda *args: (torch.ones_like(g := scales(*args)[0]) + 0 * g, None)),
    "eps": (plans.ops, "run_transformer_block", lambda args, _: run((*args[:EPS], 1e-5, *args[EPS + 1 :]))),
    "none": (plans, "packed", packed),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, monkeypatch):
    family = BY_NAME["transformers Dinov2"]
    model = family.model(use_mask_token=False)
    with torch.no_grad():  # so small that eps matters
        for parameter in model.embeddings.parameters():
            parameter.mul_(0.01)
    where, name, wrong = FAULTS[fault]
    if name == "packed" and fault != "none":
        monkeypatch.setattr(where, name, lambda layers: wrong(layers) if len(layers) == 3 else packed(layers))
    else:
        monkeypatch.setattr(where, name, wrong)
    assert bool(too_large(errors(family, torch.float32, model), torch.float32)) == (fault != "none")

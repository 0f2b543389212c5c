"""`fastvit.accelerate`: the numbers of every family, on the kernels, against the model as it was and the same in
float64."""

from __future__ import annotations

import pytest
import torch
from dropin_checks import check_numbers, check_other, errors, too_large
from dropin_models import BY_NAME, OTHERS, every_family

import fastvit
from fastvit import dispatch
from fastvit.dropin import plans


def some(*names: str):
    """These families; the others in `make test-all`."""
    marks = {name: () if name in names else pytest.mark.slow for name in BY_NAME}
    assert {*names} <= {*BY_NAME}
    return pytest.mark.parametrize(
        "family", [pytest.param(family, marks=marks[name], id=name) for name, family in BY_NAME.items()]
    )


# One of each way to put a block together.
IN_HALF = (
    "timm ViT",
    "timm DINOv2",
    "timm DINOv3",
    "torchvision ViT",
    "transformers ViT",
    "transformers SigLIP vision",
)


@some(*IN_HALF, "timm DINOv2 giant", "timm CLIP", "timm ViT, no qkv bias, tanh", "timm EVA-02", "transformers Dinov2",
      "transformers Dinov2, SwiGLU", "transformers DINOv3ViT, gated", "transformers CLIP vision")  # fmt: skip
def test_outputs_and_gradients(family):
    check_numbers(family, torch.float32)


@some(*IN_HALF)
def test_outputs_and_gradients_in_bfloat16(family):
    check_numbers(family, torch.bfloat16)


@pytest.mark.parametrize("name", OTHERS)
def test_outputs_of_other_models_with_the_same_layers(name):
    check_other(name)


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
    "eps": (plans.ops, "run_transformer_block", lambda args, own: run((*args[:EPS], 1e-5, *args[EPS + 1 :]), own)),
    "none": (plans, "packed", packed),
}


@pytest.mark.parametrize(
    "fault",
    ["keys for queries", "none", *(pytest.param(f, marks=pytest.mark.slow) for f in ("tanh", "no layer-scale", "eps"))],
)
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

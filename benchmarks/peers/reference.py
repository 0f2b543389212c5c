"""The plain function that is fastvit's truth, on a copy of the weights."""

from __future__ import annotations

import fastvit
from fastvit.verify import reference_options

from . import Built


def build(peer, case, ours, inputs) -> Built:
    training = case.mode == "training"
    state = {name: tensor.detach().clone().requires_grad_(training) for name, tensor in ours.state_dict().items()}
    options = reference_options(ours.config)
    return Built(lambda images: fastvit.reference.vision_transformer(images, state, **options))

"""fastvit on its PyTorch back end, eager or under torch.compile."""

from __future__ import annotations

import copy

import fastvit

from . import Built
from ._common import compiled


def build(peer, case, ours, inputs) -> Built:
    function = getattr(fastvit.ops, case.op) if case.op else copy.deepcopy(ours)
    if peer.name == "compiled":
        function = compiled(function)

    def call(*args, **kwargs):
        with fastvit.use_backend("torch"):
            return function(*args, **kwargs)

    return Built(call)

"""Our model and timm's, of the same weights. Modules that import this are skipped where there is no timm."""

from __future__ import annotations

import pytest
import torch

import fastvit
from fastvit import dispatch

timm = pytest.importorskip("timm")

NAME = "vit_tiny_patch16_224"
BACKENDS = ["torch", "triton"] if dispatch.interpreting() else ["torch"]
on_kernels = pytest.mark.skipif(not dispatch.interpreting(), reason="on CPU tensors kernels need the interpreter")
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}


def randomised(model):
    """`model` in evaluation, with weights far from their start, so that nothing is small by chance."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def pair(name=NAME, **overrides):
    """Our model and timm's, small, of the same weights, in evaluation."""
    arguments = {**SMALL, **overrides}
    peer = randomised(timm.create_model(name, **arguments))
    model = fastvit.create_model(name, **arguments).eval()
    model.load_state_dict(peer.state_dict())
    return model, peer


def close(got, want, rtol=1e-3, atol=1e-4):
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}

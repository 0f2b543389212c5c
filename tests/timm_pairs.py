"""Our models and timm's of the same weights, small. Tests that use it need timm."""

from __future__ import annotations

import pytest
import torch

import fastvit

timm = pytest.importorskip("timm")

NAME = "vit_tiny_patch16_224"
DISTILLED = "deit_tiny_distilled_patch16_224"
REGISTERS = "vit_small_patch14_reg4_dinov2"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def pair(name=NAME, ours=None, **overrides):
    """Our model and timm's, small, of the same random weights, in evaluation; `ours` is for our model alone."""
    arguments = {**SMALL, **overrides}
    peer = timm.create_model(name, **arguments).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model = fastvit.create_model(name, **{**arguments, **(ours or {})}).eval()
    model.load_state_dict(peer.state_dict(), strict=not ours)
    return model, peer


def close(got, want):
    torch.testing.assert_close(got, want, **CLOSE)

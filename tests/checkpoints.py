"""Small models and their checkpoints, for the tests of what is read. Tests that use it need safetensors."""

from __future__ import annotations

import pytest
import torch

import fastvit

safetensors = pytest.importorskip("safetensors.torch")

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def small(name="vit_tiny_patch16_224", **overrides):
    """A small model with random parameters."""
    model = fastvit.create_model(name, **{**SMALL, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def saved(path, tensors):
    """`tensors` at `path`, in the format of its ending."""
    if path.suffix == ".safetensors":
        safetensors.save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


def assert_state(model, want):
    torch.testing.assert_close(dict(model.state_dict()), dict(want), rtol=0, atol=0)

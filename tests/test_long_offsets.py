"""Every op on tensors that 32-bit offsets do not reach: see "The contract of an op" in docs/architecture.md."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from samples import SAMPLES, results

from fastvit import ops
from fastvit.dispatch import interpreting

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.mark.skipif(not interpreting(), reason="needs a few GB of lazily allocated memory, which a GPU does not have")
class TestBeyond32Bits:
    """Views whose last element lies past 2**31: an int32 offset would wrap."""

    def view(self, shape, dtype=torch.bfloat16):
        stride = 2**31 // (shape[0] - 1) + 64
        rest = shape[1:]
        inner = [int(np.prod(rest[i + 1 :])) for i in range(len(rest))]
        elements = (shape[0] - 1) * stride + int(np.prod(rest))
        # numpy's zeros are mapped when touched: a few pages of these GBs ever are.
        buffer = torch.from_numpy(np.zeros(elements * dtype.itemsize, np.uint8)).view(dtype)
        view = buffer.as_strided(shape, (stride, *inner))
        view.copy_(torch.randn(shape) if dtype.is_floating_point else torch.randint(0, 256, shape))
        return view

    @pytest.mark.parametrize("name", ["layer_norm", "layer_norm_linear", "linear_residual", "layer_norm_mlp"])
    def test_rows(self, name):
        sample = next(s for s in SAMPLES if s.name == name)
        tensors = sample.tensors(torch.bfloat16)
        shape = (3, tensors["x"].shape[-1])
        tensors["x"] = self.view(shape).requires_grad_()
        for extra, size in (("residual", 3), ("drop_path_scale", 3)):
            if extra in tensors:
                tail = tensors[extra].shape[1:] if extra == "drop_path_scale" else tensors[extra].shape[2:]
                tensors[extra] = torch.rand(size, *tail).to(tensors[extra].dtype)
                tensors[extra].requires_grad_(extra == "residual")
        dense = {**tensors, "x": tensors["x"].detach().clone(memory_format=torch.contiguous_format).requires_grad_()}
        got, expected = results(sample, tensors), results(sample, dense)
        for key, value in expected.items():
            assert torch.equal(got[key], value), key

    @pytest.mark.parametrize("far", ["residual", "output gradient"])
    @pytest.mark.parametrize("name", ["layer_norm", "layer_norm_linear", "linear_residual", "layer_norm_mlp-residual"])
    def test_rows_of_the_rest(self, name, far):
        sample = next(s for s in SAMPLES if s.name == name)
        tensors = sample.tensors(torch.bfloat16)
        if far == "residual" and "residual" not in tensors:
            pytest.skip("takes no residual")
        tensors["x"] = torch.randn(3, tensors["x"].shape[-1]).bfloat16().requires_grad_()
        if "residual" in tensors:
            tensors["residual"] = torch.randn(3, tensors["residual"].shape[-1]).bfloat16().requires_grad_()
            tensors["drop_path_scale"] = torch.rand(3)
        upstream = torch.randn(sample.run(tensors).shape).bfloat16()
        expected = results(sample, tensors, upstream=upstream)
        view = self.view((3, upstream.shape[-1]))
        if far == "residual":
            tensors["residual"] = view.copy_(tensors["residual"].detach()).requires_grad_()
        else:
            upstream = view.copy_(upstream)
        for key, value in results(sample, tensors, upstream=upstream).items():
            assert torch.equal(value, expected[key]), key

    @pytest.mark.parametrize("axis", range(4), ids=["batch", "token", "qkv", "head"])
    def test_attention(self, axis):
        """The far axis of qkv is each in turn; token and batch also of the output gradient."""
        qkv = self.view((3, *[size for i, size in enumerate((2, 5, 3, 2, 16)) if i != axis])).movedim(0, axis)
        dense = qkv.clone(memory_format=torch.contiguous_format).requires_grad_()
        far = qkv.requires_grad_()
        out, expected = ops.attention(far), ops.attention(dense)
        assert torch.equal(out, expected)
        upstream = torch.randn(out.shape).bfloat16()
        (expected_grad,) = torch.autograd.grad(expected, dense, upstream)
        if axis < 2:
            upstream = self.view((3, *upstream.movedim(axis, 0).shape[1:])).movedim(0, axis).copy_(upstream)
        assert torch.equal(torch.autograd.grad(out, far, upstream)[0], expected_grad)

    @pytest.mark.parametrize("axis", range(4), ids=["batch", "head", "query", "key"])
    def test_attention_bias(self, axis):
        bias = self.view((3, 3, 3, 3)).movedim(0, axis).requires_grad_()
        dense = bias.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        qkv = torch.randn(3, 3, 3, 3, 16).bfloat16().requires_grad_()
        upstream = torch.randn(3, 3, 48).bfloat16()
        out, expected = ops.attention(qkv, attn_bias=bias), ops.attention(qkv, attn_bias=dense)
        assert torch.equal(out, expected)
        got = torch.autograd.grad(out, (qkv, bias), upstream)
        for value, want in zip(got, torch.autograd.grad(expected, (qkv, dense), upstream), strict=True):
            assert torch.equal(value, want)

    @pytest.mark.parametrize("axis", range(4), ids=["batch", "channel", "row", "column"])
    def test_patch_embed(self, axis):
        image = self.view((3, 3, 3, 3), torch.uint8).movedim(0, axis)
        size = 1 if axis < 2 else 3
        weight = torch.randn(24, 3, size, size, requires_grad=True)
        out, expected = ops.patch_embed(image, weight), ops.patch_embed(image.contiguous(), weight)
        assert torch.equal(out, expected)
        upstream = torch.randn_like(out)
        (got,), (want,) = (torch.autograd.grad(o, weight, upstream) for o in (out, expected))
        assert torch.equal(got, want)

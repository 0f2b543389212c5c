"""patch_embed beyond the contract: patch sizes, channels, layouts, pixel types, bad input."""

import pytest
import torch

from fastvit import ops, reference
from fastvit.accuracy import limit, relative_rms, rounding

pytestmark = pytest.mark.usefixtures("triton_backend")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def assert_matches(image, weight, dtype=torch.float32, **kwargs):
    """Forward and the gradients of weight and (floating) image, against float64 and plain PyTorch."""
    results = {}
    for name, function, to in (("truth", reference, torch.float64), ("plain", reference, dtype), ("ours", ops, dtype)):
        leaf = image.detach() if not image.is_floating_point() else image.detach().to(dtype).to(to).requires_grad_()
        w = weight.detach().to(dtype).to(to).requires_grad_()
        rows = {k: v.to(dtype).to(to) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        out = function.patch_embed(leaf, w, **rows)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(out)
        wanted = [w, leaf] if leaf.requires_grad else [w]
        results[name] = [out, *torch.autograd.grad(out, wanted, upstream)]
    for truth, plain, ours in zip(*results.values(), strict=True):
        assert relative_rms(ours, truth) <= limit(dtype, relative_rms(plain, truth), rounding(dtype))
    return results["ours"]


@pytest.mark.parametrize("patch", [(8, 8), (14, 14), (16, 16), (32, 32), (16, 8), (4, 10)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_patch_sizes(patch, dtype, device):
    height, width = patch
    image = torch.randn(2, 3, 2 * height, 3 * width, device=device)
    weight = torch.randn(40, 3, *patch, device=device) * 0.1
    prefix, table = torch.randn(1, 40, device=device), torch.randn(7, 40, device=device)
    assert_matches(image, weight, dtype, pos_embed=table, prefix=prefix)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_channel_counts(channels, device):
    image, weight = torch.randn(2, channels, 16, 24, device=device), torch.randn(24, channels, 8, 8, device=device)
    assert_matches(image, weight, mean=(0.5,) * channels, std=(0.25,) * channels)


def test_channels_last_gives_the_same_and_a_gradient_in_that_layout(device):
    image, weight = torch.randn(2, 3, 32, 48, device=device), torch.randn(24, 3, 16, 16, device=device)
    plain = assert_matches(image, weight)
    for view in (image.to(memory_format=torch.channels_last), image.transpose(2, 3).contiguous().transpose(2, 3)):
        out, dweight, dimage = assert_matches(view, weight)
        assert torch.equal(out, plain[0])
        assert torch.equal(dweight, plain[1])
        assert torch.equal(dimage, plain[2])
    assert ops.patch_embed(image[:, :, :, 16:], weight).shape == (2, 4, 24)


@pytest.mark.parametrize("normalisation", [{}, {"mean": MEAN}, {"std": STD}, {"mean": MEAN, "std": STD}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_uint8_images(normalisation, dtype, device):
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, device=device)
    weight = torch.randn(24, 3, 16, 16, device=device) * 0.1
    out, *_ = assert_matches(image, weight, dtype, **normalisation)
    by_hand = image.float() / 255
    by_hand = (
        by_hand - torch.tensor(normalisation.get("mean", (0, 0, 0)), device=device)[:, None, None]
    ) / torch.tensor(normalisation.get("std", (1, 1, 1)), device=device)[:, None, None]
    same = ops.patch_embed(by_hand, weight.to(dtype))
    assert relative_rms(out, same) < 1e-6 if dtype == torch.float32 else 1e-2


def test_prefix_and_positions(device):
    """Where each row comes from, exactly: zero weights leave prefix, bias and positions."""
    image, weight = torch.zeros(1, 1, 4, 4, device=device), torch.zeros(8, 1, 2, 2, device=device)
    prefix, bias = torch.randn(2, 8, device=device), torch.randn(8, device=device)
    all_rows, patches = torch.randn(6, 8, device=device), torch.randn(4, 8, device=device)
    out = ops.patch_embed(image, weight, bias, pos_embed=all_rows, prefix=prefix)[0]
    assert torch.equal(out, torch.cat([prefix, bias.expand(4, -1)]) + all_rows)
    out = ops.patch_embed(image, weight, bias, pos_embed=patches, prefix=prefix)[0]
    assert torch.equal(out, torch.cat([prefix, bias + patches]))
    assert torch.equal(ops.patch_embed(image, weight, bias)[0], bias.expand(4, -1))


def test_widest_dtype_wins(device):
    image = torch.randn(1, 3, 8, 8, device=device)
    weight, table = torch.randn(8, 3, 4, 4, device=device).bfloat16(), torch.randn(4, 8, device=device)
    for function in (ops.patch_embed, reference.patch_embed):
        assert function(image, weight).dtype == torch.bfloat16
        assert function(image, weight, pos_embed=table).dtype == torch.float32


def test_autocast_projects_in_its_dtype(device):
    image, weight = torch.randn(2, 3, 8, 8, device=device), torch.randn(8, 3, 4, 4, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert ops.patch_embed(image, weight).dtype == reference.patch_embed(image, weight).dtype == torch.bfloat16


def test_fake_gradient_of_a_channels_last_image_has_its_layout(device):
    image = torch.randn(2, 3, 8, 8, device=device).to(memory_format=torch.channels_last)
    dtokens, weight = torch.randn(2, 4, 8, device=device), torch.randn(8, 3, 4, 4, device=device)
    arguments = (dtokens, image, weight, *[None] * 5, [True, False, False, False, False])
    torch.library.opcheck(torch.ops.fastvit.patch_embed_backward.default, arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image": torch.zeros(1, 3, 18, 16)}, ValueError, "image size 18x16 is not divisible by the patch size 8x8"),
        ({"image": torch.zeros(1, 4, 16, 16)}, ValueError, "image has 4 channels, but weight is for 3"),
        ({"image": torch.zeros(3, 16, 16)}, ValueError, r"image must have shape \(B, C, H, W\), got \(3, 16, 16\)"),
        (
            {"image": torch.zeros(1, 3, 16, 16, dtype=torch.int32)},
            TypeError,
            "floating-point or uint8, got torch.int32",
        ),
        ({"weight": torch.zeros(24, 3, 0, 8)}, ValueError, r"no empty dimension, got \(24, 3, 0, 8\)"),
        ({"bias": torch.zeros(24).half()}, TypeError, "bias is torch.float16, but weight is torch.float32"),
        ({"weight": torch.zeros(24, 192)}, ValueError, r"weight must have shape \(D, C, ph, pw\)"),
        ({"bias": torch.zeros(23)}, ValueError, r"bias must have shape \(D,\) = \(24,\), got \(23,\)"),
        ({"pos_embed": torch.zeros(6, 24)}, ValueError, r"pos_embed must have shape .* got \(6, 24\)"),
        ({"prefix": torch.zeros(1, 23)}, ValueError, r"prefix must have shape \(P, D\) with D = 24"),
        ({"mean": (0.5,)}, ValueError, r"mean must have one value per channel \(3\), got 1"),
        ({"std": (0.5, 0.0, 0.5)}, ValueError, "std must be positive and finite, got 0.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input(changes, error, message):
    arguments = {"image": torch.zeros(1, 3, 16, 16), "weight": torch.zeros(24, 3, 8, 8), **changes}
    with pytest.raises(error, match=message):
        ops.patch_embed(**arguments)

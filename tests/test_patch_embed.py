"""patch_embed beyond the contract: patch sizes, channels, layouts, pixel types, bad input."""

import os

import numpy as np
import pytest
import torch
from fastvit.kernels import patch_embed as kernels
from fastvit.kernels.launch import choice, hardware

from fastvit import ops, reference
from fastvit.accuracy import limit, relative_rms, rounding
from fastvit.dispatch import interpreting
from fastvit.interpret import sanitizer

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
        assert dimage.stride() == view.stride()
        # Channels innermost are other columns of the same products: added up in another order, in other places.
        least = 1e-6 if view.stride(1) == 1 else 0
        assert all(relative_rms(*pair) <= least for pair in zip((out, dweight, dimage), plain, strict=True))
    assert ops.patch_embed(image[:, :, :, 16:], weight).shape == (2, 4, 24)


LAYOUTS = {
    "NCHW": lambda image: image,
    "channels_last": lambda image: image.to(memory_format=torch.channels_last),
    "a crop": lambda image: torch.cat([image, image], 3)[..., : image.shape[3]],
    "a crop, channels_last": lambda image: torch.cat([image] * 2, 3).to(memory_format=torch.channels_last)[
        ..., image.shape[3] :
    ],
    "at an odd address": lambda image: torch.cat([image[..., :1], image], 3)[..., 1:],
    "one image, repeated": lambda image: image[:1].expand(image.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["uint8", "float32", "normalised float32", "bfloat16"])
@pytest.mark.parametrize("patch", [(14, 14), (8, 16), (3, 5)], ids=str)
def test_layouts(patch, kind, layout, device):
    """Every way in which neighbouring pixels lie side by side, in bytes and in floats, of 1 to 16 of them."""
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    size = (2, 3, 2 * patch[0], 3 * patch[1])
    image = torch.randint(256, size, device=device).to(torch.uint8) if kind == "uint8" else torch.randn(size)
    weight = torch.randn(24, 3, *patch, device=device) * 0.1
    normalisation = {} if kind in ("float32", "bfloat16") else {"mean": MEAN, "std": STD}
    prefix, bias = torch.randn(2, 24, device=device), torch.randn(24, device=device)
    image = image if kind == "uint8" else image.to(device, dtype)
    assert_matches(LAYOUTS[layout](image), weight, dtype, bias=bias, prefix=prefix, **normalisation)


# (dtype, layout, patch): how many bytes a load of pixels may take.
WIDTHS = {
    (torch.uint8, "NCHW", 16): 16,
    (torch.uint8, "channels_last", 16): 16,
    (torch.uint8, "NCHW", 14): 2,
    (torch.uint8, "NCHW", 8): 8,
    (torch.bfloat16, "NCHW", 16): 16,
    (torch.bfloat16, "channels_last", 16): 16,
    (torch.bfloat16, "NCHW", 14): 4,
    (torch.bfloat16, "channels_last", 14): 4,
    (torch.bfloat16, "a crop", 16): 16,
    (torch.float32, "NCHW", 14): 8,
    (torch.bfloat16, "at an odd address", 16): 2,
}


@pytest.mark.parametrize("dtype, layout, patch", WIDTHS, ids=str)
def test_loads_are_as_wide_as_the_layout_allows(dtype, layout, patch):
    image = LAYOUTS[layout](torch.zeros(2, 3, 2 * patch, 4 * patch, dtype=dtype))
    found = kernels.patches_of(image, (patch, patch), 1)
    assert found.width == WIDTHS[dtype, layout, patch]
    assert found.load is (kernels.PATCHES if found.width >= 4 else kernels.GATHERED_PATCHES)


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


@pytest.mark.parametrize("mean, std", [(120, 60), (20, 8)], ids=["photographs", "dark"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bytes_are_more_exact_than_a_normalised_image(dtype, mean, std, device):
    """Weights that autocast would round are rounded once, with the normalisation in them, and pixels never; and their
    rounding sees normalised pixels, as it would without."""
    image = (torch.randn(4, 3, 64, 64, device=device) * std + mean).clamp(0, 255).to(torch.uint8)
    weight, bias = torch.randn(64, 3, 16, 16, device=device) * 0.02, torch.randn(64, device=device)
    normalisation = {"mean": [mean / 255] * 3, "std": [std / 255] * 3}
    # In float32, as the rounding of the result would hide what comes before it.
    wide = {"pos_embed": torch.zeros(16, 64, device=device)}
    upstream = torch.randn(4, 16, 64, device=device).to(dtype)
    found = {}
    for name, function, to in (("truth", reference, torch.float64), ("plain", reference, dtype), ("ours", ops, None)):
        w = weight.clone().requires_grad_()
        with torch.autocast(device, dtype, enabled=name == "ours"):
            out = function.patch_embed(image, w.to(to), bias.to(to), **wide, **normalisation)
        found[name] = [out, *torch.autograd.grad(out, w, upstream.to(out.dtype))]
    for truth, plain, ours in zip(*found.values(), strict=True):
        assert relative_rms(ours, truth) < 0.8 * relative_rms(plain, truth)


def test_what_a_prefix_row_gets_never_reaches_the_weight(device):
    image = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, device=device)
    weight = torch.randn(24, 3, 8, 8, device=device, requires_grad=True)
    prefix = torch.randn(1, 24, device=device)
    out = ops.patch_embed(image, weight, prefix=prefix, mean=MEAN, std=STD)
    upstream = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, weight, upstream, retain_graph=True)
    upstream[:, 0] = 1e20
    assert torch.equal(torch.autograd.grad(out, weight, upstream)[0], found)


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
    arguments = (dtokens, image, weight, *[None] * 5, torch.float32, [True, False, False, False, False])
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


@pytest.fixture
def touched(monkeypatch):
    """Called with what makes launches, says how many different bytes each of them loads and stores, all together: what
    moves where a cache holds what one launch reads again. On a GPU of one multiprocessor, which so little fills as a
    whole batch does a real one: no sum is cut in parts."""
    launches, check = {}, sanitizer._Launch.access
    monkeypatch.setattr(hardware, "num_sms", lambda device: 1)
    choice.set_table(None)  # forgets what was chosen for another

    def access(launch, action, pointers, mask, size):
        pointers, mask = np.broadcast_arrays(pointers, np.asarray(mask, bool))
        first = pointers[mask].astype(np.int64)
        launches.setdefault((launch, action), []).append(np.unique(first[:, None] + np.arange(size)))
        check(launch, action, pointers, mask, size)

    def count(call):
        launches.clear()
        call()
        return sum(np.unique(np.concatenate(parts)).size for parts in launches.values())

    monkeypatch.setattr(sanitizer._Launch, "access", access)
    yield count
    monkeypatch.undo()
    choice.set_table(None)


@pytest.mark.skipif(not interpreting() or os.getenv("FASTVIT_SANITIZER") == "off", reason="the sanitizer counts")
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("pixel", [torch.uint8, torch.bfloat16], ids=str)
def test_bytes_touched(pixel, layout, device, touched):
    """What the head of the kernels' file says that must move, forward and backward, and at most a twentieth more."""
    batch, size, patch, dim, tokens = 48, 32, 4, 32, 65
    image = LAYOUTS[layout](torch.randint(256, (batch, 3, size, size), device=device).to(pixel))
    weight, prefix, table = (
        torch.randn(shape, device=device, dtype=torch.bfloat16)
        for shape in ((dim, 3, patch, patch), (1, dim), (tokens, dim))
    )
    normalisation = {"mean": MEAN, "std": STD} if pixel == torch.uint8 else {}
    rows = batch * tokens * dim * 2
    moved = image.numel() * pixel.itemsize + rows + weight.numel() * 2

    def embed():
        return ops.patch_embed(image, weight, pos_embed=table, prefix=prefix, **normalisation)

    def within(call, must):
        assert must <= touched(call) <= 1.05 * must

    within(embed, moved + 2 * table.numel())
    # What is trained, and what that takes beside: for sums over the batch the gradient once more.
    cases = {(weight, prefix, table): rows, (weight,): rows if pixel == torch.uint8 else 0}
    for leaves, more in cases.items() if pixel == torch.uint8 else [*cases.items(), ((image,), 0)]:
        for tensor in leaves:
            tensor.requires_grad_()
        out = embed()
        within(lambda out=out: out.backward(torch.ones_like(out)), moved + more)
        for tensor in leaves:
            tensor.requires_grad_(False)

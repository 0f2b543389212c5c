"""Users' stories of putting models to use: dtypes, copies, compilers and exporters, parts of their own, mistakes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from pairs import BACKENDS, NAME, SMALL, close, gradients, pair, timm
from torch import nn

import fastvit


def test_from_the_meta_device_to_bfloat16(tmp_path, images):
    """Weights through safetensors, half as wide, into models that were built without memory or in another dtype."""
    from safetensors.torch import load_file, save_file

    model, peer = pair()
    path = tmp_path / "w.safetensors"
    save_file(model.state_dict(), path)
    empty = fastvit.create_model(NAME, **SMALL, device="meta")
    with pytest.raises(ValueError, match="meta device.*to_empty"):
        fastvit.load_checkpoint(empty, path)
    empty.load_state_dict(load_file(path), assign=True)
    close(empty.eval()(images), peer(images))
    filled = fastvit.create_model(NAME, **SMALL, device="meta").to_empty(device="cpu")
    fastvit.load_checkpoint(filled, path)
    close(filled.eval()(images), peer(images))
    half = fastvit.create_model(NAME, **SMALL, checkpoint=path, dtype=torch.bfloat16).eval()
    want = copy.deepcopy(peer).bfloat16()(images.bfloat16())
    close(half(images.bfloat16()), want, rtol=0.05, atol=0.05)
    close(timm.create_model(NAME, **SMALL, checkpoint_path=path).eval()(images), peer(images))


def test_weights_for_the_meta_device_are_drawn_by_init_weights():
    """As timm's init_weights does after to_empty: nothing is left as the memory was."""
    model = fastvit.create_model(NAME, **SMALL, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.init_weights()
    assert [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()] == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_copied_and_pickled(images):
    model, peer = pair()
    linear = {nn.Linear}
    close(*(torch.ao.quantization.quantize_dynamic(each, linear)(images) for each in (model, peer)), atol=1e-3)
    other = copy.deepcopy(model)
    other.reset_classifier(3)
    other.set_input_size(64)
    with torch.no_grad():
        other.blocks[0].norm1.weight.zero_()
    assert timm.data.resolve_data_config(model=model)["input_size"] == (3, 32, 32)
    close(model(images.contiguous(memory_format=torch.channels_last)), peer(images))


def test_a_compiled_model_in_multi_scale_training():
    """The second size makes the compiler take it as variable, gradients included; timm's model does."""
    model, peer = pair(dynamic_img_size=True)
    compiled = torch.compile(model, backend="aot_eager")
    for size in ((32, 32), (48, 24), (16, 40)):
        images = torch.randn(2, 3, *size)
        for each, run in ((model, compiled), (peer, peer)):
            each.zero_grad()
            run(images).square().mean().backward()
        close(gradients(model), gradients(peer))


@pytest.mark.parametrize("example", [(32, 32), (48, 24)])
def test_an_exported_model_takes_images_of_any_size(example):
    """Whatever size the export was shown, the model's own among them; timm's model does."""
    model, peer = pair(dynamic_img_size=True)
    height, width = (torch.export.Dim(side, min=2, max=9) for side in ("height", "width"))
    shapes = {"x": {2: 8 * height, 3: 8 * width}}
    exported = torch.export.export(model, (torch.randn(1, 3, *example),), dynamic_shapes=shapes).module()
    for size in ((48, 24), (32, 32), (16, 72)):
        images = torch.randn(1, 3, *size)
        close(exported(images), peer(images))


@pytest.mark.filterwarnings("ignore")
def test_the_older_onnx_exporter(tmp_path, images):
    """It calls forward with every argument that the signature has."""
    try:
        torch.onnx.export(pair()[0], (images,), tmp_path / "m.onnx", dynamo=False)
    except torch.onnx.errors.OnnxExporterError as error:
        assert "onnx is not installed" in str(error)


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")
@pytest.mark.parametrize("way", ["hook", "node", "call"])
def test_the_patch_embedding_gives_what_timms_does(way, images):
    """Patch tokens, without positions and class token, to whoever looks at that module."""
    results = []
    for model in pair():
        if way == "hook":
            seen = []
            model.patch_embed.register_forward_hook(lambda module, arguments, output, seen=seen: seen.append(output))
            model(images)
            results.append(seen[0])
        elif way == "node":
            results.append(timm.models.create_feature_extractor(model, ["patch_embed"])(images)["patch_embed"])
        else:
            results.append(model.patch_embed(images))
    close(*results)


def test_another_patch_embedding(images):
    """A user's own stem in the place of ours: any module from images to tokens (B, N, D)."""
    results = []
    for model in pair():
        torch.manual_seed(4)
        stem = [nn.Conv2d(3, 24, 4, 4), nn.GELU(), nn.Conv2d(24, 48, 2, 2), nn.Flatten(2)]
        model.patch_embed = nn.Sequential(*stem, Transpose())
        results.append(model(images))
    close(*results)


class Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: fastvit.create_model(None), "name is None, expected the name of a model"),
        (lambda: fastvit.create_model("vit_tiny_patch16_225"), "did you mean vit_tiny_patch16_224"),
        (lambda: fastvit.create_model(NAME, mean=0.5), "mean is 0.5, expected one number for each channel, 3"),
        (lambda: fastvit.create_model(NAME, drop_rate="a"), "drop_rate is 'a', expected a rate in"),
        (lambda: fastvit.create_model(NAME, num_class=3), "unknown num_class; did you mean num_classes"),
        (lambda: fastvit.nn.Block(0, 1), "dim is 0, expected a positive integer"),
        (lambda: fastvit.nn.Block(8, 2, act_layer="gelu"), "act_layer is 'gelu', expected a class such as"),
        (lambda: fastvit.ops.attention(None), "attention: qkv must be a torch.Tensor, got NoneType"),
        (lambda: fastvit.ops.attention(torch.ones(1, 2, 3, 1, 8), scale=math.nan), "attention: scale must be"),
        (lambda: fastvit.ops.layer_norm(torch.ones(8), torch.ones(8), torch.ones(8), "x"), "layer_norm: eps must be"),
        (lambda: fastvit.ops.layer_norm(torch.ones(8), torch.ones(8), torch.ones(8), -1), "layer_norm: eps must be"),
        (lambda: pair()[0](None), "image is a NoneType, expected a torch.Tensor"),
        (lambda: fastvit.load_checkpoint(timm.create_model(NAME, **SMALL), "w.pth"), "timm.models"),
        (lambda: fastvit.list_models(None), "filter is None, expected a shell pattern"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mistakes_in_python_are_told_in_one_line(call, text, backend):
    with fastvit.use_backend(backend), pytest.raises((TypeError, ValueError)) as raised:
        call()
    assert text in str(raised.value) and "\n" not in str(raised.value)

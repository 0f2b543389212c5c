"""DINOv3 (arXiv 2508.10104): our model against timm's and transformers', its checkpoints, and what a rotary position
embedding must not break."""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoints import assert_state, saved
from samples import outputs_of

import fastvit
from fastvit.accuracy import FACTOR, relative_rms
from fastvit.models.formats import to_timm
from fastvit.models.loading import convert_checkpoint

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

PLAIN, GATED = "vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3_qkvb"
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 48).sin().reshape(2, 3, 32, 48)


def peer_of(name, **overrides):
    """timm's model, small, with no parameter that does nothing."""
    peer = timm.create_model(name, **{**SIZES, **overrides}).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return peer


def pair(name, **overrides):
    peer = peer_of(name, **overrides)
    model = fastvit.create_model(name, **{**SIZES, **overrides}).eval()
    model.load_state_dict(to_timm(peer.state_dict())[0])
    return model, peer


@pytest.mark.parametrize("name", [PLAIN, GATED])
def test_outputs_and_gradients_are_timms(name):
    model, peer = pair(name, num_classes=7)
    for images in (IMAGES, IMAGES[..., :32], IMAGES[:, :, :8, :40]):
        torch.testing.assert_close(model(images), peer(images), rtol=1e-5, atol=1e-5)
        for got, want in zip(
            model.forward_intermediates(images, [0, 1], norm=True, return_prefix_tokens=True, intermediates_only=True),
            peer.forward_intermediates(images, [0, 1], norm=True, return_prefix_tokens=True, intermediates_only=True),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for each in (model, peer):
        each(IMAGES).square().sum().backward()
    want = to_timm({key: parameter.grad for key, parameter in peer.named_parameters()})[0]
    for key, parameter in model.named_parameters():
        got = parameter.grad
        if key.endswith("qkv.bias"):  # timm's keys have none
            third = len(got) // 3
            got = torch.cat([got[:third], torch.zeros(third), got[2 * third :]])
        torch.testing.assert_close(got, want[key], rtol=1e-4, atol=1e-4, msg=key)


def test_in_bfloat16_angles_stay_exact():
    model, peer = pair(PLAIN, img_size=128)
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        want = copy.deepcopy(model).double()(images.double())
        ours, theirs = (relative_rms(each.bfloat16()(images.bfloat16()), want) for each in (model, peer))
    assert ours <= FACTOR[torch.bfloat16] * theirs


@pytest.mark.parametrize("name", [PLAIN, GATED])
def test_the_kernels_give_the_references_numbers(name, triton_backend, device):
    model = pair(name, embed_dim=64, num_heads=1)[0].to(device).train()
    images = IMAGES[:, :, :16, :24].to(device)
    got = model(images)
    got.square().sum().backward()
    found = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    with fastvit.use_backend("torch"):
        want = exact(images.double())
        want.square().sum().backward()
    assert relative_rms(got, want) < 2e-6
    for key, parameter in exact.named_parameters():
        assert relative_rms(found[key], parameter.grad) < 2e-5, key


def test_tables_made_in_inference_serve_training_and_tools():
    model = pair(PLAIN, num_classes=3)[0].train()  # as it starts, layer-scale would hide what blocks do
    images = torch.randn(2, 3, 40, 24)
    with torch.inference_mode():
        want = model(images)
    model(images).sum().backward()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), want)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), want)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), want)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(images), want)
    torch.testing.assert_close(copy.deepcopy(model).eval()(images), want)
    model.set_input_size(64)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_blocks_alone_take_a_rope_and_hooks_see_it():
    model = pair(PLAIN)[0]
    want = model.forward_features(IMAGES)
    seen = outputs_of(model, ["blocks.0.attn", "blocks.1.mlp"], lambda each: each.forward_features(IMAGES))
    assert len(seen) == 2
    rope = model._rope(IMAGES)
    x = model.blocks[0](model.embed(IMAGES), rope=rope)
    torch.testing.assert_close(model.norm(model.blocks[1](x, rope=rope)), want)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model.norm(model.blocks[1](x)), want)


def test_tables_are_kept_of_plain_calls_alone():
    from torch.utils.flop_counter import FlopCounterMode

    model = fastvit.create_model(PLAIN, **SIZES, num_classes=3).eval()
    images = torch.randn(1, 3, 8, 24)

    def loss(scale):
        return model(images * scale).sum()

    torch.func.grad(loss)(torch.ones(()))
    torch.func.jvp(loss, (torch.ones(()),), (torch.ones(()),))
    torch.func.functionalize(model)(images)
    with FlopCounterMode(display=False):
        model(images)
    rope = model._rope(images)
    assert all(type(angle) is torch.Tensor and angle.data_ptr() for angle in rope)
    assert model._rope(images)[0] is rope[0]
    loss(torch.ones(())).backward()


def test_another_patch_embedding():
    class Pixels(torch.nn.Module):
        patch_size, grid_size = (8, 8), (4, 4)

        def forward(self, x):
            return (
                x.unfold(2, 8, 8).unfold(3, 8, 8).flatten(4).permute(0, 2, 3, 1, 4).flatten(3)[..., :128].flatten(1, 2)
            )

    model = fastvit.create_model(PLAIN, **SIZES, num_classes=3).eval()
    model.patch_embed = Pixels()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_patches_that_are_masked_are_not_read_and_keep_their_place():
    model = fastvit.create_model(PLAIN, **SIZES, mask_token=True).eval()
    model.load_state_dict(pair(PLAIN)[0].state_dict(), strict=False)
    model.mask_token.data.normal_()
    masks = torch.arange(24).remainder(3).eq(0).expand(2, -1)
    other = IMAGES.clone()
    other.unflatten(2, (4, 8)).unflatten(4, (6, 8)).permute(0, 2, 4, 1, 3, 5)[masks.view(2, 4, 6)] = 7.0
    want = model(IMAGES, masks=masks)
    torch.testing.assert_close(model(other, masks=masks), want)
    for images, given in ((other, None), (IMAGES, masks.flip(1))):
        assert relative_rms(model(images, masks=given), want) > 1e-2


@pytest.mark.parametrize("name", [PLAIN, GATED])
def test_timms_files_and_back(name, tmp_path):
    small = peer_of(name)
    path = saved(tmp_path / "small.safetensors", small.state_dict())
    model = fastvit.load_checkpoint(fastvit.create_model(name, **SIZES), path)
    torch.testing.assert_close(model.eval()(IMAGES), small(IMAGES), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no pos_embed, and no known model without one has these shapes"):
        fastvit.load_checkpoint(None, path)
    peer = timm.create_model(name)
    path = saved(tmp_path / "w.safetensors", peer.state_dict())
    found = convert_checkpoint(path)
    torch.testing.assert_close(found.state, dict(peer.state_dict()), rtol=0, atol=0)
    assert found.models == [name] and found.config == fastvit.create_model(name, device="meta").config
    if name == GATED:
        state = dict(fastvit.load_checkpoint(name, path).state_dict())
        state["blocks.0.attn.qkv.bias"] = torch.ones(3 * 384)
        with pytest.raises(ValueError, match=r"no bias of its keys, the model's blocks\.0\.attn\.k_bias is not zero"):
            convert_checkpoint(saved(tmp_path / "k.pth", state))


@pytest.mark.parametrize("gated", [False, True])
def test_transformers_files_and_back(gated, tmp_path):
    how = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    how |= {"image_size": [32, 48], "patch_size": 8, "num_register_tokens": 4, "rope_theta": 50.0}
    config = transformers.DINOv3ViTConfig(**how, use_gated_mlp=gated, hidden_act="silu" if gated else "gelu")
    peer = transformers.DINOv3ViTModel(config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    peer.save_pretrained(tmp_path / "w")
    model = fastvit.load_checkpoint(None, tmp_path / "w").eval()
    assert model.config.img_size == (32, 48) and model.config.rope_temperature == 50
    with torch.no_grad():
        want = peer(IMAGES)
        tokens = model.forward_features(IMAGES)
    assert relative_rms(tokens, want.last_hidden_state) < 2e-6
    if gated:
        peer.config.hidden_act = "gelu"  # a gate that ours has not
        peer.config.save_pretrained(tmp_path / "w")
        with pytest.raises(ValueError, match="activation is 'gelu', expected 'silu' for mlp 'swiglu'"):
            fastvit.load_checkpoint(None, tmp_path / "w")
        peer.config.hidden_act = "silu"
        peer.config.save_pretrained(tmp_path / "w")
    assert relative_rms(model.pool(tokens, "token"), want.pooler_output) < 2e-6
    assert model.config.global_pool == "avg"
    in_memory = fastvit.load_checkpoint(model, saved(tmp_path / "memory.pth", peer.state_dict()))
    torch.testing.assert_close(in_memory.forward_features(IMAGES), tokens)
    found = convert_checkpoint(tmp_path / "w", to="transformers")
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "model.safetensors").write_bytes(found.safetensors())
    config = transformers.DINOv3ViTConfig(**found.transformers_config())
    again, said = transformers.DINOv3ViTModel.from_pretrained(
        tmp_path / "back", config=config, output_loading_info=True
    )
    assert not said["unexpected_keys"] and {*said["missing_keys"]} <= {"embeddings.mask_token"}
    assert torch.equal(again.eval()(IMAGES).last_hidden_state, want.last_hidden_state)


@pytest.mark.parametrize("name", [PLAIN + "_qkvb", GATED])
def test_metas_files_as_timm_reads_them(name, tmp_path):
    """facebookresearch/dinov3, dinov3/models/vision_transformer.py and dinov3/layers: biases of q, k and v with a mask
    for that of k, gated layers w1, w2 and w3, and what training leaves beside."""
    peer = peer_of(name)
    state = {"storage_tokens": peer.reg_token.detach(), "mask_token": torch.zeros(1, 128)}
    state |= {"rope_embed.periods": torch.ones(16), "local_cls_norm.weight": torch.ones(128)}
    for key, tensor in to_timm(peer.state_dict())[0].items():
        if key.endswith("qkv.bias"):
            state[f"{key}_mask"] = torch.full((384,), torch.nan)
            tensor = tensor.clone()
            tensor[128:256] = 3
        if "mlp" in key and name == GATED:
            leaf = key.rpartition(".")[2]
            stem = key[: key.index("mlp.") + 4]
            parts = tensor.chunk(2) if "fc1" in key else (tensor,)
            state |= {f"{stem}w{i}.{leaf}": part for i, part in enumerate(parts, 1 if "fc1" in key else 3)}
        elif key != "reg_token":
            state[key] = tensor
    judge = timm.create_model(name, **SIZES).eval()
    if name != GATED:  # whose layers timm's own reading does not rename
        judge.load_state_dict(timm.models.eva.checkpoint_filter_fn(dict(state), judge))
        torch.testing.assert_close(judge.state_dict(), peer.state_dict(), rtol=0, atol=0)
    model = fastvit.load_checkpoint(fastvit.create_model(name, **SIZES), saved(tmp_path / "w.pth", state))
    assert_state(model, to_timm(peer.state_dict())[0])
    assert fastvit.load_checkpoint(None, tmp_path / "w.pth").config.mean == peer.pretrained_cfg["mean"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"patch_drop_rate": 0.5}, "patch_drop_rate is 0.5, expected 0 with rope_temperature"),
        ({"num_heads": 64}, "rope_temperature is 100.0, expected None for heads of 2, no multiple of 4"),
        ({"rope_temperature": -1}, "rope_temperature is -1, expected a positive number or None"),
    ],
)
def test_what_cannot_be(overrides, message):
    with pytest.raises(ValueError, match=message):
        fastvit.create_model(PLAIN, **{**SIZES, **overrides})

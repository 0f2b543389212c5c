"""Files as the authors of the models release them, written here in their layouts; timm's own conversion is the judge.

And which model a file is of, told by names and shapes, for every known model.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import assert_state, saved

import fastvit
from fastvit.models.formats import to_timm
from fastvit.models.infer import infer_config
from fastvit.models.loading import convert_checkpoint
from fastvit.models.registry import MODELS

timm = pytest.importorskip("timm")

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 5}


def peer_of(name, **overrides):
    """timm's model, small, of random weights."""
    peer = timm.create_model(name, **{**SIZES, **overrides})
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_()
    return peer.eval()


def flax_arrays(state, big_vision=False):
    """timm's tensors as Flax has them: vit_jax/models_vit.py, or big_vision/models/vit.py."""
    arrays = {}
    attention, norm2, mlp = ("0", "1", "0") if big_vision else ("1", "2", "3")
    position = "pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"
    top = {"cls_token": "cls", "pos_embed": position}
    modules = {"patch_embed.proj": "embedding", "norm": "Transformer/encoder_norm", "head": "head"}
    modules |= {"attn_pool.norm": "MAPHead_0/LayerNorm_0"}
    modules |= {f"attn_pool.mlp.fc{n}": f"MAPHead_0/MlpBlock_0/Dense_{n - 1}" for n in (1, 2)}
    top |= {"attn_pool.latent": "MAPHead_0/probe"}
    packed = {"attn.qkv": ("query", "key", "value"), "attn_pool.kv": ("key", "value"), "attn_pool.q": ("query",)}
    in_block = {"norm1": "LayerNorm_0", "norm2": f"LayerNorm_{norm2}"}
    in_block |= {f"mlp.fc{n}": f"MlpBlock_{mlp}/Dense_{n - 1}" for n in (1, 2)}
    for name, tensor in state.items():
        array, (module, _, leaf) = tensor.numpy(), name.rpartition(".")
        if name in top:
            arrays[top[name]] = array
            continue
        block, parts = "", "MAPHead_0/MultiHeadDotProductAttention_0/"
        if name.startswith("blocks."):
            _, number, module = module.split(".", 2)
            block = f"Transformer/encoderblock_{number}/"
            parts = f"{block}MultiHeadDotProductAttention_{attention}/"
        if module in packed:
            for part, rows in zip(packed[module], np.split(array, len(packed[module])), strict=True):
                by_head = rows.T.reshape(128, 2, 64) if leaf == "weight" else rows.reshape(2, 64)
                arrays[f"{parts}{part}/{'kernel' if leaf == 'weight' else 'bias'}"] = by_head
            continue
        if module in ("attn.proj", "attn_pool.proj"):
            arrays[f"{parts}out/{'kernel' if leaf == 'weight' else 'bias'}"] = (
                array.T.reshape(2, 64, 128) if leaf == "weight" else array
            )
            continue
        theirs = block + in_block[module] if block else modules[module]
        if leaf == "bias":
            arrays[f"{theirs}/bias"] = array
        elif array.ndim == 1:
            arrays[f"{theirs}/scale"] = array
        else:
            arrays[f"{theirs}/kernel"] = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
    return arrays


def scanned(arrays):
    """The blocks' arrays stacked, as big_vision's scan over depth has them."""
    blocks = {name: array for name, array in arrays.items() if "/encoderblock_" in name}
    rest = {name: array for name, array in arrays.items() if name not in blocks}
    for name in [name for name in blocks if "/encoderblock_0/" in name]:
        rows = [blocks[name.replace("encoderblock_0", f"encoderblock_{i}")] for i in range(2)]
        rest[name.replace("encoderblock_0", "encoderblock")] = np.stack(rows)
    return rest


@pytest.mark.parametrize(
    "prefix, big_vision, change",
    [
        ("", False, dict),
        ("opt/target/", False, dict),
        ("params/", True, dict),
        ("params/img/", True, dict),
        ("params/", True, scanned),
    ],
)
def test_googles_npz_as_timm_reads_it(prefix, big_vision, change, tmp_path):
    peer = peer_of("vit_tiny_patch16_224", no_embed_class=big_vision)
    arrays = {f"{prefix}{name}": array for name, array in change(flax_arrays(peer.state_dict(), big_vision)).items()}
    beside = {"opt/state/step": np.array(3)} if prefix else {}
    beside |= {"params/txt/Embed_0/embedding": np.zeros((4, 4), np.float32)} if "img" in prefix else {}
    np.savez(tmp_path / "w.npz", **arrays, **beside)
    judge = peer_of("vit_tiny_patch16_224", no_embed_class=big_vision)
    judge.load_pretrained(tmp_path / "w.npz")
    torch.testing.assert_close(judge.state_dict(), peer.state_dict(), rtol=0, atol=0)  # which says the layout is right
    model = fastvit.load_checkpoint(None, tmp_path / "w.npz")
    assert model.config.no_embed_class == big_vision
    assert_state(model, judge.state_dict())


@pytest.mark.parametrize("change", [dict, scanned])
def test_siglips_npz_as_timm_reads_it(change, tmp_path):
    """google-research/big_vision, big_vision/models/vit.py: MAPHead; beside the tower for text."""
    name, sizes = "vit_base_patch16_siglip_224", {"num_classes": 0}
    peer = peer_of(name, **sizes)
    arrays = {f"params/img/{key}": array for key, array in change(flax_arrays(peer.state_dict(), True)).items()}
    np.savez(tmp_path / "w.npz", **arrays, **{"params/txt/Embed_0/embedding": np.zeros((4, 4), np.float32)})
    judge = peer_of(name, **sizes)
    judge.load_pretrained(tmp_path / "w.npz")
    torch.testing.assert_close(judge.state_dict(), peer.state_dict(), rtol=0, atol=0)
    model = fastvit.load_checkpoint(None, tmp_path / "w.npz")
    assert_state(model, judge.state_dict())
    torch.testing.assert_close(model.eval()(IMAGES), judge(IMAGES), rtol=1e-4, atol=1e-4)


def as_openai(state):
    """timm's tensors of a CLIP tower as OpenAI and OpenCLIP have them, beside some of the tower for text."""
    names = {"cls_token": "class_embedding", "pos_embed": "positional_embedding", "head.weight": "proj"}
    parts = {"patch_embed.proj.": "conv1.", "norm_pre.": "ln_pre.", "blocks.": "transformer.resblocks."}
    parts |= {
        ".norm1.": ".ln_1.",
        ".norm2.": ".ln_2.",
        ".attn.qkv.": ".attn.in_proj_",
        ".attn.proj.": ".attn.out_proj.",
    }
    parts |= {".mlp.fc1.": ".mlp.c_fc.", ".mlp.fc2.": ".mlp.c_proj."}
    found = {"token_embedding.weight": torch.zeros(4, 4), "logit_scale": torch.ones(())}
    found |= {"positional_embedding": torch.zeros(7, 4), "transformer.resblocks.0.ln_1.weight": torch.ones(4)}
    for name, tensor in state.items():
        if name == "head.bias":
            continue
        theirs = names.get(name, name)
        for ours, part in parts.items():
            theirs = theirs.replace(ours, part)
        theirs = f"ln_post.{theirs[5:]}" if theirs.startswith("norm.") else theirs
        tensor = tensor.flatten() if name == "cls_token" else tensor[0] if name == "pos_embed" else tensor
        found[f"visual.{theirs}"] = tensor.T.contiguous() if name == "head.weight" else tensor
    return found


def test_clip_as_timm_reads_it(tmp_path):
    """openai/CLIP, clip/model.py; mlfoundations/open_clip, src/open_clip/transformer.py. Which GELU it is only the name
    of the model says."""
    name = "vit_base_patch32_clip_quickgelu_224"
    peer = peer_of(name)
    peer.head.bias.data.zero_()
    state = as_openai(peer.state_dict())
    judge = peer_of(name)
    judge.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(dict(state), judge))
    path = saved(tmp_path / "w.pth", state)
    model = fastvit.load_checkpoint(None, path)
    assert_state(model, judge.state_dict())
    assert model.config.activation == "gelu" and model.config.mean == peer.pretrained_cfg["mean"]
    model = fastvit.create_model(name, **SIZES)
    assert_state(fastvit.load_checkpoint(model, path), judge.state_dict())
    torch.testing.assert_close(model.eval()(IMAGES), judge(IMAGES), rtol=1e-4, atol=1e-4)
    # OpenCLIP's models on timm's towers.
    trunk = {f"visual.trunk.{key}": tensor for key, tensor in peer.state_dict().items() if "head" not in key}
    model = fastvit.create_model(name, **{**SIZES, "num_classes": 0})
    fastvit.load_checkpoint(model, saved(path, trunk | {"text.token_embedding.weight": torch.zeros(4, 4)}))
    assert torch.equal(model.norm_pre.weight, peer.norm_pre.weight)


@pytest.mark.parametrize("name", [name for name in MODELS if "clip_" in name and "quickgelu" not in name])
def test_which_clip_it_is_goes_by_shapes_alone(name):
    """Of OpenAI's and OpenCLIP's files: the exact GELU, and the known model's normalisation."""
    entry = MODELS[name]
    with torch.device("meta"):
        state, format = to_timm(
            {key.removeprefix("visual."): tensor for key, tensor in as_openai(
                fastvit.create_model(name, num_classes=entry.config.num_classes or 512).state_dict()
            ).items() if key.startswith("visual.")}
        )  # fmt: skip
        config, names = infer_config(state, format.facts)
    assert config.activation == "gelu" and names[0] == name and config.mean == entry.config.mean


def test_npz_in_bfloat16_and_with_a_layer_before_the_classifier(tmp_path):
    """NumPy writes JAX's bfloat16 as two bytes without a type. Files for fine-tuning have a classifier of zeros."""
    state = {name: tensor.bfloat16() for name, tensor in peer_of("vit_tiny_patch16_224").state_dict().items()}
    arrays = {name: np.ascontiguousarray(array).view(np.uint32) for name, array in flax_arrays(to_float(state)).items()}
    halves = {name: (array >> 16).astype(np.uint16).view("V2") for name, array in arrays.items()}
    np.savez(tmp_path / "w.npz", **halves)
    torch.testing.assert_close(convert_checkpoint(tmp_path / "w.npz").state, state, rtol=0, atol=0)

    layer = {"pre_logits/kernel": np.ones((128, 128), np.float32), "pre_logits/bias": np.ones(128, np.float32)}
    arrays = flax_arrays(to_float(state))
    np.savez(tmp_path / "w.npz", **arrays, **layer)
    with pytest.raises(ValueError, match=r"unexpected pre_logits/weight \(128, 128\); unexpected pre_logits/bias"):
        fastvit.load_checkpoint(None, tmp_path / "w.npz")
    for name in ("head/kernel", "head/bias"):
        arrays[name] = np.zeros_like(arrays[name])
    np.savez(tmp_path / "w.npz", **arrays, **layer)
    assert not fastvit.load_checkpoint(None, tmp_path / "w.npz").head.weight.any()


def to_float(state):
    return {name: tensor.float() for name, tensor in state.items()}


def test_bad_npz(tmp_path):
    path = tmp_path / "w.npz"
    model = fastvit.create_model("vit_tiny_patch16_224", **SIZES)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    np.savez(path, **{"embedding/kernel": np.array([object()])})
    pickled = path.read_bytes()
    np.savez(path, **flax_arrays(peer_of("vit_tiny_patch16_224").state_dict()))
    for content, message in {
        pickled: "allow_pickle=False",
        path.read_bytes()[:-2000]: "not a zip file",
        b"text": "allow_pickle=False|pickled",
        b"": "No data left",
    }.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"w.npz cannot be read as a NumPy archive of plain arrays: .*({message})"):
            fastvit.load_checkpoint(model, path)
    np.savez(path, **{"embedding/kernel": np.array(["text"])})
    with pytest.raises(ValueError, match="cannot be read as a NumPy archive of plain arrays"):
        fastvit.load_checkpoint(model, path)
    assert_state(model, before)


@pytest.mark.parametrize("shape", [(), (7,), (1, 0, 128), (1, 17, 64), (2, 17, 128), (0, 17, 128)])
@pytest.mark.parametrize("name", ["pos_embed", "cls_token", "register_tokens", "patch_embed.proj.weight"])
def test_tensors_of_any_shape_are_an_error_of_ours(name, shape, tmp_path):
    source = fastvit.create_model("vit_small_patch14_reg4_dinov2", **{**SIZES, "num_classes": 0})
    state = {key.replace("reg_token", "register_tokens"): tensor for key, tensor in source.state_dict().items()}
    state["pos_embed"] = torch.zeros(1, 17, 128)
    path = saved(tmp_path / "w.pth", state)
    fastvit.load_checkpoint(source, path)
    state[name] = torch.zeros(shape)
    path = saved(path, state)
    with pytest.raises(ValueError, match="w.pth .*(does not fit the model|does not tell which)"):
        fastvit.load_checkpoint(source, path)
    with pytest.raises(ValueError, match="w.pth .*(does not fit the model|does not tell which)"):
        fastvit.load_checkpoint(None, path)


def test_arrays_of_any_shape_are_an_error_of_ours(tmp_path):
    source = fastvit.create_model("vit_tiny_patch16_224", **SIZES)
    arrays = flax_arrays(source.state_dict())
    for change in (lambda arrays: arrays, scanned):
        for name in [name for name in change(arrays) if "encoderblock_1/" not in name]:
            for shape in ((), (2, 3, 5)):
                np.savez(tmp_path / "w.npz", **change(arrays) | {name: np.zeros(shape, np.float32)})
                with pytest.raises(ValueError, match="w.npz .*does not fit the model"):
                    fastvit.load_checkpoint(source, tmp_path / "w.npz")


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_giant_patch14_reg4_dinov2"])
def test_original_dinov2_as_timm_reads_it(name, chunked, tmp_path):
    """facebookresearch/dinov2, dinov2/models/vision_transformer.py: a class token with a position of its own also with
    registers, blocks in chunks where the model was trained so, SwiGLU's layers w12 and w3."""
    state = {"mask_token": torch.randn(1, 128)}
    for key, tensor in peer_of(name, num_classes=0).state_dict().items():
        key = key.replace("reg_token", "register_tokens")
        if "giant" in name:
            key = key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        state[key] = tensor
    if "reg4" in name:
        state["pos_embed"] = torch.cat([torch.randn(1, 1, 128), state["pos_embed"]], dim=1)
    judge = peer_of(name, num_classes=0)
    judge.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(dict(state), judge))
    if chunked:
        state = {
            key.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): v for key, v in state.items()
        }
    model = fastvit.load_checkpoint(None, saved(tmp_path / "w.pth", state))
    assert_state(model, judge.state_dict())
    assert model.blocks[0].mlp.act.__class__ is judge.blocks[0].mlp.act.__class__
    torch.testing.assert_close(model.eval()(IMAGES), judge(IMAGES), rtol=1e-4, atol=1e-4)


IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)


def test_deit3_as_timm_reads_it(tmp_path):
    """facebookresearch/deit, models_v2.py: layer scale is gamma_1 and gamma_2, the class token has no position."""
    state = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
        for name, tensor in peer_of("deit3_small_patch16_224").state_dict().items()
    }
    judge = peer_of("deit3_small_patch16_224")
    filter_fn = timm.models.vision_transformer.checkpoint_filter_fn
    judge.load_state_dict(filter_fn(dict(state), judge, adapt_layer_scale=True))
    path = saved(tmp_path / "w.pth", {"model": state})
    model = fastvit.load_checkpoint(None, path)
    assert_state(model, judge.state_dict())
    assert model.config.no_embed_class
    torch.testing.assert_close(model.eval()(IMAGES), judge(IMAGES), rtol=1e-4, atol=1e-4)
    del state["blocks.1.gamma_2"]
    with pytest.raises(
        ValueError, match=r"DeiT III .* does not fit the model: missing blocks\.1\.ls2\.gamma \(128,\)$"
    ):
        fastvit.load_checkpoint(None, saved(path, {"model": state}))


def test_mae_before_fine_tuning(tmp_path):
    """facebookresearch/mae, models_mae.py: the decoder, with a mask token of its own width, beside the encoder."""
    peer = peer_of("vit_base_patch16_224", num_classes=0)
    decoder = {"mask_token": (1, 1, 64), "decoder_pos_embed": (1, 17, 64), "decoder_embed.weight": (64, 128)}
    decoder |= {"decoder_blocks.0.norm1.weight": (64,), "decoder_norm.bias": (64,), "decoder_pred.weight": (192, 64)}
    state = peer.state_dict() | {name: torch.randn(shape) for name, shape in decoder.items()}
    path = saved(tmp_path / "w.pth", {"model": state})
    assert_state(fastvit.load_checkpoint(None, path), peer.state_dict())
    masked = fastvit.create_model("vit_base_patch16_224", **{**SIZES, "num_classes": 0}, mask_token=True)
    assert not fastvit.load_checkpoint(masked, path).mask_token.any()  # its own


@pytest.mark.parametrize("name", MODELS)
def test_every_known_model_is_told_by_its_shapes(name):
    entry = MODELS[name]
    config, names = infer_config(fastvit.create_model(name, device="meta").state_dict())
    assert name in names and config == replace(MODELS[names[0]].config, num_classes=entry.config.num_classes)
    for other in names:  # nothing that could be told is different
        told = MODELS[other].config
        assert (told.embed_dim, told.depth, told.num_heads) == (config.embed_dim, config.depth, config.num_heads)
        assert (told.pre_norm, told.global_pool) == (config.pre_norm, config.global_pool)
        assert (told.mlp, told.reg_tokens, told.distilled) == (config.mlp, config.reg_tokens, config.distilled)
    smaller = {"img_size": entry.config.patch_size[0] * 5, "num_classes": 3, "in_chans": 2}
    config, names = infer_config(fastvit.create_model(name, **smaller, device="meta").state_dict())
    assert name in names
    if config.rope_temperature is not None:  # the size of its images leaves no trace
        smaller["img_size"] = entry.config.img_size[0]
    assert (config.img_size[0], config.num_classes, config.in_chans) == tuple(smaller.values())


@pytest.mark.parametrize(
    "name",
    [
        *("vit_pe_core_tiny_patch16_384", "vit_pe_spatial_tiny_patch16_512", "vit_pe_lang_large_patch14_448"),
        *("vit_betwixt_patch16_rope_reg4_gap_256", "vit_mediumd_patch16_rope_reg1_gap_256"),
    ],
)
def test_relatives_of_clip_and_dinov3_are_not_taken_for_them(name, tmp_path):
    """timm's models that have most of the same names, and rotate, or pool, otherwise."""
    sizes = {"embed_dim": 128, "depth": 1, "num_heads": 2, "img_size": 64}
    path = saved(tmp_path / "w.pth", timm.create_model(name, **sizes).state_dict())
    with pytest.raises(ValueError, match="does not tell which model|does not fit the model|does not read"):
        fastvit.load_checkpoint(None, path)


def test_layers_of_other_names_beside_a_model(tmp_path):
    """As in models for depth, whose heads have convolutions that CLIP's files have a name of."""
    state = peer_of("vit_small_patch14_dinov2", num_classes=0).state_dict()
    beside = {"depth_head.scratch.refinenet1.resConfUnit1.conv1.weight": torch.zeros(3, 3, 1, 1)}
    path = saved(tmp_path / "w.pth", {f"pretrained.{key}": tensor for key, tensor in state.items()} | beside)
    assert_state(fastvit.load_checkpoint(None, path), state)


@pytest.mark.parametrize(
    "overrides, fields",
    [
        ({"global_pool": "avg"}, {"global_pool": "avg", "norm_after_pool": True}),
        (
            {"class_token": False, "global_pool": "avg", "fc_norm": False},
            {"class_token": False, "norm_after_pool": False},
        ),
        ({"mlp_ratio": 4.3, "qkv_bias": False}, {"qkv_bias": False}),
        ({"reg_tokens": 3}, {"reg_tokens": 3, "no_embed_class": False}),
        ({"final_norm": False}, {"final_norm": False}),
    ],
)
def test_models_that_are_not_known_are_told_too(overrides, fields, tmp_path):
    source = fastvit.create_model("vit_tiny_patch16_224", **{**SIZES, **overrides}).eval()
    path = saved(tmp_path / "w.pth", source.state_dict())
    model = fastvit.load_checkpoint(None, path).eval()
    for field, value in fields.items():
        assert getattr(model.config, field) == value
    assert_state(model, source.state_dict())
    assert torch.equal(model(IMAGES), source(IMAGES))
    assert "architecture" not in model.pretrained_cfg


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("patch_embed.proj.weight"), r"there is no patch_embed\.proj\.weight"),
        (lambda state: state.update(pos_embed=torch.zeros(1, 16, 128, 1)), r"pos_embed of shape \(1, 16, 128, 1\)"),
        (lambda state: state.update(pos_embed=torch.zeros(1, 20, 128)), "pos_embed has 20 rows, which are no square"),
        (
            lambda state: state.update({"patch_embed.proj.weight": torch.zeros(96, 3, 8, 8)}),
            "embed_dim is 96, which does",
        ),
    ],
)
def test_what_does_not_tell_its_model(change, message, tmp_path):
    state = fastvit.create_model("vit_tiny_patch16_224", **SIZES).state_dict()
    change(state)
    with pytest.raises(ValueError, match=f"w.pth does not tell which model it is of: .*{message}"):
        fastvit.load_checkpoint(None, saved(tmp_path / "w.pth", state))


def test_names_build_the_model_that_the_file_has(tmp_path):
    name = "deit_tiny_patch16_224"
    for classes in (7, 0):
        source = fastvit.create_model(name, num_classes=classes)
        path = saved(tmp_path / "w.safetensors", source.state_dict())
        model = fastvit.load_checkpoint(name, path)
        assert_state(model, source.state_dict())
        assert model.pretrained_cfg["architecture"] == name and model.num_classes == classes
        model = fastvit.load_checkpoint(f"{name}.fb_in1k", path, new_classifier=True)
        assert model.num_classes == 1000 and torch.equal(model.pos_embed, source.pos_embed)
    guessed = fastvit.load_checkpoint(None, path)
    assert guessed.pretrained_cfg["architecture"] == "vit_tiny_patch16_224"  # of the same shapes
    assert fastvit.load_checkpoint(model, path, new_classifier=True) is model

    with pytest.raises(ValueError, match="does not fit the model: .*patch_embed.proj.weight has shape"):
        fastvit.load_checkpoint("vit_small_patch16_224", path)
    with pytest.raises(ValueError, match="unknown model 'deit_tiny'; did you mean"):
        fastvit.load_checkpoint("deit_tiny", path)
    with pytest.raises(
        TypeError, match="^model is 3, expected a fastvit.VisionTransformer, the name of a model or None$"
    ):
        fastvit.load_checkpoint(3, path)

"""`freeze` takes what `accelerate` knows: the models of torchvision and transformers, and timm's DINOv3."""

from __future__ import annotations

import pytest
import torch
from dropin_models import BY_NAME, OTHERS, every_family, images

import fastvit
from fastvit.accuracy import FACTOR, relative_rms
from fastvit.frozen import freeze

# Why some are not.
REFUSED = {
    "timm EVA-02": "holds a checkpoint of BEiT or EVA, which fastvit does not read",
    "transformers ViTMAE": "it computes something else",  # it shuffles patches, and leaves some out
    "SigLIP2 vision": "there is patch_embed.proj.weight of shape",  # its images come as patches
    "AST": "it takes no images as its parameters say",
    "timm NaFlexViT": "there is no patch_embed.proj.weight",
    "timm ViT with rotary positions": "it takes no images as its parameters say",
    "timm Perception Encoder": "there is norm_pre beside what no model that is known has with it",
}
WHAT = {"out": "logits", "logits": "logits", "last_hidden_state": "tokens", "pooler_output": "features"}


@every_family
def test_frozen_gives_what_the_model_gives(family):
    model, x = family.model(), images()
    if family.name in REFUSED:
        with pytest.raises(ValueError, match=f"cannot be frozen: .*{REFUSED[family.name]}"):
            freeze(model)
        return
    frozen = freeze(model, output=["logits", "features", "tokens"], runtime="torch")(x)
    with torch.no_grad():
        theirs = {name: value for name, value in family.run(model, x).items() if name in WHAT}
    if family.name in ("transformers ViT", "transformers DeiT"):
        del theirs["pooler_output"]  # through a layer and a tanh of its own
    if family.name == "transformers CLIP vision":
        del theirs["last_hidden_state"]  # before the last norm, which only the class token gets
    assert theirs
    for name, value in theirs.items():
        assert relative_rms(frozen[WHAT[name]], value) < 2e-6, name


@pytest.mark.parametrize("name", [*OTHERS])
def test_models_whose_layers_are_the_same_to_the_letter(name):
    model = OTHERS[name][0]().eval()
    if name == "BEiT":
        with pytest.raises(TypeError, match=r"BeitModel, expected a fastvit\.VisionTransformer, or one of timm"):
            freeze(model)
    elif name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            freeze(model)
    else:
        frozen = freeze(model, output="tokens", runtime="torch")
        with torch.no_grad():
            found = model(images())
        want = found.pooler_output[:, None] if "CLIP" in name else found.last_hidden_state
        got = frozen(images())[:, :1] if "CLIP" in name else frozen(images())
        assert relative_rms(got, want) < 2e-6


def test_classifiers_and_accelerated_models_in_half_precision():
    import transformers

    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.ViTConfig(**sizes, intermediate_size=96, num_labels=7)
    model = transformers.ViTForImageClassification(config).eval()
    fastvit.accelerate(model)
    with torch.no_grad():
        want = model(images()).logits
        assert relative_rms(freeze(model, runtime="torch")(images()), want) < 2e-6
        exact = model.double()(images(dtype=torch.float64)).logits
        half = model.bfloat16()
        theirs = relative_rms(half(images(dtype=torch.bfloat16)).logits, exact)
        ours = relative_rms(freeze(half, runtime="torch")(images(dtype=torch.bfloat16)), exact)
    assert ours <= FACTOR[torch.bfloat16] * theirs


class Wrapper(torch.nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(x.clamp(-1, 1)).last_hidden_state


def test_what_is_not_the_librarys_own_is_refused():
    import transformers

    model = BY_NAME["transformers Dinov2"].model()
    with pytest.raises(
        ValueError, match="Wrapper, is not of timm, torchvision, transformers, dinov2, expected the one"
    ):
        freeze(Wrapper(model).eval())
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    text = {"vocab_size": 9, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "bos_token_id": 0}
    config = transformers.SiglipConfig(text_config=text, vision_config={**vision, "intermediate_size": 96})
    both = transformers.SiglipModel(config).eval()
    with pytest.raises(ValueError, match="SiglipModel, is for images and text, expected its vision_model"):
        freeze(both)
    freeze(both.vision_model, runtime="torch")
    with torch.device("meta"), pytest.raises(ValueError, match="model has no weights: its parameters are on the meta"):
        freeze(BY_NAME["transformers Dinov2"].build().eval())
    with torch.device("meta"):
        freeze(model, runtime="torch")
    model.layernorm.bias.data[3] = torch.nan
    with pytest.raises(ValueError, match="model.layernorm.bias is not finite"):
        freeze(model)


def test_what_transformers_leaves_behind_is_no_hook_of_the_users():
    model = BY_NAME["transformers ViT"].model()
    with torch.no_grad():
        want = model(images(), output_hidden_states=True).last_hidden_state
    assert relative_rms(freeze(model, output="tokens", runtime="torch")(images()), want) < 2e-6


def test_what_a_plan_would_leave_out_is_found():
    """None of these can be seen in the parameters' names and shapes."""
    family = BY_NAME["transformers Dinov2"]
    for change, message in (
        (lambda model: setattr(model.encoder.layer[1].norm1, "eps", 1e-3), "its blocks differ"),
        (lambda model: setattr(model.layernorm, "eps", 1.0), "it computes something else"),
        (lambda model: model.encoder.layer[0].attention.register_forward_hook(lambda *_: None), "has hooks"),
        (lambda model: setattr(model.encoder.layer[0].attention, "scaling", 0.3), "it computes something else"),
        (lambda model: model.train(), "training mode"),
    ):
        model = family.model()
        change(model)
        with pytest.raises(ValueError, match=message):
            freeze(model, runtime="torch")

"""Small models of every family that `fastvit.accelerate` takes, each with random weights of realistic sizes, and what
they return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvit import torchvision_shim

torchvision_shim.install()
timm, torchvision, transformers = (pytest.importorskip(name) for name in ("timm", "torchvision", "transformers"))

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
CONFIG = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "mlp_ratio": 2,
}


@dataclass(frozen=True)
class Family:
    """A kind of model: what builds it, its blocks' options as the summary has them, and arguments of a call beside
    images."""

    name: str
    build: Callable[..., nn.Module]
    options: str
    arguments: dict = field(default_factory=dict)

    @property
    def input(self) -> str:
        """What the model calls its images."""
        return "pixel_values" if self.name.startswith("transformers") else "x"

    def __str__(self):
        return self.name

    def model(self, **overrides) -> nn.Module:
        """A model in evaluation, the same at every call."""
        torch.manual_seed(1)
        return randomise(self.build(**overrides)).eval()

    def run(self, model: nn.Module, images: torch.Tensor, **arguments) -> dict[str, torch.Tensor]:
        """What the model returns for images, by name."""
        given = {name: value[: len(images)].to(images.dtype) for name, value in self.arguments.items()}
        out = model(images, **given, **arguments)
        if isinstance(out, torch.Tensor):
            return {"out": out}
        found = {name: value for name, value in out.items() if value is not None}
        lists = {name: value for name, value in found.items() if isinstance(value, tuple)}
        tensors = {name: value for name, value in found.items() if name not in lists and value.is_floating_point()}
        return tensors | {f"{name}.{i}": value for name, values in lists.items() for i, value in enumerate(values)}


def randomise(model: nn.Module) -> nn.Module:
    """Parameters of the size that training gives, none of them zero; a few channels with numbers far larger than the
    rest, and tokens of unlike norms, as trained models have them."""
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in (m.weight,)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            last = name.rpartition(".")[2]
            if id(parameter) in norms or last in ("gamma", "lambda1"):
                parameter.normal_(1, 0.2)
            elif parameter.dim() < 2 and last != "class_embedding":
                parameter.normal_(0, 0.2)
            elif "token" in last or "pos" in name or "embedding" in last or last in ("latent", "probe"):
                parameter.normal_(0, 0.5)
                if parameter.shape[-1] == 48:
                    parameter[..., 5] += 10
                    parameter[..., 17] -= 6
            else:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model


def from_timm(name: str, **more) -> Callable[..., nn.Module]:
    return lambda **overrides: timm.create_model(name, **{**SMALL, "num_classes": 10, **more, **overrides})


def from_transformers(model: str, **more) -> Callable[..., nn.Module]:
    name = model.removesuffix("Model") + "Config"
    return lambda **overrides: getattr(transformers, model)(
        getattr(transformers, name)(**{**CONFIG, **more, **overrides})
    )


def from_torchvision(**overrides) -> nn.Module:
    return torchvision.models.VisionTransformer(
        **{"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96}
        | overrides
    )


NOISE = torch.rand(6, 16, generator=torch.Generator().manual_seed(3))
FAMILIES = [
    Family("timm ViT", from_timm("vit_tiny_patch16_224"), "eps 1e-06, gelu, qkv bias"),
    Family("timm DeiT, distilled", from_timm("deit_tiny_distilled_patch16_224"), "eps 1e-06, gelu, qkv bias"),
    Family(
        "timm DeiT III",
        from_timm("deit3_small_patch16_224"),
        "eps 1e-06, gelu, qkv bias, layer-scale",
    ),
    Family("timm DINOv2", from_timm("vit_small_patch14_dinov2"), "eps 1e-06, gelu, qkv bias, layer-scale"),
    Family(
        "timm DINOv2 with registers",
        from_timm("vit_small_patch14_reg4_dinov2"),
        "eps 1e-06, gelu, qkv bias, layer-scale",
    ),
    Family("timm DINOv2 giant", from_timm("vit_giant_patch14_dinov2"), "eps 1e-06, silu, qkv bias, layer-scale"),
    Family("timm CLIP", from_timm("vit_base_patch16_clip_quickgelu_224"), "eps 1e-05, quick_gelu, qkv bias"),
    Family("timm SigLIP", from_timm("vit_base_patch16_siglip_224", num_classes=0), "eps 1e-06, gelu, qkv bias"),
    Family(
        "timm ViT, no qkv bias, tanh",
        from_timm("vit_tiny_patch16_224", qkv_bias=False, act_layer="gelu_tanh"),
        "eps 1e-06, gelu_tanh, no qkv bias",
    ),
    Family(
        "timm EVA-02",
        from_timm("eva02_tiny_patch14_224", mlp_ratio=4 * 2 / 3, swiglu_mlp=True),
        "eps 1e-06, silu, some qkv bias",
    ),
    Family(
        "timm DINOv3",
        from_timm("vit_small_patch16_dinov3_qkvb"),
        "eps 1e-05, gelu, some qkv bias, layer-scale",
    ),
    Family("torchvision ViT", from_torchvision, "eps 1e-06, gelu, qkv bias"),
    Family("transformers ViT", from_transformers("ViTModel"), "eps 1e-12, gelu, qkv bias"),
    Family("transformers DeiT", from_transformers("DeiTModel"), "eps 1e-12, gelu, qkv bias"),
    Family("transformers Dinov2", from_transformers("Dinov2Model"), "eps 1e-06, gelu, qkv bias, layer-scale"),
    Family(
        "transformers Dinov2, SwiGLU",
        from_transformers("Dinov2Model", use_swiglu_ffn=True),
        "eps 1e-06, silu, qkv bias, layer-scale",
    ),
    Family(
        "transformers Dinov2WithRegisters",
        from_transformers("Dinov2WithRegistersModel", qkv_bias=False),
        "eps 1e-06, gelu, no qkv bias, layer-scale",
    ),
    # In training these draw a scale for their positions, if not told otherwise.
    Family(
        "transformers DINOv3ViT",
        from_transformers("DINOv3ViTModel", num_register_tokens=4, pos_embed_rescale=None),
        "eps 1e-05, gelu, some qkv bias, layer-scale",
    ),
    Family(
        "transformers DINOv3ViT, gated",
        from_transformers(
            "DINOv3ViTModel", use_gated_mlp=True, hidden_act="silu", num_register_tokens=2, pos_embed_rescale=None
        ),
        "eps 1e-05, silu, some qkv bias, layer-scale",
    ),
    Family("transformers CLIP vision", from_transformers("CLIPVisionModel"), "eps 1e-05, quick_gelu, qkv bias"),
    Family("transformers SigLIP vision", from_transformers("SiglipVisionModel"), "eps 1e-06, gelu_tanh, qkv bias"),
    Family(
        "transformers ViTMAE", from_transformers("ViTMAEModel"), "eps 1e-12, gelu, qkv bias", {"noise": NOISE}
    ),
]  # fmt: skip
# Other models, whose layers have to the letter the same forward passes, and the ops that they run on.
MASK = torch.arange(16) < torch.tensor([[12], [16]])
TWO_BLOCKS = ["patch_embed", "transformer_block", "transformer_block"]
OTHERS = {
    "SigLIP2 vision": (
        from_transformers("Siglip2VisionModel", num_patches=16),
        lambda x: {
            "pixel_values": F.unfold(x, 8, stride=8).mT,
            "pixel_attention_mask": MASK.long(),
            "spatial_shapes": torch.tensor([[3, 4], [4, 4]]),
        },
        TWO_BLOCKS[1:],
    ),
    "MetaCLIP 2 vision": (from_transformers("MetaClip2VisionModel"), None, TWO_BLOCKS),
    "ChineseCLIP vision": (from_transformers("ChineseCLIPVisionModel"), None, TWO_BLOCKS),
    "AltCLIP vision": (from_transformers("AltCLIPVisionModel"), None, TWO_BLOCKS),
    "ViTMSN": (from_transformers("ViTMSNModel"), None, TWO_BLOCKS),
    "I-JEPA": (from_transformers("IJepaModel"), None, TWO_BLOCKS),
    "BEiT": (
        from_transformers("BeitModel", use_relative_position_bias=True),
        None,
        ["patch_embed", *["attention"] * 2],
    ),
    "timm NaFlexViT": (
        from_timm("naflexvit_base_patch16_siglip", img_size=None, num_classes=0),
        None,
        TWO_BLOCKS[1:],
    ),
    "timm ViT with rotary positions": (from_timm("vit_base_patch16_rope_224"), None, TWO_BLOCKS),
    "timm Perception Encoder": (from_timm("vit_pe_core_base_patch16_224", num_classes=0), None, TWO_BLOCKS),
    "AST": (
        from_transformers("ASTModel", frequency_stride=8, time_stride=8, max_length=32, num_mel_bins=32),
        lambda x: {"input_values": x[:, 0]},
        TWO_BLOCKS,
    ),
}
BY_NAME = {family.name: family for family in FAMILIES}
every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)
one_of_each = pytest.mark.parametrize(
    "family", [BY_NAME[name] for name in ("timm DINOv2", "torchvision ViT", "transformers Dinov2")], ids=str
)


def first(out: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(iter(out.values()))


def images(batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(2)).to(dtype)


def gradients_of(family: Family, model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs, and gradients of a weighted sum of them by the image and every parameter."""
    x = x.clone().requires_grad_()
    out = family.run(model, x)
    slopes = {name: torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape) for name, y in out.items()}
    model.zero_grad()
    sum((y.double() * slopes[name]).sum() for name, y in out.items()).backward()
    found = {name: y.detach() for name, y in out.items()} | {"d image": x.grad}
    return found | {f"d {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

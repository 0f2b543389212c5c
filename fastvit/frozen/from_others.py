"""Models of torchvision and transformers, timm's DINOv3 and the original DINOv2 as ours: their tensors renamed as a
checkpoint's are, what shapes do not tell read off their blocks, and the outcome held to their own output."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from fastvit import accuracy, dispatch
from fastvit.dropin.layouts import ATTENTIONS, BLOCKS, activation_of, known_layout
from fastvit.dropin.swap import original_class
from fastvit.models.formats import to_timm
from fastvit.models.infer import infer_config
from fastvit.models.reading import facts_of, one_model
from fastvit.models.vision_transformer import VisionTransformer
from fastvit.models.weights import check_fit

from .serving import check_serves

# By how much float32 outputs may differ, relative rms: rounding, in another order of the same operations.
_CLOSE = 1e-5
# Whose code the model's own forward pass has to be: what another's does around a known model's is not looked at.
_LIBRARIES = ("timm", "torchvision", "transformers", "dinov2")


def as_ours(model: nn.Module) -> VisionTransformer | None:
    """The model as ours, its tensors shared where they are of the same form; None where it has no block that is known.

    Raises ValueError for a model that `check_serves` refuses, or that computes something else than ours.
    """
    blocks = [(block, layout) for block in model.modules() if (layout := _layout(BLOCKS, block)) is not None]
    if not blocks:
        return None
    check_serves(model)
    kind = original_class(model) or type(model)
    name = kind.__name__
    if hasattr(model, "vision_model") and hasattr(model, "text_model"):
        raise ValueError(f"model, a {name}, is for images and text, expected its vision_model")
    if kind.__module__.partition(".")[0] not in _LIBRARIES:
        raise ValueError(f"model, a {name}, is not of {', '.join(_LIBRARIES)}, expected the one inside that is")
    try:
        state, format = to_timm(one_model(f"model, a {name},", model.state_dict()))
        config, _ = infer_config(state, {**format.facts, **_facts(model, blocks)})
        if config.rope_temperature is not None:  # of DINOv3 transformers returns the class token, timm what it is told
            after = not isinstance(getattr(model, "fc_norm", nn.Identity()), nn.Identity)
            config = replace(config, global_pool=getattr(model, "global_pool", "token"), fc_norm=after)
        with torch.device("meta"):
            ours = VisionTransformer(config).eval()
        state = {key: tensor.detach() for key, tensor in state.items() if key != "mask_token"}
        check_fit(state, ours.state_dict(), format, "it")
    except (ValueError, TypeError) as error:
        raise ValueError(f"model, a {name}, cannot be frozen: {error}") from error
    ours.load_state_dict(state, assign=True)
    if reason := _differs(model, ours, format.source):
        raise ValueError(f"model, a {name}, cannot be frozen: {reason}")
    return ours


def _layout(layouts: dict, module: nn.Module):
    return known_layout(layouts, module, original_class(module))


def _facts(model: nn.Module, blocks: list) -> dict[str, object]:
    """What the model and its blocks say that shapes do not. Raises ValueError where they do not agree."""
    found = []
    for block, layout in blocks:
        attention, mlp = block._modules[layout.attention], block.get_submodule(layout.mlp)
        inside = _layout(ATTENTIONS, attention)
        if inside is None:
            raise ValueError(f"its attention, a {type(attention).__name__}, is not known")
        acts = [name for module in mlp.modules() if (name := activation_of(module)) is not None]
        eps, heads = block._modules[layout.norm1].eps, inside.num_heads(attention)
        found.append({"norm_eps": eps, "num_heads": heads, "activation": acts[0] if acts else "silu"})
    if any(facts != found[0] for facts in found):
        raise ValueError("its blocks differ")
    said = getattr(model, "config", None)
    more = facts_of(said.to_dict()) if hasattr(said, "to_dict") else {}  # transformers'
    prepared = getattr(model, "pretrained_cfg", None) or {}  # timm's
    more |= {name: tuple(prepared[name]) for name in ("mean", "std") if prepared.get(name)}
    temperature = getattr(getattr(model, "rope", None), "temperature", None)
    return {**more, **({"rope_temperature": temperature} if temperature else {}), **found[0]}


def _differs(model: nn.Module, ours: VisionTransformer, source: str) -> str | None:
    """Why ours is not what the model computes, if it is not."""
    like = next(ours.parameters())
    if like.dtype.itemsize == 2:  # whose rounding would hide a difference
        model, ours = (copy.deepcopy(each).float() for each in (model, ours))
    # Two images, one of them large: what is done to a batch, or to the range of pixels, shows.
    how = {"generator": torch.Generator("cpu").manual_seed(0), "device": "cpu"}
    one, other = torch.randn(2, ours.config.in_chans, *ours.config.img_size, **how)
    images = torch.stack([one, 9 * other]).to(next(ours.parameters()))
    with torch.inference_mode(), dispatch.use_backend("torch"):
        try:
            found = model(images)
        except Exception as error:  # whatever another library says to images that are not for it
            return f"it takes no images as its parameters say: {type(error).__name__}: {error}"
        tokens = ours.forward_features(images)
        mine = {"tokens": tokens, "features": ours.forward_head(tokens, pre_logits=True), "logits": ours(images)}
        pairs = [(mine[name], value) for name, value in _outputs(found, source)]
    if not pairs:
        return "it returns nothing that a Vision Transformer of ours returns"
    for got, want in pairs:
        error = accuracy.relative_rms(got, want) if got.shape == want.shape else float("inf")
        if not error <= _CLOSE:
            return f"it computes something else than what its parameters and its blocks say: error {error:.1e}"
    return None


def _outputs(found, source: str) -> Iterator[tuple[str, torch.Tensor]]:
    """What the model returned, and which of our outputs each is."""
    if isinstance(found, torch.Tensor):
        yield "logits", found
        return
    names = {"logits": "logits", "image_embeds": "logits", "last_hidden_state": "tokens"}
    if source in ("transformers' CLIP", "transformers' SigLIP"):  # whose last norm may come after the tokens
        names = {"logits": "logits", "image_embeds": "logits", "pooler_output": "features"}
    for theirs, name in names.items():
        if getattr(found, theirs, None) is not None:
            yield name, getattr(found, theirs)

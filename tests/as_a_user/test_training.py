"""Users' stories of training: fine-tuning, adapters, dense prediction, masks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pairs import BACKENDS, NAME, SMALL, close, gradients, pair, randomised, timm
from torch import nn
from torch.nn.utils import prune

import fastvit

pytest.importorskip("timm.optim")
pytest.importorskip("timm.utils")


def fine_tune(model, images, labels, steps=3):
    """What timm's training script does: layer-wise learning rates, accumulation, clipping, averaged weights."""
    torch.manual_seed(1)
    model.train()
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    average, losses = timm.utils.ModelEmaV3(model, decay=0.9), []
    for _ in range(steps):
        for half in (slice(0, 2), slice(2, None)):
            loss = F.cross_entropy(model(images[half]), labels[half], label_smoothing=0.1) / 2
            loss.backward()
            losses.append(loss.item())
        timm.utils.dispatch_clip_grad(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(model)
    groups = [(group["lr_scale"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    return losses, groups, average.module.eval()


@pytest.mark.parametrize(
    "name, overrides",
    [
        (NAME, {"drop_path_rate": 0.2, "global_pool": "avg"}),
        ("vit_small_patch14_reg4_dinov2", {"proj_drop_rate": 0.1, "patch_drop_rate": 0.3}),
    ],
)
def test_fine_tuning_goes_as_with_timm(name, overrides, images):
    model, peer = pair(name, **overrides)
    labels = torch.tensor([1, 4, 0])
    for each in (model, peer):
        each.reset_classifier(5)
    model.load_state_dict(peer.state_dict())
    results = [fine_tune(each, images, labels) for each in (model, peer)]
    close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    close(results[0][2](images), results[1][2](images), rtol=1e-2, atol=1e-2)


class LoRA(nn.Module):
    """A linear layer with a trained product of low rank beside it (arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_prompts_and_pruning_on_frozen_weights(backend, images):
    """Layers are replaced, hooked and reparametrised after loading, as peft and prompt tuning do."""
    results = []
    for model in pair():
        torch.manual_seed(2)
        model.requires_grad_(False)
        model.blocks[0].attn.qkv = LoRA(model.blocks[0].attn.qkv)
        model.blocks[1].mlp.fc2 = LoRA(model.blocks[1].mlp.fc2)
        prune.random_unstructured(model.blocks[0].mlp.fc1, "weight", 0.5)
        prompts = nn.Parameter(torch.randn(1, 4, 48))

        def prepend(module, arguments, prompts=prompts):
            return (torch.cat([arguments[0][:, :1], prompts.expand(3, -1, -1), arguments[0][:, 1:]], 1),)

        model.blocks[1].register_forward_pre_hook(prepend)
        with fastvit.use_backend(backend):
            logits = model(images)
            logits.square().mean().backward()
        results.append((logits, prompts.grad, gradients(model)))
    close(*results)
    assert results[0][2].keys() >= {"blocks.0.attn.qkv.up.weight", "blocks.1.mlp.fc2.down.weight"}


class Segmenter(nn.Module):
    def __init__(self, library):
        super().__init__()
        arguments = {name: value for name, value in SMALL.items() if name != "num_classes"}
        self.backbone = library.create_model(
            NAME, features_only=True, out_indices=(0, 1), dynamic_img_size=True, **arguments
        )
        self.head = nn.Conv2d(sum(self.backbone.feature_info.channels()), 4, 1)

    def forward(self, x):
        return F.interpolate(self.head(torch.cat(self.backbone(x), 1)), x.shape[-2:], mode="bilinear")


def test_a_segmenter_of_images_of_every_size():
    peer, model = randomised(Segmenter(timm)), Segmenter(fastvit)
    model.load_state_dict(peer.state_dict())
    for size in ((32, 32), (48, 24), (16, 56)):
        images, labels = torch.randn(2, 3, *size), torch.randint(4, (2, *size))
        results = []
        for each in (model, peer):
            each.zero_grad()
            logits = each(images)
            F.cross_entropy(logits, labels).backward()
            results.append((logits, gradients(each)))
        close(*results)
    for each in (model, peer):
        each.backbone.model.set_input_size(64)
    images = torch.randn(1, 3, 64, 64)
    close(model(images), peer(images))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_and_causal_sequences(backend, images):
    model, peer = pair(depth=1)
    padding = (torch.arange(17) < torch.tensor([9, 17, 4])[:, None])[:, None, None]
    with fastvit.use_backend(backend):
        for mask in ({"attn_mask": padding}, {"attn_mask": torch.randn(3, 17, 17)}, {"is_causal": True}):
            results = []
            for each in (model, peer):
                each.zero_grad()
                logits = each(images, **mask)
                logits.square().mean().backward()
                results.append((logits, gradients(each)))
            close(*results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (6,), (6, 1), (6, 6), (2, 1, 6), (3, 2, 6, 6), (3, 1, 1, 6)])
def test_a_position_bias_of_any_shape(shape, backend):
    """Each shape that broadcasts, with its gradient, as in scaled_dot_product_attention."""
    qkv = torch.randn(3, 6, 3, 2, 8, requires_grad=True)
    bias = torch.randn(shape, requires_grad=True)
    upstream = torch.randn(3, 6, 16)
    with fastvit.use_backend(backend):
        out = fastvit.ops.attention(qkv, attn_bias=bias)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    want = F.scaled_dot_product_attention(q, k, v, bias.expand(3, 2, 6, 6)).transpose(1, 2).flatten(2)
    close(out, want)
    close(*(torch.autograd.grad(y, [qkv, bias], upstream) for y in (out, want)))

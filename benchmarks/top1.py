"""Published top-1 accuracies on ImageNet, each with its source, of the networks that `fastvit bench --baselines` times.

Of networks trained on ImageNet-1k alone, on its validation images, one crop of 224 pixels: the size that is timed. A
network that was trained by two recipes has two figures and one speed. ViT-S/16 and ViT-B/16 are not here: they are the
networks of DeiT-S and DeiT-B.
"""

from __future__ import annotations

from dataclasses import dataclass

SIZE = 224
TIMM = "[timm's results](https://github.com/huggingface/pytorch-image-models/blob/0173a139a2c66db3a41ebfe1d8ac4fb02483642e/results/results-imagenet.csv)"  # noqa: E501
DEIT = "[DeiT's model zoo](https://github.com/facebookresearch/deit/blob/4da66916c72caaeaeb5da788390244524fa993c6/README_deit.md)"  # noqa: E501
PAPER = "[arXiv 2012.12877](https://arxiv.org/abs/2012.12877v2), Table 5"
STRIKES = "[arXiv 2110.00476](https://arxiv.org/abs/2110.00476), abstract"


@dataclass(frozen=True)
class Figure:
    """network: its name, ours or timm's; weights: as timm names them after the network's name; label: of both, in the
    picture."""

    network: str
    weights: str
    label: str
    top1: float
    source: str


FIGURES = (
    Figure("resnet18", "tv_in1k", "ResNet-18", 69.76, TIMM),
    Figure("resnet50", "tv_in1k", "ResNet-50", 76.13, TIMM),
    Figure("resnet50", "a1_in1k", "ResNet-50, A1", 80.4, STRIKES),
    Figure("regnety_160", "pycls_in1k", "RegNetY-16GF", 80.298, TIMM),
    Figure("regnety_160", "deit_in1k", "RegNetY-16GF, DeiT's recipe", 82.9, PAPER),
    Figure("deit_tiny_patch16_224", "fb_in1k", "DeiT-Ti", 72.2, DEIT),
    Figure("deit_small_patch16_224", "fb_in1k", "DeiT-S", 79.9, DEIT),
    Figure("deit_base_patch16_224", "fb_in1k", "DeiT-B", 81.8, DEIT),
    Figure("deit_tiny_distilled_patch16_224", "fb_in1k", "DeiT-Ti distilled", 74.5, DEIT),
    Figure("deit_small_distilled_patch16_224", "fb_in1k", "DeiT-S distilled", 81.2, DEIT),
    Figure("deit_base_distilled_patch16_224", "fb_in1k", "DeiT-B distilled", 83.4, DEIT),
    Figure("vit_base_patch32_224", "augreg_in1k", "ViT-B/32", 74.894, TIMM),
)
NETWORKS = tuple(dict.fromkeys(figure.network for figure in FIGURES))

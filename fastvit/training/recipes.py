"""How a ViT is trained: every value that a training run depends on, and the published recipes as presets.

DeiT: arXiv 2012.12877, table 9, and the defaults and commands of facebookresearch/deit (main.py, README_deit.md).
DeiT III: arXiv 2204.07118, and the commands of README_revenge.md there. Both papers step the learning rate once an
epoch; here it moves at every step, on the same curve.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace

PRECISIONS = ("float32", "amp-bfloat16", "bfloat16", "amp-float16")
LOSSES = ("cross-entropy", "binary-cross-entropy")
DISTILLATIONS = ("hard", "soft")


def _value(default, help: str, least: float = 0, most: float = math.inf, among: tuple[str, ...] = ()):
    return field(default=default, metadata={"help": help, "least": least, "most": most, "among": among})


@dataclass(frozen=True)
class Recipe:
    """Every value of a training run. Images are those of an optimizer step over all processes, not of each.

    Raises ValueError or TypeError naming the field, what came and what was expected.
    """

    # Length and size
    epochs: int = _value(300, "times through the data", 1)
    batch_size: int = _value(1024, "images an optimizer step, over all processes", 1)
    accumulate: int = _value(1, "parts that a step's images are worked through in, to need less memory", 1)
    # The optimizer
    optimizer: str = _value("adamw", "a name of timm.optim; adamw is PyTorch's fused one")
    lr: float = _value(5e-4, "the highest learning rate")
    lr_images: int = _value(512, "batch size that lr is for: it grows in proportion; 0: lr as it is")
    min_lr: float = _value(1e-5, "where the cosine ends")
    warmup_epochs: float = _value(5.0, "of a linear rise from warmup_lr")
    warmup_lr: float = _value(1e-6, "where the rise begins")
    weight_decay: float = _value(0.05, "of weights; biases, norms, tokens and positions have none")
    layer_decay: float = _value(1.0, "factor of the learning rate from each layer to the one below; 1: none", 0.01, 1)
    clip_grad: float = _value(0.0, "largest norm of all gradients; 0: not clipped")
    # Regularisation
    drop_path: float = _value(0.1, "rate of stochastic depth in the last block; it grows from 0 linearly", 0, 0.99)
    dropout: float = _value(0.0, "rate before the classifier", 0, 0.99)
    ema: float = _value(0.99996, "decay of the averaged weights a step; 0: none are kept", 0, 0.9999999)
    # The loss
    loss: str = _value("cross-entropy", "or a binary one for each class", among=LOSSES)
    smoothing: float = _value(0.1, "label smoothing", 0, 0.99)
    mixup: float = _value(0.8, "alpha of the Beta distribution that mixes pairs of images; 0: off")
    cutmix: float = _value(1.0, "alpha for pasting a part of another image; 0: off")
    mixup_prob: float = _value(1.0, "of a batch to be mixed or pasted at all", 0, 1)
    mixup_switch_prob: float = _value(0.5, "of pasting rather than mixing where both are on", 0, 1)
    distillation: str = _value("hard", "the teacher's choice as a label, or its distribution", among=DISTILLATIONS)
    distillation_alpha: float = _value(0.5, "the teacher's share of the loss", 0, 1)
    distillation_temperature: float = _value(3.0, "of soft distillation", 0.01)
    # Augmentation of single images
    crop_scale: float = _value(0.08, "smallest share of the area that a random crop takes", 0.001, 1)
    hflip: float = _value(0.5, "probability of mirroring", 0, 1)
    auto_augment: str = _value("rand-m9-mstd0.5-inc1", "timm's name of a policy; none: off")
    color_jitter: float = _value(0.4, "strength; timm leaves it out beside RandAugment")
    erase: float = _value(0.25, "probability of erasing a rectangle with noise", 0, 1)
    repeats: int = _value(3, "times an image comes in an epoch, each augmented anew, of the fewer that then come", 1)

    def __post_init__(self):
        for entry in fields(self):
            value, kind, said = getattr(self, entry.name), type(entry.default), entry.metadata
            if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
                raise TypeError(f"{entry.name} is {value!r}, expected {kind.__name__}")
            if kind is str:
                if said["among"] and value not in said["among"]:
                    raise ValueError(f"{entry.name} is {value!r}, expected one of {said['among']}")
            elif not (said["least"] <= value <= said["most"] and math.isfinite(value)):
                most = "" if said["most"] == math.inf else f" and at most {said['most']}"
                raise ValueError(f"{entry.name} is {value}, expected at least {said['least']}{most}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate is {self.accumulate}, expected a divisor of batch_size, {self.batch_size}")
        if self.loss == "binary-cross-entropy" and self.smoothing:
            raise ValueError(
                f"smoothing is {self.smoothing}, expected 0 for {self.loss}: every mixed class counts as 1"
            )

    @property
    def peak_lr(self) -> float:
        return self.lr * self.batch_size / self.lr_images if self.lr_images else self.lr

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with each other."""
        return bool(self.mixup or self.cutmix)


# ViT-S; the larger ones have lr 3e-3, more drop_path (B 0.2, L 0.45, H 0.6) and begin with 192 or 160 pixels.
_DEIT3 = Recipe(
    epochs=800,
    batch_size=2048,
    optimizer="lamb",
    lr=4e-3,
    lr_images=0,
    drop_path=0.05,
    ema=0.0,
    loss="binary-cross-entropy",
    smoothing=0.0,
    auto_augment="3a",
    color_jitter=0.3,
    erase=0.0,
)

RECIPES = {
    "deit": Recipe(),
    # For a larger image size: of 384 pixels, from weights of 224.
    "deit-finetune": Recipe(epochs=30, batch_size=512, lr=5e-6, min_lr=5e-6, weight_decay=1e-8),
    "deit3": _DEIT3,
    "deit3-finetune": replace(
        _DEIT3,
        epochs=20,
        batch_size=512,
        optimizer="adamw",
        lr=1e-5,
        weight_decay=0.1,
        drop_path=0.2,
        loss="cross-entropy",
        smoothing=0.1,
        auto_augment="rand-m9-mstd0.5-inc1",
        repeats=1,
    ),
}

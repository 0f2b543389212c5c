"""The losses of a recipe: of labels, hard, smoothed or mixed, and of a teacher's answers (DeiT, arXiv 2012.12877)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .recipes import Recipe

Logits = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def label_loss(recipe: Recipe) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Loss of logits (B, K) and of targets, (B,) or, of mixed images, (B, K), which are smoothed already.

    cross-entropy: - sum_k t_k log softmax(z)_k, the mean over images. binary-cross-entropy: of each class by itself, 1
    for every class with a share in the target, the mean over images and classes (DeiT III, arXiv 2204.07118).
    """
    if recipe.loss == "binary-cross-entropy":
        return _binary
    return lambda logits, targets: F.cross_entropy(
        logits.float(), targets, label_smoothing=0.0 if targets.ndim == 2 else recipe.smoothing
    )


def _binary(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if targets.ndim == 1:
        targets = F.one_hot(targets, logits.shape[1])
    return F.binary_cross_entropy_with_logits(logits.float(), (targets > 0).float())


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Loss of a student's logits (B, K) against a teacher's (B, K): the teacher's term of equations 2 and 3 of the
    paper.

    hard: cross-entropy with the teacher's likeliest class. soft: T^2 KL(softmax(teacher / T) || softmax(student / T)),
    T the temperature, the mean over images. (The authors' code divides by images times classes instead.)
    """
    student, teacher = student.float(), teacher.float()
    if recipe.distillation == "hard":
        return F.cross_entropy(student, teacher.argmax(dim=1))
    t = recipe.distillation_temperature
    return t * t * F.kl_div(
        F.log_softmax(student / t, dim=1), F.log_softmax(teacher / t, dim=1), reduction="batchmean", log_target=True
    )  # fmt: skip


def total_loss(
    logits: Logits, targets: torch.Tensor, teacher: torch.Tensor | None, loss: Callable, recipe: Recipe
) -> torch.Tensor:
    """(1 - alpha) loss of the labels + alpha loss of the teacher's answer, or the former alone without a teacher.

    logits: (B, K), for both; or a distilled model's pair, the class head's for the labels and the distillation head's
    for the teacher.
    """
    if teacher is None:
        return loss(logits, targets)
    for_labels, for_teacher = logits if isinstance(logits, tuple) else (logits, logits)
    alpha = recipe.distillation_alpha
    return (1 - alpha) * loss(for_labels, targets) + alpha * distillation_loss(for_teacher, teacher, recipe)

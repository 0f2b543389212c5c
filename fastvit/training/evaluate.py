"""How good a model is: top-1 and top-5 of its classifier; of its features, k-NN and a linear probe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .data import Batch


@torch.no_grad()
def accuracy(
    model: Callable, loader: Iterable[Batch], device: torch.device, count: int, skip: Callable[[str], None]
) -> dict[str, float]:
    """top1 and top5 of a model's logits over `count` images, and how many `images` were readable. With several
    processes all call it, each for its own images. Raises ValueError where no image can be read, and for an output that
    is not finite."""
    hits = torch.zeros(3, count)  # seen, top-1, top-5
    for batch in _telling(loader, skip):
        logits = model(batch.images.to(device, non_blocking=True)).float()
        if not logits.isfinite().all():
            raise ValueError("the model's output is not finite")
        order = logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu()
        right = order == batch.labels[:, None]
        rows = torch.stack([torch.ones(len(right)), right[:, 0].float(), right.any(dim=1).float()])
        hits[:, batch.indices] = rows
    if dist.is_initialized() and dist.get_world_size() > 1:
        hits = hits.to(device)
        dist.all_reduce(hits, dist.ReduceOp.MAX)
    seen, first, five = hits.sum(dim=1).tolist()
    if not seen:
        raise ValueError("none of the images can be read")
    return {"top1": first / seen, "top5": five / seen, "images": int(seen)}


@torch.no_grad()
def features(
    extract: Callable, loader: Iterable[Batch], device: torch.device, skip: Callable[[str], None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, D), float32 on the CPU, and labels (N,) of the images that can be read."""
    rows, labels, seen = [], [], set()
    for batch in _telling(loader, skip):
        fresh = [i for i, index in enumerate(batch.indices) if not (index in seen or seen.add(index))]
        rows.append(extract(batch.images.to(device, non_blocking=True)).float().cpu()[fresh])
        labels.append(batch.labels[fresh])
    return torch.cat(rows), torch.cat(labels)


def _telling(loader: Iterable[Batch], skip: Callable[[str], None]) -> Iterator[Batch]:
    """The batches, each image that cannot be read told once: a neighbour that cannot either meets it again."""
    told = set()
    for batch in loader:
        for index, reason in batch.bad:
            if index not in told:
                told.add(index)
                skip(reason)
        yield batch


def knn(
    train: torch.Tensor, train_labels: torch.Tensor, test: torch.Tensor, test_labels: torch.Tensor, classes: int,
    k: int = 20, temperature: float = 0.07,
) -> float:  # fmt: skip
    """Top-1 of the weighted vote of the k nearest training images by cosine, weights exp(cosine / temperature), as
    DINO (arXiv 2104.14294) and, before it, arXiv 1805.01978 have it."""
    train, test, k = F.normalize(train), F.normalize(test), min(k, len(train))
    right = 0
    for rows, labels in zip(test.split(256), test_labels.split(256), strict=True):
        nearness, which = (rows @ train.T).topk(k, dim=1)
        votes = torch.zeros(len(rows), classes).scatter_add_(
            1, train_labels[which], (nearness / temperature).exp()
        )  # fmt: skip
        right += (votes.argmax(dim=1) == labels).sum().item()
    return right / len(test)


def linear_probe(
    train: torch.Tensor, train_labels: torch.Tensor, test: torch.Tensor, test_labels: torch.Tensor, classes: int,
    decay: float = 1e-4,
) -> float:  # fmt: skip
    """Top-1 of logistic regression on the features, which are standardised first: the minimum, by L-BFGS, of the mean
    cross-entropy plus decay / 2 times the squared weights."""
    mean, std = train.mean(dim=0), train.std(dim=0).clamp_min(1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    weight = torch.zeros(classes, train.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(train, weight, bias), train_labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return (F.linear(test, weight, bias).argmax(dim=1) == test_labels).float().mean().item()

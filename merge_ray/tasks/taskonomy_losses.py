"""What the answers to Taskonomy's tasks are worth: losses, the label average as an estimator, scaled performance.

Losses are those of the evaluation of training-free merging (Xu et al., arXiv:2403.01753); all are the lower the better.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from merge_ray.tasks.taskonomy_labels import SEMANTIC_CLASSES


def sample_losses(task: str, answers: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Every sample's loss and how much it counts: float64 ``[B, 2]``; see :func:`mean_loss`.

    answers: ``[B, C, H, W]``, or logits ``[B, 1000]`` for class_object. targets, weights: as
    :class:`merge_ray.tasks.taskonomy_labels.Batch` has them.

    class_object: the cross entropy with the target's probabilities. segment_semantic: the share of wrong pixels by
    weight. curvature: the squared error. Others: the absolute error. Losses of weighted pixels are means over all
    pixels of all samples; without weights every sample counts alike.
    """
    if task == "class_object":
        losses = functional.cross_entropy(answers, targets, reduction="none")
    elif task == "segment_semantic":
        losses = (answers.argmax(dim=1) != targets).double()
    else:
        losses = (answers - targets).abs()
        losses = losses.square() if task == "curvature" else losses
    losses = losses.double()
    if weights is None:
        means = losses.flatten(1).mean(dim=1) if losses.ndim > 1 else losses
        return torch.stack([means, torch.ones_like(means)], dim=1)
    spread = weights.double().expand_as(losses).flatten(1)
    totals = spread.sum(dim=1)
    sums = (losses.flatten(1) * spread).sum(dim=1)
    # A sample without a single pixel that counts has no loss.
    return torch.stack([sums / totals.clamp(min=torch.finfo(torch.float64).tiny), totals], dim=1)


def mean_loss(losses: np.ndarray) -> tuple[float, float]:
    """The loss over samples with losses and weights ``[N, 2]``, and its standard error (of a ratio, linearised).

    NaN where no sample counts.
    """
    values, weights = losses.T
    total = float(weights.sum())
    if not total:
        return float("nan"), float("nan")
    mean = float(values @ weights) / total
    return mean, float(np.sqrt(np.square((values - mean) * weights).sum())) / total


def average_label(task: str, batches: Iterable[Tensor], released: bool = False) -> Tensor:
    """The mean of the targets in ``batches`` (each ``[B, ...]``), as one answer ``[C, H, W]``, or logits ``[1000]``.

    Class maps ``[B, H, W]`` are averaged as one-hot maps ``[17, H, W]``.

    released: what the authors' code computes instead: the sum of the last batch's targets alone, divided by the number
    of all samples, with height and width of class maps exchanged. Their published scaled performances start from it.
    """
    total, count = torch.zeros(()), 0
    for targets in batches:
        count += len(targets)
        if task == "segment_semantic":
            targets = functional.one_hot(targets, SEMANTIC_CLASSES).movedim(-1, 1).float()
            targets = targets.mT if released else targets
        summed = targets.sum(dim=0)
        total = summed if released else total + summed
    return total / count


def scaled_performance(losses: np.ndarray, estimator: np.ndarray, pretrained: np.ndarray) -> np.ndarray:
    """How far ``losses`` are from the label average's to the task's own model's: 1 as good as that, 0 as the average.

    All ``[..., D]`` over D buildings; the ratio is taken in each building and then averaged: ``[...]``.
    """
    scaled: np.ndarray = ((estimator - losses) / (estimator - pretrained)).mean(axis=-1)
    return scaled

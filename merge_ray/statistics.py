"""Statistics of activations, streamed over batches, and batch-norm statistics made again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class BatchMean:
    """A mean over batches, each of which counts as often as it has samples.

    total: the weighted sum. samples: their number.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.samples = 0

    def add(self, value: Tensor, samples: int) -> None:
        """Add a batch's ``value``."""
        self.samples += samples
        self.total = value * samples if self.total is None else self.total.add_(value, alpha=samples)

    @property
    def mean(self) -> Tensor:
        """The mean so far, shaped as the values."""
        assert self.total is not None, "a mean of no batches"
        return self.total / self.samples


# What is averaged over batches; ``features`` are ``[n, M]``: channels by samples and positions.


def second_moment(features: Tensor) -> Tensor:
    """``X X^T / M``: ``[n, n]``."""
    return (features @ features.T).div_(features.shape[1])


def mean_magnitude(features: Tensor) -> Tensor:
    """The mean of absolute values ``[n]``."""
    return features.abs().mean(dim=1)


def mean_cosine(features: Tensor) -> Tensor:
    """The cosines of the channels over ``M``: ``[n, n]``, as MuDSC's edition of ZipIt has them.

    The division by ``M`` changes no matching. ZipIt's own code leaves it out.
    """
    rows = torch.nn.functional.normalize(features, dim=1)
    return (rows @ rows.T).div_(features.shape[1])


class ActivationMoments:
    """The covariance of channels over all batches.

    mean, second: the :class:`BatchMean` of means ``[n]`` and second moments ``[n, n]``. observations: the values seen
    of each channel.
    """

    def __init__(self) -> None:
        self.mean, self.second = BatchMean(), BatchMean()
        self.observations = 0

    def add(self, features: Tensor, samples: int) -> None:
        """Add a batch of ``samples`` with ``features`` ``[n, M]``."""
        self.mean.add(features.mean(dim=1), samples)
        self.second.add(second_moment(features), samples)
        self.observations += features.shape[1]

    @property
    def covariance(self) -> Tensor:
        """Biased, ``[n, n]``."""
        mean = self.mean.mean
        return self.second.mean.sub_(torch.outer(mean, mean))


@torch.no_grad()
def reset_batch_norm(models: Sequence[nn.Module], batches: Iterable[Tensor], *, clear: bool = True) -> None:
    """Make the running statistics of every ``BatchNorm2d`` again: the plain mean over the batches' statistics.

    All models see the same batches ``[B, ...]`` once, in training mode: a layer's input is normalised by batch
    statistics before it, batches count equally, and variances are unbiased. Other normalisations are updated with
    their own momentum. Without ``clear`` those of ``BatchNorm2d`` are too.

    Merging changes the statistics of every layer, so all models that are compared get this (Jordan et al., REPAIR,
    ICLR 2023; MuDSC).
    """
    with _training(models, clear):
        for batch in batches:
            for model in models:
                model(batch)


@contextmanager
def _training(models: Sequence[nn.Module], clear: bool) -> Iterator[None]:
    modes = {module: module.training for model in models for module in model.modules()}
    # Subclasses have rules of their own; published code leaves them alone.
    norms = [module for module in modes if type(module) is nn.BatchNorm2d] if clear else []
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    for model in models:
        model.train()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode

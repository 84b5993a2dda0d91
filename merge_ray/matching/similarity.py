"""How similar channels are: correlations and cosines of what belongs to them."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-7
"""The least that a covariance is divided by: dead channels correlate with nothing."""


def correlation_of(covariance: Tensor) -> Tensor:
    """Pearson correlations ``[n, n]`` of a covariance matrix ``[n, n]``."""
    deviation = covariance.diagonal().clamp(min=0).sqrt()
    return covariance / torch.outer(deviation, deviation).clamp_(min=SMALLEST)


def correlation(rows: Tensor) -> Tensor:
    """Pearson correlations ``[n, n]`` of the rows of ``[n, F]``, from their biased covariance."""
    mean = rows.mean(dim=1)
    return correlation_of((rows @ rows.T).div_(rows.shape[1]).sub_(torch.outer(mean, mean)))


def cosine(rows: Tensor) -> Tensor:
    """Cosines ``[n, n]`` of the rows of ``[n, F]``."""
    norm = rows.norm(dim=1)
    return (rows @ rows.T).div_(torch.outer(norm, norm).clamp_(min=SMALLEST))


def paired_products(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The dot products ``[C, C]`` of the rows of ``b`` with those of ``a``, both ``[C, F]``, and products of norms.

    What is exactly zero in one is zeroed in the other first, index by index, as Git Re-Basin's reference for these
    models does, so that pruned weights count on neither side.
    """
    both = (a != 0) & (b != 0)
    a, b = a * both, b * both
    return b @ a.T, torch.outer(b.norm(dim=1), a.norm(dim=1))

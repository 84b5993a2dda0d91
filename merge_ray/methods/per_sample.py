"""Answers to samples that each have merging coefficients of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from merge_ray import kernels
from merge_ray.bank import ModelBank
from merge_ray.methods.base import TaskModel


def outcomes_per_sample(bank: ModelBank, model: TaskModel, positions: Any, coefficients: Tensor) -> Tensor:
    """``model.outcomes`` ``[B]`` of the samples at ``positions``, sample ``i`` with ``theta_0 + sum_t c_it tau_t``.

    coefficients: ``[B, T]``, or ``[B, T, L]`` with one for each of the ``L`` tensors of the layout, in its order.
    Samples with equal coefficients share a merge and a forward pass. Leaves other weights in ``model.flat``.
    """
    places = np.arange(len(model))[positions]
    distinct, groups = torch.unique(coefficients.cpu().float(), dim=0, return_inverse=True)
    order = torch.argsort(groups, stable=True)
    parts = []
    for group, members in enumerate(order.split(groups.bincount(minlength=len(distinct)).tolist())):
        merge_into(bank, distinct[group], model.flat)
        parts.append(model.outcomes(places[members.numpy()]))
    return torch.cat(parts)[torch.argsort(order).to(parts[0].device)]


def merge_into(bank: ModelBank, coefficients: Tensor, out: Tensor) -> None:
    """``out = theta_0 + sum_t c_t tau_t`` ``[P]`` with coefficients ``[T]``, or ``[T, L]`` by tensor of the layout."""
    if coefficients.ndim == 1:
        kernels.weighted_sum(bank.task_vectors, coefficients.tolist(), out, bank.base)
    else:
        kernels.merge_layers(bank.base, bank.task_vectors, coefficients, bank.layout.bounds, out)

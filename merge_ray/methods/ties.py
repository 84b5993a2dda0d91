"""TIES: trim the task vectors, elect a sign for every weight, merge the entries that agree with it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from merge_ray import kernels
from merge_ray.methods.base import Merged, MergeInputs, Method, SharedWeights, param, register
from merge_ray.space import Choice, Float


@register("ties", paper="Yadav et al., TIES-Merging, NeurIPS 2023", by_columns=True)
@dataclass(frozen=True)
class Ties(Method):
    """``theta_0 + lambda tau``, where ``tau`` ``[P]`` merges the trimmed task vectors in which signs agree.

    Trim: of ``n`` entries, those stay whose magnitude is at least the ``(n - int(n density))``-th smallest; so
    published code keeps one entry more than the paper's top ``density``, and all that are tied with the smallest.
    The threshold is over a task's whole vector (``trim="model"``) or over each of its tensors (``"tensor"``).

    Elect: the sign of the trimmed column sum. Columns that sum to exactly 0 take the sign of the sum of all columns'
    signs, which the paper leaves open. Where that is 0 too, most published code keeps such columns' negative entries
    (``tied_majority="negative"``; 0 for ``max``), and dict_fusion's keeps the positive ones.

    Merge: the mean over the non-zero entries of that sign (the paper), their sum (as AdaMerging and TALL masks
    use TIES, with a coefficient near 0.3), or the largest of them.
    """

    density: float = param(
        0.2, valid=Float(0, 1), search=Float(0.1, 0.5, points=5), help="the fraction of each task vector that is kept"
    )
    disjoint: str = param(
        "mean", valid=Choice(("mean", "sum", "max")), help="how entries that have the elected sign are merged"
    )
    trim: str = param("model", valid=Choice(("model", "tensor")), help="what a trim threshold is taken over")
    tied_majority: str = param(
        "negative", valid=Choice(("negative", "positive")), help="what cancelling columns keep if the majority is tied"
    )
    scaling_coefficient: float = param(
        1.0, valid=Float(-10, 10), search=Float(0.1, 2.0, points=20), help="lambda on the merged task vector"
    )

    def merge(self, inputs: MergeInputs) -> Merged:
        """See :class:`Ties`."""
        bank = inputs.bank
        merged = ties_task_vector(inputs, self.density, self.disjoint, self.trim, self.tied_majority)
        weights = kernels.weighted_sum(merged[None], [1.0], inputs.out, bank.base, self.scaling_coefficient)
        return SharedWeights(self, bank, weights)


def ties_task_vector(
    inputs: MergeInputs, density: float, disjoint: str, trim: str = "model", tied_majority: str = "negative"
) -> Tensor:
    """The merged task vector ``[P]`` of :class:`Ties` before scaling, shared between candidates."""
    rows, bounds = inputs.bank.task_vectors, trim_bounds(inputs, trim)
    thresholds = cached_thresholds(inputs, density, trim)
    positive = tied_majority == "positive"
    merge = partial(kernels.disjoint_merge, bounds=bounds, positive_tie=positive, total=inputs.total)
    return inputs.cached(
        ("ties", density, disjoint, trim, tied_majority),
        lambda: merge(rows, thresholds, disjoint, kernels.vector(rows)),
    )


def trim_bounds(inputs: MergeInputs, trim: str) -> np.ndarray | None:
    """Where the tensors lie that have thresholds of their own, or None."""
    return inputs.bank.bounds if trim == "tensor" else None


def cached_thresholds(inputs: MergeInputs, density: float, trim: str = "model") -> Tensor:
    """The trim's thresholds ``[T, 1]`` or ``[T, L]``, shared between candidates."""
    rows, bounds = inputs.bank.task_vectors, trim_bounds(inputs, trim)
    return inputs.cached(
        ("thresholds", density, trim), lambda: kernels.trim_thresholds(rows, density, bounds, inputs.total)
    )

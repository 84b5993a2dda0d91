"""The mean of the fine-tuned models."""

from __future__ import annotations

from dataclasses import dataclass

from merge_ray import kernels
from merge_ray.methods.base import Merged, MergeInputs, Method, SharedWeights, register


@register("weight_average", paper="Wortsman et al., Model soups, ICML 2022", by_columns=True)
@dataclass(frozen=True)
class WeightAverage(Method):
    """``theta_0 + (1 / T) sum_t tau_t``.

    Published code computes it from task vectors, as here, or as the mean of the weights; the two differ by rounding.
    """

    def merge(self, inputs: MergeInputs) -> Merged:
        """See :class:`WeightAverage`."""
        bank = inputs.bank
        ones = [1.0] * len(bank.tasks)
        weights = kernels.weighted_sum(bank.task_vectors, ones, inputs.out, bank.base, 1 / len(ones))
        return SharedWeights(self, bank, weights)

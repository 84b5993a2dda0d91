"""Magnitude masks: every task keeps the multi-task vector where its own task vector is largest."""

from __future__ import annotations

from dataclasses import dataclass

from merge_ray.methods.base import Merged, MergeInputs, Method, param, register
from merge_ray.methods.masking import MaskedWeights
from merge_ray.methods.task_arithmetic import sum_task_vectors
from merge_ray.methods.ties import cached_thresholds
from merge_ray.space import Float


@register(
    "magnitude_mask",
    paper="Wang et al., Localizing Task Information for Improved Model Merging and Compression (baseline), ICML 2024",
    by_columns=True,
)
@dataclass(frozen=True)
class MagnitudeMask(Method):
    """``theta_0 + mask_t * sum_s tau_s`` for task ``t``; ``mask_t`` is where ``tau_t`` survives TIES's trim.

    The mask is applied to the sum ``[P]``, not to ``tau_t``. Density 1 keeps everything (the authors' code
    fails there).
    """

    density: float = param(
        0.1, valid=Float(0, 1), search=Float(0.05, 0.5, points=10), help="the fraction of each task vector that is kept"
    )

    def merge(self, inputs: MergeInputs) -> Merged:
        """See :class:`MagnitudeMask`."""
        limits = cached_thresholds(inputs, self.density)[:, 0].tolist()
        return MaskedWeights(self, inputs.bank, sum_task_vectors(inputs), "magnitude", limits)

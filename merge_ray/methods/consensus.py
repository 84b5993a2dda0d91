"""Consensus: drop the weights of the multi-task vector that matter to too few tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from merge_ray import kernels
from merge_ray.methods.base import Merged, MergeInputs, Method, SharedWeights, param, register
from merge_ray.methods.masking import (
    choose_mask_lambdas,
    density_param,
    make_multi_task_vector,
    mask_lambda_param,
    mask_lambdas_param,
    multi_task_vector_param,
)
from merge_ray.space import Float, Int

CONSENSUS_MASK = "consensus_mask"


@register(
    "consensus",
    paper="Wang et al., Localizing Task Information for Improved Model Merging and Compression, ICML 2024",
    needs=("validation",),
    by_columns=True,
)
@dataclass(frozen=True)
class Consensus(Method):
    """``theta_0 + lambda tau * (sum_t mask_t >= min_tasks)`` with the TALL masks of :class:`TallMask`.

    ``tau`` ``[P]`` is the multi-task vector that the masks were made with. ``min_tasks=0`` keeps everything,
    more than ``T`` nothing.
    """

    min_tasks: int = param(2, valid=Int(0, 1000), search=Int(1, 3), help="how many tasks must keep a weight")
    scaling_coefficient: float = param(
        0.3, valid=Float(-10, 10), search=Float(0.0, 1.0), help="lambda on the masked multi-task vector"
    )
    mask_lambda: float | str | Mapping[str, float] = mask_lambda_param()
    mask_lambdas: tuple[float, ...] = mask_lambdas_param()
    multi_task_vector: str = multi_task_vector_param()
    density: float = density_param()

    def merge(self, inputs: MergeInputs) -> Merged:
        """See :class:`Consensus`."""
        bank = inputs.bank
        vector = make_multi_task_vector(inputs, self.multi_task_vector, self.density)
        limits, mask_lambda = choose_mask_lambdas(self, inputs, vector)
        weights = kernels.apply_masks(
            "tall", limits, bank.base, bank.task_vectors, vector, inputs.out, self.min_tasks, self.scaling_coefficient
        )
        resolved = dataclasses.replace(self, mask_lambda=mask_lambda)
        return ConsensusWeights(resolved, bank, weights, vector, limits, self.min_tasks)


@dataclass
class ConsensusWeights(SharedWeights):
    """Shared weights that know the mask they were made with."""

    merged_task_vector: Tensor
    limits: Sequence[float]
    min_tasks: int

    def artifacts(self) -> dict[str, np.ndarray]:
        """The consensus mask as packed bits: uint8 ``[ceil(P / 8)]`` in the layout's order."""
        bank = self.bank
        bits = kernels.mask_bits("tall", self.limits, bank.base, bank.task_vectors, self.merged_task_vector)
        return {CONSENSUS_MASK: kernels.consensus_bits(bits, self.min_tasks)}

"""Task arithmetic: add the scaled task vectors to the base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from merge_ray import kernels
from merge_ray.methods.base import Merged, MergeInputs, Method, SharedWeights, param, register
from merge_ray.space import Float


@register("task_arithmetic", paper="Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023", by_columns=True)
@dataclass(frozen=True)
class TaskArithmetic(Method):
    """``theta_0 + lambda sum_t tau_t``, or ``theta_0 + sum_t lambda_t tau_t`` with a coefficient per task.

    Flat vectors have length ``P``; integer buffers keep the base's values. A negative coefficient forgets tasks.
    """

    scaling_coefficient: float | Mapping[str, float] = param(
        0.3, valid=Float(-10, 10), search=Float(0.0, 1.0), per_task=True, help="lambda on the task vectors"
    )

    def merge(self, inputs: MergeInputs) -> Merged:
        """See :class:`TaskArithmetic`."""
        bank = inputs.bank
        if isinstance(self.scaling_coefficient, Mapping):
            coefficients, scale = inputs.per_task(self.scaling_coefficient), 1.0
        else:
            # The sum is scaled, as published code does, rather than its terms.
            coefficients, scale = [1.0] * len(bank.tasks), float(self.scaling_coefficient)
        weights = kernels.weighted_sum(bank.task_vectors, coefficients, inputs.out, bank.base, scale)
        return SharedWeights(self, bank, weights)


def sum_task_vectors(inputs: MergeInputs) -> Tensor:
    """The sum of the task vectors ``[P]``, shared between candidates."""
    rows = inputs.bank.task_vectors
    return inputs.cached("task_arithmetic", lambda: kernels.weighted_sum(rows, [1.0] * len(rows), kernels.vector(rows)))

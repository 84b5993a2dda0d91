"""The average of the labels as the answer to every sample: the lower reference of losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from merge_ray.methods.base import Merged, MergeInputs, Method, Predictor, TaskModel, param, register
from merge_ray.space import Choice


@register(
    "average_label",
    paper="the average label as the estimate, a reference (Xu et al., CVPR 2024)",
    needs=("labels",),
    by_columns=True,
)
@dataclass(frozen=True)
class AverageLabel(Method):
    """No model: every sample is answered with the mean of the labels of its domain, such as its building.

    ``released`` is what the authors' code computes, whose average is of the last batch alone, and in which the height
    and width of class maps are exchanged; published scaled performances start from it.
    """

    released: bool = param(False, valid=Choice((False, True)), help="the average as the authors' code has it")

    by_sample = True

    def merge(self, inputs: MergeInputs) -> Merged:
        """See :class:`AverageLabel`."""
        return AverageAnswers(self)


@dataclass
class AverageAnswers(Predictor):
    """Outcomes of the average label."""

    resolved: AverageLabel

    def outcomes(self, model: TaskModel, positions: Any) -> Tensor:
        """See :meth:`Predictor.outcomes`."""
        return model.average_outcomes(self.resolved.released)[positions]

    def storage_bytes(self) -> int:
        """Nothing that counts beside models."""
        return 0

"""Every task's own fine-tuned model: the upper reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from merge_ray.bank import ModelBank
from merge_ray.methods.base import Merged, MergeInputs, Method, register


@register("finetuned", paper="the fine-tuned models, a reference", by_columns=True)
@dataclass(frozen=True)
class Finetuned(Method):
    """``theta_0 + tau_t`` for task ``t``: the fine-tuned model up to the rounding of the subtraction.

    Where batch norm is reset for all models that are compared, for these too; ``pretrained`` are those as published.
    """

    def merge(self, inputs: MergeInputs) -> Merged:
        """See :class:`Finetuned`."""
        return OwnWeights(self, inputs.bank)


@dataclass
class OwnWeights(Merged):
    """The weights that each task was fine-tuned to, or those on the way there from the base: ``theta_0 + c tau_t``."""

    resolved: Method
    bank: ModelBank
    coefficient: float = 1.0
    as_published: bool = False
    shared = False
    keeps_own = True

    def write(self, task: str, out: Tensor) -> None:
        """See :meth:`Merged.write`."""
        task_vector = self.bank.task_vectors[self.bank.tasks.index(task)]
        torch.add(self.bank.base, task_vector, alpha=self.coefficient, out=out)

    def storage_bytes(self) -> int:
        """``T`` models in their stored dtypes."""
        return self.bank.finetuned_bytes

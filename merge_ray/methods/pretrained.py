"""The base model as it is, or models without a common base as they were published: a reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from merge_ray.methods.base import Merged, MergeInputs, Method, SharedWeights, register
from merge_ray.methods.finetuned import OwnWeights


@register("pretrained", paper="the base model, a reference; without a base, the models as published", by_columns=True)
@dataclass(frozen=True)
class Pretrained(Method):
    """``theta_0`` for every task.

    Models without a common base are each task's own, their statistics of batch norm as published; after these are
    reset they are ``finetuned``.
    """

    def merge(self, inputs: MergeInputs) -> Merged:
        """See :class:`Pretrained`."""
        bank = inputs.bank
        if not int(inputs.total(np.array(bool(bank.base.any()), dtype=np.int64))):
            return OwnWeights(self, bank, as_published=True)
        return SharedWeights(self, bank, inputs.out.copy_(bank.base))

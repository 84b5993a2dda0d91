"""The base model as it is: the lower reference."""

from __future__ import annotations

from dataclasses import dataclass

from merge_ray.methods.base import Merged, MergeInputs, Method, SharedWeights, register


@register("pretrained", paper="the base model, a reference", by_columns=True)
@dataclass(frozen=True)
class Pretrained(Method):
    """``theta_0`` for every task."""

    def merge(self, inputs: MergeInputs) -> Merged:
        """See :class:`Pretrained`."""
        return SharedWeights(self, inputs.bank, inputs.out.copy_(inputs.bank.base))

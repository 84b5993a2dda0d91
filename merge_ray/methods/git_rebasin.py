"""Git Re-Basin: permute the channels of every model until its weights match the first model's, and average."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from merge_ray.matching import Membership, Memberships, match_weights
from merge_ray.methods.base import Merged, MergeInputs, Method, register
from merge_ray.methods.matched import MatchedWeights, cached_memberships, model_views


@register("git_rebasin", paper="Ainsworth et al., Git Re-Basin, ICLR 2023, algorithm 1", needs=("permutation_groups",))
@dataclass(frozen=True)
class GitRebasin(Method):
    """The mean of the models after every one is permuted to match the first by its weights.

    Rounds visit all groups of channels in random orders (of the merge's seed); each visit assigns the second model's
    channels to the first's so that the summed products of their weights are the largest, the other axes permuted as
    they are by then. As MuDSC's code for these models has it: all tensors of a group take part, running statistics
    too; the sum of products is divided by the sum of products of norms; entries that are zero in one model do not
    count; and rounds go on until five in a row have improved no group, 100 at most. More than two models are each
    matched with the first.
    """

    def merge(self, inputs: MergeInputs) -> Merged:
        """See :class:`GitRebasin`."""
        return MatchedWeights.mean(self, inputs, permutations_by_weight(inputs))


def permutations_by_weight(inputs: MergeInputs) -> Memberships:
    """Every group's permutation of each model into the first one's channels."""
    groups, models = inputs.permutation_groups, len(inputs.bank.tasks)

    def compute() -> Memberships:
        first = model_views(inputs.bank, 0)
        found = [match_weights(first, model_views(inputs.bank, n), groups, inputs.seed)[0] for n in range(1, models)]
        memberships = {}
        for group in groups:
            rows = [np.arange(group.size), *(permutations[group.name] for permutations in found)]
            memberships[group.name] = Membership(torch.from_numpy(np.stack(rows)), group.size)
        return memberships

    return cached_memberships(inputs, ("git_rebasin", inputs.seed), compute, epsilon=0.0)

"""ZipIt: merge the channels whose activations correlate, of different models and within each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from merge_ray.matching import Group, Membership, Memberships, ZipRule, identity, optimal, permute, zip_channels
from merge_ray.methods.base import Merged, MergeInputs, Method, param, register
from merge_ray.methods.matched import MatchedWeights, cached_memberships, calibration_notes
from merge_ray.space import Choice, Either, Float


@register(
    "zipit",
    paper="Stoica et al., ZipIt! Merging Models from Different Tasks without Training, ICLR 2024",
    needs=("permutation_groups", "calibration"),
)
@dataclass(frozen=True)
class Zipit(Method):
    """The mean of the models in channels that were matched by the correlation of their activations.

    Per group of ``C`` channels, the most correlated two of all ``N C`` are merged until ``C`` are left; a merged
    channel's outputs are the mean of its members', and the weights that read it their sum. Other matchings:
    ``permute`` assigns every model's channels to the first's one by one, ``optimal`` pairs all channels of two models
    with the largest summed correlation (slow for wide groups), ``identity`` takes them as they are.

    MuDSC's edition of the code counts a merge as within a model when the channel *after* the dropped one is of the
    kept one's model (``budget_owner="following"``), an accident of shifting a list in place.
    """

    matching: str = param(
        "zip", valid=Choice(("zip", "permute", "optimal", "identity")), help="how the channels are matched"
    )
    a: float = param(
        0.5, valid=Float(0, 1), search=Float(0.1, 1.0, points=4), help="what a merged channel's similarities shrink by"
    )
    b: float = param(
        1.0, valid=Float(0, 1), search=Float(0, 1, points=3), help="the part of removed channels to merge within models"
    )
    reduction: float | None = param(
        None,
        valid=Either((Float(0, 1), Choice((None,)))),
        help="the part of all channels to remove; none is the part that leaves one model's, as others cannot be run",
    )
    budget_owner: str = param(
        "dropped", valid=Choice(("dropped", "following")), help="whose model says if a merge is within a model"
    )

    def merge(self, inputs: MergeInputs) -> Merged:
        """See :class:`Zipit`."""
        models, groups = len(inputs.bank.tasks), inputs.permutation_groups

        def match(group: Group, similarity: Tensor) -> Membership:
            if self.matching == "zip":
                keep = None if self.reduction is None else int(len(similarity) * (1 - self.reduction) + 1e-4)
                rule = ZipRule(self.a, self.b, shifted_owners=self.budget_owner == "following")
                return zip_channels(similarity, models, rule, keep, group.heads)[0]
            if self.matching == "permute":
                return permute(similarity, models, group.heads)[0]
            return optimal(similarity, models)[0] if self.matching == "optimal" else identity(models, group.size)[0]

        def compute() -> Memberships:
            return {group.name: match(group, inputs.calibration.correlation(group)) for group in groups}

        key = ("zipit", self.matching, self.a, self.b, self.reduction, self.budget_owner)
        memberships = cached_memberships(inputs, key, compute)
        return MatchedWeights.mean(self, inputs, memberships, calibration_notes(inputs))

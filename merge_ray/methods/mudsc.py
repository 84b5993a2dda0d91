"""MuDSC: match channels by their activations, by their weights, or by both, one to one or by zipping."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from merge_ray.errors import ParameterError
from merge_ray.matching import (
    Group,
    Matched,
    Memberships,
    ZipRule,
    correlation,
    cosine,
    identity,
    match_in_weight_space,
    permute,
    weight_rows,
    zip_channels,
)
from merge_ray.methods.base import Merged, MergeInputs, Method, param, register
from merge_ray.methods.matched import MatchedWeights, cached_memberships, calibration_notes, model_views
from merge_ray.space import Choice, Float

SUFFIXES = {
    "_act_useperm": ("activation", "permute"),
    "": ("weight", "zip"),
    "_act_iws_fs_useperm": ("both", "permute"),
    "_act_iws_fs": ("both", "zip"),
}
"""The published settings: similarity and matching by the names that the scripts give them."""

Similar = Callable[[Group, Memberships], Tensor]


@register(
    "mudsc",
    paper="Xu et al., Training-Free Pretrained Model Merging, CVPR 2024",
    needs=("permutation_groups", "calibration"),
)
@dataclass(frozen=True)
class Mudsc(Method):
    """The mean of the models in channels that were matched in activation space, weight space, or both.

    ``activation`` matches every group of channels once, by the correlation of its activations. ``weight`` goes round
    the groups in random orders (of the merge's seed), matching each by its weights in the channels that the other
    groups have by then, until five rounds in a row are no better than the best. ``both`` starts from the match by
    activations and goes round with ``fix_rate`` times the weights' similarity plus the rest times the activations'.

    ``permute`` assigns every model's channels to the first's; ``zip`` merges the most similar, also within a model
    (see :class:`merge_ray.matching.ZipRule` for ``a`` and ``b``); ``identity`` takes them as they are.

    A merged channel's outputs are the sum of its members' times ``N / (members + 1e-5)``, averaged over the ``N``
    models, and the weights that read it are added up. ``suffix`` names one of the four published settings of
    similarity and matching.
    """

    suffix: str | None = param(
        None,
        valid=Choice((None, *SUFFIXES)),
        search=Choice(tuple(SUFFIXES)),
        help="similarity and matching by a published name",
    )
    similarity: str | None = param(
        None,
        valid=Choice((None, "activation", "weight", "both")),
        help="what channels are matched by; none is what the suffix says, or else both",
    )
    matching: str | None = param(
        None,
        valid=Choice((None, "permute", "zip", "identity")),
        help="how channels are matched; none is what the suffix says, or else zip",
    )
    fix_rate: float = param(
        0.5, valid=Float(0, 1), search=Float(0.1, 0.9, points=3), help="the part of the weights' similarity in both"
    )
    a: float = param(
        0.5, valid=Float(0, 1), search=Float(0.1, 0.9, points=3), help="what a merged channel's similarities shrink by"
    )
    b: float = param(
        1.0, valid=Float(0, 1), search=Float(0, 1, points=3), help="the part of removed channels to merge within models"
    )
    weight_similarity: str = param(
        "correlation", valid=Choice(("correlation", "cosine")), help="how weight vectors are compared"
    )
    running_statistics: str = param(
        "none",
        valid=Choice(("none", "plain", "scaled_means")),
        help="batch norm's running statistics in weight vectors: none, means and variances, or means over deviations",
    )
    input_side: bool = param(
        True, valid=Choice((True, False)), help="whether the weights that read a channel are in its weight vector"
    )

    def __post_init__(self) -> None:
        """Make both ways to name a setting the same candidate, whatever parameters it does not use are."""
        named = SUFFIXES[self.suffix] if self.suffix is not None else ("both", "zip")
        given = (self.similarity or named[0], self.matching or named[1])
        if self.suffix is not None and given != named:
            raise ParameterError(
                f"mudsc: suffix={self.suffix!r} means {named[0]} and {named[1]}, not {' and '.join(given)}"
            )
        names = {setting: suffix for suffix, setting in SUFFIXES.items()}
        settled = dict(zip(("similarity", "matching", "suffix"), (*given, names.get(given)), strict=True))
        unused = {"fix_rate"} if given[0] != "both" else set()
        unused |= {"a", "b"} if given[1] != "zip" else set()
        defaults = {field.name: field.default for field in dataclasses.fields(self) if field.name in unused}
        for field, value in {**settled, **defaults}.items():
            object.__setattr__(self, field, value)

    def merge(self, inputs: MergeInputs) -> Merged:
        """See :class:`Mudsc`."""
        notes = calibration_notes(inputs) if self.similarity != "weight" else ()
        return MatchedWeights.mean(self, inputs, self.memberships(inputs), notes)

    def memberships(self, inputs: MergeInputs) -> Memberships:
        """The merged channels of every group."""
        if self.similarity == "activation":
            return self.start(inputs)
        fix_rate = self.fix_rate if self.similarity == "both" else None
        vectors = (self.weight_similarity, self.running_statistics, self.input_side)
        key = ("mudsc", inputs.seed, *self._rule, fix_rate, *vectors)
        return cached_memberships(inputs, key, lambda: self.search(inputs, self.weights_similarity(inputs))[0])

    def start(self, inputs: MergeInputs) -> Memberships:
        """What the search by weights begins with: the match by activations, if they are to count."""
        if self.similarity == "weight":
            return {}

        def compute() -> Memberships:
            return {g.name: self._match(g, inputs.calibration.correlation(g))[0] for g in inputs.permutation_groups}

        return cached_memberships(inputs, ("activations", *self._rule), compute)

    def search(self, inputs: MergeInputs, similar: Similar) -> tuple[Memberships, list[float]]:
        """The search by weights, whose similarities ``similar`` gives; see :func:`match_in_weight_space`."""

        def match(group: Group, memberships: Memberships) -> Matched:
            similarity = similar(group, memberships)
            if self.similarity == "both":
                activations = inputs.calibration.correlation(group)
                similarity = self.fix_rate * similarity + (1 - self.fix_rate) * activations
            return self._match(group, similarity)

        return match_in_weight_space(inputs.permutation_groups, match, self.start(inputs), inputs.seed)

    @property
    def _rule(self) -> tuple[Any, ...]:
        return ("zip", self.a, self.b) if self.matching == "zip" else (self.matching,)

    def weights_similarity(self, inputs: MergeInputs) -> Similar:
        """What gives the similarity ``[N C, N C]`` of a group's weight vectors in the channels merged so far."""
        models = [model_views(inputs.bank, index) for index in range(len(inputs.bank.tasks))]
        compare = correlation if self.weight_similarity == "correlation" else cosine

        def similar(group: Group, memberships: Memberships) -> Tensor:
            options = (self.running_statistics, self.input_side)
            return compare(weight_rows(models, inputs.permutation_groups, group, memberships, *options))

        return similar

    def _match(self, group: Group, similarity: Tensor) -> Matched:
        models = len(similarity) // group.size
        if self.matching == "zip":
            return zip_channels(similarity, models, ZipRule(self.a, self.b), groups=group.heads)
        return permute(similarity, models, group.heads) if self.matching == "permute" else identity(models, group.size)

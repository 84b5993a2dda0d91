"""Align the models, then merge them flat: permute all into one frame and let any other method do the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merge_ray.bank import ModelBank
from merge_ray.matching import Membership, Memberships, PermutationGroups
from merge_ray.methods.base import Merged, MergeInputs, Method, available_methods, make_method, param, register
from merge_ray.methods.git_rebasin import permutations_by_weight
from merge_ray.methods.matched import calibration_notes, model_views, own_bytes, write_own
from merge_ray.methods.mudsc import Mudsc
from merge_ray.space import Choice, Space


class FlatMethod(Space):
    """The names of the methods that need nothing beyond the bank."""

    def contains(self, value: Any) -> bool:
        """See :meth:`Space.contains`."""
        return value in self.grid()

    def grid(self) -> list[str]:
        """See :meth:`Space.grid`."""
        return [name for name, method in available_methods().items() if not method.needs]

    def __str__(self) -> str:
        return "{" + ", ".join(self.grid()) + "}"


class Options(Space):
    """Any parameters by name, or none."""

    def contains(self, value: Any) -> bool:
        """See :meth:`Space.contains`."""
        return value is None or (isinstance(value, Mapping) and all(isinstance(name, str) for name in value))

    def grid(self) -> list[Any]:
        """See :meth:`Space.grid`."""
        return [None]

    def __str__(self) -> str:
        return "a mapping of its parameters, or none"


@register(
    "align_then_merge",
    paper="Ainsworth et al., Git Re-Basin, ICLR 2023; Xu et al., Training-Free Pretrained Model Merging, CVPR 2024",
    needs=("permutation_groups", "calibration"),
)
@dataclass(frozen=True)
class AlignThenMerge(Method):
    """Permute every model's channels into the first one's frame, and merge the results with ``method``.

    ``weight`` aligns as ``git_rebasin`` does, ``activation`` and ``both`` as ``mudsc`` with ``matching="permute"``.
    Where the models have no base in common, the mean of the aligned ones stands for it, so that a task vector is what
    sets a model apart. Holds the aligned models beside the bank: ``T x P`` weights.
    """

    method: str = param("weight_average", valid=FlatMethod(), help="what merges the aligned models")
    options: Mapping[str, Any] | None = param(None, valid=Options(), help="the parameters of that method")
    similarity: str = param(
        "weight",
        valid=Choice(("weight", "activation", "both")),
        search=Choice(("weight", "activation", "both")),
        help="what channels are matched by",
    )

    def __post_init__(self) -> None:
        """Refuse what the flat method refuses."""
        self._flat()

    def _flat(self) -> Method:
        return make_method(self.method, self.options or {})

    def merge(self, inputs: MergeInputs) -> Merged:
        """See :class:`AlignThenMerge`."""
        memberships, groups = self._permutations(inputs), inputs.permutation_groups
        bank = _aligned(inputs.bank, groups, memberships)
        # Not the host's cache, which holds what other methods found out about the models as they were.
        merged = self._flat().merge(MergeInputs(bank, inputs.seed, inputs.out, needs=frozenset()))
        resolved = dataclasses.replace(self, options=merged.resolved.parameters())
        notes = merged.notes if self.similarity == "weight" else (*merged.notes, *calibration_notes(inputs))
        return AlignedMerge(resolved, inputs.bank, groups, memberships, merged, notes)

    def _permutations(self, inputs: MergeInputs) -> Memberships:
        if self.similarity == "weight":
            return permutations_by_weight(inputs)
        found = Mudsc(similarity=self.similarity, matching="permute").memberships(inputs)
        return {name: Membership(one.columns, one.width, epsilon=0.0) for name, one in found.items()}


def _aligned(bank: ModelBank, groups: PermutationGroups, memberships: Memberships) -> ModelBank:
    rows = torch.empty(bank.task_vectors.shape, device=bank.base.device)
    for index, row in enumerate(rows):
        model = model_views(bank, index)
        for name, view in bank.layout.views(row).items():
            view.copy_(groups.carry(name, model[name], index, memberships))
    base = bank.base.float() if bool(bank.base.any()) else rows.mean(dim=0)
    return dataclasses.replace(bank, base=base, task_vectors=rows.sub_(base))


@dataclass
class AlignedMerge(Merged):
    """What another method made of the aligned models, but for the tensors that every task keeps for itself."""

    resolved: Method
    bank: ModelBank
    groups: PermutationGroups
    memberships: Memberships
    merged: Merged
    notes: tuple[str, ...] = ()

    @property
    def shared(self) -> bool:  # type: ignore[override]
        """Whether all tasks are answered by the same weights."""
        return self.merged.shared and not self.groups.own

    def write(self, task: str, out: Tensor) -> None:
        """See :meth:`Merged.write`."""
        self.merged.write(task, out)
        write_own(self.bank, self.groups, self.memberships, task, out)

    def storage_bytes(self) -> int:
        """The other method's, and what every further task keeps."""
        own = own_bytes(self.bank, self.groups) if self.merged.shared else 0
        return self.merged.storage_bytes() + (len(self.bank.tasks) - 1) * own

    def artifacts(self) -> dict[str, np.ndarray]:
        """The other method's, and each group's ``columns/<name>``."""
        columns = {f"columns/{name}": membership.columns.numpy() for name, membership in self.memberships.items()}
        return {**self.merged.artifacts(), **columns}

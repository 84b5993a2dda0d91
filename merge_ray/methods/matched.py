"""The answer of methods that match channels: the mean of the models in the merged channels."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from merge_ray.bank import ModelBank
from merge_ray.errors import ParameterError
from merge_ray.matching import Membership, Memberships, PermutationGroups
from merge_ray.methods.base import Merged, MergeInputs, Method


def model_views(bank: ModelBank, index: int) -> dict[str, Tensor]:
    """The tensors of one model by name; where the bank has no base they share its memory."""
    row = bank.task_vectors[index]
    return bank.layout.views(bank.base + row if bool(bank.base.any()) else row)


def cached_memberships(
    inputs: MergeInputs, key: Hashable, compute: Callable[[], Memberships], epsilon: float = 1e-5
) -> Memberships:
    """Every group's membership, its columns shared between candidates, and not computed where they are given.

    Raises :class:`CheckpointError` for groups that do not close over the bank's tensors, and :class:`ParameterError`
    where a group keeps another number of channels than it had.
    """
    groups, bank = inputs.permutation_groups, inputs.bank
    if (given := inputs.columns) is not None:
        return {group.name: Membership(torch.from_numpy(given[group.name]), group.size, epsilon) for group in groups}

    def pack() -> Tensor:
        groups.check({entry.name: entry.shape for entry in bank.layout.entries})
        memberships = compute()
        for group in groups:
            if (width := memberships[group.name].width) != group.size:
                raise ParameterError(
                    f"{width} merged channels are left in group {group.name} of {group.size}; the merged model keeps "
                    f"its architecture with a reduction of 1 - 1/{len(bank.tasks)}"
                )
        return torch.cat([memberships[group.name].columns for group in groups], dim=1)

    parts = inputs.cached(key, pack, keep=True).split([group.size for group in groups], dim=1)
    return {group.name: Membership(part, group.size, epsilon) for group, part in zip(groups, parts, strict=True)}


def calibration_notes(inputs: MergeInputs) -> tuple[str, ...]:
    """A warning where correlations of activations rest on fewer values than there are channels."""
    if inputs.columns is not None:
        return ()
    groups, calibration = list(inputs.permutation_groups), inputs.calibration
    counts = inputs.cached(
        "observations", lambda: torch.tensor([calibration.observations(group) for group in groups]), keep=True
    )
    seen = dict(zip(groups, counts.tolist(), strict=True))
    short = [group for group in seen if seen[group] < group.size]
    if not short:
        return ()
    worst = min(short, key=lambda group: seen[group] / group.size)
    return (
        f"too few activation samples in {len(short)} of {len(seen)} groups: the {worst.size} channels that "
        f"{worst.activation} reads have {seen[worst]} values each",
    )


@dataclass
class MatchedWeights(Merged):
    """One set of weights in the merged channels, but for the tensors that every task keeps for itself.

    weights: float32 ``[P]``, the mean over the models.
    """

    resolved: Method
    bank: ModelBank
    groups: PermutationGroups
    memberships: Memberships
    weights: Tensor
    notes: tuple[str, ...] = ()
    keeps_own = True

    @classmethod
    def mean(
        cls, method: Method, inputs: MergeInputs, memberships: Memberships, notes: tuple[str, ...] = ()
    ) -> MatchedWeights:
        """Bring every model of the bank into the merged channels and take the mean."""
        bank, groups = inputs.bank, inputs.permutation_groups
        models = [model_views(bank, index) for index in range(len(bank.tasks))]
        for name, view in bank.layout.views(inputs.out).items():
            view.zero_()
            for index, model in enumerate(models):
                view += groups.carry(name, model[name], index, memberships)
            view /= len(models)
        return cls(method, bank, groups, memberships, inputs.out, notes)

    @property
    def shared(self) -> bool:  # type: ignore[override]
        """Whether no task keeps tensors of its own."""
        return not self.groups.own

    def write(self, task: str, out: Tensor) -> None:
        """See :meth:`Merged.write`."""
        if out.data_ptr() != self.weights.data_ptr():
            out.copy_(self.weights)
        write_own(self.bank, self.groups, self.memberships, task, out)

    def storage_bytes(self) -> int:
        """One model, and for every further task the tensors that it keeps."""
        return self.bank.model_bytes + (len(self.bank.tasks) - 1) * own_bytes(self.bank, self.groups)

    def artifacts(self) -> dict[str, np.ndarray]:
        """Each group's ``columns/<name>``: see :class:`Membership`."""
        return {f"columns/{name}": membership.columns.numpy() for name, membership in self.memberships.items()}


def write_own(bank: ModelBank, groups: PermutationGroups, memberships: Memberships, task: str, out: Tensor) -> None:
    """Put the tensors that ``task`` keeps into ``out`` ``[P]``, in the merged channels."""
    if not groups.own:
        return
    index = bank.tasks.index(task)
    model = model_views(bank, index)
    for name, view in bank.layout.views(out).items():
        if name in groups.own:
            view.copy_(groups.carry(name, model[name], index, memberships))


def own_bytes(bank: ModelBank, groups: PermutationGroups) -> int:
    """The stored bytes of the tensors that every task keeps."""
    return sum(entry.size * entry.dtype.itemsize for entry in bank.layout.entries if entry.name in groups.own)

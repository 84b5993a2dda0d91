"""Which axes of which tensors may be permuted together without changing what a model computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

from merge_ray.errors import CheckpointError
from merge_ray.matching.membership import Membership

Memberships = Mapping[str, Membership]
"""The memberships of groups, by their names."""


@dataclass(frozen=True)
class Member:
    """An axis of a tensor, or the part of it from ``start`` on, that a group's channels lie along.

    side: ``out`` where the tensor makes the channels (or belongs to them, as a bias does), ``in`` where it reads them.
    """

    tensor: str
    axis: int
    side: Literal["in", "out"]
    start: int = 0


@dataclass(frozen=True)
class Group:
    """``size`` channels that are permuted together.

    activation: the path of the module whose input the channels are, where they are observed. heads: how many equal
    consecutive groups they come in (attention heads, GroupNorm) that must stay together.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    activation: str
    heads: int = 1


@dataclass(frozen=True)
class PermutationGroups:
    """All groups of an architecture, in the order of their first consumers.

    own: the tensors that every task keeps for itself after matching, in the merged channels' frame; the family says
    which.
    """

    groups: tuple[Group, ...]
    own: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    @cached_property
    def places(self) -> dict[str, list[tuple[str, Member]]]:
        """For every tensor the names of the groups that it belongs to, and as what."""
        places: dict[str, list[tuple[str, Member]]] = {}
        for group in self.groups:
            for member in group.members:
                places.setdefault(member.tensor, []).append((group.name, member))
        return places

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise :class:`CheckpointError` that names the tensors with which a group does not close."""
        problems: list[str] = []
        seen: dict[tuple[str, int, int], str] = {}
        for group in self.groups:
            for member in group.members:
                other = seen.setdefault((member.tensor, member.axis, member.start), group.name)
                if other != group.name:
                    problems.append(
                        f"group {group.name}: axis {member.axis} of {member.tensor} is in group {other} too"
                    )
                if member.tensor not in shapes:
                    problems.append(f"group {group.name}: there is no tensor {member.tensor}")
                    continue
                shape = list(shapes[member.tensor])
                if len(shape) <= member.axis or shape[member.axis] < member.start + group.size:
                    problems.append(
                        f"group {group.name}: {member.tensor} {shape} does not have its {group.size} channels along "
                        f"axis {member.axis}"
                    )
        if problems:
            raise CheckpointError("permutation groups do not close:\n  " + "\n  ".join(problems))

    def carry(self, name: str, tensor: Tensor, model: int, memberships: Memberships) -> Tensor:
        """A model's ``tensor`` in the merged channels: what makes channels is scaled, what reads them added up.

        memberships: by group; others stay as they are. Zips keep a group's size here.
        """
        for group, member in self.places.get(name, ()):
            if group in memberships:
                tensor = _collapse(tensor, memberships[group], model, member, scaled=member.side == "out")
        return tensor

    def rows(self, group: Group, member: Member, tensor: Tensor, model: int, memberships: Memberships) -> Tensor:
        """What of a member's tensor belongs to each channel of its group, ``[C, F]``, other axes in merged channels.

        Those are scaled where the tensor reads them and added up where it makes them, the other way round than in
        :meth:`carry`, so that products with another model's rows are means over its channels.
        """
        for name, other in self.places[member.tensor]:
            if other.axis != member.axis and name in memberships:
                tensor = _collapse(tensor, memberships[name], model, other, scaled=other.side == "in")
        return tensor.narrow(member.axis, member.start, group.size).movedim(member.axis, 0).reshape(group.size, -1)


def _collapse(tensor: Tensor, membership: Membership, model: int, member: Member, scaled: bool) -> Tensor:
    size = membership.columns.shape[1]
    part = membership.collapse(tensor.narrow(member.axis, member.start, size), model, member.axis, scaled)
    if part.shape == tensor.shape:
        return part
    tensor = tensor.clone()
    tensor.narrow(member.axis, member.start, size).copy_(part)
    return tensor

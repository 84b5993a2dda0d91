"""Matching by weights: group after group, round after round, each in the frame that the other groups have by now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from merge_ray.errors import CheckpointError
from merge_ray.matching.assignment import Matched, assign
from merge_ray.matching.groups import Group, Member, Memberships, PermutationGroups
from merge_ray.matching.membership import Membership
from merge_ray.matching.similarity import paired_products

State = Mapping[str, Tensor]
ROUNDS = 100
PATIENCE = 5
"""How many rounds in a row may bring nothing before the search ends."""


def visiting_orders(count: int, seed: int) -> Iterator[list[int]]:
    """The orders in which rounds visit ``count`` groups, as published code draws them."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(ROUNDS):
        yield torch.randperm(count, generator=generator).tolist()


def weight_rows(
    models: Sequence[State],
    groups: PermutationGroups,
    group: Group,
    memberships: Memberships,
    running_statistics: str = "none",
    input_side: bool = True,
) -> Tensor:
    """The weight vectors ``[N C, F]`` of a group's channels, the models one below the other.

    running_statistics: whether batch norm's running means and variances take part: ``none``, ``plain`` (both), or
    ``scaled_means`` (the means over the deviations). input_side: whether the weights that read the channels do.
    """

    def wanted(member: Member) -> bool:
        if member.tensor.endswith(("running_mean", "running_var")):
            mean = member.tensor.endswith("mean")
            return running_statistics == "plain" or (running_statistics == "scaled_means" and mean)
        return input_side or member.side == "out"

    def tensor(model: State, name: str) -> Tensor:
        if running_statistics == "scaled_means" and name.endswith("running_mean"):
            return model[name] / (model[f"{name.removesuffix('mean')}var"] + 1e-7).sqrt()
        return model[name]

    members = [member for member in group.members if wanted(member)]
    if not members:
        raise CheckpointError(f"group {group.name} ({group.members[0].tensor}) has no weights to be matched by")
    rows = [
        torch.cat([groups.rows(group, member, tensor(model, member.tensor), n, memberships) for member in members], 1)
        for n, model in enumerate(models)
    ]
    return torch.cat(rows)


def match_in_weight_space(
    groups: PermutationGroups,
    match: Callable[[Group, Memberships], Matched],
    start: Memberships,
    seed: int,
) -> tuple[dict[str, Membership], list[float]]:
    """MuDSC's search: rounds over all groups, of which the one whose matches are most similar stays.

    match: matches a group, given the memberships so far. start: memberships to begin with. A round that is not
    better than the best is taken back; :data:`PATIENCE` of them in a row end the search. Returns the best round's
    memberships, and of every round the mean over groups of the similarity of what was matched.
    """
    best, best_value, values, failures = dict(start), -float("inf"), [], 0
    for order in visiting_orders(len(groups), seed):
        current, similarities = dict(best), []
        for index in order:
            group = groups.groups[index]
            current[group.name], similarity = match(group, current)
            similarities.append(similarity)
        values.append(float(np.mean(similarities)))
        if values[-1] > best_value:
            best, best_value, failures = current, values[-1], 0
        else:
            failures += 1
            if failures == PATIENCE:
                break
    return best, values


def weight_matching_similarity(
    first: State, second: State, groups: PermutationGroups, group: Group, memberships: Memberships
) -> Tensor:
    """Git Re-Basin's similarity ``[C, C]`` of the channels of ``second`` (rows) and ``first`` (columns).

    All tensors of the group take part, running statistics too: the sum of their products over that of their norms.
    """
    device = first[group.members[0].tensor].device
    dots, norms = (torch.zeros(group.size, group.size, device=device) for _ in range(2))
    for member in group.members:
        one = groups.rows(group, member, first[member.tensor], 0, memberships)
        two = groups.rows(group, member, second[member.tensor], 1, memberships)
        for total, part in zip((dots, norms), paired_products(one, two), strict=True):
            total += part
    return dots / norms.clamp_(min=1e-8)


def match_weights(
    first: State, second: State, groups: PermutationGroups, seed: int
) -> tuple[dict[str, np.ndarray], list[tuple[float, float]]]:
    """Git Re-Basin's weight matching: the permutation of every group that brings ``second`` to ``first``.

    Returns for each group the channel of ``first`` that every channel of ``second`` becomes, int64 ``[C]``, and of
    every round the objective before and after. Rounds go on until :data:`PATIENCE` in a row improved no group.
    """
    found: dict[str, np.ndarray] = {}
    memberships: dict[str, Membership] = {}
    objectives, failures = [], 0
    for order in visiting_orders(len(groups), seed):
        progress, before, after = False, 0.0, 0.0
        for index in order:
            group = groups.groups[index]
            similarity = weight_matching_similarity(first, second, groups, group, memberships).numpy(force=True)
            channels = np.arange(group.size)
            old = similarity[channels, found[group.name]].sum(dtype=np.float64) if group.name in found else 0.0
            permutation, _ = assign(similarity, group.heads)
            new = similarity[channels, permutation].sum(dtype=np.float64)
            progress |= bool(new > old)
            before, after = before + old, after + new
            found[group.name] = permutation
            columns = torch.from_numpy(np.stack([channels, permutation]))
            memberships[group.name] = Membership(columns, group.size, epsilon=0.0)
        objectives.append((before, after))
        failures = 0 if progress else failures + 1
        if failures == PATIENCE:
            break
    return found, objectives

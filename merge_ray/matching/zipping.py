"""Zipping: greedily merge the most similar channels, of different models or of the same one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from torch import Tensor

from merge_ray.matching.assignment import Matched, assign, blocks
from merge_ray.matching.membership import Membership


@dataclass(frozen=True)
class ZipRule:
    """The parameters of a zip.

    a: what the similarities of a merged channel are multiplied by; at 0 and below, its similarities to channels of
    its own model end instead. b: which part of the channels to be removed each model may lose to merges within.
    shifted_owners: as the published scripts run it, where the owner list has moved on by one before a merge is counted
    as within a model, so that the owner of the channel after the dropped one decides.
    """

    a: float = 0.5
    b: float = 1.0
    shifted_owners: bool = False


def zip_channels(similarity: Tensor, models: int, rule: ZipRule, keep: int | None = None, groups: int = 1) -> Matched:
    """Merge the most similar two channels until ``keep`` are left (by default, those of one model).

    similarity: ``[N C, N C]``, the models one below the other. A merged channel is as similar to another as the less
    similar of its two parts, times ``a``. Of equally similar pairs the first in row-major order is merged. Where no
    pair is left the first channel vanishes. groups: the number of equal consecutive groups that channels come in
    (attention heads, GroupNorm): groups are matched as wholes with the first model's and zipped with their partners.

    ZipIt (Stoica et al., ICLR 2024), algorithm 1; MuDSC (Xu et al., CVPR 2024) for groups. Every row keeps its maximum
    and is scanned again only when that is gone and it comes to the top: about quadratic in the number of channels.
    """
    matrix = blocks(similarity, models).astype(np.float32)
    size = len(matrix)
    channels = size // models
    keep = channels if keep is None else keep
    removed, part_keep = size - keep, keep // groups
    budget = np.full(models, int(removed // models * rule.b + 1e-4), np.int64)
    group_budget = int(removed // (models * groups) + 1e-4) if groups > 1 else removed
    closed = np.zeros(models, np.bool_)
    joined, total, width = np.full(size, -1, np.int64), 0.0, 0
    for bundle in _bundles(matrix, models, groups):
        owners = bundle // channels
        within = np.minimum(budget, group_budget)
        left = within.copy()
        part = matrix if groups == 1 else matrix[np.ix_(bundle, bundle)]
        columns, value = _zip(
            part, owners, left, closed.copy(), part_keep, channels, np.float32(rule.a), rule.shifted_owners
        )
        budget -= within - left
        closed |= (budget <= 0) & (left < within)
        joined[bundle] = np.where(columns >= 0, columns + width, -1)
        total, width = total + value, width + part_keep
    return Membership(torch.from_numpy(joined.reshape(models, channels)), width), total / max(removed, 1)


def _bundles(matrix: np.ndarray, models: int, groups: int) -> list[np.ndarray]:
    """The channels ``[N C / groups]`` of each group of the first model and its partners in the others."""
    channels = len(matrix) // models
    size = channels // groups
    starts = [np.arange(groups) * size]
    for model in range(1, models):
        first = model * channels
        if groups > 1:
            chosen, _ = assign(matrix[:channels, first : first + channels], groups)
            starts.append(first + chosen[::size] // size * size)
        else:
            starts.append(np.array([first]))
    return [np.concatenate([start + np.arange(size) for start in bundle]) for bundle in zip(*starts, strict=True)]


@njit(nogil=True, cache=True)
def _scan(matrix, alive, row):  # type: ignore[no-untyped-def]
    """The first of the largest entries of a row."""
    at = -1
    for column in range(len(matrix)):
        if alive[column] and (at < 0 or matrix[row, column] > matrix[row, at]):
            at = column
    return at


@njit(nogil=True, cache=True)
def _end_within(matrix, alive, owners, owner, stale):  # type: ignore[no-untyped-def]
    """Forbid all pairs within a model."""
    for row in range(len(matrix)):
        if alive[row] and owners[row] == owner:
            stale[row] = True
            for column in range(len(matrix)):
                if owners[column] == owner:
                    matrix[row, column] = -np.inf


@njit(nogil=True, cache=True)
def _shrink(matrix, alive, i, j, a, first, last, stale, best, at):  # type: ignore[no-untyped-def]
    """Make column and row ``i`` those of ``i`` and ``j`` together; keep the rows' maxima right.

    Where ``a`` is not positive, the alive rows and columns that are numbered ``first`` to ``last`` are forbidden; the
    columns are counted without ``j``.
    """
    forbidden, position = np.float32(-np.inf), 0
    for row in range(len(matrix)):
        if not alive[row]:
            continue
        value = min(matrix[row, i], matrix[row, j])
        if a > 0:
            value *= a
        elif first <= position < last:
            value = forbidden
        position += 1
        matrix[row, i] = value
        if value > best[row]:
            best[row], at[row], stale[row] = value, i, False
        elif at[row] == j or (at[row] == i and value < best[row]):
            stale[row] = True
        elif value == best[row] and i < at[row]:
            at[row] = i
    alive[j] = False
    position = 0
    for column in range(len(matrix)):
        if not alive[column]:
            continue
        value = min(matrix[i, column], matrix[j, column])
        if a > 0:
            value *= a
        elif first <= position < last:
            value = forbidden
        position += 1
        matrix[i, column] = value


@njit(nogil=True, cache=True)
def _zip(matrix, owners, budget, closed, keep, channels, a, shifted):  # type: ignore[no-untyped-def]
    """Zip ``matrix`` in place: the merged channel of every channel, -1 for none, and the sum of the entries picked.

    ``best`` and ``at`` are each row's largest entry and its column. Where ``stale``, the entry has gone and ``best`` is
    an upper bound, for entries do not grow unseen.
    """
    size = len(matrix)
    alive, stale = np.ones(size, np.bool_), np.zeros(size, np.bool_)
    for row in range(size):
        matrix[row, row] = -np.inf
    for owner in range(len(budget)):
        if closed[owner]:
            _end_within(matrix, alive, owners, owner, stale)
    at = np.empty(size, np.int64)
    best = np.empty(size, np.float32)
    into = np.arange(size)
    for row in range(size):
        at[row] = _scan(matrix, alive, row)
        best[row], stale[row] = matrix[row, at[row]], False
    total = 0.0
    for _ in range(size - keep):
        while True:
            top = -1
            for row in range(size):
                if alive[row] and (top < 0 or best[row] > best[top]):
                    top = row
            if not stale[top]:
                break
            at[top] = _scan(matrix, alive, top)
            best[top], stale[top] = matrix[top, at[top]], False
        total += best[top]
        i, j = min(top, at[top]), max(top, at[top])
        decisive = j
        if shifted:
            for row in range(j + 1, size):
                if alive[row]:
                    decisive = row
                    break
        same = owners[i] == owners[decisive]
        into[j] = i if i != j else -1
        _shrink(matrix, alive, i, j, a, owners[i] * channels, (owners[i] + 1) * channels, stale, best, at)
        if i == j:
            continue
        at[i] = _scan(matrix, alive, i)
        best[i], stale[i] = matrix[i, at[i]], False
        if same:
            owner = owners[i]
            budget[owner] -= 1
            if budget[owner] <= 0 and not closed[owner]:
                closed[owner] = True
                _end_within(matrix, alive, owners, owner, stale)
    columns, width = np.full(size, -1, np.int64), 0
    for row in range(size):
        if alive[row]:
            columns[row] = width
            width += 1
        elif into[row] >= 0:
            # What it was merged into comes before it and has been answered; a vanished channel takes its parts along.
            columns[row] = columns[into[row]]
    return columns, total

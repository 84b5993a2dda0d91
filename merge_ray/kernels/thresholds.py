"""The k-th smallest magnitude, exactly and without a sort, on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from torch import Tensor

from merge_ray.kernels import chunked
from merge_ray.kernels.threads import BLOCK, column_ranges, map_threads

SMALL = 1 << 16
"""Elements: below this, selection in a copy beats looking for a bracket first."""
SAMPLE = 1 << 17
"""Elements drawn to bracket a threshold, and at most one in :data:`STRIDE`."""
STRIDE = 64


@dataclass(frozen=True)
class Segment:
    """A threshold to find: of one task's tensor (or whole vector) ``values``, the ``rank``-th smallest magnitude."""

    task: int
    index: int
    values: np.ndarray
    rank: int


def kth_magnitudes(task_vectors: Tensor, bounds: np.ndarray, ranks: Sequence[int]) -> Tensor:
    """The ``ranks[s]``-th smallest magnitude of every row's ``s``-th segment ``[T, S]``; 0 for rank 0.

    Small segments are selected from directly. For others a sample brackets the threshold and one pass over the
    segment counts what lies below, at the ends of and inside the bracket, collecting the few inside. Where the
    bracket misses, a histogram finds the threshold.
    """
    rows = task_vectors.numpy()
    segments = [
        Segment(task, index, rows[task, bounds[index] : bounds[index + 1]], rank)
        for task in range(len(rows))
        for index, rank in enumerate(ranks)
        if rank > 0
    ]
    small = [segment for segment in segments if len(segment.values) <= SMALL]
    large = [segment for segment in segments if len(segment.values) > SMALL]
    thresholds = map_threads(lambda segment: _select(np.abs(segment.values), segment.rank), small)
    brackets = map_threads(_bracket, large)
    # All pieces of all segments are one list of work, so that one large segment keeps every thread busy.
    pieces = [
        (number, segment.values[slice(*columns)])
        for number, segment in enumerate(large)
        for columns in column_ranges(len(segment.values))
    ]
    scans = map_threads(lambda piece: _scan(piece[1], *brackets[piece[0]]), pieces)
    for number, (segment, bracket) in enumerate(zip(large, brackets, strict=True)):
        own = [scan for (owner, _), scan in zip(pieces, scans, strict=True) if owner == number]
        thresholds.append(_pick(segment, bracket, own))
    result = np.zeros((len(rows), len(ranks)), dtype=np.float32)
    for segment, threshold in zip(small + large, thresholds, strict=True):
        result[segment.task, segment.index] = threshold
    return torch.from_numpy(result)


def _select(magnitudes: np.ndarray, rank: int) -> np.float32:
    """The ``rank``-th smallest (from 1); reorders ``magnitudes``."""
    magnitudes.partition(rank - 1)
    return magnitudes[rank - 1]


def _bracket(segment: Segment) -> tuple[np.float32, np.float32]:
    """Two magnitudes that the threshold lies between, or at, but for a chance of some 1 in 10,000."""
    # An odd stride falls on all columns of weight matrices, whose widths are mostly even.
    sample = np.abs(segment.values[:: max(STRIDE, len(segment.values) // SAMPLE) | 1])
    share = segment.rank / len(segment.values)
    spread = 4 * math.sqrt(len(sample) * share * (1 - share)) + 2
    low, high = math.floor(share * len(sample) - spread), math.ceil(share * len(sample) + spread)
    if ends := [index for index in (low, high) if 0 <= index < len(sample)]:
        sample.partition(ends)
    return (sample[low] if low >= 0 else np.float32(0)), (sample[high] if high < len(sample) else np.float32(np.inf))


def _scan(piece: np.ndarray, low: np.float32, high: np.float32) -> tuple[np.ndarray, np.ndarray | None]:
    """How many magnitudes are below ``low``, up to ``low`` and up to ``high``; and those strictly between.

    These are not collected (None) where they are more than an eighth of the piece.
    """
    found = np.empty(len(piece) // 8 + BLOCK, dtype=np.int32)
    counts = np.zeros(3, dtype=np.int64)
    collected = _count_and_collect(piece.view(np.int32), low.view(np.int32), high.view(np.int32), counts, found)
    return counts, found[:collected].view(np.float32).copy() if collected >= 0 else None


@njit(nogil=True, cache=True)
def _count_and_collect(piece, low, high, counts, found):  # type: ignore[no-untyped-def]
    """Magnitudes are compared as the integers that their bits spell, which have the same order."""
    group, magnitude_bits = 16, np.int32(0x7FFFFFFF)
    first_inside, width = np.uint32(low + 1), np.uint32(max(high - low - 1, 0))
    hits, hit_groups = np.empty(BLOCK // group, np.int32), np.empty(BLOCK // group + 1, np.int32)
    collected = 0
    for first in range(0, len(piece), BLOCK):
        part = piece[first : first + BLOCK]
        below, to_low, to_high = np.int32(0), np.int32(0), np.int32(0)
        for column in range(len(part)):
            magnitude = part[column] & magnitude_bits
            below += np.int32(magnitude < low)
            to_low += np.int32(magnitude <= low)
            to_high += np.int32(magnitude <= high)
        counts[0] += below
        counts[1] += to_low
        counts[2] += to_high
        if collected + len(part) > len(found):
            return -1
        # Few groups hold anything inside the bracket: find them in vector steps, list them without branches (which
        # would be guessed wrong), and look closely at those alone.
        groups = len(part) // group
        for index in range(groups):
            hit = np.int32(0)
            for lane in range(group):
                offset = np.uint32(np.uint32(part[group * index + lane] & magnitude_bits) - first_inside)
                hit |= np.int32(offset < width)
            hits[index] = hit
        listed = 0
        for index in range(groups):
            hit_groups[listed] = index
            listed += hits[index]
        for index in hit_groups[:listed]:
            inside = part[group * index : group * index + group]
            collected = _collect(inside, first_inside, width, found, collected)
        collected = _collect(part[group * groups :], first_inside, width, found, collected)
    return collected


@njit(nogil=True, cache=True)
def _collect(values, first_inside, width, found, collected):  # type: ignore[no-untyped-def]
    """Append to ``found`` the magnitudes inside the bracket; how many there are now."""
    for value in values:
        magnitude = value & np.int32(0x7FFFFFFF)
        found[collected] = magnitude
        collected += np.int64(np.uint32(np.uint32(magnitude) - first_inside) < width)
    return collected


def _pick(
    segment: Segment, bracket: tuple[np.float32, np.float32], scans: Sequence[tuple[np.ndarray, np.ndarray | None]]
) -> np.float32:
    """The threshold from the scans of all pieces of a segment."""
    below, to_low, to_high = np.sum([counts for counts, _ in scans], axis=0)
    collected = [found for _, found in scans if found is not None]
    if below < segment.rank <= to_low:
        return bracket[0]
    if to_low < segment.rank <= to_high and len(collected) == len(scans):
        candidates, rank = np.concatenate(collected), segment.rank - to_low
        return _select(candidates, rank) if rank <= len(candidates) else bracket[1]
    return np.float32(chunked.kth_magnitude(torch.from_numpy(segment.values), segment.rank))

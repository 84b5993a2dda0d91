"""The k-th smallest magnitude, exactly and without a sort, on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from merge_ray.kernels import chunked
from merge_ray.kernels.threads import BLOCK, map_threads

SMALL = 1 << 16
"""Elements: below this, selection in a copy beats looking for a bracket first."""


def kth_magnitudes(task_vectors: Tensor, bounds: np.ndarray, ranks: Sequence[int]) -> Tensor:
    """The ``ranks[s]``-th smallest magnitude of every row's ``s``-th segment ``[T, S]``; 0 for rank 0.

    Every thread takes whole segments, so that what one collects is gone before the next begins.
    """
    rows = task_vectors.numpy()
    spans = [(start, stop, rank) for start, stop, rank in zip(bounds, bounds[1:], ranks, strict=False)]
    segments = [(row[start:stop], rank) for row in rows for start, stop, rank in spans]
    values = map_threads(lambda segment: _kth_magnitude(*segment), segments)
    return torch.tensor(values, dtype=torch.float32).view(len(rows), len(spans))


def _kth_magnitude(values: np.ndarray, rank: int) -> float:
    """The ``rank``-th smallest magnitude (from 1); 0 for rank 0.

    A sample brackets it, and one pass counts what lies below the bracket and collects the few values inside. If
    it is at an end of the bracket, where many entries may be tied, a count makes sure; if it is not there at all,
    a histogram finds it.
    """
    if rank == 0:
        return 0.0
    if len(values) <= SMALL:
        return _select(np.abs(values), rank)
    low, high = _bracket(values, rank)
    to_low, inside = _scan(values, low, high)
    if inside is not None:
        if to_low < rank <= to_low + len(inside):
            return _select(inside, rank - to_low)
        if to_low >= rank > _count_below(values, low):
            return float(low)
        if to_low + len(inside) < rank <= _count_below(values, np.nextafter(high, np.float32(np.inf))):
            return float(high)
    return chunked.kth_magnitude(torch.from_numpy(values), rank)


def _select(magnitudes: np.ndarray, rank: int) -> float:
    """The ``rank``-th smallest (from 1); reorders ``magnitudes``."""
    magnitudes.partition(rank - 1)
    return float(magnitudes[rank - 1])


def _bracket(values: np.ndarray, rank: int) -> tuple[np.float32, np.float32]:
    """Two magnitudes that the ranked one lies between, or at, but for a chance of some 1 in 10,000."""
    # Sampling more leaves less to collect; at this size the two cost about the same. An odd stride falls on all
    # columns of weight matrices, whose widths are mostly even.
    sample = np.abs(values[:: round(0.7 * len(values) ** (1 / 3)) | 1])
    share = rank / len(values)
    spread = 4 * math.sqrt(len(sample) * share * (1 - share)) + 2
    low, high = math.floor(share * len(sample) - spread), math.ceil(share * len(sample) + spread)
    if ends := [index for index in (low, high) if 0 <= index < len(sample)]:
        sample.partition(ends)
    return (sample[low] if low >= 0 else np.float32(0)), (sample[high] if high < len(sample) else np.float32(np.inf))


def _scan(values: np.ndarray, low: np.float32, high: np.float32) -> tuple[int, np.ndarray | None]:
    """How many magnitudes are up to ``low``, and those strictly between ``low`` and ``high``.

    These are not collected (None) where they are more than an eighth of the values.
    """
    found = np.empty(len(values) // 8 + BLOCK, dtype=np.int32)
    to_low, collected = _count_and_collect(values.view(np.int32), low.view(np.int32), high.view(np.int32), found)
    return to_low, found[:collected].view(np.float32) if collected >= 0 else None


def _count_below(values: np.ndarray, limit: np.float32) -> int:
    """How many magnitudes are below ``limit``."""
    return sum(
        int(np.count_nonzero(np.abs(values[start : start + SMALL]) < limit)) for start in range(0, len(values), SMALL)
    )


# Magnitudes are compared as the integers that their bits spell, which have the same order.


@njit(nogil=True, cache=True)
def _count_and_collect(values, low, high, found):  # type: ignore[no-untyped-def]
    lanes = 128
    first_inside, width = np.int32(low + 1), np.uint32(max(high - low - 1, 0))
    hits, hit_lanes = np.empty(lanes, np.int32), np.empty(lanes + 1, np.int32)
    to_low, collected = 0, 0
    for first in range(0, len(values), BLOCK):
        part = values[first : first + BLOCK]
        if collected + len(part) > len(found):
            return to_low, -1
        # Few lanes of a block hold anything inside the bracket: mark them in vector steps, list them without
        # branches (which would be guessed wrong), and look closely at those alone.
        hits[:] = 0
        for start in range(0, len(part), lanes):
            to_low += _mark(part[start : start + lanes], first_inside, width, hits)
        listed = 0
        for lane in range(lanes):
            hit_lanes[listed] = lane
            listed += hits[lane]
        for lane in hit_lanes[:listed]:
            for column in range(lane, len(part), lanes):
                magnitude = part[column] & np.int32(0x7FFFFFFF)
                found[collected] = magnitude
                collected += np.int64(np.uint32(magnitude - first_inside) < width)
    return to_low, collected


@njit(nogil=True, cache=True)
def _mark(values, first_inside, width, hits):  # type: ignore[no-untyped-def]
    """Mark the lanes of the magnitudes inside the bracket; how many are below it."""
    below = np.int32(0)
    for lane in range(len(values)):
        offset = np.int32((values[lane] & np.int32(0x7FFFFFFF)) - first_inside)
        below += np.int32(offset < 0)
        hits[lane] |= np.int32(np.uint32(offset) < width)
    return below

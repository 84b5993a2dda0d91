"""Flat operations on a CPU: compiled loops over cache-sized blocks, on ``torch.get_num_threads()`` threads.

Each compiled function handles the columns ``start..stop``; see :mod:`merge_ray.kernels.threads`. Thresholds are
found in :mod:`merge_ray.kernels.thresholds`.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from merge_ray.kernels.threads import BLOCK, over_columns
from merge_ray.kernels.thresholds import kth_magnitudes

__all__ = ["apply_bits", "apply_masks", "disjoint_merge", "kth_magnitudes", "mask_bits", "weighted_sum"]

# Weighted sums


def weighted_sum(task_vectors: Tensor, weights: Tensor, out: Tensor, base: Tensor | None, scale: float) -> None:
    """See :func:`merge_ray.kernels.weighted_sum`."""
    # Without a base the task vectors stand in for it, unread, so that one compiled kernel serves both.
    anchor = task_vectors[0] if base is None else base
    over_columns(_weighted_sum, len(out), task_vectors, weights, out, anchor, base is not None, np.float32(scale))


@njit(nogil=True, cache=True)
def _weighted_sum(rows, weights, out, base, with_base, scale, start, stop):  # type: ignore[no-untyped-def]
    total = np.empty(BLOCK, np.float32)
    for first in range(start, stop, BLOCK):
        last = min(first + BLOCK, stop)
        total[:] = np.float32(0)
        for task in range(len(rows)):
            row, weight = rows[task, first:last], weights[task]
            for column in range(len(row)):
                total[column] += weight * row[column]
        target, anchor = out[first:last], base[first:last]
        if with_base:
            for column in range(len(target)):
                target[column] = anchor[column] + scale * total[column]
        else:
            for column in range(len(target)):
                target[column] = scale * total[column]


# TIES

MEAN, SUM, MAX = 0, 1, 2


def disjoint_merge(
    task_vectors: Tensor,
    thresholds: Tensor,
    disjoint: str,
    out: Tensor,
    bounds: np.ndarray,
    cancelled: np.ndarray,
    majority: int,
) -> int:
    """Merge the marked blocks, those of ``cancelled`` (bool, one a block), with ``majority`` in columns that cancel.

    Leaves marks where columns' kept entries cancel; returns the sum of the signs of all columns that it merged.
    """
    # A zero never counts as kept, not even where the threshold is 0.
    limits = thresholds.clamp_min(torch.finfo(torch.float32).smallest_normal * 2.0**-23)
    kind = {"mean": MEAN, "sum": SUM, "max": MAX}[disjoint]
    return int(
        sum(over_columns(_disjoint_merge, len(out), task_vectors, limits, kind, out, bounds, cancelled, majority))
    )


@njit(nogil=True, cache=True)
def _pair(rows, limits, task, first, last, segment):  # type: ignore[no-untyped-def]
    """Two tasks' rows and limits: handled in one loop they halve the traffic of the sums. The last may be alone."""
    other = min(task + 1, len(rows) - 1)
    other_limit = limits[other, segment] if other > task else np.float32(np.inf)
    return rows[task, first:last], limits[task, segment], rows[other, first:last], other_limit


@njit(nogil=True, cache=True)
def _elect(rows, limits, first, last, segment, majority, total, sign):  # type: ignore[no-untyped-def]
    """Trimmed sums and the signs to merge by; the sum of the columns' own signs."""
    width, zero, one = last - first, np.float32(0), np.float32(1)
    total[:width] = zero
    for task in range(0, len(rows), 2):
        row, limit, other, other_limit = _pair(rows, limits, task, first, last, segment)
        for column in range(len(row)):
            total[column] += row[column] if abs(row[column]) >= limit else zero
            total[column] += other[column] if abs(other[column]) >= other_limit else zero
    undecided = one if majority > 0 else -one
    up, down = np.int32(0), np.int32(0)
    for column in range(width):
        value = total[column]
        up += np.int32(value > zero)
        down += np.int32(value < zero)
        sign[column] = one if value > zero else (-one if value < zero else undecided)
    return up - down


@njit(nogil=True, cache=True)
def _merge_elected(rows, limits, disjoint, first, last, segment, sign, target, count):  # type: ignore[no-untyped-def]
    """Sum (or maximum) of the magnitudes of the entries that have the elected sign, and how many they are."""
    zero = np.float32(0)
    target[:] = zero
    count[: len(target)] = 0
    for task in range(0, len(rows), 2):
        row, limit, other, other_limit = _pair(rows, limits, task, first, last, segment)
        # An entry of the elected sign times that sign is its magnitude; any other falls below the limit.
        if disjoint == MEAN:
            for column in range(len(row)):
                one, two = row[column] * sign[column], other[column] * sign[column]
                target[column] += one if one >= limit else zero
                target[column] += two if two >= other_limit else zero
                count[column] += np.int32(one >= limit) + np.int32(two >= other_limit)
        elif disjoint == SUM:
            for column in range(len(row)):
                one, two = row[column] * sign[column], other[column] * sign[column]
                target[column] += one if one >= limit else zero
                target[column] += two if two >= other_limit else zero
        else:
            for column in range(len(row)):
                one, two = row[column] * sign[column], other[column] * sign[column]
                target[column] = max(target[column], one if one >= limit else zero)
                target[column] = max(target[column], two if two >= other_limit else zero)


@njit(nogil=True, cache=True)
def _finish(disjoint, majority, total, sign, target, count):  # type: ignore[no-untyped-def]
    """Give the merged magnitudes their signs (and divide); whether a column's kept entries cancel."""
    zero, cancelling = np.float32(0), np.int32(0)
    for column in range(len(target)):
        cancelling |= np.int32(total[column] == zero) & np.int32(target[column] != zero)
        target[column] *= sign[column]
    if disjoint == MEAN:
        for column in range(len(target)):
            target[column] /= np.float32(max(count[column], 1))
    if disjoint == MAX and majority == 0:
        for column in range(len(target)):
            target[column] = zero if total[column] == zero else target[column]
    return cancelling > 0


@njit(nogil=True, cache=True)
def _disjoint_merge(rows, limits, disjoint, out, bounds, cancelled, majority, start, stop):  # type: ignore[no-untyped-def]
    """Merge the marked blocks of ``start..stop``, leave a mark where columns cancel; the sum of all signs."""
    total, sign, count = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.int32)
    segment = np.searchsorted(bounds, start, side="right") - 1
    signs, first, wanted = 0, start, False
    while first < stop:
        while bounds[segment + 1] <= first:
            segment += 1
        # A piece lies in one block, whose mark it shares, and in one segment, which has one threshold a task.
        block = first // BLOCK
        last = min((block + 1) * BLOCK, stop, bounds[segment + 1])
        if first % BLOCK == 0:
            wanted, cancelled[block] = cancelled[block], False
        if wanted:
            target = out[first:last]
            signs += _elect(rows, limits, first, last, segment, majority, total, sign)
            _merge_elected(rows, limits, disjoint, first, last, segment, sign, target, count)
            cancelled[block] |= _finish(disjoint, majority, total, sign, target, count)
        first = last
    return signs


# Masks


def mask_bits(
    rule: str, limits: Tensor, base: Tensor, task_vectors: Tensor, merged_task_vector: Tensor, bits: Tensor
) -> None:
    """See :func:`merge_ray.kernels.mask_bits`."""
    over_columns(_mask_bits, len(base), rule == "tall", limits, base, task_vectors, merged_task_vector, bits)


def apply_masks(
    rule: str,
    limits: Tensor,
    base: Tensor,
    task_vectors: Tensor,
    merged_task_vector: Tensor,
    out: Tensor,
    min_tasks: int,
    scale: float,
) -> None:
    """See :func:`merge_ray.kernels.apply_masks`."""
    masks = (rule == "tall", limits, base, task_vectors, merged_task_vector)
    over_columns(_apply_masks, len(base), *masks, out, min_tasks, np.float32(scale))


def apply_bits(bits: Tensor, base: Tensor, merged_task_vector: Tensor, out: Tensor, scale: float) -> None:
    """See :func:`merge_ray.kernels.apply_bits`."""
    over_columns(_apply_bits, len(base), bits, base, merged_task_vector, out, np.float32(scale))


@njit(nogil=True, cache=True)
def _count_kept(tall, limit, base, row, merged, kept):  # type: ignore[no-untyped-def]
    """Add 1 to ``kept`` where a task's mask holds."""
    if tall:
        for column in range(len(row)):
            value, weight = row[column], base[column]
            gap = abs((weight + merged[column]) - (weight + value))
            kept[column] += np.int32(abs(value) > limit * gap)
    else:
        for column in range(len(row)):
            kept[column] += np.int32(abs(row[column]) >= limit)


@njit(nogil=True, cache=True)
def _mask_bits(tall, limits, base, rows, merged, bits, start, stop):  # type: ignore[no-untyped-def]
    kept, flags = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.uint8)
    # Eight flags of one byte each, times this, have all their bits in the top byte, the first highest.
    gather = np.uint64(0x8040201008040201)
    for first in range(start, stop, BLOCK):
        last = min(first + BLOCK, stop)
        for task in range(len(rows)):
            kept[:] = 0
            _count_kept(tall, limits[task], base[first:last], rows[task, first:last], merged[first:last], kept)
            for column in range(BLOCK):
                flags[column] = kept[column]
            packed, eights = bits[task, first // 8 : (last + 7) // 8], flags.view(np.uint64)
            for byte in range(len(packed)):
                packed[byte] = (eights[byte] * gather) >> np.uint64(56)


@njit(nogil=True, cache=True)
def _apply_masks(tall, limits, base, rows, merged, out, min_tasks, scale, start, stop):  # type: ignore[no-untyped-def]
    kept = np.empty(BLOCK, np.int32)
    for first in range(start, stop, BLOCK):
        last = min(first + BLOCK, stop)
        anchor, vector, target = base[first:last], merged[first:last], out[first:last]
        kept[:] = 0
        for task in range(len(rows)):
            _count_kept(tall, limits[task], anchor, rows[task, first:last], vector, kept)
        for column in range(len(target)):
            target[column] = anchor[column] + (scale * vector[column] if kept[column] >= min_tasks else np.float32(0))


@njit(nogil=True, cache=True)
def _apply_bits(bits, base, merged, out, scale, start, stop):  # type: ignore[no-untyped-def]
    kept = np.empty(BLOCK, np.int32)
    for first in range(start, stop, BLOCK):
        last = min(first + BLOCK, stop)
        packed = bits[first // 8 : (last + 7) // 8]
        for byte in range(len(packed)):
            value = np.int32(packed[byte])
            for bit in range(8):
                kept[8 * byte + bit] = (value >> np.int32(7 - bit)) & np.int32(1)
        anchor, vector, target = base[first:last], merged[first:last], out[first:last]
        for column in range(len(target)):
            target[column] = anchor[column] + (scale * vector[column] if kept[column] else np.float32(0))

"""Flat operations in torch over chunks of columns: the path of accelerators, and of what need not be fast.

The functions are those of :mod:`merge_ray.kernels.cpu`, with the same results on any device, and those that
return arrays for inspection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 21  # columns: temporaries of a chunk stay far below one row of a large model


def _chunks(size: int) -> Iterator[slice]:
    for start in range(0, size, CHUNK):
        yield slice(start, min(start + CHUNK, size))


def weighted_sum(task_vectors: Tensor, weights: Tensor, out: Tensor, base: Tensor | None, scale: float) -> None:
    """See :func:`merge_ray.kernels.weighted_sum`."""
    for columns in _chunks(len(out)):
        total = torch.zeros_like(out[columns])
        for row, weight in zip(task_vectors, weights.tolist(), strict=True):
            total += row[columns] * weight
        total *= scale
        out[columns] = total if base is None else base[columns] + total


def kth_magnitudes(task_vectors: Tensor, bounds: np.ndarray, ranks: Sequence[int]) -> Tensor:
    """The ``ranks[s]``-th smallest magnitude of every row's ``s``-th segment ``[T, S]``; 0 for rank 0."""
    values = [
        [kth_magnitude(row[start:stop], rank) for start, stop, rank in zip(bounds, bounds[1:], ranks, strict=False)]
        for row in task_vectors
    ]
    return torch.tensor(values, dtype=torch.float32, device=task_vectors.device)


def kth_magnitude(row: Tensor, rank: int) -> float:
    """The ``rank``-th smallest magnitude (from 1) of ``row`` ``[n]``; 0 for rank 0.

    Magnitudes are ordered as the integers that their bits spell: a histogram of the upper half of the bits finds
    the threshold's, one of the lower half among those finds it exactly.
    """
    if rank == 0:
        return 0.0
    upper, rank = _rank_digit(row, rank, prefix=None)
    lower, _ = _rank_digit(row, rank, prefix=upper)
    return float(np.array((upper << 16) | lower, dtype=np.int32).view(np.float32))


def _rank_digit(row: Tensor, rank: int, prefix: int | None) -> tuple[int, int]:
    """The 16-bit digit that the ranked magnitude has, and its rank among those that have it."""
    counts = torch.zeros(1 << 16, dtype=torch.int64, device=row.device)
    for columns in _chunks(len(row)):
        magnitude = row[columns].view(torch.int32) & 0x7FFFFFFF
        upper = magnitude >> 16
        digits = upper if prefix is None else magnitude[upper == prefix] & 0xFFFF
        counts += torch.bincount(digits, minlength=1 << 16)
    up_to = counts.cumsum(0)
    digit = int(torch.searchsorted(up_to, rank))
    return digit, rank - int(up_to[digit] - counts[digit])


def _limits(thresholds: Tensor, bounds: np.ndarray, columns: slice) -> Tensor:
    """The thresholds of some columns: ``[T, 1]``, or ``[T, columns]`` where tensors have their own."""
    if thresholds.shape[1] == 1:
        return thresholds
    lengths = np.diff(np.clip(bounds, columns.start, columns.stop))
    return thresholds.repeat_interleave(torch.from_numpy(lengths).to(thresholds.device), dim=1)


def _trimmed(task_vectors: Tensor, thresholds: Tensor, bounds: np.ndarray, columns: slice) -> Tensor:
    part = task_vectors[:, columns]
    return torch.where(part.abs() >= _limits(thresholds, bounds, columns), part, 0)


def trim(task_vectors: Tensor, thresholds: Tensor, bounds: np.ndarray) -> Tensor:
    """The entries that reach their threshold, zero elsewhere ``[T, P]``."""
    result = torch.empty_like(task_vectors)
    for columns in _chunks(task_vectors.shape[1]):
        result[:, columns] = _trimmed(task_vectors, thresholds, bounds, columns)
    return result


def _column_sums(trimmed: Tensor) -> Tensor:
    """Sums in the order of the tasks, as the compiled kernels add."""
    total = torch.zeros_like(trimmed[0])
    for row in trimmed:
        total += row
    return total


def elect_sign(task_vectors: Tensor, thresholds: Tensor, bounds: np.ndarray, positive_tie: bool) -> Tensor:
    """See :func:`merge_ray.kernels.elect_sign`."""
    signs = torch.empty(task_vectors.shape[1], dtype=torch.int8, device=task_vectors.device)
    for columns in _chunks(len(signs)):
        signs[columns] = _column_sums(_trimmed(task_vectors, thresholds, bounds, columns)).sign().to(torch.int8)
    majority = int(signs.sum(dtype=torch.int64).sign())
    signs[signs == 0] = 1 if majority == 0 and positive_tie else majority
    return signs


def _elected(trimmed: Tensor, signs: Tensor) -> Tensor:
    """The trimmed entries of their column's sign; columns of sign 0 keep their negative entries."""
    return torch.where(torch.where(signs > 0, trimmed > 0, trimmed < 0), trimmed, 0)


def select_elected(task_vectors: Tensor, thresholds: Tensor, signs: Tensor, bounds: np.ndarray) -> Tensor:
    """See :func:`merge_ray.kernels.select_elected`."""
    result = torch.empty_like(task_vectors)
    for columns in _chunks(task_vectors.shape[1]):
        result[:, columns] = _elected(_trimmed(task_vectors, thresholds, bounds, columns), signs[columns])
    return result


def disjoint_merge(
    task_vectors: Tensor, thresholds: Tensor, disjoint: str, out: Tensor, bounds: np.ndarray, positive_tie: bool
) -> None:
    """See :func:`merge_ray.kernels.disjoint_merge`."""
    signs = elect_sign(task_vectors, thresholds, bounds, positive_tie)
    for columns in _chunks(len(out)):
        chosen = _elected(_trimmed(task_vectors, thresholds, bounds, columns), signs[columns])
        if disjoint == "max":
            out[columns] = chosen.abs().amax(0) * signs[columns]
        else:
            out[columns] = _column_sums(chosen)
        if disjoint == "mean":
            out[columns] /= (chosen != 0).sum(0).clamp_min(1)


def _kept(rule: str, limit: float, base: Tensor, row: Tensor, merged: Tensor) -> Tensor:
    if rule == "magnitude":
        return row.abs() >= limit
    return row.abs() > limit * ((base + merged) - (base + row)).abs()


def mask_bits(
    rule: str, limits: Tensor, base: Tensor, task_vectors: Tensor, merged_task_vector: Tensor, bits: Tensor
) -> None:
    """See :func:`merge_ray.kernels.mask_bits`."""
    places = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=base.device)
    for columns in _chunks(len(base)):
        padded = torch.zeros(-(-(columns.stop - columns.start) // 8) * 8, dtype=torch.uint8, device=base.device)
        for task, limit in enumerate(limits.tolist()):
            kept = _kept(rule, limit, base[columns], task_vectors[task, columns], merged_task_vector[columns])
            padded[: len(kept)] = kept
            packed = (padded.view(-1, 8) * places).sum(1, dtype=torch.uint8)
            bits[task, columns.start // 8 : columns.start // 8 + len(packed)] = packed


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
    for columns in _chunks(len(base)):
        anchor, vector = base[columns], merged_task_vector[columns]
        votes = torch.zeros(len(anchor), dtype=torch.int32, device=base.device)
        for task, limit in enumerate(limits.tolist()):
            votes += _kept(rule, limit, anchor, task_vectors[task, columns], vector)
        out[columns] = anchor + torch.where(votes >= min_tasks, scale * vector, 0)


def apply_bits(bits: Tensor, base: Tensor, merged_task_vector: Tensor, out: Tensor, scale: float) -> None:
    """See :func:`merge_ray.kernels.apply_bits`."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=base.device)
    for columns in _chunks(len(base)):
        packed = bits[columns.start // 8 : -(-columns.stop // 8)].to(base.device)
        kept = ((packed[:, None] >> shifts) & 1).view(-1)[: columns.stop - columns.start].bool()
        out[columns] = base[columns] + torch.where(kept, scale * merged_task_vector[columns], 0)

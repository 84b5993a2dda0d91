"""Flat operations in torch over chunks of columns: the path of accelerators, and of what need not be fast.

The functions are those of :mod:`merge_ray.kernels.cpu`, with the same results on any device, and those that
return arrays for inspection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from merge_ray.kernels.rows import CHUNK, TaskVectors, Total, alone
from merge_ray.kernels.threads import BLOCK


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


def kth_magnitudes(task_vectors: TaskVectors, bounds: np.ndarray, ranks: Sequence[int], total: Total = alone) -> Tensor:
    """The ``ranks[s]``-th smallest magnitude of every row's ``s``-th segment ``[T, S]``; 0 for rank 0.

    ``total``: see :func:`merge_ray.kernels.trim_thresholds`; every segment is then of all slices together.
    """
    values = [
        _ranked(task_vectors, slice(start, stop), rank, total)
        for start, stop, rank in zip(bounds.tolist(), bounds.tolist()[1:], ranks, strict=False)
    ]
    return torch.stack(values, dim=1)


def kth_magnitude(row: Tensor, rank: int) -> float:
    """The ``rank``-th smallest magnitude (from 1) of ``row`` ``[n]``; 0 for rank 0."""
    return float(_ranked(row[None], slice(0, len(row)), rank, alone))


def _ranked(task_vectors: TaskVectors, segment: slice, rank: int, total: Total) -> Tensor:
    """Every row's ``rank``-th smallest magnitude in a segment: float32 ``[T]``.

    Magnitudes are ordered as the integers that their bits spell: a histogram of the upper half of the bits finds
    the threshold's, one of the lower half among those finds it exactly.
    """
    ranks = torch.full((len(task_vectors), 1), rank, device=task_vectors.device)
    if rank == 0:
        return ranks[:, 0].float()
    upper, ranks = _rank_digits(task_vectors, segment, ranks, None, total)
    lower, _ = _rank_digits(task_vectors, segment, ranks, upper, total)
    return ((upper << 16) | lower)[:, 0].int().view(torch.float32)


def _rank_digits(
    task_vectors: TaskVectors, segment: slice, ranks: Tensor, prefixes: Tensor | None, total: Total
) -> tuple[Tensor, Tensor]:
    """The 16-bit digits ``[T, 1]`` that the ranked magnitudes have, and their ranks among those that have them."""
    counts = torch.zeros(len(task_vectors), 1 << 16, dtype=torch.int64, device=task_vectors.device)
    for start in range(segment.start, segment.stop, CHUNK):
        columns = slice(start, min(start + CHUNK, segment.stop))
        for task in range(len(task_vectors)):
            magnitude = task_vectors[task, columns].view(torch.int32) & 0x7FFFFFFF
            upper = magnitude >> 16
            digits = upper if prefixes is None else magnitude[upper == prefixes[task]] & 0xFFFF
            counts[task] += torch.bincount(digits, minlength=1 << 16)
    if total is not alone:
        counts = torch.from_numpy(total(counts.cpu().numpy())).to(counts.device)
    up_to = counts.cumsum(1)
    digits = torch.searchsorted(up_to, ranks)
    return digits, ranks - (up_to - counts).gather(1, digits)


def _limits(thresholds: Tensor, bounds: np.ndarray, columns: slice) -> Tensor:
    """The thresholds of some columns: ``[T, 1]``, or ``[T, columns]`` where tensors have their own."""
    if thresholds.shape[1] == 1:
        return thresholds
    lengths = np.diff(np.clip(bounds, columns.start, columns.stop))
    return thresholds.repeat_interleave(torch.from_numpy(lengths).to(thresholds.device), dim=1)


def _trimmed(task_vectors: TaskVectors, thresholds: Tensor, bounds: np.ndarray, columns: slice) -> Tensor:
    part = task_vectors[:, columns]
    return torch.where(part.abs() >= _limits(thresholds, bounds, columns), part, 0)


def trim(task_vectors: TaskVectors, thresholds: Tensor, bounds: np.ndarray) -> Tensor:
    """The entries that reach their threshold, zero elsewhere ``[T, P]``."""
    result = torch.empty(task_vectors.shape, device=task_vectors.device)
    for columns in _chunks(task_vectors.shape[1]):
        result[:, columns] = _trimmed(task_vectors, thresholds, bounds, columns)
    return result


def _column_sums(trimmed: Tensor) -> Tensor:
    """Sums in the order of the tasks, as the compiled kernels add."""
    total = torch.zeros_like(trimmed[0])
    for row in trimmed:
        total += row
    return total


def elect_sign(task_vectors: TaskVectors, thresholds: Tensor, bounds: np.ndarray, positive_tie: bool) -> Tensor:
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


def select_elected(task_vectors: TaskVectors, thresholds: Tensor, signs: Tensor, bounds: np.ndarray) -> Tensor:
    """See :func:`merge_ray.kernels.select_elected`."""
    result = torch.empty(task_vectors.shape, device=task_vectors.device)
    for columns in _chunks(task_vectors.shape[1]):
        result[:, columns] = _elected(_trimmed(task_vectors, thresholds, bounds, columns), signs[columns])
    return result


def disjoint_merge(
    task_vectors: Tensor,
    thresholds: Tensor,
    disjoint: str,
    out: Tensor,
    bounds: np.ndarray,
    cancelled: np.ndarray,
    majority: int,
) -> int:
    """See :func:`merge_ray.kernels.cpu.disjoint_merge`; a chunk of columns is merged where a block of it is marked."""
    count = 0
    for columns in _chunks(len(out)):
        marks = cancelled[columns.start // BLOCK : -(-columns.stop // BLOCK)]
        if not marks.any():
            continue
        trimmed = _trimmed(task_vectors, thresholds, bounds, columns)
        signs = _column_sums(trimmed).sign().to(torch.int8)
        count += int(signs.sum(dtype=torch.int64))
        undecided = signs == 0
        signs[undecided] = majority
        chosen = _elected(trimmed, signs)
        if disjoint == "max":
            out[columns] = chosen.abs().amax(0) * signs
        else:
            out[columns] = _column_sums(chosen)
        if disjoint == "mean":
            out[columns] /= (chosen != 0).sum(0).clamp_min(1)
        marks[:] = bool((undecided & (chosen != 0).any(0)).any())
    return count


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

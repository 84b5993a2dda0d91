"""The one-pass flat operations of merging: weighted sums, trimming, sign election, masks.

All work on float32 vectors over one layout: task vectors ``[T, P]`` with contiguous rows, everything else ``[P]``. Task
vectors may also be :class:`DerivedTaskVectors`, and the base in 16 bits: these become float32 a slab of columns at a
time.
On a CPU they are compiled loops over blocks that fit the cache, on ``torch.get_num_threads()`` threads
(:mod:`merge_ray.kernels.cpu`); elsewhere torch operations over chunks of columns
(:mod:`merge_ray.kernels.chunked`). Results do not depend on the number of threads. Sums run in the order of the
tasks. Nothing as large as ``[T, P]`` is allocated, except by the functions that return it.

All columns may be spread over the hosts of a group, each of which calls with its slice of them, cut at a multiple of
:data:`SLICE_STEP`, and gets its slice of the result. What depends on other columns is agreed on through ``total``,
which every host calls with the same kinds of array in the same order.

A trim may have one threshold per task (``bounds=None``) or one per task and tensor (``bounds`` of the layout,
int64 ``[S + 1]``); thresholds are ``[T, S]`` with ``S = 1`` in the first case.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from merge_ray.kernels import chunked, cpu
from merge_ray.kernels.layers import Election, layer_dots, layer_sum
from merge_ray.kernels.rows import CHUNK, DerivedTaskVectors, TaskVectors, Total, alone, part, slabs, within
from merge_ray.kernels.threads import BLOCK

__all__ = [
    "SLICE_STEP", "DerivedTaskVectors", "Election", "MaskRule", "TaskVectors", "Total", "alone", "apply_bits",
    "apply_masks", "consensus_bits", "disjoint_merge", "elect_sign", "layer_dots", "layer_sum", "mask_bits",
    "packed_size", "select_elected", "slabs", "threshold_rank", "trim", "trim_thresholds", "unpack", "vector",
    "weighted_sum",
]  # fmt: skip

MaskRule = Literal["tall", "magnitude"]
SLICE_STEP = BLOCK


def _backend(tensor: Tensor) -> ModuleType:
    return cpu if tensor.device.type == "cpu" else chunked


def _whole(task_vectors: TaskVectors, bounds: np.ndarray | None) -> np.ndarray:
    return np.array([0, task_vectors.shape[1]]) if bounds is None else np.asarray(bounds, dtype=np.int64)


def vector(task_vectors: TaskVectors) -> Tensor:
    """A new float32 vector ``[P]`` on the task vectors' device, its values not set."""
    size = task_vectors.shape[1]
    if task_vectors.device.type != "cpu":
        return torch.empty(size, device=task_vectors.device)
    # NumPy asks the system for huge pages, which makes the first touch of a new vector several times faster.
    return torch.from_numpy(np.empty(size, dtype=np.float32))


def threshold_rank(size: int, density: float) -> int:
    """Which smallest magnitude of ``size`` (counted from 1) the threshold is; 0 where everything is kept.

    ``size - int(size * density)`` as published code has it, the product in double precision, so that
    ``int(size * density) + 1`` entries reach the threshold (and whatever is tied with it).
    """
    return size - int(size * density)


def trim_thresholds(
    task_vectors: TaskVectors, density: float, bounds: np.ndarray | None = None, total: Total = alone
) -> Tensor:
    """The magnitude from which entries are kept, exactly: float32 ``[T, S]``.

    An entry is kept where its magnitude is at least the threshold: see :func:`threshold_rank`. A threshold of 0
    keeps all. In a group, segments that lie on several hosts have their magnitudes counted together.
    """
    bounds = _whole(task_vectors, bounds)
    here = np.diff(bounds)
    sizes, holders = total(np.stack([here, here > 0]).astype(np.int64))
    ranks = [threshold_rank(int(size), density) for size in sizes]
    backend = chunked if isinstance(task_vectors, DerivedTaskVectors) else _backend(task_vectors)
    if total is alone:
        return backend.kth_magnitudes(task_vectors, bounds, ranks)
    own = [rank if size and held == 1 else 0 for rank, size, held in zip(ranks, here, holders, strict=True)]
    thresholds = total(backend.kth_magnitudes(task_vectors, bounds, own).cpu().numpy())
    for segment in np.flatnonzero(holders > 1):
        ends, rank = bounds[segment : segment + 2], ranks[segment]
        thresholds[:, segment] = chunked.kth_magnitudes(task_vectors, ends, [rank], total)[:, 0].cpu()
    return torch.from_numpy(thresholds).to(task_vectors.device)


def trim(task_vectors: TaskVectors, density: float, bounds: np.ndarray | None = None) -> Tensor:
    """Trimmed task vectors ``[T, P]``: the largest magnitudes, zero elsewhere (a copy)."""
    thresholds = trim_thresholds(task_vectors, density, bounds)
    return chunked.trim(task_vectors, thresholds, _whole(task_vectors, bounds))


def weighted_sum(
    task_vectors: TaskVectors,
    coefficients: Sequence[float],
    out: Tensor,
    base: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """``out = base + scale * sum_t coefficients[t] * task_vectors[t]``, without base if none is given."""
    weights = torch.tensor(list(coefficients), dtype=torch.float32)
    for columns in slabs(task_vectors, base):
        anchor = None if base is None else base[columns].float()
        _backend(out).weighted_sum(part(task_vectors, columns), weights, out[columns], anchor, scale)
    return out


def disjoint_merge(
    task_vectors: TaskVectors,
    thresholds: Tensor,
    disjoint: str,
    out: Tensor,
    bounds: np.ndarray | None = None,
    positive_tie: bool = False,
    total: Total = alone,
) -> Tensor:
    """TIES: trim by ``thresholds``, elect a sign per column, merge the entries that have it into ``out`` ``[P]``.

    ``disjoint`` says how: ``mean``, ``sum`` or ``max``. The sign of a column is the sign of its trimmed sum; where
    that is exactly 0, the sign of the sum of all columns' signs (the overall majority); if that is 0 as well, it
    stays 0, or is positive with ``positive_tie``. Columns of sign 0 merge their negative entries (0 for ``max``),
    as published code does.
    """
    bounds, parts = _whole(task_vectors, bounds), slabs(task_vectors)
    marks = [np.ones(-(-(columns.stop - columns.start) // BLOCK), dtype=np.bool_) for columns in parts]

    def merge(majority: int) -> int:
        """Merge the marked blocks, and mark those in which columns cancel; the sum of their columns' signs."""
        signs = 0
        for columns, cancelled in zip(parts, marks, strict=True):
            if cancelled.any():
                ends = within(bounds, columns)
                rows = part(task_vectors, columns)
                signs += _backend(out).disjoint_merge(
                    rows, thresholds, disjoint, out[columns], ends, cancelled, majority
                )
        return signs

    # One pass merges as though the overall majority were negative; where it is another, the little is merged again that
    # depends on it.
    majority = int(np.sign(total(np.array(merge(-1)))))
    if majority == 0 and positive_tie:
        majority = 1
    if majority != -1:
        merge(majority)
    return out


def elect_sign(
    task_vectors: TaskVectors, thresholds: Tensor, bounds: np.ndarray | None = None, positive_tie: bool = False
) -> Tensor:
    """The elected signs of :func:`disjoint_merge`: int8 ``[P]`` of -1, 0, 1."""
    return chunked.elect_sign(task_vectors, thresholds, _whole(task_vectors, bounds), positive_tie)


def select_elected(
    task_vectors: TaskVectors, thresholds: Tensor, signs: Tensor, bounds: np.ndarray | None = None
) -> Tensor:
    """Task vectors ``[T, P]`` cut down to the trimmed entries that have their column's elected sign."""
    return chunked.select_elected(task_vectors, thresholds, signs, _whole(task_vectors, bounds))


def mask_bits(
    rule: MaskRule, limits: Sequence[float], base: Tensor, task_vectors: TaskVectors, merged_task_vector: Tensor
) -> Tensor:
    """Every task's mask as packed bits: uint8 ``[T, ceil(P / 8)]``, as ``numpy.packbits`` lays them out.

    ``tall`` keeps an entry where ``|tau_t| > limit_t * |(base + tau) - (base + tau_t)|``, ``magnitude`` where
    ``|tau_t| >= limit_t``.
    """
    bits = torch.empty(len(task_vectors), packed_size(len(base)), dtype=torch.uint8, device=base.device)
    for columns in slabs(task_vectors, base):
        rows, merged = part(task_vectors, columns), merged_task_vector[columns]
        flags = bits[:, columns.start // 8 : packed_size(columns.stop)]
        _backend(base).mask_bits(rule, _limits(limits), base[columns].float(), rows, merged, flags)
    return bits


def apply_masks(
    rule: MaskRule,
    limits: Sequence[float],
    base: Tensor,
    task_vectors: TaskVectors,
    merged_task_vector: Tensor,
    out: Tensor,
    min_tasks: int = 1,
    scale: float = 1.0,
) -> Tensor:
    """``out = base + scale * merged_task_vector`` where at least ``min_tasks`` tasks' masks hold, else base."""
    for columns in slabs(task_vectors, base):
        rows, merged = part(task_vectors, columns), merged_task_vector[columns]
        masks = (rule, _limits(limits), base[columns].float(), rows, merged)
        _backend(out).apply_masks(*masks, out[columns], min_tasks, scale)
    return out


def apply_bits(bits: Tensor, base: Tensor, merged_task_vector: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
    """``out = base + scale * merged_task_vector`` where the packed mask ``bits`` ``[ceil(P / 8)]`` holds, else base."""
    for columns in slabs(merged_task_vector[None], base):
        flags = bits[columns.start // 8 : packed_size(columns.stop)]
        _backend(out).apply_bits(flags, base[columns].float(), merged_task_vector[columns], out[columns], scale)
    return out


def consensus_bits(bits: Tensor, min_tasks: int) -> np.ndarray:
    """The packed mask ``[ceil(P / 8)]`` of what at least ``min_tasks`` of the packed masks ``[T, ...]`` keep.

    With ``min_tasks=0`` the padding after the last entry is set as well.
    """
    packed = bits.cpu().numpy()
    result = np.empty(packed.shape[1], dtype=np.uint8)
    for start in range(0, len(result), CHUNK // 8):
        stop = start + CHUNK // 8
        counts = np.unpackbits(packed[:, start:stop], axis=1).sum(axis=0, dtype=np.int32)
        result[start:stop] = np.packbits(counts >= min_tasks)
    return result


def packed_size(size: int) -> int:
    """The bytes of a packed mask over ``size`` weights."""
    return -(-size // 8)


def unpack(bits: Tensor | np.ndarray, size: int) -> np.ndarray:
    """A packed mask's (or several masks') entries: bool ``[..., size]``."""
    return np.unpackbits(np.asarray(bits), axis=-1, count=size).astype(bool)


def _limits(limits: Sequence[float]) -> Tensor:
    return torch.tensor([float(limit) for limit in limits], dtype=torch.float32)

"""Merging with a coefficient for every task and layer, and the gradient of those coefficients: one pass each.

A layer is a range of columns: ``bounds`` of the layout, int64 ``[L + 1]``, or one range over all of them. On a CPU
the columns are cut into pieces that lie in one block and one layer; sums over a layer add its pieces in their order,
so that the number of threads does not show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from merge_ray.kernels.rows import CHUNK, TaskVectors, part, slabs, within
from merge_ray.kernels.threads import BLOCK, map_threads


@dataclass(frozen=True)
class Election:
    """The entries of task vectors that TIES keeps: those that reach their trim and have their column's elected sign.

    limits: the trim's thresholds, float32 ``[T, 1]``. signs: int8 ``[P]``; where 0, negative entries are kept, as
    published code does. Entries are told apart while they are read: there is no second set of task vectors.
    """

    limits: Tensor
    signs: Tensor

    @property
    def least(self) -> Tensor:
        """The smallest magnitudes that are kept ``[T, 1]``: a zero never is, not even where the threshold is 0."""
        return self.limits.clamp_min(torch.finfo(torch.float32).smallest_normal * 2.0**-23)

    def of(self, columns: slice) -> Election:
        """The same in some of the columns."""
        return Election(self.limits, self.signs[columns])


def layer_sum(
    task_vectors: TaskVectors,
    coefficients: Tensor,
    bounds: np.ndarray,
    out: Tensor,
    base: Tensor,
    election: Election | None = None,
) -> Tensor:
    """``out = base + sum_t coefficients[t, l] * task_vectors[t]`` in every layer ``l``.

    coefficients: float32 ``[T, L]`` on the task vectors' device. election: the entries that count, all without one.
    """
    for columns in slabs(task_vectors, base):
        rows, ends, kept = part(task_vectors, columns), within(bounds, columns), election and election.of(columns)
        target, anchor = out[columns], base[columns].float()
        if out.device.type == "cpu":
            _over_pieces(_layer_sum, ends, rows, coefficients, target, anchor, *_told_apart(kept, rows))
        else:
            chunked_layer_sum(rows, coefficients, ends, target, anchor, kept)
    return out


def layer_dots(
    task_vectors: TaskVectors, gradient: Tensor, bounds: np.ndarray, election: Election | None = None
) -> Tensor:
    """Every task vector's dot product with ``gradient`` ``[P]`` in every layer: float32 ``[T, L]``, on its device.

    It is the gradient of :func:`layer_sum`'s coefficients where ``gradient`` is that of its result.
    """
    dots = torch.zeros(len(task_vectors), len(bounds) - 1, dtype=torch.float64, device=gradient.device)
    for columns in slabs(task_vectors):
        rows, ends, kept = part(task_vectors, columns), within(bounds, columns), election and election.of(columns)
        multiply = _compiled_layer_dots if gradient.device.type == "cpu" else chunked_layer_dots
        dots += multiply(rows, gradient[columns], ends, kept)
    return dots.float()


def _compiled_layer_dots(
    task_vectors: Tensor, gradient: Tensor, bounds: np.ndarray, election: Election | None
) -> Tensor:
    _, layer_of = _pieces(bounds)
    sums = torch.empty(len(task_vectors), len(layer_of), dtype=torch.float64)
    _over_pieces(_layer_dots, bounds, task_vectors, gradient, sums, *_told_apart(election, task_vectors))
    layers = len(bounds) - 1
    return torch.from_numpy(np.stack([np.bincount(layer_of, weights=row, minlength=layers) for row in sums.numpy()]))


def chunked_layer_sum(
    task_vectors: Tensor, coefficients: Tensor, bounds: np.ndarray, out: Tensor, base: Tensor, election: Election | None
) -> Tensor:
    """:func:`layer_sum` in torch over chunks of columns: the path of accelerators."""
    for layer, columns in _layer_chunks(bounds):
        kept = _kept(task_vectors[:, columns], election, columns)
        torch.addmv(base[columns], kept.T, coefficients[:, layer], out=out[columns])
    return out


def chunked_layer_dots(task_vectors: Tensor, gradient: Tensor, bounds: np.ndarray, election: Election | None) -> Tensor:
    """:func:`layer_dots`, float64, in torch over chunks of columns: the path of accelerators."""
    dots = torch.zeros(len(task_vectors), len(bounds) - 1, dtype=torch.float64, device=gradient.device)
    for layer, columns in _layer_chunks(bounds):
        dots[:, layer] += torch.mv(_kept(task_vectors[:, columns], election, columns), gradient[columns])
    return dots


def _layer_chunks(bounds: np.ndarray) -> Iterator[tuple[int, slice]]:
    for layer, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        for start in range(first, last, CHUNK):
            yield layer, slice(start, min(start + CHUNK, last))


def _kept(part: Tensor, election: Election | None, columns: slice) -> Tensor:
    if election is None:
        return part
    magnitudes = torch.where(election.signs[columns] > 0, part, -part)
    return torch.where(magnitudes >= election.least, part, 0)


def _told_apart(election: Election | None, task_vectors: Tensor) -> tuple[bool, Tensor, Tensor]:
    """The election as compiled functions take it; without one the tensors stand in, unread."""
    if election is None:
        return False, torch.zeros(len(task_vectors), 1), torch.zeros(0, dtype=torch.int8)
    return True, election.least, election.signs


def _pieces(bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the pieces begin, and where the last one ends, ``[N + 1]``; the layer of each ``[N]``."""
    edges = np.union1d(np.arange(0, bounds[-1], BLOCK), bounds)
    return edges, np.searchsorted(bounds, edges[:-1], side="right") - 1


def _over_pieces(kernel: Callable[..., Any], bounds: np.ndarray, *arguments: Any) -> None:
    """Run ``kernel(*arguments, edges, layer_of, first, last)`` over all pieces; tensors are passed as NumPy arrays."""
    edges, layer_of = _pieces(bounds)
    arrays = [item.numpy() if isinstance(item, Tensor) else item for item in arguments]
    step = max(1, -(-len(layer_of) // (8 * torch.get_num_threads())))
    ranges = [(first, min(first + step, len(layer_of))) for first in range(0, len(layer_of), step)]
    map_threads(lambda pieces: kernel(*arrays, edges, layer_of, *pieces), ranges)


@njit(nogil=True, cache=True)
def _layer_sum(rows, coefficients, out, base, elected, limits, signs, edges, layer_of, first, last):  # type: ignore[no-untyped-def]
    total, zero = np.empty(BLOCK, np.float32), np.float32(0)
    for piece in range(first, last):
        start, stop, layer = edges[piece], edges[piece + 1], layer_of[piece]
        total[:] = zero
        for task in range(len(rows)):
            row, weight, limit = rows[task, start:stop], coefficients[task, layer], limits[task, 0]
            if elected:
                sign = signs[start:stop]
                for column in range(len(row)):
                    value = row[column]
                    magnitude = value if sign[column] > 0 else -value
                    total[column] += weight * value if magnitude >= limit else zero
            else:
                for column in range(len(row)):
                    total[column] += weight * row[column]
        target, anchor = out[start:stop], base[start:stop]
        for column in range(len(target)):
            target[column] = anchor[column] + total[column]


# Within a piece the terms may be added in any order: that is what lets a sum be vectorised.
@njit(nogil=True, cache=True, fastmath={"reassoc", "nsz", "contract"})
def _layer_dots(rows, gradient, sums, elected, limits, signs, edges, layer_of, first, last):  # type: ignore[no-untyped-def]
    zero = np.float32(0)
    for piece in range(first, last):
        start, stop = edges[piece], edges[piece + 1]
        slope = gradient[start:stop]
        for task in range(len(rows)):
            row, limit, dot = rows[task, start:stop], limits[task, 0], zero
            if elected:
                sign = signs[start:stop]
                for column in range(len(row)):
                    value = row[column]
                    magnitude = value if sign[column] > 0 else -value
                    dot += value * slope[column] if magnitude >= limit else zero
            else:
                for column in range(len(row)):
                    dot += row[column] * slope[column]
            sums[task, piece] = dot

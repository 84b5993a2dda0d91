"""Task vectors of models that are held in 16 bits: made where they are read, a range of columns at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 21
"""Columns handled at once in torch: temporaries of a chunk stay far below one row of a large model. Whole blocks."""
SLAB = 1 << 18
"""Columns of task vectors that are made at once on a CPU: a slab of eight rows is 8 MiB."""


@dataclass(frozen=True)
class DerivedTaskVectors:
    """``float32(theta_t) - float32(theta_0)`` of 16-bit ``models`` ``[T, P]`` and ``base`` ``[P]``.

    A difference of two 16-bit numbers is not a 16-bit number, so task vectors cannot be held as such. Indexed by rows
    this is the same of fewer models; indexed by a row, or by rows and columns, it is float32 task vectors, a copy.
    """

    models: Tensor
    base: Tensor

    @property
    def shape(self) -> torch.Size:
        """``[T, P]``."""
        return self.models.shape

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.models.device

    def __len__(self) -> int:
        return len(self.models)

    @overload
    def __getitem__(self, index: slice | list[int]) -> DerivedTaskVectors: ...

    @overload
    def __getitem__(self, index: int | tuple[int | slice, slice]) -> Tensor: ...

    def __getitem__(self, index: int | slice | list[int] | tuple[int | slice, slice]) -> DerivedTaskVectors | Tensor:
        if isinstance(index, slice | list):
            return DerivedTaskVectors(self.models[index], self.base)
        base = self.base[index[1]] if isinstance(index, tuple) else self.base
        return self.models[index].float().sub_(base)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[task] for task in range(len(self)))


TaskVectors = Tensor | DerivedTaskVectors
"""Task vectors ``[T, P]`` as kernels take them."""


def slabs(task_vectors: TaskVectors, base: Tensor | None = None) -> list[slice]:
    """The ranges of columns that kernels take at once: all of them, or a slab where something is held in 16 bits."""
    size = task_vectors.shape[1]
    if isinstance(task_vectors, Tensor) and (base is None or base.dtype == torch.float32):
        return [slice(0, size)]
    step = SLAB if task_vectors.device.type == "cpu" else CHUNK
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def part(task_vectors: TaskVectors, columns: slice) -> Tensor:
    """Some columns of the task vectors, float32; all of them are not copied where they are float32 already."""
    if isinstance(task_vectors, Tensor) and columns == slice(0, task_vectors.shape[1]):
        return task_vectors
    return task_vectors[:, columns]


def within(bounds: np.ndarray, columns: slice) -> np.ndarray:
    """``bounds`` counted from the first of some columns, and cut off at both ends of them."""
    return np.clip(bounds, columns.start, columns.stop) - columns.start


Total = Callable[[np.ndarray], np.ndarray]
"""``total(array)``: the sum of what every host of a group gives, where each holds a slice of the columns."""


def alone(array: np.ndarray) -> np.ndarray:
    """The total where all columns are here: ``array`` itself."""
    return array

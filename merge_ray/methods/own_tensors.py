"""Merges of which every task keeps some tensors of its own model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from merge_ray.bank import ModelBank
from merge_ray.methods.base import Merged


@dataclass
class WithOwnTensors(Merged):
    """Merged weights, but for some tensors that every task has from its own model."""

    merged: Merged
    bank: ModelBank
    own: frozenset[str]
    shared = False
    keeps_own = True

    def __post_init__(self) -> None:
        self.resolved, self.notes = self.merged.resolved, self.merged.notes

    def write(self, task: str, out: Tensor) -> None:
        """See :meth:`Merged.write`."""
        self.merged.write(task, out)
        row = self.bank.task_vectors[self.bank.tasks.index(task)]
        for entry in self.bank.layout.entries:
            if entry.name in self.own:
                columns = slice(entry.offset, entry.offset + entry.size)
                out[columns] = self.bank.base[columns] + row[columns]

    def storage_bytes(self) -> int:
        """What the merge needs, and the own tensors of every task but one."""
        entries = [entry for entry in self.bank.layout.entries if entry.name in self.own]
        own = sum(entry.size * entry.dtype.itemsize for entry in entries)
        return self.merged.storage_bytes() + (len(self.bank.tasks) - 1) * own

    def artifacts(self) -> dict[str, np.ndarray]:
        """Those of the merge."""
        return self.merged.artifacts()


def with_own_tensors(merged: Merged, bank: ModelBank, own: frozenset[str]) -> Merged:
    """The merge, with every task's own of the tensors ``own`` that a family leaves to it."""
    return merged if not own or merged.keeps_own else WithOwnTensors(merged, bank, own)

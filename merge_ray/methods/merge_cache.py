"""What candidates of one host share: the expensive parts of their merges."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class MergeCache:
    """The latest expensive results of one host, kept up to ``capacity`` bytes, oldest out first.

    Results below :data:`SMALL` bytes (thresholds, choices made on validation data) do not count and stay. Some are kept
    in ``directory``, too, if it is there: for hosts that share it, of one set of models.
    """

    SMALL = 1 << 20

    def __init__(self, capacity: int, directory: Path | None = None) -> None:
        self.capacity = capacity
        self.directory = directory
        self._results: dict[Hashable, Tensor] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._results

    def forget(self, key: Hashable) -> None:
        """Drop the result stored under ``key``, if there is one."""
        self._results.pop(key, None)

    def get(self, key: Hashable, compute: Callable[[], Tensor], keep: bool = False) -> Tensor:
        """The result stored under ``key``, computed first if it is not there; ``keep`` it in the directory."""
        if key in self._results:
            self._results[key] = self._results.pop(key)
            return self._results[key]
        # Room is made before computing, so that the peak is one result over what stays.
        self._shrink(self.capacity // 2)
        result = self._kept(key, compute) if keep and self.directory and self.directory.is_dir() else compute()
        self._results[key] = result
        self._shrink(self.capacity)
        return result

    def _kept(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        assert self.directory is not None
        path = self.directory / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.npy"
        if path.exists():
            return torch.from_numpy(np.load(path))
        result = compute()
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        with aside.open("wb") as file:
            np.save(file, result.numpy())
        aside.replace(path)
        return result

    def _shrink(self, capacity: int) -> None:
        large = {key: result.nbytes for key, result in self._results.items() if result.nbytes >= self.SMALL}
        for key in list(large):
            if sum(large.values()) <= capacity:
                return
            del large[key]
            del self._results[key]

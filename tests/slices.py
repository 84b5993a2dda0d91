"""A group of hosts in one process: threads that each merge a slice of the columns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import numpy as np

from merge_ray import kernels
from merge_ray.bank import ModelBank

Result = TypeVar("Result")


class ThreadGroup:
    """``size`` threads whose totals are sums over all of them; a thread that fails breaks off the others."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.given: list[np.ndarray] = [np.empty(0)] * size

    def total(self, index: int) -> kernels.Total:
        def total(array: np.ndarray) -> np.ndarray:
            self.given[index] = array
            self.barrier.wait()
            result: np.ndarray = np.sum(self.given, axis=0, dtype=array.dtype)
            self.barrier.wait()
            return result

        return total

    def run(self, work: Callable[[int, kernels.Total], Result]) -> list[Result]:
        """``work(index, total)`` on all threads at once."""

        def member(index: int) -> Result:
            try:
                return work(index, self.total(index))
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(member, range(self.size)))


def cut(bank: ModelBank, ends: Sequence[int]) -> list[ModelBank]:
    """The slices of a bank between ``ends``, as hosts hold them."""
    parts = []
    for start, stop in pairwise(ends):
        arrays = {name: np.ascontiguousarray(array) for name, array in bank.arrays(slice(start, stop)).items()}
        parts.append(ModelBank.from_arrays(arrays, bank.layout, bank.tasks, bank.extras, bank.fingerprint, start))
    return parts

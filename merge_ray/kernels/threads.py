"""Ranges of columns on threads: how the compiled kernels are handed their work.

Numba's own threads are not used: a host sets one number of threads, torch's, and the kernels let go of the
interpreter lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

BLOCK = 2048
"""Columns handled at once: a block of eight rows is 64 KiB, well inside a core's second-level cache."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``function`` of every item, in order, on as many threads as torch may use."""
    items, threads = list(items), torch.get_num_threads()
    if threads == 1 or len(items) <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def column_ranges(size: int) -> list[tuple[int, int]]:
    """Ranges ``start, stop`` over ``size`` columns, cut at whole blocks.

    There are several for each thread, so that none waits long for another.
    """
    blocks = max(1, -(-size // BLOCK))
    step = -(-blocks // (8 * torch.get_num_threads())) * BLOCK
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def over_columns(kernel: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """Run ``kernel(*arguments, start, stop)`` over all columns; tensors are passed as NumPy arrays."""
    arrays = [item.numpy() if isinstance(item, Tensor) else item for item in arguments]
    return map_threads(lambda columns: kernel(*arrays, *columns), column_ranges(size))

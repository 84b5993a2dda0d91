"""What candidates of one host share: the expensive parts of their merges."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import Tensor


class MergeCache:
    """The latest expensive results of one host, kept up to ``capacity`` bytes, oldest out first.

    Results below :data:`SMALL` bytes (thresholds, choices made on validation data) do not count and stay.
    """

    SMALL = 1 << 20

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._results: dict[Hashable, Tensor] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._results

    def forget(self, key: Hashable) -> None:
        """Drop the result stored under ``key``, if there is one."""
        self._results.pop(key, None)

    def get(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """The result stored under ``key``, computed first if it is not there."""
        if key in self._results:
            self._results[key] = self._results.pop(key)
            return self._results[key]
        # Room is made before computing, so that the peak is one result over what stays.
        self._shrink(self.capacity // 2)
        result = compute()
        self._results[key] = result
        self._shrink(self.capacity)
        return result

    def _shrink(self, capacity: int) -> None:
        large = {key: result.nbytes for key, result in self._results.items() if result.nbytes >= self.SMALL}
        for key in list(large):
            if sum(large.values()) <= capacity:
                return
            del large[key]
            del self._results[key]

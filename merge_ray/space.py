"""Search spaces: the sets that a parameter's values are drawn from.

A space answers three questions: is a value inside (:meth:`Space.contains`), which values does a grid
visit (:meth:`Space.grid`), and how is it described to people (``str``). Searchers translate spaces into
their own terms; nothing here knows a searcher.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any


class Space(ABC):
    """A set of values."""

    @abstractmethod
    def contains(self, value: Any) -> bool:
        """Whether ``value`` belongs to the space."""

    @abstractmethod
    def grid(self) -> list[Any]:
        """The values that a grid search visits, in order."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Float(Space):
    """The reals from ``low`` to ``high``, both included; ``points`` of them on a grid, log-spaced if ``log``."""

    low: float
    high: float
    log: bool = False
    points: int = 11

    def contains(self, value: Any) -> bool:
        return _is_number(value) and self.low <= value <= self.high

    def grid(self) -> list[float]:
        if self.points == 1 or self.low == self.high:
            return [self.low]
        fractions = [index / (self.points - 1) for index in range(self.points)]
        if self.log:
            values = [self.low * (self.high / self.low) ** fraction for fraction in fractions]
        else:
            values = [self.low + (self.high - self.low) * fraction for fraction in fractions]
        return [round(value, 10) for value in values]

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g}]" + (" log" if self.log else "")


@dataclass(frozen=True)
class Int(Space):
    """The integers from ``low`` to ``high``, both included."""

    low: int
    high: int

    def contains(self, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high

    def grid(self) -> list[int]:
        return list(range(self.low, self.high + 1))

    def __str__(self) -> str:
        return f"{self.low}..{self.high}"


@dataclass(frozen=True)
class Choice(Space):
    """One of ``options``."""

    options: tuple[Any, ...]

    def contains(self, value: Any) -> bool:
        # 1 == 1.0 == True in Python; an option must also agree in kind, integers standing for reals.
        return any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in self.options)

    def grid(self) -> list[Any]:
        return list(self.options)

    def __str__(self) -> str:
        return "{" + ", ".join(map(str, self.options)) + "}"


@dataclass(frozen=True)
class PerTask(Space):
    """One value of ``each`` for every task: a vector, written ``{task: value}``."""

    each: Space

    def contains(self, value: Any) -> bool:
        return isinstance(value, dict) and bool(value) and all(self.each.contains(item) for item in value.values())

    def grid(self) -> list[Any]:
        """A grid gives every task the same value; the vector itself is for random, TPE and CMA-ES."""
        return self.each.grid()

    def __str__(self) -> str:
        return f"{self.each} per task"


@dataclass(frozen=True)
class Either(Space):
    """The union of several spaces, such as a number or the word ``validation``."""

    spaces: tuple[Space, ...]

    def contains(self, value: Any) -> bool:
        return any(space.contains(value) for space in self.spaces)

    def grid(self) -> list[Any]:
        return [value for space in self.spaces for value in space.grid()]

    def __str__(self) -> str:
        return " or ".join(map(str, self.spaces))

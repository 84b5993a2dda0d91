"""What a pickle's objects become: inert records that hold data and do nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch


class RefusalError(Exception):
    """A pickle asked for something that could run code; the text continues "it wants to ..."."""


class Sealed:
    """An object that a pickle cannot alter once it stands."""

    def __setstate__(self, state: object) -> NoReturn:
        """Without this, the BUILD instruction would write into the instance's attributes."""
        raise RefusalError(f"change the state of a {type(self).__name__}")


class Reconstructor(Sealed):
    """One of our own functions, standing in for the callable that a pickle names."""

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)


class PlainDict(dict[object, object]):
    """A dict for every kind of dict; attributes that were set on the original are dropped."""

    def __setstate__(self, state: object) -> None:
        """Ignore attributes such as the ``_metadata`` of a module's state dict."""


class Record:
    """An instance of a class that is not imported: its arguments, state and contents, as data.

    A subclass is made for each class named in a file; `path` is the class's dotted name. The instance may have been
    a module, a dict, a list, an enum member: the pickle's instructions fill whichever part they address.
    """

    path: ClassVar[str] = ""
    calls_allowed: ClassVar[bool] = True
    __slots__ = ("arguments", "elements", "entries", "state")

    arguments: tuple[object, ...]
    state: dict[object, object]
    entries: dict[object, object]
    elements: list[object]

    def __new__(cls, *arguments: object, **keywords: object) -> Record:
        """Stand in for ``cls.__new__``: nothing but empty containers is made."""
        record = super().__new__(cls)
        record.arguments, record.state, record.entries, record.elements = arguments, {}, {}, []
        return record

    def __init__(self, *arguments: object, **keywords: object) -> None:
        """Reached only where the pickle calls the name, which for a function would have run it."""
        if not self.calls_allowed:
            raise RefusalError(f"call {self.path}")

    def __setstate__(self, state: object) -> None:
        """Keep what ``__setstate__`` or the instance's ``__dict__`` would have received."""
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.state.update(part)

    def __setitem__(self, key: object, value: object) -> None:
        self.entries[key] = value

    def append(self, value: object) -> None:
        """Take an element, as a list does."""
        self.elements.append(value)

    def extend(self, values: Iterable[object]) -> None:
        """Take elements, as a list does."""
        self.elements.extend(values)

    def add(self, value: object) -> None:
        """Take an element, as a set does."""
        self.elements.append(value)


def inert_class(path: str, calls_allowed: bool) -> type[Record]:
    """Make the record class for the dotted name `path`."""
    return type("InertClass", (Record,), {"path": path, "calls_allowed": calls_allowed, "__slots__": ()})


@dataclass(frozen=True, eq=False)
class StorageRecord(Sealed):
    """Bytes that lie elsewhere in the file: `length` elements of `dtype` from element `start` of the entry `key`."""

    key: str
    dtype: torch.dtype
    length: int
    start: int = 0


@dataclass(frozen=True, eq=False)
class TensorRecord(Sealed):
    """A tensor that is not read yet; offset and stride count elements. Nothing is checked before it is read."""

    storage: StorageRecord
    offset: object
    shape: object
    stride: object
    dtype: torch.dtype

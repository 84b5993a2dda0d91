"""The errors that a user can mend, and the words that help to mend them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MergeRayError(ValueError):
    """A mistake in what merge-ray was given: the text says what, where and what would be valid."""


class SpecError(MergeRayError):
    """A sweep or fine-tuning spec that cannot be run; lists every mistake found."""


class CheckpointError(MergeRayError):
    """Weights that cannot be read, are unsafe to read, or do not fit each other."""


class MissingError(CheckpointError):
    """A location where there is nothing."""


class DataError(MergeRayError):
    """A task's data that cannot be used as asked."""


class ParameterError(MergeRayError):
    """A method's parameter that does not exist or is out of its valid set."""


class SweepInterrupted(MergeRayError):
    """A sweep that was asked to end before it was done; what it has is recorded."""


class LedgerError(MergeRayError):
    """A results directory that cannot take this sweep's rows."""


def choose_from(value: object, valid: Iterable[str]) -> str:
    """Say which words are valid, the nearest match first.

    Returns text to append to an error, such as ``did you mean 'ties'? Valid: 'ties', 'tall_mask'``.
    """
    words = sorted(valid)
    near = difflib.get_close_matches(str(value), words, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Valid: {', '.join(repr(word) for word in words)}"


def format_bytes(size: int) -> str:
    """A size as people say it: in decimal units, as in specs."""
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"

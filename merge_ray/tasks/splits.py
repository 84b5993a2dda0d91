"""Which rows of a source's parts make up train, val and test."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from merge_ray.errors import DataError
from merge_ray.tasks.source import UNDIVIDED
from merge_ray.tasks.spec import TaskSpec

# What the task-arithmetic line of work cuts from train where a set has no validation split.
CUT_FRACTION = 0.1
CUT_MOST = 5000


def available_splits(parts: Iterable[str]) -> tuple[str, ...]:
    """The splits that can be made of these parts."""
    have = set(parts)
    if UNDIVIDED in have:
        return ("train", "val", "test")
    if "train" in have:
        have.add("val")
    return tuple(split for split in ("train", "val", "test") if split in have)


def part_of(split: str, parts: Iterable[str]) -> str:
    """The part that a split is taken from. Raises KeyError where there is none."""
    have = set(parts)
    candidates = (split, "train", UNDIVIDED) if split == "val" else (split, UNDIVIDED)
    for part in candidates:
        if part in have:
            return part
    raise KeyError(split)


def select_rows(spec: TaskSpec, split: str, parts: Iterable[str], count: int) -> np.ndarray:
    """The rows of ``split`` within its part, which has ``count`` rows: ascending int64.

    Where a set has no validation split, a tenth of train (5000 at most, or ``val_size``) is cut off by one
    permutation, drawn as ``torch.utils.data.random_split`` draws it, so that a data set in the papers' order gives
    the papers' split. An undivided set loses a tenth each (or ``test_size``, ``val_size``) to test and val. What
    remains is capped at the sizes that the spec gives.
    """
    have = set(parts)
    caps = {"train": spec.train_size, "val": spec.val_size, "test": spec.test_size}
    part = part_of(split, have)
    if part == "train" and "val" not in have:
        val = _cut_size(spec, "val", count, caps["val"], CUT_MOST)
        rows = _permutation(count, spec.val_seed)
        rows = rows[count - val :] if split == "val" else rows[: count - val]
    elif part == UNDIVIDED:
        test = _cut_size(spec, "test", count, caps["test"], count)
        val = _cut_size(spec, "val", count, caps["val"], CUT_MOST)
        if test + val >= count:
            raise DataError(f"task {spec.name!r}: val_size {val} and test_size {test} leave none of {count} images")
        rows = _permutation(count, spec.val_seed)
        rows = np.split(rows, [count - test - val, count - test])[("train", "val", "test").index(split)]
    else:
        rows = np.arange(count)
    cap = caps[split]
    if cap is not None and cap < len(rows):
        rows = rows[_permutation(len(rows), spec.val_seed)[:cap]]
    return np.sort(rows)


def _cut_size(spec: TaskSpec, split: str, count: int, wanted: int | None, most: int) -> int:
    size = wanted if wanted is not None else min(max(1, int(count * CUT_FRACTION)), most)
    if not 0 < size < count:
        raise DataError(
            f"task {spec.name!r}: cannot cut {size} of {count} images for {split} (set {split}_size below {count})"
        )
    return size


def _permutation(count: int, seed: int) -> np.ndarray:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()

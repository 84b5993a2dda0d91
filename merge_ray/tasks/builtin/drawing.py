"""What the drawn tasks share: colouring masks, and their random numbers."""

from __future__ import annotations

import zlib

import numpy as np

SIZE = 32
SPLITS = ("train", "val", "test")


def generator(task: str, split: str) -> np.random.Generator:
    """The random numbers of one split of one task: the same on every machine, other ones for every split."""
    return np.random.default_rng([zlib.crc32(task.encode()), SPLITS.index(split)])


def balanced_labels(rng: np.random.Generator, count: int, classes: int) -> np.ndarray:
    """``count`` labels in a random order, every class as often as any other (or once more)."""
    return rng.permutation(np.arange(count) % classes).astype(np.int64)


def colourise(rng: np.random.Generator, masks: np.ndarray, contrast: float, noise: float) -> np.ndarray:
    """Paint masks in random dark colours on random light backgrounds, as if printed.

    ``masks`` uint8 [N, S, S] says how much of a pixel is foreground. Foreground and background brightness
    differ by at least ``contrast`` (of 1); ``noise`` is the standard deviation of the Gaussian noise added to
    every channel. Returns uint8 [N, S, S, 3].
    """
    count = len(masks)
    distance = rng.uniform(contrast, 1.0, size=(count, 1))
    dark = rng.uniform(0.0, 1.0, size=(count, 1)) * (1.0 - distance)
    tint = rng.uniform(-0.15, 0.15, size=(2, count, 3))
    background = np.clip(dark + distance + tint[0], 0, 1)
    foreground = np.clip(dark + tint[1], 0, 1)
    cover = masks[..., None] / np.float32(255)
    start, step = (paint[:, None, None].astype(np.float32) for paint in (background, foreground - background))
    images = start + cover * step + noise * rng.standard_normal((*masks.shape, 3), dtype=np.float32)
    return np.clip(np.rint(images * 255), 0, 255).astype(np.uint8)

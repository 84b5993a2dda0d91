"""Shrink Taskonomy's images once, so that reading them takes a quarter of the time and of the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from merge_ray.errors import DataError
from merge_ray.tasks.scene_sources import read_raw
from merge_ray.tasks.taskonomy_labels import LAYERS, resize_linearly

SIZE = 256
DEPTHS = ("depth_euclidean", "depth_zbuffer")
"""Left as they are: their logarithm is taken, and their holes are found, before they are scaled."""
COMPRESSED = tuple(
    sorted({layer.folder for layer in LAYERS.values() if layer.content in ("rgb", "grey16")} - {*DEPTHS})
)


def compress(root: Path, size: int = SIZE, progress: Callable[[int, int, str], None] | None = None) -> tuple[int, int]:
    """Scale the images of all buildings under ``root`` to ``size`` x ``size``, in place and in parallel.

    Depths, class maps and vectors are left alone, and so are images of that size or smaller. A run that was stopped
    goes on with what is left. ``progress(done, total, note)`` counts images. Returns the numbers of images that were
    shrunk and seen. Raises :class:`DataError` where there is nothing to shrink, or a file is no image.
    """
    files = [
        path
        for folder in COMPRESSED
        for directory in sorted(root.glob(f"*/{folder}"))
        for path in sorted(directory.glob("*.png"))
    ]
    if not files:
        raise DataError(f"no images in {root}: expected {root}/<building>/<folder>/*.png, of {', '.join(COMPRESSED)}")
    shrunk = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, changed in enumerate(pool.map(partial(_shrink, size=size), files), start=1):
            shrunk += changed
            if progress is not None:
                progress(done, len(files), "")
    return shrunk, len(files)


def _shrink(path: Path, size: int) -> bool:
    raw = read_raw(path)
    if max(raw.shape[:2]) <= size:
        return False
    scaled = np.rint(resize_linearly(raw, (size, size))).astype(np.uint8 if raw.dtype == np.uint8 else np.uint16)
    aside = path.with_name(f"{path.name}.part")
    Image.fromarray(scaled).save(aside, format="PNG")
    aside.replace(path)
    return True

"""Caches on this machine: directories that one process makes, whole or not at all, for all that want the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from merge_ray.errors import DataError, MergeRayError, format_bytes


def cache_directory() -> Path:
    """Where decoded images, heads and what came from afar are kept: ``$MERGE_RAY_CACHE``, or ``~/.cache/merge_ray``."""
    return Path(os.environ.get("MERGE_RAY_CACHE", "~/.cache/merge_ray")).expanduser()


def write_once(
    directory: Path, what: str, needed: int, write: Callable[[Path], None], error: type[MergeRayError] = DataError
) -> None:
    """Make ``directory`` with what ``write(folder)`` puts into a folder aside; others that want the same wait for it.

    what: its name in messages. needed: the bytes that it will take. Raises an ``error`` where there is no room for it,
    and where it cannot be written.
    """
    if directory.exists():
        return
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if not directory.exists():
                _write_aside(directory, what, needed, write, error)
    except OSError as failure:
        raise error(f"cannot write {what} at {directory}: {failure}") from failure


def _write_aside(
    directory: Path, what: str, needed: int, write: Callable[[Path], None], error: type[MergeRayError]
) -> None:
    """Under the lock, anything left at the name aside is from a process that was killed."""
    free = shutil.disk_usage(directory.parent).free
    if needed > free:
        sizes = f"{format_bytes(needed)} needed, {format_bytes(free)} free"
        raise error(f"no room for {what} in {directory.parent}: {sizes}")
    aside = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        write(aside)
        aside.rename(directory)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise

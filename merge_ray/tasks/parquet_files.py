"""Where the Parquet files of a data set are, on this machine or on S3, and how they are opened."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from merge_ray.errors import DataError
from merge_ray.tasks.source import SPLIT_WORDS, UNDIVIDED, Split, stamp_files

if TYPE_CHECKING:  # importing it takes seconds, and only what is far away needs it
    from merge_ray.checkpoints.s3 import S3Object

ParquetFile: TypeAlias = "Path | S3Object"
BUFFER = 8 << 20
"""Columns on S3 are read in pieces of so many bytes, however large a row group is."""


def find_parts(location: str | Mapping[Split, str]) -> dict[str, Sequence[ParquetFile]]:
    """The Parquet files of every part that a location names.

    Raises :class:`DataError` where there are none, and what :func:`open_location` raises for what is far away.
    """
    if not isinstance(location, str):
        return {split: _find_files(_fetch(place)) for split, place in location.items()}
    place = _fetch(location)
    if "{split}" in place:
        found = {
            split: files
            for split, words in SPLIT_WORDS.items()
            for word in words
            if (files := _match(place.replace("{split}", word)))
        }
        if not found:
            raise DataError(f"no Parquet file at {location} for train, val or test")
        return found
    files = _find_files(place)
    whole = glob.has_magic(place) or str(files[0]) in (place, str(Path(place)))
    return {UNDIVIDED: files} if whole else _divide(files)


def _divide(files: Sequence[ParquetFile]) -> dict[str, Sequence[ParquetFile]]:
    """Sort a directory's files by the split in their names (``train.parquet``, ``test-00000-of-00002.parquet``)
    or in their parents' (``train/0000.parquet``)."""
    splits = {word: split for split, words in SPLIT_WORDS.items() for word in words}
    parts: dict[str, list[ParquetFile]] = {}
    for file in files:
        path = PurePosixPath(str(file))
        word = path.stem.replace(".", "-").replace("_", "-").split("-")[0]
        split = splits.get(word) or splits.get(path.parent.name)
        if split:
            parts.setdefault(split, []).append(file)
    return dict(parts) or {UNDIVIDED: files}


def _find_files(place: str) -> Sequence[ParquetFile]:
    files = _match(place)
    if not files and place.startswith("s3://") and not glob.has_magic(place):
        from merge_ray.checkpoints.s3 import absent, split_location

        raise DataError(f"no Parquet file at {absent(*split_location(place))}")
    if not files:
        raise DataError(f"no Parquet file at {place}")
    return files


def _match(place: str) -> Sequence[ParquetFile]:
    """The files of a place without ``{split}``: a file, a directory's Parquet files, or what a glob finds."""
    if place.startswith("s3://"):
        return _match_s3(place)
    path = Path(place)
    if path.is_dir():
        return sorted(path.rglob("*.parquet"))
    if path.is_file():
        return [path]
    return [Path(match) for match in sorted(glob.glob(place, recursive=True))]


def _match_s3(place: str) -> Sequence[ParquetFile]:
    from merge_ray.checkpoints.s3 import find_object, list_objects, split_location

    bucket, key = split_location(place)
    if not glob.has_magic(key):
        found = find_object(bucket, key) if key and not key.endswith("/") else None
        if found is not None:
            return [found]
        folder = f"{key.rstrip('/')}/" if key else ""
        return [item for item in list_objects(bucket, folder, recursive=True) if item.key.endswith(".parquet")]
    fixed = re.split(r"[*?\[]", key, maxsplit=1)[0]
    several = "**" in key  # which stands for any number of folders, also for none
    return [
        item
        for item in list_objects(bucket, fixed, recursive=True)
        if fnmatchcase(item.key, key.replace("**/", "*")) and (several or item.key.count("/") == key.count("/"))
    ]


def _fetch(location: str) -> str:
    """Where a location is on this machine; of a remote pattern, the folder above it is fetched. S3 is read in place."""
    if "://" not in location:
        return str(Path(location).expanduser())
    if location.startswith("s3://"):
        return location
    from merge_ray.checkpoints import open_location

    parts = location.split("/")
    fixed = list(takewhile(lambda part: not glob.has_magic(part) and "{split}" not in part, parts))
    return str(open_location("/".join(fixed)).joinpath(*parts[len(fixed) :]))


def stamp_parquet(files: Sequence[ParquetFile]) -> str:
    """A hash that changes with the files: of sizes and times, or of ETags."""
    paths = [file for file in files if isinstance(file, Path)]
    if paths:
        return stamp_files(paths)
    return hashlib.sha256("\n".join(sorted(map(repr, files))).encode()).hexdigest()


def open_parquet(file: ParquetFile) -> pq.ParquetFile:
    """A Parquet file, opened; raises :class:`DataError` where it is none."""
    with _explained(file):
        if isinstance(file, Path):
            return pq.ParquetFile(file)
        from merge_ray.checkpoints.s3 import arrow_filesystem

        return pq.ParquetFile(f"{file.bucket}/{file.key}", filesystem=arrow_filesystem(), buffer_size=BUFFER)


@contextmanager
def reading_parquet(file: ParquetFile) -> Iterator[None]:
    """What fails inside is a :class:`DataError` that names the file, and so is an object that changed meanwhile."""
    with _explained(file):
        yield
    if not isinstance(file, Path):
        _raise_if_changed(file)


@contextmanager
def _explained(file: ParquetFile) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        refusal = re.search(r"AWS Error (\w+)", str(error))
        if isinstance(file, Path) or refusal is None:
            raise DataError(f"{file} cannot be read as Parquet: {error}") from error
        _raise_if_changed(file)
        # What a server writes about a refused request may repeat keys.
        raise DataError(f"{file} cannot be read: S3 fails with {refusal[1]}; run again later") from None


def _raise_if_changed(file: S3Object) -> None:
    from merge_ray.checkpoints.s3 import find_object

    if find_object(file.bucket, file.key) != file:
        raise DataError(f"{file} changed while it was being read; run again once nothing writes to it")

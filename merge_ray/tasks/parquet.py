"""Image data sets in Parquet files, in the layout of the Hugging Face hub."""

from __future__ import annotations

import glob
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from merge_ray.errors import DataError, choose_from
from merge_ray.tasks.source import SPLIT_WORDS, UNDIVIDED, ImagePart, Payload, Source, Split, stamp_files

BATCH_ROWS = 256


class ParquetPart(ImagePart):
    """The rows of some Parquet files, one after the other.

    The image column holds encoded images: a struct with ``bytes`` (and perhaps ``path``), or plain binary. The label
    column holds integers.
    """

    def __init__(self, paths: list[Path], image_column: str, label_column: str) -> None:
        self.paths = paths
        self.image_column = image_column
        self.label_column = label_column

    def stamp(self) -> str:
        return stamp_files(self.paths)

    @cached_property
    def _starts(self) -> list[int]:
        """The first row of every file, and the number of rows in all."""
        counts = [open_parquet(path).metadata.num_rows for path in self.paths]
        return [0, *np.cumsum(counts, dtype=int).tolist()]

    def load_labels(self) -> np.ndarray:
        columns = [self._label_column(path) for path in self.paths]
        return np.concatenate(columns)

    def _label_column(self, path: Path) -> np.ndarray:
        file = open_parquet(path)
        _require(file, path, self.label_column, "label")
        kind = file.schema_arrow.field(self.label_column).type
        if not pa.types.is_integer(kind):
            raise DataError(f"{path}: the label column {self.label_column!r} must hold integers, not {kind}")
        with reading_parquet(path):
            column = file.read(columns=[self.label_column]).column(0)
        if column.null_count:
            row = column.is_null().index(True).as_py()
            raise DataError(f"{path}, row {row}: the label is missing")
        return column.to_numpy().astype(np.int64)

    def read(self, rows: np.ndarray) -> Iterator[Callable[[], Payload]]:
        for index, path in enumerate(self.paths):
            start, end = self._starts[index], self._starts[index + 1]
            inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)] - start
            if len(inside):
                yield from self._read_file(path, inside)

    def _read_file(self, path: Path, rows: np.ndarray) -> Iterator[Callable[[], Payload]]:
        """Read the row groups that hold some of ``rows`` (of this file), a batch at a time."""
        file = open_parquet(path)
        _require(file, path, self.image_column, "image")
        start = 0
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            wanted = rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)] - start
            if len(wanted):
                yield from self._read_group(file, group, wanted, path)
            start = end

    def _read_group(
        self, file: pq.ParquetFile, group: int, rows: np.ndarray, path: Path
    ) -> Iterator[Callable[[], Payload]]:
        start = 0
        with reading_parquet(path):
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[self.image_column]):
                inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + len(batch))] - start
                encoded = _encoded_images(batch.column(0), path, self.image_column)
                for row in inside:
                    yield partial(_present, encoded[int(row)])
                start += len(batch)

    def where(self, row: int) -> str:
        index = bisect_right(self._starts, row) - 1
        return f"{self.paths[index]}, row {row - self._starts[index]} of the file"


def parquet_source(paths: Mapping[str, list[Path]], image_column: str, label_column: str) -> Source:
    """The parts in some files, and the class names in the schema's ``huggingface`` metadata."""
    first = next(iter(paths.values()))[0]
    schema = open_parquet(first).schema_arrow
    parts = {part: ParquetPart(files, image_column, label_column) for part, files in paths.items()}
    return Source(parts, class_names(schema, label_column))


def find_parts(location: str | Mapping[Split, str]) -> dict[str, list[Path]]:
    """The Parquet files of every part that a location names; raises :class:`DataError` where there are none."""
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
    return _divide_directory(Path(place)) if Path(place).is_dir() else {UNDIVIDED: _find_files(place)}


def _divide_directory(directory: Path) -> dict[str, list[Path]]:
    """Sort a directory's files by the split in their names (``train.parquet``, ``test-00000-of-00002.parquet``)
    or in their parents' (``train/0000.parquet``)."""
    splits = {word: split for split, words in SPLIT_WORDS.items() for word in words}
    files = sorted(directory.rglob("*.parquet"))
    if not files:
        raise DataError(f"no Parquet file in {directory}")
    parts: dict[str, list[Path]] = {}
    for path in files:
        word = path.stem.replace(".", "-").replace("_", "-").split("-")[0]
        split = splits.get(word) or splits.get(path.parent.name)
        if split:
            parts.setdefault(split, []).append(path)
    return parts or {UNDIVIDED: files}


def _find_files(place: str) -> list[Path]:
    paths = _match(place)
    if not paths:
        raise DataError(f"no Parquet file at {place}")
    return paths


def _match(place: str) -> list[Path]:
    """The files of a local place without ``{split}``: a file, a directory's Parquet files, or what a glob finds."""
    path = Path(place)
    if path.is_dir():
        return sorted(path.rglob("*.parquet"))
    if path.is_file():
        return [path]
    return [Path(match) for match in sorted(glob.glob(place, recursive=True))]


def _fetch(location: str) -> str:
    """Where a location is on this machine; of a remote pattern, the folder above it is fetched."""
    if "://" not in location:
        return str(Path(location).expanduser())
    from merge_ray.checkpoints import open_location  # only what is far away needs it

    parts = location.split("/")
    fixed = list(takewhile(lambda part: not glob.has_magic(part) and "{split}" not in part, parts))
    return str(open_location("/".join(fixed)).joinpath(*parts[len(fixed) :]))


def open_parquet(path: Path) -> pq.ParquetFile:
    """A Parquet file, opened; raises :class:`DataError` where it is none."""
    with reading_parquet(path):
        return pq.ParquetFile(path)


@contextmanager
def reading_parquet(path: Path) -> Iterator[None]:
    """What fails inside is a :class:`DataError` that names the file."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def _require(file: pq.ParquetFile, path: Path, column: str, what: str) -> None:
    names = file.schema_arrow.names
    if column not in names:
        raise DataError(
            f"{path} has no {what} column {column!r}: {choose_from(column, names)} (set {what}_column in the task)"
        )


def _encoded_images(column: pa.Array, path: Path, name: str) -> pa.Array:
    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return column.field("bytes")
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return column
    raise DataError(f"{path}: the image column {name!r} must hold binary or a struct with 'bytes', not {kind}")


def _present(image: pa.Scalar) -> bytes:
    encoded = image.as_py()
    if encoded is None:
        raise ValueError("it has no bytes")
    return encoded


def class_names(schema: pa.Schema, label_column: str) -> tuple[str, ...] | None:
    """The names of a ClassLabel feature, or None."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return None
    features = json.loads(text).get("info", {}).get("features", {})
    names = features.get(label_column, {}).get("names")
    return tuple(map(str, names)) if names else None

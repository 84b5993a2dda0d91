"""Image data sets in Parquet files, in the layout of the Hugging Face hub."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from merge_ray.errors import DataError, choose_from
from merge_ray.tasks.parquet_files import ParquetFile, open_parquet, reading_parquet, stamp_parquet
from merge_ray.tasks.source import ImagePart, Payload, Source

BATCH_ROWS = 256


class ParquetPart(ImagePart):
    """The rows of some Parquet files, one after the other.

    The image column holds encoded images: a struct with ``bytes`` (and perhaps ``path``), or plain binary. The label
    column holds integers.
    """

    def __init__(self, paths: Sequence[ParquetFile], image_column: str, label_column: str) -> None:
        self.paths = paths
        self.image_column = image_column
        self.label_column = label_column

    def stamp(self) -> str:
        return stamp_parquet(self.paths)

    @cached_property
    def _starts(self) -> list[int]:
        """The first row of every file, and the number of rows in all."""
        counts = [open_parquet(path).metadata.num_rows for path in self.paths]
        return [0, *np.cumsum(counts, dtype=int).tolist()]

    def load_labels(self) -> np.ndarray:
        columns = [self._label_column(path) for path in self.paths]
        return np.concatenate(columns)

    def _label_column(self, path: ParquetFile) -> np.ndarray:
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

    def _read_file(self, path: ParquetFile, rows: np.ndarray) -> Iterator[Callable[[], Payload]]:
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
        self, file: pq.ParquetFile, group: int, rows: np.ndarray, path: ParquetFile
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


def parquet_source(paths: Mapping[str, Sequence[ParquetFile]], image_column: str, label_column: str) -> Source:
    """The parts in some files, and the class names in the schema's ``huggingface`` metadata."""
    first = next(iter(paths.values()))[0]
    schema = open_parquet(first).schema_arrow
    parts = {part: ParquetPart(files, image_column, label_column) for part, files in paths.items()}
    return Source(parts, class_names(schema, label_column))


def _require(file: pq.ParquetFile, path: ParquetFile, column: str, what: str) -> None:
    names = file.schema_arrow.names
    if column not in names:
        raise DataError(
            f"{path} has no {what} column {column!r}: {choose_from(column, names)} (set {what}_column in the task)"
        )


def _encoded_images(column: pa.Array, path: ParquetFile, name: str) -> pa.Array:
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

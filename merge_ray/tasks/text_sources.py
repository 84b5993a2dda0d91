"""Text data sets in Parquet files: GLUE's, and any with columns ``text`` and ``label`` or ``input`` and ``target``."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from string import Formatter

import numpy as np
import pyarrow as pa

from merge_ray.errors import DataError, choose_from
from merge_ray.tasks.facts import find_text_facts
from merge_ray.tasks.parquet import class_names
from merge_ray.tasks.parquet_files import ParquetFile, open_parquet, reading_parquet, stamp_parquet
from merge_ray.tasks.source import Source, TextPart
from merge_ray.tasks.spec import TaskSpec

PROMPTS = {"text": "{text}\nWhich of these is it: {options}?", "input": "{input}"}
"""What is asked where the spec and GLUE's facts do not say, by the column that is there."""
OPTIONS = "options"


@dataclass(frozen=True)
class ParquetTextPart(TextPart):
    """The rows of some Parquet files, one after the other.

    prompt: the question, over the files' columns. answers: the column of integers (numbers of the classes), of texts
    (the classes themselves, then ``classes`` has them in order) or of floats (numbers to be told).
    """

    paths: Sequence[ParquetFile]
    prompt: str
    answers: str
    classes: tuple[str, ...] | None

    def stamp(self) -> str:
        return stamp_parquet(self.paths)

    def load_labels(self) -> np.ndarray:
        return np.concatenate([self._labels_of(path) for path in self.paths])

    def _labels_of(self, path: ParquetFile) -> np.ndarray:
        column = read_columns(path, [self.answers])[self.answers]
        if column.null_count:
            row = column.to_pylist().index(None)
            raise DataError(f"{path}, row {row}: there is no answer in column {self.answers!r}")
        if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            return column.to_numpy()
        numbers = {name: number for number, name in enumerate(self.classes or ())}
        found = [numbers.get(answer, -1) for answer in column.to_pylist()]
        if -1 in found:
            row = found.index(-1)
            raise DataError(f"{path}, row {row}: {column[row].as_py()!r} is none of the classes")
        return np.array(found)

    def texts(self, rows: np.ndarray, options: str) -> list[str]:
        names = [name for name in column_names(self.prompt) if name != OPTIONS]
        found = []
        for path, start in zip(self.paths, self._starts, strict=False):
            columns = read_columns(path, names)
            size = len(next(iter(columns.values()))) if columns else 0
            inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + size)] - start
            values = [column.take(pa.array(inside)).to_pylist() for column in columns.values()]
            for row, fields in zip(inside.tolist(), zip(*values, strict=True), strict=True):
                if None in fields:
                    raise DataError(f"{path}, row {row}: there is no text in column {names[fields.index(None)]!r}")
                found.append(self.prompt.format_map({**dict(zip(names, fields, strict=True)), OPTIONS: options}))
        return found

    @cached_property
    def _starts(self) -> list[int]:
        """The first row of every file, and the number of rows in all."""
        return [0, *np.cumsum([open_parquet(path).metadata.num_rows for path in self.paths], dtype=int).tolist()]

    def where(self, row: int) -> str:
        index = bisect_right(self._starts, row) - 1
        return f"{self.paths[index]}, row {row - self._starts[index]} of the file"


def text_source(spec: TaskSpec, paths: Mapping[str, Sequence[ParquetFile]]) -> Source | None:
    """The parts in a task's Parquet files, if they hold texts, or None.

    The prompt is the spec's, or GLUE's where the task has its name and the files its columns, or that of
    :data:`PROMPTS`. Answers are in the spec's label column, or else in ``target``.
    """
    first = next(iter(paths.values()))[0]
    schema = open_parquet(first).schema_arrow
    if spec.image_column in schema.names:
        return None
    facts = find_text_facts(spec.name)
    if facts is not None and not set(column_names(facts.prompt)) - {OPTIONS} <= set(schema.names):
        facts = None
    plain = next((prompt for column, prompt in PROMPTS.items() if column in schema.names), None)
    prompt = spec.prompt or (facts.prompt if facts else plain)
    if prompt is None:
        return None
    answers = "target" if spec.label_column not in schema.names and "target" in schema.names else spec.label_column
    for column in (*column_names(prompt), answers):
        if column not in (*schema.names, OPTIONS):
            raise DataError(
                f"{first} has no column {column!r}, which task {spec.name!r} asks for; "
                f"{choose_from(column, schema.names)}"
            )
    classes = _classes(spec, paths, schema, answers, facts.classes if facts else None)
    parts = {part: ParquetTextPart(files, prompt, answers, classes) for part, files in paths.items()}
    return Source(parts, classes)


def _classes(
    spec: TaskSpec,
    paths: Mapping[str, Sequence[ParquetFile]],
    schema: pa.Schema,
    answers: str,
    known: tuple[str, ...] | None,
) -> tuple[str, ...] | None:
    """The classes in the order of the labels: the spec's, GLUE's, the schema's, or all answers that there are."""
    kind = schema.field(answers).type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        if spec.classes is not None:
            return tuple(spec.classes)
        columns = [read_columns(path, [answers])[answers] for files in paths.values() for path in files]
        return tuple(sorted({answer for column in columns for answer in column.to_pylist() if answer is not None}))
    if not pa.types.is_integer(kind) and not pa.types.is_floating(kind):
        raise DataError(f"task {spec.name!r}: column {answers!r} must hold integers, numbers or texts, not {kind}")
    if pa.types.is_floating(kind) and known is None and spec.classes is None:
        raise DataError(f"task {spec.name!r}: its answers are numbers; give 'classes', the numbers that may be told")
    if known is not None or (named := class_names(schema, answers)) is None:
        return known
    return tuple(name.replace("_", " ") for name in named)


def column_names(prompt: str) -> list[str]:
    """The names in braces of a prompt, each once."""
    return list(dict.fromkeys(name for _, name, _, _ in Formatter().parse(prompt) if name is not None))


def read_columns(path: ParquetFile, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    """Some columns of a Parquet file by name; raises DataError for those that are not there."""
    file = open_parquet(path)
    if absent := sorted(set(names) - set(file.schema_arrow.names)):
        raise DataError(f"{path} has no column {absent[0]!r}; {choose_from(absent[0], file.schema_arrow.names)}")
    with reading_parquet(path):
        table = file.read(columns=list(names))
    return {name: table.column(name) for name in names}

"""The ledger's rows: their schema, and reading them back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from merge_ray.errors import LedgerError
from merge_ray.results import Results, open_results

TASK_SCORE = pa.struct(
    [
        ("task", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("count", pa.int64()),
        ("standard_error", pa.float64()),
        ("reference", pa.float64()),
        ("normalized", pa.float64()),
        ("correct", pa.binary()),
        ("domains", pa.list_(pa.struct([("domain", pa.string()), ("value", pa.float64())]))),
    ]
)
"""One task's score in a row. ``correct`` is ``np.packbits`` of the samples' correctness in evaluation order."""

ROW_SCHEMA = pa.schema(
    [
        ("identity", pa.string()),
        ("sweep", pa.string()),
        ("study", pa.string()),
        ("method", pa.string()),
        ("pair", pa.list_(pa.string())),
        ("parameters", pa.string()),
        ("resolved", pa.string()),
        ("seed", pa.int64()),
        ("split", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("notes", pa.list_(pa.string())),
        ("tasks", pa.list_(TASK_SCORE)),
        ("mean", pa.float64()),
        ("normalized_mean", pa.float64()),
        ("worst_task", pa.string()),
        ("worst", pa.float64()),
        ("objective", pa.float64()),
        ("samples", pa.int64()),
        ("curve", pa.list_(pa.float64())),
        ("losses", pa.list_(pa.float64())),
        ("steps", pa.list_(pa.int64())),
        ("seconds_merge", pa.float64()),
        ("seconds_evaluate", pa.float64()),
        ("seconds_total", pa.float64()),
        ("peak_memory_bytes", pa.int64()),
        ("storage_bytes", pa.int64()),
        ("storage_ratio", pa.float64()),
        ("device", pa.string()),
        ("host", pa.string()),
        ("versions", pa.string()),
        ("bank_fingerprint", pa.string()),
        ("data_fingerprint", pa.string()),
        ("transductive", pa.bool_()),
        ("artifacts", pa.list_(pa.string())),
        ("time", pa.timestamp("us", tz="UTC")),
    ]
)
"""The columns of ``trials/*.parquet``; ``results/README.md`` says what each means."""


def read_rows(results: str | Path | Results | Iterable[str | Path]) -> pd.DataFrame:
    """Read the ledgers of one or several results directories, also on S3, oldest row first.

    Files that are still being written (hidden, or not ``.parquet``) are left out. Raises :class:`LedgerError`
    for a directory without a ledger and for a row that cannot be read, naming it.
    """
    locations = [results] if isinstance(results, (str, Path, Results)) else list(results)
    opened = [open_results(location, "trials/") for location in locations]
    rows = pa.concat_tables([without_doubles(_read_ledger(results)) for results in opened]).to_pandas()
    # Rows from before there were pairs have none.
    rows["pair"] = rows["pair"].map(lambda pair: () if pair is None else tuple(pair))
    return rows.sort_values(["time", "identity"], kind="stable", ignore_index=True)


def _read_ledger(results: Results) -> pa.Table:
    if not (results.directory / "trials").is_dir():
        raise LedgerError(f"{results.location} is not a results directory: it has no folder 'trials'")
    while True:
        files = row_files(results.directory)
        try:
            return read_files(files)
        except FileNotFoundError:
            # Compacted meanwhile: its rows are in another file now.
            if files == row_files(results.directory):
                raise
        except (pa.ArrowException, OSError) as error:
            raise LedgerError(_unreadable(files) or f"the ledger cannot be read: {error}") from error


def row_files(directory: Path) -> list[str]:
    """The files of a ledger."""
    return sorted(str(path) for path in (directory / "trials").glob("*.parquet") if not path.name.startswith("."))


def read_files(files: Sequence[str]) -> pa.Table:
    """The rows of some files of a ledger."""
    return pads.dataset(list(files), schema=ROW_SCHEMA, format="parquet").to_table()


def without_doubles(table: pa.Table) -> pa.Table:
    """Each study's candidates once: rows stand in two files where a crash came between compacting and removing.

    Such rows are equal, but where a candidate that had failed was scored again: then the failure goes.
    """
    keys = table.select(["study", "identity", "status", "time"]).to_pandas()
    keys["scored"] = keys["status"] != "failed"
    last = keys.sort_values(["scored", "time"], kind="stable").drop_duplicates(["study", "identity"], keep="last")
    return table.take(pa.array(sorted(last.index), pa.int64()))


def _unreadable(files: list[str]) -> str | None:
    """The text for the first file that is no row of a ledger, or None."""
    for file in files:
        try:
            pq.read_table(file, schema=ROW_SCHEMA)
        except (pa.ArrowException, OSError) as error:
            return f"{file} is not a readable row of a ledger ({error}); remove it to score that candidate again"
    return None


def widen(rows: pd.DataFrame) -> pd.DataFrame:
    """Spread each row's tasks and parameters over columns of their own.

    Adds, per task, ``<metric>/<task>``, ``standard_error/<task>`` and ``normalized/<task>``; per parameter,
    ``parameter/<name>`` (``parameter/<name>/<task>`` for one with a value per task); and the standard errors
    ``mean_standard_error`` and ``normalized_standard_error`` of the two means. Keeps the index and all columns.
    """
    scores = pd.DataFrame([_task_columns(task_scores(tasks)) for tasks in rows["tasks"]], index=rows.index)
    parameters = pd.DataFrame([_parameter_columns(text) for text in rows["parameters"]], index=rows.index)
    return pd.concat([rows, scores, parameters.apply(_one_type)], axis=1)


def task_scores(tasks: Any) -> list[dict[str, Any]]:
    """A row's ``tasks`` as a list; a failed row has none."""
    return [] if tasks is None or isinstance(tasks, float) else list(tasks)


def _task_columns(tasks: list[dict[str, Any]]) -> dict[str, float]:
    columns: dict[str, float] = {"mean_standard_error": math.nan, "normalized_standard_error": math.nan}
    for score in tasks:
        columns[f"{score['metric']}/{score['task']}"] = score["value"]
        columns[f"standard_error/{score['task']}"] = score["standard_error"]
        columns[f"normalized/{score['task']}"] = score["normalized"]
    if tasks:
        # The tasks' samples are independent; the reference scores are taken as given.
        errors = [_number(score["standard_error"]) for score in tasks]
        references = [_number(score["reference"]) or math.nan for score in tasks]
        relative = [error / reference for error, reference in zip(errors, references, strict=True)]
        columns["mean_standard_error"] = math.hypot(*errors) / len(tasks)
        columns["normalized_standard_error"] = math.hypot(*relative) / len(tasks)
    return columns


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _parameter_columns(text: str) -> dict[str, Any]:
    columns = {}
    for name, value in json.loads(text).items():
        if isinstance(value, Mapping):
            columns.update({f"parameter/{name}/{key}": item for key, item in value.items()})
        else:
            columns[f"parameter/{name}"] = value
    return columns


def _one_type(column: pd.Series) -> pd.Series:
    """Numbers stay numbers; a parameter that is a number here and a word there becomes text throughout."""
    values = column.dropna()
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return column.astype(float)
    words = column.map(lambda value: value if isinstance(value, str) else json.dumps(value), na_action="ignore")
    return words.astype("str")

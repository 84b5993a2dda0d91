"""Rows of published tables beside one's own: labelled with their source, never ranked."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from merge_ray.errors import LedgerError, choose_from

COLUMNS = ("model", "num_tasks", "method", "variant", "dataset", "metric", "value", "source")
"""What a file of published results must have: one line per method and data set, values as fractions."""

_AVERAGE = "AVERAGE"


def published_rows(path: str | Path, model: str | None = None, num_tasks: int | None = None) -> pd.DataFrame:
    """Read a CSV of published results into leaderboard columns, one row per method, variant and source.

    A line whose ``dataset`` is ``AVERAGE`` gives ``mean``; where a source states none, ``mean`` is that of its
    ``num_tasks`` accuracies. ``model`` and ``num_tasks`` keep only those lines. Raises :class:`LedgerError` for a
    file that cannot be read, for missing columns and for a filter that leaves nothing.
    """
    try:
        lines = pd.read_csv(path, dtype={"variant": "str"})
    except (OSError, ValueError) as error:
        raise LedgerError(f"the published results {path} cannot be read: {error}") from error
    missing = [name for name in COLUMNS if name not in lines.columns]
    if missing:
        raise LedgerError(f"the published results {path} lack the columns {missing}; they have {list(lines.columns)}")
    for column, wanted in (("model", model), ("num_tasks", num_tasks)):
        if wanted is not None:
            lines = _only(lines, column, wanted, path)
    keys = ["model", "num_tasks", "method", "variant", "source"]
    lines = lines.assign(variant=lines["variant"].fillna(""))
    average = lines["dataset"].str.upper() == _AVERAGE
    tasks = lines[~average].assign(column=lambda rows: rows["metric"] + "/" + rows["dataset"])
    table = tasks.pivot_table(index=keys, columns="column", values="value", aggfunc="mean")
    table["mean"] = table[[name for name in table.columns if name.startswith("accuracy/")]].mean(axis=1)
    counts = tasks[tasks["metric"] == "accuracy"].groupby(keys).size().reindex(table.index, fill_value=0)
    table["mean"] = table["mean"].where(counts == table.index.get_level_values("num_tasks"))
    stated = lines[average].groupby(keys)["value"].mean()
    table = table.reindex(table.index.union(stated.index))
    table["mean"] = stated.reindex(table.index).fillna(table["mean"])
    table = table.reset_index().sort_values(["mean", *keys], ascending=[False, *[True] * len(keys)])
    return table.assign(kind="published").reset_index(drop=True).rename_axis(columns=None)


def _only(lines: pd.DataFrame, column: str, wanted: object, path: str | Path) -> pd.DataFrame:
    kept = lines[lines[column] == wanted]
    if kept.empty:
        valid = choose_from(wanted, lines[column].astype("str").unique())
        raise LedgerError(f"the published results {path} have no line with {column} {wanted!r}; {valid}")
    return kept


def add_published(table: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """The leaderboard with published rows below it; their tasks are matched to its tasks whatever the case."""
    own = {name.casefold(): name for name in table.columns}
    renamed = published.rename(columns=lambda name: own.get(name.casefold(), name))
    return pd.concat([table, renamed], ignore_index=True)

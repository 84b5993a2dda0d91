"""Correlate distances between models with a given affinity matrix, such as the one that Taskonomy published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from scipy import stats

from merge_ray.checkpoints import open_location
from merge_ray.errors import MergeRayError, SpecError, choose_from

PUBLISHED = "builtin:taskonomy_affinity.csv"
"""Taskonomy's first-order affinities (Zamir et al., CVPR 2018) of 17 tasks, normalised: row source, column target."""


def correlate(distances: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """Per model the ``spearman`` and ``pearson`` correlation of its column of ``distances`` with that of ``reference``.

    Both are square, with equal names on rows and columns; the diagonal takes part, as in the authors' code. Where the
    reference is large for related models, as affinities are, agreement is *negative*.
    """
    rows = {
        name: (
            stats.spearmanr(reference[name], distances[name]).statistic,
            stats.pearsonr(reference[name], distances[name]).statistic,
        )
        for name in distances.columns
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["spearman", "pearson"]).rename_axis("model")


def find_reference(location: str, names: Sequence[str]) -> pd.DataFrame:
    """The affinities between ``names`` (rows are sources, columns targets) of a matrix in a CSV or Parquet file.

    location: a file whose first column holds the names of the rows, or ``published``. Raises :class:`MergeRayError`
    when it cannot be read, is not square, or lacks one of the names.
    """
    path = open_location(PUBLISHED if location == "published" else location)
    matrix = _read(path)
    if set(matrix.index) != set(matrix.columns) or not matrix.index.is_unique:
        raise SpecError(f"{path}: the names of the rows and those of the columns differ, or one is there twice")
    if missing := [name for name in names if name not in matrix.columns]:
        raise SpecError(f"{path}: knows nothing of {missing[0]!r}; {choose_from(missing[0], matrix.columns)}")
    chosen = matrix.loc[list(names), list(names)]
    if chosen.isna().any(axis=None):
        raise SpecError(f"{path}: has no number for every pair of {', '.join(names)}")
    return chosen


def _read(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
        return table.set_index(table.columns[0]).rename_axis(None).astype(float)
    except (OSError, ValueError, IndexError) as error:
        raise MergeRayError(f"{path}: not a table of names and numbers ({error})") from None

"""From the ledger to the leaderboard: the best candidate of every study, confirmed on the test split."""

from __future__ import annotations

import math
from collections.abc import Hashable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from merge_ray.errors import LedgerError, choose_from
from merge_ray.leaderboard.rows import read_rows, widen
from merge_ray.leaderboard.significance import standard_error, within_noise
from merge_ray.results import Results, open_results

REFERENCES = ("average_label", "pretrained", "finetuned")
"""The methods that others are measured against; the leaderboard shows them without a rank."""

SEARCH = ["sweep", "study", "pair"]
"""The columns that tell one search from another."""

_SUMS = ["candidates", "pruned", "failed", "seconds", "samples"]
_COSTS = ("peak_memory_bytes", "seconds_evaluate", "seconds_merge", "seconds_total", "storage_bytes", "storage_ratio")
_NO_OBJECTIVE = {"seed", "samples", "mean_standard_error", "normalized_standard_error"}

_FRONT = [
    "rank", "kind", "within_noise_of_best", "sweep", "study", "method", "pairs", "ranked_by", "score",
    "score_standard_error", "validation_score", "mean", "mean_standard_error", "normalized_mean",
    "normalized_standard_error", "worst_task", "worst",
]  # fmt: skip
_BACK = [
    "parameters", "resolved", "storage_bytes", "storage_ratio", "candidates", "pruned", "failed", "seconds",
    "seconds_merge", "seconds_evaluate", "peak_memory_bytes", "samples", "seed", "transductive", "identity",
    "validation_identity", "artifacts", "device", "bank_fingerprint", "data_fingerprint", "versions", "time",
]  # fmt: skip


def _check_objective(wide: pd.DataFrame, objective: str) -> None:
    numeric = {str(name) for name in wide.select_dtypes("number").columns}
    valid = {name for name in numeric - _NO_OBJECTIVE if not name.startswith(("parameter/", "standard_error/"))}
    if objective not in valid:
        raise LedgerError(f"no metric of the ledger is called {objective!r}; {choose_from(objective, valid)}")


def _sorted_by(wide: pd.DataFrame, column: str, objective: str) -> pd.DataFrame:
    """Best first. Equal values are ordered by identity, so that the order never depends on who came first."""
    return wide.sort_values([column, "identity"], ascending=[objective in _COSTS, True], kind="stable")


def best_candidates(rows: pd.DataFrame, objective: str = "objective") -> pd.DataFrame:
    """The row of every study's best complete candidate on validation data, with the columns of ``rows``.

    ``objective`` is a numeric column of the ledger or of :func:`widen`, by default what the search maximised; less
    is better for seconds, memory and storage. Raises :class:`LedgerError` for an unknown objective.
    """
    wide = widen(rows)
    _check_objective(wide, objective)
    scored = wide[(wide["split"] == "val") & (wide["status"] == "complete") & wide[objective].notna()]
    best = _sorted_by(scored, objective, objective).groupby(SEARCH, sort=True).head(1)
    return rows.loc[best.index]


def rank(rows: pd.DataFrame, objective: str = "normalized_mean", by_pair: bool = False) -> pd.DataFrame:
    """The leaderboard: one row for every study's confirmed candidate and for the references, best first.

    A study over pairs of models has the means of its pairs' best candidates, or, ``by_pair``, a row for each of them.

    A study's candidate is the best on validation data by what its search maximised (:func:`best_candidates`),
    whatever the ``objective`` that ranks; its scores are those of the same candidate on the test split. A study
    whose best candidate has not been confirmed yet is left out. Raises :class:`LedgerError` if there is none.
    ``results/README.md`` says what each column means.
    """
    wide = widen(rows)
    _check_objective(wide, objective)
    best = wide.loc[best_candidates(rows).index]
    tests = wide[(wide["split"] == "test") & (wide["status"] == "complete")]
    confirmed, studies = [], []
    for _, study in wide.groupby(SEARCH, sort=True):
        chosen = next((row for index, row in best.iterrows() if index in study.index), None)
        test = _confirmed(study, chosen, tests)
        if test is not None:
            confirmed.append(test)
            studies.append(_about(study, chosen, objective))
    if not confirmed:
        raise LedgerError(_nothing_confirmed(rows))
    scored = wide.loc[confirmed].drop(columns="study").reset_index(drop=True)
    table = pd.concat([scored, pd.DataFrame(studies)], axis=1)
    table["kind"] = table["method"].isin(REFERENCES).map({True: "reference", False: "merged"})
    table["ranked_by"] = objective
    table["score"] = table[objective]
    table["score_standard_error"] = [standard_error(row, objective) for _, row in table.iterrows()]
    table["pairs"] = table["pair"].map(lambda pair: "+".join(pair))
    if not by_pair:
        table = _over_pairs(table)
    table = _sorted_by(table, "score", objective).reset_index(drop=True)
    return _tidy(_number_and_compare(table, objective))


def _confirmed(study: pd.DataFrame, chosen: pd.Series | None, tests: pd.DataFrame) -> Hashable | None:
    """The index of the complete test row of a study's chosen candidate; without validation rows, of the latest.

    Equal candidates of two studies have one row, under the name of either: the whole sweep's tests are searched.
    """
    if chosen is None:
        own = tests.loc[tests.index.intersection(study.index)]
        return None if own.empty or (study["split"] == "val").any() else own.index[-1]
    same = tests["parameters"].isin([chosen["parameters"], chosen["resolved"]])
    for column in ("sweep", "method", "seed", "pair"):
        same &= tests[column] == chosen[column]
    return tests.index[same][-1] if same.any() else None


def _over_pairs(table: pd.DataFrame) -> pd.DataFrame:
    """One line for each study over pairs: means, and what all its pairs have in common."""
    paired = table["pairs"] != ""
    if not paired.any():
        return table
    lines = [table[~paired]]
    for _, pairs in table[paired].groupby(["sweep", "study"], sort=True):
        line = pairs.head(1).copy()
        for column in pairs.columns:
            values = pairs[column].dropna()
            if column in _SUMS:
                line[column] = values.sum()
            elif "standard_error" in column:
                line[column] = math.hypot(*values) / len(values) if len(values) else math.nan
            elif pd.api.types.is_float_dtype(pairs[column]):
                line[column] = values.mean()
            elif values.astype(str).nunique() > 1:
                line[column] = None
        # Noise is not told over pairs: they share models and samples.
        nothing: Any = [[]]
        lines.append(line.assign(pairs=f"{len(pairs)} pairs", tasks=None, artifacts=nothing))
    return pd.concat(lines, ignore_index=True)


def _about(study: pd.DataFrame, chosen: pd.Series | None, objective: str) -> dict[str, Any]:
    """What the leaderboard says about the search behind a line."""
    tried = study if chosen is None else study[study["split"] == "val"]
    return {
        "study": study["study"].iloc[0],
        "validation_score": float("nan") if chosen is None else chosen[objective],
        "validation_identity": None if chosen is None else chosen["identity"],
        "candidates": len(tried),
        "pruned": int((tried["status"] == "pruned").sum()),
        "failed": int((tried["status"] == "failed").sum()),
        "seconds": study["seconds_total"].sum(),
    }


def _number_and_compare(table: pd.DataFrame, objective: str) -> pd.DataFrame:
    """Add ``rank`` (of merged models) and ``within_noise_of_best`` (against the first of them)."""
    merged = table["kind"] == "merged"
    table["rank"] = merged.cumsum().where(merged).astype("Int64")
    noise: list[bool | None] = [None] * len(table)
    if merged.any():
        best = table[merged].iloc[0]
        noise = [within_noise(row, best, objective) for _, row in table.iterrows()]
    table["within_noise_of_best"] = pd.array(noise, dtype="boolean")
    return table


def _tidy(table: pd.DataFrame) -> pd.DataFrame:
    """The documented columns in their order; tasks and parameters that no line has are dropped."""
    wide = [name for name in table.columns if "/" in name and table[name].notna().any()]
    scores = [name for name in wide if not name.startswith("parameter/")]
    order = ["standard_error", "normalized"]
    scores.sort(key=lambda name: order.index(name.partition("/")[0]) if name.partition("/")[0] in order else -1)
    parameters = sorted(name for name in wide if name.startswith("parameter/"))
    tidy = table[[*_FRONT, *scores, *_BACK[:2], *parameters, *_BACK[2:]]]
    return tidy.astype({"validation_identity": "str"})


def _nothing_confirmed(rows: pd.DataFrame) -> str:
    status = rows.loc[rows["split"] == "val", "status"].value_counts().to_dict()
    counts = ", ".join(f"{count} {name}" for name, count in sorted(status.items())) or "none"
    failure = rows["error"].dropna().iloc[:1].tolist()
    hint = f"; the first error: {failure[0].strip().splitlines()[-1]}" if failure else ""
    found = f"no candidate has been scored on the test split yet (on validation data: {counts})"
    return f"{found}{hint}; run the sweep again"


def write_leaderboard(results: str | Path | Results, objective: str = "normalized_mean") -> Path:
    """Rank a results directory's ledger into its ``leaderboard.parquet``; returns the path (on S3, of the copy here).

    A sweep over pairs has a ``pairs.parquet`` beside it, with a line for each pair. Files are replaced in one step.
    """
    opened = open_results(results, "trials/")
    rows = read_rows(opened)
    tables = {"leaderboard.parquet": rank(rows, objective)}
    if (tables["leaderboard.parquet"]["pairs"].fillna("") != "").any():
        tables["pairs.parquet"] = rank(rows, objective, by_pair=True)
    for name, table in tables.items():
        opened.write(name, partial(table.to_parquet, index=False))
    return opened.directory / "leaderboard.parquet"

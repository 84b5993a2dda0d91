"""Whether two candidates differ by more than the noise of their samples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from merge_ray.leaderboard.rows import task_scores

CONFIDENT = 1.96
"""Standard errors that a difference must exceed to be told from noise (95 %, two-sided)."""


def standard_error(row: pd.Series, objective: str) -> float:
    """The standard error of a row's objective, from those of its tasks; NaN for one without sampling noise."""
    scores = {score["task"]: score for score in task_scores(row["tasks"])}
    weights = _weights(scores, objective)
    if not weights:
        return math.nan
    return math.hypot(*(weight * scores[task]["standard_error"] for task, weight in weights.items()))


def within_noise(row: pd.Series, best: pd.Series, objective: str) -> bool | None:
    """Whether ``row`` cannot be told from ``best`` by ``objective``; None where the samples cannot say.

    Both are rows of the ledger. An objective that weighs the tasks' scores (``mean``, ``normalized_mean``,
    ``worst``, ``<metric>/<task>``, ``normalized/<task>``) is tested with paired differences over the samples
    where both rows kept their samples' correctness on the same data, and with the tasks' standard errors
    otherwise. Other objectives (storage, seconds) have no sampling noise.
    """
    scores = [{score["task"]: score for score in task_scores(item["tasks"])} for item in (row, best)]
    if scores[0].keys() != scores[1].keys():
        return None
    paired = row["data_fingerprint"] == best["data_fingerprint"]
    difference, variance = 0.0, 0.0
    weights = [_weights(item, objective) for item in scores]
    for task in scores[0]:
        first, second = scores[0][task], scores[1][task]
        first_weight, second_weight = weights[0].get(task, 0.0), weights[1].get(task, 0.0)
        difference += first_weight * first["value"] - second_weight * second["value"]
        bits = _correctness(first), _correctness(second)
        if paired and bits[0] is not None and bits[1] is not None and bits[0].size == bits[1].size:
            variance += float(np.var(first_weight * bits[0] - second_weight * bits[1])) / bits[0].size
        else:
            errors = first_weight * first["standard_error"], second_weight * second["standard_error"]
            variance += math.hypot(*errors) ** 2
    if not any(weights) or math.isnan(difference + variance):
        return None
    return abs(difference) <= CONFIDENT * math.sqrt(variance)


def _correctness(score: dict[str, Any]) -> np.ndarray | None:
    """The samples' correctness as float64 ``[count]``, or None where it was not kept."""
    if not score["correct"]:
        return None
    bits = np.frombuffer(score["correct"], dtype=np.uint8)
    return np.unpackbits(bits, count=score["count"]).astype(np.float64)


def _weights(scores: dict[str, dict[str, Any]], objective: str) -> dict[str, float]:
    """The weight of every task's score in the objective; empty for an objective that is no sum of scores."""
    relative = {task: 1 / score["reference"] if score["reference"] else math.nan for task, score in scores.items()}
    if objective == "mean":
        return dict.fromkeys(scores, 1 / len(scores))
    if objective == "normalized_mean":
        return {task: weight / len(scores) for task, weight in relative.items()}
    if objective == "worst":
        shares = {task: score["normalized"] for task, score in scores.items() if score["normalized"] is not None}
        if not shares:
            return {}
        worst = min(shares, key=shares.__getitem__)
        return {worst: relative[worst]}
    kind, _, task = objective.partition("/")
    if task not in scores:
        return {}
    if kind == "normalized":
        return {task: relative[task]}
    return {task: 1.0} if kind == scores[task]["metric"] else {}

"""Makes valid rows of the ledger for tests, and writes them as a results directory."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from merge_ray.leaderboard import ROW_SCHEMA

REFERENCE = 0.95
"""The fine-tuned models' score on every task of these rows."""

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def make_scores(accuracies: Mapping[str, float], count: int = 200, seed: int = 0) -> list[dict[str, Any]]:
    """The ``tasks`` of a row; a seed fixes which samples are hard, so rows of one seed are strongly paired."""
    scores = []
    for index, (task, accuracy) in enumerate(sorted(accuracies.items())):
        difficulty = np.random.default_rng([seed, index]).permutation(count)
        correct = difficulty < round(accuracy * count)
        value = float(correct.mean())
        score = {
            "task": task,
            "metric": "accuracy",
            "value": value,
            "count": count,
            "standard_error": float(np.sqrt(value * (1 - value) / count)),
            "reference": REFERENCE,
            "normalized": value / REFERENCE,
            "correct": np.packbits(correct).tobytes(),
        }
        scores.append(score)
    return scores


def make_row(
    method: str,
    accuracies: Mapping[str, float] | None,
    parameters: Mapping[str, Any] | None = None,
    *,
    split: str = "val",
    minute: int = 0,
    count: int = 200,
    **changes: Any,
) -> dict[str, Any]:
    """A row of ``ROW_SCHEMA``; without accuracies it is one that failed. ``changes`` replace any column."""
    canonical = json.dumps(dict(parameters or {}), sort_keys=True)
    scores = make_scores(accuracies or {}, count, seed=split == "test")
    normalized = {score["task"]: score["normalized"] for score in scores}
    worst = min(normalized, key=lambda task: normalized[task]) if scores else None
    mean = float(np.mean([score["value"] for score in scores])) if scores else None
    row: dict[str, Any] = {
        "sweep": "demo",
        "study": method,
        "method": method,
        "parameters": canonical,
        "resolved": canonical,
        "seed": 0,
        "split": split,
        "status": "complete" if scores else "failed",
        "error": None if scores else "Traceback ...\nRuntimeError: out of memory",
        "tasks": scores or None,
        "mean": mean,
        "normalized_mean": None if mean is None else mean / REFERENCE,
        "worst_task": worst,
        "worst": normalized[worst] if worst else None,
        "objective": None if mean is None else mean / REFERENCE,
        "samples": count * len(scores),
        "curve": [] if mean is None else [mean / REFERENCE],
        "seconds_merge": 0.01,
        "seconds_evaluate": 0.2,
        "seconds_total": 0.25,
        "peak_memory_bytes": 50_000_000,
        "storage_bytes": 1_000_000,
        "storage_ratio": 0.25,
        "device": "cpu",
        "host": "node-1",
        "versions": json.dumps({"merge-ray": "0.1.0", "torch": "2.15.0"}),
        "bank_fingerprint": "bank",
        "data_fingerprint": f"data-{split}",
        "transductive": False,
        "artifacts": [],
        "time": START + datetime.timedelta(minutes=minute),
    } | changes
    key = [str(part) for part in (row["sweep"], row["study"], canonical, split, row["seed"])]
    return {"identity": hashlib.sha256("|".join(key).encode()).hexdigest()} | row


def write_rows(directory: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write each row as ``trials/<identity>.parquet``; returns the results directory."""
    (directory / "trials").mkdir(parents=True, exist_ok=True)
    for row in rows:
        table = pa.Table.from_pylist([row], schema=ROW_SCHEMA)
        pq.write_table(table, directory / "trials" / f"{row['identity']}.parquet")
    return directory


def demo_rows(tasks: Iterable[str] = ("digits", "glyphs", "shapes", "textures")) -> list[dict[str, Any]]:
    """A small sweep: both references, task arithmetic (best inside its range), TIES and one failed candidate."""
    names = list(tasks)

    def level(value: float) -> dict[str, float]:
        return {task: value - 0.01 * index for index, task in enumerate(names)}

    rows = []
    for split in ("val", "test"):
        rows.append(make_row("pretrained", level(0.50), split=split, storage_ratio=0.25))
        rows.append(make_row("finetuned", dict.fromkeys(names, 0.95), split=split, storage_ratio=1.0))
    for step, accuracy in enumerate((0.60, 0.70, 0.80, 0.72, 0.55)):
        parameters = {"scaling_coefficient": round(0.1 * (step + 1), 1)}
        rows.append(make_row("task_arithmetic", level(accuracy), parameters, minute=step + 1))
    rows.append(make_row("task_arithmetic", level(0.79), {"scaling_coefficient": 0.3}, split="test", minute=30))
    for step, (density, accuracy) in enumerate(((0.1, 0.74), (0.2, 0.79), (0.3, 0.75))):
        trimmed = {"density": density, "disjoint": "mean", "scaling_coefficient": 1.0}
        rows.append(make_row("ties", level(accuracy), trimmed, minute=10 + step))
    best = {"density": 0.2, "disjoint": "mean", "scaling_coefficient": 1.0}
    rows.append(make_row("ties", level(0.785), best, split="test", minute=31))
    rows.append(make_row("ties", None, {"density": 0.9, "disjoint": "sum", "scaling_coefficient": 1.0}, minute=20))
    return rows

"""Write a merged model of a finished sweep to files that other tools read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from merge_ray.checkpoints import write_huggingface, write_open_clip, write_safetensors
from merge_ray.errors import LedgerError, choose_from
from merge_ray.leaderboard import rank, read_rows
from merge_ray.methods.base import MergeInputs, make_method
from merge_ray.models import load_bank
from merge_ray.progress import Progress
from merge_ray.spec import SweepSpec
from merge_ray.spec_files import check_spec, read_yaml

FORMATS = ("safetensors", "huggingface", "open_clip")


def export_merge(results: Path, study: str | None, output: Path, format: str, progress: Progress) -> list[Path]:
    """Merge again what a sweep found best and write it below ``output``; returns the paths written.

    study: whose confirmed merge; None for the highest-ranked. A method with weights per task gives one model a
    task, named by the task; else there is one, named ``merged``. Raises :class:`LedgerError` for an unknown study
    and :class:`merge_ray.errors.CheckpointError` when the models changed since the sweep.
    """
    if format not in FORMATS:
        raise LedgerError(f"--format {format}: {choose_from(format, FORMATS)}")
    spec = check_spec(SweepSpec, read_yaml(results / "sweep.yaml"), results / "sweep.yaml")
    row = _chosen_row(results, study, spec.evaluation.objective)
    bank, _ = load_bank(spec.models, spec.task_names, progress)
    if bank.fingerprint != row["bank_fingerprint"]:
        raise LedgerError(f"the models of {results / 'sweep.yaml'} have changed since the sweep; nothing was written")
    method = make_method(row["method"], json.loads(row["resolved"]))
    with progress.step("merge"):
        inputs = MergeInputs(bank, seed=int(row["seed"]), needs=method.needs)
        merged = method.merge(inputs)
    metadata: dict[str, str] = {
        "method": row["method"],
        "parameters": row["resolved"],
        "sweep": spec.name,
        "identity": row["identity"],
        "bank_fingerprint": bank.fingerprint,
        "base": spec.models.base,
        "finetuned": json.dumps({task: spec.models.finetuned_location(task) for task in spec.task_names}),
        "versions": row["versions"],
    }
    output.mkdir(parents=True, exist_ok=True)
    family = spec.models.open_family()
    paths = []
    for name, task in (
        {"merged": bank.tasks[0]}.items() if merged.shared else {task: task for task in bank.tasks}.items()
    ):
        merged.write(task, inputs.out)
        state = bank.state_dict(inputs.out)
        if format == "huggingface":
            path = output / name
            write_huggingface(path, *family.export_huggingface(state, family.huggingface_model), family.companions())
        elif format == "open_clip":
            path = output / f"{name}.pt"
            write_open_clip(path, state, metadata)
        else:
            path = output / f"{name}.safetensors"
            write_safetensors(path, state, metadata)
        paths.append(path)
    return paths


def _chosen_row(results: Path, study: str | None, objective: str) -> dict[str, Any]:
    table = rank(read_rows(results), objective)
    merges = table[table["kind"] != "reference"]
    if study is not None:
        if study not in set(merges["study"]):
            raise LedgerError(
                f"{results} has no confirmed merge of study {study!r}; {choose_from(study, merges['study'])}"
            )
        merges = merges[merges["study"] == study]
    if merges.empty:
        raise LedgerError(f"{results} has no confirmed merge yet; run its sweep to the end first")
    row: dict[Any, Any] = merges.iloc[0].to_dict()
    return row

"""Write a merged model of a finished sweep to files that other tools read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from merge_ray.bank import ModelBank
from merge_ray.checkpoints import (
    fingerprint_file,
    read_weights,
    write_huggingface,
    write_open_clip,
    write_safetensors,
)
from merge_ray.errors import LedgerError, choose_from
from merge_ray.families import Family
from merge_ray.leaderboard import rank, read_rows
from merge_ray.methods.base import Merged, MergeInputs, Method, make_method, with_own_tensors
from merge_ray.methods.per_sample import TaskWeights
from merge_ray.models import load_bank, open_task_data
from merge_ray.progress import Progress
from merge_ray.results import Results, open_results
from merge_ray.spec import SweepSpec
from merge_ray.spec_files import check_spec, read_yaml
from merge_ray.tasks import cache_directory, open_task

FORMATS = ("safetensors", "huggingface", "open_clip")


def export_merge(
    location: str | Path,
    study: str | None,
    output: Path,
    format: str,
    progress: Progress,
    pair: str | None = None,
    published: str | None = None,
) -> list[Path]:
    """Merge again what a sweep found best and write it below ``output``; returns the paths written.

    study: whose confirmed merge; None for the highest-ranked. pair: which (``a+b``), in a sweep over pairs, whose
    files go to a folder of that name; None for the highest-ranked. A method with weights per task gives one model a
    task, named by the task; else there is one, named ``merged``. One with weights per sample has no weights to write:
    it gives what makes them, see :func:`_write_by_sample`. Models without a common base are written as whole
    networks, one a task, after batch norm is reset, which needs the sweep's data. published: where ``output`` will be,
    if not where it is written. Raises :class:`LedgerError` for an unknown study or pair, for a format that there is
    not, and when the models changed since the sweep.
    """
    if format not in FORMATS:
        raise LedgerError(f"--format {format}: {choose_from(format, FORMATS)}")
    opened = open_results(location)
    source = opened.directory / "sweep.yaml"
    spec = check_spec(SweepSpec, read_yaml(source), source)
    with spec.s3.applied():
        return _export(spec, opened, study, output, format, progress, pair, published)


def _export(
    spec: SweepSpec,
    opened: Results,
    study: str | None,
    output: Path,
    format: str,
    progress: Progress,
    pair: str | None,
    published: str | None,
) -> list[Path]:
    results = opened.directory
    row = _chosen_row(opened, study, pair, spec.evaluation.objective)
    bank, _ = load_bank(spec.models, spec.task_names, progress)
    if bank.fingerprint != row["bank_fingerprint"]:
        raise LedgerError(f"the models of {opened.location} have changed since the sweep; nothing was written")
    method = make_method(row["method"], json.loads(row["resolved"]))
    metadata: dict[str, str] = {
        "method": row["method"],
        "parameters": row["resolved"],
        "sweep": spec.name,
        "identity": row["identity"],
        "bank_fingerprint": bank.fingerprint,
        "versions": row["versions"],
    }
    if row["pairs"]:
        bank, output = bank.of(row["pairs"].split("+")), output / row["pairs"]
    output.mkdir(parents=True, exist_ok=True)
    if method.by_sample:
        if format != FORMATS[0]:
            raise LedgerError(f"--format {format}: {method.name} makes weights for every sample, so that there is no "
                              "model to write; leave --format out for the mapping and a spec that runs it")  # fmt: skip
        return _write_by_sample(spec, row, method, results, output, published or str(output.resolve()), metadata)
    finetuned = {task: spec.models.finetuned_location(task) for task in bank.tasks}
    metadata |= {"base": spec.models.base or "", "finetuned": json.dumps(finetuned)}
    family = spec.models.open_family()
    with progress.step("merge"):
        resources = _matched(method, family, bank, results, row)
        inputs = MergeInputs(bank, seed=int(row["seed"]), resources=resources, needs=method.needs)
        merged = _saved_weights(method, bank, results, row) or method.merge(inputs)
        merged = with_own_tensors(merged, bank, family.own_tensors)
    paths = []
    one = merged.shared and family.has_base
    for name, task in ({"merged": bank.tasks[0]} if one else {task: task for task in bank.tasks}).items():
        merged.write(task, inputs.out)
        state = bank.state_dict(inputs.out) if family.has_base else _settled(spec, family, bank, inputs.out, task)
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


def _matched(method: Method, family: Family, bank: ModelBank, results: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """For a method that matches channels, their groups and the match that the row keeps: it was found on samples."""
    if "permutation_groups" not in method.needs:
        return {}
    columns: dict[str, np.ndarray] = {}
    for kept in row["artifacts"]:
        with np.load(results / kept) as file:
            found = {name.removeprefix("columns/"): file[name] for name in file.files if name.startswith("columns/")}
        columns |= found
    return {"permutation_groups": family.permutation_groups(family.skeleton(bank, "cpu")), "columns": columns}


def _settled(spec: SweepSpec, family: Family, bank: ModelBank, weights: Tensor, task: str) -> dict[str, Tensor]:
    """The tensors of the network that answers ``task`` with ``weights`` ``[P]``, its batch norm reset."""
    [named] = [item for item in spec.tasks if item.name == task]
    location = spec.models.head_location(task)
    head = family.read_head(open_task(named), read_weights(location)) if location else None
    evaluation = spec.evaluation
    data = open_task_data(family, named, "val", head, evaluation, torch.device("cpu"), cache_directory())
    skeleton = family.skeleton(bank, "cpu")
    skeleton.flat.copy_(weights)
    data.settle(skeleton, evaluation.batch_size, evaluation.calibration_samples)
    return data.state(skeleton)


def _saved_weights(method: Method, bank: ModelBank, results: Path, row: Mapping[str, Any]) -> Merged | None:
    """The merge by every task's coefficients that the row keeps, where it does: they were found on samples."""
    for kept in row["artifacts"]:
        with np.load(results / kept) as file:
            found = {task: file[name] for task in bank.tasks if (name := f"coefficients/{task}") in file.files}
        if len(found) == len(bank.tasks):
            return TaskWeights(method, bank, {task: torch.from_numpy(array) for task, array in found.items()})
    return None


def _write_by_sample(
    spec: SweepSpec,
    row: Mapping[str, Any],
    method: Method,
    results: Path,
    output: Path,
    place: str,
    metadata: Mapping[str, str],
) -> list[Path]:
    """Write what makes the weights of every sample beside the models.

    ``merge.json`` says how they are made and from which models (location and SHA-256), ``mapping.npz`` is what was
    learned, where something was, and ``sweep.yaml`` a spec that answers samples with them: it needs the models in
    their places, the mapping in ``place``, and learns nothing.
    """
    parameters = method.parameters()
    paths = []
    for kept in row["artifacts"]:
        paths.append(output / "mapping.npz")
        shutil.copyfile(results / kept, paths[0])
        parameters |= {"mapping": f"{place}/{paths[0].name}", "steps": 0}
    locations = ({"base": spec.models.base} if spec.models.base else {}) | {
        f"finetuned/{task}": spec.models.finetuned_location(task) for task in spec.task_names
    }
    sources = {name: {"location": place, "sha256": fingerprint_file(place)} for name, place in locations.items()}
    about = {**metadata, "parameters": parameters, "sources": sources}
    study = {"method": method.name, "parameters": parameters, "searcher": "grid", "space": {}}
    raw = json.loads(spec.model_dump_json()) | {
        "name": f"{spec.name}-{row['study']}",
        "studies": {row["study"]: study},
    }
    texts = {"merge.json": json.dumps(about, indent=2) + "\n", "sweep.yaml": yaml.safe_dump(raw, sort_keys=False)}
    for name, text in texts.items():
        paths.append(output / name)
        paths[-1].write_text(text, encoding="utf-8")
    return paths


def _chosen_row(results: Results, study: str | None, pair: str | None, objective: str) -> dict[str, Any]:
    table = rank(read_rows(results), objective, by_pair=True)
    merges = table[table["kind"] != "reference"]
    if study is not None:
        if study not in set(merges["study"]):
            raise LedgerError(
                f"{results.location} has no confirmed merge of study {study!r}; {choose_from(study, merges['study'])}"
            )
        merges = merges[merges["study"] == study]
    if pair is not None:
        wanted, there = "+".join(sorted(pair.split("+"))), sorted(set(merges["pairs"]) - {""})
        merges = merges[merges["pairs"] == wanted]
        if merges.empty:
            raise LedgerError(
                f"{results.location} has no confirmed merge of the pair {pair!r}; {choose_from(wanted, there)}"
            )
    if merges.empty:
        raise LedgerError(f"{results.location} has no confirmed merge yet; run its sweep to the end first")
    row: dict[Any, Any] = merges.iloc[0].to_dict()
    return row

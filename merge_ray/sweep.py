"""run_sweep: the path of a sweep, from a spec to a confirmed leaderboard."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise, product
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import yaml

from merge_ray.bank import ModelBank
from merge_ray.candidate import Candidate, Fingerprints, fingerprint_of, ledger_row
from merge_ray.checkpoints import fingerprint_file
from merge_ray.cluster.errors import cause
from merge_ray.cluster.interrupt import interruption
from merge_ray.cluster.learning import learn_all
from merge_ray.cluster.ledger import compact, forget_learned, keep, record, share, start_results_actor
from merge_ray.cluster.machines import plan_sweep
from merge_ray.cluster.nodes import versions
from merge_ray.cluster.plan import Plan
from merge_ray.cluster.pool import HostPool
from merge_ray.cluster.session import ray_session
from merge_ray.cluster.setup import HostSetup
from merge_ray.cluster.tuning import run_studies
from merge_ray.errors import DataError, LedgerError
from merge_ray.evaluate import References
from merge_ray.families.base import ORDER_SEED
from merge_ray.leaderboard import best_candidates, read_rows, write_leaderboard
from merge_ray.methods.base import find_method, make_method
from merge_ray.models import load_bank, make_heads
from merge_ray.progress import Progress
from merge_ray.relatedness.nearest import read_distances
from merge_ray.report import write_report
from merge_ray.results import Results, own_results
from merge_ray.spec import EvaluationSpec, SweepSpec
from merge_ray.study import Study
from merge_ray.tasks import cache_directory, open_task, overlap

Rows = dict[str, dict[str, Any]]


def run_sweep(spec: SweepSpec, progress: Progress, retry_failed: bool = False) -> Path:
    """Search every study of ``spec`` and confirm the best on the test split; returns the results directory (its copy
    here, if it lies on S3).

    The ledger in that directory answers for all that it already holds, so the same call after any
    interruption does only what is missing. ``retry_failed`` scores candidates again whose rows say ``failed``.

    Raises :class:`merge_ray.errors.MergeRayError` for anything wrong with models, data or the directory,
    before Ray starts where that can be known, and for models that do not fit the cluster's memory, before any host
    loads them; :class:`merge_ray.errors.SweepInterrupted` after a Ctrl-C in the search.
    """
    with spec.s3.applied(), own_results(spec.location, progress) as results:
        bank, base = load_bank(spec.models, spec.task_names, progress)
        data, heads = _prepare_data(spec, base, progress)
        fingerprints = _fingerprints(spec, bank, data, heads)
        rows = _open_ledger(spec, results, fingerprints, retry_failed)
        with ray_session(progress, sum(array.nbytes for array in bank.arrays().values())):
            plan = plan_sweep(spec, bank, ("finetuned", *_lower_references(spec)))
            progress.line(plan.text)
            with _start_actors(spec, results, bank, plan, data, heads, progress) as (pool, ledger):
                sweep = _Sweep(spec, fingerprints, pool, ledger, rows, progress)
                references = sweep.score_references()
                sweep.search(references)
                sweep.confirm(references)
        with progress.step("leaderboard and report"):
            write_leaderboard(results, spec.evaluation.objective)
            write_report(results)
    return results.directory


class _Sweep:
    """What the studies of one running sweep share."""

    def __init__(
        self, spec: SweepSpec, fingerprints: Fingerprints, pool: HostPool, ledger: Any, rows: Rows, progress: Progress
    ) -> None:
        self.spec, self.fingerprints, self.pool = spec, fingerprints, pool
        self.ledger, self.rows, self.progress = ledger, rows, progress
        self.warned: set[str] = set()

    def score_references(self) -> dict[str, References]:
        """Score the base and every fine-tuned model once on both splits.

        Without a base, the average label and the models as published, before batch norm is reset, take its place.

        Returns the fine-tuned models' scores by split, by which normalised scores divide.
        """
        splits = ("val", "test")
        with self.progress.step("score the base and the fine-tuned models"):
            finetuned = [self._candidate("finetuned", "finetuned", split) for split in splits]
            self._score(finetuned, None)
            references = {split: self._scores(row) for split, row in zip(splits, finetuned, strict=True)}
            lower = _lower_references(self.spec)
            others = [self._candidate(name, name, split, lower[name]) for name, split in product(lower, splits)]
            self._score(others, references)
        return references

    def search(self, references: Mapping[str, References]) -> None:
        """Run the studies through Ray Tune, as far as the ledger does not answer for them.

        Ctrl-C ends it after the trials that hosts have: :class:`SweepInterrupted`.
        """
        studies: list[Study] = []
        evaluation, distance = self.spec.evaluation, 2 * self.pool.size
        # Pair by pair, for its candidates share what the hosts find out about its models.
        for pair, (name, whole) in product(self.spec.task_pairs, self.spec.studies.items()):
            spec = whole.model_copy(update={"parameters": _of_pair(whole.parameters, pair)})
            template = self._candidate(name, spec.method, "val", spec.parameters, pair)
            reports = evaluation.shards + (evaluation.learning_reports if template.make().steps_to_learn else 0)
            earlier = [item for item in studies if (item.spec.method, item.template.pair) == (spec.method, pair)]
            tasks = pair or self.spec.task_names
            studies.append(Study(spec, template, tasks, reports, self.rows, distance, earlier))
        pairs = len(self.spec.task_pairs)
        totals = {name: spec.trials and spec.trials * pairs for name, spec in self.spec.studies.items()}
        with self.progress.bars(totals) as update, interruption(self.progress.line) as ending:
            show = partial(_show_studies, studies, update)
            place = self.spec.directory
            run_studies(studies, self.pool, self.ledger, references["val"], evaluation, place, show, ending)
        self._share_rows(studies)

    def _share_rows(self, studies: Sequence[Study]) -> None:
        """Give every study a row of each of its candidates, also of those that another study has scored."""
        rows = read_rows(self.spec.directory)
        owned = set(zip(rows["study"], rows["identity"], strict=True))
        for study in studies:
            for candidate in {item.identity: item for item in study.candidates}.values():
                if (study.spec.name, candidate.identity) not in owned:
                    share(self.ledger, candidate, study.spec.name)

    def confirm(self, references: Mapping[str, References]) -> None:
        """Score the best candidate of every study on the test split, and keep its artifacts."""
        best: list[Any] = best_candidates(read_rows(self.spec.directory)).to_dict("records")
        with self.progress.step("confirm the best of every study on the test split"):
            best.sort(key=lambda row: row["pair"])
            self._score([self._to_confirm(row) for row in best], references, keep_artifacts=True)
        forget_learned(self.ledger)
        compact(self.ledger)

    def _to_confirm(self, row: Mapping[str, Any]) -> Candidate:
        """A candidate's merge on the test split, with the choices that it made on validation data.

        What a method learned from unlabelled inputs is not among these: it is given beside (:meth:`_learn`), or
        learned anew from those of the test split where the spec allows that.
        """
        looks = "unlabeled" in find_method(row["method"]).needs
        parameters = json.loads(row["parameters" if looks else "resolved"])
        return self._candidate(row["study"], row["method"], "test", parameters, row["pair"])

    def _learn(self, candidate: Candidate, host: Any) -> ray.ObjectRef | None:
        """What a candidate learns on the host, as far as that is not saved from its search; None if it does not."""
        steps = candidate.make().steps_to_learn
        return learn_all.remote(host, self.ledger, self._learner(candidate), steps) if steps else None

    def _learner(self, candidate: Candidate) -> Candidate:
        """The candidate on the split that it learns on."""
        return candidate if self.spec.evaluation.transductive else candidate.on("val")

    def _score(
        self,
        candidates: Sequence[Candidate],
        references: Mapping[str, References] | None,
        keep_artifacts: bool = False,
    ) -> None:
        """Score and record the candidates that the ledger does not hold."""
        missing = list({item.identity: item for item in candidates if item.identity not in self.rows}.values())
        for candidate, report, artifacts in self.pool.score_all(missing, references, self._learn, keep_artifacts):
            if isinstance(report, Exception):
                row = ledger_row(candidate, "failed", error=cause(report))
            else:
                for note in sorted(set(report["notes"]) - self.warned):
                    self.warned.add(note)
                    self.progress.warn(f"{candidate.search}: {note}")
                seconds = report["seconds_merge"] + report["seconds_evaluate"]
                row = ledger_row(candidate, "complete", **report, seconds_total=seconds, curve=[report["objective"]])
                if artifacts:
                    row["artifacts"] = [keep(self.ledger, candidate, artifacts, self._learner(candidate))]
            record(self.ledger, row)
            self.rows[candidate.identity] = row

    def _scores(self, candidate: Candidate) -> References:
        """The reference scores from the fine-tuned models' row."""
        row = self.rows[candidate.identity]
        if row["status"] == "failed":
            raise DataError(f"the fine-tuned models cannot be scored on {candidate.split}: {row['error']}")
        if zeros := [score["task"] for score in row["tasks"] if score["value"] == 0]:
            raise DataError(f"the fine-tuned models of {zeros} score 0 on {candidate.split}: do head and labels fit?")
        return {score["task"]: _domains(score) for score in row["tasks"]}

    def _candidate(
        self,
        study: str,
        method: str,
        split: str,
        parameters: Mapping[str, Any] | None = None,
        pair: tuple[str, ...] = (),
    ) -> Candidate:
        made = make_method(method, parameters or {})
        return Candidate.of(self.spec.name, study, made, self.spec.seed, split, self.fingerprints, pair)


def _lower_references(spec: SweepSpec) -> dict[str, dict[str, Any]]:
    """The methods that every merge should beat, with their parameters."""
    if spec.models.base:
        return {"pretrained": {}}
    return {"pretrained": {}, "average_label": {"released": spec.evaluation.released_average}}


def _domains(score: Mapping[str, Any]) -> dict[str, float]:
    """The scores by domain of a row's task; without a name where there is one domain only, which rows leave out."""
    domains = score.get("domains")
    if domains is None or not len(domains):
        return {"": score["value"]}
    return {part["domain"]: part["value"] for part in domains}


def _of_pair(parameters: Mapping[str, Any], pair: tuple[str, ...]) -> dict[str, Any]:
    """A study's fixed parameters, those with a value per task cut to the pair's."""
    if not pair:
        return dict(parameters)
    return {
        name: {task: value[task] for task in pair} if isinstance(value, Mapping) else value
        for name, value in parameters.items()
    }


def _show_studies(studies: Sequence[Study], update: Callable[..., None]) -> None:
    """One bar for each study of the spec, over its pairs."""
    for name in {study.spec.name: None for study in studies}:
        parts = [study for study in studies if study.spec.name == name]
        best = [part.best_value for part in parts if part.best_value is not None]
        done, finished = sum(len(part.outcomes) for part in parts), all(part.finished for part in parts)
        trials = parts[0].spec.trials
        note = f"best {np.mean(best):.4f}" if best else ""
        update(name, done, done if finished else trials and trials * len(parts), note, finished)


def _prepare_data(
    spec: SweepSpec, base: Mapping[str, torch.Tensor], progress: Progress
) -> tuple[dict[str, dict[str, str]], dict[str, np.ndarray]]:
    """Prepare every split once in the cache and make the heads.

    Returns the splits' fingerprints ``{split: {task: fingerprint}}`` and the heads.
    """
    tasks = [open_task(task) for task in spec.tasks]
    heads = make_heads(spec.models, tasks, base, progress)
    family = spec.models.open_family()
    fingerprints: dict[str, dict[str, str]] = {"val": {}, "test": {}}
    for task in tasks:
        cached = {}
        # Training images are for batch norm, or else for overlap, of which built-in tasks have none by their making.
        wanted = not family.has_base or ("train" in task.splits and task.spec.builtin is None)
        trained_on = ("train",) if wanted else ()
        for split in (*trained_on, "val", "test"):
            prepare = family.open_images if split == "train" else family.open_split
            with progress.counted(f"prepare {task.name} {split}") as update:
                cached[split] = prepare(task, split, cache_directory(), update)
        for split in fingerprints:
            fingerprints[split][task.name] = cached[split].fingerprint
            if not family.has_base:
                fingerprints[split][f"{task.name}/train"] = cached["train"].fingerprint
        for first, second in (("train", "test"), ("val", "test"), ("train", "val")):
            if first in cached and (shared := overlap(cached[first], cached[second])):
                progress.warn(f"{task.name}: {shared} samples of {second} are in {first}, too; its scores may flatter")
    return fingerprints, heads


def _fingerprints(
    spec: SweepSpec, bank: ModelBank, data: Mapping[str, Mapping[str, str]], heads: Mapping[str, np.ndarray]
) -> Fingerprints:
    head_parts = {
        task: [list(head.shape), hashlib.sha256(head.astype("<f4").tobytes()).hexdigest()]
        for task, head in heads.items()
    }
    hashed_heads = fingerprint_of(head_parts)
    # Settings that came later are left out at their defaults, so that ledgers from before stay valid.
    later, usual = ("transductive", "learning_reports", "calibration_samples", "released_average"), EvaluationSpec()
    left_out = {name for name in later if getattr(spec.evaluation, name) == getattr(usual, name)}
    left_out |= {"batch_size", "trial_seconds"}
    protocol = {"order": ORDER_SEED, "heads": hashed_heads, **spec.evaluation.model_dump(exclude=left_out)}
    files = set().union(*(study.named_files() for study in spec.studies.values()))
    return Fingerprints(
        bank.fingerprint,
        {split: fingerprint_of(parts) for split, parts in data.items()},
        fingerprint_of(protocol),
        {location: fingerprint_file(location) for location in sorted(files)},
    )


def _open_ledger(spec: SweepSpec, results: Results, fingerprints: Fingerprints, retry_failed: bool) -> Rows:
    """The rows that this sweep already has; raises :class:`LedgerError` if they belong to another sweep."""
    directory = results.directory
    identity = {"bank": fingerprints.bank, "data": dict(fingerprints.data), "protocol": fingerprints.protocol}
    described = directory / "sweep.json"
    if described.exists():
        before = json.loads(described.read_text())
        if changed := [part for part in identity if before.get(part) != identity[part]]:
            words = {"bank": "models", "data": "data", "protocol": "heads or sampling"}
            raise LedgerError(
                f"{results.location} holds a sweep over other {' and '.join(words[part] for part in changed)}; "
                "choose another name, or move that directory away"
            )
    if spec.models.relatedness is not None:
        distances = read_distances(spec.models.relatedness, spec.task_names)
        results.write("relatedness.parquet", distances.to_parquet)
    as_run = yaml.safe_dump(json.loads(spec.model_dump_json()), sort_keys=False)
    for name, text in {"sweep.json": json.dumps(identity, indent=2), "sweep.yaml": as_run}.items():
        results.write(name, methodcaller("write", text.encode()))
    rows = _rows_by_identity(directory)
    return {identity: row for identity, row in rows.items() if not (retry_failed and row["status"] == "failed")}


def _rows_by_identity(directory: Path) -> Rows:
    if not any((directory / "trials").glob("*.parquet")):
        return {}
    records: list[Any] = read_rows(directory).to_dict("records")
    # What is complete answers for what was cut short elsewhere, whichever the clock says was later.
    records.sort(key=lambda row: ("failed", "pruned", "complete").index(row["status"]))
    return {row["identity"]: row for row in records}


@contextmanager
def _start_actors(
    spec: SweepSpec,
    results: Results,
    bank: ModelBank,
    plan: Plan,
    data: Mapping[str, Mapping[str, str]],
    heads: Mapping[str, np.ndarray],
    progress: Progress,
) -> Iterator[tuple[HostPool, Any]]:
    """The hosts with the models loaded, and the ledger's writer; both end with the sweep."""
    family = spec.models.open_family()
    extras = family.tower(bank.extras)
    splits = {split: {task: parts[task] for task in spec.task_names} for split, parts in data.items()}
    if not family.has_base:
        splits["train"] = {task: data["val"][f"{task}/train"] for task in spec.task_names}
    setup = HostSetup(
        models=spec.models,
        tasks=tuple(spec.tasks),
        evaluation=spec.evaluation,
        layout=bank.layout,
        bank_tasks=bank.tasks,
        fingerprint=bank.fingerprint,
        heads=heads,
        data=splits,
        files=_files_of(spec),
        versions=versions(),
        driver=ray.get_runtime_context().get_node_id(),
        directory=Path.cwd(),
        cache=cache_directory().absolute(),
        s3=spec.s3,
        kept=spec.directory.resolve() / "learning",
        ends=plan.ends(bank.layout.size),
    )
    # Names are for the dashboard; the time keeps two sweeps of one driver apart.
    name = f"{spec.name}@{time.strftime('%H:%M:%S')}"
    slices = [bank.arrays(slice(start, stop)) for start, stop in pairwise(setup.ends)]
    shared_extras = {name: tensor.numpy() for name, tensor in extras.items()}
    pool = HostPool.start(name, spec.hosts, setup, slices, shared_extras, progress.warn)
    ledger = start_results_actor(results, f"{name}/results", spec.s3.environment())
    try:
        with progress.step("load the models into the hosts"):
            pool.wait_until_ready()
        yield pool, ledger
    finally:
        pool.close()
        ray.kill(ledger)


def _files_of(spec: SweepSpec) -> tuple[str, ...]:
    """What hosts read besides the tasks' data: the architecture and what parameters name, where that is a file."""
    parameters = [value for study in spec.studies.values() for value in study.parameters.values()]
    names = {value for value in (spec.models.architecture, *parameters) if isinstance(value, str)}
    return tuple(sorted(name for name in names if Path(name).expanduser().exists()))

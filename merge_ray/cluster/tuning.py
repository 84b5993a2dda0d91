"""The studies of a sweep under Ray Tune: their candidates become trials on the pool's hosts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.callback import Callback
from ray.tune.experiment import Trial
from ray.tune.logger import TBXLoggerCallback
from ray.tune.search import Searcher

from merge_ray.candidate import Candidate, ledger_row
from merge_ray.cluster.ledger import record
from merge_ray.cluster.pool import MOST_LOSSES, Host, HostPool
from merge_ray.cluster.trial import MergeTrainable
from merge_ray.errors import LedgerError, MergeRayError
from merge_ray.evaluate import References
from merge_ray.search import Outcome
from merge_ray.spec import EvaluationSpec
from merge_ray.study import Study, outcome_of

MOST_TRIALS = 10_000
"""More than a cluster has hosts: what limits the trials is that each leases one."""


class SweepSearcher(Searcher):
    """Hands the studies' candidates to Tune, the first study's first; a host that it leaves idle takes the next's.

    All studies share one Tune run: starting Tune's processes anew for each would cost seconds a study, and hosts
    would wait for every study's last trial. A candidate whose host is lost is handed out again. ``failure`` is why no
    more trials are started, if so.
    """

    def __init__(self, studies: Sequence[Study], pool: HostPool) -> None:
        super().__init__(metric="objective", mode="max")
        self.studies, self.pool = studies, pool
        self.trials: dict[str, tuple[Study, Candidate, Host]] = {}
        self.again: list[tuple[Study, Candidate]] = []
        self.losses: Counter[str] = Counter()
        self.failure: MergeRayError | None = None

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # Ray's FINISHED is text
        """A trial's configuration; None while no host is free or every study waits for outcomes."""
        try:
            host = self.pool.lease()
        except MergeRayError as error:
            self.stop(error)
            host = None
        if host is not None:
            if (next_one := self._next()) is not None:
                return self._configuration(trial_id, *next_one, host)
            self.pool.release(host)
        # While trials run, one may yet be lost and handed out again.
        ended = not self.trials and not self.again and all(study.exhausted for study in self.studies)
        return Searcher.FINISHED if ended else None

    def _next(self) -> tuple[Study, Candidate] | None:
        if self.again:
            return self.again.pop(0)
        for study in self.studies:
            if not study.exhausted and (candidate := study.propose()) is not None:
                return study, candidate
        return None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Take a trial's outcome, and its host back."""
        study, candidate, host = self.trials.pop(trial_id)
        result = result or {}
        if result.get("status") == "lost":
            self.losses[candidate.identity] += 1
            self.again.append((study, candidate))
        else:
            failed = error or not result
            study.outcomes[candidate.identity] = Outcome(None) if failed else outcome_of(result)
        try:
            self.pool.release(host, bool(result.get("host_ended")))
        except MergeRayError as left:
            self.stop(left)

    def stop(self, failure: MergeRayError) -> None:
        """Start no more trials."""
        self.failure = failure
        self.again.clear()
        for study in self.studies:
            study.exhausted = True

    def save(self, checkpoint_path: str) -> None:
        """Nothing is kept: the ledger is the state. Tune expects a file."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore; see :meth:`save`."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles what it is given to files of its own, which nothing here reads."""
        return {}

    def _configuration(self, trial_id: str, study: Study, candidate: Candidate, host: Host) -> dict[str, Any]:
        self.trials[trial_id] = (study, candidate, host)
        return {
            "search": candidate.search,
            "parameters": dict(candidate.parameters),
            "steps": candidate.make().steps_to_learn,
            "host": host.name,
            "last": self.losses[candidate.identity] + 1 >= MOST_LOSSES,
            # Tune wants text keys.
            "cutoffs": {str(reports): value for reports, value in study.cutoffs().items()},
        }


class _TrialCallback(Callback):
    """Reports ended trials to the progress display, and records those whose process Tune gave up on."""

    def __init__(self, searcher: SweepSearcher, ledger: Any, progress: Callable[[], None]) -> None:
        self.searcher, self.ledger, self.progress = searcher, ledger, progress

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if trial.last_result.get("status") == "unrecorded":
            self.searcher.stop(LedgerError(trial.last_result["error"]))
        self.progress()

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        # The trial's get_error() is still None here, but the file is written.
        text = Path(trial.error_file).read_text().strip() if trial.error_file else "the trial's process ended"
        templates = {study.template.search: study.template for study in self.searcher.studies}
        row = ledger_row(_candidate(templates, trial), "failed", error=text.splitlines()[-1])
        try:
            record(self.ledger, row)
        except LedgerError as error:
            self.searcher.stop(error)
        self.progress()


def run_studies(
    studies: Sequence[Study],
    pool: HostPool,
    ledger: Any,
    references: References,
    evaluation: EvaluationSpec,
    directory: Path,
    progress: Callable[[], None],
) -> None:
    """Search every study to the end of its budget; the studies hold their candidates and outcomes afterwards.

    directory: the sweep's results; Tune's own files, TensorBoard's among them, go to its ``tune`` folder.
    Raises :class:`MergeRayError` when rows can no longer be written, or no host is left.
    """
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the ledger is the log; TensorBoard's is asked for
    templates = {study.template.search: study.template for study in studies}
    trainable = tune.with_parameters(
        MergeTrainable,
        templates=templates,
        ledger=ledger,
        references=dict(references),
        shards=evaluation.shards,
        learning_reports=evaluation.learning_reports,
        seconds=evaluation.trial_seconds,
    )
    searcher = SweepSearcher(studies, pool)
    tuner = tune.Tuner(
        # The hosts own the cores and devices; their trials only wait for them, on the head. Every trial asks for the
        # same, so that any of Tune's processes can take it.
        tune.with_resources(trainable, tune.PlacementGroupFactory([{"node:__internal_head__": 0.0001}])),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=-1,
            max_concurrent_trials=MOST_TRIALS,
            reuse_actors=True,
            trial_name_creator=lambda trial: _candidate(templates, trial).label,
            trial_dirname_creator=lambda trial: f"{trial.config['search']}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(directory.resolve()),
            callbacks=[_TrialCallback(searcher, ledger, progress), TBXLoggerCallback()],
            verbose=0,
            # One for each time that the trial's process is killed; a candidate that kills it must end, too.
            failure_config=tune.FailureConfig(max_failures=4),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    progress()
    tuner.fit()
    if searcher.failure is not None:
        raise searcher.failure


def _candidate(templates: Mapping[str, Candidate], trial: Trial) -> Candidate:
    return replace(templates[trial.config["search"]], parameters=trial.config["parameters"])

"""The studies of a sweep under Ray Tune: their candidates become trials on the pool's hosts."""

from __future__ import annotations

import math
import os
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
from merge_ray.cluster.pool import HostPool
from merge_ray.cluster.trial import MergeTrainable
from merge_ray.errors import LedgerError
from merge_ray.evaluate import References
from merge_ray.search import Outcome
from merge_ray.spec import EvaluationSpec
from merge_ray.study import Study, outcome_of

TRIALS_PER_HOST = 2


class SweepSearcher(Searcher):
    """Hands the studies' candidates to Tune, the first study's first; a host that it leaves idle takes the next's.

    All studies share one Tune run: starting Tune's processes anew for each would cost seconds a study, and hosts
    would wait for every study's last trial. Every host has one candidate that runs and one that waits for it, or Tune
    would end the host's trial process between two trials.
    """

    def __init__(self, studies: Sequence[Study], pool: HostPool) -> None:
        super().__init__(metric="objective", mode="max")
        self.studies, self.pool = studies, pool
        self.trials: dict[str, tuple[Study, str, int]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # Ray's FINISHED is text
        """A trial's configuration; None while every host has enough to do or every study waits for outcomes."""
        host = self.pool.lease(TRIALS_PER_HOST)
        if host is None:
            return None
        for study in self.studies:
            if not study.exhausted and (candidate := study.propose()) is not None:
                return self._configuration(trial_id, study, candidate, host)
        self.pool.release(host)
        return Searcher.FINISHED if all(study.exhausted for study in self.studies) else None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Take a trial's outcome, and its host back."""
        study, identity, host = self.trials.pop(trial_id)
        self.pool.release(host)
        study.outcomes[identity] = Outcome(None) if error or not result else outcome_of(result)

    def save(self, checkpoint_path: str) -> None:
        """Nothing is kept: the ledger is the state. Tune expects a file."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore; see :meth:`save`."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles what it is given to files of its own, which nothing here reads."""
        return {}

    def _configuration(self, trial_id: str, study: Study, candidate: Candidate, host: int) -> dict[str, Any]:
        self.trials[trial_id] = (study, candidate.identity, host)
        return {
            "search": candidate.search,
            "parameters": dict(candidate.parameters),
            "steps": candidate.make().steps_to_learn,
            "host": host,
            # Tune wants text keys.
            "cutoffs": {str(reports): value for reports, value in study.cutoffs().items()},
        }


class _TrialCallback(Callback):
    """Reports ended trials to the progress display, and records those whose process Tune gave up on."""

    def __init__(self, studies: Sequence[Study], ledger: Any, progress: Callable[[], None]) -> None:
        self.studies, self.ledger, self.progress = studies, ledger, progress
        self.failure: LedgerError | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if trial.last_result.get("status") == "unrecorded":
            self._stop(LedgerError(trial.last_result["error"]))
        self.progress()

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        # The trial's get_error() is still None here, but the file is written.
        text = Path(trial.error_file).read_text().strip() if trial.error_file else "the trial's process ended"
        templates = {study.template.search: study.template for study in self.studies}
        row = ledger_row(_candidate(templates, trial), "failed", error=text.splitlines()[-1])
        try:
            record(self.ledger, row)
        except LedgerError as error:
            self._stop(error)
        self.progress()

    def _stop(self, failure: LedgerError) -> None:
        """Start no more trials: their rows could not be written."""
        self.failure = failure
        for study in self.studies:
            study.exhausted = True


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
    Raises :class:`merge_ray.errors.LedgerError` when rows can no longer be written.
    """
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the ledger is the log; TensorBoard's is asked for
    templates = {study.template.search: study.template for study in studies}
    trainable = tune.with_parameters(
        MergeTrainable,
        templates=templates,
        hosts=pool.hosts,
        ledger=ledger,
        references=dict(references),
        shards=evaluation.shards,
        learning_reports=evaluation.learning_reports,
    )
    callback = _TrialCallback(studies, ledger, progress)
    tuner = tune.Tuner(
        tune.with_resources(trainable, lambda config: _trial_resources(config["host"], len(pool.hosts))),
        tune_config=tune.TuneConfig(
            search_alg=SweepSearcher(studies, pool),
            num_samples=-1,
            max_concurrent_trials=TRIALS_PER_HOST * len(pool.hosts),
            reuse_actors=True,
            trial_name_creator=lambda trial: _candidate(templates, trial).label,
            trial_dirname_creator=lambda trial: f"{trial.config['search']}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(directory.resolve()),
            callbacks=[callback, TBXLoggerCallback()],
            verbose=0,
            # One for each time that the trial's process is killed; a candidate that kills it must end, too.
            failure_config=tune.FailureConfig(max_failures=4),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    progress()
    tuner.fit()
    if callback.failure is not None:
        raise callback.failure


def _trial_resources(host: int, hosts: int) -> tune.PlacementGroupFactory:
    """What the trials of a host ask for: with it, Tune keeps one process a host, and reuses it for that host alone.

    The hosts own the cores and devices; their trials only wait for them, beside the driver. Every node bears a
    resource 1 of its own, and the head's is shared out so that no more processes than hosts can start (Ray takes four
    decimals). Tune reuses a process for an equal request, hence a request of as many bytes as the host's number.
    """
    share = math.floor(10_000 / hosts) / 10_000
    return tune.PlacementGroupFactory([{"node:__internal_head__": share, "memory": 1 + host}])


def _candidate(templates: Mapping[str, Candidate], trial: Trial) -> Candidate:
    return replace(templates[trial.config["search"]], parameters=trial.config["parameters"])

"""The studies of a sweep under Ray Tune: their candidates become trials on the pool's hosts."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ray import tune
from ray.tune.callback import Callback
from ray.tune.experiment import Trial
from ray.tune.logger import TBXLoggerCallback
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from merge_ray.candidate import Candidate
from merge_ray.cluster.pool import MOST_LOSSES, Host, HostPool
from merge_ray.cluster.trial import MergeTrainable
from merge_ray.errors import LedgerError, MergeRayError, SweepInterrupted
from merge_ray.evaluate import References
from merge_ray.leaderboard import read_rows
from merge_ray.search import Outcome
from merge_ray.spec import EvaluationSpec
from merge_ray.study import Study, outcome_of

TUNE_SETTINGS = {
    # The ledger is the log; TensorBoard's is asked for.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The ledger is the state: that of all trials, written again and again, grows without bound.
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",
    # Where hosts are many, a trial's reports come together: each on its own is a call.
    "TUNE_RESULT_BUFFER_LENGTH": "100",
}
MOST_TRIALS = 10_000
"""More than a cluster has hosts: what limits the trials is that each leases one."""
MOST_ENDED = 10
"""Trials whose processes may end one after the other, with none that is done between them."""


class SweepSearcher(Searcher):
    """Hands the studies' candidates to Tune, the first study's first; a host that it leaves idle takes the next's.

    All studies share one Tune run: starting Tune's processes anew for each would cost seconds a study, and hosts
    would wait for every study's last trial. A candidate whose host is lost is handed out again.

    A trial whose process ended is no fault of its candidate, which hosts merge and score: the candidate gets another
    trial, unless its row had been recorded before. Tune's own retries are not used: they count a process that ends
    between two trials twice, and then give the second up.

    ending: once set, no more trials are started; ``failure`` is why, if it is one.
    """

    def __init__(self, studies: Sequence[Study], pool: HostPool, directory: Path, ending: threading.Event) -> None:
        super().__init__(metric="objective", mode="max")
        self.studies, self.pool, self.directory, self.ending = studies, pool, directory, ending
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
            if (proposed := self._propose()) is not None:
                return self._configuration(trial_id, *proposed, host)
            self.pool.release(host)
        # A trial that is under way may have to be run again.
        done = self.ending.is_set() or (not self.again and all(study.exhausted for study in self.studies))
        return Searcher.FINISHED if done and not self.trials else None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Take a trial's outcome, and its host back."""
        study, candidate, host = self.trials.pop(trial_id)
        result = {} if error or not result else result
        lost = result.get("status") == "lost"
        self.losses[candidate.identity] += lost
        if lost:
            outcome = None
        elif result:
            outcome = outcome_of(result)
        else:
            outcome = self._recorded(study, candidate)
        if outcome is None:
            self.again.append((study, candidate))
        else:
            study.outcomes[candidate.identity] = outcome
        try:
            # A trial whose process ended may have left calls behind, which the host answers first.
            self.pool.release(host, bool(result.get("host_ended", True)))
        except MergeRayError as left:
            self.stop(left)

    def stop(self, failure: MergeRayError) -> None:
        """Start no more trials: they would end alike."""
        self.failure = failure
        self.ending.set()

    def save(self, checkpoint_path: str) -> None:
        """Nothing is kept: the ledger is the state. Tune expects a file."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore; see :meth:`save`."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles what it is given to files of its own, which nothing here reads."""
        return {}

    def _propose(self) -> tuple[Study, Candidate] | None:
        if self.ending.is_set():
            return None
        if self.again:
            return self.again.pop(0)
        for study in self.studies:
            if not study.exhausted and (candidate := study.propose()) is not None:
                return study, candidate
        return None

    def _recorded(self, study: Study, candidate: Candidate) -> Outcome | None:
        """The outcome that a trial recorded before its process ended."""
        rows = read_rows(self.directory)
        # A failure may be an earlier run's, which this one was told to try again.
        own = rows[(rows["identity"] == candidate.identity) & (rows["status"] != "failed")]
        outcomes = map(outcome_of, cast(list[dict[str, Any]], own.to_dict("records")))
        return next(filter(study.accepts, outcomes), None)

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


class _NewestFirst(FIFOScheduler):
    """Hands the process of a trial that ended to the newest one, which has none yet.

    Tune's own order hands it to the oldest that waits for its process to start, gives that process up, and starts
    another for the newest: trials that are shorter than the start of a process then start processes without end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Trial] = []

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        self.waiting.append(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        while self.waiting and self.waiting[-1].status != Trial.PENDING:
            self.waiting.pop()
        return self.waiting[-1] if self.waiting else None


class _TrialCallback(Callback):
    """Reports ended trials to the progress display, and ends the search where trials cannot do their work."""

    def __init__(self, searcher: SweepSearcher, progress: Callable[[], None]) -> None:
        self.searcher, self.progress = searcher, progress
        self.ended_in_a_row = 0

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.ended_in_a_row = 0
        # Tune keeps statistics of all that a trial reported, tens of kilobytes, until the sweep ends; none is read.
        trial.metric_n_steps.clear()
        trial.metric_analysis.clear()
        if trial.last_result.get("status") == "unrecorded":
            self.searcher.stop(LedgerError(trial.last_result["error"]))
        self.progress()

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.ended_in_a_row += 1
        if self.ended_in_a_row == MOST_ENDED:
            # The trial's get_error() is still None here, but the file is written.
            text = Path(trial.error_file).read_text().strip() if trial.error_file else "no reason is known"
            reason = f"the trials' processes end one after the other: {text.splitlines()[-1]}"
            self.searcher.stop(MergeRayError(reason))


def run_studies(
    studies: Sequence[Study],
    pool: HostPool,
    ledger: Any,
    references: References,
    evaluation: EvaluationSpec,
    directory: Path,
    progress: Callable[[], None],
    ending: threading.Event | None = None,
) -> None:
    """Search every study to the end of its budget; the studies hold their candidates and outcomes afterwards.

    directory: the sweep's results; Tune's own files, TensorBoard's among them, go to its ``tune`` folder.
    ending: once it is set, no more candidates are started, and what is left of the search is not done. Raises
    :class:`merge_ray.errors.MergeRayError` when rows can no longer be written or no host is left, and
    :class:`merge_ray.errors.SweepInterrupted` when it was ended before it was done.
    """
    os.environ |= TUNE_SETTINGS
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
    searcher = SweepSearcher(studies, pool, directory, ending or threading.Event())
    tuner = tune.Tuner(
        # The hosts own the cores and devices; their trials only wait for them, on the head. Every trial asks for the
        # same, so that any of Tune's processes can take it.
        tune.with_resources(trainable, tune.PlacementGroupFactory([{"node:__internal_head__": 0.0001}])),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=_NewestFirst(),
            num_samples=-1,
            max_concurrent_trials=MOST_TRIALS,
            reuse_actors=True,
            trial_name_creator=lambda trial: _candidate(templates, trial).label,
            trial_dirname_creator=lambda trial: f"{trial.config['search']}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(directory.resolve()),
            callbacks=[_TrialCallback(searcher, progress), TBXLoggerCallback()],
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    progress()
    tuner.fit()
    if searcher.failure is not None:
        raise searcher.failure
    if not all(study.finished for study in studies):
        raise SweepInterrupted("the search was ended before it was done")


def _candidate(templates: Mapping[str, Candidate], trial: Trial) -> Candidate:
    return replace(templates[trial.config["search"]], parameters=trial.config["parameters"])

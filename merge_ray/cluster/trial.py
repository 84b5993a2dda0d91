"""MergeTrainable: one Tune trial is one candidate on one leased host, one iteration a report of its objective."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import ray
from ray import tune
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from merge_ray.candidate import Candidate, ledger_row
from merge_ray.cluster.errors import cause, is_lost
from merge_ray.cluster.learned import Learned
from merge_ray.cluster.learning import learn_until
from merge_ray.cluster.ledger import forget_learned, load_learned, record
from merge_ray.errors import LedgerError


class MergeTrainable(tune.Trainable):
    """Scores the candidate of ``config`` shard by shard and records one row when it ends.

    A candidate that learns does so first, in as many parts as there are learning reports; each ends with the
    objective on the first shard, which compares candidates that have come as far. What is learned is saved with the
    ledger, and a trial that starts anew goes on from there.

    config: ``search``, the study and its pair, and the ``parameters`` of the method; ``steps`` to learn, 0 for most;
    ``host``, the name of the leased host; ``last``, whether the candidate has failed if that is lost; ``cutoffs``, the
    objective that must be reached after a number of reports to go on. A candidate that fails is a row, and a row that
    cannot be written is a result with the status ``unrecorded``; Tune sees an error only when this process ends. A
    candidate whose host is gone with its node has no row, and a result with the status ``lost``.
    """

    def setup(
        self,
        config: dict[str, Any],
        templates: dict[str, Candidate] | None = None,
        ledger: Any = None,
        references: dict[str, Any] | None = None,
        shards: int = 1,
        learning_reports: int = 5,
        seconds: float | None = None,
    ) -> None:
        """Take what all trials share; a search's template is a candidate but for its parameters.

        seconds: the time that a trial may take, None for any.
        """
        assert templates is not None
        self.templates, self.ledger, self.seconds = templates, ledger, seconds
        self.references, self.shards, self.parts = references, shards, learning_reports
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start on another candidate: Tune reuses the process of a finished trial."""
        self.candidate = replace(self.templates[new_config["search"]], parameters=new_config["parameters"])
        self.host_name, self.last, self.host_ended = new_config["host"], new_config["last"], False
        self.cutoffs = {int(reports): value for reports, value in new_config["cutoffs"].items()}
        self.steps = new_config["steps"]
        self.learned: Learned | None = load_learned(self.ledger, self.candidate) if self.steps else None
        self.learning_reports = self.parts if self.steps else 0
        self.curve: list[float] = list(self.learned.curve) if self.learned else []
        self.shard_calls: list[ray.ObjectRef] = []
        self.deadline = time.monotonic() + self.seconds if self.seconds else None
        # What was learned before this process began is part of the trial.
        self.started = time.perf_counter() - (self.learned.seconds if self.learned else 0.0)
        return True

    def step(self) -> dict[str, Any]:
        """Learn up to the next report, or score one more shard.

        The last shard, a missed cutoff and a failure end the trial with a row.
        """
        try:
            self.host = ray.get_actor(self.host_name)
        except ValueError:
            return self._lose("its host is gone")
        try:
            report = self._learn() if len(self.curve) < self.learning_reports else self._score_shard()
        except GetTimeoutError:
            self.host_ended = True
            return self._finish("failed", {"error": f"it took longer than the {self.seconds:g} s of trial_seconds"})
        except RayError as error:
            if is_lost(error, self.host):
                return self._lose(cause(error))
            # A host that was asked ahead answers that first: the next candidate's time must not pass meanwhile.
            self.host_ended = isinstance(error, RayActorError) or bool(self.shard_calls)
            return self._finish("failed", {"error": cause(error)})
        except LedgerError as error:
            return _unrecorded(error)
        done = len(self.curve)
        if done == self.learning_reports + self.shards:
            return self._finish("complete", report)
        if done in self.cutoffs and report["objective"] < self.cutoffs[done]:
            return self._finish("pruned", report)
        names = ("objective", "loss", "learned_steps")
        shown: dict[str, Any] = {name: report[name] for name in names if name in report}
        return {**shown, "status": "running", "done": False}

    def _get(self, call: ray.ObjectRef) -> Any:
        """What a host answers, in the time that is left; one that does not is killed, and Ray starts it again."""
        left = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        try:
            return ray.get(call, timeout=left)
        except GetTimeoutError:
            for made in (call, *self.shard_calls):
                ray.cancel(made)  # or Ray would make the same call again
            ray.kill(self.host, no_restart=False)
            raise

    def _learn(self) -> dict[str, Any]:
        """Learn one more part, and report the objective on the first shard."""
        assert self.learned is not None
        until = math.ceil(self.steps * (len(self.curve) + 1) / self.learning_reports)
        learned = learn_until(self.host, self.ledger, self.candidate, self.learned, until, self._get)
        report = self._get(self.host.score.remote(self.candidate, 0, self.references, learned))
        # The report is saved with the next steps, when it is clear that there are any: a trial that is cut off
        # between a report and what follows from it reports again.
        self.learned = learned.reported(report["objective"])
        self.curve.append(report["objective"])
        return {**report, **self._learning(), "loss": learned.loss, "learned_steps": learned.step}

    def _learning(self) -> dict[str, Any]:
        """What the ledger keeps of the learning reports beside the curve."""
        return {"losses": self.learned.losses, "steps": self.learned.steps} if self.learned else {}

    def _score_shard(self) -> dict[str, Any]:
        done, reports = len(self.curve), self.learning_reports + self.shards
        certain = min((cutoff for cutoff in self.cutoffs if cutoff > done), default=reports)
        # One is asked for ahead, so that the host need not wait for what follows from a report.
        for ahead in range(len(self.shard_calls), min(2, certain - done)):
            shard = done + ahead - self.learning_reports
            self.shard_calls.append(self.host.score.remote(self.candidate, shard, self.references, self.learned))
        report = self._get(self.shard_calls.pop(0))
        self.curve.append(report["objective"])
        return {**report, **self._learning()}

    def _lose(self, reason: str) -> dict[str, Any]:
        self.host_ended = True
        if self.last:
            return self._finish("failed", {"error": reason})
        return {"objective": math.nan, "status": "lost", "host_ended": True, "done": True}

    def _finish(self, status: str, report: dict[str, Any]) -> dict[str, Any]:
        seconds = time.perf_counter() - self.started
        row = ledger_row(self.candidate, status, **report, curve=self.curve, seconds_total=seconds)
        try:
            record(self.ledger, row)
            if self.steps and status != "complete":
                # A complete candidate may be confirmed: what it learned is kept until the sweep ends.
                forget_learned(self.ledger, self.candidate)
        except LedgerError as error:
            return _unrecorded(error)
        # Tune insists on an objective, also of a failure.
        return {
            "objective": math.nan,
            **_shown(report),
            "status": status,
            "curve": tuple(self.curve),  # of a list, TensorBoard would get a histogram
            "seconds_total": seconds,
            "host_ended": self.host_ended,
            "done": True,
        }


def _unrecorded(error: LedgerError) -> dict[str, Any]:
    """The result of a trial whose row cannot be written; another try would fail alike."""
    return {"objective": math.nan, "status": "unrecorded", "error": str(error), "done": True}


def _shown(report: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a report that Tune and TensorBoard show."""
    return {name: value for name, value in report.items() if isinstance(value, (int, float))}

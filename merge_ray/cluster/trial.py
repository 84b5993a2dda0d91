"""MergeTrainable: one Tune trial is one candidate on one leased host, one iteration a shard."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError

from merge_ray.candidate import Candidate, ledger_row
from merge_ray.cluster.errors import cause
from merge_ray.cluster.ledger import record


class MergeTrainable(tune.Trainable):
    """Scores the candidate of ``config`` shard by shard and records one row when it ends.

    config: ``study`` and the ``parameters`` of the method; ``host``, the index of the leased host; ``cutoffs``, the
    objective that must be reached after a number of shards to go on. A candidate that fails is a row, not an error
    of the trial; Tune sees an error only when this process or the ledger fails.
    """

    def setup(
        self,
        config: dict[str, Any],
        templates: dict[str, Candidate] | None = None,
        hosts: list[Any] | None = None,
        ledger: Any = None,
        references: dict[str, float] | None = None,
        shards: int = 1,
    ) -> None:
        """Take what all trials share; a study's template is a candidate but for its parameters."""
        assert templates is not None and hosts is not None
        self.templates, self.hosts, self.ledger = templates, hosts, ledger
        self.references, self.shards = references, shards
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start on another candidate: Tune reuses the process of a finished trial."""
        self.candidate = replace(self.templates[new_config["study"]], parameters=new_config["parameters"])
        self.host = self.hosts[new_config["host"]]
        self.cutoffs = {int(shards): value for shards, value in new_config["cutoffs"].items()}
        self.curve: list[float] = []
        self.started = time.perf_counter()
        return True

    def step(self) -> dict[str, Any]:
        """Score one more shard; the last one, a missed cutoff and a failure end the trial with a row."""
        try:
            report = ray.get(self.host.score.remote(self.candidate, len(self.curve), self.references))
        except RayError as error:
            return self._finish("failed", {"error": cause(error)})
        self.curve.append(report["objective"])
        done = len(self.curve)
        if done == self.shards:
            return self._finish("complete", report)
        if done in self.cutoffs and report["objective"] < self.cutoffs[done]:
            return self._finish("pruned", report)
        return {**_shown(report), "status": "running", "done": False}

    def _finish(self, status: str, report: dict[str, Any]) -> dict[str, Any]:
        seconds = time.perf_counter() - self.started
        row = ledger_row(self.candidate, status, **report, curve=self.curve, seconds_total=seconds)
        record(self.ledger, row)
        # Tune insists on an objective, also of a failure.
        return {
            "objective": math.nan,
            **_shown(report),
            "status": status,
            "curve": self.curve,
            "seconds_total": seconds,
            "done": True,
        }


def _shown(report: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a report that Tune and TensorBoard show."""
    return {name: value for name, value in report.items() if isinstance(value, (int, float))}

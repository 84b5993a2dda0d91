"""ResultsActor: the one writer of a sweep's ledger.

As a host's class (see :mod:`merge_ray.cluster.host`), this one comes to every trial's process with the actor's handle;
what only the actor needs, boto3 with it, is imported in the actor.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from operator import methodcaller
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from merge_ray.candidate import Candidate, fingerprint_of
from merge_ray.cluster.errors import cause
from merge_ray.cluster.learned import Learned
from merge_ray.errors import LedgerError

if TYPE_CHECKING:
    from merge_ray.results import Results

ROWS_AT_ONCE = 64
"""Calls that may wait together for one write."""
SECONDS = ("seconds_merge", "seconds_evaluate", "seconds_total")


@ray.remote(  # type: ignore[call-overload]  # groups are missing in Ray's overloads
    num_cpus=0, max_restarts=-1, max_task_retries=-1, concurrency_groups={"rows": ROWS_AT_ONCE}
)
class ResultsActor:
    """Writes rows and artifacts; an answer means that they are on the disk, or on S3.

    Every call may be repeated: a file is replaced as a whole, and equal rows count once, so that a restarted actor
    that is asked again changes nothing.
    """

    def __init__(self, results: Results, environment: Mapping[str, str]) -> None:
        from merge_ray.leaderboard import RowWriter
        from merge_ray.results import FOLDERS

        os.environ.update(environment)
        self.results = results
        for folder in FOLDERS:
            (results.directory / folder).mkdir(parents=True, exist_ok=True)
        self.rows = RowWriter(results)

    @ray.method(concurrency_group="rows")
    def record(self, row: Mapping[str, Any]) -> str:
        """Make ``row`` durable and return its identity; raises :class:`LedgerError` if it cannot be written."""
        self.rows.add(row["identity"], row)
        return str(row["identity"])

    @ray.method(concurrency_group="rows")
    def share(self, identity: str, study: str) -> None:
        """Give ``study`` a row of its own of a candidate that another study has scored; it took no time."""
        row = {**self.rows.find(identity), "study": study, **dict.fromkeys(SECONDS, 0.0)}
        self.rows.add(f"{identity}-{fingerprint_of(study)[:8]}", row)

    def compact(self) -> None:
        """Leave few objects on S3 behind."""
        self.rows.compact()

    def keep(self, identity: str, study: str, arrays: Mapping[str, np.ndarray], learner: str) -> str:
        """Save the artifacts of a study's best candidate; returns their path within the results.

        It is ``artifacts/<identity>.npz``; ``artifacts/<study>.npz`` is a copy, for other sweeps to name. The steps
        saved while the candidate ``learner`` learned become ``artifacts/<study>/``.
        """
        path = f"artifacts/{identity}.npz"
        for copy in (path, f"artifacts/{study}.npz"):
            self.results.write(copy, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
        self.results.move(f"learning/{learner}", f"artifacts/{study}")
        return path

    def save_learned(self, identity: str, learned: Learned) -> None:
        """Save what a candidate has learned so far: to go on from, in the place of what was, and its artifacts."""
        if learned.artifacts:
            (self.results.directory / "learning" / identity).mkdir(exist_ok=True)
            for suffix, content in learned.step_files().items():
                name = f"learning/{identity}/step-{learned.step}{suffix}"
                self.results.write(name, methodcaller("write", content))
        self.results.write(f"learning/{identity}.safetensors", methodcaller("write", learned.to_bytes()))

    def load_learned(self, identity: str) -> Learned:
        """What a candidate has learned as far as it is saved."""
        return Learned.read(self.results.directory / "learning" / f"{identity}.safetensors")

    def forget_learned(self, identity: str | None = None) -> None:
        """Remove what a candidate has learned, or all of them: they have their rows."""
        saved = (self.results.directory / "learning").iterdir()
        self.results.remove(*(f"learning/{path.name}" for path in saved if identity in (None, path.stem)))

    def process_id(self) -> int:
        """The operating system's number of this actor's process."""
        return os.getpid()


def start_results_actor(
    results: Path | Results, name: str, environment: Mapping[str, str] = MappingProxyType({})
) -> Any:
    """A :class:`ResultsActor` on the driver's own node, where the results directory, or its copy, is.

    environment: variables for its process, such as those of :class:`merge_ray.s3.S3Settings`.
    """
    from merge_ray.results import open_results

    opened = open_results(results)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = ResultsActor.options(name=name, scheduling_strategy=here)  # type: ignore[attr-defined]
    return options.remote(replace(opened, directory=opened.directory.resolve()), dict(environment))


def record(ledger: Any, row: Mapping[str, Any]) -> None:
    """Have the :class:`ResultsActor` make a row durable; raises :class:`LedgerError` if it cannot."""
    _answer(ledger.record.remote(row))


def share(ledger: Any, candidate: Candidate, study: str) -> None:
    """See :meth:`ResultsActor.share`; raises :class:`LedgerError` if the row cannot be written."""
    _answer(ledger.share.remote(candidate.identity, study))


def keep(ledger: Any, candidate: Candidate, arrays: Mapping[str, np.ndarray], learner: Candidate) -> str:
    """See :meth:`ResultsActor.keep`; raises :class:`LedgerError` if they cannot be written."""
    path: str = _answer(ledger.keep.remote(candidate.identity, candidate.search, arrays, learner.identity))
    return path


def save_learned(ledger: Any, candidate: Candidate, learned: Learned) -> None:
    """Have what a candidate has learned saved; raises :class:`LedgerError` if it cannot be."""
    _answer(ledger.save_learned.remote(candidate.identity, learned))


def load_learned(ledger: Any, candidate: Candidate) -> Learned:
    """What a candidate has learned as far as it is saved."""
    learned: Learned = _answer(ledger.load_learned.remote(candidate.identity))
    return learned


def forget_learned(ledger: Any, candidate: Candidate | None = None) -> None:
    """Remove what a candidate has learned, or all of them."""
    _answer(ledger.forget_learned.remote(candidate.identity if candidate else None))


def compact(ledger: Any) -> None:
    """See :meth:`ResultsActor.compact`; raises :class:`LedgerError` if that cannot be written."""
    _answer(ledger.compact.remote())


def _answer(call: ray.ObjectRef) -> Any:
    try:
        return ray.get(call)
    except RayError as error:
        raise LedgerError(cause(error)) from None

"""ResultsActor: the one writer of a sweep's ledger."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from merge_ray.candidate import Candidate, fingerprint_of
from merge_ray.cluster.errors import cause
from merge_ray.cluster.learned import Learned
from merge_ray.errors import LedgerError
from merge_ray.leaderboard.rows import ROW_SCHEMA

SECONDS = ("seconds_merge", "seconds_evaluate", "seconds_total")


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class ResultsActor:
    """Writes rows and artifacts; an answer means that they are on the disk.

    Every call may be repeated: a row's file is named by its identity and replaced as a whole, so that a
    restarted actor that is asked again changes nothing.
    """

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        for folder in ("trials", "artifacts", "learning"):
            (self.directory / folder).mkdir(parents=True, exist_ok=True)

    def record(self, row: Mapping[str, Any]) -> str:
        """Make ``row`` durable and return its identity; raises :class:`LedgerError` if it cannot be written."""
        self._write_row(row["identity"], pa.Table.from_pylist([dict(row)], schema=ROW_SCHEMA))
        return str(row["identity"])

    def share(self, identity: str, study: str) -> None:
        """Give ``study`` a row of its own of a candidate that another study has scored; it took no time."""
        table = pq.read_table(self.directory / "trials" / f"{identity}.parquet", schema=ROW_SCHEMA)
        for name, value in {"study": study, **dict.fromkeys(SECONDS, 0.0)}.items():
            place = table.schema.get_field_index(name)
            table = table.set_column(place, table.field(place), pa.array([value], table.field(place).type))
        self._write_row(f"{identity}-{fingerprint_of(study)[:8]}", table)

    def _write_row(self, name: str, table: pa.Table) -> None:
        write_durably(self.directory / "trials" / f"{name}.parquet", lambda file: pq.write_table(table, file))

    def keep(self, identity: str, study: str, arrays: Mapping[str, np.ndarray], learner: str) -> str:
        """Save the artifacts of a study's best candidate; returns their path within the results.

        It is ``artifacts/<identity>.npz``; ``artifacts/<study>.npz`` is a copy, for other sweeps to name. The steps
        saved while the candidate ``learner`` learned become ``artifacts/<study>/``.
        """
        path = self.directory / "artifacts" / f"{identity}.npz"
        for copy in (path, path.with_name(f"{study}.npz")):
            write_durably(copy, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
        if (steps := self._steps(learner)).exists():
            kept = path.with_name(study)
            shutil.rmtree(kept, ignore_errors=True)
            steps.rename(kept)
        return str(path.relative_to(self.directory))

    def save_learned(self, identity: str, learned: Learned) -> None:
        """Save what a candidate has learned so far: to go on from, in the place of what was, and its artifacts."""
        if learned.artifacts:
            steps = self._steps(identity)
            steps.mkdir(exist_ok=True)
            for suffix, content in learned.step_files().items():
                write_durably(steps / f"step-{learned.step}{suffix}", methodcaller("write", content))
        write_durably(self._learned(identity), methodcaller("write", learned.to_bytes()))

    def load_learned(self, identity: str) -> Learned:
        """What a candidate has learned as far as it is saved."""
        return Learned.read(self._learned(identity))

    def forget_learned(self, identity: str | None = None) -> None:
        """Remove what a candidate has learned, or all of them: they have their rows."""
        learning = self.directory / "learning"
        for path in learning.iterdir() if identity is None else [self._learned(identity), self._steps(identity)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _learned(self, identity: str) -> Path:
        return self.directory / "learning" / f"{identity}.safetensors"

    def _steps(self, identity: str) -> Path:
        return self.directory / "learning" / identity

    def process_id(self) -> int:
        """The operating system's number of this actor's process."""
        return os.getpid()


def start_results_actor(directory: Path, name: str) -> Any:
    """A :class:`ResultsActor` on the driver's own node, where the results directory is."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = ResultsActor.options(name=name, scheduling_strategy=here)  # type: ignore[attr-defined]
    return options.remote(str(directory.resolve()))


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


def _answer(call: ray.ObjectRef) -> Any:
    try:
        return ray.get(call)
    except RayError as error:
        raise LedgerError(cause(error)) from None


def write_durably(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file aside, force it to the disk, and move it into place in one step.

    Raises :class:`LedgerError` when there is no room or no permission; the old file, if any, stays.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise LedgerError(
            f"cannot write {path}: {error.strerror or error}; run the same command again to go on"
        ) from None

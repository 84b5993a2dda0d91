"""Trials on hosts that score at once: what a search does when the trials' own processes are killed, or it is ended."""

import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray

from merge_ray.candidate import Candidate, Fingerprints
from merge_ray.cluster import tuning
from merge_ray.cluster.interrupt import interruption
from merge_ray.cluster.ledger import start_results_actor
from merge_ray.cluster.nodes import Node, Room
from merge_ray.cluster.pool import HostPool
from merge_ray.cluster.trial import MergeTrainable
from merge_ray.errors import LedgerError, MergeRayError, SweepInterrupted
from merge_ray.leaderboard import read_rows
from merge_ray.methods.base import make_method
from merge_ray.spec import EvaluationSpec, HostsSpec, StudySpec
from merge_ray.study import Study

pytestmark = pytest.mark.ray

SHARDS = 2
FAILS = 0.95


@ray.remote(num_cpus=0)
class Host:
    """Scores a candidate by its coefficient, but for ``FAILS``, and counts what it was asked for."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[str, int]] = Counter()

    def score(self, candidate: Candidate, shard: int, *rest: Any) -> dict[str, Any]:
        self.asked[candidate.identity, shard] += 1
        objective = candidate.parameters["scaling_coefficient"]
        if objective == FAILS:
            raise ValueError("not this one")
        return {"objective": objective, "samples": 8}

    def counted(self) -> Counter[tuple[str, int]]:
        return self.asked


class Search:
    """A grid search over ``points`` coefficients, or those given, on two hosts."""

    def __init__(
        self,
        directory: Path,
        points: int | list[float],
        known: Mapping[str, Mapping[Any, Any]] | None = None,
        shards: int = SHARDS,
        **settings: Any,
    ) -> None:
        self.directory, self.hosts, self.shards = directory, list[Any](), shards
        self.asked = Counter[tuple[str, int]]()
        grid = [round(0.1 + 0.8 * index / points, 3) for index in range(points)] if isinstance(points, int) else points
        settings = {"searcher": "grid", "space": {"scaling_coefficient": grid}, **settings}
        spec = StudySpec.model_validate({"name": "ta", "method": "task_arithmetic", **settings})
        prints = Fingerprints("bank", {"val": "val"}, "protocol")
        template = Candidate.of("sweep", "ta", make_method("task_arithmetic", {}), 0, "val", prints)
        self.study = Study(spec, template, ["ants"], shards, known or {}, 4)
        self.ledger = start_results_actor(directory, f"{directory.name}/results")
        self.ending = threading.Event()

    def run(self, progress: Callable[[], None] = lambda: None) -> None:
        pool = HostPool(self.directory.name, HostsSpec(count=2), self._start)
        evaluation = EvaluationSpec(shards=self.shards)
        pool.wait_until_ready()
        try:
            tuning.run_studies([self.study], pool, self.ledger, {}, evaluation, self.directory, progress, self.ending)
        finally:
            self.asked = sum((ray.get(host.counted.remote()) for host in self.hosts), Counter[tuple[str, int]]())
            pool.close()
            ray.kill(self.ledger)

    def _start(self, node: Node, room: Room, options: dict[str, Any]) -> Any:
        self.hosts.append(Host.options(**options).remote())  # type: ignore[attr-defined]
        return self.hosts[-1]


def test_a_trial_process_killed_between_two_trials_costs_no_row(
    tmp_path: Path, ray_cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tune counts this twice and gives the second trial up.
    class Fragile(MergeTrainable):
        def reset_config(self, new_config: dict[str, Any]) -> bool:
            if hasattr(self, "candidate") and not (tmp_path / "killed").exists():
                (tmp_path / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return bool(super().reset_config(new_config))

    monkeypatch.setattr(tuning, "MergeTrainable", Fragile)
    search = Search(tmp_path, points=8)
    search.run()
    assert (tmp_path / "killed").exists()
    assert read_rows(tmp_path)["status"].tolist() == ["complete"] * 8
    assert search.study.finished


def test_a_trial_process_killed_after_its_row_was_recorded_scores_nothing_twice(
    tmp_path: Path, ray_cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fragile(MergeTrainable):
        def step(self) -> dict[str, Any]:
            result: dict[str, Any] = super().step()
            if result["done"] and not (tmp_path / "killed").exists():
                (tmp_path / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return result

    monkeypatch.setattr(tuning, "MergeTrainable", Fragile)
    search = Search(tmp_path, points=6)
    search.run()
    assert read_rows(tmp_path)["status"].tolist() == ["complete"] * 6
    assert set(search.asked.values()) == {1}
    assert search.study.best_value == pytest.approx(0.1 + 0.8 * 5 / 6, abs=1e-3)


def test_no_more_processes_are_started_than_there_are_hosts(
    tmp_path: Path, ray_cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noted(MergeTrainable):
        def setup(self, *shared: Any, **rest: Any) -> None:
            (tmp_path / f"process-{os.getpid()}").touch()
            super().setup(*shared, **rest)

    monkeypatch.setattr(tuning, "MergeTrainable", Noted)
    Search(tmp_path, points=20).run()
    assert len(read_rows(tmp_path)) == 20
    assert len(list(tmp_path.glob("process-*"))) <= 2


def test_a_host_is_asked_for_no_shard_that_a_scheduler_may_spare(tmp_path: Path, ray_cluster: dict[str, Any]) -> None:
    worse_and_worse = [round(0.9 - 0.05 * index, 2) for index in range(12)]
    search = Search(tmp_path, worse_and_worse, shards=4, scheduler="asha", reduction_factor=2)
    search.run()
    rows = rows_by_identity(tmp_path)
    assert {row["status"] for row in rows.values()} == {"complete", "pruned"}
    shards = Counter(identity for identity, _ in search.asked)
    assert shards == {identity: len(row["curve"]) for identity, row in rows.items()}


def test_a_failure_costs_its_host_at_most_one_shard_more(tmp_path: Path, ray_cluster: dict[str, Any]) -> None:
    search = Search(tmp_path, [FAILS, 0.5], shards=8)
    search.run()
    rows = rows_by_identity(tmp_path)
    [failed] = [identity for identity, row in rows.items() if row["status"] == "failed"]
    assert "not this one" in rows[failed]["error"]
    shards = Counter(identity for identity, _ in search.asked)
    assert shards.pop(failed) <= 2
    assert set(shards.values()) == {8}


def test_trial_processes_that_cannot_live_end_the_search_with_the_reason(
    tmp_path: Path, ray_cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(MergeTrainable):
        def setup(self, *shared: Any, **rest: Any) -> None:
            raise RuntimeError("another version of the package")

    monkeypatch.setattr(tuning, "MergeTrainable", Broken)
    monkeypatch.setattr(tuning, "MOST_ENDED", 2)
    with pytest.raises(MergeRayError, match=r"processes end one after the other: .*another version of the package"):
        Search(tmp_path, points=6).run()
    assert not list((tmp_path / "trials").iterdir())


def test_a_search_that_is_ended_finishes_what_hosts_have(tmp_path: Path, ray_cluster: dict[str, Any]) -> None:
    search = Search(tmp_path, points=20)
    with pytest.raises(SweepInterrupted):
        search.run(lambda: search.ending.set() if search.study.outcomes else None)
    rows = read_rows(tmp_path)
    assert 1 <= len(rows) < 20
    assert set(rows["status"]) == {"complete"}
    assert set(search.study.outcomes) == set(rows["identity"]) == {candidate for candidate, _ in search.asked}


def rows_by_identity(directory: Path) -> dict[str, dict[str, Any]]:
    rows: list[Any] = read_rows(directory).to_dict("records")
    return {row["identity"]: row for row in rows}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, 4 MB large; where mounting is not permitted, none."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_a_search_that_goes_on_once_there_is_room(
    small_disk: Path, ray_cluster: dict[str, Any]
) -> None:
    ballast = small_disk / "ballast"

    def fill() -> None:
        free = os.statvfs(small_disk)
        with ballast.open("ab") as file:
            file.write(bytes(max(0, free.f_bavail * free.f_frsize - 100_000)))

    search = Search(small_disk, points=20)
    with pytest.raises(LedgerError, match=r"No space left on device; run the same command again to go on"):
        search.run(lambda: fill() if len(search.study.outcomes) == 3 else None)
    acknowledged = rows_by_identity(small_disk)
    assert 3 <= len(acknowledged) < 20
    ballast.unlink()
    again = Search(small_disk, points=20, known=acknowledged)
    again.run()
    rows = rows_by_identity(small_disk)
    assert len(rows) == 20
    assert all(rows[identity]["time"] == row["time"] for identity, row in acknowledged.items())
    assert not acknowledged.keys() & {candidate for candidate, _ in again.asked}


def test_ctrl_c_asks_once_and_then_stops() -> None:
    said: list[str] = []
    # Tests that run in the background of a script ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with interruption(said.append) as ending:
        os.kill(os.getpid(), signal.SIGINT)
        assert ending.is_set() and len(said) == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 5)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler

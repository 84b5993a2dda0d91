"""Hosts on the nodes of a cluster, which come and go; and how hosts share nodes."""

from __future__ import annotations

import json
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import tiny
from ray.cluster_utils import Cluster

from merge_ray.bank import Layout
from merge_ray.candidate import Candidate, Fingerprints
from merge_ray.cluster import pool as pool_module
from merge_ray.cluster.ledger import start_results_actor
from merge_ray.cluster.nodes import Node, Room, check_versions, live_nodes, versions
from merge_ray.cluster.pool import HostPool
from merge_ray.cluster.setup import HostSetup, prepare_node
from merge_ray.cluster.tuning import run_studies
from merge_ray.errors import MergeRayError
from merge_ray.leaderboard import rank, read_rows
from merge_ray.methods.base import make_method
from merge_ray.progress import Progress
from merge_ray.spec import EvaluationSpec, HostsSpec, StudySpec
from merge_ray.spec_files import load_sweeps
from merge_ray.study import Study
from merge_ray.sweep import run_sweep

SMALL, LARGE = Node("1", "small", "10.0.0.1", cpus=2), Node("2", "large", "10.0.0.2", cpus=12)
GPUS = Node("3", "gpus", "10.0.0.3", cpus=16, gpus=4)


def shares(nodes: list[Node], **wanted: Any) -> list[tuple[str, int]]:
    """The name of the node and the threads of every host."""
    spec = HostsSpec(**wanted)
    room = Room.choose(spec, nodes)
    return sorted((node.name, room.threads_on(node)) for node in room.spread(nodes, {}, spec.count))


def test_hosts_share_the_cores_of_every_node_or_take_a_gpu_each() -> None:
    assert shares([SMALL, LARGE]) == [("large", 1)] * 8 + [("small", 1)] * 2
    assert shares([SMALL, LARGE], threads=3) == [("large", 3)] * 4
    assert shares([SMALL, LARGE], count=2) == [("large", 12), ("small", 2)]
    assert shares([SMALL, LARGE], count=5) == [("large", 4)] * 3 + [("small", 1)] * 2
    assert shares([SMALL, GPUS]) == [("gpus", 4)] * 4
    assert shares([SMALL, GPUS], device="cpu", count=1) == [("gpus", 16)]


def test_a_cluster_without_the_resources_says_what_is_asked_for_and_what_there_is() -> None:
    for wanted, said in (
        ({"count": 15}, r"15 hosts need 15 CPU cores; the cluster has 14 \(small: 2, large: 12\)"),
        ({"count": 4, "threads": 5}, "4 hosts of 5 threads need 20 CPU cores; the cluster has 14"),
        ({"device": "cuda"}, "'cuda' needs GPUs; the cluster has 0"),
    ):
        with pytest.raises(MergeRayError, match=said):
            shares([SMALL, LARGE], **wanted)


def test_hosts_are_added_where_there_is_room_left() -> None:
    room = Room.choose(HostsSpec(), [SMALL])
    assert room.spread([SMALL, LARGE], {"1": 2, "2": 7}, None) == [LARGE]
    assert room.spread([SMALL, LARGE], {"1": 1}, 2) == [LARGE, LARGE]


def test_hosts_that_share_slices_take_room_beside_each_other_and_have_the_same_threads() -> None:
    room = Room.choose(HostsSpec(count=2), [SMALL, LARGE], slices=2)
    assert [room.threads_on(node) for node in (SMALL, LARGE)] == [2, 2]
    room = Room.choose(HostsSpec(), [SMALL, LARGE], slices=3)
    # Eight and two hosts: the third group spans the nodes, and one core is left over.
    assert room.spread([SMALL, LARGE], {}, None, 3) == [LARGE, LARGE, SMALL]
    assert room.spread([SMALL, LARGE], {"2": 2}, None, 3) == [SMALL]
    assert room.spread([SMALL, LARGE], {}, 1, 3) == [LARGE]


def test_other_versions_are_named() -> None:
    check_versions(versions())
    with pytest.raises(MergeRayError, match=r"it has torch \S+, where the driver has 9\.9; install the same"):
        check_versions({**versions(), "torch": "9.9"})


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without cores, in a folder of its own: later tests would find this cluster in the usual one."""
    monkeypatch.setenv("RAY_TMPDIR", tempfile.mkdtemp(prefix="ray"))
    head = {"num_cpus": 0, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def join(cluster: Cluster) -> None:
    ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)


def add_worker(cluster: Cluster, index: int, **more: Any) -> Any:
    own = {"num_cpus": 1, "node_ip_address": f"127.0.0.{index + 1}", "node_name": f"worker-{index}"}
    return cluster.add_node(object_store_memory=80 << 20, **{**own, **more})


@ray.remote(max_restarts=-1, max_task_retries=2)
class Sleeper:
    """A host whose scores take their time; they say where they come from, and so does a file for every call."""

    def __init__(self, node: str, calls: Path) -> None:
        self.node, self.calls = node, calls

    def score(self, candidate: Candidate, shard: int, references: Any, learned: Any) -> dict[str, Any]:
        value = candidate.parameters["scaling_coefficient"]
        (self.calls / f"{value}-{self.node}").touch()
        time.sleep(0.2 if any(self.calls.glob("*-worker-3")) else 3)  # time enough for a node to join
        return {"objective": value, "mean": value, "normalized_mean": value, "samples": 8, "host": self.node}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray's own, of the processes of a cluster that was shut down
def test_nodes_join_and_leave_while_a_sweep_runs(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "PATIENCE", 600.0)
    add_worker(cluster, 1)
    add_worker(cluster, 2)
    join(cluster)
    results, calls = tmp_path / "results", tmp_path / "calls"
    calls.mkdir()
    fingerprints = Fingerprints("bank", {"val": "data", "test": "data"}, "protocol")
    template = Candidate.of("sleepers", "study", make_method("task_arithmetic", {}), 0, "val", fingerprints)
    values = [round(0.01 * step, 2) for step in range(1, 51)]
    space = {"scaling_coefficient": values}
    spec = StudySpec(name="study", method="task_arithmetic", searcher="grid", trials=len(values), space=space)
    study = Study(spec, template, ["ants"], 1, {}, 4)

    # A node that cannot do the work is named; one that joins later is left aside, with a warning.
    def check(node: Node) -> Any:
        wanted = {**versions(), "torch": "9.9"} if node.name == refused else versions()
        return prepare_node.options(scheduling_strategy=node.affinity).remote(wanted, [ray.put(setup(tmp_path))])

    def start(node: Node, room: Room, options: dict[str, Any]) -> Any:
        return Sleeper.options(**options).remote(node.name, calls)  # type: ignore[attr-defined]

    warnings: list[str] = []
    refused = "worker-2"
    broken = HostPool("broken", HostsSpec(), start, check)
    with pytest.raises(MergeRayError, match=r"node worker-2: it is not used: it has torch \S+, where the driver has 9"):
        broken.wait_until_ready()
    broken.close()
    refused = "worker-4"
    pool = HostPool("sleepers", HostsSpec(), start, check, warnings.append)
    pool.wait_until_ready()
    assert sorted(host.node.name for host in pool.hosts) == ["worker-1", "worker-2"]
    ledger = start_results_actor(results, "sleepers/results")

    def run() -> None:
        run_studies([study], pool, ledger, {"ants": {"": 1.0}}, EvaluationSpec(shards=1), results, lambda: None)

    sweep = threading.Thread(target=run)
    sweep.start()
    wait_for(lambda: any(calls.glob("*-worker-1")))
    add_worker(cluster, 3)
    add_worker(cluster, 4)
    wait_for(lambda: any(calls.glob("*-worker-3")))
    [first] = [node for node in live_nodes() if node.name == "worker-1"]
    [leaving] = [node for node in cluster.worker_nodes if node.node_id == first.id]
    cluster.remove_node(leaving)
    sweep.join()
    rows = read_rows(results)
    assert sorted(json.loads(text)["scaling_coefficient"] for text in rows["parameters"]) == values
    assert set(rows["status"]) == {"complete"}
    assert set(rows["host"]) == {"worker-1", "worker-2", "worker-3"}
    # One call for every candidate, and one more for what ran on the node that left.
    assert len(list(calls.iterdir())) <= len(values) + 1
    assert sorted(host.node.name for host in pool.hosts) == ["worker-2", "worker-3"]
    assert sorted(text.split(": it has torch")[0] for text in warnings) == [
        "node worker-1 is gone; what ran there runs again elsewhere",
        "node worker-4: it is not used",
    ]
    pool.close()


def setup(folder: Path, **changes: Any) -> HostSetup:
    """What hosts of a sweep without tasks are told."""
    [spec] = load_sweeps(tiny.write_world(folder / "other"))
    told = HostSetup(
        models=spec.models,
        tasks=(),
        evaluation=spec.evaluation,
        layout=Layout(()),
        bank_tasks=(),
        fingerprint="",
        heads={},
        data={},
        files=(),
        versions=versions(),
        driver="",
        directory=folder,
        cache=folder / "cache",
    )
    return replace(told, **changes)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_sweep_over_nodes_scores_as_on_one_and_keeps_a_cache_on_each(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny.write_world(tmp_path, name="many", studies={"ties": {"searcher": "optuna", "trials": 6}}, hosts=None)
    own = {f"worker-{index}": tmp_path / f"cache-{index}" for index in (1, 2)}
    for index in (1, 2):
        add_worker(cluster, index, num_cpus=2, env_vars={"MERGE_RAY_CACHE": str(own[f"worker-{index}"])})
    join(cluster)
    shared: dict[str, list[bool]] = {}
    wait = HostPool.wait_until_ready

    def in_shared_memory(host: Any) -> bool:
        """Whether a host's bank lies in Ray's store and is no copy."""
        at = host.scorer.bank.task_vectors.data_ptr()
        for line in Path("/proc/self/maps").read_text().splitlines():
            start, end = (int(text, 16) for text in line.split()[0].split("-"))
            if start <= at < end:
                return "plasma" in line
        return False

    def look(pool: HostPool) -> None:
        wait(pool)
        for host in pool.hosts:
            shared.setdefault(host.node.name, []).append(ray.get(host.actor.__ray_call__.remote(in_shared_memory)))

    monkeypatch.setattr(HostPool, "wait_until_ready", look)
    [many] = load_sweeps(spec)
    board = rank(read_rows(run_sweep(many, Progress())))
    assert shared == {"worker-1": [True, True], "worker-2": [True, True]}
    for cache in own.values():
        assert len(list(cache.rglob("images.npy"))) == 2 * len(tiny.TASKS)
    # What a node lacks is named with the node, before any host loads.
    path = str(tmp_path / "models" / "config.json")
    pool = HostPool.start("lacking", HostsSpec(), setup(tmp_path, files=(path, "nowhere/config.json")), [{}], {})
    with pytest.raises(MergeRayError, match=r"node worker-\d: it is not used: there is no nowhere/config\.json; a"):
        wait(pool)
    pool.close()
    ray.shutdown()
    # The same on one node, with as many hosts: what a search proposes depends on their number.
    monkeypatch.setenv("RAY_TMPDIR", tempfile.mkdtemp(prefix="ray"))
    ray.init(num_cpus=4, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    [one] = load_sweeps(spec, ["name=one"])
    columns = ["study", "parameters", "score"]
    alone = rank(read_rows(run_sweep(one, Progress())))
    assert board[columns].to_numpy().tolist() == alone[columns].to_numpy().tolist()

"""How many hosts one driver keeps busy: the sweep's own search over hosts that only sleep.

Everything is real but for the hosts: the searcher, Tune and its trial processes, and the ledger on disk. One process
plays all hosts, so that a small machine holds many of them. Printed: the share of the time that hosts were busy, from
the first candidate's start to the last one's end; what the driver, the trial processes and Ray needed of the processor;
what the driver's memory grew by; and how many rows a second the ledger takes when nothing else happens.

    python benchmarks/many_hosts.py [--hosts 64] [--candidates 10000] [--seconds 5] [--searcher random|optuna]
"""

from __future__ import annotations

import argparse
import asyncio
import math
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import ray
from rich.console import Console
from rich.table import Table

from merge_ray.candidate import Candidate, Fingerprints, ledger_row
from merge_ray.cluster.ledger import start_results_actor
from merge_ray.cluster.pool import HostPool
from merge_ray.cluster.session import ray_session
from merge_ray.cluster.tuning import run_studies
from merge_ray.leaderboard import read_rows
from merge_ray.methods.base import make_method
from merge_ray.progress import Progress
from merge_ray.spec import EvaluationSpec, HostsSpec, StudySpec
from merge_ray.study import Study

TASKS = [f"task_{index}" for index in range(8)]
SHARDS = 4
LEDGER_ROWS = 2000
SAMPLE_EVERY = 5.0


@ray.remote(num_cpus=0)
class SleepingHosts:
    """All hosts in one process; a call takes its share of a candidate's seconds, and no processor time to speak of."""

    def __init__(self, seconds: float) -> None:
        self.each = seconds
        self.begun, self.ended, self.busy = math.inf, 0.0, 0.0

    async def score(self, candidate: Candidate, shard: int, *rest: Any) -> dict[str, Any]:
        """A report as a host makes it."""
        started = time.monotonic()
        self.begun = min(self.begun, started)
        await asyncio.sleep(self.each / SHARDS)
        self.ended = time.monotonic()
        self.busy += self.ended - started
        return _report(-abs(candidate.parameters["scaling_coefficient"] - 0.3))

    async def seconds(self) -> tuple[float, float, float]:
        """What all hosts together were busy for, and when the first call began and the last one ended."""
        return self.busy, self.begun, self.ended


def _report(objective: float) -> dict[str, Any]:
    score = {"metric": "accuracy", "value": 0.5, "count": 1000, "standard_error": 0.01, "correct": bytes(125)}
    return {
        "objective": objective,
        "mean": 0.5,
        "normalized_mean": objective,
        "tasks": [{"task": task, "reference": 0.9, "normalized": 0.5, **score} for task in TASKS],
        "samples": 8000,
        "seconds_merge": 0.1,
        "seconds_evaluate": 1.0,
        "peak_memory_bytes": 1,
        "storage_bytes": 1,
        "storage_ratio": 1.0,
        "device": "none",
    }


def main() -> None:
    """Run the search and the ledger's measurement, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--searcher", choices=("random", "optuna"), default="random")
    arguments = parser.parse_args()
    table = Table("measured", "value", "limit")
    with Progress() as progress, ray_session(progress), tempfile.TemporaryDirectory() as folder:
        search(arguments, Path(folder), table)
        table.add_row("ledger, rows/s", f"{ledger_rows_per_second(Path(folder) / 'ledger'):.0f}", ">= 500")
    Console().print(table)


def search(arguments: argparse.Namespace, directory: Path, table: Table) -> None:
    """Score the candidates on sleeping hosts through the sweep's search."""
    make = SleepingHosts.options  # type: ignore[attr-defined]
    pool = HostPool(
        "many_hosts",
        HostsSpec(count=1),
        lambda node, room, options: make(max_concurrency=10_000, **options).remote(arguments.seconds),
    )
    pool.wait_until_ready()
    [host] = pool.hosts
    hosts = host.actor
    pool.hosts = [replace(host) for _ in range(arguments.hosts)]
    ledger = start_results_actor(directory, "many_hosts/results")
    spec = StudySpec.model_validate(
        {
            "name": "task_arithmetic",
            "method": "task_arithmetic",
            "searcher": arguments.searcher,
            "trials": arguments.candidates,
            "space": {"scaling_coefficient": {"low": 0.0, "high": 1.0}},
        }
    )
    template = _template(spec)
    study = Study(spec, template, TASKS, SHARDS, {}, 2 * len(pool.hosts))
    with sampled() as samples:
        run_studies(
            [study], pool, ledger, {}, EvaluationSpec(shards=SHARDS), directory, lambda: None, threading.Event()
        )
    busy, begun, ended = ray.get(hosts.seconds.remote())
    passed = ended - begun
    rows = len(read_rows(directory))
    table.add_row("hosts busy", f"{busy / passed / arguments.hosts:.1%}", ">= 95 %")
    table.add_row("candidates/s", f"{arguments.candidates / passed:.1f}", "")
    table.add_row("rows", f"{rows}", f"{arguments.candidates}")
    searched = [sample for sample in samples if sample[0] >= begun]
    (_, before, _), (_, after, memory) = searched[0], searched[-1]
    for name, used in after.items():
        each = 1000 * (used - before[name]) / arguments.candidates
        table.add_row(f"processor ms a candidate, {name}", f"{each:.1f}", "")
    grown = f"{searched[len(searched) // 2][2]:.0f} -> {memory:.0f}"
    table.add_row("driver's memory, MB, half way and at the end", grown, "flat")


def _template(spec: StudySpec) -> Candidate:
    fingerprints = Fingerprints("bank", {"val": "val", "test": "test"}, "protocol")
    return Candidate.of("many_hosts", spec.name, make_method(spec.method, {}), 0, "val", fingerprints)


@contextmanager
def sampled() -> Iterator[list[tuple[float, Mapping[str, float], float]]]:
    """Samples of the time, the processor seconds used by kind of process, and the driver's memory in MB."""
    samples: list[tuple[float, Mapping[str, float], float]] = []
    done = threading.Event()

    def sample() -> None:
        driver = psutil.Process()
        used: dict[psutil.Process, tuple[str, float]] = {}
        while True:
            used[driver] = "driver", sum(driver.cpu_times()[:2])
            for child in driver.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    used[child] = _kind(child), sum(child.cpu_times()[:2])
            # A process that has ended counts with what it had used.
            kinds = defaultdict[str, float](float)
            for kind, seconds in used.values():
                kinds[kind] += seconds
            samples.append((time.monotonic(), kinds, driver.memory_info().rss / 1e6))
            if done.wait(SAMPLE_EVERY):
                return

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def _kind(process: psutil.Process) -> str:
    title = " ".join(process.cmdline())
    for word, kind in {"Sleeping": "hosts", "ResultsActor": "ledger", "Trainable": "trials"}.items():
        if word in title:
            return kind
    return "Ray"


def ledger_rows_per_second(directory: Path) -> float:
    """Rows acknowledged a second with as many calls under way as a large sweep has."""
    ledger = start_results_actor(directory, f"many_hosts/ledger/{directory.name}")
    spec = StudySpec.model_validate({"name": "ties", "method": "task_arithmetic"})
    template = _template(spec)
    row = ledger_row(template, "complete", **_report(0.5), curve=[0.5] * SHARDS, seconds_total=1.0)
    rows = [{**row, "identity": f"{index:032x}", "time": datetime.now(UTC)} for index in range(LEDGER_ROWS)]
    waiting: list[ray.ObjectRef] = []
    started = time.perf_counter()
    for row in rows:
        waiting.append(ledger.record.remote(row))
        if len(waiting) == 64:
            _, waiting = ray.wait(waiting, num_returns=1)
    ray.get(waiting)
    return LEDGER_ROWS / (time.perf_counter() - started)


if __name__ == "__main__":
    main()

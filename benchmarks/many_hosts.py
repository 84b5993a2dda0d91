"""How many hosts one driver keeps busy: the sweep's own search over hosts that only sleep.

Everything is real but for the hosts: the searcher, Tune and its trial processes, and the ledger on disk. One process
plays all hosts, so that a small machine holds many of them. Printed: how many rows a second the ledger takes when
nothing else happens; the share of the time that hosts were busy, from the first candidate's start to the last one's
end, and from when so many candidates had begun as there are hosts; what the driver, the trial processes and Ray needed
of the processor; and what the driver's memory grew by.

    python benchmarks/many_hosts.py [--hosts 64] [--candidates 10000] [--seconds 5] [--searcher random|optuna]
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

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


class Sample(NamedTuple):
    """Seconds of the clock and of each process's processor time, and the driver's memory in MB."""

    time: float
    processor: Mapping[psutil.Process, float]
    memory: float


@ray.remote(num_cpus=0)
class SleepingHosts:
    """All hosts in one process; a call takes its share of a candidate's seconds, and no processor time to speak of."""

    def __init__(self, seconds: float) -> None:
        self.each = seconds
        self.turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.calls: list[tuple[int, float, float]] = []

    async def score(self, candidate: Candidate, shard: int, *rest: Any) -> dict[str, Any]:
        """A report as a host makes it; a candidate's shards are on one host and take turns."""
        async with self.turns[candidate.identity]:
            started = time.monotonic()
            await asyncio.sleep(self.each / SHARDS)
            self.calls.append((shard, started, time.monotonic()))
        return _report(-abs(candidate.parameters["scaling_coefficient"] - 0.3))

    async def answered(self) -> list[tuple[int, float, float]]:
        """The calls' shards, and when they began and ended."""
        return self.calls


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
        table.add_row("ledger, rows/s", f"{ledger_rows_per_second(Path(folder) / 'ledger'):.0f}", ">= 500")
        search(arguments, Path(folder) / "search", table)
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
    with sampled() as (samples, kinds):
        run_studies(
            [study], pool, ledger, {}, EvaluationSpec(shards=SHARDS), directory, lambda: None, threading.Event()
        )
    calls = ray.get(hosts.answered.remote())
    begins, ended = sorted(start for shard, start, _ in calls if not shard), max(stop for *_, stop in calls)
    begun, full = begins[0], begins[arguments.hosts - 1]
    for name, since in {"in all": begun, "once all have begun": full}.items():
        busy = sum(max(0.0, stop - max(start, since)) for _, start, stop in calls)
        table.add_row(f"hosts busy, {name}", f"{busy / (ended - since) / arguments.hosts:.1%}", ">= 95 %")
    passed = ended - begun
    table.add_row("candidates/s", f"{arguments.candidates / passed:.1f}", "")
    table.add_row("rows", f"{len(read_rows(directory))}", f"{arguments.candidates}")
    searched = [sample for sample in samples if begun <= sample.time <= ended]
    first, half, last = searched[0], searched[len(searched) // 2], searched[-1]
    used = Counter[str]()
    for process, seconds in last.processor.items():
        used[kinds[process]] += round(1e6 * (seconds - first.processor.get(process, 0.0)))
    for name, microseconds in used.items():
        table.add_row(f"processor ms a candidate, {name}", f"{microseconds / 1000 / arguments.candidates:.1f}", "")
    grown = 2000 * (last.memory - half.memory) / arguments.candidates
    table.add_row("driver's memory, MB, half way and at the end", f"{half.memory:.0f}, {last.memory:.0f}", "flat")
    table.add_row("its growth, kB a candidate", f"{grown:.0f}", "")


def _template(spec: StudySpec) -> Candidate:
    fingerprints = Fingerprints("bank", {"val": "val", "test": "test"}, "protocol")
    return Candidate.of("many_hosts", spec.name, make_method(spec.method, {}), 0, "val", fingerprints)


@contextmanager
def sampled() -> Iterator[tuple[list[Sample], dict[psutil.Process, str]]]:
    """Samples while the block runs, and each process's kind; one that has ended stays with what it had used."""
    samples, kinds, done = list[Sample](), dict[psutil.Process, str](), threading.Event()

    def sample() -> None:
        driver, used = psutil.Process(), dict[psutil.Process, float]()
        while True:
            for process in (driver, *driver.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    used[process] = sum(process.cpu_times()[:2])
                    kinds[process] = "driver" if process == driver else _kind(process)
            samples.append(Sample(time.monotonic(), dict(used), driver.memory_info().rss / 1e6))
            if done.wait(SAMPLE_EVERY):
                return

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples, kinds
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

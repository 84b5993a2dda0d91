"""Fine-tuning on Ray: tasks side by side, and one task over several devices through Ray Train."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from rich.table import Table

from merge_ray.cluster.errors import cause
from merge_ray.cluster.session import ray_session
from merge_ray.errors import MergeRayError
from merge_ray.finetune import (
    FinetuneSpec,
    TaskResult,
    Workers,
    finetune_task,
    make_base,
    prepare_data,
    read_result,
    write_results,
)
from merge_ray.progress import Progress
from merge_ray.tasks import cache_directory

REPORT_EVERY = 0.5
"""Seconds between a job's reports of progress, and between looks at them."""
BASE_JOB = "base"
RETRIES = 2
"""How often a job whose process died goes on from its last checkpoint."""


@dataclass(frozen=True)
class Devices:
    """How a run's jobs share the cluster: ``at_once`` tasks of ``workers`` workers with ``threads`` threads each."""

    kind: str
    workers: int
    at_once: int
    threads: int

    @classmethod
    def share(cls, wanted: str, tasks: int, workers: int, nodes: Sequence[Mapping[str, float]]) -> Devices:
        """Share the GPUs of ``nodes`` (Ray's resources of each), one a worker, or else their CPU cores.

        A worker's threads fit on every node, so that all workers can be placed. Raises :class:`MergeRayError`
        when one task's workers do not fit.
        """
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        kind = ("cuda" if gpus else "cpu") if wanted == "auto" else wanted
        if kind == "cuda":
            used = [node for node in nodes if node.get("GPU", 0) >= 1]
            slots, threads = gpus, [node.get("CPU", 0) // node["GPU"] for node in used]
        else:
            used = [node for node in nodes if node.get("CPU", 0) >= 1]
            slots, threads = int(sum(node["CPU"] for node in used)), [node["CPU"] for node in used]
        if workers > slots:
            what = "GPUs" if kind == "cuda" else "CPU cores"
            raise MergeRayError(f"{workers} workers per task need {workers} {what}; the cluster has {slots}")
        at_once = min(tasks, slots // workers)
        if kind == "cpu":
            threads.append(slots // (at_once * workers))
        return cls(kind, workers, at_once, max(1, int(min(threads))))

    @property
    def resources(self) -> dict[str, float]:
        """What one worker takes of the cluster, in Ray's words for a task."""
        return {"num_cpus": self.threads, "num_gpus": 1 if self.kind == "cuda" else 0}


@dataclass(frozen=True)
class _Job:
    """What every worker of a run is told."""

    spec: FinetuneSpec
    cache: Path
    devices: Devices
    board: Any
    directory: Path

    def enter(self, threads: int) -> None:
        """Make this process fit to work: its threads, where S3 is, and the directory that relative paths start from."""
        torch.set_num_threads(threads)
        os.environ.update(self.spec.s3.environment())
        if self.directory.is_dir():
            os.chdir(self.directory)

    def reporter(self, name: str) -> Callable[[int, int], None]:
        """A progress callback that writes to the board now and then, and at the end."""
        last = 0.0

        def report(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if done == total or now - last >= REPORT_EVERY:
                last = now
                self.board.write.remote(name, done, total)

        return report

    def read_board(self) -> dict[str, tuple[int, int]]:
        """How far the jobs are, by name: steps done and in all."""
        counts: dict[str, tuple[int, int]] = _get(self.board.read.remote(), "watching the progress")
        return counts


@ray.remote(num_cpus=0)
class _Board:
    """Where running jobs write how far they are."""

    def __init__(self) -> None:
        self.counts: dict[str, tuple[int, int]] = {}

    def write(self, job: str, done: int, total: int) -> None:
        self.counts[job] = (done, total)

    def read(self) -> dict[str, tuple[int, int]]:
        return self.counts


def run_finetune(spec: FinetuneSpec, workers_per_task: int, progress: Progress) -> Table:
    """Make the base, fine-tune every task, write ``finetune.json``; returns the table of results.

    Tasks run side by side on the cluster that is running, or on one that is started on this machine. The same
    call after an interruption goes on from the last checkpoints. On several nodes ``spec.output`` and the data
    must be on a file system that all of them share.

    Raises :class:`MergeRayError` for anything wrong with the data, the base or the output, before Ray starts
    where that can be known.
    """
    with spec.s3.applied():
        return _run_finetune(spec, workers_per_task, progress)


def _run_finetune(spec: FinetuneSpec, workers_per_task: int, progress: Progress) -> Table:
    spec = spec.model_copy(update={"output": spec.output.expanduser().absolute()})
    cache = cache_directory().absolute()
    spec.output.mkdir(parents=True, exist_ok=True)
    with progress.counted("prepare the data") as update:
        prepare_data(spec, cache, update)
    if spec.base is not None:
        with progress.step("read the base"):
            make_base(spec, cache)
    with ray_session(progress):
        devices = Devices.share(spec.device, len(spec.tasks), workers_per_task, live_nodes())
        job = _Job(spec, cache, devices, _Board.remote(), Path.cwd())  # type: ignore[attr-defined]
        if spec.pretrain is not None:
            with progress.counted("pre-train the base") as update:
                _pretrain(job, update)
        with progress.counted(f"fine-tune {len(spec.tasks)} tasks") as update:
            results = _finetune_all(job, update)
    write_results(spec, results)
    return results_table(spec, results)


def results_table(spec: FinetuneSpec, results: list[TaskResult]) -> Table:
    """The validation metric before and after fine-tuning, a row a task; accuracies in percent."""
    table = Table(title=f"{spec.name}: validation scores, weights in {spec.output}")
    table.add_column("task")
    for column in ("metric", "steps", "before", "fine-tuned", "seconds"):
        table.add_column(column, justify="right")
    for result in results:
        percent = result.metric == "accuracy"
        before, after = (f"{100 * x:.1f}" if percent else f"{x:.4f}" for x in (result.before, result.after))
        table.add_row(result.task, result.metric, str(result.steps), before, after, f"{result.seconds:.0f}")
    return table


def live_nodes() -> list[Mapping[str, float]]:
    """Ray's resources of every node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _pretrain(job: _Job, update: Callable[..., None]) -> None:
    """Pre-train on one GPU, or on all cores of the largest node."""
    if job.devices.kind == "cuda":
        threads, gpus = 1, 1
    else:
        threads, gpus = int(max(node.get("CPU", 0) for node in live_nodes())), 0
    start = _run_pretraining.options(name="pretrain", num_cpus=threads, num_gpus=gpus)
    running = start.remote(job, threads)
    _wait([running], job, [BASE_JOB], update)
    _get(running, "pre-training")


def _finetune_all(job: _Job, update: Callable[..., None]) -> list[TaskResult]:
    names = [task.name for task in job.spec.tasks]
    waiting = list(names)
    running: dict[Any, str] = {}
    results: dict[str, TaskResult] = {}
    while waiting or running:
        while waiting and len(running) < job.devices.at_once:
            name = waiting.pop(0)
            if job.devices.workers == 1:
                start = _run_task.options(name=f"finetune-{name}", **job.devices.resources)
            else:
                # Ray Train's own workers take the devices; this task only waits for them.
                start = _run_trainer.options(name=f"finetune-{name}", num_cpus=0)
            running[start.remote(job, name)] = name
        for done in _wait(list(running), job, names, update):
            name = running.pop(done)
            results[name] = _get(done, f"fine-tuning on {name!r}")
    return [results[name] for name in names]


def _wait(running: list[Any], job: _Job, names: list[str], update: Callable[..., None]) -> list[Any]:
    """What has ended, once anything has; meanwhile shows the steps of all ``names`` together."""
    while True:
        done, _ = ray.wait(running, timeout=REPORT_EVERY)
        counts = [count for name, count in job.read_board().items() if name in names]
        if counts:
            update(sum(steps for steps, _ in counts), sum(total for _, total in counts))
        if done:
            return list(done)


def _get(reference: Any, what: str) -> Any:
    try:
        return ray.get(reference)
    except RayError as error:
        raise MergeRayError(f"{what} failed: {cause(error)}") from None


@ray.remote(max_retries=RETRIES)
def _run_pretraining(job: _Job, threads: int) -> None:
    job.enter(threads)
    make_base(job.spec, job.cache, job.devices.kind, job.reporter(BASE_JOB))


@ray.remote(max_retries=RETRIES)
def _run_task(job: _Job, name: str) -> TaskResult:
    job.enter(job.devices.threads)
    return finetune_task(job.spec, name, job.cache, job.devices.kind, progress=job.reporter(name))


@ray.remote(max_retries=RETRIES)
def _run_trainer(job: _Job, name: str) -> TaskResult:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    devices = job.devices
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"job": job, "name": name},
        scaling_config=ScalingConfig(
            num_workers=devices.workers,
            use_gpu=devices.kind == "cuda",
            resources_per_worker={"CPU": devices.threads, **({"GPU": 1} if devices.kind == "cuda" else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(job.spec.output / "training" / "ray"),
            # A group of workers that is started again goes on from the training's own checkpoint.
            failure_config=FailureConfig(max_failures=RETRIES),
        ),
    )
    trainer.fit()
    return read_result(job.spec, name)


def _train_worker(config: dict[str, Any]) -> None:
    """One of the workers that Ray Train starts for a task; they meet in torch.distributed's default group."""
    import ray.train
    import torch.distributed as distributed

    job, name = config["job"], config["name"]
    job.enter(job.devices.threads)
    context = ray.train.get_context()
    workers = Workers(context.get_world_rank(), context.get_world_size(), distributed.all_reduce)
    report = job.reporter(name) if workers.rank == 0 else None
    finetune_task(job.spec, name, job.cache, job.devices.kind, workers, report)

"""What a sweep costs beyond merging and forward passes, on the quickstart's models.

Evaluation: images per second through the evaluator against a bare forward loop over tensors in memory, same batch
size, same threads. Trials: the time of the search phase that no host spent merging or scoring, per trial. Hosts:
the private memory of a second host against the size of the bank.

    python benchmarks/sweep_costs.py
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import ray
import torch
from rich.console import Console
from rich.table import Table

from merge_ray.bank import Entry, Layout, ModelBank
from merge_ray.cluster.nodes import versions
from merge_ray.cluster.pool import HostPool
from merge_ray.cluster.session import ray_session
from merge_ray.cluster.setup import HostSetup
from merge_ray.evaluate import Evaluator
from merge_ray.leaderboard import read_rows
from merge_ray.methods.base import MergeInputs, make_method
from merge_ray.models import load_bank, make_heads
from merge_ray.progress import Progress
from merge_ray.spec import HostsSpec, SweepSpec
from merge_ray.spec_files import load_sweeps
from merge_ray.sweep import run_sweep
from merge_ray.tasks import cache_directory, open_task

SPEC = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"
PADDING = 40_000_000


def main() -> None:
    """Run the three measurements and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=32)
    trials = parser.parse_args().trials
    [spec] = load_sweeps(SPEC)
    table = Table("measured", "value", "limit")
    with Progress() as progress:
        table.add_row("evaluation, images/s against a bare loop", f"{evaluation_ratio(spec, progress):.2f}", ">= 0.90")
        table.add_row("a trial's overhead (s)", f"{trial_overhead(spec, trials, progress):.3f}", "<= 0.2")
        table.add_row("a second host's private memory / bank", f"{second_host(spec, progress):.3f}", "< 1")
    Console().print(table)


def evaluation_ratio(spec: SweepSpec, progress: Progress) -> float:
    """The evaluator's speed divided by the bare loop's, the best of several rounds in turn."""
    bank, base = load_bank(spec.models, spec.task_names, progress)
    family = spec.models.open_family()
    skeleton = family.skeleton(bank, "cpu")
    tasks = [open_task(task) for task in spec.tasks]
    heads = make_heads(spec.models, tasks, base, progress)
    data = {}
    for task in tasks:
        split = family.open_split(task, "val", cache_directory())
        data[task.name] = family.task_data(split, torch.from_numpy(heads[task.name]), torch.device("cpu"), None)
    batch = spec.evaluation.batch_size
    evaluator = Evaluator(skeleton, {"val": data}, batch, shards=spec.evaluation.shards)
    merged = make_method("task_arithmetic", {}).merge(MergeInputs(bank, out=skeleton.flat))
    batches = [
        data[name].inputs(slice(first, first + batch)).clone()
        for name in data
        for first in range(0, len(data[name]), batch)
    ]

    def bare() -> None:
        with torch.inference_mode():
            for images in batches:
                skeleton(images)

    def ours() -> None:
        for shard in range(spec.evaluation.shards):
            evaluator.outcomes(merged, "val", shard)

    times: dict[Callable[[], None], list[float]] = {bare: [], ours: []}
    for _ in range(6):
        for work in times:
            started = time.perf_counter()
            work()
            times[work].append(time.perf_counter() - started)
    return min(times[bare]) / min(times[ours])


def trial_overhead(spec: SweepSpec, trials: int, progress: Progress) -> float:
    """Seconds a trial during which its host neither merges nor scores, with all hosts at work."""
    grid = [round(value, 4) for value in np.linspace(0.01, 0.99, trials)]
    with tempfile.TemporaryDirectory() as folder, ray_session(progress):
        settings = {"searcher": "grid", "space": {"scaling_coefficient": grid}}
        study = spec.studies["task_arithmetic"].model_validate({"name": "ta", "method": "task_arithmetic", **settings})
        small = spec.model_copy(update={"results": folder, "studies": {"ta": study}})
        rows = read_rows(run_sweep(small, progress))
        hosts = int(ray.cluster_resources()["CPU"])
    rows = rows[rows["study"] == "ta"]
    rows = rows[rows["split"] == "val"]
    # The first trials also wait for Tune's own processes to start.
    seconds = rows["time"].sort_values().diff().dt.total_seconds().iloc[2 * hosts :]
    busy = (rows["seconds_merge"] + rows["seconds_evaluate"]).mean()
    return float(seconds.mean() * hosts - busy)


def second_host(spec: SweepSpec, progress: Progress) -> float:
    """The private memory that the second of two hosts adds, as a share of a bank made large by padding."""
    small, base = load_bank(spec.models.model_copy(update={"dtype": "float32"}), spec.task_names, progress)
    padding = Entry("zz.padding", (PADDING,), torch.float32, small.layout.size)
    layout = Layout((*small.layout.entries, padding))
    arrays = {
        "base": np.concatenate([small.base.numpy(), np.zeros(PADDING, np.float32)]),
        "task_vectors": np.concatenate(
            [small.task_vectors.numpy(), np.zeros((len(small.tasks), PADDING), np.float32)], 1
        ),
    }
    bank = ModelBank.from_arrays(arrays, layout, small.tasks, {}, "padded")
    family, tasks = spec.models.open_family(), [open_task(task) for task in spec.tasks]
    heads = make_heads(spec.models, tasks, base, progress)
    setup = HostSetup(
        spec.models,
        tuple(spec.tasks),
        spec.evaluation,
        layout,
        bank.tasks,
        "padded",
        heads,
        data={
            split: {task.name: family.open_split(task, split, cache_directory()).fingerprint for task in tasks}
            for split in ("val", "test")
        },
        files=(),
        versions=versions(),
        driver="",
        directory=Path.cwd(),
        cache=cache_directory(),
    )
    extras = {name: tensor.numpy() for name, tensor in family.tower(small.extras).items()}

    def private(setup: HostSetup, arrays: dict[str, np.ndarray]) -> float:
        pool = HostPool.start("memory", HostsSpec(count=2, threads=1), setup, [arrays], extras)
        pool.wait_until_ready()
        used = psutil.Process(ray.get(pool.hosts[1].actor.process_id.remote())).memory_full_info().uss
        pool.close()
        time.sleep(2)
        return float(used)

    with ray_session(progress):
        unpadded = private(dataclasses.replace(setup, layout=small.layout), small.arrays())
        padded = private(setup, arrays)
    return (padded - unpadded) / sum(array.nbytes for array in arrays.values())


if __name__ == "__main__":
    main()

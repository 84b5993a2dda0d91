"""What answering samples with weights of their own costs: both exact ways, the pick, and the papers' way.

The papers' way builds a state dict for every sample, tensor by tensor, and answers that sample with it. All figures
are of one run, on an image tower of random weights. Run

    python benchmarks/per_sample.py --architecture ViT-S-32 --tasks 8 --samples 16 --threads 2
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Annotated, Literal, cast

import numpy as np
import torch
import typer
from flat_merges import PeakMemory, resident_bytes
from rich.console import Console
from rich.table import Table
from torch import Tensor

from merge_ray.bank import Layout, ModelBank
from merge_ray.evaluate import TaskModel
from merge_ray.families import Positions, Skeleton, TaskData, find_family
from merge_ray.methods.per_sample import outcomes_per_sample


class RandomImages(TaskData):
    """Random images ``[N, 3, S, S]``; a sample's outcome is its features."""

    def __init__(self, count: int, size: int, device: torch.device) -> None:
        self.images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=device)
        self.labels = torch.zeros(count, dtype=torch.int64, device=device)

    def inputs(self, positions: Positions) -> Tensor:
        return self.images[positions]

    def logits(self, skeleton: Skeleton, inputs: Tensor) -> Tensor:
        return skeleton(inputs)

    def outcomes_of(self, logits: Tensor, positions: Positions) -> Tensor:
        return logits


def make_world(architecture: str, tasks: int, samples: int, device: torch.device) -> tuple[ModelBank, TaskModel]:
    """A bank of an image tower with random task vectors, and random images to ask about."""
    family = find_family("clip", architecture)
    tower = family.tower(family.build().state_dict())  # type: ignore[attr-defined]
    layout = Layout.of(tower)
    base = layout.flatten(tower)
    rows = np.empty((tasks, layout.size), np.float32)
    generator = np.random.default_rng(0)
    for row in rows:
        generator.standard_normal(out=row, dtype=np.float32)
        row *= 1e-3
    extras = {name: tensor for name, tensor in tower.items() if name not in layout.names}
    names = [f"task{index}" for index in range(tasks)]
    bank = ModelBank.from_arrays({"base": base.numpy(), "task_vectors": rows}, layout, names, extras, "").to(device)
    skeleton = family.skeleton(bank, device)
    size = family.preprocessing.size  # type: ignore[attr-defined]
    return bank, TaskModel("task0", "val", skeleton, RandomImages(samples, size, device), samples)


def papers_way(bank: ModelBank, model: TaskModel, coefficients: Tensor) -> Tensor:
    """A state dict for every sample, loaded into the model; the base is summed with the coefficient 1, as there."""
    models = [bank.layout.views(flat) for flat in (bank.base, *bank.task_vectors)]
    parameters = bank.layout.views(model.flat)
    answers = []
    for place, weights in enumerate(coefficients.tolist()):
        state = {
            name: cast(Tensor, sum(weight * views[name] for weight, views in zip((1.0, *weights), models, strict=True)))
            for name in parameters
        }
        for name, tensor in state.items():
            parameters[name].copy_(tensor)
        answers.append(model.outcomes(slice(place, place + 1)))
    return torch.cat(answers)


def main(
    architecture: Annotated[str, typer.Option(help="A CLIP architecture, or a config file.")] = "ViT-S-32",
    tasks: Annotated[int, typer.Option(help="Fine-tuned models.")] = 8,
    samples: Annotated[int, typer.Option(help="Samples of a batch.")] = 16,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    repeats: Annotated[int, typer.Option(help="Runs of each way; the fastest counts.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Print samples per second and memory of every way."""
    torch.set_num_threads(threads)
    bank, model = make_world(architecture, tasks, samples, torch.device(device))
    coefficients = 0.3 * tasks * torch.rand(samples, tasks).softmax(dim=1)
    everything = np.arange(samples)

    def ours(way: Literal["merge", "shared"] | None) -> Callable[[], Tensor]:
        return lambda: outcomes_per_sample(bank, model, everything, coefficients, way)

    ways: dict[str, Callable[[], Tensor]] = {
        "papers: a state dict each": lambda: papers_way(bank, model, coefficients),
        "merge for each": ours("merge"),
        "one shared forward pass": ours("shared"),
        "picked": ours(None),
    }
    seconds: dict[str, float] = {}
    memory: dict[str, float] = {}
    answers: dict[str, Tensor] = {}
    with torch.inference_mode():
        started = time.perf_counter()
        ours(None)()
        measuring = time.perf_counter() - started
        model.logits(model.inputs(everything))
        # The ways take turns, so that what else the machine does falls on all of them.
        for name, way in repeats * list(ways.items()):
            before = used_memory(device)
            with PeakMemory() as peak:
                started = time.perf_counter()
                answers[name] = way().cpu()
                seconds[name] = min(seconds.get(name, math.inf), time.perf_counter() - started)
            top = peak.peak if device == "cpu" else torch.cuda.max_memory_allocated()
            memory[name] = max(memory.get(name, 0.0), (top - before) / bank.base.nbytes)
    first, *others = ways
    table = Table(
        title=f"{architecture}: {tasks} x {bank.layout.size:,} float32, {samples} samples, {device} x {threads}"
    )
    for column in ("way", "samples / s", "x papers", "memory (x one model)", "off the papers'"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name in ways:
        off = (answers[name] - answers[first]).abs().max()
        table.add_row(
            name,
            f"{samples / seconds[name]:.2f}",
            f"{seconds[first] / seconds[name]:.2f}",
            f"{memory[name]:.2f}",
            f"{float(off):.1e}",
        )
    console = Console()
    console.print(table)
    best = min(seconds[name] for name in others[:2])
    console.print(
        f"the pick takes {seconds[others[2]] / best:.2f} x the better way's time; "
        f"its first call, with the measurements that it picks by, took {measuring:.1f} s"
    )


def used_memory(device: str) -> int:
    """The memory in use, in bytes; a device's peak starts here."""
    if device == "cpu":
        return resident_bytes()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


if __name__ == "__main__":
    typer.run(main)

"""What a layer-wise AdaMerging step costs beyond its forward and backward passes, here and in the papers' style.

The papers' style merges inside the graph: for every batch a merged model is made from the coefficients with autograd
looking on. Here the weights' gradient is gathered over the batches
and multiplied with the task vectors once. Both steps see the same batches; all figures are ratios within one run.

    python benchmarks/adamerging_step.py --blocks 10 --tokens 32 --threads 2
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Annotated

import numpy as np
import torch
import typer
from flat_merges import Bench, PeakMemory, resident_bytes
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from merge_ray.bank import Layout, ModelBank
from merge_ray.evaluate import TaskModel, UnlabeledSamples
from merge_ray.families import Positions, Skeleton, TaskData
from merge_ray.methods.adamerging import AdaMerging, CoefficientLearner, entropy
from merge_ray.methods.base import MergeInputs

WIDTH, HIDDEN = 512, 2048
SAMPLES = 16


class Blocks(Skeleton):
    """Residual blocks of two matrices each, as in a transformer's feed-forward layers; the classes are the width."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout, self.flat = layout, torch.zeros(layout.size)
        views = layout.views(self.flat).items()
        self.tensors = nn.ParameterDict({name: nn.Parameter(view, requires_grad=False) for name, view in views})

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, WIDTH]`` of tokens ``[B, N, WIDTH]``."""
        return run(tokens, dict(self.tensors.items()))


def run(tokens: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The model with the given weights."""
    for block in range(len(weights) // 4):
        up, down = (weights[f"{block:02d}_{part}"] for part in ("up", "down"))
        hidden = nn.functional.gelu(nn.functional.linear(tokens, up, weights[f"{block:02d}_up_bias"]))
        tokens = tokens + nn.functional.linear(hidden, down, weights[f"{block:02d}_down_bias"])
    return tokens.mean(dim=1)


class Tokens(TaskData):
    """Random tokens: two batches, drawn again and again."""

    def __init__(self, tokens: int) -> None:
        self.values = torch.randn(2 * SAMPLES, tokens // SAMPLES, WIDTH)
        self.labels = torch.zeros(2 * SAMPLES, dtype=torch.int64)

    def inputs(self, positions: Positions) -> Tensor:
        """The tokens of some samples."""
        return self.values[positions]

    def logits(self, skeleton: Skeleton, inputs: Tensor) -> Tensor:
        """The model's answers."""
        logits: Tensor = skeleton(inputs)
        return logits


def make_bank(tasks: int, blocks: int) -> ModelBank:
    """Random models of ``blocks`` blocks."""
    shapes = {"up": (HIDDEN, WIDTH), "up_bias": (HIDDEN,), "down": (WIDTH, HIDDEN), "down_bias": (WIDTH,)}
    tensors = {
        f"{block:02d}_{name}": torch.empty(shape, device="meta")
        for block in range(blocks)
        for name, shape in shapes.items()
    }
    layout, generator = Layout.of(tensors), np.random.default_rng(0)
    base = 0.02 * generator.standard_normal(layout.size, dtype=np.float32)
    vectors = generator.standard_normal((tasks, layout.size), dtype=np.float32)
    vectors *= np.float32(1e-3)
    names = tuple(f"task{index}" for index in range(tasks))
    return ModelBank.from_arrays({"base": base, "task_vectors": vectors}, layout, names, {}, "benchmark")


def batches(learner: CoefficientLearner) -> Iterator[tuple[TaskModel, Tensor]]:
    """The batches of the learner's next step."""
    for index, model in enumerate(learner.models):
        for positions in learner._batches(index):
            yield model, model.inputs(positions)  # type: ignore[misc]


def bare(learner: CoefficientLearner) -> None:
    """The step's forward and backward passes, and nothing else."""
    with learner.unlabeled.gradient():
        for model, inputs in batches(learner):
            entropy(model.logits(inputs)).mean().backward()


def through_the_merge(learner: CoefficientLearner, bank: ModelBank) -> None:
    """The step in the papers' style: a merge in the graph for every batch.

    Each batch is passed backward at once. Published code does so after the last one, and keeps all merges until then.
    """
    raw = learner.coefficients.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([raw], lr=1e-3)
    base = bank.layout.views(bank.base)
    vectors = [bank.layout.views(row) for row in bank.task_vectors]
    for _, inputs in batches(learner):
        coefficients = raw.clamp(0, 1)
        weights = {
            name: base[name] + sum(coefficients[task, layer] * vector[name] for task, vector in enumerate(vectors))
            for layer, name in enumerate(bank.layout.names)
        }
        entropy(run(inputs, weights)).mean().backward()
    optimizer.step()


def measure(work: Callable[[], object], repeats: int, resident: int) -> tuple[float, int]:
    """The fastest of several runs in seconds, and the most memory beyond ``resident``."""
    seconds, memory = [], 0
    for _ in range(repeats):
        with PeakMemory() as peak:
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        memory = max(memory, peak.peak - resident)
    return min(seconds), memory


def main(
    tasks: Annotated[int, typer.Option(help="Fine-tuned models.")] = 8,
    blocks: Annotated[int, typer.Option(help="Blocks of the model, 2.1 million weights each.")] = 10,
    tokens: Annotated[int, typer.Option(help="Tokens of a batch of 16 samples; 800 in ViT-B/32.")] = 32,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    repeats: Annotated[int, typer.Option(help="Runs of each; the fastest counts.")] = 2,
) -> None:
    """Print what a step costs."""
    torch.set_num_threads(threads)
    table = Table("layer-wise step", "measured", "limit")
    for variant in ("plain", "ties"):
        bank = make_bank(tasks, blocks)
        skeleton = Blocks(bank.layout)
        models = {task: TaskModel(task, "val", skeleton, Tokens(tokens), SAMPLES) for task in bank.tasks}
        inputs = MergeInputs(bank, out=skeleton.flat, resources={"unlabeled": UnlabeledSamples(models)})
        learner = AdaMerging(task_vectors=variant).learner(inputs)
        learner.advance(1)
        read = min(Bench(bank, 0).floor() for _ in range(3))
        resident = resident_bytes()
        passes, passes_memory = measure(lambda: bare(learner), repeats, resident)  # noqa: B023
        step, memory = measure(lambda: learner.advance(1), repeats, resident)  # noqa: B023
        beyond, one = max(step - passes, 1e-9), bank.base.nbytes
        name = "AdaMerging" + ("++" if variant == "ties" else "")
        table.add_row(
            f"{name}: beyond the passes and one read of the bank, / passes", f"{(beyond - read) / passes:.3f}", "<= 0.3"
        )
        table.add_row(f"{name}: beyond the passes, / one read of the bank", f"{beyond / read:.2f}", "")
        table.add_row(f"{name}: peak memory beyond the bank and the model (x one model)", f"{memory / one:.2f}", "<= 4")
        if variant == "plain":
            papers, papers_memory = measure(lambda: through_the_merge(learner, bank), 1, resident)  # noqa: B023
            table.add_row("the papers' style: beyond the passes, / ours", f"{(papers - passes) / beyond:.1f}", ">= 5")
            table.add_row("the papers' style: peak memory, / ours", f"{papers_memory / memory:.1f}", ">= 4")
            table.add_row("the papers' style: peak memory (x one model)", f"{papers_memory / one:.1f}", "")
            note = f"passes {passes:.2f} s (memory {passes_memory / one:.2f} models), one read of the bank {read:.3f} s"
    console = Console()
    console.print(table)
    console.print(f"{tasks} x {bank.layout.size:,} float32, {tokens} tokens a batch, {threads} threads; {note}")


if __name__ == "__main__":
    typer.run(main)

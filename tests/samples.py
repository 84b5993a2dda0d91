"""Unlabelled samples for tests: a model that is linear in all of its weights, and random inputs for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from merge_ray.bank import Layout
from merge_ray.evaluate import TaskModel, UnlabeledSamples
from merge_ray.families import Positions, Skeleton, TaskData

CLASSES = 4


class Linear(Skeleton):
    """Logits ``[B, CLASSES]`` from inputs ``[B, F]``; the matrix is made of the first weights of every tensor."""

    def __init__(self, layout: Layout, flat: Tensor) -> None:
        super().__init__()
        self.layout, self.flat = layout, flat
        views = [nn.Parameter(view, requires_grad=False) for view in layout.views(flat).values()]
        self.tensors = nn.ParameterList(views)

    def forward(self, inputs: Tensor) -> Tensor:
        weights = torch.cat([tensor.reshape(-1)[:100] for tensor in self.tensors])
        return inputs @ weights[: len(weights) // CLASSES * CLASSES].view(-1, CLASSES)


class Inputs(TaskData):
    """Random inputs ``[count, F]``, the same for a seed, and random labels."""

    def __init__(self, skeleton: Linear, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        features = sum(min(100, tensor.numel()) for tensor in skeleton.tensors) // CLASSES
        self.values = torch.randn(count, features, generator=generator)
        self.labels = torch.randint(CLASSES, (count,), generator=generator)

    def inputs(self, positions: Positions) -> Tensor:
        return self.values[positions]

    def logits(self, skeleton: Skeleton, inputs: Any) -> Tensor:
        logits: Tensor = skeleton(inputs)
        return logits


def make_unlabeled(
    layout: Layout, tasks: Iterable[str], count: int = 40, flat: Tensor | None = None
) -> UnlabeledSamples:
    """``count`` samples of every task, and a model over ``flat`` ``[P]`` (or a buffer of its own) that answers them."""
    skeleton = Linear(layout, torch.zeros(layout.size) if flat is None else flat)
    return UnlabeledSamples(
        {
            task: TaskModel(task, "val", skeleton, Inputs(skeleton, count, seed), 16)
            for seed, task in enumerate(sorted(tasks))
        }
    )

"""The tiny image encoder of the golden cases, as the notes of each case describe it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from merge_ray.bank import ModelBank
from merge_ray.evaluate import TaskModel
from merge_ray.families import Positions, Skeleton, TaskData
from merge_ray.families.images import load_tower

State = dict[str, Tensor]


class Block(nn.Module):
    """``h + c_proj(gelu(c_fc(ln_2(h))))``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, hidden), "c_proj": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Visual(nn.Module):
    """Features ``[B, out_dim]`` of images ``[B, C, S, S]``."""

    def __init__(self, about: dict[str, Any]) -> None:
        super().__init__()
        width, patch = about["width"], about["patch"]
        self.conv1 = nn.Conv2d(about["chans"], width, patch, patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros((about["image"] // patch) ** 2, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*[Block(width, about["mlp"]) for _ in range(about["depth"])])
        self.proj = nn.Parameter(torch.zeros(width, about["out_dim"]))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv1(x).flatten(2).transpose(1, 2)
        hidden = self.transformer.resblocks(self.ln_pre(tokens + self.positional_embedding))  # type: ignore[operator]
        return F.normalize(self.ln_post(hidden.mean(dim=1)) @ self.proj, dim=-1)


class GoldenSkeleton(Skeleton):
    """The encoder over a flat buffer that holds the bank's base; with a head of its own where the layout has one."""

    def __init__(self, bank: ModelBank, about: dict[str, Any], classes: int | None = None) -> None:
        super().__init__()
        self.layout, self.flat = bank.layout, bank.base.clone()
        views = bank.layout.views(self.flat)
        self.visual = Visual(about)
        load_tower(self.visual, views, "model.visual.", "cpu")
        self.classification_head = None
        if classes is not None:
            self.classification_head = nn.Linear(about["out_dim"], classes)
            load_tower(self.classification_head, views, "classification_head.", "cpu")
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        features = self.visual(x)
        return features if self.classification_head is None else self.classification_head(features)


class GoldenData(TaskData):
    """Images ``[N, C, S, S]``, labels ``[N]`` and a head (weight, bias), or None where the skeleton has one."""

    def __init__(self, x: Tensor, labels: Tensor, head: tuple[Tensor, Tensor] | None = None) -> None:
        self.x, self.labels, self.head = x, labels, head

    def inputs(self, positions: Positions) -> Tensor:
        return self.x[positions]

    def logits(self, skeleton: Skeleton, inputs: Tensor) -> Tensor:
        answers = skeleton(inputs)
        return answers if self.head is None else answers @ self.head[0].T + self.head[1]


class LogitsData(GoldenData):
    """The same, whose outcomes are the logits themselves."""

    def outcomes_of(self, logits: Tensor, positions: Positions) -> Tensor:
        return logits


def task_model(task: str, skeleton: Skeleton, data: TaskData) -> TaskModel:
    """A task's golden samples behind what methods are given."""
    return TaskModel(task, "val", skeleton, data, batch_size=16)

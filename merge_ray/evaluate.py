"""Score a merged model on its tasks' splits, shard by shard.

Samples are taken in a fixed random order that depends on nothing but their number, so every candidate meets
the same samples in the same shards, and two candidates can be compared sample by sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merge_ray.families.base import Skeleton
from merge_ray.methods.base import Merged
from merge_ray.tasks import CachedSplit

ORDER_SEED = 20


@dataclass(frozen=True)
class TaskScore:
    """One task's score: ``value`` over ``count`` samples, and how it compares with the fine-tuned model's."""

    task: str
    metric: str
    value: float
    count: int
    standard_error: float
    reference: float
    normalized: float | None
    correct: bytes


class TaskData:
    """One task's split on a device: images uint8 ``[N, 3, S, S]``, labels ``[N]``, head ``[C, D]``, in order.

    On an accelerator the images are copied there once; on a CPU they stay in the memory-mapped cache.
    """

    def __init__(self, split: CachedSplit, head: Tensor, device: torch.device, max_samples: int | None) -> None:
        self.order = evaluation_order(len(split.labels), max_samples)
        self.labels = torch.from_numpy(split.labels[self.order]).to(device)
        self.head = head.to(device)
        self._images = split.images
        self._resident = torch.from_numpy(split.images[self.order]).to(device) if device.type != "cpu" else None

    def images(self, start: int, stop: int) -> Tensor:
        """The images at positions ``start`` to ``stop`` of the order, uint8 ``[B, 3, S, S]``."""
        if self._resident is not None:
            return self._resident[start:stop]
        return torch.from_numpy(self._images[self.order[start:stop]])


def evaluation_order(count: int, max_samples: int | None) -> np.ndarray:
    """The fixed random order of ``count`` samples, cut to ``max_samples``."""
    return np.random.default_rng(ORDER_SEED).permutation(count)[:max_samples]


class Evaluator:
    """Scores merged weights through one skeleton.

    data: ``{split: {task: TaskData}}``. shards: how many parts each task's samples are scored in.
    """

    def __init__(
        self, skeleton: Skeleton, data: Mapping[str, Mapping[str, TaskData]], batch_size: int, shards: int
    ) -> None:
        self.skeleton = skeleton
        self.data = data
        self.batch_size = batch_size
        self.shards = shards

    def correct(self, merged: Merged, split: str, shard: int | None = None) -> dict[str, np.ndarray]:
        """For every task, which of the shard's samples (of all samples, without a shard) are answered rightly."""
        if merged.shared:
            merged.write(next(iter(self.data[split])), self.skeleton.flat)
        answers = {}
        for task in self.data[split]:
            if not merged.shared:
                merged.write(task, self.skeleton.flat)
            answers[task] = self._forward(split, task, shard)
        return answers

    def accuracy(self, merged: Merged, task: str) -> float:
        """The accuracy of ``merged`` on all validation samples of ``task``."""
        merged.write(task, self.skeleton.flat)
        return float(self._forward("val", task, None).mean())

    @torch.inference_mode()
    def _forward(self, split: str, task: str, shard: int | None) -> np.ndarray:
        data = self.data[split][task]
        start, stop = self._bounds(len(data.labels), shard)
        hits = []
        for first in range(start, stop, self.batch_size):
            last = min(first + self.batch_size, stop)
            features = self.skeleton(data.images(first, last))
            logits = features @ data.head.T
            if not bool(torch.isfinite(logits).all()):
                raise FloatingPointError(f"the merged model's logits on {task!r} are not finite")
            hits.append(logits.argmax(dim=1) == data.labels[first:last])
        return torch.cat(hits).cpu().numpy() if hits else np.zeros(0, dtype=bool)

    def _bounds(self, count: int, shard: int | None) -> tuple[int, int]:
        if shard is None:
            return 0, count
        return count * shard // self.shards, count * (shard + 1) // self.shards


def score_tasks(correct: Mapping[str, np.ndarray], references: Mapping[str, float] | None) -> list[TaskScore]:
    """Each task's accuracy, its standard error, and its share of the fine-tuned model's accuracy.

    Without ``references`` the scores are their own reference: these are the fine-tuned models.
    """
    scores = []
    for task, answers in correct.items():
        value, count = float(answers.mean()), len(answers)
        reference = references[task] if references else value
        scores.append(
            TaskScore(
                task=task,
                metric="accuracy",
                value=value,
                count=count,
                standard_error=math.sqrt(value * (1 - value) / count),
                reference=reference,
                normalized=value / reference if reference else None,
                correct=np.packbits(answers).tobytes(),
            )
        )
    return scores


def summarize(scores: list[TaskScore], objective: str) -> dict[str, Any]:
    """The ledger's columns for a list of task scores: means, the worst task, and the objective's value."""
    normalized = {score.task: score.normalized for score in scores if score.normalized is not None}
    worst = min(normalized, key=normalized.__getitem__) if normalized else None
    summary: dict[str, Any] = {
        "tasks": [asdict(score) for score in scores],
        "mean": float(np.mean([score.value for score in scores])),
        "normalized_mean": float(np.mean(list(normalized.values()))) if normalized else None,
        "worst_task": worst,
        "worst": normalized[worst] if worst is not None else None,
        "samples": sum(score.count for score in scores),
    }
    kind, _, task = objective.partition("/")
    if task:
        score = next(score for score in scores if score.task == task)
        summary["objective"] = score.normalized if kind == "normalized" else score.value
    else:
        summary["objective"] = summary[objective]
    return summary

"""Score a merged model on its tasks' splits, shard by shard.

Samples are taken in a fixed random order that depends on nothing but their number, so every candidate meets
the same samples in the same shards, and two candidates can be compared sample by sample.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merge_ray.families import Positions, Skeleton, TaskData
from merge_ray.methods.base import Merged, Predictor

References = Mapping[str, Mapping[str, float]]
"""The fine-tuned models' scores by task and domain: see :meth:`merge_ray.families.TaskData.domains`."""

CALIBRATION_SAMPLES = 512


@dataclass(frozen=True)
class TaskScore:
    """One task's score: ``value`` over ``count`` samples, and how it compares with the fine-tuned model's.

    reference: what one whole share of the fine-tuned model's score is worth: that score, or for losses how far the
    label average's is above it. correct: packed bits, one a sample in order; empty for metrics that are not of single
    samples. domains: ``domain`` and ``value`` of each, where the data are of several.
    """

    task: str
    metric: str
    value: float
    count: int
    standard_error: float
    reference: float
    normalized: float | None
    correct: bytes
    domains: list[dict[str, Any]]


class TaskModel:
    """One task's samples on a split and the skeleton that answers them with whatever weights it holds.

    What a method sees of a task that it declared to need (``unlabeled``), and what it answers through when it
    predicts sample by sample. Positions count in the fixed order of evaluation.
    """

    def __init__(self, task: str, split: str, skeleton: Skeleton, data: TaskData, batch_size: int) -> None:
        self.task, self.split, self.batch_size = task, split, batch_size
        self.skeleton, self.data = skeleton, data

    def __len__(self) -> int:
        return len(self.data)

    @property
    def flat(self) -> Tensor:
        """The weights ``[P]`` that answer; write here before asking."""
        return self.skeleton.flat

    @property
    def answers_by_logits(self) -> bool:
        """Whether outcomes are those of :meth:`logits`, and not of generated answers."""
        return type(self.data).outcomes is TaskData.outcomes

    def inputs(self, positions: Positions) -> Any:
        """What the skeleton takes for the samples at ``positions``."""
        return self.data.inputs(positions)

    def samples(self, positions: Positions) -> Any:
        """The samples as any other model takes them: see :meth:`merge_ray.families.TaskData.samples`."""
        return self.data.samples(positions)

    def logits(self, inputs: Any) -> Tensor:
        """Answers ``[B, C]`` to :meth:`inputs`, with a graph where gradients are enabled."""
        return self.data.logits(self.skeleton, inputs)

    def all_logits(self) -> Tensor:
        """Answers ``[N, C]`` to all samples, in batches and without a graph."""
        with torch.inference_mode():
            return torch.cat([self.logits(self.inputs(part)) for part in self.batches(0, len(self))])

    def outcomes(self, positions: Positions) -> Tensor:
        """What is kept of every answer: for accuracy, whether it is right, bool ``[B]``."""
        return self.data.outcomes(self.skeleton, positions)

    def average_outcomes(self, released: bool) -> Tensor:
        """See :meth:`merge_ray.families.TaskData.average_outcomes`."""
        return torch.from_numpy(self.data.average_outcomes(self.batch_size, released))

    def outcomes_of(self, logits: Tensor, positions: Positions) -> Tensor:
        """The outcomes of given logits ``[B, C]``."""
        return self.data.outcomes_of(logits, positions)

    def batches(self, start: int, stop: int) -> Iterator[slice]:
        """The positions from ``start`` to ``stop`` in batches."""
        for first in range(start, stop, self.batch_size):
            yield slice(first, min(first + self.batch_size, stop))


@dataclass(frozen=True)
class UnlabeledSamples:
    """What :attr:`merge_ray.methods.base.MergeInputs.unlabeled` gives: every task's samples on one split."""

    models: Mapping[str, TaskModel]

    def gradient(self) -> AbstractContextManager[Tensor]:
        """See :meth:`merge_ray.families.Skeleton.gradient`."""
        return next(iter(self.models.values())).skeleton.gradient()


@dataclass(frozen=True)
class CalibrationBatches:
    """So many unlabelled samples of each task in batches, made anew whenever they are gone through."""

    models: Sequence[TaskModel]
    samples: int

    def __iter__(self) -> Iterator[Any]:
        for model in self.models:
            yield from model.data.calibration_batches(model.batch_size, self.samples)


class Evaluator:
    """Scores merged weights through one skeleton.

    data: ``{split: {task: TaskData}}``. shards: how many parts each task's samples are scored in.
    calibration_samples: on how many samples statistics are made.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        data: Mapping[str, Mapping[str, TaskData]],
        batch_size: int,
        shards: int,
        calibration_samples: int = CALIBRATION_SAMPLES,
    ) -> None:
        self.skeleton = skeleton
        self.shards = shards
        self.calibration_samples = calibration_samples
        self.models = {
            split: {task: TaskModel(task, split, skeleton, part, batch_size) for task, part in parts.items()}
            for split, parts in data.items()
        }

    def of(self, tasks: Sequence[str]) -> Evaluator:
        """The same for some of the tasks alone, with the same skeleton and data."""
        part = copy.copy(self)
        part.models = {
            split: {task: model for task, model in models.items() if task in tasks}
            for split, models in self.models.items()
        }
        return part

    def calibration_batches(self, split: str) -> CalibrationBatches:
        """Unlabelled samples of all tasks, as many of each, as the skeleton takes them."""
        models = list(self.models[split].values())
        return CalibrationBatches(models, self.calibration_samples // len(models))

    def outcomes(
        self, merged: Merged, split: str, shard: int | None = None, share: int = 0, shares: int = 1
    ) -> dict[str, np.ndarray]:
        """For every task, what is kept of the answers to the shard's samples (to all samples, without a shard).

        share, shares: to the ``share``-th of so many equal runs of their batches, which stay the batches that they are.
        """
        if merged.shared:
            merged.write(next(iter(self.models[split])), self.skeleton.flat)
        return {task: self._outcomes(merged, model, shard, share, shares) for task, model in self.models[split].items()}

    def score(self, merged: Merged, task: str) -> float:
        """The metric of ``merged`` on all validation samples of ``task``."""
        model = self.models["val"][task]
        if merged.shared:
            merged.write(task, self.skeleton.flat)
        return model.data.score(self._outcomes(merged, model, None))[0]

    def summarize(
        self,
        outcomes: Mapping[str, np.ndarray],
        split: str,
        references: References | None,
        objective: str,
    ) -> dict[str, Any]:
        """The ledger's columns for the outcomes of every task; see :func:`score_tasks`."""
        data = {task: model.data for task, model in self.models[split].items()}
        return summarize(score_tasks(outcomes, data, references), objective)

    @torch.inference_mode()
    def _outcomes(
        self, merged: Merged, model: TaskModel, shard: int | None, share: int = 0, shares: int = 1
    ) -> np.ndarray:
        if isinstance(merged, Predictor):
            ask: Callable[[Positions], Tensor] = partial(merged.outcomes, model)
        else:
            if not merged.shared:
                merged.write(model.task, self.skeleton.flat)
            if merged.as_published:
                model.data.restore()
            else:
                model.data.settle(self.skeleton, model.batch_size, self.calibration_samples)
            ask = model.outcomes
        start, stop = self._bounds(len(model), shard)
        batches = list(model.batches(start, stop))
        first, last = (len(batches) * index // shares for index in (share, share + 1))
        parts = [ask(positions) for positions in batches[first:last]]
        return torch.cat(parts).cpu().numpy() if parts else np.zeros(0, dtype=bool)

    def _bounds(self, count: int, shard: int | None) -> tuple[int, int]:
        if shard is None:
            return 0, count
        return count * shard // self.shards, count * (shard + 1) // self.shards


def score_tasks(
    outcomes: Mapping[str, np.ndarray], data: Mapping[str, TaskData], references: References | None
) -> list[TaskScore]:
    """Each task's metric, its standard error, and its share of the fine-tuned model's.

    outcomes: of the first samples of each task's order. Without ``references`` the scores are their own reference:
    these are the fine-tuned models.
    """
    scores = []
    for task, kept in outcomes.items():
        value, error = data[task].score(kept)
        domains = data[task].domains(kept)
        normalized, reference = data[task].normalize(kept, references[task] if references else domains)
        scores.append(
            TaskScore(
                task=task,
                metric=data[task].metric,
                value=value,
                count=len(kept),
                standard_error=error,
                reference=reference,
                normalized=normalized,
                correct=np.packbits(kept).tobytes() if kept.dtype == bool else b"",
                domains=[{"domain": name, "value": item} for name, item in domains.items() if name],
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

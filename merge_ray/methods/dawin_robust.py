"""DaWin between the pre-trained model and one fine-tuned model, for robust fine-tuning."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merge_ray.bank import ModelBank
from merge_ray.methods.base import Merged, MergeInputs, Method, TaskModel, param, register
from merge_ray.methods.dawin import PAPER
from merge_ray.methods.entropies import model_entropy
from merge_ray.methods.mixtures import Mixture, fit_beta, fit_or_mean, kmeans_labels
from merge_ray.methods.per_sample import SampleWeights, TaskWeights
from merge_ray.space import Choice, Float, Int

RUNS = 3
CLOSEST = 1e-6
"""How near to 0 and 1 a coefficient may come in a Beta mixture, whose densities are open there."""


@register("dawin_robust", paper=PAPER, needs=("unlabeled",))
@dataclass(frozen=True)
class DawinRobust(Method):
    """``theta_0 + lambda(x) tau_t`` for sample ``x`` of task ``t``: between the base and the task's fine-tuned model.

    ``lambda(x) = (exp(-H_ft) + b / w) / (exp(-H_0) + exp(-H_ft) + b)`` with the entropies in nats of the two models'
    predictions at their temperatures. Without ``offset`` ``b = 0`` (the paper's pseudo-code); the authors' scripts use
    it: ``b`` is the mean of the two entropies' coefficients of variation over the unlabelled samples, and
    ``w = (mean H_0 + mean H_ft) / mean H_0``. Their temperatures (pre-trained, fine-tuned) are 0.9576, 0.9733 for
    ViT-B-32, 0.96, 1.0066 for ViT-B-16, 1.0767, 0.9545 for ViT-L-14.

    ``level: cluster`` fits a Beta mixture to the coefficients of a task's unlabelled samples and answers a sample with
    the mean of its component, ``task`` merges once with the mean of the components by their weights. In a bank of
    several tasks each has its own pair of models; ``wise_ft`` is the same with one coefficient for all samples.
    """

    level: str = param("sample", valid=Choice(("sample", "cluster", "task")), help="what has a coefficient of its own")
    clusters: int = param(3, valid=Int(1, 1000), search=Int(1, 5), help="components of a task's Beta mixture")
    temperature_base: float = param(
        1.0, valid=Float(0.01, 100), search=Float(0.5, 2.0, log=True), help="of the pre-trained model's prediction"
    )
    temperature_finetuned: float = param(
        1.0, valid=Float(0.01, 100), search=Float(0.5, 2.0, log=True), help="of the fine-tuned model's prediction"
    )
    offset: bool = param(False, valid=Choice((False, True)), help="shift coefficients by the entropies' spread")

    @property
    def by_sample(self) -> bool:
        """See :attr:`Method.by_sample`."""
        return self.level != "task"

    def merge(self, inputs: MergeInputs) -> Merged:
        """See :class:`DawinRobust`."""
        bank = inputs.bank
        if self.level == "sample":
            return SampleWeights(
                self, bank, lambda model, at: self._between(bank, model, self._shares(inputs, model)[at])
            )
        notes: list[str] = []
        mixtures = {}
        for task, model in inputs.unlabeled.models.items():
            samples = _open(self._shares(inputs, model))
            mixtures[task] = fit_or_mean(task, samples, lambda rows: self._fit(rows, inputs.seed), notes)
        if self.level == "task":
            rows = {
                task: torch.eye(len(bank.tasks))[bank.tasks.index(task)] * float(mixture.mean())
                for task, mixture in mixtures.items()
            }
            return TaskWeights(self, bank, rows, tuple(notes))

        def by_cluster(model: TaskModel, positions: Any) -> tuple[ModelBank, Tensor]:
            mixture = mixtures[model.task]
            clusters = mixture.assign(_open(self._shares(inputs, model)[positions]))
            return self._between(bank, model, torch.from_numpy(mixture.means[clusters]).float())

        return SampleWeights(self, bank, by_cluster, tuple(notes))

    def _shares(self, inputs: MergeInputs, model: TaskModel) -> Tensor:
        """``lambda`` ``[N]`` of all samples of ``model``."""
        base, finetuned = self._entropies(inputs, model)
        if not self.offset:
            return finetuned_share(base, finetuned)
        return finetuned_share(base, finetuned, *offset(*self._entropies(inputs, inputs.unlabeled.models[model.task])))

    def _entropies(self, inputs: MergeInputs, model: TaskModel) -> tuple[Tensor, Tensor]:
        return (
            model_entropy(inputs, model, None, self.temperature_base),
            model_entropy(inputs, model, model.task, self.temperature_finetuned),
        )

    def _between(self, bank: ModelBank, model: TaskModel, shares: Tensor) -> tuple[ModelBank, Tensor]:
        """The bank of the task's one fine-tuned model, and coefficients ``[B, 1]`` for it."""
        place = bank.tasks.index(model.task)
        rows = bank.task_vectors[place : place + 1]
        return dataclasses.replace(bank, tasks=(model.task,), task_vectors=rows), shares[:, None]

    def _fit(self, samples: np.ndarray, seed: int) -> Mixture:
        return fit_beta(samples, kmeans_labels(samples[:, None], self.clusters, RUNS, seed))


def finetuned_share(base: Tensor, finetuned: Tensor, shift: float = 0.0, ratio: float = 1.0) -> Tensor:
    """The fine-tuned model's coefficient ``[N]`` from both models' uncertainties: see :class:`DawinRobust`.

    shift, ratio: ``b`` and ``w``, from :func:`offset`.
    """
    weight_base, weight_finetuned = (-base).exp(), (-finetuned).exp()
    return (weight_finetuned + shift / ratio) / (weight_base + weight_finetuned + shift)


def offset(base: Tensor, finetuned: Tensor) -> tuple[float, float]:
    """``b`` and ``w`` of :class:`DawinRobust` from both models' uncertainties ``[N]`` over a whole stream."""
    shift = (base.std() / base.mean() + finetuned.std() / finetuned.mean()) / 2
    return float(shift), float((base.mean() + finetuned.mean()) / base.mean())


def _open(shares: Tensor) -> np.ndarray:
    """Coefficients strictly between 0 and 1."""
    return shares.clamp(CLOSEST, 1 - CLOSEST).numpy()

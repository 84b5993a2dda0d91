"""DaWin: merging coefficients for every sample, from how sure the fine-tuned models are of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merge_ray.bank import ModelBank
from merge_ray.methods.base import Merged, MergeInputs, Method, TaskModel, param, register
from merge_ray.methods.entropies import expert_entropies
from merge_ray.methods.mixtures import (
    Mixture,
    fit_dirichlet,
    fit_kmeans,
    fit_or_mean,
    fit_released_dirichlet,
    kmeans_labels,
)
from merge_ray.methods.per_sample import SampleWeights, TaskWeights
from merge_ray.space import Choice, Float, Int

RUNS = 5
PAPER = "Oh et al., DaWin: Training-free Dynamic Weight Interpolation for Robust Adaptation, ICLR 2025"


@register("dawin", paper=PAPER, needs=("unlabeled",))
@dataclass(frozen=True)
class Dawin(Method):
    """``theta_0 + prior T sum_t c_t(x) tau_t`` for sample ``x``, with ``c(x) = softmax_t(-H_t(x))`` ``[T]``.

    ``H_t(x)`` is the entropy in nats of fine-tuned model ``t``'s prediction, through the head of the task that ``x``
    belongs to. ``level: sample`` merges for every sample (the paper). ``cluster`` fits a mixture to the coefficients of
    a task's unlabelled samples and answers a sample with the mean of its component; ``task`` merges once a task with
    the mean of the components by their weights.

    The authors' code evaluates by task. Its mixture (``fit: released``) has a simplified M-step, always ``T``
    components, and a task's coefficients are those of component 0 alone, whatever its weight: on peaked coefficients
    it may be an empty one. By cluster it assigns samples with the parameters of the last run, not of the best. Its
    evaluation by sample stops with an error.

    A mixture that cannot be fitted gives way to the mean of the coefficients, with a note.
    """

    level: str = param("sample", valid=Choice(("sample", "cluster", "task")), help="what has coefficients of its own")
    prior: float = param(
        0.3, valid=Float(0, 10), search=Float(0.05, 1.0), help="the mean of a sample's merging coefficients"
    )
    mixture: str = param(
        "dirichlet", valid=Choice(("dirichlet", "kmeans")), help="what finds the clusters (by cluster and task)"
    )
    clusters: int = param(3, valid=Int(1, 1000), help="components of a task's mixture")
    fit: str = param(
        "sound",
        valid=Choice(("sound", "released")),
        help="the Dirichlet mixture: by maximum likelihood, or as in the authors' code",
    )

    @property
    def by_sample(self) -> bool:
        """See :attr:`Method.by_sample`."""
        return self.level != "task"

    def merge(self, inputs: MergeInputs) -> Merged:
        """See :class:`Dawin`."""
        bank = inputs.bank
        scale = self.prior * len(bank.tasks)
        if self.level == "sample":
            return SampleWeights(
                self,
                bank,
                lambda model, positions: (
                    bank,
                    scale * softmax_coefficients(expert_entropies(inputs, model)[positions]),
                ),
            )
        notes: list[str] = []
        mixtures = {}
        for task, model in inputs.unlabeled.models.items():
            samples = softmax_coefficients(expert_entropies(inputs, model)).numpy()
            mixtures[task] = fit_or_mean(task, samples, lambda rows: self._fit(rows, inputs.seed), notes)
        if self.level == "task":
            rows = {
                task: scale * torch.from_numpy(self._of_task(mixture)).float() for task, mixture in mixtures.items()
            }
            return TaskWeights(self, bank, rows, tuple(notes))

        def by_cluster(model: TaskModel, positions: Any) -> tuple[ModelBank, Tensor]:
            samples = softmax_coefficients(expert_entropies(inputs, model)[positions]).numpy()
            mixture = mixtures[model.task]
            return bank, scale * torch.from_numpy(mixture.means[mixture.assign(samples)]).float()

        return SampleWeights(self, bank, by_cluster, tuple(notes))

    def _fit(self, samples: np.ndarray, seed: int) -> Mixture:
        """The mixture of one task's coefficients ``[N, T]``."""
        if self.mixture == "kmeans":
            return fit_kmeans(samples, self.clusters, seed)
        if self.fit == "released":
            return fit_released_dirichlet(samples, kmeans_labels(samples, samples.shape[1], RUNS, seed))
        return fit_dirichlet(samples, kmeans_labels(samples, self.clusters, RUNS, seed))

    def _of_task(self, mixture: Mixture) -> np.ndarray:
        """A task's coefficients ``[T]``, sum 1."""
        if self.mixture == "dirichlet" and self.fit == "released":
            return mixture.means[0]
        return mixture.mean()


def softmax_coefficients(uncertainties: Tensor) -> Tensor:
    """Coefficients ``[..., T]`` of sum 1 from the models' uncertainties (entropies): the softmax of their negatives."""
    return (-uncertainties).softmax(dim=-1)

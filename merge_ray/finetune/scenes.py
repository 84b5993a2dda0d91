"""Train a Taskonomy network on one task, from random weights of its own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from merge_ray.families.taskonomy import TaskonomyFamily
from merge_ray.families.taskonomy_network import TaskonomyNetwork
from merge_ray.finetune.pupil import Pupil
from merge_ray.tasks import SceneSplit
from merge_ray.tasks.taskonomy_labels import Batch
from merge_ray.tasks.taskonomy_losses import mean_loss, sample_losses

EVALUATION_BATCH = 64


class ScenePupil(Pupil):
    """An encoder and a decoder whose random weights depend on ``seed`` and on the task."""

    metric = "loss"

    def __init__(
        self, family: TaskonomyFamily, train: SceneSplit, validation: SceneSplit, seed: int, device: str
    ) -> None:
        self.train, self.validation, self.device = train, validation, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.default_rng([seed, *train.task.encode()]).integers(2**31)))
            self.module = TaskonomyNetwork(family.encoder(), family.decoder(train.task)).to(device)

    def loss(self, rows: np.ndarray, step: int) -> Tensor:
        """See :meth:`Pupil.loss`."""
        batch = self.train.batch(rows, self.device)
        return training_losses(self.train.task, self.module(batch.images), batch).sum()

    @torch.inference_mode()
    def score(self) -> float:
        """The task's loss on the validation split; the lower, the better."""
        training = self.module.training
        self.module.eval()
        parts = []
        for start in range(0, len(self.validation), EVALUATION_BATCH):
            rows = np.arange(start, min(start + EVALUATION_BATCH, len(self.validation)))
            batch = self.validation.batch(rows, self.device)
            answers = self.module(batch.images)
            parts.append(sample_losses(self.validation.task, answers, batch.targets, batch.weights).cpu().numpy())
        self.module.train(training)
        return mean_loss(np.concatenate(parts))[0]

    def native_state(self) -> dict[str, Tensor]:
        """The whole network, its parts' names after ``encoder.`` and ``decoder.``."""
        return {name: tensor.detach() for name, tensor in self.module.state_dict().items()}


def training_losses(task: str, answers: Tensor, batch: Batch) -> Tensor:
    """What is minimised ``[B]``: the task's own loss, or for classes of pixels their cross entropy."""
    if task != "segment_semantic":
        return sample_losses(task, answers, batch.targets, batch.weights)[:, 0]
    assert batch.weights is not None
    losses = functional.cross_entropy(answers, batch.targets, reduction="none") * batch.weights
    return losses.sum(dim=(1, 2)) / batch.weights.sum(dim=(1, 2)).clamp(min=1)

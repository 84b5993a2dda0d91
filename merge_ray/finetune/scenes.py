"""Train a Taskonomy network on one task, from random weights of its own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from merge_ray.families.taskonomy import TaskonomyFamily
from merge_ray.families.taskonomy_network import TaskonomyNetwork
from merge_ray.finetune.pupil import Pupil
from merge_ray.tasks import SceneSplit
from merge_ray.tasks.taskonomy_labels import Batch
from merge_ray.tasks.taskonomy_losses import mean_loss, sample_losses

EVALUATION_BATCH = 64
AVERAGED = 256
"""Training samples whose mean label a new decoder starts from."""


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
        rows = np.linspace(0, len(train) - 1, min(len(train), AVERAGED)).astype(int)
        start_at_the_mean(self.module.decoder, train.batch(rows, device).targets)

    def loss(self, rows: np.ndarray, step: int) -> Tensor:
        """See :meth:`Pupil.loss`."""
        batch = self.train.batch(rows, self.device)
        # Convolutions of few channels are faster on CPUs where a pixel's channels lie side by side.
        images = batch.images.contiguous(memory_format=torch.channels_last)
        return training_losses(self.train.task, self.module(images), batch).sum()

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


def start_at_the_mean(decoder: nn.Module, targets: Tensor) -> None:
    """Set the bias of a new decoder's last convolution so that it answers with about the mean of ``targets``.

    Labels vary little about their mean in some tasks (log depths by a few hundredths), and a short training would
    spend most of its steps on reaching it. Decoders of logits stay as they are.
    """
    output = getattr(decoder, "decoder_output", None)
    if output is not None and isinstance(output[-1], nn.Tanh):
        means = targets.mean(dim=(0, 2, 3)).clamp(-0.95, 0.95)
        output[0].bias.data.copy_(torch.atanh(means))


def training_losses(task: str, answers: Tensor, batch: Batch) -> Tensor:
    """What is minimised ``[B]``: the task's own loss, or for classes of pixels their cross entropy."""
    if task != "segment_semantic":
        return sample_losses(task, answers, batch.targets, batch.weights)[:, 0]
    assert batch.weights is not None
    losses = functional.cross_entropy(answers, batch.targets, reduction="none") * batch.weights
    return losses.sum(dim=(1, 2)) / batch.weights.sum(dim=(1, 2)).clamp(min=1)

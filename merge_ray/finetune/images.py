"""Fine-tune an image tower; its zero-shot head stays frozen."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from merge_ray.families import ImageEncoder, ImageFamily
from merge_ray.finetune.pupil import Pupil
from merge_ray.tasks import CachedSplit, Task

EVALUATION_BATCH = 256


class ImagePupil(Pupil):
    """The image tower of ``base`` on a task, by the cross entropy of its zero-shot head's logits."""

    def __init__(
        self,
        family: ImageFamily,
        base: Mapping[str, Tensor],
        task: Task,
        train: CachedSplit,
        validation: CachedSplit,
        label_smoothing: float,
        device: str,
    ) -> None:
        self.module = self.encoder = family.image_encoder(base, device)
        self.head = family.head(base, task.classes, task.templates).to(device)
        self.train, self.validation, self.label_smoothing = train, validation, label_smoothing

    def loss(self, rows: np.ndarray, step: int) -> Tensor:
        """See :meth:`Pupil.loss`."""
        logits = self.encoder(torch.from_numpy(self.train.images[rows])) @ self.head.T
        labels = torch.from_numpy(self.train.labels[rows]).to(logits.device)
        return functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="sum")

    def score(self) -> float:
        """The validation accuracy."""
        return accuracy(self.encoder, self.validation, self.head)

    def native_state(self) -> dict[str, Tensor]:
        """See :meth:`Pupil.native_state`."""
        return self.encoder.native_state()


@torch.inference_mode()
def accuracy(encoder: ImageEncoder, split: CachedSplit, head: Tensor) -> float:
    """The share of a split's images whose largest logit is that of their label."""
    hits = 0
    for start in range(0, len(split.labels), EVALUATION_BATCH):
        rows = slice(start, start + EVALUATION_BATCH)
        logits = encoder(torch.from_numpy(np.array(split.images[rows]))) @ head.T
        hits += int((logits.argmax(dim=1).cpu() == torch.from_numpy(split.labels[rows])).sum())
    return hits / len(split.labels)

"""Make a base: contrastive training of both towers of a CLIP model on image-caption pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from merge_ray.families import ImageEncoder
from merge_ray.finetune.spec import PretrainSpec
from merge_ray.finetune.trainer import batch_rows
from merge_ray.tasks import CachedSplit


@dataclass(frozen=True)
class Captioned:
    """A task's training images with what their captions are made of."""

    split: CachedSplit
    classes: Sequence[str]
    templates: Sequence[str]


class PairStream:
    """Image-caption pairs over several tasks, the same for the same step.

    A pair is an image, a caption, and the number of the class that the caption names, counted over all tasks.
    """

    def __init__(self, tasks: Sequence[Captioned], spec: PretrainSpec, seed: int) -> None:
        self.tasks = tasks
        self.spec = spec
        self.seed = seed
        self.first_class = np.cumsum([0, *(len(task.classes) for task in tasks)])
        counts = [len(task.split.labels) for task in tasks]
        self.pairs = np.concatenate(
            [np.stack([np.full(count, index), np.arange(count)], axis=1) for index, count in enumerate(counts)]
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, step: int) -> tuple[Tensor, list[str], Tensor]:
        """Images uint8 ``[B, 3, S, S]``, captions and class numbers int64 ``[B]`` of a step."""
        rng = np.random.default_rng((self.seed, 1, step))
        images, captions, numbers = [], [], []
        for index, row in self.pairs[batch_rows(len(self.pairs), self.spec.batch_size, step, self.seed)]:
            task = self.tasks[index]
            label = int(task.split.labels[row])
            images.append(task.split.images[row])
            captions.append(str(rng.choice(task.templates)).format(task.classes[label]))
            numbers.append(self.first_class[index] + label)
        return self._disturb(np.stack(images), rng), captions, torch.tensor(np.array(numbers))

    def _disturb(self, images: np.ndarray, rng: np.random.Generator) -> Tensor:
        if self.spec.image_noise == 0:
            return torch.from_numpy(images)
        noise = rng.standard_normal(images.shape, dtype=np.float32) * (255 * self.spec.image_noise)
        return torch.from_numpy((images + noise).round().clip(0, 255).astype(np.uint8))


def contrastive_loss(
    model: Any, encoder: ImageEncoder, tokenize: Callable[[Sequence[str]], Tensor], stream: PairStream
) -> Callable[[int], Tensor]:
    """CLIP's symmetric loss as a function of the step.

    With few classes a batch holds many captions of one class; all pairs of a class count as matching, each
    with an equal share, instead of being pushed apart.
    """

    def loss(step: int) -> Tensor:
        images, captions, numbers = stream.batch(step)
        image_features = encoder(images)
        device = image_features.device
        text_features = model.encode_text(tokenize(captions).to(device), normalize=True)
        logits = model.logit_scale.exp() * image_features @ text_features.T
        matches = (numbers[:, None] == numbers[None, :]).float().to(device)
        targets = matches / matches.sum(dim=1, keepdim=True)
        return (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2

    return loss

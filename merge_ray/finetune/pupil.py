"""What a training on one task needs of what is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from merge_ray.checkpoints import write_safetensors


class Pupil(ABC):
    """A model in training on one task.

    module: what is trained; all of its parameters are. metric: what :meth:`score` is.
    """

    metric: str = "accuracy"
    module: nn.Module

    @abstractmethod
    def loss(self, rows: np.ndarray, step: int) -> Tensor:
        """The sum of the losses of the training samples ``rows``; the same for the same weights and step."""

    @abstractmethod
    def score(self) -> float:
        """The task's metric on the validation split."""

    @abstractmethod
    def native_state(self) -> dict[str, Tensor]:
        """The trained tensors under the family's native names."""

    def write(self, path: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
        """Save what was trained."""
        write_safetensors(path, as_saved(self.native_state(), dtype), metadata)


def as_saved(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point tensors in ``dtype``, others as they are."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}

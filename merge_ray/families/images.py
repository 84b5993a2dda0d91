"""Families of image encoders: from cached images to features, and to the answers of a classification head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from merge_ray.bank import Layout
from merge_ray.errors import CheckpointError, SpecError
from merge_ray.families.base import (
    Family,
    Positions,
    Skeleton,
    TaskData,
    evaluation_order,
    find_family,
    fit_weights,
)
from merge_ray.matching import PermutationGroups, derive_groups
from merge_ray.tasks import CachedSplit, PreparedSplit, Task


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the model sees it.

    ``size`` and ``interpolation`` (the shorter side is resized, then the centre cropped) are applied once,
    when a task's images are decoded into the cache; ``mean`` and ``std``, of pixels scaled to [0, 1], are
    applied on the device.
    """

    size: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def key(self) -> str:
        """What names a cache of decoded images: only what changes the cached bytes."""
        return f"{self.size}-{self.interpolation}"


class ImageEncoder(nn.Module):
    """An image tower with its preprocessing: from cached images to features.

    prefix: what the family's native names put before the tower's own.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, tower: nn.Module, preprocessing: Preprocessing, device: torch.device | str, prefix: str) -> None:
        super().__init__()
        self.tower = tower.to(device)
        self.prefix = prefix
        mean = torch.tensor(preprocessing.mean, device=device).view(1, 3, 1, 1)
        std = torch.tensor(preprocessing.std, device=device).view(1, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, D]`` of length one for ``images`` uint8 ``[B, 3, S, S]``, on any device."""
        return nn.functional.normalize(self.tower(self.prepare(images)), dim=-1)

    def prepare(self, images: Tensor) -> Tensor:
        """What the tower takes, float32 ``[B, 3, S, S]``, of ``images`` uint8, on any device."""
        return images.to(self.scale.device, non_blocking=True).float().mul_(self.scale).add_(self.shift)

    def native_state(self) -> dict[str, Tensor]:
        """The tower's tensors under the family's native names."""
        return {self.prefix + name: tensor.detach() for name, tensor in self.tower.state_dict().items()}


class ImageSkeleton(ImageEncoder, Skeleton):
    """An image encoder whose merged parameters live in one flat buffer.

    ``flat`` ``[P]`` float32 is laid out by ``layout``: writing into it changes the model at once, without
    a state dict. Tensors of the tower that the layout lacks come from ``extras``. Tensors of the layout
    that the tower lacks (a text tower) only take their place in ``flat``.

    Raises :class:`CheckpointError` when a tensor of the tower is in neither, or has another shape.
    """

    def __init__(
        self,
        tower: nn.Module,
        preprocessing: Preprocessing,
        layout: Layout,
        extras: Mapping[str, Tensor],
        device: torch.device | str,
        prefix: str,
    ) -> None:
        flat = torch.zeros(layout.size, device=device)
        views = layout.views(flat)
        load_tower(tower, {**extras, **views}, prefix, device)
        super().__init__(tower.eval().requires_grad_(False), preprocessing, device, prefix)
        self.layout = layout
        self.flat = flat


def load_tower(tower: nn.Module, state: Mapping[str, Tensor], prefix: str, device: torch.device | str) -> None:
    """Give ``tower`` the tensors of ``state`` whose names are its own after ``prefix``; see :func:`fit_weights`."""
    tower.load_state_dict(fit_weights(tower.state_dict(), state, device, prefix), assign=True)


class ImageData(TaskData):
    """Images uint8 ``[N, 3, S, S]`` with labels ``[N]`` and a head ``[C, D]``.

    On an accelerator the images are copied there once; on a CPU they stay in the memory-mapped cache.
    """

    def __init__(self, split: CachedSplit, head: Tensor, device: torch.device, max_samples: int | None) -> None:
        self.order = evaluation_order(len(split.labels), max_samples)
        self.labels = torch.from_numpy(split.labels[self.order]).to(device)
        self.head = head.to(device)
        self._images = split.images
        self._resident = torch.from_numpy(split.images[self.order]).to(device) if device.type != "cpu" else None

    def inputs(self, positions: Positions) -> Tensor:
        """The images at ``positions``, uint8 ``[B, 3, S, S]``."""
        if self._resident is not None:
            return self._resident[positions]
        return torch.from_numpy(self._images[self.order[positions]])

    def logits(self, skeleton: Skeleton, inputs: Tensor) -> Tensor:
        """Cosine similarities with the head's rows ``[B, C]``, the head's scale included."""
        return skeleton(inputs) @ self.head.T


class ImageFamily(Family):
    """A family whose skeleton is an image encoder, scored through one head a task."""

    needs_heads = True

    @property
    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """How images are prepared for this architecture."""

    @abstractmethod
    def image_encoder(self, state: Mapping[str, Tensor], device: torch.device | str) -> ImageEncoder:
        """An image encoder with weights of its own, copied from ``state`` (native names), to be trained."""

    @abstractmethod
    def head(
        self,
        base_state: Mapping[str, Tensor],
        classes: Sequence[str],
        templates: Sequence[str],
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """A zero-shot head ``[C, D]`` float32: logits are ``features @ head.T``.

        ``progress(done, total)`` counts prompts.
        """

    def read_head(self, task: Task, state: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`Family.read_head` and :func:`head_from_state`."""
        head = head_from_state(state)
        if len(head) != len(task.classes):
            raise CheckpointError(f"the head of {task.name} has {len(head)} classes, the task has {len(task.classes)}")
        return head

    def open_split(
        self, task: Task, split: str, cache: Path, progress: Callable[[int, int, str], None] | None = None
    ) -> CachedSplit:
        """See :meth:`Family.open_split`: images decoded for this family's preprocessing."""
        return task.cached(split, self.preprocessing.size, self.preprocessing.interpolation, cache, progress)

    def resident_bytes(self, split: PreparedSplit, max_samples: int | None) -> int:
        """The images."""
        return min(len(split), max_samples or len(split)) * 3 * self.preprocessing.size**2

    def permutation_groups(self, skeleton: Skeleton) -> PermutationGroups:
        """See :meth:`Family.permutation_groups`: followed through the tower."""
        assert isinstance(skeleton, ImageSkeleton)
        example = torch.zeros(1, 3, self.preprocessing.size, self.preprocessing.size, device=skeleton.flat.device)
        return derive_groups(skeleton.tower, example, prefix=skeleton.prefix, path="tower.")

    def task_data(
        self, split: PreparedSplit, head: Tensor | None, device: torch.device, max_samples: int | None
    ) -> TaskData:
        """See :meth:`Family.task_data`."""
        assert head is not None and isinstance(split, CachedSplit)
        return ImageData(split, head, device, max_samples)


def find_image_family(name: str, architecture: str) -> ImageFamily:
    """The family ``name``, which must be one of image encoders; raises :class:`SpecError`."""
    family = find_family(name, architecture)
    if not isinstance(family, ImageFamily):
        raise SpecError(f"the family {name!r} has no image encoder")
    return family


def head_from_state(state: Mapping[str, Tensor]) -> Tensor:
    """The head ``[C, D]`` float32 in the weights of a saved one (task_vectors' ``head_<Dataset>.pt``).

    Raises :class:`CheckpointError` when there is not exactly one matrix, or a bias that is not zero.
    """
    matrices = [name for name, tensor in state.items() if tensor.ndim == 2]
    if len(matrices) != 1:
        raise CheckpointError(f"a saved head has one weight matrix [classes, features]; this one has {matrices}")
    biases = [name for name, tensor in state.items() if name.endswith("bias") and tensor.count_nonzero()]
    if biases:
        raise CheckpointError(f"a zero-shot head has no bias; {biases[0]!r} of this one is not zero")
    return state[matrices[0]].float()

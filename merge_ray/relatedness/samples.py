"""The reference samples on which models are compared: images as they are, or mixed by CutMix."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from merge_ray.errors import DataError
from merge_ray.families import Preprocessing
from merge_ray.tasks import TaskSpec, open_task, prepare_scenes
from merge_ray.tasks.decode import decode
from merge_ray.tasks.source import IMAGE_SUFFIXES
from merge_ray.tasks.taskonomy_labels import IMAGE


class SamplesSpec(BaseModel):
    """The images of some tasks, or the image files of a folder or glob."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: list[TaskSpec] = []
    """``count`` is shared evenly between them, and the images are put into a random order."""
    split: Literal["train", "val", "test"] = "val"
    files: str | None = None
    """A folder, searched with all below it, or a glob; in sorted order. Of more images ``count`` are drawn."""
    count: int = Field(1000, ge=2)
    size: int | None = Field(None, ge=1)
    """The side of the images in pixels, for architectures that take any (the paper: 128); else the architecture's."""
    mix: Literal["none", "cutmix"] = "none"
    mix_batch: int = Field(8, ge=2)
    """CutMix mixes the images of consecutive batches of this size among themselves."""
    mix_beta: float = Field(1.0, gt=0)
    """The share of an image that is kept comes from Beta(mix_beta, mix_beta)."""
    seed: int = Field(0, ge=0)

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> SamplesSpec:
        if bool(self.tasks) == (self.files is not None):
            raise ValueError("give either 'tasks' or 'files'")
        return self


def make_samples(spec: SamplesSpec, preprocessing: Preprocessing, cache: Path) -> Tensor:
    """The samples, uint8 ``[count, 3, S, S]``. Raises :class:`DataError` where there are too few images."""
    generator = np.random.default_rng(spec.seed)
    size = spec.size or preprocessing.size
    if spec.files is not None:
        images = _from_files(spec.files, spec.count, size, preprocessing.interpolation, generator)
    else:
        images = _from_tasks(spec, size, preprocessing.interpolation, cache, generator)
    if spec.mix == "cutmix":
        images = cutmix(images, spec.seed, spec.mix_batch, spec.mix_beta)
    return images


def cutmix(
    images: Tensor, seed: int, batch_size: int = 8, beta: float = 1.0, partners: Sequence[Tensor] | None = None
) -> Tensor:
    """CutMix (Yun et al., arXiv:1905.04899) of images ``[N, C, H, W]``, without labels, as ModelGiF's authors use it.

    In every batch of ``batch_size`` consecutive images a random one shows in a box, the same for the batch, through
    each image. The box covers 1 - Beta(``beta``, ``beta``) of the area before it is cut at the border.

    partners: per batch whose pixels are in each image's box, int64 ``[n]``; by default a permutation drawn from torch's
    generator with ``seed``. The boxes are drawn from numpy's legacy generator with ``seed``.
    """
    boxes, permutations = np.random.RandomState(seed), torch.Generator().manual_seed(seed)
    height, width = images.shape[2:]
    mixed = images.clone()
    for number, batch in enumerate(mixed.split(batch_size)):
        side = np.sqrt(1 - boxes.beta(beta, beta))
        rows, columns = (
            _around(int(boxes.randint(extent)), int(side * extent) // 2, extent) for extent in (height, width)
        )
        order = torch.randperm(len(batch), generator=permutations) if partners is None else partners[number]
        batch[:, :, rows, columns] = batch[order][:, :, rows, columns]
    return mixed


def _around(centre: int, half: int, extent: int) -> slice:
    return slice(max(0, centre - half), min(extent, centre + half))


def _from_tasks(
    spec: SamplesSpec, size: int, interpolation: str, cache: Path, generator: np.random.Generator
) -> Tensor:
    shares = [len(part) for part in np.array_split(np.arange(spec.count), len(spec.tasks))]
    parts = []
    for task, share in zip(spec.tasks, shares, strict=True):
        images = _task_images(task, spec.split, size, interpolation, cache)
        if len(images) < share:
            raise DataError(
                f"samples: task {task.name!r} has {len(images)} images in its {spec.split} split; its share is {share}"
            )
        parts.append(images[np.sort(generator.choice(len(images), share, replace=False))])
    return torch.from_numpy(np.concatenate(parts)[generator.permutation(spec.count)])


def _task_images(task: TaskSpec, split: str, size: int, interpolation: str, cache: Path) -> np.ndarray:
    """uint8 ``[N, 3, size, size]``."""
    opened = open_task(task)
    if task.taskonomy is not None:
        return prepare_scenes(opened, split, size, cache, labels=False).layers[IMAGE]
    return opened.cached(split, size, interpolation, cache).images


def _from_files(location: str, count: int, size: int, interpolation: str, generator: np.random.Generator) -> Tensor:
    root = Path(location).expanduser()
    found = root.rglob("*") if root.is_dir() else map(Path, glob.glob(str(root), recursive=True))
    paths = sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(paths) < count:
        raise DataError(f"samples: {len(paths)} images at {location}; {count} are wanted")
    chosen = [paths[index] for index in np.sort(generator.choice(len(paths), count, replace=False))]
    return torch.from_numpy(np.stack([_read(path, size, interpolation) for path in chosen]))


def _read(path: Path, size: int, interpolation: str) -> np.ndarray:
    try:
        return decode(path.read_bytes, size, interpolation).pixels
    except Exception as error:  # Pillow raises many kinds for broken files
        raise DataError(f"samples: {path} cannot be read: {error}") from error

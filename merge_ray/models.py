"""From a spec's locations to the bank and the heads that a sweep works with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from merge_ray.bank import ModelBank, digest
from merge_ray.candidate import fingerprint_of
from merge_ray.checkpoints import is_adapter, read_finetuned, read_weights, write_safetensors
from merge_ray.errors import CheckpointError
from merge_ray.families import Family, ImageFamily, TaskData
from merge_ray.progress import Progress
from merge_ray.spec import EvaluationSpec, ModelsSpec
from merge_ray.tasks import Task, TaskSpec, cache_directory, open_task


def load_bank(models: ModelsSpec, tasks: Sequence[str], progress: Progress) -> tuple[ModelBank, dict[str, Tensor]]:
    """Read the base and the fine-tuned models; returns the bank and the base's state dict in native names.

    One fine-tuned model is in memory at a time. Where all of them are LoRA adapters, the bank holds only what these
    change; beside full weights an adapter is completed from the base. Raises :class:`CheckpointError` naming the file
    or the tensors.
    """
    family = models.open_family()
    base = {} if models.base is None else family.rename(read_weights(models.base))
    locations = {task: models.finetuned_location(task) for task in tasks}
    unchanged = {} if all(map(is_adapter, locations.values())) else base
    sources = {task: partial(_read, family, location, base, unchanged) for task, location in locations.items()}
    dtype = None if models.dtype == "auto" else getattr(torch, models.dtype)
    with progress.counted("read the models") as update:
        return ModelBank.build(base if models.base else None, sources, update, dtype), base


def _read(
    family: Family, location: str, base: Mapping[str, Tensor], unchanged: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    if is_adapter(location):
        return {**unchanged, **read_finetuned(location, base)}
    return family.rename(read_weights(location))


def open_task_data(
    family: Family,
    task: TaskSpec,
    split: str,
    head: Tensor | None,
    evaluation: EvaluationSpec,
    device: torch.device,
    cache: Path,
) -> TaskData:
    """A task's split on ``device`` as the spec has it scored: validation data cut to ``max_samples``, others whole.

    head: as :meth:`merge_ray.families.Family.read_head` gives it, for families that need one.
    """
    opened = open_task(task)
    limit = evaluation.max_samples if split == "val" else None
    data = family.task_data(family.open_split(opened, split, cache), head, device, limit)
    if not family.has_base:
        data.calibration = family.open_images(opened, "train", cache)
        data.average = evaluation.batch_size, evaluation.released_average
    return data


def make_heads(
    models: ModelsSpec, tasks: Sequence[Task], base: Mapping[str, Tensor], progress: Progress
) -> dict[str, np.ndarray]:
    """Every task's head, float32: read where the spec names it, or ``[C, D]`` made by the base's text tower.

    Empty for families without heads. Raises :class:`CheckpointError` where there is neither.
    """
    family = models.open_family()
    if not family.needs_heads:
        return {}
    text_tower: dict[str, str] = {}
    if isinstance(family, ImageFamily):
        image_tower = family.tower(base)
        text_tower = {name: digest(tensor) for name, tensor in base.items() if name not in image_tower}
    heads = {}
    for task in tasks:
        if location := models.head_location(task.name):
            heads[task.name] = family.read_head(task, read_weights(location)).numpy()
        elif isinstance(family, ImageFamily):
            heads[task.name] = _zero_shot_head(family, base, task, text_tower, progress).numpy()
        else:
            raise CheckpointError(f"{task.name}: the family {family.name!r} needs its saved head; give models.heads")
    return heads


def _zero_shot_head(
    family: ImageFamily, base: Mapping[str, Tensor], task: Task, text_tower: Mapping[str, str], progress: Progress
) -> Tensor:
    """The head from the text tower, from the cache if it was made before from the same tower and prompts."""
    key = fingerprint_of([family.name, family.architecture, dict(text_tower), list(task.classes), list(task.templates)])
    path = cache_directory() / "heads" / f"{key}.safetensors"
    if path.exists():
        return read_weights(path)["weight"]
    with progress.counted(f"zero-shot head of {task.name}") as update:
        head = family.head(base, task.classes, task.templates, update)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, {"weight": head}, {"task": task.name})
    return head

"""FinetuneSpec: what a fine-tuning YAML may say, typed and checked."""

from __future__ import annotations

import math
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from merge_ray.checkpoints.s3 import S3Settings
from merge_ray.errors import choose_from
from merge_ray.families import find_family
from merge_ray.results import LocalDirectory
from merge_ray.tasks import TaskSpec


class Recipe(BaseModel):
    """How to train: AdamW, with a learning rate that warms up linearly and then follows half a cosine to zero."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    warmup_steps: int = Field(500, ge=0)
    """At most a fifth of all steps, so that short runs still train at full rate."""
    batch_size: int = Field(128, ge=1)
    """Samples a step, over all workers together."""
    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    """Passes over the training data; either this or ``steps``."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    max_gradient_norm: float = Field(1.0, gt=0)

    @pydantic.model_validator(mode="after")
    def _one_length(self) -> Recipe:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either 'steps' or 'epochs'")
        return self

    def count_steps(self, samples: int) -> int:
        """The optimiser steps of a training on ``samples`` samples."""
        return self.steps or math.ceil((self.epochs or 0) * samples / self.batch_size)


class PretrainSpec(Recipe):
    """Training that makes a base where there is none.

    CLIP: contrastive training of both towers on image-caption pairs. Captions are the tasks' templates filled with the
    class names; images are the tasks' training images.

    Flan-T5: all tasks' training texts with the words of their labels, mixed. An architecture without a tokenizer gets
    one of its ``vocab_size`` from these texts; it is saved in the output beside the config.
    """

    image_noise: float = Field(0.0, ge=0, le=1)
    """CLIP: the standard deviation of noise on the images, as a share of the pixels' range.

    A base that knows only noisy images is mediocre on clean ones, as a large model is on tasks that are far
    from what it was trained on; part of what fine-tuning then adds is common to all tasks.
    """
    token_noise: float = Field(0.0, ge=0, le=1)
    """Flan-T5: the share of the inputs' tokens that are replaced by random ones, to the same end."""


class LoraSpec(BaseModel):
    """Train low-rank factors of some linear layers instead of all weights (arXiv:2106.09685)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    """The factors' product counts ``alpha / rank``."""
    targets: list[str] = Field(["q", "v"], min_length=1)
    """The last names of the layers."""


class FinetuneSpec(Recipe):
    """Fine-tune one model per task from a common base; the zero-shot heads of image models stay frozen.

    Taskonomy's networks have no base: each is trained from random weights of its own.

    The recipe's fields hold for every task; ``overrides`` replaces some of them for a task.
    """

    name: str
    output: LocalDirectory
    """The directory for ``base.safetensors``, ``<task>.safetensors`` (with ``lora``: peft's ``<task>/``) and
    ``finetune.json``."""
    family: str = "clip"
    architecture: str
    base: str | None = None
    """The location of the base's weights; either this or ``pretrain``, but for Taskonomy."""
    pretrain: PretrainSpec | None = None
    lora: LoraSpec | None = None
    tasks: list[TaskSpec] = Field(min_length=1)
    overrides: dict[str, dict[str, Any]] = {}
    seed: int = Field(0, ge=0)
    checkpoint_every: int = Field(200, ge=1)
    """Steps between checkpoints; a killed run loses at most these."""
    dtype: Literal["float32", "float16"] = "float32"
    """What weights are saved in."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    s3: S3Settings = S3Settings()
    """Where the spec's ``s3://`` locations are, as far as the environment does not say it."""

    @pydantic.model_validator(mode="after")
    def _parts_fit(self) -> FinetuneSpec:
        family = find_family(self.family, self.architecture)
        if self.lora is not None and self.family != "flan_t5":
            raise ValueError(f"lora: only flan_t5 is trained so, not {self.family}")
        if not family.has_base and not self.base is self.pretrain is None:
            raise ValueError(f"{self.family} models have no common base; leave out 'base' and 'pretrain'")
        if family.has_base and (self.base is None) == (self.pretrain is None):
            raise ValueError("give either 'base', the location of its weights, or 'pretrain', to make one")
        names = [task.name for task in self.tasks]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"tasks: named twice: {', '.join(doubled)}")
        if "base" in names:
            raise ValueError("tasks: no task can be called 'base', the name of the base's file")
        for task, override in self.overrides.items():
            if task not in names:
                raise ValueError(f"overrides: no task {task!r}; {choose_from(task, names)}")
            if unknown := sorted(set(override) - set(Recipe.model_fields)):
                raise ValueError(
                    f"overrides.{task}: unknown key {unknown[0]!r}; {choose_from(unknown[0], Recipe.model_fields)}"
                )
            self.recipe(task)
        return self

    def recipe(self, task: str) -> Recipe:
        """The recipe for ``task``, its overrides included."""
        override = self.overrides.get(task, {})
        common = {name: getattr(self, name) for name in Recipe.model_fields}
        if {"steps", "epochs"} & set(override):
            common |= {"steps": None, "epochs": None}
        return Recipe.model_validate({**common, **override})

    def task(self, name: str) -> TaskSpec:
        """The spec of the task called ``name``."""
        return next(task for task in self.tasks if task.name == name)

"""RelatednessSpec: what a relatedness YAML may say, typed and checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from merge_ray.checkpoints.s3 import S3Settings
from merge_ray.families import find_family
from merge_ray.relatedness.correlation import find_reference
from merge_ray.relatedness.distances import Distance, Steps
from merge_ray.relatedness.fields import FieldSpec
from merge_ray.relatedness.samples import SamplesSpec
from merge_ray.results import LocalDirectory

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class RelatednessSpec(BaseModel):
    """Which models are compared, on which samples, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    results: LocalDirectory = Path("results")
    family: str = "clip"
    architecture: str
    models: dict[str, str] | str
    """The location of every model's weights by name; or one location with ``{task}``, for each of ``tasks``."""
    tasks: list[str] = []
    samples: SamplesSpec
    field: FieldSpec = FieldSpec()
    distance: Distance = "cosine"
    steps: Steps = "all"
    """Which steps of the fields are compared."""
    correlate_with: str | None = None
    """``published`` (Taskonomy's affinities), or a CSV or Parquet file: a column of names, and a column for each."""
    batch_size: int = Field(128, ge=1)
    """Points of paths that the network sees at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    s3: S3Settings = S3Settings()
    """Where the spec's ``s3://`` locations are, as far as the environment does not say it."""

    @pydantic.field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, value: str) -> str:
        if not FILE_NAME.fullmatch(value):
            raise ValueError("a name is made of letters, digits, '_', '.' and '-', and starts with a letter or digit")
        return value

    @pydantic.model_validator(mode="after")
    def _parts_fit(self) -> RelatednessSpec:
        find_family(self.family, self.architecture)
        if isinstance(self.models, str) and ("{task}" not in self.models or not self.tasks):
            raise ValueError("models: map names to locations, or give one location with {task} and a list of 'tasks'")
        if not isinstance(self.models, str) and self.tasks:
            raise ValueError("tasks: 'models' names its models itself; leave this out")
        if doubled := sorted({name for name in self.tasks if self.tasks.count(name) > 1}):
            raise ValueError(f"tasks: named twice: {', '.join(doubled)}")
        names = list(self.locations)
        if len(names) < 2:
            raise ValueError("models: at least two are needed")
        if wrong := [name for name in names if not FILE_NAME.fullmatch(name)]:
            raise ValueError(f"models: {wrong[0]!r} cannot be the name of a file")
        if self.correlate_with is not None:
            find_reference(self.correlate_with, names)
        return self

    @property
    def locations(self) -> dict[str, str]:
        """The models' locations by name, in order."""
        if isinstance(self.models, str):
            return {task: self.models.replace("{task}", task) for task in self.tasks}
        return self.models

    @property
    def directory(self) -> Path:
        """Where everything that is made goes."""
        return self.results / self.name

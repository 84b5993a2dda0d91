"""TaskSpec: what a sweep's YAML says about one task."""

from __future__ import annotations

import re
from string import Formatter
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from merge_ray.errors import choose_from
from merge_ray.tasks.builtin import BUILTIN_TASKS, TEXT_TASKS
from merge_ray.tasks.facts import GLUE_TASKS, PAPER_TASKS
from merge_ray.tasks.source import Split
from merge_ray.tasks.torchvision_sets import TORCHVISION_SETS

SOURCES = ("builtin", "parquet", "torchvision", "image_folder", "taskonomy")


class TaskSpec(BaseModel):
    """One task: where its images or texts are, how they are split, and the words for its answers.

    A bare string stands for a built-in task (``digits``) or for one of the papers' sets in torchvision (``MNIST``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    builtin: str | None = None
    parquet: str | dict[Split, str] | None = Field(
        default=None,
        description="a Parquet file, directory, glob, hf://datasets/ or s3:// location, any of these with {split} in "
        "it, or one per split; what names no split is divided into train, val and test",
    )
    torchvision: str | None = None
    image_folder: str | None = Field(default=None, description="a directory root/{train,val,test}/class or root/class")
    taskonomy: str | None = Field(
        default=None, description="the directory of taskonomy_data/<building>/<folder>, or builtin:rooms"
    )
    buildings: dict[Split, list[str]] | None = Field(
        default=None, description="the buildings of each split; batch norm is reset on those of train"
    )
    label: str | None = Field(default=None, description="which of Taskonomy's labels, if the name does not say it")
    class_weights: list[float] | None = Field(
        default=None, min_length=17, max_length=17, description="how much pixels of each class count, segment_semantic"
    )
    root: str = Field(default="data", description="where torchvision's data sets are")
    download: bool = Field(default=False, description="let torchvision download what root lacks")
    image_column: str = "image"
    label_column: str = "label"
    classes: list[str] | None = Field(default=None, min_length=2, description="words for the prompts, in label order")
    templates: list[str] | None = Field(default=None, min_length=1, description="prompts, with {} for the class")
    prompt: str | None = Field(
        default=None, description="what a text model is asked, with {column} for columns and {options} for the classes"
    )
    answer: Literal["score", "generate"] = Field(
        default="score", description="take the likeliest of the classes, or what a text model writes"
    )
    train_size: PositiveInt | None = Field(default=None, description="keep a fixed random subset of this size")
    val_size: PositiveInt | None = Field(default=None, description="cut so many from train, or keep so many")
    test_size: PositiveInt | None = Field(default=None, description="keep (or, of an undivided set, cut) so many")
    val_seed: int = Field(default=0, ge=0, description="the seed of every cut and subset")

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value in BUILTIN_TASKS or value in TEXT_TASKS:
            return {"name": value, "builtin": value}
        if value in TORCHVISION_SETS:
            return {"name": value, "torchvision": value}
        if value in GLUE_TASKS:
            raise ValueError(f"{value} is a text task: give its parquet")
        if value in PAPER_TASKS:
            raise ValueError(f"torchvision does not have {value}: give its parquet or image_folder")
        raise ValueError(f"unknown task {value!r}: {choose_from(value, [*BUILTIN_TASKS, *TEXT_TASKS, *PAPER_TASKS])}")

    @model_validator(mode="after")
    def _one_source(self) -> TaskSpec:
        given = [source for source in SOURCES if getattr(self, source) is not None]
        if len(given) != 1:
            found = f"found {' and '.join(given)}" if given else "found none"
            raise ValueError(f"task {self.name!r} needs exactly one of {', '.join(SOURCES)}; {found}")
        return self

    @field_validator("builtin")
    @classmethod
    def _known_builtin(cls, value: str | None) -> str | None:
        return _known(value, "built-in task", {**BUILTIN_TASKS, **TEXT_TASKS})

    @field_validator("torchvision")
    @classmethod
    def _known_torchvision(cls, value: str | None) -> str | None:
        return _known(value, "torchvision data set", TORCHVISION_SETS)

    @field_validator("image_folder", "taskonomy", "root")
    @classmethod
    def _on_this_machine(cls, value: str | None) -> str | None:
        if value is not None and value.startswith("s3://"):
            raise ValueError("files of their own are read from a directory on this machine; of S3, only parquet")
        return value

    @field_validator("parquet")
    @classmethod
    def _some_split(cls, value: str | dict[Split, str] | None) -> str | dict[Split, str] | None:
        if isinstance(value, dict) and not value:
            raise ValueError("give the location of at least one split")
        return value

    @field_validator("classes")
    @classmethod
    def _distinct(cls, value: list[str] | None) -> list[str] | None:
        twice = sorted({name for name in value or [] if (value or []).count(name) > 1})
        if twice:
            raise ValueError(f"class names must differ; given more than once: {', '.join(map(repr, twice))}")
        return value

    @field_validator("prompt")
    @classmethod
    def _only_columns(cls, value: str | None) -> str | None:
        try:
            names = [name for _, name, _, _ in Formatter().parse(value or "{a}") if name is not None]
        except ValueError as error:
            raise ValueError(f"a prompt has {{column}} for columns and no other brace: {error}") from None
        if not names or not all(name.isidentifier() for name in names):
            raise ValueError(f"a prompt names columns in braces, such as {{text}}; found {value!r}")
        return value

    @field_validator("templates")
    @classmethod
    def _one_gap(cls, value: list[str] | None) -> list[str] | None:
        for template in value or []:
            if template.count("{}") != 1 or re.search("[{}]", template.replace("{}", "")):
                raise ValueError(f"a template has one {{}}, for the class name, and no other brace; found {template!r}")
        return value


def _known(value: str | None, what: str, names: dict[str, Any]) -> str | None:
    if value is not None and value not in names:
        raise ValueError(f"unknown {what} {value!r}: {choose_from(value, names)}")
    return value

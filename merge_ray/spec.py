"""SweepSpec: what a sweep's YAML may say, typed and checked, all mistakes reported at once."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, PlainSerializer

from merge_ray.errors import choose_from
from merge_ray.evaluate import CALIBRATION_SAMPLES
from merge_ray.families import Family, find_family
from merge_ray.methods.base import check_parameter, find_method, parameter_fields
from merge_ray.results import results_at
from merge_ray.s3 import S3Settings
from merge_ray.space import Choice, Float, Int, PerTask, Space
from merge_ray.tasks import TaskSpec

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def _file_name(value: str) -> str:
    if not NAME.fullmatch(value):
        raise ValueError("a name is made of letters, digits, '_', '.' and '-', and starts with a letter or digit")
    return value


class Strict(BaseModel):
    """A part of a spec: unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelsSpec(Strict):
    """The models to merge. Locations may hold ``{task}``; a mapping gives one location a task."""

    family: str = "clip"
    architecture: str
    base: str | None = None
    """Left out for families whose models have none in common."""
    finetuned: str | dict[str, str]
    heads: str | dict[str, str] | None = None
    """Saved classification heads; without them zero-shot heads come from the base's text tower."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the models are held in; another than their own rounds each weight once. ``auto`` rounds none."""
    relatedness: str | None = None
    """The distances between the models: a results directory of ``merge-ray relatedness``, or a Parquet or CSV file."""
    nearest: int | None = Field(None, ge=1)
    """Merge the model of the task ``to`` and so many others, those that are nearest to it by ``relatedness``."""
    to: str | None = None

    @pydantic.model_validator(mode="after")
    def _nearness_is_known(self) -> ModelsSpec:
        if (self.nearest is None) != (self.to is None):
            raise ValueError("'nearest' says how many models and 'to' the task that they are nearest to; give both")
        if self.nearest is not None and self.relatedness is None:
            raise ValueError("'nearest' needs 'relatedness', a results directory of merge-ray relatedness")
        return self

    @pydantic.model_validator(mode="after")
    def _family_exists(self) -> ModelsSpec:
        family = self.open_family()
        if family.has_base != (self.base is not None):
            raise ValueError(
                f"models of the family {self.family!r} are fine-tuned from a base; name it as 'base'"
                if family.has_base
                else f"models of the family {self.family!r} have no base in common; leave out 'base'"
            )
        return self

    def open_family(self) -> Family:
        """The family for this architecture."""
        return find_family(self.family, self.architecture)

    def finetuned_location(self, task: str) -> str:
        """Where the model that was fine-tuned on ``task`` lies."""
        return _location(self.finetuned, task)

    def head_location(self, task: str) -> str | None:
        """Where the head of ``task`` lies, or None if it is made from the text tower."""
        return None if self.heads is None else _location(self.heads, task)


def _location(locations: str | Mapping[str, str], task: str) -> str:
    return locations.replace("{task}", task) if isinstance(locations, str) else locations[task]


class EvaluationSpec(Strict):
    """How candidates are scored."""

    batch_size: int = Field(128, ge=1)
    shards: int = Field(4, ge=1)
    """Validation data are scored in this many shards of a fixed random order; schedulers act between them."""
    learning_reports: int = Field(5, ge=1)
    """A method that learns reports its score on the first shard after each of so many equal parts of its steps."""
    max_samples: int | None = Field(None, ge=1)
    """At most this many validation samples a task; the test split is always scored whole."""
    calibration_samples: int = Field(CALIBRATION_SAMPLES, ge=1)
    """Unlabelled samples that activations are compared on and batch norm is reset on, where a method or family does."""
    released_average: bool = False
    """Scale losses from the label average that the authors of training-free merging compute, to compare with their
    tables: of the last batch alone (of ``batch_size``), class maps with height and width exchanged."""
    transductive: bool = False
    """Whether methods that adapt on unlabelled inputs see those of the split that is scored, the test split's too, as
    in the papers; without it they see validation inputs only."""
    trial_seconds: float | None = Field(None, gt=0)
    """A trial that takes longer, learning included, has failed, and its host is started anew; None is no limit."""
    objective: str = "normalized_mean"
    select_on: str = "val"

    @pydantic.field_validator("select_on")
    @classmethod
    def _never_test(cls, value: str) -> str:
        if value == "test":
            raise ValueError(
                "selecting on the test split would overstate every result; candidates are selected on 'val'"
            )
        if value != "val":
            raise ValueError(choose_from(value, ["val"]))
        return value


class SearchSpec(Strict):
    """How a study searches; given once for all studies and overridden in each."""

    searcher: Literal["grid", "random", "optuna", "cmaes"] = "optuna"
    scheduler: Literal["none", "asha"] = "none"
    trials: int | None = Field(24, ge=1)
    seconds: float | None = Field(None, gt=0)
    reduction_factor: int = Field(2, ge=2)
    grace_shards: int = Field(1, ge=1)
    """A scheduler lets a candidate report this often before it stops any: after each shard, or part of its learning."""


def _parse_space(value: Any) -> Space:
    """A space from YAML: a list of values, ``{low, high, log, points}``, or ``{per_task: ...}``."""
    if isinstance(value, Space):
        return value
    if isinstance(value, list) and value:
        return Choice(tuple(value))
    if isinstance(value, Mapping) and set(value) == {"per_task"}:
        return PerTask(_parse_space(value["per_task"]))
    if isinstance(value, Mapping) and {"low", "high"} <= set(value) <= {"low", "high", "log", "points"}:
        low, high = value["low"], value["high"]
        numbers = all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in (low, high))
        if not numbers or low > high:
            raise ValueError("low and high must be numbers, low not above high")
        if value.get("log") and low <= 0:
            raise ValueError("a log range starts above 0")
        points = value.get("points", 11)
        if not isinstance(points, int) or points < 1:
            raise ValueError("points must be a whole number above 0")
        return Float(float(low), float(high), bool(value.get("log", False)), points)
    raise ValueError("a space is a list of values, {low, high, log, points}, or {per_task: a space}")


def _write_space(space: Space) -> Any:
    """The inverse of :func:`_parse_space`."""
    if isinstance(space, PerTask):
        return {"per_task": _write_space(space.each)}
    if isinstance(space, Float):
        return {"low": space.low, "high": space.high, "log": space.log, "points": space.points}
    return space.grid()


SpaceInYaml = Annotated[Space, BeforeValidator(_parse_space), PlainSerializer(_write_space)]


class StudySpec(SearchSpec):
    """One search over one method: ``parameters`` are fixed, ``space`` is searched."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    name: str
    method: str
    parameters: dict[str, Any] = {}
    space: dict[str, SpaceInYaml] | None = None

    @pydantic.field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, value: str) -> str:
        return _file_name(value)

    @pydantic.field_validator("method")
    @classmethod
    def _method_exists(cls, value: str) -> str:
        find_method(value)
        return value

    @pydantic.model_validator(mode="after")
    def _parameters_fit(self) -> StudySpec:
        method = find_method(self.method)
        problems = [check_parameter(method, name, value) for name, value in self.parameters.items()]
        for name, space in (self.space or {}).items():
            valid = parameter_fields(method)[name].metadata["valid"] if name in parameter_fields(method) else space
            problems += [check_parameter(method, name, value) for value in _ends(_in_kind(space, valid))]
            if name in self.parameters:
                problems.append(f"{name!r} is both fixed in 'parameters' and searched in 'space'")
        if self.searcher == "cmaes" and (reason := _unfit_for_cmaes(self.search_space())):
            problems.append(reason)
        if found := [problem for problem in problems if problem]:
            raise ValueError("\n".join(dict.fromkeys(found)))
        if self.trials is None and self.seconds is None and self.searcher != "grid" and self.search_space():
            raise ValueError("a search needs a budget: 'trials', 'seconds', or both")
        return self

    def search_space(self) -> dict[str, Space]:
        """What the study varies: its own ``space``, or the method's default less what is fixed."""
        fields = parameter_fields(find_method(self.method))
        if self.space is not None:
            return {name: _in_kind(part, fields[name].metadata["valid"]) for name, part in self.space.items()}
        searched = {name: field.metadata["search"] for name, field in fields.items() if name not in self.parameters}
        return {name: part for name, part in searched.items() if part is not None}

    def named_files(self) -> set[str]:
        """The locations of the files that the study's parameters name, fixed or searched."""
        named = {name: [value] for name, value in self.parameters.items()}
        named |= {name: space.grid() for name, space in (self.space or {}).items()}
        fields = parameter_fields(find_method(self.method))
        files = [value for name, values in named.items() if fields[name].metadata["file"] for value in values]
        return {value for value in files if isinstance(value, str)}


def _in_kind(space: Space, valid: Space) -> Space:
    """A range written in YAML as the parameter means it: of integers where only integers are valid."""
    if isinstance(space, Float) and isinstance(valid, Int):
        return Int(math.ceil(space.low), math.floor(space.high))
    return space


def _ends(space: Space) -> list[Any]:
    if isinstance(space, PerTask):
        return [{"a task": value} for value in _ends(space.each)]
    return [space.low, space.high] if isinstance(space, (Float, Int)) else space.grid()


def _unfit_for_cmaes(space: Mapping[str, Space]) -> str | None:
    parts = [part.each if isinstance(part, PerTask) else part for part in space.values()]
    if not all(isinstance(part, (Float, Int)) for part in parts):
        return "cmaes searches numbers only; use optuna, or fix the parameters that are choices"
    if len(parts) == 1 and not any(isinstance(part, PerTask) for part in space.values()):
        return "cmaes needs two or more numbers, such as {per_task: {low: 0, high: 1}}; use optuna for one"
    return None


class HostsSpec(Strict):
    """The actors that merge and score: by default one a GPU, or else one a CPU core."""

    count: int | None = Field(None, ge=1)
    threads: int | None = Field(None, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_memory: ByteSize | None = Field(None, gt=0)
    """At most so much of a device's memory is used (``8GB``); all of a GPU's otherwise. Where all models and what goes
    with them are more, groups of hosts share them in slices, each of which counts as a host."""


class SweepSpec(Strict):
    """A whole sweep. ``tasks`` lists what to be good at, or ``num_tasks`` picks the papers' 8, 14, 20 or glue."""

    name: str
    results: str = "results"
    seed: int = 0
    models: ModelsSpec
    tasks: list[TaskSpec]
    pairs: Literal["all"] | list[tuple[str, str]] | None = None
    """Merge the models of two tasks at a time, all pairs or those listed, in place of the models of all tasks."""
    evaluation: EvaluationSpec = EvaluationSpec()
    studies: dict[str, StudySpec]
    hosts: HostsSpec = HostsSpec()
    s3: S3Settings = S3Settings()
    """Where the spec's ``s3://`` locations are, as far as the environment does not say it."""

    @pydantic.field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, value: str) -> str:
        return _file_name(value)

    @pydantic.model_validator(mode="after")
    def _parts_fit(self) -> SweepSpec:
        names = self.task_names
        problems = []
        if not names:
            problems.append("tasks: at least one task is needed")
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            problems.append(f"tasks: named twice: {', '.join(doubled)}")
        if unknown := sorted({task for pair in self.task_pairs for task in pair} - set(names)):
            problems.append(f"pairs: {unknown[0]!r} is no task; {choose_from(unknown[0], names)}")
        if self.models.to is not None and self.models.to not in names:
            problems.append(f"models.to: {self.models.to!r} is no task; {choose_from(self.models.to, names)}")
        elif (self.models.nearest or 0) >= len(names):
            problems.append(f"models.nearest: {self.models.nearest} models are asked for beside that of "
                            f"{self.models.to!r}; there are {len(names) - 1}")  # fmt: skip
        if self.pairs is not None and not all(len(set(pair)) == 2 for pair in self.task_pairs or [()]):
            problems.append("pairs: each names two different tasks, and there must be one at least")
        if not self.studies:
            problems.append("studies: at least one study is needed")
        for field in ("finetuned", "heads"):
            given = getattr(self.models, field)
            if isinstance(given, Mapping) and set(given) != set(names):
                problems.append(f"models.{field}: given for {sorted(given)}, but the tasks are {sorted(names)}")
            if isinstance(given, str) and len(names) > 1 and "{task}" not in given:
                problems.append(f"models.{field}: {given!r} must hold {{task}}, or be a mapping of task to location")
        for study in self.studies.values():
            problems += [
                f"studies.{study.name}.parameters.{name}: given for {sorted(value)}, but the tasks are {sorted(names)}"
                for name, value in study.parameters.items()
                if isinstance(value, Mapping) and set(value) != set(names)
            ]
        objective, objectives = self.evaluation.objective, objective_names(names)
        if objective not in objectives:
            problems.append(f"evaluation.objective: {objective!r}; {choose_from(objective, objectives)}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def task_names(self) -> list[str]:
        """The tasks' names in the spec's order."""
        return [task.name for task in self.tasks]

    @property
    def task_pairs(self) -> list[tuple[str, ...]]:
        """The pairs of tasks whose models are merged, each sorted; one empty pair where all models are."""
        if self.pairs is None:
            return [()]
        pairs = combinations(self.task_names, 2) if self.pairs == "all" else self.pairs
        return sorted({tuple(sorted(pair)) for pair in pairs})

    @property
    def location(self) -> str:
        """Where everything that this sweep writes goes: a directory, or a place on S3."""
        return os.path.join(self.results, self.name)

    @property
    def directory(self) -> Path:
        """The results directory, or its copy on this machine if it lies on S3."""
        with self.s3.applied():  # the copy of one place is not that of another that has its name
            return results_at(self.location).directory


def objective_names(tasks: Sequence[str]) -> list[str]:
    """The metrics of the ledger that a search may maximise."""
    per_task = [f"{kind}/{task}" for kind in ("accuracy", "normalized") for task in tasks]
    return ["normalized_mean", "mean", "worst", *per_task]

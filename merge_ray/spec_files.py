"""Read specs from YAML: overrides and defaults filled in, all mistakes told at once, each with its place."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pydantic
import yaml
from pydantic import BaseModel

from merge_ray.checkpoints.s3 import S3Settings
from merge_ray.errors import SpecError, choose_from
from merge_ray.spec import SweepSpec
from merge_ray.tasks import SOURCES, TASK_LISTS, TaskSpec

if TYPE_CHECKING:
    from merge_ray.finetune import FinetuneSpec
    from merge_ray.relatedness import RelatednessSpec

Spec = TypeVar("Spec", bound=BaseModel)
CREDENTIALS = re.compile(r"://[^/\s]*@")
PLACEHOLDER = re.compile(r"\{\w+\}")


def load_sweeps(path: Path | str, overrides: Sequence[str] = ()) -> list[SweepSpec]:
    """The sweeps that a YAML file describes, in order: of each of its documents one, or one for each of the papers'
    task lists.

    overrides: ``key.inner=value`` texts that replace values of the file. Raises :class:`SpecError`.
    """
    return [sweep for raw in _read_documents(path) for sweep in _sweeps_of(raw, path, overrides)]


def _sweeps_of(raw: dict[str, Any], path: Path | str, overrides: Sequence[str]) -> list[SweepSpec]:
    for text in overrides:
        _override(raw, text)
    counts = raw.pop("num_tasks", None)
    if counts is None:
        return [_with_nearest(check_spec(SweepSpec, _with_defaults(raw), path), path)]
    settings = raw.get("tasks") or {}
    if not isinstance(settings, Mapping):
        raise SpecError(f"{path}: with num_tasks, 'tasks' maps single tasks to their settings; found a list")
    sweeps = []
    for count in counts if isinstance(counts, list) else [counts]:
        if count not in TASK_LISTS:
            raise SpecError(f"{path}: num_tasks: {count!r}; {choose_from(count, map(str, TASK_LISTS))}")
        name = str(raw.get("name", "")).replace("{num_tasks}", str(count))
        tasks = [{"name": task, **settings[task]} if task in settings else task for task in TASK_LISTS[count]]
        checked = check_spec(SweepSpec, _with_defaults({**raw, "name": name, "tasks": tasks}), path)
        sweeps.append(_with_nearest(checked, path))
    return sweeps


def _with_nearest(spec: SweepSpec, path: Path | str) -> SweepSpec:
    """``spec`` with the tasks alone whose models ``models.nearest`` chooses, where it does."""
    models = spec.models
    if models.relatedness is None:
        return spec
    # Imported here: few sweeps know how their models are related.
    from merge_ray.relatedness.nearest import nearest, read_distances

    distances = read_distances(models.relatedness, spec.task_names)
    if models.nearest is None or models.to is None:
        return spec
    chosen = {models.to, *nearest(distances, models.to, models.nearest)}
    raw = json.loads(spec.model_dump_json())
    raw["tasks"] = [task for task in raw["tasks"] if task["name"] in chosen]
    for field in ("finetuned", "heads"):
        if isinstance(locations := raw["models"][field], dict):
            raw["models"][field] = {task: place for task, place in locations.items() if task in chosen}
    return check_spec(SweepSpec, raw, path)


def load_any(path: Path | str, overrides: Sequence[str] = ()) -> Sequence[SweepSpec | FinetuneSpec | RelatednessSpec]:
    """The sweeps of a YAML file, or the fine-tuning or relatedness spec that it is; raises :class:`SpecError`.

    The kind is told by a key that the others do not have.
    """
    # Imported here: sweeps have no use for them.
    from merge_ray.finetune import FinetuneSpec
    from merge_ray.relatedness import RelatednessSpec

    keys = _read_documents(path)[0].keys()
    if "output" in keys:
        return [load_spec(FinetuneSpec, path, overrides)]
    return [load_spec(RelatednessSpec, path, overrides)] if "samples" in keys else load_sweeps(path, overrides)


def load_spec(model: type[Spec], path: Path | str, overrides: Sequence[str] = ()) -> Spec:
    """A spec of another kind, such as a fine-tuning spec, read and checked in the same way."""
    raw = read_yaml(path)
    for text in overrides:
        _override(raw, text)
    return check_spec(model, _with_filled_tasks(raw), path)


def _with_defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Spread ``search`` over the studies and ``task_defaults`` over the tasks."""
    spread = _with_filled_tasks(raw)
    search = spread.pop("search", None) or {}
    studies = spread.get("studies")
    if isinstance(studies, list):
        studies = dict.fromkeys(studies)
    if isinstance(studies, Mapping) and isinstance(search, Mapping):
        spread["studies"] = {
            name: {**search, "method": name, **(study or {}), "name": name}
            if isinstance(study, (Mapping, type(None)))
            else study
            for name, study in studies.items()
        }
    return spread


def _with_filled_tasks(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Spread ``task_defaults`` over the tasks."""
    spread = dict(raw)
    defaults = spread.pop("task_defaults", None) or {}
    if isinstance(spread.get("tasks"), list) and defaults:
        spread["tasks"] = [_with_task_defaults(task, defaults) for task in spread["tasks"]]
    return spread


def _with_task_defaults(task: Any, defaults: Mapping[str, Any]) -> Any:
    """A task of the spec with the defaults filled in, ``{task}`` in them standing for its name."""
    if isinstance(task, str):
        if set(defaults) & set(SOURCES):
            task = {"name": task}
        else:
            try:
                task = TaskSpec.model_validate(task).model_dump(exclude_unset=True)
            except pydantic.ValidationError:
                return task
    if not isinstance(task, Mapping):
        return task
    name = str(task.get("name", ""))
    filled = {key: _with_name(value, name) for key, value in defaults.items()}
    if set(task) & set(SOURCES):
        filled = {key: value for key, value in filled.items() if key not in SOURCES}
    return {**filled, **task}


def _with_name(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_name(part, name) for key, part in value.items()}
    return value.replace("{task}", name) if isinstance(value, str) else value


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML file; raises :class:`SpecError` with the line of a syntax mistake."""
    documents = _read_documents(path)
    if len(documents) != 1:
        raise SpecError(f"{path}: holds {len(documents)} documents, where one is wanted")
    return documents[0]


def _read_documents(path: Path | str) -> list[dict[str, Any]]:
    try:
        documents = list(yaml.safe_load_all(Path(path).read_text()))
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not YAML: {error}") from None
    if not documents or not all(isinstance(raw, dict) for raw in documents):
        raise SpecError(f"{path}: a spec is a mapping of keys to values")
    return documents


def _override(raw: dict[str, Any], text: str) -> None:
    path, equals, value = text.partition("=")
    if not equals:
        raise SpecError(f"--set {text}: write key.inner=value")
    *parents, last = path.split(".")
    for key in parents:
        if raw.get(key) is None:
            raw[key] = {}
        raw = raw[key]
        if not isinstance(raw, dict):
            raise SpecError(f"--set {text}: {key!r} holds a value, not a mapping")
    raw[last] = parse_value(value)


def parse_value(text: str) -> Any:
    """A value from a command line, as YAML; text that is not, or that begins with a ``{placeholder}``, is itself."""
    if PLACEHOLDER.match(text):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def check_spec(model: type[Spec], raw: Mapping[str, Any], source: Path | str) -> Spec:
    """``raw`` as a ``model``; raises :class:`SpecError` that lists every mistake with its place."""
    if secret := next((place for place, text in _texts(raw) if CREDENTIALS.search(text)), None):
        raise SpecError(
            f"{source}: {secret}: an address with credentials in it; specs are saved, so keep them in ~/.aws"
        )
    try:
        with _s3_settings(raw).applied():  # what is checked may lie there
            return model.model_validate(raw)
    except pydantic.ValidationError as invalid:
        mistakes = [_describe(model, error) for error in invalid.errors()]
        raise SpecError(
            f"{source} has {len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''}:\n" + "\n".join(mistakes)
        ) from None


def _texts(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a spec with its place."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping | list):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _texts(part, f"{place}.{key}".lstrip("."))


def _s3_settings(raw: Mapping[str, Any]) -> S3Settings:
    try:
        return S3Settings.model_validate(raw.get("s3", {}))
    except pydantic.ValidationError:
        return S3Settings()  # the mistake is told with the others


def _describe(model: type[BaseModel], error: Any) -> str:
    location = [part for part in error["loc"] if not str(part).startswith("function-")]
    place = ".".join(map(str, location)) or "spec"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        fields = _fields_at(model, location[:-1])
        return f"  {place}: unknown key; {choose_from(location[-1], fields)}"
    if error["type"] == "missing":
        return f"  {place}: missing"
    if error["type"] == "literal_error":
        valid = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return f"  {place}: {error['input']!r}; {choose_from(error['input'], valid)}"
    given = "" if isinstance(error["input"], (Mapping, list, BaseModel)) else f"{error['input']!r}: "
    return "\n".join(f"  {place}: {given}{line}" for line in message.splitlines())


def _fields_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The keys that a spec may have at ``location``."""
    current: Any = model
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel):
            current = current.model_fields[part].annotation if part in current.model_fields else current
        current = next((item for item in _models_in(current)), current)
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)

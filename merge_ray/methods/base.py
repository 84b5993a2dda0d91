"""What a merging method is: its parameters, what it may see, and what it gives back.

A method is one module of this package: a frozen dataclass under :func:`register` whose fields are made
with :func:`param`, and whose :meth:`Method.merge` turns :class:`MergeInputs` into :class:`Merged`.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np
from torch import Tensor

from merge_ray import kernels
from merge_ray.bank import ModelBank
from merge_ray.errors import ParameterError, choose_from
from merge_ray.matching import PermutationGroups
from merge_ray.methods.merge_cache import MergeCache
from merge_ray.methods.resources import Calibration, TaskModel, Unlabeled
from merge_ray.space import PerTask, Space

NEEDS = frozenset({"calibration", "labels", "permutation_groups", "unlabeled", "validation"})
"""What a method may ask for beyond the bank: ``validation`` scores merged weights on validation data, ``unlabeled``
gives samples without their labels, ``permutation_groups`` says which channels of the architecture may be permuted, and
``calibration`` has statistics of the models' activations; ``labels`` is for references that answer with them."""


def param(
    default: Any, *, valid: Space, search: Space | None = None, per_task: bool = False, file: bool = False, help: str
) -> Any:
    """Declare a method's parameter: the one source for validation, the search space and the documentation.

    ``valid`` is the set of allowed values, ``search`` what a sweep tries unless told otherwise (None: the default
    only). With ``per_task`` a value may also be a mapping of every task to a value of ``valid``. With ``file`` a text
    is the location of a file, whose content is part of a candidate's identity.
    """
    metadata = {"valid": valid, "search": search, "per_task": per_task, "file": file, "help": help}
    return dataclasses.field(default=default, metadata=metadata)


class Merged(ABC):
    """The answer of a method: weights for every task, shared or one set per task.

    ``resolved`` is the method with every choice that it made on validation data filled in, so that the
    same weights can be made again without choosing again. ``notes`` are warnings that belong beside its score.
    """

    resolved: Method
    shared: bool
    notes: tuple[str, ...] = ()
    keeps_own: bool = False
    """Whether tensors that a family leaves to each task are in the weights, task by task."""
    as_published: bool = False
    """Whether statistics of batch norm stay as they are in the weights, where a family makes them anew."""

    @abstractmethod
    def write(self, task: str, out: Tensor) -> None:
        """Put the weights that answer ``task`` into ``out`` ``[P]``, which may be the merge's own buffer."""

    @abstractmethod
    def storage_bytes(self) -> int:
        """The bytes that must be kept to answer every task, base included where it is needed."""

    def artifacts(self) -> dict[str, np.ndarray]:
        """Arrays worth keeping beside the leaderboard (masks, coefficients), by name."""
        return {}


@dataclasses.dataclass
class SharedWeights(Merged):
    """One set of weights ``[P]`` for all tasks."""

    resolved: Method
    bank: ModelBank
    weights: Tensor
    shared = True

    def write(self, task: str, out: Tensor) -> None:
        """See :meth:`Merged.write`."""
        if out.data_ptr() != self.weights.data_ptr():
            out.copy_(self.weights)

    def storage_bytes(self) -> int:
        """One model in its stored dtypes."""
        return self.bank.model_bytes


@dataclasses.dataclass
class WithOwnTensors(Merged):
    """Merged weights, but for some tensors that every task has from its own model."""

    merged: Merged
    bank: ModelBank
    own: frozenset[str]
    shared = False
    keeps_own = True

    def __post_init__(self) -> None:
        self.resolved, self.notes = self.merged.resolved, self.merged.notes

    def write(self, task: str, out: Tensor) -> None:
        """See :meth:`Merged.write`."""
        self.merged.write(task, out)
        bank, row = self.bank, self.bank.tasks.index(task)
        for name, start, stop in zip(bank.layout.names, bank.bounds, bank.bounds[1:], strict=False):
            if name in self.own:
                columns = slice(int(start), int(stop))
                out[columns] = bank.base[columns] + bank.task_vectors[row, columns]

    def storage_bytes(self) -> int:
        """What the merge needs, and the own tensors of every task but one."""
        entries = [entry for entry in self.bank.layout.entries if entry.name in self.own]
        own = sum(entry.size * entry.dtype.itemsize for entry in entries)
        return self.merged.storage_bytes() + (len(self.bank.tasks) - 1) * own

    def artifacts(self) -> dict[str, np.ndarray]:
        """Those of the merge."""
        return self.merged.artifacts()


def with_own_tensors(merged: Merged, bank: ModelBank, own: frozenset[str]) -> Merged:
    """The merge, with every task's own of the tensors ``own`` that a family leaves to it."""
    return merged if not own or merged.keeps_own else WithOwnTensors(merged, bank, own)


class Predictor(Merged):
    """The answer of a method whose weights depend on the sample: it answers the samples itself."""

    shared = False
    keeps_own = True

    @abstractmethod
    def outcomes(self, model: TaskModel, positions: Any) -> Tensor:
        """``model.outcomes`` ``[B]`` of the samples at ``positions``, each answered with the weights made for it."""

    def write(self, task: str, out: Tensor) -> None:
        """There are no weights that answer a whole task."""
        raise ParameterError(
            f"{self.resolved.name} makes weights for every sample; there are none to write down. A sweep scores it, "
            "and merge-ray export of that sweep writes what makes them"
        )


class MergeInputs:
    """All that a method may see: the bank, a seed, a buffer to merge into, and what it declared to need.

    bank: the models, or a slice of their columns on each host of a group. seed: for methods that draw. out: the buffer
    ``[P]`` for the result, made on first use when the caller has none. resources: what answers the method's ``needs``,
    by name. total: see :mod:`merge_ray.kernels`; what a method that merges ``by_columns`` agrees on across a group.
    used: the resources that were asked.
    """

    def __init__(
        self,
        bank: ModelBank,
        seed: int = 0,
        out: Tensor | None = None,
        cache: MergeCache | None = None,
        resources: Mapping[str, Any] | None = None,
        needs: frozenset[str] = NEEDS,
        total: kernels.Total = kernels.alone,
    ) -> None:
        self.bank = bank
        self.seed = seed
        self._out = out
        self._cache = cache if cache is not None else MergeCache(0)
        self._resources = dict(resources or {})
        self._needs = needs
        self.total = total
        self.used: set[str] = set()

    @property
    def out(self) -> Tensor:
        """The buffer ``[P]`` that the result is written into."""
        if self._out is None:
            self._out = kernels.vector(self.bank.task_vectors)
        return self._out

    @property
    def validation(self) -> Callable[[Merged, str], float]:
        """``validation(merged, task)``: the metric of merged weights on the task's validation split."""
        return self._need("validation")

    @property
    def unlabeled(self) -> Unlabeled:
        """The unlabelled samples of every task, and the model that answers them."""
        return self._need("unlabeled")

    @property
    def permutation_groups(self) -> PermutationGroups:
        """The groups of channels of the architecture that may be permuted together."""
        return self._need("permutation_groups")

    @property
    def calibration(self) -> Calibration:
        """Statistics of the models' activations on unlabelled samples."""
        return self._need("calibration")

    @property
    def columns(self) -> Mapping[str, np.ndarray] | None:
        """Every group's matched columns, where this merge was made before and they are given."""
        return self._resources.get("columns")

    def provide(self, **resources: Any) -> None:
        """Answer more of the method's needs."""
        self._resources.update(resources)

    def _need(self, name: str) -> Any:
        if name not in self._needs:
            raise ParameterError(f"this method uses {name!r} without declaring it in its needs")
        if name not in self._resources:
            raise ParameterError(f"this merge needs {name!r} data, and there is none here")
        self.used.add(name)
        return self._resources[name]

    def per_task(self, value: float | Mapping[str, float]) -> list[float]:
        """A parameter's value for every task of the bank, in the bank's order."""
        if not isinstance(value, Mapping):
            return [float(value)] * len(self.bank.tasks)
        if set(value) != set(self.bank.tasks):
            tasks = list(self.bank.tasks)
            raise ParameterError(f"a value per task is given for {sorted(value)}; the tasks are {tasks}")
        return [float(value[task]) for task in self.bank.tasks]

    def cached(self, key: Hashable, compute: Callable[[], Tensor], keep: bool = False) -> Tensor:
        """``compute()``, or its result from an earlier candidate that shares this expensive part.

        The result is read-only for the caller: the next candidate gets the same tensor. The hosts of a group compute
        it together where one of them has it no more. keep: for small results that take long; other hosts get them too,
        and a sweep that goes on. The ``key`` must then say all but the models.
        """
        whole_key = (self.bank.tasks, key)
        if int(self.total(np.array(whole_key not in self._cache, dtype=np.int64))):
            self._cache.forget(whole_key)
        return self._cache.get(whole_key, compute, keep)


@dataclasses.dataclass(frozen=True)
class Method(ABC):
    """A published merging method with its parameters.

    name: as in specs and the ledger. paper: what to cite. needs: what it sees beyond the bank. by_columns: whether it
    may merge a slice of the columns without the others, but for what ``inputs.total`` adds up; then a bank that is
    larger than a device can be shared by several.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    by_columns: ClassVar[bool]

    @abstractmethod
    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge the bank's models."""

    @property
    def steps_to_learn(self) -> int:
        """The steps that a :class:`LearnedMethod` has before it; 0 where nothing is learned, or all is given."""
        return 0

    @property
    def by_sample(self) -> bool:
        """Whether :meth:`merge` answers with a :class:`Predictor`."""
        return False

    def parameters(self) -> dict[str, Any]:
        """The parameters as plain values, in canonical form: mappings sorted by task."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: dict(sorted(value.items())) if isinstance(value, Mapping) else value for name, value in values.items()
        }


class Learner(ABC):
    """A merge that is learned step by step, and can be put aside and taken up again between any two steps.

    step: how many steps are done.
    """

    step: int

    @abstractmethod
    def advance(self, steps: int) -> float:
        """Do ``steps`` more; returns their mean loss. Raises :class:`FloatingPointError` when it is not finite."""

    @abstractmethod
    def merged(self) -> Merged:
        """The merge with what is learned so far; ``resolved`` names nothing that is yet to be learned."""

    @abstractmethod
    def state(self) -> dict[str, np.ndarray]:
        """All that :meth:`load` needs to go on as if nothing had happened."""

    @abstractmethod
    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a :meth:`state`."""


@dataclasses.dataclass(frozen=True)
class LearnedMethod(Method):
    """A method that learns on unlabelled samples in ``steps`` steps."""

    steps: int

    @property
    def steps_to_learn(self) -> int:
        """All steps, unless what was learned is among the parameters."""
        return self.steps

    @abstractmethod
    def learner(self, inputs: MergeInputs) -> Learner:
        """A learner at its first step."""

    def merge(self, inputs: MergeInputs) -> Merged:
        """Learn all steps at once."""
        learner = self.learner(inputs)
        learner.advance(self.steps)
        return learner.merged()


AnyMethod = TypeVar("AnyMethod", bound=type[Method])
_registry: dict[str, type[Method]] = {}


def register(
    name: str, *, paper: str, needs: tuple[str, ...] = (), by_columns: bool = False
) -> Callable[[AnyMethod], AnyMethod]:
    """Make a :class:`Method` known under ``name``; ``needs`` are words of :data:`NEEDS`. See there for the others."""

    def add(cls: AnyMethod) -> AnyMethod:
        cls.name, cls.paper, cls.needs, cls.by_columns = name, paper, frozenset(needs), by_columns
        _registry[name] = cls
        return cls

    return add


def available_methods() -> dict[str, type[Method]]:
    """Every method by name; each module of this package is imported once to find them."""
    import merge_ray.methods as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_registry.items()))


def find_method(name: str) -> type[Method]:
    """The method class called ``name``; raises :class:`ParameterError` with the nearest match."""
    methods = available_methods()
    if name not in methods:
        raise ParameterError(f"unknown method {name!r}; {choose_from(name, methods)}")
    return methods[name]


def parameter_fields(method: type[Method]) -> dict[str, dataclasses.Field[Any]]:
    """The method's parameters by name; each field's ``metadata`` is what :func:`param` was given."""
    return {field.name: field for field in dataclasses.fields(method)}


def check_parameter(method: type[Method], name: str, value: Any) -> str | None:
    """What is wrong with giving ``value`` to a parameter, or None."""
    fields = parameter_fields(method)
    if name not in fields:
        return f"{method.name} has no parameter {name!r}; {choose_from(name, fields)}"
    metadata = fields[name].metadata
    valid: Space = metadata["valid"]
    if valid.contains(value) or (metadata["per_task"] and PerTask(valid).contains(value)):
        return None
    per_task = ", nor a mapping of tasks to that" if metadata["per_task"] else ""
    return f"{method.name}: {name}={value!r} is not in {valid}{per_task}"


def make_method(name: str, parameters: Mapping[str, Any]) -> Method:
    """The method ``name`` with ``parameters``; raises :class:`ParameterError` naming every mistake."""
    method = find_method(name)
    problems = [problem for key, value in parameters.items() if (problem := check_parameter(method, key, value))]
    if problems:
        raise ParameterError("\n".join(problems))
    return method(**{name: _plain(value) for name, value in parameters.items()})


def _plain(value: Any) -> Any:
    """Our own copy of a value; lists, as YAML and JSON have them, become tuples."""
    if isinstance(value, Mapping):
        return dict(value)
    return tuple(value) if isinstance(value, list) else value

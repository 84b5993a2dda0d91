"""What an architecture supplies so that flat merging methods can be scored on it."""

from __future__ import annotations

import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from merge_ray.bank import Layout, ModelBank
from merge_ray.errors import CheckpointError, ParameterError, SpecError, choose_from
from merge_ray.matching import PermutationGroups
from merge_ray.tasks import PreparedSplit, Task

Positions = slice | np.ndarray | Tensor
"""Which samples of a :class:`TaskData`, counted in its order."""

ORDER_SEED = 20


def evaluation_order(count: int, max_samples: int | None) -> np.ndarray:
    """The fixed random order of ``count`` samples, cut to ``max_samples``."""
    return np.random.default_rng(ORDER_SEED).permutation(count)[:max_samples]


class Skeleton(nn.Module):
    """A model whose merged parameters live in one flat buffer.

    ``flat`` ``[P]`` float32 is laid out by ``layout``: writing into it changes the model at once, without
    a state dict.
    """

    layout: Layout
    flat: Tensor

    @contextmanager
    def gradient(self) -> Iterator[Tensor]:
        """A buffer ``[P]``, zero at first, into which backward passes add the gradient of the weights meanwhile."""
        gradient = torch.zeros_like(self.flat)
        start, step = self.flat.data_ptr(), self.flat.element_size()
        merged: list[nn.Parameter] = []
        for parameter in self.parameters():
            offset = (parameter.data_ptr() - start) // step
            if 0 <= offset < self.layout.size:
                parameter.requires_grad_(True)
                parameter.grad = gradient[offset : offset + parameter.numel()].view(parameter.shape)
                merged.append(parameter)
        try:
            yield gradient
        finally:
            for parameter in merged:
                parameter.requires_grad_(False).grad = None


def fit_weights(
    wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], device: torch.device | str, prefix: str = ""
) -> dict[str, Tensor]:
    """The tensors of ``state`` that take the places of ``wanted``, whose names are its own after ``prefix``.

    Tensors that are on ``device`` in the wanted dtype are shared, not copied. Raises :class:`CheckpointError` that
    lists the tensors that are missing or have another shape.
    """
    chosen, problems = {}, []
    for name, tensor in wanted.items():
        source = state.get(prefix + name)
        if source is None:
            problems.append(f"{prefix}{name} {tuple(tensor.shape)} is missing")
        elif source.shape != tensor.shape:
            problems.append(f"{prefix}{name} is {tuple(source.shape)}, the architecture has {tuple(tensor.shape)}")
        else:
            chosen[name] = source.to(device=device, dtype=tensor.dtype)
    if problems:
        raise CheckpointError("the weights do not fit the architecture:\n" + "\n".join(problems))
    return chosen


class TaskData(ABC):
    """One task's split on a device, in a fixed random order: what a model is asked, and what its answers are worth.

    metric: the score's name in the ledger. labels: ``[N]``, in order.
    """

    metric: str = "accuracy"
    labels: Tensor
    calibration: PreparedSplit | None = None
    """Samples that statistics of a model are made on, where the family makes them anew after every merge."""
    average: tuple[int, bool] = 64, False
    """The label average that losses are scaled from: what :meth:`average_outcomes` is given."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def inputs(self, positions: Positions) -> Any:
        """What the skeleton takes for the samples at ``positions``; their number is ``B`` below."""

    def samples(self, positions: Positions) -> Any:
        """The samples before what is particular to the skeleton: images uint8 ``[B, 3, S, S]``, or texts ``[B]``."""
        return self.inputs(positions)

    @abstractmethod
    def logits(self, skeleton: Skeleton, inputs: Any) -> Tensor:
        """The skeleton's answers ``[B, C]``, with a graph where gradients are enabled."""

    def outcomes(self, skeleton: Skeleton, positions: Positions) -> Tensor:
        """What is kept of every answer ``[B]``: here, whether it is right."""
        return self.outcomes_of(self.logits(skeleton, self.inputs(positions)), positions)

    def outcomes_of(self, logits: Tensor, positions: Positions) -> Tensor:
        """The outcomes of given logits ``[B, C]``; raises :class:`FloatingPointError` where they are not finite."""
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("the merged model's logits are not finite")
        return logits.argmax(dim=1) == self.labels[positions]

    def score(self, outcomes: np.ndarray) -> tuple[float, float]:
        """The metric and its standard error from the outcomes of the first samples of the order."""
        value = float(outcomes.mean())
        return value, math.sqrt(value * (1 - value) / len(outcomes))

    def domains(self, outcomes: np.ndarray) -> dict[str, float]:
        """The metric in each domain that the data are of, such as buildings; one without a name if they are of none."""
        return {"": self.score(outcomes)[0]}

    def normalize(self, outcomes: np.ndarray, reference: Mapping[str, float]) -> tuple[float | None, float]:
        """The outcomes' score as a share of the fine-tuned model's, and the score that a whole share is worth.

        reference: the :meth:`domains` of the fine-tuned model. None for a share of nothing.
        """
        [whole] = reference.values()
        return (self.score(outcomes)[0] / whole if whole else None), whole

    def average_outcomes(self, batch_size: int, released: bool = False) -> np.ndarray:
        """The outcomes of answering every sample with the average of the labels.

        Raises :class:`ParameterError` for labels that have none.
        """
        raise ParameterError("these labels have no average to answer with")

    def calibration_batches(self, batch_size: int, samples: int) -> Iterator[Any]:
        """At most so many unlabelled samples in batches of :meth:`inputs`, for statistics of activations."""
        for start in range(0, min(samples, len(self)), batch_size):
            yield self.inputs(slice(start, min(start + batch_size, samples, len(self))))

    def settle(self, skeleton: Skeleton, batch_size: int, samples: int) -> None:  # noqa: B027  # nothing, for most
        """Make anew what depends on the weights that the skeleton was just given: statistics of batch norm."""

    def state(self, skeleton: Skeleton) -> dict[str, Tensor]:
        """All tensors that answer this task, under the names that the family reads."""
        return {name: view.clone() for name, view in skeleton.layout.views(skeleton.flat).items()}

    def restore(self) -> None:  # noqa: B027  # nothing, for most
        """Undo what :meth:`settle` did to the task's head."""


class Family(ABC):
    """A kind of architecture: how its weights are named, built and asked.

    name: as in specs. architecture: which member of the family, in the family's own words. needs_heads: whether a
    task needs a head beside the weights. has_base: whether models are fine-tuned from a common base;
    without one, batch norm is reset on the images of :meth:`open_images`. own_tensors: what every task keeps of its own
    model when models are merged tensor by tensor.
    huggingface_model: transformers' class that exports are for.
    """

    name: ClassVar[str]
    huggingface_model: ClassVar[str]
    needs_heads: ClassVar[bool] = False
    has_base: ClassVar[bool] = True
    own_tensors: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    @abstractmethod
    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``state`` in the family's native names and shapes, whichever known layout it comes in."""

    @abstractmethod
    def assemble(self, layout: Layout, extras: Mapping[str, Tensor], device: torch.device | str) -> Skeleton:
        """A skeleton over a zeroed flat buffer of ``layout``, the rest from ``extras``."""

    @abstractmethod
    def tower(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of ``state`` (native names) that the skeleton uses."""

    @abstractmethod
    def open_split(
        self, task: Task, split: str, cache: Path, progress: Callable[[int, int, str], None] | None = None
    ) -> PreparedSplit:
        """A split's samples as this family takes them, prepared once and kept in the directory ``cache``.

        ``progress(done, total, text)`` counts samples. Raises :class:`DataError` for data that cannot be used.
        """

    @abstractmethod
    def task_data(
        self, split: PreparedSplit, head: Tensor | None, device: torch.device, max_samples: int | None
    ) -> TaskData:
        """A prepared split on ``device``, cut to ``max_samples``; ``head`` is from :meth:`read_head`, where needed."""

    @abstractmethod
    def export_huggingface(self, state: Mapping[str, Tensor], model: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weights of ``state`` (native names) and the ``config.json`` of transformers' class ``model``."""

    @abstractmethod
    def activation_bytes(self, batch_size: int) -> int:
        """An estimate of what answering a batch takes on a device beside the weights, in bytes."""

    def resident_bytes(self, split: PreparedSplit, max_samples: int | None) -> int:
        """What :meth:`task_data` keeps on an accelerator, in bytes, where that counts."""
        return 0

    def read_head(self, task: Task, state: Mapping[str, Tensor]) -> Tensor:
        """The head of ``task`` from saved weights: ``[C, D]``, or another tensor that :meth:`task_data` understands.

        Raises :class:`CheckpointError` where the weights do not fit.
        """
        raise CheckpointError(f"the family {self.name!r} has no heads")

    def is_of_encoder(self, name: str) -> bool:
        """Whether an encoder of images may use a saved tensor of this name, in any layout that :meth:`rename` knows."""
        return True

    def permutation_groups(self, skeleton: Skeleton) -> PermutationGroups:
        """The groups of channels that may be permuted together, observed in ``skeleton``.

        Raises :class:`SpecError` where the family has none, and :class:`CheckpointError` naming the module in which
        channels cannot be followed.
        """
        raise SpecError(f"the family {self.name!r} has no permutation groups; methods that match channels cannot run")

    def open_images(
        self, task: Task, split: str, cache: Path, progress: Callable[[int, int, str], None] | None = None
    ) -> PreparedSplit:
        """A split's samples without their labels; see :meth:`open_split`."""
        return self.open_split(task, split, cache, progress)

    def shown(self, images: Tensor) -> Any:
        """What a skeleton takes of ``images`` uint8 ``[B, 3, S, S]``."""
        return images

    def companions(self) -> Path | None:
        """The directory whose tokenizer goes with exported weights, or None."""
        return None

    def skeleton(self, bank: ModelBank, device: torch.device | str) -> Skeleton:
        """A skeleton on ``device`` that holds the bank's base model, or its slice, until other weights are written."""
        skeleton = self.assemble(bank.layout, bank.extras, device)
        skeleton.flat[bank.columns].copy_(bank.base)
        return skeleton


AnyFamily = TypeVar("AnyFamily", bound=type[Family])
_families: dict[str, type[Family]] = {}


def register_family(name: str) -> Callable[[AnyFamily], AnyFamily]:
    """Make a :class:`Family` known under ``name``."""

    def add(cls: AnyFamily) -> AnyFamily:
        cls.name = name
        _families[name] = cls
        return cls

    return add


def find_family(name: str, architecture: str) -> Family:
    """The family ``name`` for ``architecture``; raises :class:`SpecError` with the nearest match."""
    import merge_ray.families as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    if name not in _families:
        raise SpecError(f"unknown family {name!r}; {choose_from(name, _families)}")
    return _families[name](architecture)

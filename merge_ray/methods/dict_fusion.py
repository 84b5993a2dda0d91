"""Dictionary fusion: a small network maps each sample's features to the coefficients of its own merge."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from merge_ray.bank import ModelBank
from merge_ray.errors import ParameterError
from merge_ray.features import Extractor, open_extractor
from merge_ray.kernels.layers import layer_dots
from merge_ray.methods.base import (
    LearnedMethod,
    Learner,
    Merged,
    MergeInputs,
    Method,
    Predictor,
    TaskModel,
    param,
    parameter_fields,
    register,
)
from merge_ray.methods.coding import PREFIX, Codings, mapping_arrays, new_mapping, read_mapping
from merge_ray.methods.entropies import entropy
from merge_ray.methods.per_sample import merge_into, outcomes_per_sample
from merge_ray.space import Choice, Float, Int, Space

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
EXTRACTED = 64
"""Samples that an extractor describes at once."""
BASE = "base"
"""In place of an extractor: the base model's own output for a sample, before its head."""


@dataclass(frozen=True)
class Location(Space):
    """Where something is: a path, or a location with a scheme."""

    optional: bool = False

    def contains(self, value: Any) -> bool:
        """See :meth:`Space.contains`."""
        return (self.optional and value is None) or (isinstance(value, str) and bool(value))

    def grid(self) -> list[Any]:
        """A location is given, not searched."""
        return []

    def __str__(self) -> str:
        return "a location" + (", or none" if self.optional else "")


@register(
    "dict_fusion",
    paper="Tang et al., Data-Adaptive Weight-Ensembling for Multi-task Model Fusion, IJCV 2025",
    needs=("unlabeled",),
)
@dataclass(frozen=True)
class DictFusion(LearnedMethod):
    """``theta_0 + sum_t c_t(x) tau_t`` for the sample ``x``, layer by layer with granularity ``layer``.

    The coding ``c(x) = W2 relu(W1 f(x) + b1) + b2`` ``[T]`` or ``[T, L]`` is neither clamped nor normalised; ``f(x)``
    ``[F]`` are the features of a frozen extractor. ``W1`` ``[F, F]`` and ``b1`` are drawn as ``torch.nn.Linear`` draws
    them, ``W2`` is 0 and ``b2`` the initial coefficient, so that learning begins at task arithmetic.

    The mapping is learned on unlabelled samples of all tasks: a step takes one batch of each task, *averages* the
    batch's codings and merges one model for it; the loss is the sum over the tasks of the batch's mean entropy (nats).
    With ``g`` ``[P]`` the gradient of a task's entropy in the merged weights, the averaged coding's gradient is
    ``tau_t . g``, over each layer for itself with granularity ``layer``; no graph goes through the merge. Answers
    use one model per sample, merged from that sample's own coding.

    The authors' code averages in order to save memory, as it says itself, and does not when it learns and evaluates in
    one call; here learning always averages. It uses Adam for images, AdamW (5e-6, its default weight decay of 0.01) for
    texts. Its layers are in the order of the module, ours in the layout's (names sorted); see
    :func:`merge_ray.methods.coding.read_mapping` on reading its mappings. It shuffles the samples anew in each pass;
    here a pass repeats one random order.
    """

    steps: int = param(1000, valid=Int(0, 1_000_000), help="learning steps; 0 takes the mapping as it is")
    granularity: str = param(
        "task",
        valid=Choice(("task", "layer")),
        search=Choice(("task", "layer")),
        help="a coefficient for each task, or for each task and layer",
    )
    feature_extractor: str = param(
        "microsoft/resnet-18",
        valid=Location(),
        help="what describes the samples: an image model or sentence encoder, as a directory or on the hub, or 'base'",
    )
    mapping: str | None = param(None, valid=Location(optional=True), file=True, help="a saved mapping to begin with")
    initial_coefficient: float = param(0.3, valid=Float(-10, 10), help="every coding of a new mapping")
    learning_rate: float = param(1e-5, valid=Float(0, 1), search=Float(1e-6, 1e-3, log=True), help="of the optimizer")
    optimizer: str = param("adam", valid=Choice(tuple(OPTIMIZERS)), help="adamw decays weights by 0.01")
    batch_size: int = param(16, valid=Int(1, 4096), help="samples of each task in a step")

    by_sample = True

    def parameters(self) -> dict[str, Any]:
        """See :meth:`Method.parameters`; without a step, what only learning uses is left at its default."""
        learning = ("learning_rate", "optimizer", "batch_size") if self.steps == 0 else ()
        unused = {name: field.default for name, field in parameter_fields(type(self)).items() if name in learning}
        return {**super().parameters(), **unused}

    def learner(self, inputs: MergeInputs) -> Learner:
        """See :class:`DictFusion`."""
        return DictLearner(self, inputs)


class Features:
    """The frozen features of tasks' samples, made once for each extractor and kept as long as the samples are."""

    _kept: ClassVar[WeakKeyDictionary[TaskModel, dict[str, Tensor]]] = WeakKeyDictionary()

    def __init__(self, location: str, inputs: MergeInputs) -> None:
        self.location = location
        self._base, self._device = inputs.bank.base, inputs.bank.base.device
        if location == BASE:
            self.size = self.of(next(iter(inputs.unlabeled.models.values())), slice(0, 1)).shape[1]
        else:
            # Small results stay cached: an extractor whose features are all there is not opened again.
            size = inputs.cached(("feature_size", location), lambda: torch.tensor(self._extractor.size))
            self.size = int(size)

    @cached_property
    def _extractor(self) -> Extractor:
        return open_extractor(self.location, self._device)

    def of(self, model: TaskModel, positions: Any) -> Tensor:
        """The features ``[B, F]`` of the samples at ``positions``."""
        kept = self._kept.setdefault(model, {})
        if self.location not in kept:
            kept[self.location] = self._describe(model)
        return kept[self.location][positions].to(self._device)

    def _describe(self, model: TaskModel) -> Tensor:
        """The features of all samples ``[N, F]``, in the host's memory."""
        places = [slice(start, start + EXTRACTED) for start in range(0, len(model), EXTRACTED)]
        # Scoring runs in inference mode; learning cannot use tensors that were made there.
        with torch.inference_mode(False), torch.no_grad():
            if self.location == BASE:
                model.flat.copy_(self._base)
                return torch.cat([model.skeleton(model.inputs(positions)).cpu() for positions in places])
            return torch.cat([self._extractor(model.samples(positions)).cpu() for positions in places])


class DictLearner(Learner):
    """Learns the mapping; see :class:`DictFusion`."""

    def __init__(self, method: DictFusion, inputs: MergeInputs) -> None:
        self.step = 0
        self._method, self._inputs, self._bank = method, inputs, inputs.bank
        self._features = Features(method.feature_extractor, inputs)
        self._codings = Codings.of(self._bank, method.granularity)
        if method.mapping is None:
            mapping = new_mapping(self._features.size, self._codings, method.initial_coefficient, inputs.seed)
        else:
            mapping = read_mapping(method.mapping, self._features.size, method.feature_extractor, self._codings)
        self.mapping = mapping.to(self._bank.base.device)
        self._optimizer = OPTIMIZERS[method.optimizer](self.mapping.parameters(), lr=method.learning_rate)

    def advance(self, steps: int) -> float:
        """See :meth:`Learner.advance`; the loss is the sum of the tasks' entropies."""
        if steps == 0:
            return 0.0
        unlabeled, tasks = self._inputs.unlabeled, self._bank.tasks
        if without := [task for task in tasks if not len(unlabeled.models.get(task, ()))]:
            raise ParameterError(f"dict_fusion learns on unlabelled samples of every task; {without} have none")
        models = [unlabeled.models[task] for task in tasks]
        with unlabeled.gradient() as gradient:
            return sum(self._advance_once(models, gradient) for _ in range(steps)) / steps

    def _advance_once(self, models: Sequence[TaskModel], gradient: Tensor) -> float:
        self._optimizer.zero_grad()
        loss = sum(self._add_gradient(model, gradient) for model in models)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {self.step} is {loss}")
        self._optimizer.step()
        self.step += 1
        return loss

    def _add_gradient(self, model: TaskModel, gradient: Tensor) -> float:
        """Add what one task's batch says to the mapping's gradient; returns its entropy."""
        size = self._method.batch_size
        positions = np.arange(self.step * size, (self.step + 1) * size) % len(model)
        coding = self.mapping(self._features.of(model, positions)).mean(0).view(self._codings.shape)
        merge_into(self._bank, coding.detach(), model.flat)
        gradient.zero_()
        loss = entropy(model.logits(model.inputs(positions))).mean()
        loss.backward()
        coding.backward(self._coding_gradient(gradient))
        return loss.item()

    def _coding_gradient(self, gradient: Tensor) -> Tensor:
        """``tau_t . g`` ``[T]``, or ``[T, L]`` of every layer."""
        whole = np.array([0, len(gradient)])
        bounds = whole if self._codings.layers is None else self._bank.layout.bounds
        return layer_dots(self._bank.task_vectors, gradient, bounds).view(self._codings.shape)

    def merged(self) -> Merged:
        """A model for each sample, from the mapping learned so far; ``resolved`` learns so many steps again."""
        resolved = dataclasses.replace(self._method, steps=self.step)
        mapping = copy.deepcopy(self.mapping)
        return DictPredictor(resolved, self._bank, mapping, self._codings, self._features, self.step)

    def state(self) -> dict[str, np.ndarray]:
        """The mapping (as :func:`read_mapping` reads it), the optimizer's moments and the step."""
        arrays = mapping_arrays(self.mapping, self._codings, self._method.feature_extractor, self.step)
        for index, moments in self._optimizer.state_dict()["state"].items():
            arrays |= {f"optimizer/{index}/{name}": value.cpu().numpy().copy() for name, value in moments.items()}
        return {**arrays, "step": np.array(self.step)}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """See :meth:`Learner.load`."""
        self.step = state["step"].item()
        names = self.mapping.state_dict()
        self.mapping.load_state_dict({name: torch.tensor(state[PREFIX + name]) for name in names})
        moments: dict[int, dict[str, Tensor]] = {}
        for key, array in state.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                # Saving may make a vector of one number of a scalar.
                moments.setdefault(int(index), {})[name] = torch.tensor(array.item() if name == "step" else array)
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})


@dataclass
class DictPredictor(Predictor):
    """Every sample's own merge: ``theta_0 + sum_t c_t(x) tau_t``."""

    resolved: Method
    bank: ModelBank
    mapping: nn.Sequential
    coding: Codings
    features: Features
    step: int

    def codings(self, model: TaskModel, positions: Any) -> Tensor:
        """The coefficients of the samples at ``positions``: ``[B, T]``, or ``[B, T, L]`` by layer."""
        with torch.no_grad():
            return self.mapping(self.features.of(model, positions)).unflatten(1, self.coding.shape)

    def outcomes(self, model: TaskModel, positions: Any) -> Tensor:
        """See :meth:`Predictor.outcomes`."""
        return outcomes_per_sample(self.bank, model, positions, self.codings(model, positions))

    def storage_bytes(self) -> int:
        """The base, every task vector and the mapping; the frozen extractor is not counted."""
        mapping = sum(tensor.nbytes for tensor in self.mapping.parameters())
        return self.bank.model_bytes + self.bank.finetuned_bytes + mapping

    def artifacts(self) -> dict[str, np.ndarray]:
        """The mapping, as :func:`read_mapping` reads it."""
        return mapping_arrays(self.mapping, self.coding, self.features.location, self.step)

"""AdaMerging: merging coefficients learned on unlabelled inputs, so that the merged model is sure of its answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from merge_ray import kernels
from merge_ray.bank import ModelBank
from merge_ray.checkpoints import find_beside, open_location
from merge_ray.errors import CheckpointError, ParameterError
from merge_ray.methods.base import LearnedMethod, Learner, Merged, MergeInputs, SharedWeights, param, register
from merge_ray.methods.entropies import entropy
from merge_ray.methods.ties import cached_thresholds
from merge_ray.space import Choice, Float, Int, Space

COEFFICIENT = "coefficient/"
"""Merging coefficients are artifacts under this prefix and their task's name; ``layers`` names their entries."""

_unit = Float(0, 1)


@dataclass(frozen=True)
class Coefficients(Space):
    """The path of saved coefficients, a number or a list of one number a layer for every task, or None."""

    def contains(self, value: Any) -> bool:
        """See :meth:`Space.contains`."""
        if isinstance(value, Mapping):
            each = [part if isinstance(part, (list, tuple)) else [part] for part in value.values()]
            return bool(each) and all(_unit.contains(number) for part in each for number in part)
        return value is None or (isinstance(value, str) and value.endswith((".npz", ".safetensors")))

    def grid(self) -> list[Any]:
        """Coefficients are learned unless they are given."""
        return [None]

    def __str__(self) -> str:
        return "the path of a .npz or .safetensors file, or {task: numbers in [0, 1]}, or none"


@register(
    "adamerging",
    paper="Yang et al., AdaMerging: Adaptive Model Merging for Multi-Task Learning, ICLR 2024",
    needs=("unlabeled",),
)
@dataclass(frozen=True)
class AdaMerging(LearnedMethod):
    """``theta_0 + sum_t clamp(lambda_t^l, 0, 1) tau_t`` in layer ``l``, a layer being one tensor of the layout.

    ``lambda`` ``[T, L]`` (``[T, 1]`` task-wise) starts at ``initial_coefficient`` and is learned with Adam. The loss
    of a step is the sum, over the tasks and their batches, of the mean entropy (in nats) of the merged model's
    predictions on a batch of unlabelled samples. Batches are drawn anew in every step, without repetition within it.
    The clamp is part of the model: what it cuts off is learned no further, but not projected back.

    AdaMerging++ is ``task_vectors="ties"``: ``tau_t`` keeps the entries that TIES keeps, those of the largest
    magnitude (a fraction ``density`` of the whole vector) that have their column's elected sign.

    The authors' code takes two batches of every task in a step (``batches_per_step``), where the paper and a comment
    in later copies of the code speak of one; the default follows the code. It learns on the test inputs; a sweep does
    so where its spec says ``transductive``, and on validation inputs otherwise.

    No graph leads through the merge: the gradient of ``lambda_t^l`` is the dot product of the layer's part of
    ``tau_t`` with the gradient of the merged weights. A step reads the task vectors twice, once to merge and once
    for the products, and needs one vector ``[P]`` for the gradient (and int8 ``[P]`` for the elected signs).
    """

    steps: int = param(500, valid=Int(1, 1_000_000), help="Adam's steps")
    granularity: str = param(
        "layer", valid=Choice(("layer", "task")), help="a coefficient for every task and layer, or for every task"
    )
    task_vectors: str = param(
        "plain", valid=Choice(("plain", "ties")), help="'ties' trims the task vectors and elects signs: AdaMerging++"
    )
    density: float = param(0.2, valid=Float(0, 1), help="the fraction of each task vector that 'ties' keeps")
    initial_coefficient: float = param(0.3, valid=_unit, help="where every coefficient starts")
    learning_rate: float = param(1e-3, valid=Float(0, 10), help="Adam's learning rate")
    batch_size: int = param(16, valid=Int(1, 100_000), help="samples in a batch")
    batches_per_step: int = param(
        2, valid=Int(1, 1000), help="batches of every task in a step; the authors' code takes 2"
    )
    coefficients: str | Mapping[str, Any] | None = param(
        None, valid=Coefficients(), file=True, help="learned coefficients to merge with, in place of learning them"
    )

    @property
    def steps_to_learn(self) -> int:
        """No step where coefficients are given."""
        return self.steps if self.coefficients is None else 0

    def learner(self, inputs: MergeInputs) -> CoefficientLearner:
        """See :meth:`LearnedMethod.learner`."""
        return CoefficientLearner(self, inputs)

    def merge(self, inputs: MergeInputs) -> Merged:
        """Merge with the given coefficients, or with those that are learned now."""
        if self.coefficients is None:
            return super().merge(inputs)
        return LayerMerge(self, inputs).merged(self._given(inputs.bank).to(inputs.bank.base.device))

    def _given(self, bank: ModelBank) -> Tensor:
        """The given coefficients, float32 ``[T, L]`` or ``[T, 1]``."""
        if isinstance(self.coefficients, Mapping):
            given = {task: np.atleast_1d(np.asarray(row, np.float32)) for task, row in self.coefficients.items()}
            names, source = None, "coefficients"
        else:
            given, names = read_coefficients(str(self.coefficients))
            source = str(self.coefficients)
        layers = 1 if self.granularity == "task" else len(bank.layout.names)
        if missing := [task for task in bank.tasks if task not in given]:
            raise ParameterError(f"{source}: has coefficients of {sorted(given)}, and none of {missing}")
        wrong = {task: len(row) for task, row in given.items() if len(row) != layers}
        if wrong or (names is not None and self.granularity == "layer" and names != bank.layout.names):
            found = f"{next(iter(wrong.values()))} coefficients a task" if wrong else "coefficients of other layers"
            raise ParameterError(f"{source}: has {found}; with granularity={self.granularity!r} these models have "
                                 f"{layers}")  # fmt: skip
        return torch.from_numpy(np.stack([given[task] for task in bank.tasks]))


class LayerMerge:
    """What a merge of ``method`` over ``inputs`` is but for its coefficients."""

    def __init__(self, method: AdaMerging, inputs: MergeInputs) -> None:
        self.method, self.inputs, self.bank = method, inputs, inputs.bank
        by_layer = method.granularity == "layer"
        self.bounds = self.bank.layout.bounds if by_layer else np.array([0, self.bank.layout.size])
        self.election = elect(inputs, method.density) if method.task_vectors == "ties" else None

    def write(self, coefficients: Tensor, out: Tensor) -> None:
        """Put the weights merged by ``coefficients`` ``[T, L]`` into ``out`` ``[P]``."""
        kernels.layer_sum(
            self.bank.task_vectors, coefficients.clamp(0, 1), self.bounds, out, self.bank.base, self.election
        )

    def gradient(self, weights: Tensor) -> Tensor:
        """The coefficients' gradient ``[T, L]`` from that of the weights ``[P]``, the clamp left out."""
        return kernels.layer_dots(self.bank.task_vectors, weights, self.bounds, self.election)

    def merged(self, coefficients: Tensor) -> Merged:
        """The merge by ``coefficients`` ``[T, L]``."""
        self.write(coefficients, self.inputs.out)
        kept = coefficients.clamp(0, 1).cpu().numpy()
        plain = {task: _plain(row) for task, row in zip(self.bank.tasks, kept, strict=True)}
        resolved = dataclasses.replace(self.method, coefficients=plain)
        return CoefficientWeights(resolved, self.bank, self.inputs.out, kept)


@dataclass
class CoefficientWeights(SharedWeights):
    """One set of weights, and the coefficients ``[T, L]`` (or ``[T, 1]``) that made it."""

    coefficients: np.ndarray

    def artifacts(self) -> dict[str, np.ndarray]:
        """``coefficient/<task>`` float32 ``[L]`` or ``[1]``, and the ``layers``' names ``[L]`` where there are several.

        :class:`AdaMerging` takes the file of these as ``coefficients``.
        """
        arrays = {COEFFICIENT + task: row for task, row in zip(self.bank.tasks, self.coefficients, strict=True)}
        if self.resolved.parameters()["granularity"] == "layer":
            arrays["layers"] = np.array(self.bank.layout.names)
        return arrays


class CoefficientLearner(Learner):
    """Learns the coefficients of :class:`AdaMerging`.

    coefficients: as they are learned, not clamped, float32 ``[T, L]`` or ``[T, 1]``. Raises :class:`ParameterError`
    where a task has no unlabelled samples.
    """

    def __init__(self, method: AdaMerging, inputs: MergeInputs) -> None:
        self.method, self.seed = method, inputs.seed
        try:
            self.unlabeled = inputs.unlabeled
        except ParameterError as error:
            raise ParameterError(
                f"{error}: pass unlabeled=, or give the coefficients that a sweep has learned as coefficients="
            ) from None
        tasks = inputs.bank.tasks
        if without := [task for task in tasks if not len(self.unlabeled.models.get(task, ()))]:
            raise ParameterError(f"{method.name} learns on unlabelled samples of every task; {without} have none")
        self.models = [self.unlabeled.models[task] for task in tasks]
        self.layers = LayerMerge(method, inputs)
        shape = (len(tasks), len(self.layers.bounds) - 1)
        self.coefficients = torch.full(shape, method.initial_coefficient, device=inputs.bank.base.device)
        self.optimizer = torch.optim.Adam([self.coefficients], lr=method.learning_rate)
        self.step = 0

    def advance(self, steps: int) -> float:
        """See :meth:`Learner.advance`."""
        with self.unlabeled.gradient() as gradient:
            return float(np.mean([self._advance(gradient) for _ in range(steps)]))

    def _advance(self, gradient: Tensor) -> float:
        """One step; ``gradient`` ``[P]`` is where the weights' gradient is gathered."""
        self.layers.write(self.coefficients, self.models[0].flat)
        gradient.zero_()
        loss = torch.zeros((), device=gradient.device)
        for index, model in enumerate(self.models):
            for positions in self._batches(index):
                batch = entropy(model.logits(model.inputs(positions))).mean()
                batch.backward()
                loss += batch.detach()
        if not bool(loss.isfinite()):
            raise FloatingPointError(f"the entropy is not finite in step {self.step + 1}")
        unclamped = (self.coefficients >= 0) & (self.coefficients <= 1)
        self.coefficients.grad = torch.where(unclamped, self.layers.gradient(gradient), 0)
        self.optimizer.step()
        self.step += 1
        return float(loss)

    def _batches(self, index: int) -> Iterator[np.ndarray]:
        """The positions of one task's batches in this step; they follow from the seed and the step's number."""
        size, count = self.method.batch_size, len(self.models[index])
        generator = np.random.default_rng([self.seed, self.step, index])
        drawn = generator.choice(count, min(count, size * self.method.batches_per_step), replace=False)
        for start in range(0, len(drawn), size):
            yield drawn[start : start + size]

    def merged(self) -> Merged:
        """See :meth:`Learner.merged`."""
        return self.layers.merged(self.coefficients)

    def state(self) -> dict[str, np.ndarray]:
        """The step, the coefficients and Adam's moments; batches follow from the step."""
        moments = self.optimizer.state[self.coefficients]
        arrays = {"coefficients": self.coefficients, **{name: moments[name] for name in sorted(moments)}}
        return {name: tensor.cpu().numpy().copy() for name, tensor in arrays.items()} | {"steps": np.array(self.step)}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """See :meth:`Learner.load`."""
        self.step = int(state["steps"])
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in state.items() if name != "steps"}
        self.coefficients.copy_(tensors.pop("coefficients"))
        # Adam keeps its own count of steps on the CPU.
        moved = {name: tensor if name == "step" else tensor.to(self.coefficients.device)
                 for name, tensor in tensors.items()}  # fmt: skip
        self.optimizer.state[self.coefficients] = moved


def elect(inputs: MergeInputs, density: float) -> kernels.Election:
    """The entries of the task vectors that TIES keeps, shared between candidates."""
    rows, limits = inputs.bank.task_vectors, cached_thresholds(inputs, density)
    return kernels.Election(limits, inputs.cached(("signs", density), lambda: kernels.elect_sign(rows, limits)))


def read_coefficients(location: str) -> tuple[dict[str, np.ndarray], tuple[str, ...] | None]:
    """Saved coefficients ``[L]`` by task, and the layers' names, None where they are task-wise.

    Raises :class:`CheckpointError` for a file that holds none.
    """
    path = open_location(location)
    try:
        if path.suffix == ".safetensors":
            # The names of the layers are text, and lie beside.
            beside = find_beside(location, ".json")
            about = json.loads(beside.read_text()) if beside else {}
            arrays = load_file(path) | {name: np.array(about[name]) for name in ("layers",) if name in about}
        else:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise CheckpointError(f"{location}: cannot be read as saved coefficients: {error}") from None
    given = {name.removeprefix(COEFFICIENT): row for name, row in arrays.items() if name.startswith(COEFFICIENT)}
    if not given:
        raise CheckpointError(f"{location}: holds no merging coefficients, but {sorted(arrays)}")
    return given, tuple(map(str, arrays["layers"])) if "layers" in arrays else None


def _plain(row: np.ndarray) -> float | list[float]:
    """A task's coefficients as the shortest numbers that give the same float32s."""
    numbers = [float(str(value)) for value in row]
    return numbers if len(numbers) > 1 else numbers[0]

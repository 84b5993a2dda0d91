"""What the masking methods share: the multi-task vector, the choice of mask lambdas, weights under masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merge_ray import kernels
from merge_ray.bank import ModelBank
from merge_ray.checkpoints import open_location
from merge_ray.errors import CheckpointError, ParameterError
from merge_ray.methods.base import Merged, MergeInputs, Method, param
from merge_ray.methods.task_arithmetic import sum_task_vectors
from merge_ray.methods.ties import ties_task_vector
from merge_ray.space import Choice, Either, Float, PerTask, Space

MASK_LAMBDAS = (0.2, 0.3, 0.4, 0.5, 0.6)
MASK = "mask/"
"""Packed masks are artifacts under this prefix and their task's name."""

_numbers = Float(0, 10)


@dataclass(frozen=True)
class Numbers(Space):
    """Non-empty sequences of values of ``each``."""

    each: Space

    def contains(self, value: Any) -> bool:
        """See :meth:`Space.contains`."""
        return isinstance(value, (tuple, list)) and bool(value) and all(map(self.each.contains, value))

    def grid(self) -> list[Any]:
        """A sequence is given, not searched."""
        return []

    def __str__(self) -> str:
        return f"several of {self.each}"


def mask_lambda_param() -> Any:
    """The parameter ``mask_lambda``."""
    return param(
        "validation",
        valid=Either((_numbers, PerTask(_numbers), Choice(("validation",)))),
        help="the TALL masks' lambda, one or per task; 'validation' takes each task's best of mask_lambdas",
    )


def mask_lambdas_param() -> Any:
    """The parameter ``mask_lambdas``."""
    return param(MASK_LAMBDAS, valid=Numbers(_numbers), help="what 'validation' chooses from; the first best wins")


def multi_task_vector_param() -> Any:
    """The parameter ``multi_task_vector``."""
    return param(
        "task_arithmetic",
        valid=Choice(("task_arithmetic", "ties")),
        search=Choice(("task_arithmetic", "ties")),
        help="the merged task vector: the plain sum, or TIES with the disjoint sum",
    )


def density_param() -> Any:
    """The parameter ``density`` of the TIES multi-task vector."""
    return param(0.2, valid=Float(0, 1), help="the trim of the TIES multi-task vector")


def make_multi_task_vector(inputs: MergeInputs, name: str, density: float) -> Tensor:
    """The merged task vector ``[P]`` that masks are taken against: ``task_arithmetic`` or ``ties``, coefficient 1."""
    return sum_task_vectors(inputs) if name == "task_arithmetic" else ties_task_vector(inputs, density, "sum")


@dataclass
class MaskedWeights(Merged):
    """``theta_0 + mask_t * tau`` for task ``t``, the masks made from the models whenever they are needed."""

    resolved: Method
    bank: ModelBank
    merged_task_vector: Tensor
    rule: kernels.MaskRule
    limits: Sequence[float]
    shared = False

    def write(self, task: str, out: Tensor) -> None:
        """See :meth:`Merged.write`."""
        index = self.bank.tasks.index(task)
        row, limit = self.bank.task_vectors[index : index + 1], self.limits[index : index + 1]
        kernels.apply_masks(self.rule, limit, self.bank.base, row, self.merged_task_vector, out)

    def storage_bytes(self) -> int:
        """The base, the merged task vector, and a bit per weight and task."""
        return masked_bytes(self.bank)

    def artifacts(self) -> dict[str, np.ndarray]:
        """Every task's mask as packed bits: ``mask/<task>``, uint8 ``[ceil(P / 8)]`` in the layout's order."""
        bank = self.bank
        bits = kernels.mask_bits(self.rule, self.limits, bank.base, bank.task_vectors, self.merged_task_vector)
        return {MASK + task: row.cpu().numpy() for task, row in zip(bank.tasks, bits, strict=True)}


@dataclass
class SavedMasks(Merged):
    """``theta_0 + mask_t * tau`` for task ``t``, with packed masks ``[T, ceil(P / 8)]`` from a file."""

    resolved: Method
    bank: ModelBank
    merged_task_vector: Tensor
    bits: Mapping[str, np.ndarray]
    shared = False

    def write(self, task: str, out: Tensor) -> None:
        """See :meth:`Merged.write`."""
        bits = torch.from_numpy(self.bits[task]).to(out.device)
        kernels.apply_bits(bits, self.bank.base, self.merged_task_vector, out)

    def storage_bytes(self) -> int:
        """The base, the merged task vector, and a bit per weight and task."""
        return masked_bytes(self.bank)

    def artifacts(self) -> dict[str, np.ndarray]:
        """The masks as they were read."""
        return {MASK + task: bits for task, bits in self.bits.items()}


def masked_bytes(bank: ModelBank) -> int:
    """What ``T`` masked models need: base and merged task vector in the stored dtypes, a bit per weight and task."""
    return 2 * bank.model_bytes + len(bank.tasks) * kernels.packed_size(bank.layout.size)


def read_masks(location: str, bank: ModelBank) -> dict[str, np.ndarray]:
    """The bank's tasks' packed masks from a ``.npz`` of artifacts, those of the columns that the bank has.

    Raises :class:`CheckpointError` for a file that does not fit.
    """
    path = open_location(location)
    try:
        with np.load(path, allow_pickle=False) as file:
            masks = {name.removeprefix(MASK): file[name] for name in file.files if name.startswith(MASK)}
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path}: cannot be read as saved masks: {error}") from None
    if missing := [task for task in bank.tasks if task not in masks]:
        raise CheckpointError(f"{path}: has masks for {sorted(masks)}, and none for {missing}")
    for task in bank.tasks:
        expected = (kernels.packed_size(bank.layout.size),)
        if masks[task].shape != expected or masks[task].dtype != np.uint8:
            found = f"{masks[task].dtype} {list(masks[task].shape)}"
            raise CheckpointError(f"{path}: the mask of {task} is {found}, for these models uint8 {list(expected)}")
    columns = bank.columns
    return {task: masks[task][columns.start // 8 : kernels.packed_size(columns.stop)] for task in bank.tasks}


def choose_mask_lambdas(
    method: Any, inputs: MergeInputs, merged_task_vector: Tensor
) -> tuple[list[float], Mapping[str, float] | float]:
    """A lambda for every task in the bank's order, and the value of ``mask_lambda`` that gives the same again.

    ``method`` has the parameters that this module declares. With ``mask_lambda="validation"`` every task's
    masked model is scored for each of ``mask_lambdas``, and the first of the best is taken, as published code
    does; candidates with the same multi-task vector share the choice.
    """
    if method.mask_lambda != "validation":
        return inputs.per_task(method.mask_lambda), method.mask_lambda
    try:
        score = inputs.validation
    except ParameterError as error:
        raise ParameterError(
            f"{error}: give mask_lambda a number, or one per task, instead of 'validation', or pass validation="
        ) from None

    def choose() -> Tensor:
        scores = np.empty((len(method.mask_lambdas), len(inputs.bank.tasks)))
        for index, mask_lambda in enumerate(method.mask_lambdas):
            # What is scored are TALL masks, also where the masks are for something else in the end.
            trial = dataclasses.replace(method, mask_lambda=mask_lambda)
            limits = [mask_lambda] * len(inputs.bank.tasks)
            merged = MaskedWeights(trial, inputs.bank, merged_task_vector, "tall", limits)
            scores[index] = [score(merged, task) for task in inputs.bank.tasks]
        return torch.tensor(method.mask_lambdas, dtype=torch.float64)[torch.from_numpy(scores.argmax(axis=0))]

    key = ("mask_lambda", method.multi_task_vector, method.density, tuple(method.mask_lambdas))
    best = [float(value) for value in inputs.cached(key, choose)]
    return best, dict(zip(inputs.bank.tasks, best, strict=True))

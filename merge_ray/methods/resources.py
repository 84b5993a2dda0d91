"""What methods may see beyond the bank, as they see it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from merge_ray.matching import Group


class TaskModel(Protocol):
    """One task's samples, in a fixed random order, and the model that answers them with the weights in ``flat``.

    task, split: which samples. skeleton: the model. flat: its weights ``[P]``, to be written before asking.
    answers_by_logits: whether outcomes are those of the logits. Positions are a slice or integers ``[B]``.
    :class:`merge_ray.evaluate.TaskModel` is it.
    """

    task: str
    split: str

    @property
    def skeleton(self) -> nn.Module: ...

    @property
    def flat(self) -> Tensor: ...

    @property
    def answers_by_logits(self) -> bool: ...

    def __len__(self) -> int: ...

    def inputs(self, positions: Any) -> Any: ...

    def samples(self, positions: Any) -> Any: ...

    def logits(self, inputs: Any) -> Tensor: ...

    def all_logits(self) -> Tensor: ...

    def outcomes(self, positions: Any) -> Tensor: ...

    def outcomes_of(self, logits: Tensor, positions: Any) -> Tensor: ...

    def average_outcomes(self, released: bool) -> Tensor: ...


class Unlabeled(Protocol):
    """The unlabelled samples of every task that a method may adapt on.

    models: by task. gradient: a context in which ``backward`` adds the gradient of the weights to the buffer ``[P]``
    that it gives, zero at first.
    """

    @property
    def models(self) -> Mapping[str, TaskModel]: ...

    def gradient(self) -> AbstractContextManager[Tensor]: ...


class Calibration(Protocol):
    """Statistics of the activations of all models of the bank, made once and shared by all candidates.

    :class:`merge_ray.statistics.ActivationStatistics` is it.
    """

    def correlation(self, group: Group) -> Tensor:
        """The Pearson correlation ``[N C, N C]`` of a group's channels, the models one below the other."""

    def observations(self, group: Group) -> int:
        """How many values of every channel it rests on: samples times positions."""

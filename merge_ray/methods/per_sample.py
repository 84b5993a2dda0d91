"""Answers to samples that each have merging coefficients of their own, in the faster of two exact ways.

``merge``: the weights of every distinct row of coefficients are written into the flat buffer, and its samples asked
for. ``shared``: one forward pass over all samples (:mod:`merge_ray.methods.shared_forward`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from merge_ray import kernels
from merge_ray.bank import ModelBank
from merge_ray.methods.base import Merged, Method, Predictor, TaskModel
from merge_ray.methods.shared_forward import shared_logits

Way = Literal["merge", "shared"]
PROBE = 8
"""Samples: what the ways cost is measured on this many, and on one."""


def outcomes_per_sample(
    bank: ModelBank, model: TaskModel, positions: Any, coefficients: Tensor, way: Way | None = None
) -> Tensor:
    """``model.outcomes`` ``[B]`` of the samples at ``positions``, sample ``i`` with ``theta_0 + sum_t c_it tau_t``.

    coefficients: ``[B, T]``, or ``[B, T, L]`` with one for each of the ``L`` tensors of the layout, in its order.
    way: None picks the cheaper, see :class:`Costs`; they agree to rounding. Samples with equal coefficients share a
    merge and a forward pass. Leaves other weights in ``model.flat``.
    """
    places = np.arange(len(model))[positions]
    coefficients = coefficients.detach().cpu().float()
    distinct, groups = torch.unique(coefficients, dim=0, return_inverse=True)
    if way is None:
        way = "merge"
        if model.answers_by_logits:
            way = _costs(bank, model, places, coefficients).pick(len(places), len(distinct))
    if way == "shared":
        return model.outcomes_of(shared_logits(bank, model, model.inputs(places), coefficients), places)
    order = torch.argsort(groups, stable=True)
    parts = []
    for row, members in zip(distinct, order.split(groups.bincount().tolist()), strict=True):
        merge_into(bank, row, model.flat)
        parts.append(model.outcomes(places[members.numpy()]))
    return torch.cat(parts)[torch.argsort(order).to(parts[0].device)]


def merge_into(bank: ModelBank, coefficients: Tensor, out: Tensor) -> None:
    """``out = theta_0 + sum_t c_t tau_t`` ``[P]`` with coefficients ``[T]``, or ``[T, L]`` by tensor of the layout."""
    if coefficients.ndim == 1:
        kernels.weighted_sum(bank.task_vectors, coefficients.tolist(), out, bank.base)
    else:
        by_layer = coefficients.to(out.device).contiguous()
        kernels.layer_sum(bank.task_vectors, by_layer, bank.layout.bounds, out, bank.base)


@dataclass
class SampleWeights(Predictor):
    """Answers every sample with weights of its own.

    coefficients: ``coefficients(model, positions)`` gives those of samples ``[B, T]`` or ``[B, T, L]``, and the bank
    whose task vectors they are for. notes: see :class:`merge_ray.methods.base.Merged`.
    """

    resolved: Method
    bank: ModelBank
    coefficients: Callable[[TaskModel, Any], tuple[ModelBank, Tensor]]
    notes: tuple[str, ...] = ()

    def outcomes(self, model: TaskModel, positions: Any) -> Tensor:
        """See :meth:`Predictor.outcomes`."""
        bank, coefficients = self.coefficients(model, positions)
        return outcomes_per_sample(bank, model, positions, coefficients)

    def storage_bytes(self) -> int:
        """The base and ``T`` task vectors in their stored dtypes."""
        return self.bank.model_bytes + self.bank.finetuned_bytes


@dataclass
class TaskWeights(Merged):
    """Every task's own weights, merged when they are asked for: ``theta_0 + sum_t c_t tau_t``.

    coefficients: ``[T]`` for each task.
    """

    resolved: Method
    bank: ModelBank
    coefficients: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    shared = False

    def write(self, task: str, out: Tensor) -> None:
        """See :meth:`Merged.write`."""
        merge_into(self.bank, self.coefficients[task], out)

    def storage_bytes(self) -> int:
        """``T`` models in their stored dtypes."""
        return self.bank.finetuned_bytes

    def artifacts(self) -> dict[str, np.ndarray]:
        """Every task's coefficients ``[T]``, in the order of the bank's tasks."""
        return {f"coefficients/{task}": row.numpy() for task, row in self.coefficients.items()}


@dataclass(frozen=True)
class Line:
    """Seconds for ``n`` samples: ``fixed + n * each``."""

    fixed: float
    each: float

    def seconds(self, calls: int, samples: int) -> float:
        """What ``samples`` cost in so many calls."""
        return calls * self.fixed + samples * self.each


@dataclass(frozen=True)
class Costs:
    """What the ways cost here: measured once for a model, as a rate of samples for each kind of forward pass and one
    of bytes for the merge.

    merge: seconds to write one merge: ``(T + 2) P`` floats at the memory's bandwidth. plain: a forward pass with the
    weights in the flat buffer. shared: the shared one, layer by layer; None where there is none.
    """

    merge: float
    plain: Line
    shared: Line | None

    def pick(self, samples: int, distinct: int) -> Way:
        """The cheaper way for ``samples`` with so many distinct coefficients."""
        if self.shared is None:
            return "merge"
        merging = distinct * self.merge + self.plain.seconds(distinct, samples)
        return "shared" if self.shared.seconds(1, samples) < merging else "merge"


_measured: WeakKeyDictionary[nn.Module, dict[Any, Costs]] = WeakKeyDictionary()


def _costs(bank: ModelBank, model: TaskModel, places: np.ndarray, coefficients: Tensor) -> Costs:
    """The costs for this model, bank size and kind of coefficients, measured at the first call."""
    known = _measured.setdefault(model.skeleton, {})
    key = (len(bank.tasks), coefficients.ndim)
    if key not in known:
        known[key] = _measure(bank, model, places[:PROBE], coefficients[:PROBE])
    return known[key]


@torch.inference_mode()
def _measure(bank: ModelBank, model: TaskModel, places: np.ndarray, coefficients: Tensor) -> Costs:
    merge = partial(merge_into, bank, coefficients[0], model.flat)

    def plain(count: int) -> Tensor:
        return model.logits(model.inputs(places[:count]))

    def shared(count: int) -> Tensor:
        return shared_logits(bank, model, model.inputs(places[:count]), coefficients[:count])

    merge()
    wanted = plain(1)
    measured = _seconds(merge, model), _line(plain, len(places), model)
    try:
        vectorized = shared(1)
    except (RuntimeError, ValueError):
        # Not every forward pass can be vectorised: this one branches on values, or mixes samples.
        return Costs(*measured, None)
    agree = torch.allclose(vectorized, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    return Costs(*measured, _line(shared, len(places), model) if agree else None)


def _line(forward: Callable[[int], Tensor], count: int, model: TaskModel) -> Line:
    one = _seconds(partial(forward, 1), model)
    if count == 1:
        return Line(0.0, one)
    each = max(_seconds(partial(forward, count), model) - one, 0.0) / (count - 1)
    return Line(max(one - each, 0.0), each)


def _seconds(work: Callable[[], object], model: TaskModel) -> float:
    """The time that ``work`` takes: the best of as many runs as fit a third of a second, one at least, 20 at most."""
    best, spent = float("inf"), 0.0
    for _ in range(20):
        _wait(model)
        started = time.perf_counter()
        work()
        _wait(model)
        seconds = time.perf_counter() - started
        best, spent = min(best, seconds), spent + seconds
        if spent > 0.3:
            break
    return best


def _wait(model: TaskModel) -> None:
    if model.flat.device.type == "cuda":
        torch.cuda.synchronize(model.flat.device)

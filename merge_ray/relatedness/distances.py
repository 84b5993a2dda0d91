"""Distances between gradient fields ``[N, steps, P]``, read some samples at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from merge_ray.errors import CheckpointError, SpecError

Distance = Literal["cosine", "euclidean", "cosine_frechet", "euclidean_frechet", "cosine_standardised", "absolute"]
Steps = Literal["all", "first_half", "second_half", "every_second", "last"]
BLOCK_BYTES = 2**28
"""How much of all fields together is read at once."""


class FieldLike(Protocol):
    """A field ``[N, steps, P]`` whose samples can be sliced: a tensor, or a file."""

    @property
    def shape(self) -> Any: ...

    def __getitem__(self, samples: slice, /) -> Tensor: ...


def choose_steps(steps: Steps, count: int) -> slice:
    """Which of ``count`` steps are compared. ``second_half`` starts at ``count // 2``, where ``first_half`` ends.

    ``every_second`` starts at the second one (what the authors do for more than 1500 samples); ``last`` of cumulative
    fields compares integrated gradients. Raises :class:`SpecError` where that leaves none.
    """
    chosen = {
        "all": slice(0, count),
        "first_half": slice(0, count // 2),
        "second_half": slice(count // 2, count),
        "every_second": slice(1, count, 2),
        "last": slice(count - 1, count),
    }
    if not len(range(count)[chosen[steps]]):
        raise SpecError(f"steps: {steps!r} of {count} leaves none")
    return chosen[steps]


def field_distances(
    fields: Mapping[str, FieldLike],
    pairs: Iterable[tuple[str, str]],
    distance: Distance = "cosine",
    steps: Steps = "all",
) -> dict[tuple[str, str], float]:
    """The distance between the two fields of every pair.

    ``cosine``: 1 - cosine, mean over samples and steps. ``euclidean``: the norm of the difference, likewise.
    ``cosine_frechet``, ``euclidean_frechet``: of each sample the largest over its steps, mean over samples.
    ``absolute``: the mean absolute difference. ``cosine_standardised``: cosine after every position of a field has been
    standardised over its samples and steps; a position that never changes counts as zero there (the authors' code
    gives NaN).

    Raises :class:`CheckpointError` for fields of different shapes.
    """
    shapes = {name: tuple(field.shape) for name, field in fields.items()}
    first, shape = next(iter(shapes.items()))
    if other := next((name for name in shapes if shapes[name] != shape), None):
        raise CheckpointError(f"the field of {other} is {shapes[other]}, that of {first} is {shape}")
    pairs, kept = list(pairs), choose_steps(steps, shape[1])
    used = {name: fields[name] for pair in pairs for name in pair}
    count = max(1, BLOCK_BYTES // (4 * shape[1] * shape[2] * max(1, len(used))))
    blocks = [slice(start, start + count) for start in range(0, shape[0], count)]
    moments = {name: _moments(field, blocks, kept) for name, field in used.items() if distance == "cosine_standardised"}
    totals = dict.fromkeys(pairs, 0.0)
    for block in blocks:
        parts = {name: _standardise(field[block][:, kept], moments.get(name)) for name, field in used.items()}
        for a, b in pairs:
            totals[a, b] += float(_of_samples(parts[a], parts[b], distance).sum(dtype=torch.float64))
    return {pair: total / shape[0] for pair, total in totals.items()}


def _of_samples(a: Tensor, b: Tensor, distance: Distance) -> Tensor:
    """The distance of every sample ``[n]`` of two fields ``[n, steps, P]``."""
    if distance.startswith("cosine"):
        by_step = 1 - functional.cosine_similarity(a, b, dim=-1, eps=1e-8)
    elif distance.startswith("euclidean"):
        by_step = torch.linalg.vector_norm(a - b, dim=-1)
    else:
        by_step = (a - b).abs().mean(dim=-1)
    return by_step.amax(dim=1) if distance.endswith("frechet") else by_step.mean(dim=1)


def _moments(field: FieldLike, blocks: Iterable[slice], kept: slice) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation ``[P]`` of every position over samples and steps."""
    number, total, squares = 0, torch.tensor(0.0), torch.tensor(0.0)
    for block in blocks:
        rows = field[block][:, kept].flatten(0, 1).double()
        number, total, squares = number + len(rows), total + rows.sum(0), squares + rows.square().sum(0)
    variance = (squares - total.square() / number).clamp(min=0) / max(1, number - 1)
    return total / number, variance.sqrt()


def _standardise(field: Tensor, moments: tuple[Tensor, Tensor] | None) -> Tensor:
    if moments is None:
        return field
    mean, deviation = moments
    return torch.where(deviation > 0, (field - mean) / deviation, 0.0).to(field.dtype)

"""TALL masks: every task keeps the part of the multi-task vector that matters to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_ray.methods.base import Merged, MergeInputs, Method, param, register
from merge_ray.methods.masking import (
    MaskedWeights,
    SavedMasks,
    choose_mask_lambdas,
    density_param,
    make_multi_task_vector,
    mask_lambda_param,
    mask_lambdas_param,
    multi_task_vector_param,
    read_masks,
)
from merge_ray.space import Space


@dataclass(frozen=True)
class MaskFile(Space):
    """The path of saved masks, or None."""

    def contains(self, value: Any) -> bool:
        """See :meth:`Space.contains`."""
        return value is None or (isinstance(value, str) and value.endswith(".npz"))

    def grid(self) -> list[Any]:
        """Masks are made unless a file is named."""
        return [None]

    def __str__(self) -> str:
        return "the path of a .npz file, or none"


@register(
    "tall_mask",
    paper="Wang et al., Localizing Task Information for Improved Model Merging and Compression, ICML 2024",
    needs=("validation",),
    by_columns=True,
)
@dataclass(frozen=True)
class TallMask(Method):
    """``theta_0 + mask_t * tau`` for task ``t``; ``mask_t = |tau_t| > lambda_t |(theta_0 + tau) - theta_t|``.

    ``tau`` ``[P]`` is the sum of the task vectors, or TIES's with the disjoint sum, with coefficient 1; the mask
    compares strictly, so that an untouched weight is never kept. Lambdas are chosen per task on validation data, the
    first best of ``mask_lambdas``. All that is stored is the base, ``tau`` and ``T`` bits per weight; a sweep
    keeps the packed masks beside the leaderboard, and ``masks`` reads them again in place of making them. (The
    authors' code cannot read back the masks that it saves; the bits are laid out as it saves them.)
    """

    mask_lambda: float | str | Mapping[str, float] = mask_lambda_param()
    mask_lambdas: tuple[float, ...] = mask_lambdas_param()
    multi_task_vector: str = multi_task_vector_param()
    density: float = density_param()
    masks: str | None = param(None, valid=MaskFile(), file=True, help="saved masks to use in place of making them")

    def merge(self, inputs: MergeInputs) -> Merged:
        """See :class:`TallMask`."""
        bits = read_masks(self.masks, inputs.bank) if self.masks else None
        vector = make_multi_task_vector(inputs, self.multi_task_vector, self.density)
        if bits is not None:
            return SavedMasks(self, inputs.bank, vector, bits)
        limits, mask_lambda = choose_mask_lambdas(self, inputs, vector)
        resolved = dataclasses.replace(self, mask_lambda=mask_lambda)
        return MaskedWeights(resolved, inputs.bank, vector, "tall", limits)

"""The result of matching one group: which merged channel every channel of every model joins."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Membership:
    """The merged channels of one group.

    columns: int64 ``[N, C]``, the merged channel that each channel of each of ``N`` models joins; -1 is none. width:
    ``C'``, the number of merged channels. epsilon: what published zips add to the number of a merged channel's
    members before they divide by it, which shrinks the merged weights a little.
    """

    columns: Tensor
    width: int
    epsilon: float = 1e-5

    @cached_property
    def scale(self) -> Tensor:
        """float32 ``[C']``: the number of models over the number of members."""
        counts = torch.bincount(self.columns[self.columns >= 0], minlength=self.width)
        return len(self.columns) / (counts + self.epsilon)

    def unmerge(self) -> Tensor:
        """float32 ``[N C, C']``: 1 where a channel joins a merged channel, the models one below the other."""
        flat = self.columns.reshape(-1, 1)
        return torch.zeros(len(flat), self.width).scatter_(1, flat.clamp(min=0), (flat >= 0).float())

    def merge(self) -> Tensor:
        """float32 ``[N C, C']``: :meth:`unmerge` with columns times :attr:`scale`."""
        return self.unmerge() * self.scale

    def collapse(self, tensor: Tensor, model: int, axis: int, scaled: bool) -> Tensor:
        """Add up the slices of a model's ``tensor`` along ``axis`` that share a merged channel: ``C`` become ``C'``.

        With ``scaled`` they are multiplied by :attr:`scale`: as the outputs of a layer are merged, while the weights
        that read a merged channel are added up.
        """
        columns = self.columns[model].to(tensor.device)
        kept = columns >= 0
        if not bool(kept.all()):
            columns, tensor = columns[kept], tensor.index_select(axis, kept.nonzero()[:, 0])
        shape = list(tensor.shape)
        shape[axis] = self.width
        if len(columns) == self.width and len(columns.unique()) == self.width:
            merged = tensor.index_select(axis, columns.argsort())
        else:
            merged = tensor.new_zeros(shape).index_add_(axis, columns, tensor)
        if not scaled:
            return merged
        scale = self.scale.to(tensor.device)
        return merged.mul_(scale.view([-1 if a == axis else 1 for a in range(tensor.dim())]))

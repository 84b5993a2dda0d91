"""Statistics of activations, streamed over batches, and batch-norm statistics made again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from merge_ray.bank import ModelBank
from merge_ray.errors import DataError
from merge_ray.matching import Group, PermutationGroups, correlation_of


class BatchMean:
    """A mean over batches, each of which counts as often as it has samples.

    total: the weighted sum. samples: their number.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.samples = 0

    def add(self, value: Tensor, samples: int) -> None:
        """Add a batch's ``value``."""
        self.samples += samples
        self.total = value * samples if self.total is None else self.total.add_(value, alpha=samples)

    @property
    def mean(self) -> Tensor:
        """The mean so far, shaped as the values."""
        assert self.total is not None, "a mean of no batches"
        return self.total / self.samples


# What is averaged over batches; ``features`` are ``[n, M]``: channels by samples and positions.


def second_moment(features: Tensor) -> Tensor:
    """``X X^T / M``: ``[n, n]``."""
    return (features @ features.T).div_(features.shape[1])


def mean_magnitude(features: Tensor) -> Tensor:
    """The mean of absolute values ``[n]``."""
    return features.abs().mean(dim=1)


def mean_cosine(features: Tensor) -> Tensor:
    """The cosines of the channels over ``M``: ``[n, n]``, as MuDSC's edition of ZipIt has them.

    The division by ``M`` changes no matching. ZipIt's own code leaves it out.
    """
    rows = torch.nn.functional.normalize(features, dim=1)
    return (rows @ rows.T).div_(features.shape[1])


class ActivationMoments:
    """The covariance of channels over all batches.

    mean, second: the :class:`BatchMean` of means ``[n]`` and second moments ``[n, n]``. observations: the values seen
    of each channel.
    """

    def __init__(self) -> None:
        self.mean, self.second = BatchMean(), BatchMean()
        self.observations = 0

    def add(self, features: Tensor, samples: int) -> None:
        """Add a batch of ``samples`` with ``features`` ``[n, M]``."""
        self.mean.add(features.mean(dim=1), samples)
        self.second.add(second_moment(features), samples)
        self.observations += features.shape[1]

    @property
    def covariance(self) -> Tensor:
        """Biased, ``[n, n]``."""
        mean = self.mean.mean
        return self.second.mean.sub_(torch.outer(mean, mean))


class ActivationStatistics:
    """The activations of every model of a bank on the same batches, at all groups at once, when first asked for.

    :class:`merge_ray.methods.base.Calibration` for methods that match channels.
    """

    def __init__(
        self,
        skeleton: nn.Module,
        flat: Tensor,
        bank: ModelBank,
        groups: PermutationGroups,
        batches: Iterable[Tensor],
    ) -> None:
        """``skeleton`` takes the ``batches`` ``[B, ...]`` and has its weights in ``flat`` ``[P]``, left as it was.

        The groups' activations are paths in ``skeleton``. Asking raises :class:`DataError` where there are no batches.
        """
        self._skeleton, self._flat, self._bank = skeleton, flat, bank
        self._groups, self._batches = groups, batches
        self._correlations: dict[str, Tensor] = {}

    @cached_property
    def moments(self) -> dict[str, ActivationMoments]:
        """The moments of every group, by its name: the channels of all models, one below the other."""
        moments = {group.name: ActivationMoments() for group in self._groups}
        kept = self._flat.clone()
        modes = {module: module.training for module in self._skeleton.modules()}
        self._skeleton.eval()
        try:
            with torch.no_grad():
                for batch in self._batches:
                    for name, features in self._features(batch).items():
                        moments[name].add(features, len(batch))
        finally:
            self._flat.copy_(kept)
            for module, mode in modes.items():
                module.training = mode
        if not all(moment.observations for moment in moments.values()):
            raise DataError("there are no samples to observe activations on")
        return moments

    def _features(self, batch: Tensor) -> dict[str, Tensor]:
        """Every group's channels of all models, ``[N C, M]``."""
        features: dict[str, list[Tensor]] = {group.name: [] for group in self._groups}
        for task_vector in self._bank.task_vectors:
            torch.add(self._bank.base, task_vector, out=self._flat)
            with observed(self._skeleton, {group.activation for group in self._groups}) as seen:
                self._skeleton(batch)
            for group in self._groups:
                features[group.name].append(seen[group.activation])
        return {name: torch.cat(parts) for name, parts in features.items()}

    def correlation(self, group: Group) -> Tensor:
        """See :class:`merge_ray.methods.base.Calibration`."""
        if group.name not in self._correlations:
            self._correlations[group.name] = correlation_of(self.moments[group.name].covariance)
        return self._correlations[group.name]

    def observations(self, group: Group) -> int:
        """See :class:`merge_ray.methods.base.Calibration`."""
        return self.moments[group.name].observations


@contextmanager
def observed(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """What the modules at ``paths`` take meanwhile, with channels first: ``[C, M]`` over samples and positions.

    The output layer of torch's attention is not called as a module; what it takes is computed again.
    """
    seen: dict[str, Tensor] = {}
    hooks = []
    for path in paths:
        module = model.get_submodule(path)
        parent = model.get_submodule(path.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            hook = partial(_see_heads, seen, path)
            hooks.append(parent.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            hooks.append(module.register_forward_pre_hook(partial(_see, seen, path)))
    try:
        yield seen
    finally:
        for handle in hooks:
            handle.remove()


def _see(seen: dict[str, Tensor], path: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    channels_second = isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.GroupNorm)
    seen[path] = inputs[0].movedim(1 if channels_second else -1, 0).flatten(1)


def _see_heads(seen: dict[str, Tensor], path: str, module: Any, inputs: tuple[Any, ...], options: Any) -> None:
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    width = module.embed_dim
    copied.out_proj = nn.Linear(width, width, device="meta")
    copied.out_proj.weight = nn.Parameter(torch.eye(width, device=inputs[0].device), requires_grad=False)
    copied.out_proj.bias = nn.Parameter(torch.zeros(width, device=inputs[0].device), requires_grad=False)
    heads, _ = copied.forward(*inputs, **options)
    seen[path] = heads.movedim(-1, 0).flatten(1)


@torch.no_grad()
def reset_batch_norm(models: Sequence[nn.Module], batches: Iterable[Tensor], *, clear: bool = True) -> None:
    """Make the running statistics of every ``BatchNorm2d`` again: the plain mean over the batches' statistics.

    All models see the same batches ``[B, ...]`` once, in training mode: a layer's input is normalised by batch
    statistics before it, batches count equally, and variances are unbiased. Other normalisations are updated with
    their own momentum. Without ``clear`` those of ``BatchNorm2d`` are too.

    Merging changes the statistics of every layer, so all models that are compared get this (Jordan et al., REPAIR,
    ICLR 2023; MuDSC).
    """
    with _training(models, clear):
        for batch in batches:
            for model in models:
                model(batch)


@contextmanager
def _training(models: Sequence[nn.Module], clear: bool) -> Iterator[None]:
    modes = {module: module.training for model in models for module in model.modules()}
    # Subclasses have rules of their own; published code leaves them alone.
    norms = [module for module in modes if type(module) is nn.BatchNorm2d] if clear else []
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    for model in models:
        model.train()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode

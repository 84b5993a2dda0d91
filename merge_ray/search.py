"""Searchers: how a study proposes the parameters to try next.

A proposer is asked for parameters and told what they scored, in a fixed order. Given the same seed and the
same answers it proposes the same candidates, which is what lets a sweep be replayed from its ledger. Nothing
here knows Ray; :mod:`merge_ray.cluster.study` puts a proposer under Ray Tune.
"""

from __future__ import annotations

import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna

from merge_ray.space import Choice, Float, Int, PerTask, Space


@dataclass(frozen=True)
class Outcome:
    """What a candidate scored: its objective (None if it failed) and the objective at every report."""

    value: float | None
    curve: tuple[float, ...] = ()
    pruned: bool = False


class Proposer(ABC):
    """Proposes parameters; ``None`` when there is nothing left to propose."""

    @abstractmethod
    def ask(self) -> dict[str, Any] | None:
        """The next parameters."""

    @abstractmethod
    def tell(self, outcome: Outcome) -> None:
        """Take the outcome of the oldest proposal that has not been answered yet."""


class ListProposer(Proposer):
    """Proposes a fixed sequence: a grid, or random draws. Outcomes change nothing."""

    def __init__(self, proposals: Iterable[dict[str, Any]]) -> None:
        self._proposals = iter(proposals)

    def ask(self) -> dict[str, Any] | None:
        return next(self._proposals, None)

    def tell(self, outcome: Outcome) -> None:
        """Nothing is learnt from it."""


class OptunaProposer(Proposer):
    """TPE or CMA-ES through Optuna's ask-and-tell interface, maximising.

    ``start`` is proposed first (the published defaults); ``known`` are scored parameters to learn from.
    """

    def __init__(
        self,
        space: Mapping[str, Space],
        tasks: Sequence[str],
        sampler: optuna.samplers.BaseSampler,
        start: Mapping[str, Any],
        known: Sequence[tuple[Mapping[str, Any], float]] = (),
    ) -> None:
        self._axes = _axes(space, tasks)
        self._distributions = {name: _distribution(axis) for name, axis in self._axes.items()}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        for parameters, value in known:
            if (params := self._to_optuna(parameters)) is not None:
                self._study.add_trial(
                    optuna.trial.create_trial(params=params, distributions=self._distributions, value=value)
                )
        if (params := self._to_optuna(start)) is not None:
            self._study.enqueue_trial(params)
        self._open: list[optuna.trial.Trial] = []

    def ask(self) -> dict[str, Any]:
        trial = self._study.ask(self._distributions)
        self._open.append(trial)
        return _join_axes({name: _value(self._axes[name], item) for name, item in trial.params.items()})

    def tell(self, outcome: Outcome) -> None:
        trial = self._open.pop(0)
        if outcome.value is None:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        elif outcome.pruned:
            for step, value in enumerate(outcome.curve, start=1):
                trial.report(value, step)
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self._study.tell(trial, outcome.value)

    def _to_optuna(self, parameters: Mapping[str, Any]) -> dict[str, Any] | None:
        """Parameters in Optuna's terms, or None if they lie outside the space."""
        params: dict[str, Any] = {}
        for name, axis in self._axes.items():
            parameter, _, task = name.partition("@")
            value = parameters.get(parameter)
            if task and isinstance(value, Mapping):
                value = value.get(task)
            if not axis.contains(value):
                return None
            params[name] = axis.options.index(value) if isinstance(axis, Choice) else value
        return params


def make_proposer(
    searcher: str,
    space: Mapping[str, Space],
    tasks: Sequence[str],
    seed: int,
    start: Mapping[str, Any],
    known: Sequence[tuple[Mapping[str, Any], float]] = (),
) -> Proposer:
    """The proposer for one study.

    searcher: ``grid``, ``random``, ``optuna`` (TPE) or ``cmaes``. space: what varies, by parameter name; with
    nothing to vary there is one proposal. tasks: the axes of per-task parameters. start: the parameters that TPE
    and CMA-ES begin with. known: scored parameters to learn from.
    """
    if not space:
        return ListProposer([{}])
    if searcher == "grid":
        return ListProposer(_grid(space))
    if searcher == "random":
        return ListProposer(_random(space, tasks, seed))
    return OptunaProposer(space, tasks, _sampler(searcher, seed), start, known)


def _sampler(searcher: str, seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if searcher == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        # Budgets are small: five random draws are enough to start. The liar keeps parallel candidates apart.
        return optuna.samplers.TPESampler(n_startup_trials=5, seed=seed, multivariate=True, constant_liar=True)


def halving_cutoffs(
    told: Sequence[Outcome], reports: int, reduction_factor: int, grace_reports: int
) -> dict[int, float]:
    """The objective that a new candidate must reach after each rung's reports to go on.

    Successive halving (Li et al., A System for Massively Parallel Hyperparameter Tuning, 2020) with one change:
    a rung compares with the outcomes told so far, not with whatever happens to have arrived, so that the same
    ledger gives the same decisions. The top ``1 / reduction_factor`` of those that reached a rung go on.
    """
    cutoffs: dict[int, float] = {}
    rung = grace_reports
    while rung < reports:
        values = [outcome.curve[rung - 1] for outcome in told if len(outcome.curve) >= rung]
        if len(values) >= reduction_factor:
            cutoffs[rung] = float(np.quantile(values, 1 - 1 / reduction_factor))
        rung *= reduction_factor
    return cutoffs


def _grid(space: Mapping[str, Space]) -> Iterable[dict[str, Any]]:
    for values in itertools.product(*(axis.grid() for axis in space.values())):
        yield dict(zip(space, values, strict=True))


def _random(space: Mapping[str, Space], tasks: Sequence[str], seed: int) -> Iterable[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    axes = _axes(space, tasks)
    while True:
        yield _join_axes({name: _draw(axis, generator) for name, axis in axes.items()})


def _draw(axis: Space, generator: np.random.Generator) -> Any:
    match axis:
        case Float(low, high, log=True):
            return float(np.exp(generator.uniform(np.log(low), np.log(high))))
        case Float(low, high):
            return float(generator.uniform(low, high))
        case Int(low, high):
            return int(generator.integers(low, high + 1))
        case _:
            options = axis.grid()
            return options[int(generator.integers(len(options)))]


def _axes(space: Mapping[str, Space], tasks: Sequence[str]) -> dict[str, Space]:
    """The space with each per-task parameter spread over one axis a task, named ``parameter@task``."""
    axes: dict[str, Space] = {}
    for name, part in space.items():
        if isinstance(part, PerTask):
            axes.update({f"{name}@{task}": part.each for task in sorted(tasks)})
        elif isinstance(part, (Float, Int, Choice)):
            axes[name] = part
        else:
            axes[name] = Choice(tuple(part.grid()))
    return axes


def _join_axes(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`_axes` for one point."""
    parameters: dict[str, Any] = {}
    for name, value in values.items():
        parameter, _, task = name.partition("@")
        if task:
            parameters.setdefault(parameter, {})[task] = value
        else:
            parameters[parameter] = value
    return parameters


def _distribution(axis: Space) -> optuna.distributions.BaseDistribution:
    match axis:
        case Float(low, high, log=log):
            return optuna.distributions.FloatDistribution(low, high, log=log)
        case Int(low, high):
            return optuna.distributions.IntDistribution(low, high)
        case _:
            # By index: Optuna's categories must be plain values, ours may be anything.
            return optuna.distributions.CategoricalDistribution(tuple(range(len(axis.grid()))))


def _value(axis: Space, item: Any) -> Any:
    return axis.grid()[item] if isinstance(axis, Choice) else item

"""Mixture models of merging coefficients: Dirichlet mixtures on the simplex, Beta mixtures between 0 and 1.

All are fitted by expectation-maximisation from the hard labels of k-means, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import betaln, digamma, gammaln, logsumexp, polygamma
from sklearn.cluster import KMeans

Array = np.ndarray
Run = tuple[Array, Array, float]
"""Weights and parameters after the last M-step, and the mean log-likelihood before it."""
SAMPLES_PER_COMPONENT = 2
BREADTH = 0.01
LARGEST_PRECISION = 1e8
"""A component's concentrations sum to this at most: for samples that are all equal the likelihood has no bound."""


class MixtureError(ValueError):
    """A mixture that cannot be fitted to its samples."""


@dataclass(frozen=True)
class Mixture:
    """A fitted mixture of ``K`` components.

    weights: ``[K]``, sum 1. means: a coefficient (vector) for each component ``[K]`` or ``[K, D]``. parameters: of the
    components' densities ``[K, D]`` (Beta: ``[K, 2]``). lower_bound: the mean log-likelihood of the fit.
    log_density: of samples under every component ``[N, K]``.
    """

    weights: Array
    means: Array
    parameters: Array
    lower_bound: float
    log_density: Callable[[Array], Array]

    def mean(self) -> Array:
        """The components' means weighted by their weights: one coefficient (vector)."""
        return np.asarray(self.weights @ self.means)

    def responsibilities(self, samples: Array) -> Array:
        """How likely each component made each sample ``[N, K]``."""
        return _posterior(self.log_density(samples), self.weights)[0]

    def assign(self, samples: Array) -> Array:
        """The likeliest component of each sample ``[N]``."""
        return self.responsibilities(samples).argmax(axis=1)


def kmeans_labels(samples: Array, components: int, runs: int, seed: int) -> Array:
    """The labels ``[runs, N]`` of k-means from ``runs`` seeds; raises :class:`MixtureError` for too few samples.

    samples: ``[N, D]``.
    """
    check_samples(samples, components)
    return np.stack([KMeans(components, n_init=1, random_state=seed + run).fit(samples).labels_ for run in range(runs)])


def check_samples(samples: Array, components: int) -> None:
    """Raises :class:`MixtureError` for fewer than two samples a component, or fewer distinct ones than components."""
    if len(samples) < SAMPLES_PER_COMPONENT * components:
        raise MixtureError(
            f"{len(samples)} samples are too few for {components} components; "
            f"at least {SAMPLES_PER_COMPONENT * components} are needed"
        )
    if (distinct := len(np.unique(samples, axis=0))) < components:
        raise MixtureError(f"{len(samples)} samples with {distinct} distinct values cannot make {components} clusters")


def fit_or_mean(task: str, samples: Array, fit: Callable[[Array], Mixture], notes: list[str]) -> Mixture:
    """``fit(samples)``, or one component at the samples' mean with a note, where the mixture cannot be fitted."""
    try:
        return fit(samples)
    except MixtureError as error:
        notes.append(f"{task}: {error}; it uses the mean of its coefficients instead of a mixture")
        mean = samples.mean(axis=0, keepdims=True)
        return Mixture(np.ones(1), mean, mean, 0.0, lambda rows: np.zeros((len(rows), 1)))


def fit_kmeans(samples: Array, clusters: int, seed: int) -> Mixture:
    """k-means as a mixture: a sample belongs to the component of the nearest centre alone."""
    check_samples(samples, clusters)
    model = KMeans(clusters, n_init=5, random_state=seed).fit(samples)
    weights = np.bincount(model.labels_, minlength=clusters) / len(samples)
    centers = model.cluster_centers_

    def log_density(rows: Array) -> Array:
        nearest = np.linalg.norm(rows[:, None] - centers, axis=2).argmin(axis=1)
        return np.where(np.eye(clusters, dtype=bool)[nearest], 0.0, -np.inf)

    return Mixture(weights, centers, centers, 0.0, log_density)


def fit_dirichlet(samples: Array, labels: Array, max_iterations: int = 500, tolerance: float = 1e-5) -> Mixture:
    """A Dirichlet mixture by maximum likelihood: the best of the runs that start from ``labels`` ``[runs, N]``.

    samples: positive, of sum 1, ``[N, D]``. The M-step fits each component's concentrations ``[D]`` to the weighted
    mean of the samples' logarithms (Minka, Estimating a Dirichlet Distribution, 2000), started from its moments. To
    every component all samples together count as :data:`BREADTH` of one more of its own, so that none closes in on few
    of them, where the likelihood has no bound.
    """
    samples = np.asarray(samples, np.float64)
    logs = np.log(samples)

    def maximize(responsibilities: Array) -> tuple[Array, Array]:
        shares = responsibilities + BREADTH / len(samples)
        shares = (shares / shares.sum(axis=0)).T
        return responsibilities.mean(axis=0), _fit_concentrations(_moments(samples, shares), shares @ logs)

    weights, alphas, bound = _best(
        _expectation_maximization(logs, labels, maximize, _dirichlet_density, max_iterations, tolerance)
    )
    means = alphas / alphas.sum(axis=1, keepdims=True)
    return Mixture(weights, means, alphas, bound, lambda rows: _dirichlet_density(_logs(rows), alphas))


def fit_released_dirichlet(samples: Array, labels: Array) -> Mixture:
    """The Dirichlet "mixture" of DaWin's released code, quirks included, from ``labels`` ``[runs, N]``.

    Its M-step takes the weighted mean of the samples for a component's concentrations, so that each vector of them
    sums to 1; the densities are nearly flat and the components drift together, or leave some of them empty. The
    best run gives weights and means, but samples are assigned with the parameters of the last run.
    """
    samples = np.asarray(samples)
    # The logarithms are taken in the samples' own precision, as published.
    logs = np.log(samples).astype(np.float64)
    rows = samples.astype(np.float64)

    def maximize(responsibilities: Array) -> tuple[Array, Array]:
        counts = responsibilities.sum(axis=0) + 1e-14
        return responsibilities.mean(axis=0), responsibilities.T @ rows / counts[:, None]

    runs = _expectation_maximization(logs, labels, maximize, _dirichlet_density, 500, 1e-5, floor=1e-14)
    weights, means, bound = _best(runs)
    last = runs[-1][1]
    return Mixture(weights, means, means, bound, lambda rows: _dirichlet_density(np.log(rows).astype(float), last))


def fit_beta(samples: Array, labels: Array, max_iterations: int = 1000, tolerance: float = 1e-4) -> Mixture:
    """A Beta mixture of ``samples`` ``[N]`` in (0, 1) by moments: the best of the runs from ``labels`` ``[runs, N]``.

    With ``mu`` and ``var`` of a component, ``alpha = f mu`` and ``beta = f (1 - mu)``, ``f = mu (1 - mu) / var - 1``,
    the variance cut at a quarter of ``mu (1 - mu)``, as in DaWin's released code.
    """
    samples = np.asarray(samples, np.float64)
    tiny = 10 * np.finfo(np.float64).eps

    def maximize(responsibilities: Array) -> tuple[Array, Array]:
        counts = responsibilities.sum(axis=0) + tiny
        means = samples @ responsibilities / counts
        variances = ((samples[:, None] - means) ** 2 * responsibilities).sum(axis=0) / counts
        variances = np.minimum(variances, means * (1 - means) / 4) + tiny
        factors = means * (1 - means) / (variances + 1e-10) - 1
        return counts / counts.sum(), np.stack([factors * means, factors * (1 - means)], axis=1)

    logs = _beta_logs(samples)
    weights, parameters, bound = _best(
        _expectation_maximization(logs, labels, maximize, _beta_density, max_iterations, tolerance, floor=tiny)
    )
    means = parameters[:, 0] / parameters.sum(axis=1)
    return Mixture(weights, means, parameters, bound, lambda rows: _beta_density(_beta_logs(rows), parameters))


def _expectation_maximization(
    logs: Array,
    labels: Array,
    maximize: Callable[[Array], tuple[Array, Array]],
    log_density: Callable[[Array, Array], Array],
    max_iterations: int,
    tolerance: float,
    floor: float = 0.0,
) -> list[Run]:
    """One run from each row of hard labels ``[runs, N]``, to which ``floor`` is added."""
    runs = []
    for labels_of_run in labels:
        weights, parameters = maximize(np.eye(labels.max() + 1)[labels_of_run] + floor)
        bound = -np.inf
        for _ in range(max_iterations):
            before = bound
            responsibilities, bound = _posterior(log_density(logs, parameters), weights)
            weights, parameters = maximize(responsibilities)
            if abs(bound - before) < tolerance:
                break
        runs.append((weights, parameters, bound))
    return runs


def _best(runs: list[Run]) -> Run:
    """The run of greatest likelihood; raises :class:`MixtureError` where it is not finite."""
    weights, parameters, bound = max(runs, key=lambda run: run[2])
    if not (np.isfinite(parameters).all() and np.isfinite(bound)):
        raise MixtureError("the fit of the mixture does not stay finite")
    return weights, parameters, bound


def _posterior(log_density: Array, weights: Array) -> tuple[Array, float]:
    """The components' responsibilities ``[N, K]`` and the mean log-likelihood."""
    with np.errstate(divide="ignore"):
        joint = log_density + np.log(weights)
    likelihood = logsumexp(joint, axis=1, keepdims=True)
    return np.exp(joint - likelihood), float(likelihood.mean())


def _logs(samples: Array) -> Array:
    return np.log(np.asarray(samples, np.float64))


def _dirichlet_density(logs: Array, alphas: Array) -> Array:
    normalizers = gammaln(alphas.sum(axis=1)) - gammaln(alphas).sum(axis=1)
    return logs @ (alphas - 1).T + normalizers


def _moments(samples: Array, shares: Array) -> Array:
    """Concentrations ``[K, D]`` with the means of the samples under ``shares`` ``[K, N]``, and their spread."""
    means = shares @ samples
    spread = shares @ (samples**2).sum(axis=1) - (means**2).sum(axis=1)
    precisions = (means * (1 - means)).sum(axis=1) / np.maximum(spread, 1e-12) - 1
    return means * np.clip(precisions, 1e-2, LARGEST_PRECISION)[:, None]


def _fit_concentrations(alphas: Array, mean_logs: Array, steps: int = 100) -> Array:
    """Concentrations ``[K, D]`` of greatest likelihood for mean logarithms ``[K, D]``, by Newton's method.

    The Hessian is a diagonal plus a constant, so a step costs ``D``. A step that would leave the positive numbers is
    shortened to go half of the way there.
    """
    for _ in range(steps):
        totals = alphas.sum(axis=1, keepdims=True)
        gradient = digamma(totals) - digamma(alphas) + mean_logs
        diagonal, constant = -polygamma(1, alphas), polygamma(1, totals)
        shift = (gradient / diagonal).sum(axis=1, keepdims=True)
        step = (gradient - shift / (1 / constant + (1 / diagonal).sum(axis=1, keepdims=True))) / diagonal
        reach = (step / alphas).max(axis=1, keepdims=True)
        step *= np.where(reach < 1, 1, 0.5 / np.maximum(reach, 1))
        alphas = alphas - step
        alphas *= np.minimum(1, LARGEST_PRECISION / alphas.sum(axis=1, keepdims=True))
        if (np.abs(step) < 1e-6 * alphas).all():
            break
    return alphas


def _beta_logs(samples: Array) -> Array:
    samples = np.asarray(samples, np.float64)
    return np.stack([np.log(samples), np.log1p(-samples)], axis=1)


def _beta_density(logs: Array, parameters: Array) -> Array:
    return logs @ (parameters - 1).T - betaln(parameters[:, 0], parameters[:, 1])

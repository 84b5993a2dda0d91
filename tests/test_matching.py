"""Matching functions and streamed statistics, against recorded numbers (tests/golden) and against a naive zip."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from test_goldens import Case, load
from torch import Tensor

from merge_ray import statistics
from merge_ray.errors import ParameterError
from merge_ray.matching import (
    Matched,
    Membership,
    ZipRule,
    correlation,
    correlation_of,
    cosine,
    identity,
    optimal,
    paired_products,
    permute,
    zip_channels,
)


def sets(case: Case) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from case.parameters["sets"].items()


def rule_of(about: dict[str, Any], **options: Any) -> ZipRule:
    return ZipRule(about["a"], about["b"], **options)


def kept(size: int, reduction: float) -> int:
    return int(size * (1 - reduction) + 1e-4)


def check_exactly(case: Case, key: str, got: Tensor) -> None:
    assert torch.equal(got, case.expected[key]), key


def check_matched(case: Case, matched: Matched, prefix: str, name: str) -> None:
    membership, value = matched
    check_exactly(case, f"{prefix}unmerge/{name}", membership.unmerge())
    case.check(f"{prefix}merge/{name}", membership.merge() / len(membership.columns))
    case.check(f"{prefix}value/{name}", np.array([value]))


def test_zip_as_mudsc_has_it() -> None:
    case = load("mudsc/zip_matching")
    for name, about in sets(case):
        keep = kept(about["n"] * about["C"], about["reduce"])
        matched = zip_channels(case.inputs[f"sims/{name}"], about["n"], rule_of(about), keep)
        check_matched(case, matched, "", name)


def test_assignment_as_mudsc_has_it() -> None:
    case = load("mudsc/permutation_matching")
    for name, about in sets(case):
        check_matched(case, permute(case.inputs[f"sims/{name}"], about["n"]), "", name)


def test_channels_in_groups() -> None:
    case = load("mudsc/group_matching")
    for name, about in sets(case):
        similarity, models, groups = case.inputs[f"sims/{name}"], about["n"], about["groups"]
        check_matched(case, permute(similarity, models, groups), "alignment_", name)
        check_matched(case, zip_channels(similarity, models, rule_of(about), groups=groups), "zip_", name)


def padded(membership: Membership, models: int) -> Tensor:
    """The membership of ZipIt's layers with biases, which give each model one channel more."""
    unmerge = membership.unmerge().view(models, -1, membership.width)
    unmerge = torch.nn.functional.pad(unmerge, (0, 1, 0, 1))
    unmerge[:, -1, -1] = 1
    return unmerge.flatten(0, 1)


def check_zipit(case: Case, membership: Membership, name: str, about: dict[str, Any], prefix: str = "") -> None:
    unmerge = padded(membership, about["n"]) if about.get("add_bias") else membership.unmerge()
    check_exactly(case, f"{prefix}unmerge/{name}", unmerge)
    case.check(f"{prefix}merge/{name}", membership.merge().T / len(membership.columns))


@pytest.mark.parametrize(("name", "prefixes"), [("zipit", ("",)), ("zipit_in_place", ("upstream_", "in_place_"))])
def test_zip_as_zipit_has_it(name: str, prefixes: tuple[str, ...]) -> None:
    case = load(f"zipit/match_tensors_{name}")
    for key, about in sets(case):
        matrix = case.inputs[f"matrix/{key}"]
        similarity = matrix if about.get("metric") == "cossim" else correlation_of(matrix)
        models, keep = int(1 / (1 - about["r"]) + 0.5), kept(len(matrix), about["r"])
        for prefix in prefixes:
            rule = rule_of(about, shifted_owners=prefix == "in_place_")
            membership, _ = zip_channels(similarity, models, rule, keep)
            check_zipit(case, membership, key, {**about, "n": models}, prefix)


def test_other_matchings_as_zipit_has_them() -> None:
    case = load("zipit/match_tensors_others")
    for key, about in sets(case):
        matrix, models, channels = case.inputs[f"matrix/{key}"], about["n"], about["C"]
        if about["fn"] == "match_tensors_permute":
            membership, _ = permute(correlation_of(matrix), models)
        elif about["fn"] == "match_tensors_identity":
            membership, _ = identity(models, channels)
        else:
            # match_tensors_return_a: the first model alone.
            columns = torch.stack([torch.arange(channels), torch.full((channels,), -1)])
            membership = Membership(columns, channels)
        check_zipit(case, membership, key, about)


def test_optimal_matching() -> None:
    case = load("zipit/match_tensors_optimal")
    for name, _ in sets(case):
        similarity = correlation_of(case.inputs[f"matrix/{name}"])
        membership, value = optimal(similarity, 2)
        case.check(f"pairs/{name}", membership.unmerge().T.nonzero()[:, 1].view(-1, 2))
        case.check(f"merge_sorted/{name}", membership.merge().T / 2)
        case.check(f"total_correlation/{name}", np.array([value * membership.width]))
    with pytest.raises(ParameterError, match="pairs the channels of two models; these are 3"):
        optimal(similarity, 3)


def test_similarities() -> None:
    case = load("mudsc/similarity_functions")
    rows = torch.cat([case.inputs["vectors/0"], case.inputs["vectors/1"]])
    case.check("correlation", correlation(rows))
    case.check("cosine", cosine(rows))
    moments = statistics.ActivationMoments()
    for batch, samples in enumerate(case.parameters["batch_sizes"]):
        models = [case.inputs[f"features/{batch}/{model}"] for model in range(2)]
        moments.add(torch.cat([features.transpose(0, 1).flatten(1) for features in models]), samples)
    assert moments.mean.total is not None and moments.second.total is not None
    case.check("activation_mean_weighted_sum", moments.mean.total)
    case.check("activation_outer_weighted_sum", moments.second.total)
    case.check("activation_correlation", correlation_of(moments.covariance))


def test_streamed_statistics_as_zipit_has_them() -> None:
    case = load("zipit/metrics")
    moments, magnitude, cosines = statistics.ActivationMoments(), statistics.BatchMean(), statistics.BatchMean()
    for batch, samples in enumerate(case.parameters["batch_sizes"]):
        features = torch.cat([case.inputs[f"features/{batch}/{model}"] for model in range(2)])
        moments.add(features, samples)
        magnitude.add(statistics.mean_magnitude(features), samples)
        cosines.add(statistics.mean_cosine(features), samples)
    case.check("covariance", moments.covariance)
    case.check("correlation", correlation_of(moments.covariance))
    case.check("mean", magnitude.mean)
    case.check("cossim", cosines.mean)


def test_products_skip_what_is_zero_on_either_side() -> None:
    case = load("git_rebasin/similarity_with_zeros")
    dot, norms = paired_products(case.inputs["a"].flatten(1), case.inputs["b"].flatten(1))
    case.check("dot", dot)
    case.check("norms", norms)


def naive_zip(similarity: Tensor, models: int, rule: ZipRule) -> Tensor:
    """The published procedure as it reads, with a copy of the matrix for every merge; ``[N C, C]``."""
    matrix, size = similarity.clone(), len(similarity)
    matrix.fill_diagonal_(-torch.inf)
    unmerge, owners = torch.eye(size), torch.arange(models).repeat_interleave(size // models)
    budget = torch.full((models,), int((size - size // models) // models * rule.b + 1e-4))
    while unmerge.shape[1] > size // models:
        i, j = sorted(divmod(int(matrix.argmax()), len(matrix)))
        others = [k for k in range(len(matrix)) if k != j]
        unmerge[:, i] += unmerge[:, j]
        matrix[:, i] = torch.minimum(matrix[:, i], matrix[:, j]) * rule.a
        matrix = matrix[:, others]
        matrix[i] = torch.minimum(matrix[i], matrix[j]) * rule.a
        matrix, unmerge, within = matrix[others], unmerge[:, others], owners[i] == owners[j]
        owners = owners[others]
        if within:
            budget[owners[i]] -= 1
            if budget[owners[i]] <= 0:
                inside = owners == owners[i]
                matrix[inside[:, None] & inside] = -torch.inf
    return unmerge


@pytest.mark.parametrize("seed", range(6))
def test_zip_is_the_published_procedure_with_ties_too(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(90, 12, generator=generator)
    rows[torch.randperm(90, generator=generator)[:25]] = 0
    similarity = correlation(rows)
    if seed % 2:
        similarity = (similarity * 4).round() / 4
    models, rule = (2, 3)[seed // 2 % 2], (ZipRule(), ZipRule(0.3, 0.25), ZipRule(1.0, 0.5))[seed // 2]
    membership, _ = zip_channels(similarity, models, rule)
    assert torch.equal(membership.unmerge(), naive_zip(similarity, models, rule))


def test_a_matrix_that_is_not_one_of_so_many_models_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"the similarity of 2 models is square, not \[5, 5\]"):
        permute(torch.eye(5), 2)


def test_collapse_is_the_product_with_the_matrices() -> None:
    columns = torch.tensor([[0, 1, 1, 2], [2, -1, 0, 0]])
    tensor = torch.randn(3, 4, 2)
    for membership in (Membership(columns, 3), Membership(torch.tensor([[0, 1, 2, 3], [3, 1, 0, 2]]), 4)):
        for model in range(2):
            merge, unmerge = (matrix.view(2, 4, -1)[model] for matrix in (membership.merge(), membership.unmerge()))
            torch.testing.assert_close(
                membership.collapse(tensor, model, 1, scaled=True), torch.einsum("acb,cd->adb", tensor, merge)
            )
            torch.testing.assert_close(
                membership.collapse(tensor, model, 1, scaled=False), torch.einsum("acb,cd->adb", tensor, unmerge)
            )

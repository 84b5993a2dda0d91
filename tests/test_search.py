"""Searchers propose the same candidates again, and halving stops losers by what has been told."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from merge_ray.search import Outcome, halving_cutoffs, make_proposer
from merge_ray.space import Choice, Float, Int, PerTask, Space

TASKS = ["b", "a"]
START = {"density": 0.2, "disjoint": "mean", "coefficients": 0.3, "count": 2}
MIXED: dict[str, Space] = {"density": Float(0.05, 0.95), "disjoint": Choice(("mean", "sum")), "count": Int(1, 3)}
VECTOR: dict[str, Space] = {"coefficients": PerTask(Float(0.0, 1.0))}


def drive(
    searcher: str,
    space: Mapping[str, Space],
    count: int,
    distance: int = 3,
    seed: int = 0,
    known: Sequence[tuple[Mapping[str, Any], float]] = (),
) -> list[dict[str, Any]]:
    """Propose ``count`` candidates, telling outcomes ``distance`` proposals behind."""
    proposer = make_proposer(searcher, space, TASKS, seed, START, known)
    proposals: list[dict[str, Any]] = []
    for index in range(count):
        if index >= distance:
            proposer.tell(Outcome(score(proposals[index - distance])))
        proposal = proposer.ask()
        if proposal is None:
            break
        proposals.append(proposal)
    return proposals


def score(parameters: Mapping[str, Any]) -> float:
    values = parameters.get("coefficients", {"density": parameters.get("density", 0.0)}).values()
    return -sum((value - 0.4) ** 2 for value in values)


@pytest.mark.parametrize(("searcher", "space"), [("optuna", MIXED), ("random", MIXED), ("cmaes", VECTOR)])
def test_same_seed_same_candidates_and_another_seed_others(searcher: str, space: dict[str, Space]) -> None:
    first = drive(searcher, space, 12)
    assert drive(searcher, space, 12) == first
    assert drive(searcher, space, 12, seed=1)[1:] != first[1:]


@pytest.mark.parametrize(("searcher", "space"), [("optuna", MIXED), ("random", MIXED), ("cmaes", VECTOR)])
def test_candidates_lie_in_their_space(searcher: str, space: dict[str, Space]) -> None:
    for proposal in drive(searcher, space, 20):
        assert set(proposal) == set(space)
        for name, part in space.items():
            assert part.contains(proposal[name]), proposal


def test_grid_visits_every_combination_once_and_ends() -> None:
    proposals = drive("grid", {"density": Float(0.1, 0.3, points=3), "disjoint": Choice(("mean", "sum"))}, 99)
    assert [tuple(proposal.values()) for proposal in proposals] == [
        (0.1, "mean"), (0.1, "sum"), (0.2, "mean"), (0.2, "sum"), (0.3, "mean"), (0.3, "sum"),
    ]  # fmt: skip


def test_nothing_to_search_is_one_candidate() -> None:
    assert drive("optuna", {}, 5) == [{}]


def test_tpe_begins_with_the_published_defaults() -> None:
    assert drive("optuna", MIXED, 1) == [{"density": 0.2, "disjoint": "mean", "count": 2}]


def test_a_per_task_search_begins_with_the_default_for_every_task() -> None:
    assert drive("cmaes", VECTOR, 1) == [{"coefficients": {"a": 0.3, "b": 0.3}}]


def test_optuna_learns_from_known_scores_and_ignores_those_outside_the_space() -> None:
    known = [
        ({"density": value, "disjoint": "mean", "count": 1}, -((value - 0.4) ** 2))
        for value in (0.3, 0.38, 0.4, 0.5, 0.7, 0.9)
    ]
    outside = [({"density": 7.0, "disjoint": "mean", "count": 1}, 9.0)]
    assert drive("optuna", MIXED, 8, known=known) != drive("optuna", MIXED, 8)
    assert drive("optuna", MIXED, 8, known=outside) == drive("optuna", MIXED, 8)


def test_optuna_searches_better_than_its_start() -> None:
    proposals = drive("optuna", {"density": Float(0.05, 0.95)}, 30, distance=2)
    assert max(map(score, proposals)) > -0.0005 > score(proposals[0])


def test_failed_and_pruned_outcomes_are_taken() -> None:
    proposer = make_proposer("optuna", MIXED, TASKS, 0, START)
    for outcome in (Outcome(None), Outcome(0.3, (0.2, 0.3), pruned=True), Outcome(0.5, (0.4, 0.4, 0.5))):
        proposer.ask()
        proposer.tell(outcome)
    proposal = proposer.ask()
    assert proposal is not None and MIXED["density"].contains(proposal["density"])


def test_cutoffs_keep_the_top_half_of_what_reached_a_rung() -> None:
    told = [Outcome(0.3, (0.1, 0.2, 0.25, 0.3)), Outcome(0.2, (0.2,), pruned=True), Outcome(0.6, (0.4, 0.5, 0.6, 0.6))]
    assert halving_cutoffs(told, reports=4, reduction_factor=2, grace_reports=1) == pytest.approx({1: 0.2, 2: 0.35})


def test_there_is_no_cutoff_before_enough_candidates_reached_the_rung() -> None:
    assert halving_cutoffs([Outcome(0.3, (0.1, 0.2))], reports=4, reduction_factor=2, grace_reports=1) == {}

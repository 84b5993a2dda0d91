"""A study: one search over one method, replayed from the ledger as far as that goes.

A study proposes candidates and takes their outcomes; it knows neither hosts nor Ray. Its searcher is told outcomes
strictly in the order of its proposals and at a fixed distance behind them, however the trials happen to finish.
So the same seed and distance give the same candidates, and a ledger gives them again without a trial.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from merge_ray.candidate import Candidate
from merge_ray.search import Outcome, Proposer, halving_cutoffs, make_proposer
from merge_ray.spec import StudySpec

MOST_REPEATS = 50
"""A searcher that proposes this many known candidates in a row has searched its space."""


class Study:
    """One study in progress.

    template: a candidate but for what is searched. reports: how often a candidate says what it has reached, after
    each shard and, where it learns, while it does. known: the ledger's rows by identity. distance: how many proposals
    may be unanswered, where answers matter. earlier: studies of the same method that this one learns from; it waits
    for them.
    """

    def __init__(
        self,
        spec: StudySpec,
        template: Candidate,
        tasks: Sequence[str],
        reports: int,
        known: Mapping[str, Mapping[str, Any]],
        distance: int,
        earlier: Sequence[Study] = (),
    ) -> None:
        self.spec, self.template, self.tasks, self.reports = spec, template, tasks, reports
        self.known, self.distance, self.earlier = known, distance, earlier
        self.candidates: list[Candidate] = []
        self.outcomes: dict[str, Outcome] = {}
        self.exhausted = False
        self._seen: set[str] = set()
        self._told: list[Outcome] = []
        self._proposer: Proposer | None = None
        self._begun = 0.0

    @property
    def _learns(self) -> bool:
        """Whether outcomes change anything; where they do not, no proposal waits for them."""
        return self.spec.searcher not in ("grid", "random") or self.spec.scheduler != "none"

    @property
    def finished(self) -> bool:
        """Whether nothing more will be proposed and every candidate has its outcome."""
        return self.exhausted and len(self.outcomes) == len(self._seen)

    @property
    def best_value(self) -> float | None:
        """The highest objective of a complete candidate so far."""
        values = [item.value for item in self.outcomes.values() if item.value is not None and not item.pruned]
        return max(values, default=None)

    def propose(self) -> Candidate | None:
        """The next candidate that neither the ledger nor this study has scored; None if there is none for now."""
        if self._proposer is None and not self._begin():
            return None
        assert self._proposer is not None
        for _ in range(MOST_REPEATS):
            self._tell()
            if self._budget_is_spent():
                break
            if self._learns and len(self.candidates) - len(self._told) >= self.distance:
                return None
            proposal = self._proposer.ask()
            if proposal is None:
                break
            candidate = self._candidate(proposal)
            self.candidates.append(candidate)
            if candidate.identity in self._seen:
                continue
            self._seen.add(candidate.identity)
            if (outcome := self._answer(candidate)) is None:
                return candidate
            self.outcomes[candidate.identity] = outcome
        self.exhausted = True
        return None

    def accepts(self, outcome: Outcome) -> bool:
        """Whether an outcome answers for a candidate: what was cut short does where a scheduler may do so."""
        return self.spec.scheduler != "none" or not outcome.pruned

    def cutoffs(self) -> dict[int, float]:
        """What a candidate proposed now must reach after a number of reports to go on."""
        if self.spec.scheduler == "none":
            return {}
        return halving_cutoffs(self._told, self.reports, self.spec.reduction_factor, self.spec.grace_shards)

    def _begin(self) -> bool:
        if not all(study.finished for study in self.earlier):
            return False
        learnt = [
            (candidate.parameters, outcome.value)
            for study in self.earlier
            for candidate in study.candidates
            if (outcome := study.outcomes[candidate.identity]).value is not None and not outcome.pruned
        ]
        space, start = self.spec.search_space(), self.template.parameters
        self._proposer = make_proposer(self.spec.searcher, space, self.tasks, self.template.seed, start, learnt)
        # What earlier runs of the same command spent counts, so that a restart adds no budget.
        own = self.spec.name, self.template.pair
        rows = [row for row in self.known.values() if (row["study"], tuple(row["pair"])) == own]
        self._begun = time.monotonic() - sum(row["seconds_total"] or 0.0 for row in rows)
        return True

    def _candidate(self, proposal: Mapping[str, Any]) -> Candidate:
        proposed = replace(self.template, parameters={**self.spec.parameters, **proposal})
        return replace(self.template, parameters=proposed.make().parameters())

    def _answer(self, candidate: Candidate) -> Outcome | None:
        """What the ledger or an earlier study has found."""
        found = [study.outcomes.get(candidate.identity) for study in self.earlier]
        if (row := self.known.get(candidate.identity)) is not None:
            found.append(outcome_of(row))
        return next((item for item in found if item is not None and self.accepts(item)), None)

    def _tell(self) -> None:
        assert self._proposer is not None
        limit = len(self.candidates) - self.distance + 1
        while len(self._told) < limit and (outcome := self.outcomes.get(self.candidates[len(self._told)].identity)):
            self._proposer.tell(outcome)
            self._told.append(outcome)

    def _budget_is_spent(self) -> bool:
        if self.spec.trials is not None and len(self._seen) >= self.spec.trials:
            return True
        return self.spec.seconds is not None and time.monotonic() - self._begun >= self.spec.seconds


def outcome_of(row: Mapping[str, Any]) -> Outcome:
    """What a ledger row, or a trial's last result, says to the searcher."""
    if row["status"] in ("failed", "unrecorded"):
        return Outcome(None)
    return Outcome(row["objective"], tuple(row["curve"]), row["status"] == "pruned")

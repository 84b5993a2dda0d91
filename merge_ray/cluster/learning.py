"""Learning in the sweep: short calls to a host, and what is learned saved after each, so that a kill costs little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

from merge_ray.candidate import Candidate
from merge_ray.cluster.learned import Learned
from merge_ray.cluster.ledger import load_learned, save_learned

SAVE_EVERY = 50
"""The most steps that a kill can lose."""


def learn_until(
    host: Any,
    ledger: Any,
    candidate: Candidate,
    learned: Learned,
    step: int,
    get: Callable[[ray.ObjectRef], Any] = ray.get,
) -> Learned:
    """Learn on a host until ``step`` steps are done, and save after each call, whose answer ``get`` waits for."""
    while learned.step < step:
        steps = min(SAVE_EVERY, step - learned.step)
        learned = get(host.learn.remote(candidate, learned, steps))
        save_learned(ledger, candidate, learned)
    return learned


@ray.remote(num_cpus=0)
def learn_all(host: Any, ledger: Any, candidate: Candidate, steps: int) -> Learned:
    """What a candidate learns in all its steps, as far as it is saved from there."""
    return learn_until(host, ledger, candidate, load_learned(ledger, candidate), steps)

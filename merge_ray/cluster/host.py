"""ModelHost: the actor that holds a :class:`merge_ray.cluster.scorer.Scorer` on one device.

Ray loads an actor's class wherever a handle of it arrives. This one is loaded without torch, so that trials' processes,
of which there are as many as hosts, start in no time and stay small: what hosts import is imported in hosts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    import numpy as np

    from merge_ray.cluster.learned import Learned
    from merge_ray.cluster.setup import HostSetup


@ray.remote(max_restarts=-1, max_task_retries=2)
class ModelHost:
    """Merges and scores: see :class:`merge_ray.cluster.scorer.Scorer`.

    A host that died and was restarted by Ray takes the same call again.
    """

    def __init__(self, setup: HostSetup, shared: Sequence[ray.ObjectRef]) -> None:
        """See :class:`merge_ray.cluster.scorer.Scorer`."""
        from merge_ray.cluster.scorer import Scorer

        self.scorer = Scorer(setup, shared)

    def learn(self, *arguments: Any) -> Learned:
        """See :meth:`merge_ray.cluster.scorer.Scorer.learn`."""
        return self.scorer.learn(*arguments)

    def score(self, *arguments: Any) -> dict[str, Any]:
        """See :meth:`merge_ray.cluster.scorer.Scorer.score`."""
        return self.scorer.score(*arguments)

    def outcomes(self, *arguments: Any) -> dict[str, np.ndarray]:
        """See :meth:`merge_ray.cluster.scorer.Scorer.outcomes`."""
        return self.scorer.outcomes(*arguments)

    def artifacts(self, *arguments: Any) -> dict[str, np.ndarray]:
        """See :meth:`merge_ray.cluster.scorer.Scorer.artifacts`."""
        return self.scorer.artifacts(*arguments)

    def process_id(self) -> int:
        """The operating system's number of this actor's process; answered once the host is ready."""
        return os.getpid()

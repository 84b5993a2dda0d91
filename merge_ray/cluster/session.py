"""Join the Ray cluster that is running, or start Ray on this machine."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from merge_ray.cluster.plan import SPILLS_FROM
from merge_ray.memory import available_memory
from merge_ray.progress import Progress


@contextmanager
def ray_session(progress: Progress, shared: int = 0) -> Iterator[None]:
    """Ray for the time of a command: what was started here is ended here, what was joined goes on.

    shared: the bytes that the object store of a Ray that is started here has to hold.

    A cluster is found as ``ray.init`` finds it: ``RAY_ADDRESS``, or one that ``ray start`` started on this machine.
    Ray's dashboard comes with ``ray start``; a cluster started here does without, which saves seconds.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    joined = ray.is_initialized()
    if not joined:
        with progress.step("start Ray"):
            ray.init(
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                object_store_memory=_store_size(shared),
            )
    try:
        yield
    finally:
        if not joined:
            ray.shutdown()


def _store_size(shared: int) -> int | None:
    """The object store that keeps ``shared`` bytes in memory; None where the one that Ray makes by itself does."""
    needed = math.ceil(shared / SPILLS_FROM)
    # Of what is left for others, Ray takes 30 %.
    return needed if needed > 0.3 * available_memory() else None

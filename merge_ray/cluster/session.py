"""Join the Ray cluster that is running, or start Ray on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from merge_ray.progress import Progress


@contextmanager
def ray_session(progress: Progress) -> Iterator[None]:
    """Ray for the time of a command: what was started here is ended here, what was joined goes on.

    A cluster is found as ``ray.init`` finds it: ``RAY_ADDRESS``, or one that ``ray start`` started on this machine.
    Ray's dashboard comes with ``ray start``; a cluster started here does without, which saves seconds.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    joined = ray.is_initialized()
    if not joined:
        with progress.step("start Ray"):
            ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    try:
        yield
    finally:
        if not joined:
            ray.shutdown()

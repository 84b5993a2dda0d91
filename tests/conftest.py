"""What every test gets: a private cache, one thread, fixed seeds; and a Ray cluster for those that ask."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

RAY_FILES = tempfile.mkdtemp(prefix="ray", dir="/tmp")
"""Ray's own place, so that no cluster that runs on this machine is joined; its path is short, as sockets' must be."""
atexit.register(shutil.rmtree, RAY_FILES, ignore_errors=True)

# Set before torch, numba and Ray are imported; the workers that Ray starts inherit them.
os.environ.update(
    OMP_NUM_THREADS="1",
    MPLBACKEND="Agg",
    HF_HUB_DISABLE_TELEMETRY="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    RAY_TMPDIR=RAY_FILES,
)

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test draws the same numbers, whichever tests run before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The decoded-image cache of this test run, away from the user's."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGE_RAY_CACHE", str(directory))
        yield directory


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[dict[str, Any]]:
    """A local Ray cluster of two CPUs, shared by a file's tests that do not kill its parts; gives its context."""
    import ray

    context: Any = ray.init(
        num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    yield dict(context.address_info)
    ray.shutdown()

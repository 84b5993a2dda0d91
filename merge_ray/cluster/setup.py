"""What a host is told, and how its process and its node get ready."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import ray
import torch

from merge_ray.bank import Layout
from merge_ray.cluster.nodes import check_versions
from merge_ray.errors import DataError
from merge_ray.families import Family
from merge_ray.s3 import S3Settings
from merge_ray.spec import EvaluationSpec, ModelsSpec
from merge_ray.tasks import TaskSpec, cache_directory, open_task


@dataclass(frozen=True)
class HostSetup:
    """What a host is told once: all but the bank's arrays, which it maps from shared memory.

    data: the fingerprint of every task's split, by split. files: other files that hosts read. versions: the driver's.
    directory, cache: where the driver's relative paths start, and its cache of prepared data, on the node ``driver``;
    other nodes have caches of their own. s3: where S3 is. kept: where hosts that can see it keep what others need,
    until the sweep ends. ends: where the slices of the bank start and end ``[G + 1]``, where ``G`` hosts share it.
    node: the name of the host's node.
    """

    models: ModelsSpec
    tasks: tuple[TaskSpec, ...]
    evaluation: EvaluationSpec
    layout: Layout
    bank_tasks: tuple[str, ...]
    fingerprint: str
    heads: Mapping[str, np.ndarray]
    data: Mapping[str, Mapping[str, str]]
    files: tuple[str, ...]
    versions: Mapping[str, str]
    driver: str
    directory: Path
    cache: Path
    s3: S3Settings = field(default_factory=S3Settings)
    kept: Path | None = None
    ends: tuple[int, ...] = ()
    node: str = ""
    device: str = "cpu"
    threads: int = 1

    def enter(self) -> Path:
        """Make this process one of the sweep's; returns its node's cache.

        Raises :class:`MergeRayError` for other versions than the driver's, and for a file that is not on this node.
        """
        check_versions(self.versions)
        torch.set_num_threads(self.threads)
        if self.directory.is_dir():
            os.chdir(self.directory)
        if ray.get_runtime_context().get_node_id() == self.driver:
            os.environ["MERGE_RAY_CACHE"] = str(self.cache)
        if missing := [name for name in self.files if not Path(name).expanduser().exists()]:
            raise DataError(f"there is no {', no '.join(missing)}; {HOW_FILES_TRAVEL}")
        return cache_directory()

    def prepare(self, family: Family, split: str, cache: Path) -> None:
        """Have every task's split in the cache; the first process of the node that asks for it prepares it.

        Raises :class:`DataError` where there are no data, or others than the driver's.
        """
        for spec in self.tasks:
            prepare = family.open_images if split == "train" else family.open_split
            if prepare(open_task(spec), split, cache).fingerprint != self.data[split][spec.name]:
                raise DataError(f"{spec.name}: the data of {split} are not those of the driver's node")


HOW_FILES_TRAVEL = (
    "a file must lie at the same path on every node, in the working directory of the job, or where all can read it "
    "(hf://, s3://)"
)


@ray.remote(num_cpus=0)
def prepare_node(versions: Mapping[str, str], setups: Sequence[ray.ObjectRef]) -> None:
    """Prepare the data on a node, or raise :class:`MergeRayError` for what keeps it from the work of the one setup."""
    # First, for what another version has sent may not even be readable.
    check_versions(versions)
    [setup] = ray.get(list(setups))
    with setup.s3.applied():
        cache, family = setup.enter(), setup.models.open_family()
        for split in setup.data:
            setup.prepare(family, split, cache)

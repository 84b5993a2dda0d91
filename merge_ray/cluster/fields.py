"""Gradient fields on Ray: one task a model, side by side over the devices of the cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from merge_ray.cluster.errors import cause
from merge_ray.cluster.session import ray_session
from merge_ray.cluster.training import RETRIES, Devices, live_nodes
from merge_ray.errors import MergeRayError
from merge_ray.progress import Progress
from merge_ray.relatedness import FieldJob


def compute_on_ray(jobs: list[FieldJob], progress: Progress) -> None:
    """Compute fields on the cluster that is running, or on one that is started on this machine.

    On several nodes the spec's directory and the models must be on a file system that all of them share. Raises
    :class:`MergeRayError` for the first that fails, once the others have ended: what they wrote stays.
    """
    with ray_session(progress), progress.counted(f"gradient fields of {len(jobs)} models") as update:
        devices = Devices.share(jobs[0].spec.device, len(jobs), 1, live_nodes())
        running = {}
        for job in jobs:
            start = _compute.options(name=f"field-{job.model}", **devices.resources)
            running[start.remote(job, devices, Path.cwd())] = job
        waiting, failure = list(running), ""
        while waiting:
            (done,), waiting = ray.wait(waiting)
            failure = failure or _failure(done, running[done])
            update(len(jobs) - len(waiting), len(jobs))
    if failure:
        raise MergeRayError(failure)


def _failure(done: Any, job: FieldJob) -> str:
    try:
        ray.get(done)
    except RayError as error:
        return f"the gradient field of {job.model!r} failed: {cause(error)}"
    return ""


@ray.remote(max_retries=RETRIES)
def _compute(job: FieldJob, devices: Devices, directory: Path) -> None:
    torch.set_num_threads(devices.threads)
    os.environ.update(job.spec.s3.environment())
    if directory.is_dir():
        os.chdir(directory)  # the models' relative paths start there
    job.run(devices.kind)

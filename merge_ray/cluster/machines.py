"""The cluster's memory, and the plan of a sweep on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import ray
import torch
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from merge_ray.cluster.errors import cause
from merge_ray.cluster.plan import Machine, Needs, Plan, make_plan
from merge_ray.cluster.pool import share_cluster
from merge_ray.errors import MergeRayError
from merge_ray.methods.base import find_method
from merge_ray.models import read_layout
from merge_ray.spec import SweepSpec
from merge_ray.tasks import cache_directory, open_task


def plan_sweep(spec: SweepSpec, base: Mapping[str, Tensor], references: tuple[str, ...]) -> Plan:
    """Choose how the hosts hold the models, from their shapes; see :func:`merge_ray.cluster.plan.make_plan`.

    references: the methods that run beside the studies'. The tasks' data are in the cache.
    """
    device, count, threads = share_cluster(spec.hosts)
    layout = read_layout(spec.models, spec.task_names, base)
    dtype = layout.dtype if spec.models.dtype == "auto" else getattr(torch, spec.models.dtype)
    on_cpu = device == "cpu"
    activations = spec.models.open_family().activation_bytes(spec.evaluation.batch_size)
    data = 0 if on_cpu else _resident_bytes(spec)
    needs = Needs(len(spec.tasks), layout.size, dtype.itemsize, activations, data, on_cpu)
    names = {*references, *(study.method for study in spec.studies.values())}
    methods = [find_method(name) for name in sorted(names)]
    return make_plan(needs, find_machines(device, threads), count, spec.hosts.device_memory, methods)


def _resident_bytes(spec: SweepSpec) -> int:
    """What the tasks' samples take on a device."""
    family, cache, most = spec.models.open_family(), cache_directory(), spec.evaluation.max_samples
    return sum(
        family.resident_bytes(family.open_split(open_task(task), split, cache), most if split == "val" else None)
        for task in spec.tasks
        for split in ("val", "test")
    )


def find_machines(device: str, threads: int) -> list[Machine]:
    """The live nodes' memory; hosts are of ``threads`` cores where they are no GPUs."""
    driver = ray.get_runtime_context().get_node_id()
    machines, probes = [], {}
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        resources = node["Resources"]
        devices = resources.get("GPU", 0) if device == "cuda" else resources.get("CPU", 0) // threads
        memory, store = (int(resources.get(kind, 0)) for kind in ("memory", "object_store_memory"))
        name, is_driver = node["NodeManagerHostname"], node["NodeID"] == driver
        machine = Machine(name, int(devices), None, memory, store, is_driver)
        if device == "cuda" and devices >= 1:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            probes[_device_memory.options(scheduling_strategy=here).remote()] = machine
        else:
            machines.append(machine)
    try:
        found = zip(probes.values(), ray.get(list(probes)), strict=True)
        return machines + [replace(machine, device_memory=size) for machine, size in found]
    except RayError as error:
        raise MergeRayError(f"a GPU's memory cannot be told: {cause(error)}") from None


@ray.remote(num_gpus=1, num_cpus=0, max_calls=1)
def _device_memory() -> int:
    """The bytes that are free on a GPU once it is in use."""
    free, _ = torch.cuda.mem_get_info()
    return free

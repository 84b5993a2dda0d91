"""The plan of a sweep on the cluster's memory."""

from __future__ import annotations

from collections.abc import Sequence

import ray
import torch
from ray.exceptions import RayError

from merge_ray.bank import ModelBank
from merge_ray.cluster.errors import cause
from merge_ray.cluster.nodes import Node, Room, live_nodes
from merge_ray.cluster.plan import Machine, Needs, Plan, make_plan
from merge_ray.cluster.pool import PATIENCE, adds_nodes
from merge_ray.errors import MergeRayError
from merge_ray.memory import available_memory
from merge_ray.methods.base import find_method
from merge_ray.spec import SweepSpec
from merge_ray.tasks import cache_directory, open_task


def plan_sweep(spec: SweepSpec, bank: ModelBank, references: Sequence[str]) -> Plan:
    """Choose how the hosts hold the bank's models; see :func:`merge_ray.cluster.plan.make_plan`.

    references: the methods that run beside the studies'. The tasks' data are in the cache.
    """
    nodes = live_nodes()
    try:
        room = Room.choose(spec.hosts.model_copy(update={"count": None}) if adds_nodes() else spec.hosts, nodes)
    except MergeRayError:
        if not adds_nodes():
            raise
        return Plan(1, "hosts with all models each, as soon as there are nodes for them")
    on_cpu = room.device == "cpu"
    activations = spec.models.open_family().activation_bytes(spec.evaluation.batch_size)
    data = 0 if on_cpu else _resident_bytes(spec)
    needs = Needs(len(bank.tasks), bank.layout.size, bank.base.itemsize, activations, data, on_cpu)
    names = {*references, *(study.method for study in spec.studies.values())}
    methods = [find_method(name) for name in sorted(names)]
    return make_plan(needs, _machines(room, nodes), spec.hosts.count, spec.hosts.device_memory, methods)


def _resident_bytes(spec: SweepSpec) -> int:
    """What the tasks' samples take on a device."""
    family, cache, most = spec.models.open_family(), cache_directory(), spec.evaluation.max_samples
    return sum(
        family.resident_bytes(family.open_split(open_task(task), split, cache), most if split == "val" else None)
        for task in spec.tasks
        for split in ("val", "test")
    )


def _machines(room: Room, nodes: Sequence[Node]) -> list[Machine]:
    """The nodes' memory."""
    driver = ray.get_runtime_context().get_node_id()
    memory = _device_memory(nodes) if room.device == "cuda" else {}
    # What Ray was started with does not know of the models that have been read since; its object store is yet to fill.
    available = available_memory()
    left = {node.id: max(0, min(node.memory, available - node.object_store)) for node in nodes if node.id == driver}
    return [
        Machine(
            node.name,
            room.on(node),
            memory.get(node.id),
            left.get(node.id, node.memory),
            node.object_store,
            driver=node.id == driver,
        )
        for node in nodes
    ]


def _device_memory(nodes: Sequence[Node]) -> dict[str, int]:
    """The memory of each node's GPUs by the node's id, but of nodes where all are in use by others."""
    probes = {_free_memory.options(scheduling_strategy=node.affinity).remote(): node for node in nodes if node.gpus}
    ready, waiting = ray.wait(list(probes), num_returns=len(probes), timeout=PATIENCE)
    for probe in waiting:
        ray.cancel(probe)
    memory = {}
    for probe in ready:
        try:
            memory[probes[probe].id] = ray.get(probe)
        except RayError as error:
            name = probes[probe].name
            raise MergeRayError(f"node {name}: the memory of its GPUs cannot be told: {cause(error)}") from None
    return memory


@ray.remote(num_gpus=1, num_cpus=0, max_calls=1)
def _free_memory() -> int:
    """The bytes that are free on a GPU once it is in use."""
    free, _ = torch.cuda.mem_get_info()
    return free

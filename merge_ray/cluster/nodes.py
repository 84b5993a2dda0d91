"""The nodes of the cluster: where hosts fit, and whether a node can do the sweep's work."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import merge_ray
from merge_ray.errors import MergeRayError
from merge_ray.spec import HostsSpec

MOST_CPU_HOSTS = 8
"""More hosts on a node's CPU only add buffers: eight share its cores between them."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, or rather the part of it that Ray was given.

    name: what ``ray start --node-name`` says, or else the machine's name. address: its IP address. memory,
    object_store: the bytes that Ray gives to processes, and to what they share.
    """

    id: str
    name: str
    address: str
    cpus: int = 0
    gpus: int = 0
    memory: int = 0
    object_store: int = 0

    @property
    def affinity(self) -> NodeAffinitySchedulingStrategy:
        """What runs with this runs here, or fails when the node is gone."""
        return NodeAffinitySchedulingStrategy(self.id, soft=False)


def live_nodes() -> list[Node]:
    """The nodes that are alive, sorted by name."""
    nodes = []
    for about in ray.nodes():
        name, address, resources = about["NodeName"], about["NodeManagerAddress"], about["Resources"]
        name = about["NodeManagerHostname"] if name == address else name
        if about["Alive"]:
            sizes = (int(resources.get(kind, 0)) for kind in ("CPU", "GPU", "memory", "object_store_memory"))
            nodes.append(Node(about["NodeID"], name, address, *sizes))
    return sorted(nodes, key=lambda node: (node.name, node.id))


@dataclass(frozen=True)
class Room:
    """How hosts share a node: ``device`` is ``cuda`` or ``cpu``; on a CPU at most ``most`` hosts share its cores."""

    device: str
    most: int
    threads: int | None

    @classmethod
    def choose(cls, wanted: HostsSpec, nodes: Sequence[Node], slices: int = 1) -> Room:
        """Choose the device, and share the cores of ``nodes`` between as many hosts as are wanted.

        Hosts that share the bank in ``slices`` wait for each other: all have the same threads.

        Raises :class:`MergeRayError` with what is asked for and what there is, where that is too little.
        """
        gpus, cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
        device = ("cuda" if gpus else "cpu") if wanted.device == "auto" else wanted.device
        total, what = (gpus, "GPUs") if device == "cuda" else (cpus, "CPU cores")
        there = f"the cluster has {total}" + (f" ({_listed(device, nodes)})" if len(nodes) > 1 else "")
        if not total:
            raise MergeRayError(f"hosts.device: {wanted.device!r} needs {what}; {there}; {gpus} GPUs, {cpus} CPU cores")
        room, count = cls(device, MOST_CPU_HOSTS, wanted.threads), wanted.count or 1
        if wanted.count and device == "cpu":
            # The fewest hosts a node with which all fit: each then has the most threads.
            rooms = (cls(device, most, wanted.threads) for most in range(1, max(node.cpus for node in nodes) + 1))
            room = next((room for room in rooms if room.hosts(nodes) >= count), room)
        if room.hosts(nodes) < count:
            threads = wanted.threads if device == "cpu" and wanted.threads else 1
            each = f" of {threads} threads" if threads > 1 else ""
            raise MergeRayError(f"hosts: {count} hosts{each} need {count * threads} {what}; {there}")
        if slices > 1:
            room = replace(room, threads=min(room.threads_on(node) for node in nodes if room.on(node)))
        return room

    def on(self, node: Node) -> int:
        """How many hosts fit on a node."""
        if self.device == "cuda":
            return node.gpus
        return min(self.most, node.cpus // (self.threads or 1))

    def hosts(self, nodes: Sequence[Node]) -> int:
        """How many hosts fit on the nodes."""
        return sum(map(self.on, nodes))

    def threads_on(self, node: Node) -> int:
        """The threads of a host on a node: those that are asked for, or its share of the cores."""
        return self.threads or max(1, node.cpus // self.on(node))

    def resources(self, node: Node) -> dict[str, float]:
        """What a host on a node takes of it, in Ray's words for an actor."""
        if self.device == "cuda":
            return {"num_gpus": 1, "num_cpus": 0}
        return {"num_cpus": self.threads_on(node)}

    def spread(self, nodes: Sequence[Node], hosts: Mapping[str, int], count: int | None, slices: int = 1) -> list[Node]:
        """The nodes for further hosts, one each, up to ``count`` or as many as fit.

        The emptiest node comes first, and of these the one with most threads for each host. Where a host is the first
        of so many that share the bank in ``slices``, the others take room beside it as far as there is some.

        hosts: the number of hosts that each node has already, by its id.
        """
        taken = {node.id: 0 for node in nodes}

        def free() -> list[Node]:
            return [node for node in nodes if taken[node.id] < self.on(node)]

        def take(first: Node) -> None:
            taken[first.id] += 1
            for _ in range(slices - 1):
                beside = min(free(), key=lambda node: node.id != first.id, default=first)
                taken[beside.id] += 1

        def rank(node: Node) -> tuple[bool, float, int]:
            splits = self.on(node) - taken[node.id] < slices
            return splits, taken[node.id] / self.on(node), -self.threads_on(node)

        for node in nodes:
            for _ in range(hosts.get(node.id, 0)):
                take(node)
        chosen: list[Node] = []
        while count is None or len(chosen) < count:
            if sum(self.on(node) - taken[node.id] for node in free()) < slices:
                break
            chosen.append(min(free(), key=rank))
            take(chosen[-1])
        return chosen


def _listed(device: str, nodes: Sequence[Node]) -> str:
    return ", ".join(f"{node.name}: {node.gpus if device == 'cuda' else node.cpus}" for node in nodes)


@cache
def versions() -> dict[str, str]:
    """The versions that the processes of a sweep must share; of this package, what its sources say."""
    digest = hashlib.sha256()
    folder = Path(merge_ray.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return {"merge_ray": f"sources {digest.hexdigest()[:8]}", "torch": torch.__version__, "ray": ray.__version__}


def check_versions(wanted: Mapping[str, str]) -> None:
    """Raise :class:`MergeRayError` where this process has other versions than the driver's, ``wanted``."""
    found = versions()
    if differing := [name for name in wanted if found.get(name) != wanted[name]]:
        parts = [f"{name} {found.get(name)}, where the driver has {wanted[name]}" for name in differing]
        raise MergeRayError(f"it has {' and '.join(parts)}; install the same on every node")

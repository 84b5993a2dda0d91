"""HostPool: hosts on the cluster's nodes as these come and go, leased to trials and to lists of candidates."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from merge_ray.candidate import Candidate
from merge_ray.cluster.errors import cause, is_lost
from merge_ray.cluster.host import ModelHost
from merge_ray.cluster.nodes import Node, Room, live_nodes, versions
from merge_ray.cluster.setup import HostSetup, prepare_node
from merge_ray.errors import MergeRayError
from merge_ray.evaluate import References
from merge_ray.spec import HostsSpec

LOOK_EVERY = 2.0
"""Seconds between looks at the cluster's nodes."""
PATIENCE = 60.0
"""Seconds after which a sweep begins with the hosts that are ready; the others join it."""
MOST_LOSSES = 3
"""A candidate that has lost so many hosts, each with its node, has failed."""
SCALING = Path("~/ray_bootstrap_config.yaml")
"""What Ray's own libraries look for to know the head of a cluster that ``ray up`` started, and that adds nodes."""


def adds_nodes() -> bool:
    """Whether the cluster adds nodes for what waits for them."""
    return SCALING.expanduser().exists()


@dataclass
class Host:
    """A host of the pool; ``ready`` is what it answers once it is loaded, None when it has."""

    name: str
    actor: Any
    node: Node
    ready: ray.ObjectRef | None
    leased: bool = False


class HostPool:
    """The sweep's hosts. Each is bound to a node: Ray restarts it there, and gives it up with the node.

    The pool follows the cluster: a node that comes is checked and gets hosts, one that goes takes its hosts with it.
    What keeps a node or a host from working is an error until all are ready, and after that ``warn`` is told.

    start: ``start(node, room, options)`` makes an actor with Ray's ``options``. check: ``check(node)`` starts the task
    that raises where a node cannot do the work; None where there is no need. size: the hosts that are wanted, or as
    many as fitted at first. slices: so many devices does a host have, of which one is its own and the others are of
    further hosts that it starts; see :mod:`merge_ray.cluster.group`. The count that is wanted is one of devices.

    Raises :class:`MergeRayError` where fewer hosts fit than are wanted, but waits on a cluster that adds nodes.
    """

    def __init__(
        self,
        name: str,
        wanted: HostsSpec,
        start: Callable[[Node, Room, dict[str, Any]], Any],
        check: Callable[[Node], ray.ObjectRef | None] = lambda node: None,
        warn: Callable[[str], object] = lambda text: None,
        slices: int = 1,
    ) -> None:
        self.name, self.wanted, self._start, self._check, self._warn = name, wanted, start, check, warn
        self.slices = slices
        self.hosts: list[Host] = []
        self._begun = False
        self._checks: dict[str, ray.ObjectRef | None] = {}
        self._given_up: dict[str, str] = {}
        self._asked: list[ray.ObjectRef] = []
        self._started = 0
        self._scales = adds_nodes()
        self.room = self._choose_room()
        self.size = (wanted.count or self.room.hosts(live_nodes())) // slices
        self.refresh()

    @classmethod
    def start(
        cls,
        name: str,
        wanted: HostsSpec,
        setup: HostSetup,
        slices: Sequence[Mapping[str, np.ndarray]],
        extras: Mapping[str, np.ndarray],
        warn: Callable[[str], object] = lambda text: None,
    ) -> HostPool:
        """Start a :class:`ModelHost` a GPU, or some that share the cores of each node; see :class:`HostPool`.

        Ray brings the bank to a node once, into memory that the node's hosts share. Where the bank is in several
        slices, each is brought to the host of a group that holds it.
        """
        # Held for as long as the pool: hosts that start later map the same objects.
        shared, told = [_put(arrays) for arrays in (*slices, extras)], [ray.put(setup)]

        def start_host(node: Node, room: Room, options: dict[str, Any]) -> Any:
            own = replace(setup, node=node.name, device=room.device, threads=room.threads_on(node))
            return ModelHost.options(**options).remote(own, shared)  # type: ignore[attr-defined]

        def check(node: Node) -> ray.ObjectRef | None:
            if node.id == setup.driver:
                return None
            return prepare_node.options(scheduling_strategy=node.affinity).remote(versions(), told)

        return cls(name, wanted, start_host, check, warn, len(slices))

    def _choose_room(self) -> Room:
        if not self._scales:
            return Room.choose(self.wanted, live_nodes(), self.slices)
        told = False
        while True:
            try:
                # There need not be room for all hosts yet.
                return Room.choose(self.wanted.model_copy(update={"count": None}), live_nodes(), self.slices)
            except MergeRayError as error:
                if not told:
                    self._warn(f"{error}; waiting for nodes")
                told = True
            self._ask_for(self.wanted.count or 1)
            time.sleep(LOOK_EVERY)

    def _ask_for(self, missing: int) -> None:
        """Keep as many tasks waiting as hosts are missing: Ray adds nodes for them for as long as the driver lives."""
        waiting = ray.wait(self._asked, num_returns=len(self._asked), timeout=0)[1] if self._asked else []
        for surplus in waiting[missing:]:
            ray.cancel(surplus)
        needs = (
            {"num_cpus": self.wanted.threads or 1} if self.wanted.device == "cpu" else {"num_cpus": 0, "num_gpus": 1}
        )
        more = [_wait_for_room.options(**needs).remote() for _ in range(missing - len(waiting))]
        self._asked = waiting[:missing] + more

    def refresh(self) -> None:
        """Look at the nodes: drop the hosts of those that are gone, and start hosts where there is room for them.

        Raises :class:`MergeRayError` when no host is left because every node was given up.
        """
        self._looked = time.monotonic()
        nodes = live_nodes()
        alive = {node.id for node in nodes}
        self._checks = {node: check for node, check in self._checks.items() if node in alive}
        for name in sorted({host.node.name for host in self.hosts if host.node.id not in alive}):
            self._warn(f"node {name} is gone; what ran there runs again elsewhere")
        self.hosts = [host for host in self.hosts if host.node.id in alive and self._works(host)]
        fit = [node for node in nodes if self.room.on(node) and self._is_fit(node)]
        missing = self.wanted.count and self.wanted.count // self.slices - len(self.hosts)
        for node in self.room.spread(fit, Counter(host.node.id for host in self.hosts), missing, self.slices):
            self.hosts.append(self._start_on(node))
        if self._scales and self.wanted.count:
            self._ask_for(self.wanted.count - len(self.hosts) * self.slices)
        given_up = [self._given_up[node.id] for node in nodes if node.id in self._given_up]
        if given_up and not self.hosts and not self._awaited():
            raise MergeRayError(f"no host is left: {given_up[-1]}")

    def _start_on(self, node: Node) -> Host:
        name = f"{self.name}/host-{self._started}"
        self._started += 1
        options = {"name": name, "scheduling_strategy": node.affinity, **self.room.resources(node)}
        with _quiet_native_stderr():
            actor = self._start(node, self.room, options)
        return Host(name, actor, node, actor.__ray_ready__.remote())

    def _works(self, host: Host) -> bool:
        """Whether a host is ready or may become so."""
        if host.ready is None:
            return True
        answered = self._has_answered(host.ready, host.node, f"{host.name} could not start")
        host.ready = None if answered else host.ready
        return answered is not False

    def _is_fit(self, node: Node) -> bool:
        """Whether a node has passed its check, which is begun if need be."""
        if node.id in self._given_up:
            return False
        if node.id not in self._checks:
            self._checks[node.id] = self._check(node)
        check = self._checks[node.id]
        if check is not None and self._has_answered(check, node, "it is not used"):
            self._checks[node.id] = check = None
        return check is None

    def _has_answered(self, call: ray.ObjectRef, node: Node, what: str) -> bool | None:
        """Whether a call was answered, None if not yet; for an error, unless it is gone, its node is given up."""
        if not ray.wait([call], timeout=0)[0]:
            return None
        try:
            ray.get(call)
            return True
        except RayError as error:
            if node.id in {node.id for node in live_nodes()}:
                self._given_up[node.id] = f"node {node.name}: {what}: {cause(error)}"
                if not self._begun:
                    raise MergeRayError(self._given_up[node.id]) from None
                self._warn(self._given_up[node.id])
            return False

    def _awaited(self) -> list[ray.ObjectRef]:
        """What nodes and hosts have yet to answer."""
        checks = [check for node, check in self._checks.items() if node not in self._given_up]
        return [call for call in (*checks, *(host.ready for host in self.hosts)) if call is not None]

    def wait_until_ready(self) -> None:
        """Wait for the nodes' checks and for the hosts.

        Hosts that wait for long, for others use the cluster too, may join later; but one there must be. Raises
        :class:`MergeRayError` for a node or a host that cannot do the work.
        """
        began = time.monotonic()
        while awaited := self._awaited():
            if time.monotonic() - began > PATIENCE and any(host.ready is None for host in self.hosts):
                break
            ray.wait(awaited, timeout=LOOK_EVERY)
            self.refresh()
        self._begun = True

    def close(self) -> None:
        """End the hosts and free the bank."""
        for host in self.hosts:
            ray.kill(host.actor)
        self._ask_for(0)
        del self._start  # and with it the bank

    def lease(self) -> Host | None:
        """A ready host without a lease, which now has one; None if there is none."""
        if time.monotonic() - self._looked > LOOK_EVERY:
            self.refresh()
        host = next((host for host in self.hosts if host.ready is None and not host.leased), None)
        if host is not None:
            host.leased = True
        return host

    def release(self, host: Host, ended: bool = False) -> None:
        """Give a lease back. A host that has ``ended`` is not leased again until it answers, and may be gone."""
        host.leased = False
        if ended:
            host.ready = host.actor.__ray_ready__.remote()
            self.refresh()

    def _lease_share(self, candidates: int) -> list[Host]:
        """Leases of one candidate's share of the hosts without one, where so many candidates wait."""
        first = self.lease()
        if first is None:
            return []
        idle = 1 + sum(host.ready is None and not host.leased for host in self.hosts)
        others = (self.lease() for _ in range(idle // candidates - 1))
        return [first, *(host for host in others if host is not None)]

    def score_all(
        self,
        candidates: Sequence[Candidate],
        references: Mapping[str, References] | None,
        learn: Callable[[Candidate, Any], ray.ObjectRef | None],
        keep_artifacts: bool = False,
    ) -> Iterator[tuple[Candidate, dict[str, Any] | Exception, dict[str, np.ndarray]]]:
        """Score whole candidates side by side; yields each with its report or its error, and its artifacts if asked.

        Hosts that would be idle share the samples of one candidate; each of them merges it. A candidate that loses a
        host with its node is scored again.

        references: the fine-tuned models' scores by split, or None while they are being scored.
        learn: ``learn(candidate, host)`` gives what the candidate has learned, None where it does not learn.
        """
        waiting, losses = list(candidates), Counter[str]()
        running: dict[ray.ObjectRef, tuple[Candidate, list[Host], ray.ObjectRef | None]] = {}
        while waiting or running:
            while waiting and (leased := self._lease_share(len(waiting))):
                candidate, hosts = waiting.pop(0), [host.actor for host in leased]
                scores = references[candidate.split] if references else None
                learned = learn(candidate, hosts[0])
                shares = [host.outcomes.remote(candidate, learned, at, len(hosts)) for at, host in enumerate(hosts)]
                running[hosts[0].score.remote(candidate, None, scores, learned, *shares)] = candidate, leased, learned
            if not running:
                time.sleep(LOOK_EVERY)
                continue
            done, _ = ray.wait(list(running), num_returns=1, timeout=LOOK_EVERY)
            for call in done:
                candidate, leased, learned = running.pop(call)
                ended = False
                try:
                    report = ray.get(call)
                    artifacts = leased[0].actor.artifacts
                    yield candidate, report, ray.get(artifacts.remote(candidate, learned)) if keep_artifacts else {}
                except RayError as error:
                    ended = is_lost(error, *(host.actor for host in leased))
                    losses[candidate.identity] += ended
                    if ended and losses[candidate.identity] < MOST_LOSSES:
                        waiting.append(candidate)
                    else:
                        yield candidate, error, {}
                finally:
                    for host in leased:
                        self.release(host, ended)


def _put(arrays: Mapping[str, np.ndarray]) -> ray.ObjectRef:
    # Hosts can map only contiguous arrays; of others, as a slice of the columns is one, each would have a copy.
    # Scalars are, and NumPy would make vectors of them.
    return ray.put({name: np.ascontiguousarray(array) if array.ndim else array for name, array in arrays.items()})


@ray.remote
def _wait_for_room() -> None:
    """Nothing: what counts is that it waits for resources."""


@contextmanager
def _quiet_native_stderr() -> Iterator[None]:
    """Drop what Ray's C++ core writes to standard error meanwhile.

    It reports every actor that can be restarted and takes shared objects as an error, for those objects might be
    gone by then; the pool keeps them.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)

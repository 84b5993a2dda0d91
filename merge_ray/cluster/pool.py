"""HostPool: starts the hosts, leases them to trials, and scores lists of candidates over them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from merge_ray.candidate import Candidate
from merge_ray.cluster.errors import cause
from merge_ray.cluster.host import HostSetup, ModelHost
from merge_ray.errors import MergeRayError
from merge_ray.evaluate import References
from merge_ray.spec import HostsSpec

MOST_CPU_HOSTS = 8
"""More hosts on a CPU only add buffers: eight share the cores between them."""


class HostPool:
    """The sweep's hosts. Ray restarts a host that dies; the pool says which are free."""

    def __init__(self, hosts: Sequence[Any], shared: Sequence[ray.ObjectRef]) -> None:
        self.hosts = list(hosts)
        # Held for as long as the pool: a restarted host maps the same objects again.
        self._shared = list(shared)
        self._leases = [0] * len(self.hosts)

    @classmethod
    def start(
        cls,
        name: str,
        wanted: HostsSpec,
        setup: HostSetup,
        slices: Sequence[Mapping[str, np.ndarray]],
        extras: Mapping[str, np.ndarray],
    ) -> HostPool:
        """Start one host a GPU, or hosts that share the CPU cores; the bank goes to shared memory once.

        Where the bank is in several slices, so many hosts are a group, of which the pool has the first.
        """
        device, count, threads = share_cluster(wanted)
        shared = [ray.put(dict(arrays)) for arrays in (*slices, extras)]
        share: dict[str, float] = {"num_gpus": 1, "num_cpus": 0} if device == "cuda" else {"num_cpus": threads}
        setup = replace(setup, device=device, threads=threads)
        make = ModelHost.options  # type: ignore[attr-defined]
        with _quiet_native_stderr():
            hosts = [
                make(name=f"{name}/host-{index}", **share).remote(setup, shared)
                for index in range(count // len(slices))
            ]
        return cls(hosts, shared)

    def wait_until_ready(self) -> list[int]:
        """Wait for every host; returns their process numbers. A host that cannot start raises its own error."""
        try:
            return list(ray.get([host.process_id.remote() for host in self.hosts]))
        except RayError as error:
            raise MergeRayError(f"a host could not start: {cause(error)}") from None

    def close(self) -> None:
        """End the hosts and free the bank."""
        for host in self.hosts:
            ray.kill(host)
        self._shared.clear()

    def lease(self, most: int = 1) -> int | None:
        """The index of the host with the fewest leases, which now has one more; None if all have ``most``."""
        index = min(range(len(self.hosts)), key=self._leases.__getitem__)
        if self._leases[index] >= most:
            return None
        self._leases[index] += 1
        return index

    def release(self, index: int) -> None:
        """Give a lease of a host back."""
        self._leases[index] -= 1

    def _lease_share(self, candidates: int) -> list[int]:
        """Leases of one candidate's share of the hosts without one, where so many candidates wait."""
        idle = self._leases.count(0)
        share = min(idle, max(1, idle // candidates))
        return [index for _ in range(share) if (index := self.lease()) is not None]

    def score_all(
        self,
        candidates: Sequence[Candidate],
        references: Mapping[str, References] | None,
        learn: Callable[[Candidate, Any], ray.ObjectRef | None],
    ) -> Iterator[tuple[Candidate, dict[str, Any] | Exception, Callable[[], ray.ObjectRef]]]:
        """Score whole candidates side by side; yields each with its report or its error, and a call for its artifacts.

        Hosts that would be idle share the samples of one candidate; each of them merges it.

        references: the fine-tuned models' scores by split, or None while they are being scored.
        learn: ``learn(candidate, host)`` gives what the candidate has learned, None where it does not learn.
        """
        waiting = list(candidates)
        running: dict[ray.ObjectRef, tuple[Candidate, list[int], ray.ObjectRef | None]] = {}
        while waiting or running:
            while waiting and (leased := self._lease_share(len(waiting))):
                candidate, hosts = waiting.pop(0), [self.hosts[index] for index in leased]
                scores = references[candidate.split] if references else None
                learned = learn(candidate, hosts[0])
                shares = [host.outcomes.remote(candidate, learned, at, len(hosts)) for at, host in enumerate(hosts)]
                running[hosts[0].score.remote(candidate, None, scores, learned, *shares)] = candidate, leased, learned
            done, _ = ray.wait(list(running), num_returns=1)
            candidate, leased, learned = running.pop(done[0])
            artifacts = partial(self.hosts[leased[0]].artifacts.remote, candidate, learned)
            try:
                yield candidate, ray.get(done[0]), artifacts
            except RayError as error:
                yield candidate, error, artifacts
            finally:
                for index in leased:
                    self.release(index)


def share_cluster(wanted: HostsSpec) -> tuple[str, int, int]:
    """The device of the hosts, their number, and the threads of each.

    Raises :class:`MergeRayError` with what is asked for and what there is, where that is too little.
    """
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    device = ("cuda" if gpus else "cpu") if wanted.device == "auto" else wanted.device
    slots = gpus if device == "cuda" else cpus
    if slots == 0:
        raise MergeRayError(
            f"hosts.device: {wanted.device!r} is asked for, but the cluster has {gpus} GPUs and {cpus} CPUs"
        )
    count = wanted.count or (gpus if device == "cuda" else min(cpus, MOST_CPU_HOSTS))
    threads = wanted.threads or max(1, cpus // count)
    needed = count if device == "cuda" else count * threads
    if needed > slots:
        what = "GPUs" if device == "cuda" else "CPU cores"
        raise MergeRayError(f"hosts: {count} hosts need {needed} {what}; the cluster has {slots}")
    return device, count, threads


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

"""A group of hosts that share a bank: each merges its slice of the columns, and the first gathers them and scores.

All hosts of a group run the same merge at the same time, in step where it depends on other columns: see
:mod:`merge_ray.kernels`. The first host owns the others, which end with it; when it loses one of them it ends itself,
and Ray starts the group again and repeats the call.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from merge_ray import kernels
from merge_ray.bank import ModelBank
from merge_ray.candidate import Candidate
from merge_ray.cluster.setup import HostSetup
from merge_ray.errors import MergeRayError
from merge_ray.methods.base import Merged, MergeInputs, with_own_tensors
from merge_ray.methods.merge_cache import MergeCache

PATIENCE = 300.0
"""Seconds in which the further hosts of a group must be ready; their node may be gone, and no other have room."""


@dataclass
class _Round:
    given: dict[int, Any] = field(default_factory=dict)
    over: asyncio.Event = field(default_factory=asyncio.Event)


@ray.remote(num_cpus=0)
class Meeting:
    """Where ``size`` hosts meet: each brings a value, and takes away everyone's in the order of the hosts.

    Merges are numbered, and so are the meetings of each.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.rounds: dict[tuple[int, int], _Round] = {}
        self.broken_off = 0

    async def meet(self, merge: int, number: int, index: int, value: Any) -> list[Any]:
        """Wait for all hosts; raises :class:`RuntimeError` where the merge was broken off."""
        meeting = _Round()
        if merge > self.broken_off:
            meeting = self.rounds.setdefault((merge, number), meeting)
            meeting.given[index] = value
            if len(meeting.given) == self.size:
                del self.rounds[merge, number]
                meeting.over.set()
            await meeting.over.wait()
        if len(meeting.given) < self.size:
            raise RuntimeError("another host of the group could not merge")
        return [meeting.given[place] for place in range(self.size)]

    async def break_off(self, merge: int) -> None:
        """Let no host wait for others in merges up to this one."""
        self.broken_off = merge
        for meeting in self.rounds.values():
            meeting.over.set()
        self.rounds.clear()


class Member:
    """A host's part in one merge of its group. answer: ``answer(reference)`` waits for what the meeting says."""

    def __init__(self, meeting: Any, index: int, merge: int, answer: Callable[[ray.ObjectRef], Any] = ray.get) -> None:
        self._meeting, self._index, self._merge, self._answer = meeting, index, merge, answer
        self._number = 0

    def _meet(self, value: Any) -> list[Any]:
        self._number += 1
        return list(self._answer(self._meeting.meet.remote(self._merge, self._number, self._index, value)))

    def total(self, array: np.ndarray) -> np.ndarray:
        """The sum of all hosts' arrays: see :data:`merge_ray.kernels.Total`."""
        result: np.ndarray = np.sum(self._meet(array), axis=0, dtype=array.dtype)
        return result

    def gather(self, part: Tensor) -> list[ray.ObjectRef]:
        """References to all hosts' slices; one's own must be kept until the next meeting."""
        self._part = ray.put(part.cpu().numpy())
        return [reference for [reference] in self._meet([self._part])]


@ray.remote
class SliceHost:
    """A further host of a group: it merges its slice, and gives it when it is asked to."""

    def __init__(self, setup: HostSetup, index: int, arrays: Sequence[ray.ObjectRef], meeting: Any) -> None:
        """``index`` says which of the group's hosts it is; ``arrays`` is the reference to the slice's arrays."""
        os.environ.update(setup.s3.environment())
        setup.enter()
        [parts] = ray.get(list(arrays))
        self.index, self.meeting = index, meeting
        self.own_tensors = setup.models.open_family().own_tensors
        start, fingerprint = setup.ends[index], setup.fingerprint
        bank = ModelBank.from_arrays(parts, setup.layout, setup.bank_tasks, {}, fingerprint, start)
        self.bank = bank if setup.device == "cpu" else bank.to(setup.device)
        self.out = kernels.vector(self.bank.task_vectors)
        self.cache = MergeCache(self.out.nbytes)
        self.merged: Merged | None = None

    def merge(self, candidate: Candidate, number: int) -> None:
        """Take part in a merge of the group."""
        self.merged = None
        member = Member(self.meeting, self.index, number)
        bank, method = self.bank.of(candidate.pair) if candidate.pair else self.bank, candidate.make()

        def validation(merged: Merged, task: str) -> float:
            merged.write(task, self.out)
            member.gather(self.out)
            return float(member.total(np.zeros(())))

        inputs = MergeInputs(
            bank,
            seed=candidate.seed,
            out=self.out,
            cache=self.cache,
            resources={"validation": validation},
            needs=method.needs,
            total=member.total,
        )
        self.merged = with_own_tensors(method.merge(inputs), bank, self.own_tensors)

    def write(self, task: str) -> np.ndarray:
        """The slice of the weights that answer ``task``, float32."""
        assert self.merged is not None
        self.merged.write(task, self.out)
        return self.out.cpu().numpy()

    def artifacts(self) -> dict[str, np.ndarray]:
        """The slices of the merge's artifacts."""
        assert self.merged is not None
        return self.merged.artifacts()


class Group:
    """The further hosts of a group as its first host sees them.

    slices: where all slices' arrays are, the first host's first.
    """

    def __init__(self, setup: HostSetup, slices: Sequence[ray.ObjectRef]) -> None:
        device = {"num_gpus": 1, "num_cpus": 0} if setup.device == "cuda" else {"num_cpus": setup.threads}
        # Where there is room, beside the first host: slices travel through the node's shared memory.
        near = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        make = SliceHost.options(scheduling_strategy=near, **device)  # type: ignore[attr-defined]
        self._meeting: Any = Meeting.remote(len(slices))  # type: ignore[attr-defined]
        self.columns = [slice(start, stop) for start, stop in pairwise(setup.ends[1:])]
        self.hosts = [
            make.remote(setup, index, [arrays], self._meeting) for index, arrays in enumerate(slices[1:], start=1)
        ]
        try:
            ray.get([host.__ray_ready__.remote() for host in self.hosts], timeout=PATIENCE)
        except GetTimeoutError:
            reason = f"no room came for the other {len(self.hosts)} of a group's hosts in {PATIENCE:.0f} s"
            raise MergeRayError(reason) from None
        self._number = 0
        self._merging: list[ray.ObjectRef] = []

    def begin(self, candidate: Candidate) -> Member:
        """Start a merge on the further hosts; the first host's part in it."""
        self._number += 1
        self._merging = [host.merge.remote(candidate, self._number) for host in self.hosts]
        return Member(self._meeting, 0, self._number, self._watching)

    @contextmanager
    def merging(self) -> Iterator[None]:
        """The time in which the first host merges: whoever fails, none waits for it."""
        try:
            yield
            self.ask(self._merging)
        except BaseException:
            self.ask([self._meeting.break_off.remote(self._number)])
            raise

    def ask(self, calls: Sequence[ray.ObjectRef]) -> list[Any]:
        """The answers of the group's processes. The error of one is raised; the loss of one ends this one, too."""
        try:
            return list(ray.get(list(calls)))
        except RayTaskError as error:
            raise error.cause or error from None
        except RayError:
            os._exit(1)

    def _watching(self, call: ray.ObjectRef) -> Any:
        """The answer to a call, unless a host that it waits for has failed."""
        while True:
            ready, _ = ray.wait([call, *self._merging], num_returns=1)
            [answer] = self.ask(ready)
            if ready == [call]:
                return answer
            self._merging = [other for other in self._merging if other not in ready]


class GatheredWeights(Merged):
    """A group's merge on its first host, which has merged the first slice."""

    def __init__(self, merged: Merged, bank: ModelBank, group: Group) -> None:
        self.resolved, self.notes, self.shared = merged.resolved, merged.notes, merged.shared
        self._merged, self._bank, self._group = merged, bank, group
        self.as_published = merged.as_published
        self._holder: Tensor | None = None

    def write(self, task: str, out: Tensor) -> None:
        """See :meth:`Merged.write`; shared weights are gathered once."""
        if self.shared and self._holder is not None and self._holder.data_ptr() == out.data_ptr():
            return
        calls = [host.write.remote(task) for host in self._group.hosts]
        self._merged.write(task, out[self._bank.columns])
        take_slices(out, self._group.columns, self._group.ask(calls))
        self._holder = out

    def storage_bytes(self) -> int:
        """That of the whole merge."""
        return self._merged.storage_bytes()

    def artifacts(self) -> dict[str, np.ndarray]:
        """The slices' artifacts, one after the other."""
        parts = [self._merged.artifacts(), *self._group.ask([host.artifacts.remote() for host in self._group.hosts])]
        return {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}


def take_slices(out: Tensor, columns: Sequence[slice], slices: Sequence[np.ndarray]) -> None:
    """Copy slices into their columns of ``out`` ``[P]``."""
    for place, array in zip(columns, slices, strict=True):
        # A copy of its own, for torch minds arrays that cannot be written to.
        out[place].copy_(torch.from_numpy(array.copy()))

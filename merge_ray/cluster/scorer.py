"""Scorer: holds the models on one device and merges and scores candidates there."""

from __future__ import annotations

import os
import resource
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from merge_ray import kernels
from merge_ray.bank import ModelBank
from merge_ray.candidate import Candidate, canonical_json
from merge_ray.cluster.group import GatheredWeights, Group, Member, take_slices
from merge_ray.cluster.learned import Learned
from merge_ray.cluster.setup import HostSetup
from merge_ray.evaluate import Evaluator, References, UnlabeledSamples
from merge_ray.families import Family, TaskData, find_family
from merge_ray.matching import PermutationGroups
from merge_ray.methods.base import (
    LearnedMethod,
    Learner,
    Merged,
    MergeInputs,
    Method,
    Predictor,
    SharedWeights,
    with_own_tensors,
)
from merge_ray.methods.merge_cache import MergeCache
from merge_ray.models import open_task_data
from merge_ray.statistics import ActivationStatistics


class Scorer:
    """Merges and scores on one device; or is the first of a group that shares the bank.

    Calls carry all that they need: one that is made anew on the device takes the same call again, merges again and
    goes on.
    """

    def __init__(self, setup: HostSetup, shared: Sequence[ray.ObjectRef]) -> None:
        """``shared`` refers to the arrays of the bank's slices and to the tensors that are not merged, by name."""
        os.environ.update(setup.s3.environment())
        cache = setup.enter()
        *slices, last = shared
        arrays, extras = ray.get([slices[0], last])
        self.setup = setup
        self.device = torch.device(setup.device)
        self.bank = ModelBank.from_arrays(arrays, setup.layout, setup.bank_tasks, _tensors(extras), setup.fingerprint)
        if self.device.type != "cpu":
            self.bank = self.bank.to(self.device)
        family = find_family(setup.models.family, setup.models.architecture)
        self.group = Group(setup, slices) if len(slices) > 1 else None
        self.evaluator = Evaluator(
            family.skeleton(self.bank, self.device),
            {split: self._load(family, split, cache) for split in ("val", "test")},
            setup.evaluation.batch_size,
            setup.evaluation.shards,
            setup.evaluation.calibration_samples,
        )
        self.family = family
        self.groups: PermutationGroups | None = None
        self.calibrations: dict[tuple[str, ...], ActivationStatistics] = {}
        self.cache = MergeCache(self.evaluator.skeleton.flat[self.bank.columns].nbytes, setup.kept)
        self.candidate, self.asked = "", self.evaluator
        self.merged: Merged | None = None
        self.learner: Learner | None = None
        self.shards: list[dict[str, np.ndarray]] = []
        self._forget()

    def _load(self, family: Family, split: str, cache: Path) -> dict[str, TaskData]:
        data, setup = {}, self.setup
        setup.prepare(family, split, cache)
        for spec in setup.tasks:
            head = torch.from_numpy(setup.heads[spec.name].copy()) if family.needs_heads else None
            data[spec.name] = open_task_data(family, spec, split, head, setup.evaluation, self.device, cache)
        return data

    def learn(self, candidate: Candidate, learned: Learned, steps: int) -> Learned:
        """Learn ``steps`` more steps than ``learned``. The error of a loss that is not finite is raised here."""
        started = time.perf_counter()
        learner = self._learner(candidate, learned)
        loss = learner.advance(steps)
        self.merged = None
        artifacts = learner.merged().artifacts()
        seconds = learned.seconds + time.perf_counter() - started
        return replace(
            learned, step=learner.step, state=learner.state(), artifacts=artifacts, loss=loss, seconds=seconds
        )

    def score(
        self,
        candidate: Candidate,
        shard: int | None,
        references: References | None,
        learned: Learned | None = None,
        *shares: Mapping[str, np.ndarray],
    ) -> dict[str, Any]:
        """Score a candidate through ``shard``, or by all the ``shares`` of its samples; gives the ledger's columns.

        references: the fine-tuned models' scores that normalised scores divide by, or None while they are
        being found out. learned: what a candidate that learns has learned. shares: the hosts' :meth:`outcomes`.
        """
        merged = self._merge(candidate, learned)
        parts: Sequence[Mapping[str, np.ndarray]] = shares
        if shard is not None:
            while len(self.shards) <= shard:
                self.shards.append(self._outcomes(merged, candidate.split, len(self.shards)))
            parts = self.shards[: shard + 1]
        outcomes = {task: np.concatenate([part[task] for part in parts]) for task in parts[0]}
        return {
            **self.asked.summarize(outcomes, candidate.split, references, self.setup.evaluation.objective),
            "resolved": canonical_json(merged.resolved.parameters()),
            "notes": list(merged.notes),
            "transductive": candidate.split == "test" and self.seen == "test" and "unlabeled" in self.inputs.used,
            "seconds_merge": self.seconds_merge + (learned.seconds if learned else 0.0),
            "seconds_evaluate": self.seconds_evaluate,
            "peak_memory_bytes": self._peak_memory(),
            "storage_bytes": merged.storage_bytes(),
            "storage_ratio": merged.storage_bytes() / self.inputs.bank.finetuned_bytes,
            "device": _device_name(self.device),
            "host": self.setup.node,
        }

    def outcomes(self, candidate: Candidate, learned: Learned | None, share: int, shares: int) -> dict[str, np.ndarray]:
        """What is kept of the answers to one of so many equal ``shares`` of every task's samples."""
        return self._outcomes(self._merge(candidate, learned), candidate.split, None, share, shares)

    def _outcomes(self, merged: Merged, *what: Any) -> dict[str, np.ndarray]:
        started = time.perf_counter()
        outcomes = self.asked.outcomes(merged, *what)
        self.seconds_evaluate += time.perf_counter() - started
        return outcomes

    def artifacts(self, candidate: Candidate, learned: Learned | None = None) -> dict[str, np.ndarray]:
        """What the candidate's merge leaves worth keeping."""
        return self._merge(candidate, learned).artifacts()

    def _merge(self, candidate: Candidate, learned: Learned | None) -> Merged:
        """The candidate's merge with what it has learned, made now unless it was the last one."""
        if self.merged is not None and self._is_current(candidate, learned):
            return self.merged
        make: Callable[[], Merged]
        if learned is None:
            make = partial(self._begin(candidate).merge, self.inputs)
        else:
            make = self._learner(candidate, learned).merged
        started = time.perf_counter()
        with self.group.merging() if self.group else nullcontext():
            merged = with_own_tensors(make(), self.inputs.bank, self.family.own_tensors)
        if self.group and not isinstance(merged, Predictor):
            merged = GatheredWeights(merged, self.bank, self.group)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds_merge = time.perf_counter() - started
        self.merged, self.shards = merged, []
        return merged

    def _learner(self, candidate: Candidate, learned: Learned) -> Learner:
        """The candidate's learner where ``learned`` left off: the last one if it stands there."""
        if self.learner is None or not self._is_current(candidate, learned):
            method = self._begin(candidate)
            assert isinstance(method, LearnedMethod)
            learner = method.learner(self.inputs)
            if learned.step:
                learner.load(learned.state)
            self.learner = learner
        return self.learner

    def _is_current(self, candidate: Candidate, learned: Learned | None) -> bool:
        step = self.learner.step if self.learner else None
        return self.candidate == candidate.identity and step == (learned.step if learned else None)

    def _begin(self, candidate: Candidate) -> Method:
        """Make room for a candidate; returns its method."""
        # The last merge's vectors must be gone before the next are made.
        self._forget()
        self._reset_peak_memory()
        method = candidate.make()
        # What a method may see is validation data, also of a candidate that is scored on the test split.
        self.seen = candidate.split if self.setup.evaluation.transductive else "val"
        self.asked = self.evaluator.of(candidate.pair) if candidate.pair else self.evaluator
        member = self.group.begin(candidate) if self.group else None
        self.inputs = MergeInputs(
            self.bank.of(candidate.pair) if candidate.pair else self.bank,
            seed=candidate.seed,
            out=self.evaluator.skeleton.flat[self.bank.columns],
            cache=self.cache,
            resources={
                "validation": partial(self._validate, member) if member else self.asked.score,
                "unlabeled": UnlabeledSamples(self.asked.models[self.seen]),
            },
            needs=method.needs,
            total=member.total if member else kernels.alone,
        )
        if method.needs & {"permutation_groups", "calibration"}:
            self.inputs.provide(**self._matching(candidate.pair))
        self.candidate = candidate.identity
        return method

    def _validate(self, member: Member, merged: Merged, task: str) -> float:
        """:meth:`Evaluator.score` of what the group has merged, told to all of its hosts."""
        assert self.group is not None
        flat = self.evaluator.skeleton.flat
        part = flat[self.bank.columns]
        merged.write(task, part)
        slices = self.group.ask(member.gather(part)[1:])
        take_slices(flat, self.group.columns, slices)
        score = self.asked.score(SharedWeights(merged.resolved, self.bank, flat), task)
        return float(member.total(np.array(score)))

    def _matching(self, pair: tuple[str, ...]) -> dict[str, Any]:
        """What methods that match channels need: the groups of channels, and statistics of a pair's activations.

        Both are made once; those of earlier pairs have had their candidates.
        """
        skeleton = self.evaluator.skeleton
        if self.groups is None:
            self.groups = self.family.permutation_groups(skeleton)
        if pair not in self.calibrations:
            self.calibrations.clear()
            batches = self.asked.calibration_batches("val")
            bank = self.inputs.bank
            self.calibrations[pair] = ActivationStatistics(skeleton, skeleton.flat, bank, self.groups, batches)
        return {"permutation_groups": self.groups, "calibration": self.calibrations[pair]}

    def _forget(self) -> None:
        self.candidate = ""
        self.merged = None
        self.learner = None
        self.shards = []
        self.seconds_merge = self.seconds_evaluate = 0.0

    def _reset_peak_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif (control := Path("/proc/self/clear_refs")).exists():
            control.write_text("5")

    def _peak_memory(self) -> int:
        """The device memory's peak since the merge began; on a CPU, the process's resident memory."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Tensors over shared memory without a copy; but copies of integers, for batch norm counts in them."""
    with warnings.catch_warnings():
        # torch warns that it cannot mark a tensor as read-only; nothing writes to these.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return {
            name: torch.from_numpy(array if array.dtype.kind == "f" else array.copy()) for name, array in arrays.items()
        }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu x {torch.get_num_threads()}"

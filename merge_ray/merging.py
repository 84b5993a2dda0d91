"""Merge once, in this process: the Python front door to every method."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from merge_ray import kernels
from merge_ray.bank import ModelBank, StateDict
from merge_ray.checkpoints import (
    destination,
    fingerprint_file,
    read_finetuned,
    read_weights,
    write_open_clip,
    write_safetensors,
)
from merge_ray.errors import ParameterError, choose_from
from merge_ray.families import Family, Skeleton
from merge_ray.matching import PermutationGroups
from merge_ray.methods.base import (
    Calibration,
    Merged,
    MergeInputs,
    Method,
    Unlabeled,
    make_method,
    with_own_tensors,
)
from merge_ray.statistics import ActivationStatistics, reset_batch_norm

Source = StateDict | str | Path
BATCH = 64
"""Images that models are shown at once."""
WRITERS = {"safetensors": write_safetensors, "open_clip": write_open_clip}


@dataclass
class MergeResult:
    """Merged models and where they come from.

    merged: the method's answer. bank: the models as they were laid out. sources: the locations that were read, by
    ``base`` and ``finetuned/<task>``. settle: what is done to merged weights ``[P]`` in place, if anything: batch
    norm is reset.
    """

    merged: Merged
    bank: ModelBank
    sources: Mapping[str, str]
    settle: Callable[[Tensor], None] | None = None

    @property
    def method(self) -> Method:
        """The method with every choice that it made on validation data filled in."""
        return self.merged.resolved

    def flat(self, task: str | None = None) -> Tensor:
        """The merged weights as one float32 vector ``[P]`` in the layout's order; see :meth:`state_dict`."""
        if task is None and not self.merged.shared:
            raise ParameterError(f"{self.method.name} gives every task weights of its own; name one of {self._tasks()}")
        if task is not None and task not in self.bank.tasks:
            raise ParameterError(f"unknown task {task!r}; {choose_from(task, self.bank.tasks)}")
        out = kernels.vector(self.bank.task_vectors)
        self.merged.write(task or self.bank.tasks[0], out)
        if self.settle is not None:
            self.settle(out)
        return out

    def state_dict(self, task: str | None = None) -> dict[str, Tensor]:
        """The merged weights by name, in the base's shapes and dtypes, with its integer buffers.

        ``task`` says whose, for methods with weights per task; raises :class:`ParameterError` if it is missing then.
        """
        return self.bank.state_dict(self.flat(task))

    def artifacts(self) -> dict[str, np.ndarray]:
        """What the method leaves beside the weights, such as packed masks, by name."""
        return self.merged.artifacts()

    def masks(self) -> dict[str, np.ndarray]:
        """The masks, unpacked: bool ``[P]`` by task, or as ``consensus``; empty for methods without masks."""
        packed = {name: bits for name, bits in self.artifacts().items() if "mask" in name.split("/")[0]}
        names = {"consensus_mask": "consensus"}
        return {
            names.get(name, name.partition("/")[2]): kernels.unpack(bits, self.bank.layout.size)
            for name, bits in packed.items()
        }

    def save(self, path: str | Path, format: str = "safetensors", task: str | None = None) -> None:
        """Write the weights (of ``task``) to a path or to ``s3://bucket/key``, with a record of what made them.

        ``format`` is safetensors or open_clip.
        """
        if format not in WRITERS:
            raise ParameterError(f"unknown format {format!r}; {choose_from(format, WRITERS)}")
        with destination(path) as file:
            WRITERS[format](file, self.state_dict(task), self._metadata(task))

    def _metadata(self, task: str | None) -> dict[str, str]:
        sources = {
            name: {"location": location, "sha256": fingerprint_file(location)}
            for name, location in self.sources.items()
        }
        return {
            "method": self.method.name,
            "parameters": json.dumps(self.method.parameters(), sort_keys=True),
            "tasks": json.dumps(self.bank.tasks),
            **({"task": task} if task else {}),
            "sources": json.dumps(sources),
            "bank_fingerprint": self.bank.fingerprint,
            "merge_ray_version": version("merge-ray"),
        }

    def _tasks(self) -> str:
        return ", ".join(map(repr, self.bank.tasks))


def merge(
    method: str | Method,
    *,
    base: Source | None,
    finetuned: Mapping[str, Source],
    validation: Callable[[MergeResult, str], float] | None = None,
    unlabeled: Unlabeled | None = None,
    permutation_groups: PermutationGroups | None = None,
    calibration: Calibration | None = None,
    family: Family | None = None,
    images: Tensor | None = None,
    seed: int = 0,
    **parameters: Any,
) -> MergeResult:
    """Merge fine-tuned models with a base model.

    method: a method's name, with its ``parameters``, or a :class:`Method`. base, finetuned: state dicts or
    locations; the fine-tuned models by task, also as LoRA adapters. validation: ``validation(result, task)`` scores a
    merge on a task's validation data, for methods that choose on it; ``result.method`` says what is being scored.
    unlabeled: every task's samples, for methods that adapt on them; :class:`merge_ray.evaluate.UnlabeledSamples` is
    such. base may be None for models that have none in common, for methods that match channels: these need
    permutation_groups (:func:`merge_ray.matching.derive_groups`), and mostly calibration
    (:class:`merge_ray.statistics.ActivationStatistics`). Where the models are of a known family
    (:func:`merge_ray.families.find_family`), both are made of it and of ``images`` (uint8 ``[N, 3, S, S]``, of its
    size), on which the batch norm of models without a base is reset, too.

    Raises :class:`ParameterError` for unknown methods or parameters and :class:`CheckpointError` for models that
    cannot be read or do not fit each other.
    """
    chosen = make_method(method, parameters) if isinstance(method, str) else method
    if parameters and not isinstance(method, str):
        raise ParameterError(f"{chosen.name} has its parameters already; these were given beside: {sorted(parameters)}")
    state = base if base is None or isinstance(base, Mapping) else read_weights(base)
    if family is not None and state is not None:
        state = family.rename(state)
    bank = ModelBank.build(state, {task: _loader(source, state, family) for task, source in finetuned.items()})
    given = {"base": base, **{f"finetuned/{task}": source for task, source in finetuned.items()}}
    sources = {name: str(source) for name, source in given.items() if isinstance(source, str | Path)}
    offered = {"unlabeled": unlabeled, "permutation_groups": permutation_groups, "calibration": calibration}
    resources: dict[str, Any] = {name: resource for name, resource in offered.items() if resource is not None}
    settle = None
    if family is not None:
        skeleton = family.skeleton(bank, "cpu")
        batches = [] if images is None else [family.shown(part) for part in images.split(BATCH)]
        if "permutation_groups" in chosen.needs:
            groups = resources.setdefault("permutation_groups", family.permutation_groups(skeleton))
            if batches:
                statistics = ActivationStatistics(skeleton, skeleton.flat, bank, groups, batches)
                resources.setdefault("calibration", statistics)
        if batches and not family.has_base:
            settle = partial(_reset_batch_norm, skeleton, batches)
    if validation is not None:
        resources["validation"] = lambda merged, task: validation(MergeResult(merged, bank, sources), task)
    merged = chosen.merge(MergeInputs(bank, seed=seed, resources=resources, needs=chosen.needs))
    if family is not None:
        merged = with_own_tensors(merged, bank, family.own_tensors)
    return MergeResult(merged, bank, sources, settle)


def _loader(source: Source, base: StateDict | None, family: Family | None) -> StateDict | Callable[[], StateDict]:
    if family is not None:
        return lambda: family.rename(source if isinstance(source, Mapping) else read_weights(source))
    if isinstance(source, Mapping):
        return source
    return partial(read_weights, source) if base is None else partial(read_finetuned, source, base)


def _reset_batch_norm(skeleton: Skeleton, batches: Sequence[Tensor], weights: Tensor) -> None:
    skeleton.flat.copy_(weights)
    reset_batch_norm([skeleton], batches)
    weights.copy_(skeleton.flat)

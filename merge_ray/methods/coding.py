"""The mapping of dictionary fusion: from a sample's features to its coding, the coefficients of its merge.

A mapping is ``torch.nn.Sequential(Linear(F, F), ReLU(), Linear(F, K))``. Its ``K`` codings are one for each task
(``K = T``), or for each task and layer (``K = T * L``, the coding of task ``t`` and layer ``l`` at ``t * L + l``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from merge_ray.bank import ModelBank
from merge_ray.checkpoints import find_beside, open_location, read_weights
from merge_ray.errors import CheckpointError

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")
PREFIX = "mapping/"
"""Saved arrays of a mapping have its tensors under this prefix; ``mapping/about`` is JSON: what they are for."""


@dataclass(frozen=True)
class Codings:
    """What a mapping's outputs are for: ``tasks``, and with granularity ``layer`` each of ``layers``, in order."""

    tasks: tuple[str, ...]
    layers: tuple[str, ...] | None

    @classmethod
    def of(cls, bank: ModelBank, granularity: str) -> Codings:
        """The codings of a bank's tasks, or of its tasks' layers."""
        return cls(bank.tasks, bank.layout.names if granularity == "layer" else None)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(T,)``, or ``(T, L)``."""
        return (len(self.tasks),) if self.layers is None else (len(self.tasks), len(self.layers))


def new_mapping(features: int, codings: Codings, coefficient: float, seed: int) -> nn.Sequential:
    """A mapping whose codings are all ``coefficient``: the second layer is zero, the first drawn as torch does."""
    mapping = _mapping(features, features, math.prod(codings.shape))
    generator, bound = torch.Generator().manual_seed(seed), 1 / math.sqrt(features)
    with torch.no_grad():
        for name in ("0.weight", "0.bias"):
            mapping.get_parameter(name).uniform_(-bound, bound, generator=generator)
        mapping.get_parameter("2.weight").zero_()
        mapping.get_parameter("2.bias").fill_(coefficient)
    return mapping


def _mapping(features: int, hidden: int, codings: int) -> nn.Sequential:
    layers = (nn.Linear(features, hidden, device="meta"), nn.ReLU(), nn.Linear(hidden, codings, device="meta"))
    return nn.Sequential(*layers).to_empty(device="cpu")


def mapping_arrays(mapping: nn.Sequential, codings: Codings, extractor: str, step: int) -> dict[str, np.ndarray]:
    """A mapping's tensors and what they are for, to be saved and read again by :func:`read_mapping`."""
    about = {
        "granularity": "task" if codings.layers is None else "layer",
        "tasks": codings.tasks,
        "layers": codings.layers,
        "feature_extractor": extractor,
        "step": step,
    }
    tensors = {name: tensor.detach().cpu().numpy().copy() for name, tensor in mapping.state_dict().items()}
    arrays = {**tensors, "about": np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)}
    return {PREFIX + name: array for name, array in arrays.items()}


def read_mapping(location: str, features: int, extractor: str, codings: Codings) -> nn.Sequential:
    """A saved mapping from ``features`` (``F``, of ``extractor``) to ``codings``, its outputs in their order.

    The file is one that merge-ray saved (.npz or safetensors, with what it is for inside), or a published one: a
    pickle of the whole ``torch.nn.Sequential``, read without running any of it. What a published mapping's outputs are
    for is not in the pickle. A JSON of the same name beside it says so: ``{"tasks": [...], "layers": [...]}``, in the
    order of the outputs; without one, a task-wise mapping is taken to have the tasks in the pool's order, and a
    layer-wise one (in the order of its module's state dict, which its tensors do not tell) is refused.

    Raises :class:`CheckpointError` where the file holds no mapping, or one for other features, tasks or layers.
    """
    path = open_location(location)
    weights, about = _read(path, location)
    problem = _misfit(weights, about, features, extractor, codings)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}")
    order = _order(about, codings)
    outputs = {name: weights[name][order] for name in ("2.weight", "2.bias")}
    hidden, _ = weights["0.weight"].shape
    mapping = _mapping(features, hidden, math.prod(codings.shape))
    mapping.load_state_dict({**weights, **outputs})
    return mapping


def _read(path: Path, location: str) -> tuple[dict[str, Tensor], dict[str, list[str] | None]]:
    """The mapping's tensors, and what is known of its outputs."""
    arrays = _read_npz(path) if path.suffix == ".npz" else read_weights(path)
    arrays = {name.removeprefix(PREFIX): tensor for name, tensor in arrays.items()}
    weights = {name: arrays[name].float() for name in NAMES if name in arrays}
    if [tensor.ndim for tensor in weights.values()] != [2, 1, 2, 1]:
        raise CheckpointError(
            f"{path}: not a mapping: torch.nn.Sequential(Linear, ReLU, Linear) has {', '.join(NAMES)}; "
            f"this has {', '.join(arrays)}"
        )
    if "about" in arrays:
        return weights, _named(arrays["about"].numpy().tobytes(), path)
    beside = find_beside(location, ".json")
    return weights, _named(beside.read_bytes(), beside) if beside else _named(b"{}", path)


def _named(text: bytes, path: Path) -> dict[str, list[str] | None]:
    """The ``tasks`` and ``layers`` that a JSON object names, None where it does not."""
    try:
        about = json.loads(text)
        named = {name: about.get(name) for name in ("tasks", "layers")}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: what its outputs are for cannot be read as a JSON object ({error})") from error
    for name, words in named.items():
        if words is not None and not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
            raise CheckpointError(f"{path}: {name!r} of its outputs must be a list of names, not {words!r}")
    return named


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file, np.load(file) as saved:
            return {name: torch.from_numpy(saved[name]) for name in saved.files if name.startswith(PREFIX)}
    except (OSError, ValueError, BadZipFile) as error:
        raise CheckpointError(f"{path}: cannot be read as a saved mapping ({error})") from error


def _misfit(
    weights: Mapping[str, Tensor], about: Mapping[str, Any], features: int, extractor: str, codings: Codings
) -> str | None:
    """Why a mapping does not go from ``features`` to ``codings``, or None."""
    (outputs, _), (_, taken) = weights["2.weight"].shape, weights["0.weight"].shape
    if taken != features:
        return f"a mapping of {taken} features; the extractor {extractor} gives {features}"
    tasks, layers = about["tasks"], about["layers"]
    if codings.layers is None:
        if layers is not None:
            return "a layer-wise mapping; this merge has granularity 'task'"
        return _task_misfit(tasks, outputs, codings.tasks)
    pool = len(codings.layers)
    if layers is None:
        if tasks is not None or outputs == len(codings.tasks):
            return "a task-wise mapping; this merge has granularity 'layer'"
        count = len(codings.tasks)
        return (
            f"a layer-wise mapping that does not name its layers: its {outputs} outputs may be for {count} tasks and "
            f"{outputs / count:g} layers (this pool's models have {pool}); list them in the order of the outputs in a "
            'JSON of the same name beside it: {"tasks": [...], "layers": [...]}'
        )
    if len(layers) != pool:
        return (
            f"a layer-wise mapping of {len(layers)} layers; this pool's models have {pool}. A layer-wise mapping moves "
            "only between models of as many layers, a task-wise one between any"
        )
    if outputs % pool:
        return f"its {outputs} outputs are not for {pool} layers of some tasks"
    return _task_misfit(tasks, outputs // pool, codings.tasks)


def _task_misfit(named: Sequence[str] | None, count: int, pool: Sequence[str]) -> str | None:
    names = "" if named is None else f" ({', '.join(named)})"
    if count != len(pool):
        return f"a mapping of {count} tasks{names}; this pool has {len(pool)} ({', '.join(pool)})"
    if named is not None and sorted(named) != sorted(pool):
        return f"a mapping of the tasks {', '.join(named)}; this pool has {', '.join(pool)}"
    return None


def _order(about: Mapping[str, Any], codings: Codings) -> Tensor:
    """Which output of the file each coding is ``[K]``: by name, layers of another architecture by their place."""
    rows = _places(about["tasks"], codings.tasks)
    if codings.layers is None:
        return rows
    same = sorted(about["layers"]) == sorted(codings.layers)
    columns = _places(about["layers"] if same else None, codings.layers)
    return (rows[:, None] * len(codings.layers) + columns).flatten()


def _places(named: Sequence[str] | None, wanted: Sequence[str]) -> Tensor:
    return torch.arange(len(wanted)) if named is None else torch.tensor([named.index(name) for name in wanted])

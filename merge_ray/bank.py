"""All the models of a merge as flat vectors over one layout.

A *layout* says where each mergeable tensor lies in a flat vector of length ``P``: the floating-point tensors,
raveled in C order, in the sorted order of their names. A *bank* holds the base model ``[P]`` and the task
vectors ``[T, P]`` (fine-tuned minus base) over it, once; or a slice of the columns, where a group of hosts shares them.
Models of which every tensor is bfloat16 or float16 are held as such; their task vectors are made in float32 where they
are read (:class:`merge_ray.kernels.DerivedTaskVectors`), to the same bits as if they had been held.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merge_ray import kernels
from merge_ray.errors import CheckpointError, format_bytes
from merge_ray.kernels import DerivedTaskVectors, TaskVectors
from merge_ray.memory import available_memory

StateDict = Mapping[str, Tensor]
LISTED_PROBLEMS = 12


@dataclass(frozen=True)
class Entry:
    """One tensor of a layout: its name, shape and stored dtype, and where it starts in the flat vector."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def size(self) -> int:
        """The number of its elements (1 for a 0-d tensor)."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Layout:
    """The mergeable tensors in sorted name order; a *layer* is one of them."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, state: StateDict) -> Layout:
        """The layout of a state dict's floating-point tensors; other tensors are left out."""
        entries, offset = [], 0
        for name in sorted(state):
            tensor = state[name]
            if tensor.is_floating_point():
                entries.append(Entry(name, tuple(tensor.shape), tensor.dtype, offset))
                offset += tensor.numel()
        return cls(tuple(entries))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, sorted."""
        return tuple(entry.name for entry in self.entries)

    @cached_property
    def bounds(self) -> np.ndarray:
        """Where each tensor starts, and where the last one ends: int64 ``[L + 1]``."""
        return np.cumsum([0, *(entry.size for entry in self.entries)], dtype=np.int64)

    @property
    def size(self) -> int:
        """``P``, the number of weights."""
        return int(self.bounds[-1])

    @property
    def nbytes(self) -> int:
        """The bytes of one model's mergeable tensors in their stored dtypes."""
        return sum(entry.size * entry.dtype.itemsize for entry in self.entries)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Every tensor by name, in its shape, as a view of ``flat`` ``[P]``."""
        return {entry.name: flat[entry.offset : entry.offset + entry.size].view(entry.shape) for entry in self.entries}

    @property
    def dtype(self) -> torch.dtype:
        """What holds every tensor without rounding: the tensors' own 16-bit dtype if they share one, or float32.

        (Double precision is not kept: merges are made in float32.)
        """
        dtypes = {entry.dtype for entry in self.entries}
        return dtypes.pop() if dtypes in ({torch.bfloat16}, {torch.float16}) else torch.float32

    def flatten(self, state: StateDict, out: Tensor | None = None) -> Tensor:
        """The state dict's tensors as one vector ``[P]``, float32, or written into ``out`` if given."""
        flat = torch.empty(self.size) if out is None else out
        for name, view in self.views(flat).items():
            view.copy_(state[name].detach())
        return flat

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Every tensor by name in its stored dtype; float32 tensors are views of ``flat`` ``[P]``."""
        views = self.views(flat)
        return {entry.name: views[entry.name].to(entry.dtype) for entry in self.entries}


@dataclass
class ModelBank:
    """The base model and the task vectors over one layout, or over a slice of its columns.

    base: float32 ``[P]``, or 16 bits; zero where the models have none in common. task_vectors: float32 ``[T, P]``,
    fine-tuned minus base, both taken to float32 first. start: the first of the layout's columns that is here.
    tasks: their names, sorted. extras: the base's tensors that are not merged (integer buffers, and tensors that
    no fine-tuned model has). fingerprint: a hash of all of this.
    """

    layout: Layout
    base: Tensor
    task_vectors: Any  # kernels' TaskVectors: a tensor unless the models are held in 16 bits, which callers know
    tasks: tuple[str, ...]
    extras: dict[str, Tensor]
    fingerprint: str
    start: int = 0

    @classmethod
    def build(
        cls,
        base: StateDict | None,
        finetuned: Mapping[str, StateDict | Callable[[], StateDict]],
        progress: Callable[[int, int], None] | None = None,
        dtype: torch.dtype | None = None,
    ) -> ModelBank:
        """Lay the models out flat. A callable gives its model when asked, so that one is loaded at a time.

        Without a base (None) the models have none in common: the bank's base is zero, its task vectors are the models
        themselves, and integer tensors are the mean of theirs, cut to integers.

        dtype: what the models are held in, each weight rounded once; None for :attr:`Layout.dtype`, which rounds none.

        ``progress(done, total)`` is called after each fine-tuned model. Raises :class:`CheckpointError` naming
        the tensors where a model does not fit the base or the other models, or holds NaN or infinity, and before a
        second one is read where all of them need more memory than is left.
        """
        if not finetuned:
            raise CheckpointError("there are no fine-tuned models to merge")
        tasks = tuple(sorted(finetuned))
        layout: Layout | None = None
        reference = base
        integers: dict[str, list[Tensor]] = {}
        for index, task in enumerate(tasks):
            source = finetuned[task]
            state = source() if callable(source) else source
            if reference is None:
                reference = state
            _raise_problems(task, _misfits(state, reference, "the base model" if base is not None else repr(tasks[0])))
            if layout is None:
                layout = Layout.of(state)
                dtype = dtype or layout.dtype
                _check_memory((len(tasks) + 1) * layout.size, dtype)
                flat_base = torch.zeros(layout.size, dtype=dtype)
                if base is not None:
                    _flatten_finite("the base model", layout, base, flat_base)
                models = torch.empty(len(tasks), layout.size, dtype=dtype)
            _raise_problems(task, _differing_names(state, layout, tasks[0]))
            _flatten_finite(task, layout, state, models[index])
            if dtype == torch.float32:
                models[index] -= flat_base
            for name in state.keys() - set(layout.names):
                integers.setdefault(name, []).append(state[name])
            if progress:
                progress(index + 1, len(tasks))
        assert layout is not None
        task_vectors = models if dtype == torch.float32 else DerivedTaskVectors(models, flat_base)
        if base is not None:
            extras = {name: tensor for name, tensor in base.items() if name not in set(layout.names)}
        else:
            extras = {
                name: torch.stack(tensors).double().mean(dim=0).to(tensors[0].dtype)
                for name, tensors in sorted(integers.items())
            }
        fingerprint = _fingerprint(layout, flat_base, task_vectors, tasks, extras)
        return cls(layout, flat_base, task_vectors, tasks, extras, fingerprint)

    @property
    def columns(self) -> slice:
        """Which of the layout's columns are here."""
        return slice(self.start, self.start + len(self.base))

    @property
    def bounds(self) -> np.ndarray:
        """Where each tensor starts among the columns that are here, and where the last one ends: int64 ``[L + 1]``."""
        return np.clip(self.layout.bounds, self.columns.start, self.columns.stop) - self.start

    def arrays(self, columns: slice = slice(None)) -> dict[str, np.ndarray]:
        """The vectors as NumPy arrays that share the tensors' memory; bfloat16 goes as int16.

        ``base``, and ``task_vectors`` or, where these are derived, ``models``.
        """
        rows = self.task_vectors
        held = {"task_vectors": rows} if isinstance(rows, Tensor) else {"models": rows.models}
        return {
            name: (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor)[..., columns].numpy()
            for name, tensor in {"base": self.base, **held}.items()
        }

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, np.ndarray],
        layout: Layout,
        tasks: Sequence[str],
        extras: Mapping[str, Tensor],
        fingerprint: str,
        start: int = 0,
    ) -> ModelBank:
        """The bank over arrays from :meth:`arrays`, without a copy; they may be read-only shared memory."""
        with warnings.catch_warnings():
            # torch warns that it cannot mark a tensor as read-only; nothing writes to a bank.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        held = {name: one.view(torch.bfloat16) if one.dtype == torch.int16 else one for name, one in tensors.items()}
        base = held["base"]
        rows = held["task_vectors"] if "task_vectors" in held else DerivedTaskVectors(held["models"], base)
        return cls(layout, base, rows, tuple(tasks), dict(extras), fingerprint, start)

    def of(self, tasks: Sequence[str]) -> ModelBank:
        """The bank of some of the tasks alone, in its own order; two rows are not copied."""
        places = [place for place, task in enumerate(self.tasks) if task in tasks]
        rows: slice | list[int] = places
        if len(places) == 2:
            rows = slice(places[0], places[1] + 1, places[1] - places[0])
        return dataclasses.replace(
            self, task_vectors=self.task_vectors[rows], tasks=tuple(self.tasks[place] for place in places)
        )

    def to(self, device: torch.device | str) -> ModelBank:
        """The bank with its vectors on ``device`` (the same memory if they are there already)."""
        base, rows = self.base.to(device), self.task_vectors
        moved = rows.to(device) if isinstance(rows, Tensor) else DerivedTaskVectors(rows.models.to(device), base)
        return dataclasses.replace(self, base=base, task_vectors=moved)

    def state_dict(self, flat: Tensor) -> dict[str, Tensor]:
        """The state dict of flat weights ``[P]``: see :meth:`Layout.unflatten`, with the extras beside."""
        return {**self.layout.unflatten(flat), **self.extras}

    @property
    def model_bytes(self) -> int:
        """The bytes of one model's mergeable tensors in their stored dtypes."""
        return self.layout.nbytes

    @property
    def finetuned_bytes(self) -> int:
        """The bytes of all ``T`` fine-tuned models: what merging saves is measured against it."""
        return len(self.tasks) * self.model_bytes


def _misfits(state: StateDict, base: StateDict, other: str) -> list[str]:
    """What keeps a fine-tuned model from being the base (or any ``other`` model) plus a task vector."""
    problems = []
    for name, tensor in sorted(state.items()):
        if name not in base:
            problems.append(f"{name}: not in {other}")
        elif tensor.shape != base[name].shape:
            problems.append(f"{name}: shape {list(tensor.shape)}, in {other} {list(base[name].shape)}")
        elif tensor.dtype != base[name].dtype:
            problems.append(f"{name}: dtype {_name(tensor.dtype)}, in {other} {_name(base[name].dtype)}")
    return problems


def _differing_names(state: StateDict, layout: Layout, first: str) -> list[str]:
    """Where a model's floating-point tensors are not those of the first model, ``first``."""
    names = {name for name, tensor in state.items() if tensor.is_floating_point()}
    if not names:
        return ["it has no floating-point tensors to merge"]
    missing = [f"{name}: missing here, present in {first!r}" for name in sorted(set(layout.names) - names)]
    return missing + [f"{name}: present here, missing in {first!r}" for name in sorted(names - set(layout.names))]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _raise_problems(model: str, problems: Sequence[str]) -> None:
    if problems:
        lines = list(problems[:LISTED_PROBLEMS])
        if len(problems) > LISTED_PROBLEMS:
            lines.append(f"... and {len(problems) - LISTED_PROBLEMS} more tensors")
        raise CheckpointError("\n  ".join([f"{model}: this model cannot be merged:", *lines]))


def _check_memory(weights: int, dtype: torch.dtype) -> None:
    """Raise :class:`CheckpointError` where so many weights are more than this machine has memory left for."""
    needed, left = weights * dtype.itemsize, available_memory()
    if needed > left:
        smaller = "hold them in 16 bits (models.dtype in a spec), or " if dtype.itemsize > 2 else ""
        raise CheckpointError(
            f"the models are {format_bytes(needed)} in {_name(dtype)}, and this machine has {format_bytes(left)} of "
            f"memory left, {format_bytes(needed - left)} too little: {smaller}merge fewer models"
        )


def _flatten_finite(model: str, layout: Layout, state: StateDict, out: Tensor) -> None:
    flat = layout.flatten(state, out)
    problems = []
    for name, view in layout.views(flat).items():
        # The smallest and largest element are NaN if any element is: no mask as large as the tensor is needed.
        if view.numel() and not torch.isfinite(torch.stack(torch.aminmax(view))).all():
            problems.append(
                f"{name}: {int((~torch.isfinite(view)).sum())} values are NaN or infinite (as {_name(out.dtype)})"
            )
    _raise_problems(model, problems)


def _fingerprint(
    layout: Layout, base: Tensor, task_vectors: TaskVectors, tasks: Sequence[str], extras: StateDict
) -> str:
    # Of the float32 vectors, in whatever they are held.
    vectors = [(base[None], 0), *((task_vectors, task) for task in range(len(tasks)))]
    with ThreadPoolExecutor(max(1, min(len(vectors), torch.get_num_threads()))) as pool:
        digests = list(pool.map(lambda vector: _digest_row(*vector), vectors))
    parts = {
        "layout": [[entry.name, list(entry.shape), str(entry.dtype)] for entry in layout.entries],
        "base": digests[0],
        "task_vectors": dict(zip(tasks, digests[1:], strict=True)),
        "extras": {name: [str(extras[name].dtype), digest(extras[name])] for name in sorted(extras)},
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _digest_row(rows: TaskVectors, row: int) -> str:
    """The SHA-256 of a row as float32."""
    hashed = hashlib.sha256()
    for columns in kernels.slabs(rows):
        hashed.update(rows[row, columns].float().numpy().data)
    return hashed.hexdigest()


def digest(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's bytes, as hexadecimal text."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()

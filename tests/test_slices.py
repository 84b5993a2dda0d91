"""Banks held in 16 bits and banks cut into slices: the same merges, to the bit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import make_unlabeled
from slices import ThreadGroup, cut
from test_goldens import load
from test_methods import PREDICTORS
from torch import Tensor

from merge_ray import kernels
from merge_ray.bank import ModelBank
from merge_ray.errors import CheckpointError
from merge_ray.kernels import DerivedTaskVectors, rows
from merge_ray.kernels.threads import BLOCK
from merge_ray.methods.base import (
    LearnedMethod,
    Merged,
    MergeInputs,
    WithOwnTensors,
    available_methods,
    find_method,
    make_method,
)
from merge_ray.methods.merge_cache import MergeCache

State = dict[str, Tensor]
BY_COLUMNS = sorted({name for name, method in available_methods().items() if method.by_columns} - PREDICTORS)
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in BY_COLUMNS),
    ("ties", {"trim": "tensor", "density": 0.3}),
    ("ties", {"disjoint": "max", "density": 0.0, "tied_majority": "positive"}),
    ("ties", {"disjoint": "sum", "density": 1.0}),
    ("tall_mask", {"multi_task_vector": "ties"}),
    ("consensus", {"multi_task_vector": "ties", "min_tasks": 0, "mask_lambda": 0.4}),
]


def make_models(dtype: torch.dtype = torch.float32) -> tuple[State, dict[str, State]]:
    """Tensors within a slice, across one cut, across two, and one that is empty; entries that are tied or cancel."""
    shapes = {"a": (37,), "b": (3, BLOCK), "c": (0, 4), "d": (BLOCK, 3), "e": (), "f": (500,)}
    base = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    finetuned = {}
    for index in range(3):
        noise = {name: (torch.randn(shape) * 8).round() / 32 for name, shape in shapes.items()}
        finetuned[f"task{index}"] = {name: (base[name].float() + noise[name]).to(dtype) for name in shapes}
    return {**base, "steps": torch.tensor(3)}, finetuned


def weights(merged: Merged, bank: ModelBank) -> Tensor:
    """Every task's weights ``[T, columns]``."""
    written = torch.empty(len(bank.tasks), len(bank.base))
    for task, out in zip(bank.tasks, written, strict=True):
        merged.write(task, out)
    return written


def prefer(vector: Tensor) -> float:
    """A validation score that depends on every weight."""
    return float(vector.double().sin().sum())


def merge_whole(name: str, parameters: dict[str, Any], bank: ModelBank, cache: MergeCache | None = None) -> Merged:
    def validation(merged: Merged, task: str) -> float:
        out = torch.empty(bank.layout.size)
        merged.write(task, out)
        return prefer(out)

    method = make_method(name, parameters)
    resources = {"validation": validation, "unlabeled": make_unlabeled(bank.layout, bank.tasks)}
    return method.merge(MergeInputs(bank, resources=resources, needs=method.needs, cache=cache))


def merge_slices(
    name: str, parameters: dict[str, Any], slices: list[ModelBank], caches: list[MergeCache] | None = None
) -> list[Merged]:
    group = ThreadGroup(len(slices))
    method, size = make_method(name, parameters), slices[0].layout.size

    def work(index: int, total: kernels.Total) -> Merged:
        bank = slices[index]

        def validation(merged: Merged, task: str) -> float:
            gathered = torch.zeros(size)
            merged.write(task, gathered[bank.columns])
            return prefer(torch.from_numpy(total(gathered.numpy())))

        cache = caches[index] if caches else None
        resources = {"validation": validation}
        return method.merge(MergeInputs(bank, resources=resources, needs=method.needs, cache=cache, total=total))

    return group.run(work)


def compare(name: str, parameters: dict[str, Any], bank: ModelBank, slices: list[ModelBank]) -> None:
    whole, parts = merge_whole(name, parameters, bank), merge_slices(name, parameters, slices)
    gathered = torch.cat([weights(part, of) for part, of in zip(parts, slices, strict=True)], dim=1)
    assert torch.equal(gathered.view(torch.int32), weights(whole, bank).view(torch.int32))
    for part in parts:
        assert part.resolved == whole.resolved
        assert part.storage_bytes() == whole.storage_bytes()
    for key, array in whole.artifacts().items():
        assert np.array_equal(np.concatenate([part.artifacts()[key] for part in parts], axis=-1), array)


@pytest.mark.parametrize(("name", "parameters"), VARIANTS)
def test_slices_are_merged_to_the_same_bits(name: str, parameters: dict[str, Any]) -> None:
    bank = ModelBank.build(*make_models())
    compare(name, parameters, bank, cut(bank, [0, BLOCK, 5 * BLOCK, bank.layout.size]))


@pytest.mark.parametrize("pair", [("task0", "task2"), ("task1", "task2")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["ties", "tall_mask"])
def test_a_pair_of_the_models_is_merged_in_slices(name: str, dtype: torch.dtype, pair: tuple[str, str]) -> None:
    bank = ModelBank.build(*make_models(dtype))
    slices = cut(bank, [0, 5 * BLOCK, bank.layout.size])
    compare(name, {}, bank.of(pair), [part.of(pair) for part in slices])


def test_saved_masks_are_cut_to_the_slices(tmp_path: Path) -> None:
    bank = ModelBank.build(*make_models())
    masks: dict[str, Any] = dict(merge_whole("tall_mask", {}, bank).artifacts())
    np.savez(tmp_path / "masks.npz", **masks)
    parameters = {"masks": str(tmp_path / "masks.npz")}
    compare("tall_mask", parameters, bank, cut(bank, [0, BLOCK, 5 * BLOCK, bank.layout.size]))


@pytest.mark.parametrize(("name", "parameters"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_banks_in_16_bits_are_merged_to_the_same_bits(
    name: str, parameters: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "SLAB", BLOCK)
    models = make_models(dtype)
    held, plain = ModelBank.build(*models), ModelBank.build(*models, dtype=torch.float32)
    one, other = merge_whole(name, parameters, held), merge_whole(name, parameters, plain)
    assert torch.equal(weights(one, held).view(torch.int32), weights(other, plain).view(torch.int32))
    for key, array in other.artifacts().items():
        assert np.array_equal(one.artifacts()[key], array)
    if dtype == torch.bfloat16:
        compare(name, parameters, plain, cut(held, [0, 2 * BLOCK, 3 * BLOCK, held.layout.size]))


@pytest.mark.parametrize("name", ["adamerging", "dawin"])
def test_other_methods_read_banks_in_16_bits_too(name: str) -> None:
    models = make_models(torch.bfloat16)
    steps = {"steps": 3} if issubclass(find_method(name), LearnedMethod) else {}
    results = []
    for dtype in (None, torch.float32):
        bank = ModelBank.build(*models, dtype=dtype)
        merged = merge_whole(name, steps, bank)
        if merged.resolved.by_sample:
            model = make_unlabeled(bank.layout, bank.tasks).models["task0"]
            results.append(merged.outcomes(model, slice(0, 16)))  # type: ignore[attr-defined]
        else:
            results.append(weights(merged, bank))
    torch.testing.assert_close(*results)


def test_a_bank_holds_the_dtype_that_all_tensors_share() -> None:
    base, finetuned = make_models(torch.bfloat16)
    bank = ModelBank.build(base, finetuned)
    assert bank.base.dtype == torch.bfloat16
    assert isinstance(bank.task_vectors, DerivedTaskVectors) and bank.task_vectors.models.dtype == torch.bfloat16
    plain = ModelBank.build(base, finetuned, dtype=torch.float32)
    assert isinstance(plain.task_vectors, Tensor) and plain.task_vectors.dtype == torch.float32
    assert plain.fingerprint == bank.fingerprint
    for task in range(3):
        assert torch.equal(bank.task_vectors[task], plain.task_vectors[task])
    again = ModelBank.from_arrays(bank.arrays(), bank.layout, bank.tasks, bank.extras, bank.fingerprint)
    assert again.base.data_ptr() == bank.base.data_ptr()
    assert torch.equal(again.of(["task0", "task2"]).task_vectors[1], plain.task_vectors[2])
    for state in (base, *finetuned.values()):
        state["f"] = state["f"].float()
    assert ModelBank.build(base, finetuned).base.dtype == torch.float32


def test_models_are_rounded_once_where_that_is_asked_for() -> None:
    base, finetuned = make_models()
    bank = ModelBank.build(base, finetuned, dtype=torch.bfloat16)
    rounded = bank.layout.flatten(finetuned["task1"]).bfloat16().float() - bank.layout.flatten(base).bfloat16().float()
    assert torch.equal(bank.task_vectors[1], rounded)
    assert bank.model_bytes == 4 * bank.layout.size
    finetuned["task1"]["f"][3] = 1e5
    with pytest.raises(CheckpointError, match=r"task1: .*\n  f: 1 values are NaN or infinite \(as float16\)"):
        ModelBank.build(base, finetuned, dtype=torch.float16)


def test_a_host_that_lost_its_cache_computes_with_the_others() -> None:
    bank = ModelBank.build(*make_models())
    slices = cut(bank, [0, 3 * BLOCK, bank.layout.size])
    caches = [MergeCache(1 << 20), MergeCache(1 << 20)]
    merge_slices("ties", {}, slices, caches)
    caches[1] = MergeCache(1 << 20)
    parts = merge_slices("ties", {"scaling_coefficient": 0.5}, slices, caches)
    gathered = torch.cat([weights(part, of) for part, of in zip(parts, slices, strict=True)], dim=1)
    assert torch.equal(gathered, weights(merge_whole("ties", {"scaling_coefficient": 0.5}, bank), bank))


def test_tensors_that_tasks_keep_are_kept_in_slices() -> None:
    bank = ModelBank.build(*make_models())
    slices = cut(bank, [0, 2 * BLOCK, bank.layout.size])
    own = frozenset({"b"})
    whole = WithOwnTensors(merge_whole("weight_average", {}, bank), bank, own)
    parts = merge_slices("weight_average", {}, slices)
    kept = [weights(WithOwnTensors(part, of, own), of) for part, of in zip(parts, slices, strict=True)]
    assert torch.equal(torch.cat(kept, dim=1), weights(whole, bank))


@pytest.mark.parametrize("case", ["grid_T5", "float_T4"])
def test_golden_models_in_slices(case: str) -> None:
    golden = load(f"ties/{case}")
    bank = ModelBank.build(*golden.models())
    middle = bank.layout.size // 2 // 8 * 8
    for trim, disjoint in itertools.product(("model", "tensor"), ("mean", "sum", "max")):
        compare("ties", {"trim": trim, "disjoint": disjoint}, bank, cut(bank, [0, middle, bank.layout.size]))

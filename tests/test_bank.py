"""The flat layout and the bank: what is merged, what is refused, and what identifies a set of models."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from merge_ray.bank import Layout, ModelBank
from merge_ray.errors import CheckpointError

State = dict[str, Tensor]


def make_base() -> State:
    return {
        "w.10": torch.randn(3, 4),
        "w.2": torch.randn(5).half(),
        "scale": torch.tensor(2.0),
        "empty": torch.empty(0, 3),
        "double": torch.randn(2, dtype=torch.float64),
        "steps": torch.tensor(7),
        "base_only": torch.randn(2),
    }


def tune(base: State, by: float = 0.5) -> State:
    return {name: tensor + by if tensor.is_floating_point() else tensor + 1 for name, tensor in base.items()}


@pytest.fixture
def base() -> State:
    return make_base()


@pytest.fixture
def finetuned(base: State) -> dict[str, State]:
    models = {"b": tune(base), "a": tune(base, -0.25)}
    for state in models.values():
        del state["base_only"]
    return models


def test_layout_is_sorted_by_text_and_skips_integers(base: State) -> None:
    layout = Layout.of(base)
    assert layout.names == ("base_only", "double", "empty", "scale", "w.10", "w.2")
    assert layout.bounds.tolist() == [0, 2, 4, 4, 5, 17, 22]
    assert layout.size == 22
    assert layout.nbytes == 8 + 16 + 0 + 4 + 48 + 10


def test_flatten_and_unflatten_keep_values_shapes_and_dtypes(base: State) -> None:
    layout = Layout.of(base)
    flat = layout.flatten(base)
    assert flat.dtype == torch.float32
    for name, tensor in layout.unflatten(flat).items():
        assert (tensor.dtype, tensor.shape) == (base[name].dtype, base[name].shape)
        torch.testing.assert_close(tensor, base[name])
    layout.views(flat)["w.10"].zero_()
    assert bool((flat[5:17] == 0).all())


def test_bank_holds_differences_in_the_order_of_the_tasks(base: State, finetuned: dict[str, State]) -> None:
    bank = ModelBank.build(base, finetuned)
    assert bank.tasks == ("a", "b")
    assert bank.layout.names == ("double", "empty", "scale", "w.10", "w.2")
    for row, task in zip(bank.task_vectors, bank.tasks, strict=True):
        want = torch.cat([(finetuned[task][name].float() - base[name].float()).flatten() for name in bank.layout.names])
        assert torch.equal(row, want)
    assert sorted(bank.extras) == ["base_only", "steps"]
    assert bank.state_dict(bank.base)["steps"] == 7
    assert bank.finetuned_bytes == 2 * bank.model_bytes == 2 * (16 + 4 + 48 + 10)


def test_callables_are_loaded_one_at_a_time_with_progress(base: State, finetuned: dict[str, State]) -> None:
    events: list[object] = []

    def loader(task: str) -> Callable[[], State]:
        def load() -> State:
            events.append(task)
            return finetuned[task]

        return load

    loaded = ModelBank.build(base, {task: loader(task) for task in finetuned}, lambda *done: events.append(done))
    assert events == ["a", (1, 2), "b", (2, 2)]
    assert loaded.fingerprint == ModelBank.build(base, finetuned).fingerprint


@pytest.mark.parametrize("change", ["weight", "task", "extra", "base"])
def test_fingerprint_changes_with_whatever_matters(base: State, finetuned: dict[str, State], change: str) -> None:
    before = ModelBank.build(base, finetuned).fingerprint
    if change == "weight":
        finetuned["a"]["w.10"][0, 0] += 1
    elif change == "task":
        finetuned["c"] = finetuned.pop("a")
    elif change == "extra":
        base["steps"] += 1
    else:
        base["scale"] += 1
    assert ModelBank.build(base, finetuned).fingerprint != before


def test_arrays_come_back_without_a_copy_or_a_warning(base: State, finetuned: dict[str, State]) -> None:
    bank = ModelBank.build(base, finetuned)
    arrays = bank.arrays()
    for array in arrays.values():
        array.flags.writeable = False
    layout = pickle.loads(pickle.dumps(bank.layout))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = ModelBank.from_arrays(arrays, layout, bank.tasks, bank.extras, bank.fingerprint)
    assert again.base.data_ptr() == bank.base.data_ptr()
    assert again.task_vectors.data_ptr() == bank.task_vectors.data_ptr()
    assert np.array_equal(again.layout.bounds, bank.layout.bounds)


def damage(state: State, kind: str) -> None:
    if kind == "name":
        state["w.11"] = state.pop("w.10")
    elif kind == "missing":
        del state["w.10"]
    elif kind == "shape":
        state["w.10"] = state["w.10"].T
    elif kind == "dtype":
        state["w.10"] = state["w.10"].double()
    elif kind == "nan":
        state["w.10"][1, 1] = float("nan")
    elif kind == "inf":
        state["w.2"][:2] = float("inf")
    elif kind == "overflow":
        state["double"][0] = 1e300


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("name", r"b: this model cannot be merged:\n  w\.11: not in the base model"),
        ("missing", r"w\.10: missing here, present in 'a'"),
        ("shape", r"w\.10: shape \[4, 3\], in the base model \[3, 4\]"),
        ("dtype", r"w\.10: dtype float64, in the base model float32"),
        ("nan", r"w\.10: 1 values are NaN or infinite"),
        ("inf", r"w\.2: 2 values are NaN or infinite"),
        ("overflow", r"double: 1 values are NaN or infinite \(as float32\)"),
    ],
)
def test_models_that_do_not_fit_are_refused(base: State, finetuned: dict[str, State], kind: str, text: str) -> None:
    damage(finetuned["b"], kind)
    with pytest.raises(CheckpointError, match=text):
        ModelBank.build(base, finetuned)


def test_more_tensors_than_the_first_model_has_are_refused(base: State, finetuned: dict[str, State]) -> None:
    finetuned["b"]["base_only"] = base["base_only"]
    with pytest.raises(CheckpointError, match="base_only: present here, missing in 'a'"):
        ModelBank.build(base, finetuned)


def test_a_bad_base_and_an_empty_pool_are_refused(base: State, finetuned: dict[str, State]) -> None:
    with pytest.raises(CheckpointError, match="there are no fine-tuned models"):
        ModelBank.build(base, {})
    with pytest.raises(CheckpointError, match=r"b: .*\n  it has no floating-point tensors"):
        ModelBank.build(base, {"b": {"steps": base["steps"]}})
    base["scale"] = torch.tensor(float("nan"))
    with pytest.raises(CheckpointError, match=r"the base model: .*\n  scale: 1 values are NaN"):
        ModelBank.build(base, finetuned)


def test_long_lists_of_mistakes_are_cut() -> None:
    base = {f"w.{index:02d}": torch.ones(2) for index in range(30)}
    with pytest.raises(CheckpointError, match=r"w\.11: shape.*\n  \.\.\. and 18 more tensors$"):
        ModelBank.build(base, {"a": {name: torch.ones(3) for name in base}})

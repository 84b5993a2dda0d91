"""What holds for every registered method, and what is particular to some."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from samples import make_unlabeled
from torch import Tensor

import merge_ray
from merge_ray import kernels
from merge_ray.bank import Layout, ModelBank
from merge_ray.errors import CheckpointError, ParameterError
from merge_ray.merging import MergeResult
from merge_ray.methods.base import (
    LearnedMethod,
    Merged,
    MergeInputs,
    available_methods,
    check_parameter,
    find_method,
    make_method,
    param,
    parameter_fields,
)
from merge_ray.methods.merge_cache import MergeCache
from merge_ray.methods.ties import ties_task_vector
from merge_ray.space import Float

# These answer sample by sample: their contracts are in tests of their own.
PREDICTORS = {"average_label", "dawin", "dawin_robust", "dict_fusion"}
# These match the channels of a known architecture: see test_alignment_methods.
MATCHED = {name for name, method in available_methods().items() if "permutation_groups" in method.needs}
METHODS = sorted(set(available_methods()) - PREDICTORS - MATCHED)
NEEDS_LAMBDA = ("tall_mask", "consensus")
State = dict[str, Tensor]


def make_models(tasks: int = 3) -> tuple[State, dict[str, State]]:
    base = {
        "conv.weight": torch.randn(4, 3, 5, 5),
        "norm.weight": torch.randn(37).half(),
        "scale": torch.tensor(1.5),
        "norm.steps": torch.tensor(3),
    }

    def tune(state: State) -> State:
        return {
            name: tensor + (0.1 * torch.randn(tensor.shape)).half() if tensor.is_floating_point() else tensor + 1
            for name, tensor in state.items()
        }

    return base, {f"task{index}": tune(base) for index in range(tasks)}


def prefer_last(result: Any, task: str) -> float:
    """A validation score that the last of the default mask lambdas wins."""
    return float(getattr(result.method if hasattr(result, "method") else result.resolved, "mask_lambda", 0))


def few_steps(name: str) -> dict[str, Any]:
    """What keeps a learned method short."""
    return {"steps": 3} if issubclass(find_method(name), LearnedMethod) else {}


def run(name: str, bank: ModelBank, **parameters: Any) -> Merged:
    method = make_method(name, {**few_steps(name), **parameters})
    resources = {"validation": prefer_last, "unlabeled": make_unlabeled(bank.layout, bank.tasks)}
    return method.merge(MergeInputs(bank, resources=resources, needs=method.needs))


def merge_all(name: str, base: State, finetuned: dict[str, State]) -> MergeResult:
    """``merge_ray.merge`` with all that a method may need."""
    unlabeled = make_unlabeled(Layout.of(base), finetuned)
    return merge_ray.merge(
        name, base=base, finetuned=finetuned, validation=prefer_last, unlabeled=unlabeled, **few_steps(name)
    )


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(path, **arrays)  # type: ignore[arg-type]


def weights(merged: Merged, bank: ModelBank) -> list[Tensor]:
    results = []
    for task in bank.tasks:
        out = kernels.vector(bank.task_vectors)
        merged.write(task, out)
        results.append(out)
    return results


@pytest.fixture
def bank() -> ModelBank:
    return ModelBank.build(*make_models())


@pytest.mark.parametrize("name", METHODS)
def test_names_shapes_dtypes_and_buffers_are_kept(name: str) -> None:
    base, finetuned = make_models()
    result = merge_all(name, base, finetuned)
    state = result.state_dict("task1")
    assert {key: (value.shape, value.dtype) for key, value in state.items()} == {
        key: (value.shape, value.dtype) for key, value in base.items()
    }
    assert state["norm.steps"] == 3


@pytest.mark.parametrize("name", METHODS)
def test_inputs_are_untouched(name: str, bank: ModelBank) -> None:
    before = bank.base.clone(), bank.task_vectors.clone()
    merged = run(name, bank)
    weights(merged, bank)
    merged.artifacts()
    assert torch.equal(bank.base, before[0])
    assert torch.equal(bank.task_vectors, before[1])


@pytest.mark.parametrize("name", METHODS)
def test_same_seed_same_bits(name: str, bank: ModelBank) -> None:
    for one, two in zip(weights(run(name, bank), bank), weights(run(name, bank), bank), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", METHODS)
def test_zero_task_vectors_give_the_base(name: str) -> None:
    base, _ = make_models()
    bank = ModelBank.build(base, {"a": base, "b": dict(base)})
    for got in weights(run(name, bank), bank):
        assert torch.equal(got, bank.base)


@pytest.mark.parametrize("name", METHODS)
def test_task_order_does_not_matter(name: str) -> None:
    base, finetuned = make_models()
    backwards = dict(reversed(finetuned.items()))
    one, two = (merge_all(name, base, models) for models in (finetuned, backwards))
    for task in finetuned:
        assert torch.equal(one.flat(task), two.flat(task))


@pytest.mark.parametrize("name", METHODS)
def test_one_task_pools_work(name: str) -> None:
    bank = ModelBank.build(*make_models(1))
    (got,) = weights(run(name, bank), bank)
    kept_whole = {"finetuned", "weight_average", "tall_mask"}
    if name in kept_whole:
        torch.testing.assert_close(got, bank.base + bank.task_vectors[0])
    assert bool(got.isfinite().all())


@pytest.mark.parametrize("name", METHODS)
def test_resolved_methods_give_the_same_without_choosing_again(name: str, bank: ModelBank) -> None:
    merged = run(name, bank)
    again = make_method(name, json.loads(json.dumps(merged.resolved.parameters())))
    repeated = again.merge(MergeInputs(bank, needs=frozenset()))
    for one, two in zip(weights(merged, bank), weights(repeated, bank), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", METHODS)
def test_storage_is_between_one_model_and_all_with_their_base(name: str, bank: ModelBank) -> None:
    stored = run(name, bank).storage_bytes()
    assert bank.model_bytes <= stored <= bank.finetuned_bytes + bank.model_bytes


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_valid_and_searched_values_too(name: str) -> None:
    method = find_method(name)
    assert method.paper and method.__doc__
    for key, field in parameter_fields(method).items():
        assert check_parameter(method, key, field.default) is None
        assert field.metadata["help"]
        for value in field.metadata["search"].grid() if field.metadata["search"] else []:
            assert check_parameter(method, key, value) is None


@pytest.mark.parametrize("name", METHODS)
def test_a_second_candidate_shares_what_is_expensive_and_gets_the_same(name: str, bank: ModelBank) -> None:
    cache = MergeCache(1 << 20)
    method = make_method(name, {"mask_lambda": 0.4} if name in NEEDS_LAMBDA else few_steps(name))
    resources = {"unlabeled": make_unlabeled(bank.layout, bank.tasks)}
    inputs = [MergeInputs(bank, cache=cache, resources=resources, needs=method.needs) for _ in range(2)]
    first, second = (weights(method.merge(item), bank) for item in inputs)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("name", "parameters", "text"),
    [
        ("tise", {}, r"unknown method 'tise'; did you mean 'ties'\? Valid: .*'consensus', .*'finetuned'"),
        ("ties", {"densty": 0.2}, r"ties has no parameter 'densty'; did you mean 'density'\?"),
        ("ties", {"density": 1.5}, r"ties: density=1\.5 is not in \[0, 1\]"),
        ("ties", {"density": True}, r"density=True is not in"),
        ("ties", {"density": float("nan")}, r"density=nan is not in"),
        ("ties", {"disjoint": "median", "trim": "row"}, r"'median' is not in \{mean, sum, max\}\n.*'row' is not in"),
        ("task_arithmetic", {"scaling_coefficient": 11}, r"11 is not in \[-10, 10\], nor a mapping of tasks"),
        ("task_arithmetic", {"scaling_coefficient": {"a": "x"}}, r"nor a mapping of tasks to that"),
        ("consensus", {"min_tasks": 1.5}, r"min_tasks=1\.5 is not in 0\.\.1000"),
        ("tall_mask", {"mask_lambda": "best"}, r"'best' is not in \[0, 10\] or \[0, 10\] per task or \{validation\}"),
        ("tall_mask", {"mask_lambdas": []}, r"mask_lambdas=\[\] is not in several of \[0, 10\]"),
        ("tall_mask", {"masks": "masks.pt"}, r"'masks\.pt' is not in the path of a \.npz file, or none"),
    ],
)
def test_wrong_parameters_are_refused(name: str, parameters: dict[str, Any], text: str) -> None:
    with pytest.raises(ParameterError, match=text):
        make_method(name, parameters)


def test_values_per_task_must_name_every_task(bank: ModelBank) -> None:
    with pytest.raises(ParameterError, match=r"given for \['task0'\]; the tasks are \['task0', 'task1', 'task2'\]"):
        run("task_arithmetic", bank, scaling_coefficient={"task0": 0.3})
    with pytest.raises(ParameterError, match="given for"):
        run("tall_mask", bank, mask_lambda={"task0": 0.3})


def test_a_coefficient_per_task(bank: ModelBank) -> None:
    values = {"task2": 0.5, "task0": -0.25, "task1": 0.0}
    (got, *_) = weights(run("task_arithmetic", bank, scaling_coefficient=values), bank)
    torch.testing.assert_close(got, bank.base - 0.25 * bank.task_vectors[0] + 0.5 * bank.task_vectors[2])
    canonical = make_method("task_arithmetic", {"scaling_coefficient": values}).parameters()
    assert list(canonical["scaling_coefficient"]) == ["task0", "task1", "task2"]


def test_ties_trims_every_tensor_by_itself(bank: ModelBank) -> None:
    rows, inputs = bank.task_vectors, MergeInputs(bank)
    parts = rows.split([entry.size for entry in bank.layout.entries], dim=1)
    trimmed = torch.cat([kernels.trim(part.contiguous(), 0.2) for part in parts], dim=1)
    want = kernels.disjoint_merge(trimmed, torch.zeros(3, 1), "sum", kernels.vector(rows))
    assert torch.equal(ties_task_vector(inputs, 0.2, "sum", trim="tensor"), want)
    assert not torch.equal(ties_task_vector(inputs, 0.2, "sum"), want)


@pytest.mark.parametrize("name", NEEDS_LAMBDA)
def test_choosing_on_validation_data_without_any_says_what_to_do(name: str) -> None:
    base, finetuned = make_models()
    with pytest.raises(ParameterError, match=r"needs 'validation' data.*give mask_lambda a number.*pass validation="):
        merge_ray.merge(name, base=base, finetuned=finetuned)


def test_undeclared_needs_raise(bank: ModelBank) -> None:
    inputs = MergeInputs(bank, resources={"validation": prefer_last}, needs=find_method("ties").needs)
    with pytest.raises(ParameterError, match="uses 'validation' without declaring it"):
        _ = inputs.validation


def test_the_choice_of_lambdas_is_shared_between_candidates(bank: ModelBank) -> None:
    calls: list[str] = []

    def score(merged: Merged, task: str) -> float:
        calls.append(task)
        return 1.0

    cache = MergeCache(0)
    for name in ("tall_mask", "consensus", "consensus"):
        method = make_method(name, {"min_tasks": 1} if name == "consensus" else {})
        inputs = MergeInputs(bank, cache=cache, resources={"validation": score}, needs=method.needs)
        resolved = method.merge(inputs).resolved
        assert resolved.parameters()["mask_lambda"] == dict.fromkeys(bank.tasks, 0.2)
    assert len(calls) == 5 * 3


def test_saved_masks_are_read_again(bank: ModelBank, tmp_path: Path) -> None:
    merged = run("tall_mask", bank, mask_lambda=0.4, multi_task_vector="ties")
    path = tmp_path / "masks.npz"
    save_arrays(path, merged.artifacts())
    again = run("tall_mask", bank, multi_task_vector="ties", masks=str(path))
    for one, two in zip(weights(merged, bank), weights(again, bank), strict=True):
        assert torch.equal(one, two)
    assert again.storage_bytes() == merged.storage_bytes() == 2 * bank.model_bytes + 3 * -(-bank.layout.size // 8)
    assert np.array_equal(again.artifacts()["mask/task1"], merged.artifacts()["mask/task1"])


@pytest.mark.parametrize(
    ("write", "text"),
    [
        (lambda path: None, "no such file or directory"),
        (lambda path: path.write_bytes(b"PK not a zip"), "cannot be read as saved masks"),
        (lambda path: save_arrays(path, {"mask/task0": np.zeros(43, np.uint8)}), r"none for \['task1', 'task2'\]"),
        (lambda path: save_arrays(path, {f"mask/task{task}": np.zeros(9) for task in range(3)}), r"is float64 \[9\]"),
    ],
)
def test_masks_that_do_not_fit_are_refused(
    bank: ModelBank, tmp_path: Path, write: Callable[[Path], object], text: str
) -> None:
    write(tmp_path / "masks.npz")
    with pytest.raises(CheckpointError, match=text):
        run("tall_mask", bank, masks=str(tmp_path / "masks.npz"))


def test_weights_per_task_are_asked_for_by_task() -> None:
    base, finetuned = make_models()
    result = merge_ray.merge("finetuned", base=base, finetuned=finetuned)
    with pytest.raises(ParameterError, match=r"finetuned gives every task weights of its own; name one of 'task0'"):
        result.state_dict()
    with pytest.raises(ParameterError, match=r"unknown task 'task9'; did you mean 'task.'\? Valid: 'task0'"):
        result.state_dict("task9")
    torch.testing.assert_close(result.state_dict("task1")["conv.weight"], finetuned["task1"]["conv.weight"])


def test_merging_from_files_and_saving(tmp_path: Path) -> None:
    base, finetuned = make_models()
    for name, state in {"base": base, **finetuned}.items():
        torch.save(state, tmp_path / f"{name}.pt")
    locations = {task: str(tmp_path / f"{task}.pt") for task in finetuned}
    result = merge_ray.merge("ties", base=tmp_path / "base.pt", finetuned=locations, density=0.3)
    assert torch.equal(result.flat(), merge_ray.merge("ties", base=base, finetuned=finetuned, density=0.3).flat())
    result.save(tmp_path / "merged.safetensors")
    with safe_open(tmp_path / "merged.safetensors", "pt") as file:
        metadata = file.metadata()
        assert torch.equal(file.get_tensor("norm.weight"), result.state_dict()["norm.weight"])
    assert json.loads(metadata["parameters"])["density"] == 0.3
    sources = json.loads(metadata["sources"])
    assert sorted(sources) == ["base", "finetuned/task0", "finetuned/task1", "finetuned/task2"]
    assert len(sources["base"]["sha256"]) == 64
    with pytest.raises(ParameterError, match=r"unknown format 'safetensor'; did you mean 'safetensors'\?"):
        result.save(tmp_path / "merged", format="safetensor")


def test_a_method_with_its_parameters_takes_no_others() -> None:
    base, finetuned = make_models()
    with pytest.raises(ParameterError, match=r"ties has its parameters already.*\['density'\]"):
        merge_ray.merge(make_method("ties", {}), base=base, finetuned=finetuned, density=0.2)


def test_the_cache_keeps_the_latest_large_results_and_all_small_ones() -> None:
    large = MergeCache.SMALL // 4
    cache = MergeCache(2 * MergeCache.SMALL)
    made: list[str] = []

    def make(name: str) -> Tensor:
        made.append(name)
        return torch.zeros(1 if name == "small" else large)

    for name in ("small", "a", "b", "a", "c", "small", "b"):
        cache.get(name, partial(make, name))
    assert made == ["small", "a", "b", "c", "b"]


def test_param_without_a_search_space_is_fixed() -> None:
    @dataclasses.dataclass(frozen=True)
    class Example:
        """A parameter."""

        value: float = param(0.5, valid=Float(0, 1), help="anything")

    assert dataclasses.fields(Example)[0].metadata["search"] is None


PEAK = """
import gc, json, sys
from pathlib import Path
import numpy as np, torch
from merge_ray.bank import Layout, ModelBank
from merge_ray.methods.base import LearnedMethod, MergeInputs, available_methods, make_method
from merge_ray.methods.merge_cache import MergeCache
from samples import make_unlabeled

def resident(field):
    return int(Path("/proc/self/status").read_text().split(field)[1].split()[0]) * 1024

def make_bank(size):
    # Many layers, as models have: what a backward pass holds at a time is one layer's gradient.
    layout = Layout.of({name: torch.empty(size // 16, device="meta") for name in "abcdefghijklmnop"})
    rows = np.random.default_rng(0).standard_normal((4, size), dtype=np.float32)
    return ModelBank.from_arrays({"base": rows[0] * 0, "task_vectors": rows}, layout, "abcd", {}, "")

def run(bank, name, out):
    parameters = {"mask_lambda": 0.4} if name in ("tall_mask", "consensus") else {}
    if issubclass(methods[name], LearnedMethod):
        parameters["steps"] = 2
    method = make_method(name, parameters)
    resources = {"unlabeled": make_unlabeled(bank.layout, bank.tasks, flat=out)}
    cache = MergeCache(bank.base.nbytes)
    merged = method.merge(MergeInputs(bank, out=out, cache=cache, resources=resources, needs=method.needs))
    merged.write("a", out)

torch.set_num_threads(1)
# The small bank goes the large one's way: what is compiled on the way is not the merge's memory.
small, large, peaks, methods = make_bank(1 << 17), make_bank(12_000_000), {}, available_methods()
for name in json.loads(sys.argv[1]):
    run(small, name, torch.empty(1 << 17))
    gc.collect()
    before, files = resident("VmRSS:"), resident("RssFile:")
    Path("/proc/self/clear_refs").write_text("5")
    run(large, name, torch.empty(large.layout.size))
    # Pages of libraries that the system had dropped and has read again are not the merge's.
    peaks[name] = (resident("VmHWM:") - before - max(0, resident("RssFile:") - files)) / large.base.nbytes
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_memory_beyond_the_bank_is_at_most_two_models_and_four_for_methods_that_ask_them() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", PEAK, json.dumps(METHODS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    peaks = json.loads(done.stdout)
    assert sorted(peaks) == METHODS
    limits = {name: 4 if "unlabeled" in find_method(name).needs else 2 for name in METHODS}
    # A tenth is for what does not grow with the models.
    assert not {name: peak for name, peak in peaks.items() if peak > limits[name] + 0.1}
    assert peaks["ties"] > 1.9, "the measure does not see the merge"

"""The flat methods against numbers recorded from the authors' own code (tests/golden; its cases' notes rule)."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from merge_ray import kernels
from merge_ray.bank import ModelBank
from merge_ray.merging import MergeResult, merge
from merge_ray.methods.base import MergeInputs
from merge_ray.methods.masking import make_multi_task_vector
from merge_ray.methods.task_arithmetic import sum_task_vectors
from merge_ray.methods.ties import ties_task_vector

GOLDEN = Path(__file__).parent / "golden"


@dataclass
class Case:
    """One recorded case: what went in, what came out, and how closely it must be met."""

    about: dict[str, Any]
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]

    @property
    def parameters(self) -> dict[str, Any]:
        return self.about["parameters"]

    def models(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.inputs.items():
            group, _, name = key.partition("/")
            if name:
                groups.setdefault(group, {})[name] = tensor
        return groups.pop("base"), groups

    def merge(self, method: str, **parameters: Any) -> MergeResult:
        base, finetuned = self.models()
        return merge(method, base=base, finetuned=finetuned, **parameters)

    def inputs_of_bank(self) -> MergeInputs:
        return MergeInputs(ModelBank.build(*self.models()))

    def keys(self, prefix: str) -> list[str]:
        found = [key for key in self.expected if key.startswith(prefix)]
        assert found, f"the case has nothing under {prefix}"
        return found

    def check(self, key: str, got: Tensor | np.ndarray) -> None:
        want, got = self.expected[key], torch.as_tensor(got)
        assert got.shape == want.shape, key
        if not want.is_floating_point() or any(
            fnmatch.fnmatch(key, pattern) for pattern in self.about.get("exact_keys", [])
        ):
            assert bool((got.double() == want.double()).all()), f"{key} differs where it must be exact"
        else:
            torch.testing.assert_close(got.to(want.dtype), want, rtol=self.about["rtol"], atol=self.about["atol"])

    def check_state(self, prefix: str, state: Mapping[str, Tensor]) -> None:
        keys = self.keys(f"{prefix}/")
        assert sorted(state) == sorted(key.removeprefix(f"{prefix}/") for key in keys)
        for key in keys:
            tensor = state[key.removeprefix(f"{prefix}/")]
            assert tensor.dtype == self.expected[key].dtype
            self.check(key, tensor)


def load(name: str) -> Case:
    folder = GOLDEN / name
    about = json.loads((folder / "case.json").read_text())
    return Case(about, load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors"))


@pytest.fixture(params=["grid_T4", "float_T8", "int_buffers"])
def arithmetic(request: pytest.FixtureRequest) -> Case:
    return load(f"task_arithmetic/{request.param}")


def test_task_arithmetic(arithmetic: Case) -> None:
    for coefficient in arithmetic.parameters["scaling_coefficients"]:
        state = arithmetic.merge("task_arithmetic", scaling_coefficient=coefficient).state_dict()
        arithmetic.check_state(f"task_arithmetic_{coefficient}", state)


@pytest.mark.parametrize("name", ["grid_T4", "float_T8"])
def test_weight_average_sum_and_negation(name: str) -> None:
    case = load(f"task_arithmetic/{name}")
    case.check_state("weight_average", case.merge("weight_average").state_dict())
    inputs = case.inputs_of_bank()
    case.check("sum_flat", sum_task_vectors(inputs))
    base, finetuned = case.models()
    negation = merge("task_arithmetic", base=base, finetuned={"task0": finetuned["task0"]}, scaling_coefficient=-1.0)
    case.check("negation_task0_flat", negation.flat())


def test_sum_skips_integer_buffers() -> None:
    case = load("task_arithmetic/int_buffers")
    inputs = case.inputs_of_bank()
    case.check_state("sum", inputs.bank.layout.unflatten(sum_task_vectors(inputs)))


@pytest.mark.parametrize("name", ["random", "ties_zeros", "mostly_zero"])
def test_trim(name: str) -> None:
    case = load(f"topk_trim/{name}")
    rows = case.inputs["rows"]
    for key in case.expected:
        label, _, kind = key.partition("/")
        number = label.split("_")[0].removeprefix("K")
        density = float(number) if label.endswith("fraction") else float(number) / 100
        thresholds = kernels.trim_thresholds(rows, density)
        mask = rows.abs() >= thresholds
        got = {
            "mask": lambda mask=mask: mask.to(torch.uint8),
            "kept_count": lambda mask=mask: mask.sum(1),
            "kept_fraction": lambda mask=mask: mask.float().mean(1),
            "values": lambda density=density: kernels.trim(rows, density),
        }[kind]
        case.check(key, got())


@pytest.mark.parametrize("name", ["random", "ties_zeros", "mostly_zero"])
def test_trim_keeps_all_at_full_density(name: str) -> None:
    rows = load(f"topk_trim/{name}").inputs["rows"]
    assert torch.equal(kernels.trim(rows, 1.0), rows)


@pytest.mark.parametrize("name", ["grid_T5", "float_T4"])
def test_ties(name: str) -> None:
    case = load(f"ties/{name}")
    inputs = case.inputs_of_bank()
    merged = [key for key in case.expected if "/dis-" in key]
    assert merged
    for key in merged:
        percent, disjoint = key.removeprefix("K").split("/dis-")
        case.check(key, ties_task_vector(inputs, int(percent) / 100, disjoint))
    rows = inputs.bank.task_vectors
    case.check("elected_sign_K20", kernels.elect_sign(rows, kernels.trim_thresholds(rows, 0.2)))
    case.check_state("merged_K20_dis-mean_1.0", case.merge("ties", density=0.2).state_dict())
    merge_sum = case.merge("ties", density=0.2, disjoint="sum", scaling_coefficient=0.3)
    case.check("merged_flat_K20_dis-sum_0.3", merge_sum.flat())


def test_ties_selects_entries_per_task() -> None:
    case = load("ties/split_T3")
    inputs = case.inputs_of_bank()
    rows = inputs.bank.task_vectors
    thresholds = kernels.trim_thresholds(rows, 0.2)
    selected = kernels.select_elected(rows, thresholds, kernels.elect_sign(rows, thresholds))
    case.check("selected_flat", selected)
    case.check_state("selected_task0", inputs.bank.layout.unflatten(selected[0]))
    case.check("merged_flat", ties_task_vector(inputs, 0.2, "sum"))


@pytest.mark.parametrize(("prefix", "positive"), [("", False), ("dict_fusion_tasks_variant/", True)])
def test_ties_with_a_tied_majority(prefix: str, positive: bool) -> None:
    case = load("ties/zero_majority")
    rows = case.inputs["rows"]
    thresholds = kernels.trim_thresholds(rows, 0.9)
    case.check(f"{prefix}elected_sign", kernels.elect_sign(rows, thresholds, positive_tie=positive))
    base = {"w": torch.zeros(rows.shape[1])}
    inputs = MergeInputs(ModelBank.build(base, {"a": {"w": rows[0]}, "b": {"w": rows[1]}}))
    for disjoint in ("mean", "sum", "max"):
        word = "positive" if positive else "negative"
        case.check(f"{prefix}K90/dis-{disjoint}", ties_task_vector(inputs, 0.9, disjoint, tied_majority=word))


@pytest.mark.parametrize("vector", ["ta", "ties"])
@pytest.mark.parametrize("name", ["grid_T4", "float_T3"])
def test_tall_mask(name: str, vector: str) -> None:
    case = load(f"tall_mask/{name}")
    lambdas, accuracies = case.parameters["lambdas"], case.inputs[f"validation_accuracy_{vector}"]
    settings = {"multi_task_vector": "task_arithmetic" if vector == "ta" else "ties"}
    for mask_lambda in lambdas:
        masks = case.merge("tall_mask", mask_lambda=mask_lambda, **settings).masks()
        case.check(f"{vector}/mask/lambda{mask_lambda}", np.stack(list(masks.values())).astype(np.uint8))

    def validation(result: MergeResult, task: str) -> float:
        row = lambdas.index(result.method.parameters()["mask_lambda"])
        return float(accuracies[row, result.bank.tasks.index(task)])

    chosen = case.merge("tall_mask", mask_lambdas=tuple(lambdas), validation=validation, **settings)
    best = chosen.method.parameters()["mask_lambda"]
    case.check(f"{vector}/best_lambda", torch.tensor([best[task] for task in chosen.bank.tasks], dtype=torch.float64))
    tau = make_multi_task_vector(case.inputs_of_bank(), settings["multi_task_vector"], 0.2)
    case.check(f"{vector}/tau_mtl_flat", tau)
    for task in chosen.bank.tasks:
        case.check(f"{vector}/packed_bits/{task}", chosen.artifacts()[f"mask/{task}"])
    for key in case.keys(f"{vector}/reconstructed_flat/"):
        case.check(key, chosen.flat(key.rpartition("/")[2]))


@pytest.mark.parametrize("vector", ["ta", "ties"])
@pytest.mark.parametrize("name", ["grid_T4", "float_T5"])
def test_consensus(name: str, vector: str) -> None:
    case = load(f"consensus/{name}")
    lambdas = case.parameters["tall_mask_lambda_per_task"][vector]
    settings = {
        "multi_task_vector": "task_arithmetic" if vector == "ta" else "ties",
        "mask_lambda": {f"task{index}": value for index, value in enumerate(lambdas)},
    }
    tall = case.merge("tall_mask", **settings)
    for index, mask in enumerate(tall.masks().values()):
        assert np.array_equal(mask, case.inputs[f"tall_mask_{vector}"][index].numpy() == 1)
    for threshold in case.parameters["thresholds"]:
        result = case.merge("consensus", min_tasks=threshold, **settings)
        mask = result.masks()["consensus"].astype(np.uint8)
        case.check(f"{vector}/consensus_mask/threshold{threshold}", mask)
    inputs = case.inputs_of_bank()
    tau = sum_task_vectors(inputs) if vector == "ta" else ties_task_vector(inputs, 0.2, "sum")
    case.check(f"{vector}/tau_mtl_flat", tau)
    merged = case.merge("consensus", min_tasks=2, scaling_coefficient=0.4, **settings)
    case.check(f"{vector}/merged_flat_threshold2_coef0.4", merged.flat())
    case.check(f"{vector}/merged_tv_flat/threshold2", tau * torch.from_numpy(merged.masks()["consensus"]))


@pytest.mark.parametrize("name", ["grid_T4", "float_T3"])
def test_magnitude_mask(name: str) -> None:
    case = load(f"mag_masking/{name}")
    for percent in case.parameters["K_percent"]:
        masks = case.merge("magnitude_mask", density=percent / 100).masks()
        case.check(f"mask/K{percent}", np.stack(list(masks.values())).astype(np.uint8))
    default = case.merge("magnitude_mask")
    for key in case.keys("reconstructed_flat_K10/"):
        case.check(key, default.flat(key.rpartition("/")[2]))
    case.check("tau_mtl_flat", sum_task_vectors(case.inputs_of_bank()))

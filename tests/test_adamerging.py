"""AdaMerging against the authors' trajectories (tests/golden/adamerging), and what its learner promises."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import Inputs, make_unlabeled
from test_goldens import Case, load
from torch import Tensor, nn
from torch.nn import functional

import merge_ray
from merge_ray import kernels
from merge_ray.bank import Layout, ModelBank
from merge_ray.errors import CheckpointError, MergeRayError, ParameterError
from merge_ray.evaluate import TaskModel, UnlabeledSamples
from merge_ray.families import Skeleton
from merge_ray.methods.adamerging import AdaMerging, CoefficientLearner, elect
from merge_ray.methods.base import MergeInputs, make_method
from merge_ray.methods.entropies import entropy


class GoldenEncoder(Skeleton):
    """The encoder that the goldens' notes describe, over a flat buffer."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout, self.flat = layout, torch.zeros(layout.size)
        self.names = layout.names
        views = [nn.Parameter(view, requires_grad=False) for view in layout.views(self.flat).values()]
        self.tensors = nn.ParameterList(views)

    def forward(self, images: Tensor) -> Tensor:
        named = {
            name.removeprefix("model.visual."): tensor for name, tensor in zip(self.names, self.tensors, strict=True)
        }
        kernel = named["conv1.weight"]
        tokens = functional.conv2d(images, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
        hidden = self._norm(tokens + named["positional_embedding"], named, "ln_pre")
        for block in ("transformer.resblocks.0.", "transformer.resblocks.1."):
            inner = self._linear(self._norm(hidden, named, f"{block}ln_2"), named, f"{block}mlp.c_fc")
            hidden = hidden + self._linear(functional.gelu(inner), named, f"{block}mlp.c_proj")
        features = self._norm(hidden.mean(1), named, "ln_post") @ named["proj"]
        return functional.normalize(features, dim=-1)

    @staticmethod
    def _norm(values: Tensor, named: Mapping[str, Tensor], name: str) -> Tensor:
        weight = named[f"{name}.weight"]
        return functional.layer_norm(values, weight.shape, weight, named[f"{name}.bias"])

    @staticmethod
    def _linear(values: Tensor, named: Mapping[str, Tensor], name: str) -> Tensor:
        return functional.linear(values, named[f"{name}.weight"], named[f"{name}.bias"])


class GoldenTask:
    """A task whose batches come in the recorded order, whichever positions are asked for; it keeps their entropies."""

    task, split = "", "test"

    def __init__(self, skeleton: GoldenEncoder, batches: Tensor, head: Mapping[str, Tensor]) -> None:
        self.skeleton, self.batches, self.head = skeleton, iter(batches.flatten(0, 1)), head
        self.flat, self.entropies = skeleton.flat, list[float]()

    def __len__(self) -> int:
        return 1000

    def inputs(self, positions: Any) -> Tensor:
        assert len(positions) == 16
        return next(self.batches)

    def logits(self, inputs: Tensor) -> Tensor:
        logits = self.skeleton(inputs) @ self.head["weight"].T + self.head["bias"]
        self.entropies.append(float(entropy(logits.detach()).mean()))
        return logits

    def all_logits(self) -> Tensor:
        raise AssertionError("learning asks for batches only")

    outcomes = outcomes_of = all_logits


class GoldenSamples:
    def __init__(self, case: Case, bank: ModelBank) -> None:
        self.skeleton = GoldenEncoder(bank.layout)
        heads = {key: value for key, value in case.models()[1].items() if key.startswith("head")}
        self.models = {
            task: GoldenTask(self.skeleton, case.inputs["batches"][:, index], heads[f"head{index}"])
            for index, task in enumerate(bank.tasks)
        }

    def gradient(self) -> AbstractContextManager[Tensor]:
        return self.skeleton.gradient()


@pytest.mark.parametrize("name", [
    "layer_wise_T3", "layer_wise_clamped_T2", "layer_wise_pp_T3", "task_wise_T3", "task_wise_pp_T3",
])  # fmt: skip
def test_trajectories(name: str) -> None:
    case = load(f"adamerging/{name}")
    settings = case.parameters
    base, groups = case.models()
    bank = ModelBank.build(base, {key: state for key, state in groups.items() if key.startswith("task")})
    method = AdaMerging(
        steps=settings["steps"],
        granularity="layer" if "layer_wise" in name else "task",
        task_vectors="ties" if "_pp_" in name else "plain",
        initial_coefficient=settings["prior"],
        learning_rate=settings["lr"],
    )
    samples = GoldenSamples(case, bank)
    inputs = MergeInputs(bank, resources={"unlabeled": samples})
    if "_pp_" in name:
        election = elect(inputs, method.density)
        elected = kernels.select_elected(bank.task_vectors, election.limits, election.signs)
        for index, row in enumerate(elected):
            case.check_state(f"ties_tv{index}", bank.layout.unflatten(row))
    learner = method.learner(inputs)
    order = [bank.layout.names.index(key) for key in case.about["param_order"]]
    rows = {"loss": [], "grad": [], "lambdas_raw": [], "lambdas_effective": []}  # type: dict[str, list[Any]]
    for _ in range(settings["steps"]):
        rows["loss"].append(learner.advance(1))
        assert learner.coefficients.grad is not None
        for key, values in (
            ("grad", learner.coefficients.grad),
            ("lambdas_raw", learner.coefficients),
            ("lambdas_effective", learner.coefficients.clamp(0, 1)),
        ):
            rows[key].append((values[:, order] if method.granularity == "layer" else values).T.clone())
    entropies = torch.tensor([model.entropies for model in samples.models.values()], dtype=torch.float64)
    case.check("batch_entropy", entropies.T.reshape(settings["steps"], 2, -1).transpose(1, 2))
    case.check("loss", torch.tensor(rows.pop("loss"), dtype=torch.float64))
    for key, steps in rows.items():
        case.check(key, torch.stack(steps))
    merged = learner.merged()
    out = torch.empty(bank.layout.size)
    merged.write("task0", out)
    case.check_state("merged", bank.layout.unflatten(out))


@pytest.fixture
def bank() -> ModelBank:
    base = {"conv.weight": torch.randn(4, 3, 5, 5), "norm.weight": torch.randn(37), "scale": torch.tensor(1.5)}
    models = {f"task{index}": {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in base.items()}
              for index in range(3)}  # fmt: skip
    return ModelBank.build(base, models)


def inputs_of(bank: ModelBank, seed: int = 0, samples: UnlabeledSamples | None = None) -> MergeInputs:
    unlabeled = samples or make_unlabeled(bank.layout, bank.tasks)
    return MergeInputs(bank, seed=seed, resources={"unlabeled": unlabeled})


def make_learner(bank: ModelBank, seed: int = 0, **parameters: Any) -> CoefficientLearner:
    return AdaMerging(learning_rate=0.2, **parameters).learner(inputs_of(bank, seed))


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    np.savez(path, **arrays)  # type: ignore[arg-type]


VARIANTS: list[dict[str, Any]] = [{"granularity": granularity, "task_vectors": vectors}
            for granularity in ("layer", "task") for vectors in ("plain", "ties")]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(variant.values()))
def test_one_pass_gives_the_gradient_of_autograd(bank: ModelBank, variant: dict[str, Any]) -> None:
    learner = make_learner(bank, **variant)
    learner.coefficients[0, 0], learner.coefficients[1, 0] = 1.5, -0.5
    rows = bank.task_vectors
    if learner.layers.election:
        rows = kernels.select_elected(rows, learner.layers.election.limits, learner.layers.election.signs)
    raw = learner.coefficients.clone().requires_grad_(True)
    widths = torch.from_numpy(np.diff(learner.layers.bounds))
    weights = bank.base + (raw.clamp(0, 1).repeat_interleave(widths, dim=1) * rows).sum(0)
    model = learner.models[1]
    assert isinstance(model, TaskModel)
    views = bank.layout.views(weights)
    loss = torch.zeros(())
    for index, task in enumerate(learner.models):
        for positions in learner._batches(index):
            tensors = {f"tensors.{number}": view for number, view in enumerate(views.values())}
            logits = torch.func.functional_call(model.skeleton, tensors, (task.inputs(positions),))
            loss = loss + entropy(logits).mean()
    loss.backward()
    assert learner.advance(1) == pytest.approx(float(loss.detach()))
    assert raw.grad is not None
    assert learner.coefficients.grad is not None
    torch.testing.assert_close(learner.coefficients.grad, raw.grad, rtol=1e-4, atol=1e-6)
    assert learner.coefficients.grad[:2, 0].tolist() == [0, 0]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(variant.values()))
def test_a_learner_that_is_taken_up_again_gives_the_same_bits(bank: ModelBank, variant: dict[str, Any]) -> None:
    through = make_learner(bank, **variant)
    losses = [through.advance(4), through.advance(5)]
    first = make_learner(bank, **variant)
    assert first.advance(4) == losses[0]
    second = make_learner(bank, **variant)
    second.load(first.state())
    assert second.step == 4
    assert second.advance(5) == losses[1]
    for name, array in through.state().items():
        assert np.array_equal(second.state()[name], array), name
    assert not torch.equal(make_learner(bank, seed=1, **variant).coefficients, through.coefficients)


def test_a_fresh_state_can_be_loaded(bank: ModelBank) -> None:
    learner = make_learner(bank)
    learner.load(make_learner(bank).state())
    assert learner.step == 0
    assert learner.advance(1) == make_learner(bank).advance(1)


def test_learning_makes_predictions_surer(bank: ModelBank) -> None:
    learner = make_learner(bank, batch_size=40)
    first = learner.advance(1)
    learner.advance(20)
    assert learner.advance(1) < first
    weights = learner.merged().artifacts()
    assert all(0 <= weights[f"coefficient/{task}"].min() <= weights[f"coefficient/{task}"].max() <= 1
               for task in bank.tasks)  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(variant.values()))
def test_saved_coefficients_are_evaluated_without_learning(
    bank: ModelBank, tmp_path: Path, variant: dict[str, Any]
) -> None:
    merged = AdaMerging(steps=3, learning_rate=0.2, **variant).merge(inputs_of(bank))
    expected = torch.empty(bank.layout.size)
    merged.write("task0", expected)
    path = tmp_path / "coefficients.npz"
    save_arrays(path, merged.artifacts())
    method = AdaMerging(coefficients=str(path), **variant)
    assert method.steps_to_learn == 0
    again = method.merge(MergeInputs(bank, needs=frozenset()))
    resolved = make_method("adamerging", json.loads(json.dumps(again.resolved.parameters())))
    third = resolved.merge(MergeInputs(bank, needs=frozenset()))
    for other in (again, third):
        out = torch.empty(bank.layout.size)
        other.write("task1", out)
        assert torch.equal(out, expected)
    for name, array in merged.artifacts().items():
        assert np.array_equal(third.artifacts()[name], array)


def test_coefficients_that_do_not_fit_are_refused(bank: ModelBank, tmp_path: Path) -> None:
    path = tmp_path / "coefficients.npz"

    def merge(**parameters: Any) -> None:
        make_method("adamerging", {"coefficients": str(path), **parameters}).merge(MergeInputs(bank))

    with pytest.raises(CheckpointError, match="no such file or directory"):
        merge()
    save_arrays(path, {"mask": np.zeros(3)})
    with pytest.raises(CheckpointError, match=r"holds no merging coefficients, but \['mask'\]"):
        merge()
    save_arrays(path, {f"coefficient/task{index}": np.zeros(1, np.float32) for index in range(2)})
    with pytest.raises(ParameterError, match=r"of \['task0', 'task1'\], and none of \['task2'\]"):
        merge()
    save_arrays(path, {f"coefficient/task{index}": np.zeros(2, np.float32) for index in range(3)})
    with pytest.raises(ParameterError, match=r"has 2 coefficients a task; with granularity='layer' these"):
        merge()
    names = np.array(["conv.weight", "norm.bias", "scale"])
    rows = {f"coefficient/task{index}": np.zeros(3, np.float32) for index in range(3)}
    save_arrays(path, {"layers": names, **rows})
    with pytest.raises(ParameterError, match="has coefficients of other layers"):
        merge()
    with pytest.raises(ParameterError, match="has 3 coefficients a task; with granularity='task' these models have 1"):
        merge(granularity="task")
    for wrong in ({"task0": 1.5}, {"task0": [0.1, "x"]}, "coefficients.pt", {}):
        with pytest.raises(ParameterError, match=r"not in the path of a \.npz or \.safetensors file, or \{task: num"):
            make_method("adamerging", {"coefficients": wrong})


def test_a_loss_that_is_not_finite_stops_the_learning(bank: ModelBank) -> None:
    samples = make_unlabeled(bank.layout, bank.tasks)
    data = samples.models["task1"].data
    assert isinstance(data, Inputs)
    data.values[:] = np.nan
    with pytest.raises(FloatingPointError, match="the entropy is not finite in step 1"):
        AdaMerging(steps=2).merge(inputs_of(bank, samples=samples))


def test_samples_are_asked_for() -> None:
    base = {"w": torch.randn(400)}
    finetuned = {"a": {"w": torch.randn(400)}, "b": {"w": torch.randn(400)}}
    with pytest.raises(ParameterError, match=r"needs 'unlabeled' data, and there is none here: pass unlabeled="):
        merge_ray.merge("adamerging", base=base, finetuned=finetuned)
    samples = make_unlabeled(Layout.of(base), "a")
    with pytest.raises(MergeRayError, match=r"learns on unlabelled samples of every task; \['b'\] have none"):
        merge_ray.merge("adamerging", base=base, finetuned=finetuned, unlabeled=samples)
    samples = make_unlabeled(Layout.of(base), "ab")
    result = merge_ray.merge("adamerging", base=base, finetuned=finetuned, unlabeled=samples, steps=2)
    assert sorted(result.artifacts()) == ["coefficient/a", "coefficient/b", "layers"]


def test_small_tasks_give_the_batches_that_they_have(bank: ModelBank) -> None:
    learner = AdaMerging(steps=1, batch_size=16).learner(
        inputs_of(bank, samples=make_unlabeled(bank.layout, bank.tasks, count=20))
    )
    drawn = list(learner._batches(0))
    assert [len(positions) for positions in drawn] == [16, 4]
    assert sorted(np.concatenate(drawn)) == list(range(20))


@pytest.mark.parametrize("elected", [False, True])
def test_layer_kernels_agree_with_torch_and_with_the_path_of_accelerators(
    elected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, base, gradient = torch.randn(3, 9001), torch.randn(9001), torch.randn(9001)
    bounds = np.array([0, 1, 1, 700, 4096, 9000, 9001])
    coefficients, election = torch.rand(3, 6), None
    kept = rows
    if elected:
        limits = kernels.trim_thresholds(rows, 0.4)
        election = kernels.Election(limits, kernels.elect_sign(rows, limits))
        kept = kernels.select_elected(rows, limits, election.signs)
    spread = coefficients.repeat_interleave(torch.from_numpy(np.diff(bounds)), dim=1)
    weights = base + (spread * kept).sum(0)
    dots = torch.stack([(kept * gradient)[:, start:stop].double().sum(1) for start, stop in
                        itertools.pairwise(bounds)], dim=1).float()  # fmt: skip
    results = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append((kernels.layer_sum(rows, coefficients, bounds, torch.empty(9001), base, election),
                        kernels.layer_dots(rows, gradient, bounds, election)))  # fmt: skip
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    monkeypatch.setattr(kernels.layers, "CHUNK", 1000)
    results.append((kernels.layers.chunked_layer_sum(rows, coefficients, bounds, torch.empty(9001), base, election),
                    kernels.layers.chunked_layer_dots(rows, gradient, bounds, election).float()))  # fmt: skip
    for got in results:
        torch.testing.assert_close(got[0], weights)
        torch.testing.assert_close(got[1], dots, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("elected", [False, True])
def test_a_gpu_gives_the_same(elected: bool) -> None:
    rows, base, gradient, coefficients = torch.randn(3, 9001), torch.randn(9001), torch.randn(9001), torch.rand(3, 3)
    bounds, election, moved = np.array([0, 700, 4096, 9001]), None, None
    if elected:
        limits = kernels.trim_thresholds(rows, 0.4)
        election = kernels.Election(limits, kernels.elect_sign(rows, limits))
        moved = kernels.Election(limits.cuda(), election.signs.cuda())
    want = kernels.layer_sum(rows, coefficients, bounds, torch.empty(9001), base, election)
    got = kernels.layer_sum(rows.cuda(), coefficients.cuda(), bounds, base.cuda().clone(), base.cuda(), moved)
    torch.testing.assert_close(got.cpu(), want)
    dots = kernels.layer_dots(rows.cuda(), gradient.cuda(), bounds, moved)
    torch.testing.assert_close(dots.cpu(), kernels.layer_dots(rows, gradient, bounds, election), rtol=1e-4, atol=1e-4)

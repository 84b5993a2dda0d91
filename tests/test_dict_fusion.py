"""Dictionary fusion: recorded numbers, learning, resuming, saved mappings and the frozen feature extractors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import make_unlabeled
from test_goldens import Case, load
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoImageProcessor,
    BertConfig,
    BertModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from merge_ray.bank import ModelBank
from merge_ray.errors import CheckpointError, DataError, ParameterError
from merge_ray.evaluate import Evaluator, TaskModel, UnlabeledSamples
from merge_ray.families import Positions, Skeleton, TaskData
from merge_ray.features import Extractor, open_extractor
from merge_ray.methods import dict_fusion
from merge_ray.methods.base import Learner, MergeInputs, make_method
from merge_ray.methods.coding import NAMES, Codings, mapping_arrays, new_mapping, read_mapping
from merge_ray.methods.dict_fusion import DictLearner, DictPredictor
from merge_ray.methods.merge_cache import MergeCache
from merge_ray.methods.per_sample import merge_into

State = dict[str, Tensor]


class ViewSkeleton(Skeleton):
    """A skeleton of any module, some of whose parameters are views of the flat buffer."""

    def __init__(self, module: nn.Module, bank: ModelBank) -> None:
        super().__init__()
        self.module, self.layout, self.flat = module.requires_grad_(False).eval(), bank.layout, bank.base.clone()
        for name, view in bank.layout.views(self.flat).items():
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, nn.Parameter(view, requires_grad=False))


class Answers(TaskData):
    """Samples with given features; what is kept of an answer are its logits."""

    def __init__(self, inputs: Tensor | tuple[Tensor, ...], features: Tensor, head: Any = None) -> None:
        self.given, self.features, self.head = inputs, features, head
        self.labels = torch.zeros(len(features), dtype=torch.long)

    def inputs(self, positions: Positions) -> Any:
        return (
            self.given[positions] if isinstance(self.given, Tensor) else tuple(part[positions] for part in self.given)
        )

    def samples(self, positions: Positions) -> Tensor:
        return self.features[positions]

    def logits(self, skeleton: Skeleton, inputs: Any) -> Tensor:
        assert isinstance(skeleton, ViewSkeleton)
        answers = skeleton.module(inputs)
        return answers if self.head is None else functional.linear(functional.normalize(answers, dim=-1), *self.head)

    def outcomes_of(self, logits: Tensor, positions: Positions) -> Tensor:
        return logits


class GivenFeatures(Extractor):
    """Samples that are features already."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, inputs: Tensor) -> Tensor:
        return inputs


class World:
    """A bank, a skeleton and the data of every split, and what a merge sees of them."""

    def __init__(self, bank: ModelBank, module: nn.Module, splits: Mapping[str, Mapping[str, TaskData]]) -> None:
        self.bank, self.cache = bank, MergeCache(1 << 20)
        self.skeleton = ViewSkeleton(module, bank)
        self.evaluator = Evaluator(self.skeleton, splits, batch_size=8, shards=1)
        self.models = self.evaluator.models

    def inputs(self, seed: int = 0, split: str = "adapt", **resources: Any) -> MergeInputs:
        resources = {"unlabeled": UnlabeledSamples(self.models[split]), **resources}
        return MergeInputs(self.bank, seed=seed, out=self.skeleton.flat, cache=self.cache, resources=resources)

    def learner(self, seed: int = 0, **parameters: Any) -> DictLearner:
        learner = make_method("dict_fusion", parameters).learner(self.inputs(seed))  # type: ignore[attr-defined]
        assert isinstance(learner, DictLearner)
        return learner

    def predictor(self, **parameters: Any) -> DictPredictor:
        merged = make_method("dict_fusion", parameters).merge(self.inputs())
        assert isinstance(merged, DictPredictor)
        return merged


# Recorded numbers


class ClipEncoder(nn.Module):
    """The encoder that the goldens' notes describe, with the names of their tensors."""

    def __init__(self, state: State, patch: int) -> None:
        super().__init__()
        self.patch = patch
        for name in state:
            owner: nn.Module = self
            for part in name.split(".")[:-1]:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(name.rpartition(".")[2], nn.Parameter(state[name]))

    def forward(self, images: Tensor) -> Tensor:
        get = self.get_parameter

        def norm(name: str, hidden: Tensor) -> Tensor:
            return functional.layer_norm(hidden, hidden.shape[-1:], get(f"{name}.weight"), get(f"{name}.bias"))

        def linear(name: str, hidden: Tensor) -> Tensor:
            return functional.linear(hidden, get(f"{name}.weight"), get(f"{name}.bias"))

        tower = "model.visual"
        hidden = functional.conv2d(images, get(f"{tower}.conv1.weight"), stride=self.patch).flatten(2).mT
        hidden = norm(f"{tower}.ln_pre", hidden + get(f"{tower}.positional_embedding"))
        for name, _ in self.get_submodule(f"{tower}.transformer.resblocks").named_children():
            block = f"{tower}.transformer.resblocks.{name}"
            inner = functional.gelu(linear(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", hidden)))
            hidden = hidden + linear(f"{block}.mlp.c_proj", inner)
        return norm(f"{tower}.ln_post", hidden.mean(1)) @ get(f"{tower}.proj")


class FirstToken(nn.Module):
    """A T5's logits of the first decoded token, its inputs cut to the batch's longest."""

    def __init__(self, config: dict[str, Any], state: State) -> None:
        super().__init__()
        # One decoded token attends to itself alone: its queries' gradient is exactly zero. Fused attention makes noise
        # of it, which Adam takes for a direction.
        self.t5 = T5ForConditionalGeneration(T5Config(**{**config, "attn_implementation": "eager"}))
        # transformers 5 ties the output layer to the embeddings whatever the configuration says.
        self.t5.lm_head.weight = nn.Parameter(torch.empty_like(self.t5.lm_head.weight))
        missing, unexpected = self.t5.load_state_dict(state, strict=False)
        assert not unexpected
        assert set(missing) == {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        ids, mask = (part[:, : int(inputs[1].sum(1).max())] for part in inputs)
        start = torch.zeros(len(ids), 1, dtype=torch.long)
        return self.t5(input_ids=ids, attention_mask=mask, decoder_input_ids=start, use_cache=False).logits[:, 0]


def clip_world(case: Case) -> tuple[World, list[str]]:
    base, groups = case.models()
    tasks = sorted(name for name in groups if name.startswith("task"))
    bank = ModelBank.build(base, {task: groups[task] for task in tasks})
    adapt, evaluate = {}, {}
    for index, task in enumerate(tasks):
        head = (groups[f"head{index}"]["weight"], groups[f"head{index}"]["bias"])
        images, features = (case.inputs[f"adaptation_{name}"][:, index].flatten(0, 1) for name in ("x", "features"))
        adapt[task] = Answers(images, features, head)
        evaluate[task] = Answers(case.inputs["eval_x"][index], case.inputs["eval_features"][index], head)
    module = ClipEncoder(base, case.parameters["encoder"]["patch"])
    return World(bank, module, {"adapt": adapt, "test": evaluate}), case.about["param_order"]


def t5_world(case: Case) -> tuple[World, list[str]]:
    base, groups = case.models()
    module = FirstToken(case.parameters["t5_config"], base)
    base = {f"t5.{name}": tensor for name, tensor in base.items()}
    vectors = {
        f"task{index}": {f"t5.{name}": tensor for name, tensor in groups[f"tv{index}"].items()}
        for index in range(case.parameters["num_tasks"])
    }
    finetuned = {task: {name: base[name] + part for name, part in vector.items()} for task, vector in vectors.items()}
    bank = ModelBank.build(base, finetuned)
    # The task vectors themselves, not what rounding makes of them.
    for row, vector in zip(bank.task_vectors, vectors.values(), strict=True):
        bank.layout.flatten(vector, row)
    names = ("input_ids", "attention_mask", "features")
    splits: dict[str, dict[str, TaskData]] = {"adapt": {}, "test": {}}
    for index, task in enumerate(vectors):
        ids, mask, features = (case.inputs[f"adaptation_{name}"][:, index].flatten(0, 1) for name in names)
        splits["adapt"][task] = Answers((ids, mask), features)
        ids, mask, features = (case.inputs[f"eval_{name}"][index] for name in names)
        splits["test"][task] = Answers((ids, mask), features)
    return World(bank, module, splits), [f"t5.{name}" for name in case.about["task_vector_order"]]


class Golden:
    """A case with one granularity, its layers taken from the module's order to the layout's."""

    def __init__(self, name: str, prefix: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.case, self.prefix, self.folder = load(f"dict_fusion/{name}"), prefix, folder
        self.world, self.layers = (t5_world if prefix else clip_world)(self.case)
        bank, size = self.world.bank, self.case.parameters["feature_size"]
        monkeypatch.setattr(dict_fusion, "open_extractor", lambda location, device: GivenFeatures(size))
        self.granularity = "layer" if "layer" in name + prefix else "task"
        self.order = torch.tensor([self.layers.index(layer) for layer in bank.layout.names])

    def check(self, key: str, got: Tensor, layered: int | None = None) -> None:
        """Compare with the recorded tensor; its dimension ``layered`` runs over codings."""
        key = self.prefix + key
        if layered is not None and self.granularity == "layer":
            tasks, layers = len(self.world.bank.tasks), len(self.layers)
            shape = got.unflatten(layered, (tasks, layers))
            got = shape.index_select(layered + 1, torch.argsort(self.order)).flatten(layered, layered + 1)
        self.case.check(key, got)

    def write(self, which: str) -> str:
        """A recorded mapping as a file, with the order of its outputs beside it."""
        group = self.case.inputs if which != "adapted" else self.case.expected
        path = self.folder / f"{which}.safetensors"
        save_file({name: group[f"{self.prefix}mapping_{which}/{name}"] for name in NAMES}, path)
        about = {"tasks": self.world.bank.tasks, "layers": self.layers if self.granularity == "layer" else None}
        path.with_suffix(".json").write_text(json.dumps(about))
        return str(path)

    def parameters(self) -> dict[str, Any]:
        given = self.case.parameters
        rate = given["lr"] if not self.prefix else given["lr"][self.prefix.rstrip("/")]
        optimizer = given.get("optimizer", "Adam").lower()
        return {
            "granularity": self.granularity, "learning_rate": rate, "optimizer": optimizer,
            "batch_size": given["batch_size"],
        }  # fmt: skip


@pytest.fixture(
    params=[
        ("clip_task_wise_T3", ""),
        ("clip_layer_wise_T3", ""),
        ("flan_t5_T3", "task_wise/"),
        ("flan_t5_T3", "layer_wise/"),
    ],
    ids=["clip-task", "clip-layer", "t5-task", "t5-layer"],
)
def golden(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Golden:
    name, prefix = request.param
    return Golden(name, prefix, monkeypatch, tmp_path)


@pytest.mark.parametrize("which", ["initial", "random", "adapted"])
def test_recorded_answers(golden: Golden, which: str) -> None:
    world = golden.world
    merged = world.predictor(steps=0, mapping=golden.write(which), granularity=golden.granularity)
    outcomes = world.evaluator.outcomes(merged, "test")
    for task, model in world.models["test"].items():
        coding = merged.codings(model, slice(None))
        golden.check(f"{which}/coding/{task}", coding.flatten(1), layered=1)
        golden.check(f"{which}/logits_per_sample/{task}", torch.from_numpy(outcomes[task]))
        merge_into(world.bank, coding.mean(0), model.flat)
        golden.check(f"{which}/logits_by_batch/{task}", model.all_logits())


def test_recorded_learning(golden: Golden) -> None:
    learner = golden.world.learner(mapping=golden.write("initial"), **golden.parameters())
    size, losses, codings, biases = golden.case.parameters["batch_size"], [], [], []
    for step in range(golden.case.parameters["steps"]):
        merged, batch = learner.merged(), slice(step * size, (step + 1) * size)
        assert isinstance(merged, DictPredictor)
        models = golden.world.models["adapt"].values()
        codings.append(torch.stack([merged.codings(model, batch).flatten(1).mean(0) for model in models]))
        losses.append(learner.advance(1))
        biases.append(learner.mapping.get_parameter("2.bias").detach().clone())
        if step == 0:
            for name, parameter in learner.mapping.named_parameters():
                assert parameter.grad is not None
                golden.check(f"grad_first_step/{name}", parameter.grad, layered=0 if name.startswith("2") else None)
    golden.check("loss", torch.tensor(losses, dtype=torch.float64))
    golden.check("batch_coding", torch.stack(codings), layered=2)
    golden.check("last_bias", torch.stack(biases), layered=1)
    for name, tensor in learner.mapping.state_dict().items():
        golden.check(f"mapping_adapted/{name}", tensor, layered=0 if name.startswith("2") else None)


# Learning


TASKS = ("ants", "bees", "cats")
FEATURES = 6


def make_world(tasks: tuple[str, ...] = TASKS, spread: float = 0.3, samples: int = 11, extra: int = 0) -> World:
    """Small classifiers with given features; ``extra`` layers that do nothing."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
    base = {**module.state_dict(), **{f"unused.{index}": torch.randn(2) for index in range(extra)}}
    for index in range(extra):
        module.add_module("unused", nn.Module()) if index == 0 else None
        module.get_submodule("unused").register_parameter(str(index), nn.Parameter(base[f"unused.{index}"]))
    finetuned = {}
    for task in sorted(tasks):
        finetuned[task] = {name: tensor + spread * torch.randn_like(tensor) for name, tensor in base.items()}
    bank = ModelBank.build(base, finetuned)
    splits = {
        split: {task: Answers(torch.randn(samples, 5), torch.randn(samples, FEATURES)) for task in tasks}
        for split in ("adapt", "val")
    }
    return World(bank, module, splits)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(dict_fusion, "open_extractor", lambda location, device: GivenFeatures(FEATURES))
    return make_world()


LEARNING: dict[str, Any] = {"learning_rate": 0.01, "batch_size": 4}


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_an_unlearned_mapping_is_task_arithmetic(world: World, granularity: str) -> None:
    merged = world.predictor(steps=0, granularity=granularity, initial_coefficient=0.2)
    outcomes = world.evaluator.outcomes(merged, "val")
    plain = make_method("task_arithmetic", {"scaling_coefficient": 0.2}).merge(world.inputs())
    for task, expected in world.evaluator.outcomes(plain, "val").items():
        np.testing.assert_allclose(outcomes[task], expected, atol=1e-5)


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_learning_lowers_the_entropy_and_touches_no_input(world: World, granularity: str) -> None:
    before = world.bank.base.clone(), world.bank.task_vectors.clone()
    learner = world.learner(granularity=granularity, **LEARNING)
    losses = [learner.advance(10) for _ in range(5)]
    assert learner.step == 50
    assert losses[-1] < losses[0]
    assert torch.equal(world.bank.base, before[0])
    assert torch.equal(world.bank.task_vectors, before[1])


def test_the_base_model_may_be_the_extractor(world: World) -> None:
    unlabeled = make_unlabeled(world.bank.layout, world.bank.tasks)
    inputs = MergeInputs(world.bank, cache=MergeCache(1 << 20), resources={"unlabeled": unlabeled})
    learner = make_method("dict_fusion", {"feature_extractor": "base", **LEARNING}).learner(inputs)  # type: ignore[attr-defined]
    model = unlabeled.models[world.bank.tasks[0]]
    before = learner.merged().codings(model, slice(0, 5))
    learner.advance(20)
    after = learner.merged().codings(model, slice(0, 5))
    # The samples' own features tell their codings apart, once there is something learned.
    assert before.std(dim=0).max() < 1e-6 < after.std(dim=0).max()


def test_gradients_are_those_of_a_graph_through_the_merge(world: World) -> None:
    learner = world.learner(granularity="layer", **LEARNING)
    with torch.no_grad():
        learner.mapping.get_parameter("2.weight").normal_(std=0.1)
    expected = {name: parameter.detach().clone() for name, parameter in learner.mapping.named_parameters()}
    for parameter in expected.values():
        parameter.requires_grad_(True)
    layout, base, vectors = world.bank.layout, world.bank.base, world.bank.task_vectors
    for model in world.models["adapt"].values():
        data = model.data
        assert isinstance(data, Answers)
        coding = (
            torch.func.functional_call(learner.mapping, expected, (data.features[:4],)).mean(0).view(len(TASKS), -1)
        )
        sizes = torch.tensor([entry.size for entry in layout.entries])
        flat = base + (coding.repeat_interleave(sizes, dim=1) * vectors).sum(0)
        weights = {
            entry.name: flat[entry.offset : entry.offset + entry.size].view(entry.shape) for entry in layout.entries
        }
        logits = torch.func.functional_call(world.skeleton.module, weights, (data.given[:4],))
        functional.softmax(logits, 1).mul(functional.log_softmax(logits, 1)).sum(1).mean().neg().backward()
    learner.advance(1)
    for name, parameter in learner.mapping.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6)


def saved(arrays: Mapping[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """Arrays after a turn on the disk, where saving made vectors of scalars."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    np.savez(path, **arrays)  # type: ignore[arg-type]
    with np.load(path) as file:
        return dict(file)


def bits(learner: Learner) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in learner.state().items()}


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_learner_that_is_taken_up_again_gives_the_same_bits(world: World, tmp_path: Path, optimizer: str) -> None:
    whole = world.learner(optimizer=optimizer, **LEARNING)
    first, second, fresh = (world.learner(seed=seed, optimizer=optimizer, **LEARNING) for seed in (0, 1, 0))
    whole.advance(7)
    first.advance(3)
    second.load(saved(first.state(), tmp_path / "state.npz"))
    assert bits(second) == bits(first)
    second.advance(4)
    assert bits(second) == bits(whole)
    fresh.load(fresh.state())
    fresh.advance(7)
    assert bits(fresh) == bits(whole)


def test_seeds_draw_the_first_layer(world: World) -> None:
    one, same, other = (world.learner(seed=seed).mapping.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in NAMES)
    assert not torch.equal(one["0.weight"], other["0.weight"])
    bound = FEATURES**-0.5
    assert bool((one["0.weight"].abs() <= bound).all())
    assert float(one["0.weight"].abs().max()) > 0.7 * bound
    assert not one["2.weight"].any()
    assert bool((one["2.bias"] == 0.3).all())


def test_any_saved_step_is_evaluated_alone(world: World, tmp_path: Path) -> None:
    learner = world.learner(granularity="layer", **LEARNING)
    learner.advance(5)
    merged = learner.merged()
    expected = world.evaluator.outcomes(merged, "val")
    for name, arrays in {"state": learner.state(), "artifacts": merged.artifacts()}.items():
        saved(arrays, tmp_path / f"{name}.npz")
        save_file({key: torch.tensor(array) for key, array in arrays.items()}, tmp_path / f"{name}.safetensors")
        for suffix in (".npz", ".safetensors"):
            path = str(tmp_path / f"{name}{suffix}")
            again = world.predictor(steps=0, granularity="layer", mapping=path)
            for task, outcomes in world.evaluator.outcomes(again, "val").items():
                assert np.array_equal(outcomes, expected[task])
    assert json.loads(merged.artifacts()["mapping/about"].tobytes())["step"] == 5


def test_scoring_first_and_learning_then_share_features(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class Counting(GivenFeatures):
        def __call__(self, inputs: Tensor) -> Tensor:
            calls.append(len(inputs))
            return super().__call__(inputs)

    monkeypatch.setattr(dict_fusion, "open_extractor", lambda location, device: Counting(FEATURES))
    merged = world.predictor(steps=0)
    world.evaluator.outcomes(merged, "adapt")
    world.learner(**LEARNING).advance(2)
    world.learner(feature_extractor="another", **LEARNING).advance(1)
    assert calls == [11] * 6


def test_zero_task_vectors_answer_as_the_base(world: World) -> None:
    world.bank.task_vectors.zero_()
    merged = world.predictor(steps=2, **LEARNING)
    answers = world.evaluator.outcomes(merged, "val")
    base = make_method("pretrained", {}).merge(world.inputs())
    for task, expected in world.evaluator.outcomes(base, "val").items():
        np.testing.assert_allclose(answers[task], expected, atol=1e-6)


def test_what_only_learning_uses_makes_no_other_candidate_without_a_step() -> None:
    given = {"learning_rate": 1e-3, "optimizer": "adamw", "batch_size": 4, "granularity": "layer"}
    unlearned = make_method("dict_fusion", {**given, "steps": 0}).parameters()
    assert unlearned == make_method("dict_fusion", {"steps": 0, "granularity": "layer"}).parameters()
    assert given.items() <= make_method("dict_fusion", {**given, "steps": 1}).parameters().items()


def test_one_task_and_fewer_samples_than_a_batch(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    alone = make_world(tasks=("ants",), samples=3)
    merged = alone.predictor(steps=3, **LEARNING)
    assert merged.codings(alone.models["val"]["ants"], slice(None)).shape == (3, 1)
    with pytest.raises(ParameterError, match="dict_fusion makes weights for every sample"):
        merged.write("ants", alone.skeleton.flat)
    assert merged.storage_bytes() > alone.bank.model_bytes + alone.bank.finetuned_bytes


def test_a_loss_that_is_not_finite_stops_learning(world: World) -> None:
    with torch.no_grad():
        world.models["adapt"]["bees"].data.given[0] = float("nan")  # type: ignore[attr-defined]
    with pytest.raises(FloatingPointError, match="the loss of step 0 is nan"):
        world.learner(**LEARNING).advance(1)


def test_tasks_without_samples_are_named(world: World) -> None:
    del world.models["adapt"]["bees"]
    with pytest.raises(ParameterError, match=r"unlabelled samples of every task; \['bees'\] have none"):
        world.learner(**LEARNING).advance(1)
    method = make_method("dict_fusion", LEARNING)
    with pytest.raises(ParameterError, match="needs 'unlabeled' data"):
        method.merge(MergeInputs(world.bank, needs=method.needs))


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"granularity": "tensor"}, r"granularity='tensor' is not in \{task, layer\}"),
        ({"steps": -1}, r"steps=-1 is not in 0\.\.1000000"),
        ({"mapping": 3}, r"mapping=3 is not in a location, or none"),
        ({"feature_extractor": None}, "feature_extractor=None is not in a location"),
        ({"optimizer": "sgd"}, r"is not in \{adam, adamw\}"),
        ({"batch_size": 0}, r"batch_size=0 is not in 1\.\.4096"),
    ],
)
def test_wrong_parameters_are_refused(parameters: dict[str, Any], text: str) -> None:
    with pytest.raises(ParameterError, match=text):
        make_method("dict_fusion", parameters)


# Saved mappings


def make_codings(tasks: int = 3, layers: int | None = None) -> Codings:
    names = None if layers is None else tuple(f"layer{index}" for index in range(layers))
    return Codings(tuple(f"task{index}" for index in range(tasks)), names)


def write_mapping(path: Path, codings: Codings, features: int = FEATURES) -> nn.Sequential:
    mapping = new_mapping(features, codings, 0.3, 0)
    with torch.no_grad():
        mapping.get_parameter("2.bias").copy_(torch.arange(len(mapping.get_parameter("2.bias"))))
    saved(mapping_arrays(mapping, codings, "extractor", 50), path)
    return mapping


def test_a_task_wise_mapping_moves_to_a_model_of_another_size(world: World, tmp_path: Path) -> None:
    learner = world.learner(**LEARNING)
    learner.advance(3)
    saved(learner.merged().artifacts(), tmp_path / "mapping.npz")
    larger = make_world(extra=2)
    merged = larger.predictor(steps=0, mapping=str(tmp_path / "mapping.npz"))
    here, there = learner.merged(), larger.models["val"]["ants"]
    assert isinstance(here, DictPredictor)
    assert torch.equal(merged.codings(there, slice(0, 4)), here.codings(there, slice(0, 4)))
    with pytest.raises(CheckpointError, match=r"a layer-wise mapping of 4 layers; this pool's models have 6\. A layer"):
        layered = world.learner(granularity="layer", **LEARNING)
        saved(layered.state(), tmp_path / "layers.npz")
        larger.predictor(steps=0, granularity="layer", mapping=str(tmp_path / "layers.npz"))


def test_layers_of_another_architecture_go_by_their_place(tmp_path: Path) -> None:
    mapping = write_mapping(tmp_path / "mapping.npz", make_codings(2, 3))
    other = Codings(("task0", "task1"), ("a", "b", "c"))
    read = read_mapping(str(tmp_path / "mapping.npz"), FEATURES, "extractor", other)
    assert torch.equal(read.get_parameter("2.bias"), mapping.get_parameter("2.bias"))


@pytest.mark.parametrize(
    ("written", "wanted", "features", "text"),
    [
        (make_codings(3), make_codings(3), 8, "a mapping of 6 features; the extractor extractor gives 8"),
        (
            make_codings(3),
            make_codings(2),
            6,
            r"a mapping of 3 tasks \(task0, task1, task2\); this pool has 2 \(task0, ",
        ),
        (make_codings(3), Codings(("a", "b", "c"), None), 6, "of the tasks task0, task1, task2; this pool has a, b, c"),
        (make_codings(3), make_codings(3, 4), 6, "a task-wise mapping; this merge has granularity 'layer'"),
        (make_codings(3, 4), make_codings(3), 6, "a layer-wise mapping; this merge has granularity 'task'"),
        (make_codings(3, 4), make_codings(3, 5), 6, "of 4 layers; this pool's models have 5"),
        (make_codings(3, 4), make_codings(2, 4), 6, r"a mapping of 3 tasks \(task0, task1, task2\); this pool has 2"),
    ],
)
def test_mappings_for_something_else_are_refused(
    tmp_path: Path, written: Codings, wanted: Codings, features: int, text: str
) -> None:
    write_mapping(tmp_path / "mapping.npz", written)
    with pytest.raises(CheckpointError, match=text):
        read_mapping(str(tmp_path / "mapping.npz"), features, "extractor", wanted)


def test_published_mappings_are_read_without_running_them(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, 3))
    torch.save(network, tmp_path / "mapping.pt")
    path = str(tmp_path / "mapping.pt")
    features = torch.randn(2, FEATURES)
    read = read_mapping(path, FEATURES, "extractor", make_codings(3))
    assert torch.equal(read(features), network(features))
    (tmp_path / "mapping.json").write_text('{"tasks": ["task2", "task0", "task1"]}')
    named = read_mapping(path, FEATURES, "extractor", make_codings(3))
    assert torch.equal(named(features), network(features)[:, [1, 2, 0]])
    (tmp_path / "mapping.json").write_text('{"tasks": 3}')
    with pytest.raises(CheckpointError, match="'tasks' of its outputs must be a list of names, not 3"):
        read_mapping(path, FEATURES, "extractor", make_codings(3))
    (tmp_path / "mapping.json").write_text("[3]")
    with pytest.raises(CheckpointError, match="what its outputs are for cannot be read as a JSON object"):
        read_mapping(path, FEATURES, "extractor", make_codings(3))


def test_published_layer_wise_mappings_need_their_layers_named(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, 6))
    torch.save(network, tmp_path / "mapping.pt")
    path = str(tmp_path / "mapping.pt")
    with pytest.raises(
        CheckpointError, match=r"6 outputs may be for 2 tasks and 3 layers \(this pool's models have 3\)"
    ):
        read_mapping(path, FEATURES, "extractor", make_codings(2, 3))
    (tmp_path / "mapping.json").write_text('{"layers": ["layer2", "layer0", "layer1"]}')
    features = torch.randn(2, FEATURES)
    named = read_mapping(path, FEATURES, "extractor", make_codings(2, 3))
    assert torch.equal(named(features), network(features)[:, [1, 2, 0, 4, 5, 3]])


class Touch:
    """A pickle that writes a file when it is run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_pickles_that_run_something_and_other_files_are_refused(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    network.extra = Touch(tmp_path / "ran")  # type: ignore[assignment]
    torch.save(network, tmp_path / "mapping.pt")
    with pytest.raises(CheckpointError, match="refused, and nothing in it was run"):
        read_mapping(str(tmp_path / "mapping.pt"), 2, "extractor", make_codings(2))
    assert not (tmp_path / "ran").exists()
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"not a mapping: .* has 0\.weight, .*; this has weight"):
        read_mapping(str(tmp_path / "other.safetensors"), 2, "extractor", make_codings(2))
    write_mapping(tmp_path / "bad.npz", make_codings(2))
    (tmp_path / "bad.npz").write_bytes((tmp_path / "bad.npz").read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot be read as a saved mapping"):
        read_mapping(str(tmp_path / "bad.npz"), 2, "extractor", make_codings(2))


# Feature extractors

PREPROCESSING = {
    "crop_pct": 0.875, "do_normalize": True, "do_resize": True, "feature_extractor_type": "ConvNextFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3, "size": 32,
}  # fmt: skip


@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    """A tiny ResNet as microsoft/resnet-18 is published: with its head, and a preprocessor."""
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    config.num_labels = 3
    model = ResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    model.save_pretrained(tmp_path / "resnet")
    (tmp_path / "resnet" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    return tmp_path / "resnet"


def test_image_features_are_the_pooled_output(resnet: Path) -> None:
    extractor = open_extractor(str(resnet))
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    features = extractor(images)
    assert features.shape == (3, extractor.size) == (3, 8)
    model = ResNetForImageClassification.from_pretrained(resnet).eval()
    pixels = AutoImageProcessor.from_pretrained(resnet)(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.resnet(pixels).pooler_output.flatten(1)
    torch.testing.assert_close(features, expected)
    assert not torch.allclose(features[0], features[1])
    torch.testing.assert_close(extractor(images[1:2]), features[1:2])


def test_extractors_that_cannot_be_used_say_why(resnet: Path, tmp_path: Path) -> None:
    weights = load_file(resnet / "model.safetensors")
    short = {name: tensor for name, tensor in weights.items() if "embedder.convolution" not in name}
    save_file(short, resnet / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"weights do not fit:\n  embedder\.embedder\.convolution\.weight is missing"
    ):
        open_extractor(str(resnet))
    save_file(
        {**weights, "resnet.embedder.embedder.convolution.weight": torch.zeros(2, 2)}, resnet / "model.safetensors"
    )
    with pytest.raises(
        CheckpointError, match=r"convolution\.weight is \[2, 2\], its config\.json makes it \[4, 3, 7, 7\]"
    ):
        open_extractor(str(resnet))
    (resnet / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"resnet: a directory without weights"):
        open_extractor(str(resnet))
    (resnet / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"resnet: not a feature extractor: it has neither a preprocessor_config"):
        open_extractor(str(resnet))
    (resnet / "config.json").write_text("{}")
    (resnet / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    with pytest.raises(CheckpointError, match=r"resnet: transformers cannot build a model from its config\.json"):
        open_extractor(str(resnet))
    (resnet / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"resnet: not a feature extractor: it has no config\.json"):
        open_extractor(str(resnet))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"a feature extractor is a directory with a config\.json and weights"):
        open_extractor(str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="no such file or directory"):
        open_extractor(str(tmp_path / "nowhere"))


def test_a_short_hub_name_means_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"hf://nobody/no-such-resnet@main: the hub at .* cannot be reached"):
        open_extractor("nobody/no-such-resnet")


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    """A tiny sentence encoder in plain transformers' layout."""
    config = BertConfig(
        vocab_size=9, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=6,
    )  # fmt: skip
    directory = tmp_path / "sentences"
    BertModel(config, add_pooling_layer=False).save_pretrained(directory)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "a", "photo"]
    (directory / "vocab.txt").write_text("\n".join(words))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return directory


def states(directory: Path, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return BertModel.from_pretrained(directory, add_pooling_layer=False)(torch.tensor([ids])).last_hidden_state[0]


def test_text_features_are_the_mean_of_the_tokens(sentences: Path) -> None:
    extractor = open_extractor(str(sentences))
    features = extractor(["a Red photo", "green"])
    assert features.shape == (2, extractor.size) == (2, 12)
    torch.testing.assert_close(features[0], states(sentences, [2, 7, 5, 8, 3]).mean(0))
    torch.testing.assert_close(features[1], states(sentences, [2, 6, 3]).mean(0))
    long = extractor(["red " * 50])
    torch.testing.assert_close(long[0], states(sentences, [2, 5, 5, 5, 5, 3]).mean(0))


def write_modules(directory: Path, *kinds: str, **pooling: bool) -> None:
    """sentence-transformers' files."""
    modules = [{"path": f"{place}_{kind}", "type": f"sentence_transformers.models.{kind}"}
               for place, kind in enumerate(kinds)]  # fmt: skip
    (directory / "modules.json").write_text(json.dumps(modules))
    for module in modules:
        if module["type"].endswith("Pooling"):
            (directory / module["path"]).mkdir(exist_ok=True)
            config = {"word_embedding_dimension": 12, "include_prompt": True, **pooling}
            (directory / module["path"] / "config.json").write_text(json.dumps(config))


def test_modules_of_sentence_transformers_are_followed(sentences: Path) -> None:
    first, text = states(sentences, [2, 6, 3])[0], ["green"]
    write_modules(sentences, "Transformer", "Pooling", pooling_mode_cls_token=True)
    torch.testing.assert_close(open_extractor(str(sentences))(text)[0], first)
    write_modules(sentences, "Transformer", "Pooling", "Normalize", pooling_mode_mean_tokens=True)
    (sentences / "sentence_bert_config.json").write_text('{"max_seq_length": 4}')
    extractor = open_extractor(str(sentences))
    expected = states(sentences, [2, 6, 3]).mean(0)
    torch.testing.assert_close(extractor(text)[0], expected / expected.norm())
    assert torch.equal(extractor(["red red red"]), extractor(["red red"]))
    write_modules(sentences, "Transformer", "Pooling", pooling_mode_max_tokens=True)
    with pytest.raises(CheckpointError, match="pooling by max_tokens is not supported; supported are mean and cls"):
        open_extractor(str(sentences))
    write_modules(sentences, "Transformer", "Pooling", "Dense", pooling_mode_mean_tokens=True)
    with pytest.raises(CheckpointError, match=r"modules\.json has a Dense, which is not supported"):
        open_extractor(str(sentences))


def test_extractors_refuse_samples_of_another_kind(resnet: Path, sentences: Path) -> None:
    with pytest.raises(DataError, match="resnet: an extractor for images; these samples are texts"):
        open_extractor(str(resnet))(["a photo"])
    with pytest.raises(DataError, match="sentences: an extractor for texts; these samples are images"):
        open_extractor(str(sentences))(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_learning_with_a_real_extractor(resnet: Path) -> None:
    world = make_world(samples=6)
    for models in world.models.values():
        for model in models.values():
            data = model.data
            assert isinstance(data, Answers)
            data.features = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    merged = world.predictor(steps=2, feature_extractor=str(resnet), **LEARNING)
    assert merged.mapping.get_parameter("0.weight").shape == (8, 8)
    assert world.evaluator.outcomes(merged, "val")["ants"].shape == (6, 4)


def test_task_model_gives_samples(world: World) -> None:
    model = world.models["val"]["ants"]
    assert isinstance(model, TaskModel)
    assert torch.equal(model.samples(slice(2, 4)), model.data.samples(slice(2, 4)))

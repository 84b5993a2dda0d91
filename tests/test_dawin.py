"""DaWin, its mixtures and merging per sample: against the authors' numbers, and what must hold beside them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from golden_encoder import GoldenData, GoldenSkeleton, LogitsData, task_model
from safetensors.torch import load_file
from test_goldens import Case, load
from torch import Tensor

from merge_ray.bank import ModelBank
from merge_ray.errors import ParameterError
from merge_ray.evaluate import Evaluator, TaskModel, UnlabeledSamples
from merge_ray.families import find_family
from merge_ray.methods import mixtures, per_sample, shared_forward
from merge_ray.methods.base import Merged, MergeInputs, Predictor, make_method
from merge_ray.methods.base import TaskModel as AnyTaskModel
from merge_ray.methods.dawin import softmax_coefficients
from merge_ray.methods.dawin_robust import finetuned_share, offset
from merge_ray.methods.entropies import entropy
from merge_ray.methods.merge_cache import MergeCache
from merge_ray.methods.per_sample import Costs, Line, TaskWeights, outcomes_per_sample

WAYS = ("merge", "shared")


def bank_of(case: Case, tasks: int) -> ModelBank:
    groups = {group: case_state(case, group) for group in ("base", *(f"task{task}" for task in range(tasks)))}
    return ModelBank.build(groups.pop("base"), groups)


def case_state(case: Case, group: str) -> dict[str, Tensor]:
    prefix = f"{group}/"
    return {key.removeprefix(prefix): tensor for key, tensor in case.inputs.items() if key.startswith(prefix)}


def domain_model(case: Case, skeleton: GoldenSkeleton, domain: int, kind: type[GoldenData] = LogitsData) -> TaskModel:
    head = case.inputs[f"head{domain}/weight"], case.inputs[f"head{domain}/bias"]
    data = kind(case.inputs[f"domain{domain}/x"], case.inputs[f"domain{domain}/y"], head)
    return task_model(f"task{domain}", skeleton, data)


def ask(merged: Merged, model: AnyTaskModel) -> Tensor:
    """The outcomes of all samples of ``model``."""
    with torch.inference_mode():
        if isinstance(merged, Predictor):
            return torch.cat([merged.outcomes(model, part) for part in (slice(0, 5), slice(5, None))])
        merged.write(model.task, model.flat)
        return model.outcomes(slice(None))


def check_weights(case: Case, prefix: str, bank: ModelBank, flat: Tensor) -> None:
    """Expected 0-d tensors may be float64: they were multiplied by a float64 scalar."""
    state = bank.state_dict(flat)
    assert sorted(state) == sorted(key.removeprefix(f"{prefix}/") for key in case.keys(f"{prefix}/"))
    for name, tensor in state.items():
        case.check(f"{prefix}/{name}", tensor)


def inputs_for(bank: ModelBank, models: dict[str, TaskModel], **more: Any) -> MergeInputs:
    return MergeInputs(bank, resources={"unlabeled": UnlabeledSamples(models)}, **more)


# The authors' numbers


def test_coefficients_are_the_softmax_of_negative_entropies() -> None:
    case = load("dawin/mtl_coefficients_T4")
    logits, labels = case.inputs["logits"], case.inputs["y"]
    coefficients = softmax_coefficients(entropy(logits).T)
    case.check("coefficients", coefficients)
    case.check("alpha", torch.cat([torch.ones(len(labels), 1), 0.3 * 4 * coefficients], dim=1))
    losses = torch.stack([F.cross_entropy(rows, labels, reduction="none") for rows in logits], dim=1)
    case.check("coefficients_cross_entropy", softmax_coefficients(losses))


@pytest.mark.parametrize("name", ["dmm_mixture_D4", "dmm_coefficients_D5", "dmm_sharp_D4"])
def test_the_released_dirichlet_mixture(name: str) -> None:
    case = load(f"dawin/{name}")
    samples, labels = case.inputs["X"].numpy(), case.inputs["kmeans_labels"].numpy()
    fit = mixtures.fit_released_dirichlet(samples, labels)
    for key, got in {"weights": fit.weights, "params": fit.means, "lower_bound": np.array(fit.lower_bound)}.items():
        case.check(key, got)
    case.check("responsibilities", fit.responsibilities(samples))
    case.check("labels", fit.assign(samples))
    runs = [mixtures.fit_released_dirichlet(samples, labels[run : run + 1]) for run in range(len(labels))]
    case.check("last_run_params", runs[-1].parameters)
    case.check("runs/weights", np.stack([run.weights for run in runs]))
    case.check("runs/params", np.stack([run.parameters for run in runs]))
    case.check("runs/lower_bound", np.array([run.lower_bound for run in runs]))
    assert np.array_equal(mixtures.kmeans_labels(samples, samples.shape[1], 5, seed=0), labels)


def test_by_domain_as_released() -> None:
    case = load("dawin/mtl_domain_wise_T4")
    bank = bank_of(case, 4)
    skeleton = GoldenSkeleton(bank, case.parameters["encoder"])
    models = {f"task{domain}": domain_model(case, skeleton, domain) for domain in range(4)}
    inputs = inputs_for(bank, models)
    merged = make_method("dawin", {"level": "task", "fit": "released"}).merge(inputs)
    sound = make_method("dawin", {"level": "task"}).merge(inputs)
    assert isinstance(merged, TaskWeights) and isinstance(sound, TaskWeights)
    for domain, (task, model) in enumerate(models.items()):
        case.check(f"domain{domain}/alpha", torch.cat([torch.ones(1), merged.coefficients[task]]))
        logits = ask(merged, model)
        check_weights(case, f"domain{domain}/merged", bank, model.flat)
        case.check(f"domain{domain}/logits", logits)
        top1 = (logits.argmax(dim=1) == model.data.labels).double().mean()
        case.check(f"domain{domain}/top1", top1)
        # What a sound fit gives on these coefficients, which are hardly spread, is the domain's mean.
        mean = case.expected[f"domain{domain}/domain_mean"].float()
        torch.testing.assert_close(sound.coefficients[task], 0.3 * 4 * mean, rtol=1e-2, atol=1e-3)
        entropies = torch.stack([expert_entropy(bank, model, row) for row in bank.task_vectors], dim=1)
        samples = softmax_coefficients(entropies)
        case.check(f"domain{domain}/coefficients", samples)
        fit = mixtures.fit_released_dirichlet(samples.numpy(), case.inputs[f"domain{domain}/kmeans_labels"].numpy())
        case.check(f"domain{domain}/dmm_lower_bound", np.array(fit.lower_bound))
        case.check(f"domain{domain}/dmm_params", fit.means)
        case.check(f"domain{domain}/domain_mean", samples.double().mean(dim=0))


def expert_entropy(bank: ModelBank, model: TaskModel, task_vector: Tensor) -> Tensor:
    model.flat.copy_(bank.base + task_vector)
    return entropy(model.all_logits())


@pytest.mark.parametrize("domain", [0, 1])
@pytest.mark.parametrize("way", WAYS)
def test_per_sample(domain: int, way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = load("dawin/mtl_per_sample_T4")
    bank = bank_of(case, 4)
    model = domain_model(case, GoldenSkeleton(bank, case.parameters["encoder"]), domain)
    monkeypatch.setattr(Costs, "pick", lambda costs, samples, distinct: way)
    merged = make_method("dawin", {}).merge(inputs_for(bank, {}))
    case.check(f"domain{domain}/entropy/per_sample_logits", ask(merged, model))
    labels = model.data.labels
    losses = []
    for row in bank.task_vectors:
        model.flat.copy_(bank.base + row)
        losses.append(F.cross_entropy(model.all_logits(), labels, reduction="none"))
    experts = torch.stack([expert_entropy(bank, model, row) for row in bank.task_vectors])
    batch = np.arange(len(model))
    for kind, scores in {"entropy": experts, "cross_entropy": torch.stack(losses)}.items():
        coefficients = 0.3 * 4 * softmax_coefficients(scores.T)
        prefix = f"domain{domain}/{kind}"
        case.check(f"{prefix}/alpha", torch.cat([torch.ones(len(batch), 1), coefficients], dim=1))
        case.check(f"{prefix}/per_sample_logits", outcomes_per_sample(bank, model, batch, coefficients, way))
        # The reference answers the whole batch with every sample's weights.
        everything = np.tile(batch, len(batch)), coefficients.repeat_interleave(len(batch), dim=0)
        case.check(f"{prefix}/reference_output", outcomes_per_sample(bank, model, *everything, way))


def test_coefficients_between_two_models() -> None:
    case = load("dawin/rft_coefficients")
    base, finetuned, labels = case.inputs["zs_logits"], case.inputs["ft_logits"], case.inputs["y"]
    for architecture, (cold, warm) in case.parameters["temperatures"].items():
        pair = entropy(base / cold), entropy(finetuned / warm)
        name = architecture.replace("/", "-")
        case.check(f"entropy_ratio/{name}", finetuned_share(*pair))
        case.check(f"entropy_ratio/{name}_offset", finetuned_share(*pair, *offset(*pair)))
    losses = [F.cross_entropy(logits, labels, reduction="none") for logits in (base, finetuned)]
    case.check("loss_ratio_labels/ViT-B-32", finetuned_share(losses[0], losses[1]))
    case.check("loss_ratio_labels/ViT-B-32_offset", finetuned_share(losses[0], losses[1], *offset(*losses)))
    # Kept beside the method: other measures of how sure the models are.
    cold, warm = case.parameters["temperatures"]["ViT-B/32"]
    mean = ((base / cold).softmax(dim=1) + (finetuned / warm).softmax(dim=1)) / 2
    for kind, target in {"pseudo_label1": mean, "pseudo_label3": mean.argmax(dim=1)}.items():
        losses = [F.cross_entropy(logits, target, reduction="none") for logits in (base, finetuned)]
        case.check(f"loss_ratio_{kind}/ViT-B-32", finetuned_share(losses[0], losses[1]))
    # The reference takes the fine-tuned model's confidence from the pre-trained model's logits.
    confidences = [(base / temperature).softmax(dim=1).amax(dim=1) for temperature in (cold, warm)]
    case.check("confidence_ratio_reference/ViT-B-32", finetuned_share(-confidences[0], -confidences[1]))


@pytest.mark.parametrize("name", ["rft_beta_mixture_K2", "rft_beta_mixture_K3"])
def test_the_beta_mixture(name: str) -> None:
    case = load(f"dawin/{name}")
    samples, labels = case.inputs["x"][:, 0].numpy(), case.inputs["kmeans_labels"].numpy()
    fit = mixtures.fit_beta(samples, labels)
    for key, got in {
        "weights": fit.weights,
        "beta_params": fit.parameters,
        "cluster_coefficients": fit.means,
        "lower_bound": np.array(fit.lower_bound),
        "responsibilities": fit.responsibilities(samples),
        "labels": fit.assign(samples),
    }.items():
        case.check(key, got)


def test_between_two_models_end_to_end() -> None:
    case = load("dawin/rft_end_to_end")
    bank = ModelBank.build(case_state(case, "zeroshot"), {"only": case_state(case, "finetuned")})
    skeleton = GoldenSkeleton(bank, case.parameters["encoder"], case.parameters["classes"])
    model = task_model("only", skeleton, LogitsData(case.inputs["x"], case.inputs["y"]))
    cold, warm = case.parameters["temperatures"]
    parameters = {"temperature_base": cold, "temperature_finetuned": warm, "offset": True}
    inputs = inputs_for(bank, {"only": model}, seed=1)
    sample_wise = make_method("dawin_robust", parameters).merge(inputs)
    cluster_wise = make_method("dawin_robust", {**parameters, "level": "cluster", "clusters": 3}).merge(inputs)
    for kind, merged in {"sample_wise": sample_wise, "cluster_wise": cluster_wise}.items():
        logits = ask(merged, model)
        case.check(f"logits_{kind}", logits)
        top1 = (logits.argmax(dim=1) == case.inputs["y"]).double().mean()
        case.check("top1" if kind == "cluster_wise" else "top1_sample_wise", top1)

    coefficients = sample_wise.coefficients(model, slice(None))[1][:, 0]  # type: ignore[attr-defined]
    case.check("coefficients", coefficients)
    fit = mixtures.fit_beta(coefficients.numpy(), case.inputs["kmeans_labels"].numpy())
    case.check("labels", fit.assign(coefficients.numpy()))
    case.check("weights", fit.weights)
    case.check("beta_params", fit.parameters)
    case.check("cluster_coefficients", fit.means)
    for cluster, share in enumerate(fit.means):
        per_sample.merge_into(bank, torch.tensor([share]).float(), model.flat)
        check_weights(case, f"merged_cluster{cluster}", bank, model.flat)


# Mixtures


def test_a_sound_fit_recovers_a_dirichlet_mixture() -> None:
    generator = np.random.default_rng(0)
    alphas = np.array([[30.0, 3.0, 3.0], [2.0, 8.0, 20.0]])
    samples = np.concatenate([generator.dirichlet(alpha, 400 * (k + 1)) for k, alpha in enumerate(alphas)])
    fit = mixtures.fit_dirichlet(samples, mixtures.kmeans_labels(samples, 2, 5, 0))
    order = np.argsort(fit.weights)
    np.testing.assert_allclose(fit.weights[order], [1 / 3, 2 / 3], atol=0.01)
    np.testing.assert_allclose(fit.parameters[order], alphas, rtol=0.15)
    np.testing.assert_allclose(fit.mean(), samples.mean(axis=0), atol=0.01)
    truth = np.repeat([0, 1], [400, 800])
    assert (order[truth] == fit.assign(samples)).mean() > 0.99


def test_a_sound_fit_is_no_worse_for_peaked_coefficients() -> None:
    case = load("dawin/dmm_sharp_D4")
    samples, labels = case.inputs["X"].numpy(), case.inputs["kmeans_labels"].numpy()
    mean = samples.mean(axis=0)
    sound, released = mixtures.fit_dirichlet(samples, labels), mixtures.fit_released_dirichlet(samples, labels)
    assert np.abs(sound.mean() - mean).max() < 0.01
    assert np.abs(released.means[0] - mean).max() > 0.5
    assert sound.lower_bound > released.lower_bound


def test_kmeans_assigns_to_the_nearest_centre() -> None:
    samples = np.random.default_rng(0).dirichlet(np.ones(3), 60).astype(np.float32)
    fit = mixtures.fit_kmeans(samples, 4, seed=0)
    distances = ((samples[:, None] - fit.means) ** 2).sum(axis=2)
    assert np.array_equal(fit.assign(samples), distances.argmin(axis=1))
    np.testing.assert_allclose(fit.mean(), samples.mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize(
    ("count", "text"), [(3, "3 samples are too few for 3 components; at least 6"), (0, "20 samples with 1 distinct")]
)
def test_a_mixture_that_cannot_be_fitted_gives_way_to_the_mean(count: int, text: str) -> None:
    rows = np.random.default_rng(0).dirichlet(np.ones(4), count) if count else np.full((20, 4), 0.25)
    notes: list[str] = []
    fit = mixtures.fit_or_mean(
        "ants", rows, lambda r: mixtures.fit_dirichlet(r, mixtures.kmeans_labels(r, 3, 5, 0)), notes
    )
    np.testing.assert_array_equal(fit.mean(), rows.mean(axis=0))
    assert fit.assign(rows).tolist() == [0] * len(rows)
    assert len(notes) == 1 and notes[0].startswith(f"ants: {text}")


# Merging per sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP fine-tuned on three tasks."""
    folder = tmp_path_factory.mktemp("models")
    tiny.write_models(folder)
    return folder


@pytest.fixture
def bank(folder: Path) -> ModelBank:
    finetuned = {task: load_file(folder / f"{task}.safetensors") for task in tiny.TASKS}
    return ModelBank.build(load_file(folder / "base.safetensors"), finetuned)


@pytest.fixture
def models(folder: Path, bank: ModelBank) -> dict[str, TaskModel]:
    """24 images a task."""
    return clip_models(bank, folder)


def clip_models(bank: ModelBank, folder: Path, kind: type[GoldenData] = GoldenData) -> dict[str, TaskModel]:
    skeleton = find_family("clip", str(folder / "config.json")).skeleton(bank, "cpu")
    generator = torch.Generator().manual_seed(0)
    models = {}
    for task in bank.tasks:
        images = torch.randint(0, 256, (24, 3, 16, 16), generator=generator, dtype=torch.uint8)
        head = 10 * torch.randn(5, 8, generator=generator), torch.zeros(5)
        models[task] = task_model(task, skeleton, kind(images, torch.arange(24) % 5, head))
    return models


@pytest.mark.parametrize("few", [0, 1, 10**9])
@pytest.mark.parametrize("layerwise", [False, True])
def test_both_ways_agree(
    bank: ModelBank, folder: Path, layerwise: bool, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_forward, "FEW", few)
    monkeypatch.setattr(shared_forward, "WEIGHTS_AT_ONCE", 0.5)
    model = clip_models(bank, folder, LogitsData)["bees"]
    shape = (10, 3, len(bank.layout.entries)) if layerwise else (10, 3)
    coefficients = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    coefficients[7] = coefficients[2]
    at = np.array([3, 1, 4, 15, 9, 2, 6, 5, 23, 8])
    merged, shared = (outcomes_per_sample(bank, model, at, coefficients, way) for way in ("merge", "shared"))
    torch.testing.assert_close(shared, merged, rtol=1e-5, atol=1e-5)
    for place, row in zip(at, coefficients, strict=True):
        weights = row if layerwise else row[:, None].expand(-1, len(bank.layout.entries))
        sizes = torch.tensor([entry.size for entry in bank.layout.entries])
        model.flat.copy_(bank.base + (weights.repeat_interleave(sizes, dim=1) * bank.task_vectors).sum(0))
        want = model.outcomes(slice(int(place), int(place) + 1))[0]
        torch.testing.assert_close(merged[at.tolist().index(place)], want, rtol=1e-4, atol=1e-4)


def test_equal_coefficients_share_a_merge(
    bank: ModelBank, models: dict[str, TaskModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    merges: list[int] = []
    asked: list[int] = []
    merge_into, outcomes = per_sample.merge_into, TaskModel.outcomes

    def count_merge(*given: Any) -> None:
        merges.append(1)
        merge_into(*given)

    def count_asked(model: TaskModel, at: Any) -> Tensor:
        asked.append(len(at))
        return outcomes(model, at)

    monkeypatch.setattr(per_sample, "merge_into", count_merge)
    monkeypatch.setattr(TaskModel, "outcomes", count_asked)
    coefficients = torch.eye(3)[torch.tensor([0, 1, 0, 0, 2, 1])]
    outcomes_per_sample(bank, models["ants"], slice(0, 6), coefficients, "merge")
    assert len(merges) == 3 and sorted(asked) == [1, 2, 3]


def test_the_cheaper_way_is_picked() -> None:
    costs = Costs(merge=1.0, plain=Line(0.1, 0.01), shared=Line(0.2, 0.5))
    assert costs.pick(samples=64, distinct=64) == "shared"
    assert costs.pick(samples=64, distinct=3) == "merge"
    assert Costs(1.0, Line(0, 1), None).pick(64, 64) == "merge"


def test_generated_answers_are_never_those_of_a_shared_forward_pass(bank: ModelBank, folder: Path) -> None:
    class Generated(GoldenData):
        def outcomes(self, skeleton: Any, positions: Any) -> Tensor:
            return torch.ones(len(self.x[positions]))

    model = clip_models(bank, folder, Generated)["ants"]
    assert not model.answers_by_logits
    assert outcomes_per_sample(bank, model, slice(0, 4), torch.rand(4, 3)).tolist() == [1.0] * 4


def test_a_forward_pass_that_branches_on_values_is_merged_for(bank: ModelBank, folder: Path) -> None:
    class Branching(LogitsData):
        def logits(self, skeleton: Any, inputs: Tensor) -> Tensor:
            answers = super().logits(skeleton, inputs)
            return answers if answers.max() > 0 else -answers

    model, coefficients = clip_models(bank, folder, Branching)["ants"], torch.rand(4, 3)
    picked = outcomes_per_sample(bank, model, slice(0, 4), coefficients)
    assert torch.equal(picked, outcomes_per_sample(bank, model, slice(0, 4), coefficients, "merge"))
    with pytest.raises(RuntimeError, match="vmap"):
        outcomes_per_sample(bank, model, slice(0, 4), coefficients, "shared")


# What holds for every method

VARIANTS = [
    ("dawin", {"level": "sample"}),
    ("dawin", {"level": "cluster"}),
    ("dawin", {"level": "cluster", "mixture": "kmeans"}),
    ("dawin", {"level": "cluster", "fit": "released"}),
    ("dawin", {"level": "task"}),
    ("dawin", {"level": "task", "mixture": "kmeans"}),
    ("dawin", {"level": "task", "fit": "released"}),
    ("dawin_robust", {"level": "sample"}),
    ("dawin_robust", {"level": "sample", "offset": True}),
    ("dawin_robust", {"level": "cluster"}),
    ("dawin_robust", {"level": "task"}),
    ("wise_ft", {}),
]
variants = pytest.mark.parametrize(("name", "parameters"), VARIANTS)


def answers(name: str, parameters: dict[str, Any], bank: ModelBank, folder: Path) -> tuple[Merged, list[Tensor]]:
    """The logits of all tasks' samples, and the merge that gave them."""
    models = clip_models(bank, folder, LogitsData)
    method = make_method(name, parameters)
    merged = method.merge(inputs_for(bank, models, cache=MergeCache(0), needs=method.needs))
    return merged, [ask(merged, model) for model in models.values()]


@variants
def test_inputs_are_untouched_and_the_same_seed_gives_the_same(
    name: str, parameters: dict[str, Any], bank: ModelBank, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Which way is faster is a matter of time, and the ways differ by rounding.
    monkeypatch.setattr(Costs, "pick", lambda costs, samples, distinct: "merge")
    before = bank.base.clone(), bank.task_vectors.clone()
    (merged, one), (_, two) = answers(name, parameters, bank, folder), answers(name, parameters, bank, folder)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(bank.base, before[0]) and torch.equal(bank.task_vectors, before[1])
    assert bank.model_bytes <= merged.storage_bytes() <= bank.finetuned_bytes + bank.model_bytes
    assert merged.resolved == make_method(name, parameters)
    assert not merged.notes


@variants
def test_zero_task_vectors_give_the_base(name: str, parameters: dict[str, Any], bank: ModelBank, folder: Path) -> None:
    same = dataclasses.replace(bank, task_vectors=torch.zeros_like(bank.task_vectors))
    _, got = answers(name, parameters, same, folder)
    for logits, model in zip(got, clip_models(same, folder, LogitsData).values(), strict=True):
        torch.testing.assert_close(logits, model.all_logits(), rtol=1e-5, atol=1e-5)


@variants
def test_one_task_banks(name: str, parameters: dict[str, Any], bank: ModelBank, folder: Path) -> None:
    one = dataclasses.replace(bank, tasks=bank.tasks[:1], task_vectors=bank.task_vectors[:1])
    _, (got,) = answers(name, parameters, one, folder)
    assert bool(got.isfinite().all())
    if name == "dawin":
        model = clip_models(one, folder, LogitsData)["ants"]
        model.flat.copy_(one.base + 0.3 * one.task_vectors[0])
        torch.testing.assert_close(got, model.all_logits(), rtol=1e-5, atol=1e-5)


def test_wise_ft_goes_from_the_base_to_the_finetuned_model(bank: ModelBank) -> None:
    for coefficient in (0.0, 0.25, 1.0):
        merged = make_method("wise_ft", {"coefficient": coefficient}).merge(MergeInputs(bank))
        merged.write("bees", out := torch.empty_like(bank.base))
        torch.testing.assert_close(out, bank.base + coefficient * bank.task_vectors[1])


def test_predictions_are_computed_once_for_a_bank_and_split(
    bank: ModelBank, models: dict[str, TaskModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    all_logits = TaskModel.all_logits

    def count_asked(model: TaskModel) -> Tensor:
        asked.append(model.task)
        return all_logits(model)

    monkeypatch.setattr(TaskModel, "all_logits", count_asked)
    cache = MergeCache(0)
    for prior in (0.2, 0.4):
        for level in ("sample", "cluster", "task"):
            merged = make_method("dawin", {"level": level, "prior": prior}).merge(inputs_for(bank, models, cache=cache))
            for model in models.values():
                ask(merged, model)
    assert sorted(asked) == sorted(3 * list(tiny.TASKS))


def test_few_samples_leave_a_note(bank: ModelBank, folder: Path) -> None:
    merged, _ = answers("dawin", {"level": "task", "clusters": 20}, bank, folder)
    assert [note.split(":")[0] for note in merged.notes] == list(tiny.TASKS)
    assert merged.notes[0] == (
        "ants: 24 samples are too few for 20 components; at least 40 are needed; "
        "it uses the mean of its coefficients instead of a mixture"
    )


def test_the_evaluator_scores_predictors_shard_by_shard(bank: ModelBank, models: dict[str, TaskModel]) -> None:
    skeleton = models["ants"].skeleton
    evaluator = Evaluator(skeleton, {"val": {task: model.data for task, model in models.items()}}, 8, 3)
    merged = make_method("dawin", {}).merge(inputs_for(bank, models))
    whole = evaluator.outcomes(merged, "val")
    shards = [evaluator.outcomes(merged, "val", shard) for shard in range(3)]
    for task, outcomes in whole.items():
        assert np.array_equal(outcomes, np.concatenate([shard[task] for shard in shards]))


def test_what_bad_input_gets(bank: ModelBank, models: dict[str, TaskModel]) -> None:
    with pytest.raises(ParameterError, match=r"level='batch' is not in \{sample, cluster, task\}"):
        make_method("dawin", {"level": "batch"})
    with pytest.raises(ParameterError, match="this merge needs 'unlabeled' data, and there is none here"):
        make_method("dawin", {"level": "task"}).merge(MergeInputs(bank))
    merged = make_method("dawin", {}).merge(inputs_for(bank, models))
    with pytest.raises(ParameterError, match="dawin makes weights for every sample"):
        merged.write("ants", models["ants"].flat)
    bank.task_vectors[1] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"fine-tuned on 'bees' has logits that are not finite on 'ants' \(val"
    ):
        ask(make_method("dawin", {}).merge(inputs_for(bank, models)), models["ants"])

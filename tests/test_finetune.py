"""Fine-tuning: the recipe's arithmetic, training that continues after a kill, the files it leaves, and Ray."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from tiny import CONFIG, write_images, write_models
from torch import Tensor, nn

from merge_ray.checkpoints import read_weights
from merge_ray.errors import CheckpointError, MergeRayError, SpecError
from merge_ray.families import find_image_family
from merge_ray.finetune import (
    FinetuneSpec,
    Recipe,
    Trainer,
    Workers,
    finetune_task,
    make_base,
    prepare_data,
    read_result,
    write_results,
)
from merge_ray.finetune.pretraining import Captioned, PairStream
from merge_ray.finetune.spec import PretrainSpec
from merge_ray.finetune.trainer import batch_rows, learning_rate
from merge_ray.progress import Progress
from merge_ray.spec_files import check_spec
from merge_ray.tasks import open_task

TASKS = ("ants", "bees")
RECIPE = {"steps": 6, "batch_size": 16, "learning_rate": 0.01, "warmup_steps": 1}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Two tiny tasks and a tiny architecture."""
    for seed, task in enumerate(TASKS):
        write_images(tmp_path / "data" / task, seed=seed)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def task_spec(world: Path, task: str) -> dict[str, str]:
    return {"name": task, "parquet": str(world / "data" / task / "{split}.parquet")}


def make_spec(world: Path, output: str = "out", **changes: Any) -> FinetuneSpec:
    raw = {
        "name": "tiny",
        "output": str(world / output),
        "architecture": str(world / "config.json"),
        "pretrain": RECIPE,
        "tasks": [task_spec(world, task) for task in TASKS],
        "checkpoint_every": 2,
        **RECIPE,
        **changes,
    }
    return check_spec(FinetuneSpec, {key: value for key, value in raw.items() if value is not None}, "finetune.yaml")


def run(spec: FinetuneSpec, cache: Path) -> dict[str, dict[str, Tensor]]:
    """Run every job of ``spec`` in this process; returns the weights of the base and of every task."""
    make_base(spec, cache)
    write_results(spec, [finetune_task(spec, task.name, cache) for task in spec.tasks])
    names = ["base", *(task.name for task in spec.tasks)]
    return {name: read_weights(spec.output / f"{name}.safetensors") for name in names}


class Killed(Exception):
    """Stands for the end of a process at the worst moment."""


def kill_at(step: int) -> Any:
    def progress(done: int, total: int) -> None:
        if done == step:
            raise Killed

    return progress


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert set(first) == set(second)
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=0, rtol=0)


def assert_alike(spec: FinetuneSpec, expected: dict[str, dict[str, Tensor]]) -> None:
    """The models in ``spec.output`` see what ``expected`` see, up to rounding.

    Weights are not compared: AdamW makes full steps of a gradient that is nothing but rounding, as that of the
    attention's key biases, which change no output.
    """
    family = find_image_family("clip", spec.architecture)
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    for name, weights in expected.items():
        found = family.image_encoder(read_weights(spec.output / f"{name}.safetensors"), "cpu")
        torch.testing.assert_close(found(images), family.image_encoder(weights, "cpu")(images), atol=1e-3, rtol=0)


def test_the_learning_rate_warms_up_and_follows_a_cosine() -> None:
    recipe = Recipe(learning_rate=2.0, warmup_steps=4, steps=24)
    rates = [learning_rate(recipe, 24, step) for step in range(24)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert math.isclose(rates[14], 1.0) and 0 < rates[-1] < 0.05
    # Warm-up never takes more than a fifth of the steps.
    assert learning_rate(recipe, 10, 2) == 2.0


def test_batches_string_epochs_together() -> None:
    rows = np.concatenate([batch_rows(10, 4, step, seed=3) for step in range(5)])
    assert sorted(rows[:10]) == list(range(10)) and sorted(rows[10:]) == list(range(10))
    assert list(rows[:10]) != list(rows[10:])
    assert list(batch_rows(10, 4, 2, seed=3)) == list(rows[8:12])
    assert list(batch_rows(10, 4, 2, seed=4)) != list(rows[8:12])


def test_epochs_are_counted_in_steps() -> None:
    assert Recipe(epochs=1.5, batch_size=32).count_steps(100) == 5
    assert Recipe(steps=7).count_steps(100) == 7


def train(path: Path, steps: int = 5, workers: Workers | None = None, identity: str = "a") -> nn.Module:
    """A linear regression whose batches are split among ``workers``."""
    torch.manual_seed(1)
    module, inputs = nn.Linear(6, 3), torch.randn(40, 6)
    targets = inputs @ torch.randn(6, 3)
    recipe = Recipe(steps=steps, batch_size=8, learning_rate=0.1, warmup_steps=0)
    trainer = Trainer(module, recipe, steps, path, identity, checkpoint_every=2, workers=workers or Workers())

    def loss(step: int) -> Tensor:
        rows = trainer.workers.share(batch_rows(40, 8, step, seed=0))
        return ((module(inputs[rows]) - targets[rows]) ** 2).sum() / 8

    list(trainer.run(loss))
    return module


def test_flat_adamw_takes_the_steps_of_torch(tmp_path: Path) -> None:
    module = train(tmp_path / "flat.safetensors")
    torch.manual_seed(1)
    reference, inputs = nn.Linear(6, 3), torch.randn(40, 6)
    targets = inputs @ torch.randn(6, 3)
    optimizer = torch.optim.AdamW(reference.parameters(), weight_decay=0.1)
    recipe = Recipe(steps=5, learning_rate=0.1, warmup_steps=0)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, 5, step)
        rows = batch_rows(40, 8, step, seed=0)
        optimizer.zero_grad()
        (((reference(inputs[rows]) - targets[rows]) ** 2).sum() / 8).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
    torch.testing.assert_close(module.weight, reference.weight, atol=1e-6, rtol=1e-5)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "state.safetensors")
    with pytest.raises(CheckpointError, match=r"state\.safetensors belongs to a training with other settings"):
        train(tmp_path / "state.safetensors", identity="b")


def test_training_that_diverges_says_where(tmp_path: Path) -> None:
    module = nn.Linear(2, 1)
    trainer = Trainer(module, Recipe(steps=3), 3, tmp_path / "digits.safetensors", "a", checkpoint_every=2)
    with pytest.raises(MergeRayError, match=r"digits: training diverged at step 1 .* a learning_rate below 1e-05"):
        list(trainer.run(lambda step: module(torch.ones(1, 2)).sum() * (math.inf if step else 1)))


def test_a_run_makes_a_base_and_better_models(world: Path) -> None:
    spec = make_spec(world, steps=30, dtype="float16")
    weights = run(spec, world / "cache")
    table = json.loads((spec.output / "finetune.json").read_text())["tasks"]
    assert [row["task"] for row in table] == list(TASKS)
    for row in table:
        assert row["steps"] == 30 and row["samples"] == 48
        assert row["after"] > max(0.6, row["before"])
    tower = {name for name in weights["base"] if name.startswith("visual.")}
    assert "token_embedding.weight" in weights["base"] and set(weights["ants"]) == tower
    assert {tensor.dtype for tensor in weights["bees"].values()} == {torch.float16}
    assert sorted(path.name for path in spec.output.iterdir()) == [
        "ants.safetensors", "base.safetensors", "bees.safetensors", "finetune.json"
    ]  # fmt: skip


def test_a_killed_run_ends_with_the_same_weights(world: Path) -> None:
    cache = world / "cache"
    expected = run(make_spec(world, "whole"), cache)
    spec = make_spec(world, "killed")
    for step in (3, 5):
        with pytest.raises(Killed):
            make_base(spec, cache, progress=kill_at(step))
    make_base(spec, cache)
    with pytest.raises(Killed):
        finetune_task(spec, "ants", cache, progress=kill_at(5))
    with safe_open(spec.output / "training" / "ants.safetensors", framework="pt") as file:
        assert file.metadata()["step"] == "4"
    steps: list[int] = []
    finetune_task(spec, "ants", cache, progress=lambda done, total: steps.append(done))
    assert steps == [5, 6]
    again = run(spec, cache)
    for name in expected:
        assert_same(again[name], expected[name])


def test_what_is_done_is_not_done_again(world: Path) -> None:
    spec, cache = make_spec(world), world / "cache"
    run(spec, cache)
    before = (spec.output / "ants.safetensors").stat().st_mtime_ns
    assert finetune_task(spec, "ants", cache, progress=kill_at(1)) == read_result(spec, "ants")
    assert (spec.output / "ants.safetensors").stat().st_mtime_ns == before
    with pytest.raises(CheckpointError, match=r"ants\.safetensors was made with other settings, data or base"):
        finetune_task(make_spec(world, learning_rate=0.02), "ants", cache)


def test_a_given_base_is_saved_beside_the_models(world: Path) -> None:
    write_models(world / "models")
    spec = make_spec(world, pretrain=None, base=str(world / "models" / "base.safetensors"))
    weights = run(spec, world / "cache")
    assert_same(weights["base"], read_weights(world / "models" / "base.safetensors"))
    assert not weights["ants"]["visual.proj"].equal(weights["base"]["visual.proj"])


def test_overrides_replace_the_recipe_for_a_task(world: Path) -> None:
    spec = make_spec(world, overrides={"bees": {"epochs": 2, "learning_rate": 0.5}})
    assert (spec.recipe("ants").steps, spec.recipe("ants").learning_rate) == (6, 0.01)
    assert (spec.recipe("bees").steps, spec.recipe("bees").learning_rate) == (None, 0.5)
    assert spec.recipe("bees").count_steps(48) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2}, "give either 'steps' or 'epochs'"),
        ({"base": "base.pt"}, "give either 'base', the location of its weights, or 'pretrain'"),
        ({"learning_rat": 1}, "learning_rat: unknown key; did you mean 'learning_rate'"),
        ({"overrides": {"ant": {}}}, "no task 'ant'; did you mean 'ants'"),
        ({"overrides": {"ants": {"stepz": 1}}}, "overrides.ants: unknown key 'stepz'; did you mean 'steps'"),
        ({"overrides": {"ants": {"batch_size": 0}}}, "batch_size"),
        ({"tasks": ["digits", "digits"]}, "named twice: digits"),
        ({"family": "clap"}, "unknown family 'clap'; did you mean 'clip'"),
    ],
)
def test_mistakes_in_a_spec_are_explained(world: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        make_spec(world, **changes)
    assert message in str(error.value)


def test_captions_name_what_the_image_shows(world: Path) -> None:
    spec, cache = make_spec(world), world / "cache"
    prepare_data(spec, cache)
    tasks = [open_task(task) for task in spec.tasks]
    captioned = [
        Captioned(task.cached("train", 16, "bicubic", cache), task.classes, ["a {}", "{} photo"]) for task in tasks
    ]

    def draw(noise: float) -> tuple[Tensor, list[str]]:
        stream = PairStream(captioned, PretrainSpec(steps=1, batch_size=96, image_noise=noise), seed=0)
        images, captions, numbers = stream.batch(0)
        assert len(stream) == 96 and set(numbers.tolist()) == set(range(6))
        assert {caption.count("photo") for caption in captions} == {0, 1}
        return images.float(), captions

    images, captions = draw(noise=0.0)
    # The brightest channel of an image is its colour: the label.
    for colour, caption in zip(images.mean(dim=(2, 3)).argmax(dim=1), captions, strict=True):
        assert tasks[0].classes[colour] in caption
    noisy, same = draw(noise=0.05)
    assert same == captions
    assert 10 < (noisy - images).std() < 15


@pytest.mark.parametrize(
    ("wanted", "tasks", "workers", "nodes", "expected"),
    [
        ("auto", 6, 1, [{"CPU": 2.0}], ("cpu", 2, 1)),
        ("auto", 1, 1, [{"CPU": 2.0}], ("cpu", 1, 2)),
        ("auto", 6, 2, [{"CPU": 8.0}], ("cpu", 4, 1)),
        ("auto", 1, 1, [{"CPU": 4.0}, {"CPU": 2.0}, {}], ("cpu", 1, 2)),
        ("auto", 3, 2, [{"CPU": 32.0}, {"CPU": 16.0, "GPU": 4.0}], ("cuda", 2, 4)),
        ("cpu", 4, 1, [{"CPU": 16.0, "GPU": 4.0}], ("cpu", 4, 4)),
    ],
)
def test_jobs_share_the_cluster(
    wanted: str, tasks: int, workers: int, nodes: list[dict[str, float]], expected: tuple[str, int, int]
) -> None:
    from merge_ray.cluster.training import Devices

    devices = Devices.share(wanted, tasks, workers, nodes)
    assert (devices.kind, devices.at_once, devices.threads) == expected
    assert devices.workers == workers


@pytest.mark.ray
def test_tasks_are_fine_tuned_on_ray(world: Path, ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from merge_ray.cluster.training import run_finetune

    monkeypatch.setenv("MERGE_RAY_CACHE", str(world / "cache"))
    expected = run(make_spec(world, "alone"), world / "cache")
    spec = make_spec(world, "ray")
    with pytest.raises(Killed):
        make_base(spec, world / "cache", progress=kill_at(3))
    table = run_finetune(spec, 1, Progress(Console(quiet=True)))
    assert [column.header for column in table.columns] == ["task", "metric", "steps", "before", "fine-tuned", "seconds"]
    assert_alike(spec, expected)


@pytest.mark.ray
def test_two_workers_share_a_task(world: Path, ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from merge_ray.cluster.training import run_finetune

    monkeypatch.setenv("MERGE_RAY_CACHE", str(world / "cache"))
    write_models(world / "models")
    base = str(world / "models" / "base.safetensors")
    changes: dict[str, Any] = {"pretrain": None, "base": base, "tasks": [task_spec(world, "ants")]}
    expected = run(make_spec(world, "alone", **changes), world / "cache")
    spec = make_spec(world, "shared", **changes)
    run_finetune(spec, 2, Progress(Console(quiet=True)))
    assert_alike(spec, expected)


@pytest.mark.ray
def test_what_fails_on_ray_is_explained(world: Path, ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from merge_ray.cluster.training import run_finetune

    monkeypatch.setenv("MERGE_RAY_CACHE", str(world / "cache"))
    progress = Progress(Console(quiet=True))
    with pytest.raises(MergeRayError, match="64 workers per task need 64 CPU cores; the cluster has 2"):
        run_finetune(make_spec(world), 64, progress)
    run_finetune(make_spec(world), 1, progress)
    with pytest.raises(MergeRayError, match=r"fine-tuning on '\w+' failed: .*was made with other settings"):
        run_finetune(make_spec(world, steps=8), 1, progress)

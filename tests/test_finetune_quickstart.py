"""The models that ship with the package: they show what merging is about, and their spec makes them again."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from merge_ray.bank import ModelBank
from merge_ray.checkpoints import open_location, read_metadata, read_weights
from merge_ray.families import find_image_family
from merge_ray.finetune import FinetuneSpec, read_result
from merge_ray.progress import Progress
from merge_ray.spec_files import load_spec
from merge_ray.tasks import cache_directory, open_task

SPEC = Path(__file__).parent.parent / "sweeps" / "quickstart_models.yaml"
MEGABYTE = 1_000_000
SAMPLES = 250


@pytest.fixture(scope="module")
def spec() -> FinetuneSpec:
    return load_spec(FinetuneSpec, SPEC)


def shipped(name: str) -> str:
    return f"builtin:quickstart/{name}.safetensors"


class Shipped:
    """The shipped models in one bank, scored on the first images of every task's test split."""

    def __init__(self, spec: FinetuneSpec) -> None:
        self.tasks = [task.name for task in spec.tasks]
        family = find_image_family(spec.family, spec.architecture)
        base = read_weights(shipped("base"))
        self.bank = ModelBank.build(base, {name: read_weights(shipped(name)) for name in self.tasks})
        self.skeleton = family.skeleton(self.bank, "cpu")
        self.data = {}
        for task in map(open_task, spec.tasks):
            split = task.cached("test", family.preprocessing.size, "bicubic", cache_directory())
            head = family.head(base, task.classes, task.templates)
            self.data[task.name] = (torch.tensor(np.array(split.images[:SAMPLES])), split.labels[:SAMPLES], head)

    @torch.inference_mode()
    def accuracy(self, flat: Tensor, task: str) -> float:
        self.skeleton.flat.copy_(flat)
        images, labels, head = self.data[task]
        return float(((self.skeleton(images) @ head.T).argmax(dim=1).numpy() == labels).mean())

    @cache  # noqa: B019 (one object a module)
    def arithmetic(self, coefficient: float) -> float:
        """The mean accuracy of task arithmetic."""
        flat = self.bank.base + coefficient * sum(self.bank.task_vectors)
        return float(np.mean([self.accuracy(flat, task) for task in self.tasks]))


@pytest.fixture(scope="module")
def models(spec: FinetuneSpec) -> Shipped:
    return Shipped(spec)


def test_the_shipped_files_are_small_and_hold_what_is_needed(spec: FinetuneSpec) -> None:
    names = ["base", *(task.name for task in spec.tasks)]
    paths = [open_location(shipped(name)) for name in names]
    assert sum(path.stat().st_size for path in paths) <= 8 * MEGABYTE
    for name in names[1:]:
        state = read_weights(shipped(name))
        assert all(key.startswith("visual.") and tensor.dtype == torch.float16 for key, tensor in state.items())
        assert 400_000 < sum(tensor.numel() for tensor in state.values()) < 1_000_000


def test_the_vocabulary_holds_every_word_of_the_tasks(spec: FinetuneSpec) -> None:
    config = json.loads(open_location(spec.architecture).read_text())
    prompts = [text for task in map(open_task, spec.tasks) for text in (*task.classes, *task.templates)]
    assert set(re.findall(r"\w+", " ".join(prompts).lower())) <= set(config["merge_ray"]["vocabulary"])


def test_fine_tuning_gains_ten_points_and_never_loses(models: Shipped) -> None:
    gains = []
    for index, task in enumerate(models.bank.tasks):
        tuned = models.bank.base + models.bank.task_vectors[index]
        gains.append(models.accuracy(tuned, task) - models.accuracy(models.bank.base, task))
    assert min(gains) >= 0 and float(np.mean(gains)) >= 0.10


def test_averaging_stays_clearly_below_fine_tuning(models: Shipped) -> None:
    bank = models.bank
    tuned = [models.accuracy(bank.base + bank.task_vectors[index], task) for index, task in enumerate(bank.tasks)]
    assert models.arithmetic(1 / len(bank.tasks)) < float(np.mean(tuned)) - 0.05


def test_the_best_coefficient_lies_inside_the_range(models: Shipped) -> None:
    scores = {tenths / 10: models.arithmetic(tenths / 10) for tenths in (0, 1, 2, 3, 4, 6, 10)}
    best = max(scores, key=scores.__getitem__)
    assert 0 < best < 0.6
    assert scores[best] > max(scores[0.0], scores[1.0]) + 0.03


@pytest.mark.slow
@pytest.mark.ray
def test_the_spec_makes_the_shipped_models_again(spec: FinetuneSpec, tmp_path: Path, ray_cluster: Any) -> None:
    from merge_ray.cluster.training import run_finetune

    again = spec.model_copy(update={"output": tmp_path})
    run_finetune(again, 1, Progress(Console(quiet=True)))
    # Other processors and libraries round differently, and training amplifies it: a few points.
    for task in spec.tasks:
        before = json.loads(read_metadata(open_location(shipped(task.name)))["result"])
        after = read_result(again, task.name)
        assert after.before == pytest.approx(before["before"], abs=0.12)
        assert after.after == pytest.approx(before["after"], abs=0.05)

"""The text models that ship with the package: they show what merging is about; and a sweep over tiny ones on Ray."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_text
import torch
from torch import Tensor

from merge_ray.bank import ModelBank
from merge_ray.checkpoints import open_location, read_weights
from merge_ray.export import export_merge
from merge_ray.families import find_family
from merge_ray.finetune import FinetuneSpec
from merge_ray.leaderboard import rank, read_rows
from merge_ray.progress import Progress
from merge_ray.spec_files import load_spec, load_sweeps
from merge_ray.sweep import run_sweep
from merge_ray.tasks import cache_directory, open_task
from merge_ray.tasks.builtin import SPLITS, TEXT_TASKS, sentences

SWEEPS = Path(__file__).parent.parent / "sweeps"
MEGABYTE = 1_000_000


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_texts_are_whole_and_no_split_shares_one(name: str) -> None:
    made = {split: TEXT_TASKS[name].make(split) for split in SPLITS}
    texts = [text for split in SPLITS for text in made[split][0]]
    assert len(set(texts)) == len(texts)
    for split, (found, labels) in made.items():
        assert len(found) == len(labels) >= 400 and labels.dtype == np.int64
        assert np.bincount(labels).min() >= len(labels) // len(TEXT_TASKS[name].classes)
        again = TEXT_TASKS[name].make(split)
        assert found == again[0] and labels.tolist() == again[1].tolist()


def positive(opinion: str) -> bool:
    words = opinion.replace(" but ", " was ").split(" was ")[-1].split()
    return (words[-1] in sentences.GOOD) != (words[0] == "not")


def agrees(clause: str) -> bool:
    words = clause.split()
    verb = words[5] if words[2] in sentences.LINKS else words[2]
    return words[1].endswith("s") != verb.endswith("s")


def larger(claim: str) -> bool:
    first, _, _, _, _, second, _ = claim.split()
    return sentences.NUMBERS.index(first) > sentences.NUMBERS.index(second)


def day(question: str) -> int:
    *_, many, _, side, start = question.split()
    count = sentences.NUMBERS.index(many) + 1
    return (sentences.DAYS.index(start) + (count if side == "after" else -count)) % len(sentences.DAYS)


RULES: dict[str, Callable[[str], int]] = {
    "sentiment": positive,
    "agreement": agrees,
    "comparison": larger,
    "weekdays": day,
}


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_labels_follow_from_the_texts(name: str) -> None:
    texts, labels = TEXT_TASKS[name].make("val")
    assert [int(RULES[name](text.partition(" : ")[2])) for text in texts] == labels.tolist()


class Shipped:
    """The shipped models in one bank, scored on every task's test split."""

    def __init__(self) -> None:
        [spec] = load_sweeps(SWEEPS / "quickstart_text.yaml")
        self.family = spec.models.open_family()
        base = read_weights(str(spec.models.base))
        tuned = {task: read_weights(spec.models.finetuned_location(task)) for task in spec.task_names}
        self.bank = ModelBank.build(base, tuned)
        self.skeleton = self.family.skeleton(self.bank, "cpu")
        opened = {task.name: self.family.open_split(open_task(task), "test", cache_directory()) for task in spec.tasks}
        device = torch.device("cpu")
        self.data = {task: self.family.task_data(split, None, device, None) for task, split in opened.items()}

    @torch.inference_mode()
    def accuracy(self, flat: Tensor, task: str) -> float:
        self.skeleton.flat.copy_(flat)
        data = self.data[task]
        return float(data.outcomes(self.skeleton, slice(0, len(data))).float().mean())

    @cache  # noqa: B019 (one object a module)
    def arithmetic(self, coefficient: float) -> float:
        """The mean accuracy of task arithmetic."""
        flat = self.bank.base + coefficient * sum(self.bank.task_vectors)
        return float(np.mean([self.accuracy(flat, task) for task in self.bank.tasks]))

    def finetuned(self) -> list[float]:
        return [self.accuracy(self.bank.base + self.bank.task_vectors[i], t) for i, t in enumerate(self.bank.tasks)]


@pytest.fixture(scope="module")
def models() -> Shipped:
    return Shipped()


def test_the_shipped_files_are_small_and_of_the_spec(models: Shipped) -> None:
    spec = load_spec(FinetuneSpec, SWEEPS / "quickstart_text_models.yaml")
    folder = open_location("builtin:quickstart_text")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4 * MEGABYTE
    assert sorted(task.name for task in spec.tasks) == list(models.bank.tasks)
    assert all(entry.dtype == torch.float16 for entry in models.bank.layout.entries)
    # Every class is one token: the first one tells.
    for task in spec.tasks:
        words = open_task(task).classes
        ids = [models.family.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]  # type: ignore[attr-defined]
        assert all(len(row) == 1 for row in ids)


def test_fine_tuning_gains_on_every_task(models: Shipped) -> None:
    before = [models.accuracy(models.bank.base, task) for task in models.bank.tasks]
    gains = np.array(models.finetuned()) - before
    assert gains.min() > 0.05 and gains.mean() > 0.2


def test_averaging_lies_clearly_between_base_and_fine_tuning(models: Shipped) -> None:
    average = models.arithmetic(1 / len(models.bank.tasks))
    assert models.arithmetic(0) + 0.02 < average < float(np.mean(models.finetuned())) - 0.1


def test_the_best_coefficient_lies_inside_the_range(models: Shipped) -> None:
    scores = {tenths / 10: models.arithmetic(tenths / 10) for tenths in (0, 3, 6, 9, 12, 15)}
    best = max(scores, key=scores.__getitem__)
    assert 0 < best < 1.5 and scores[best] > max(scores[0.0], scores[1.5]) + 0.05
    assert scores[best] < float(np.mean(models.finetuned())) - 0.03


@pytest.mark.ray
def test_a_sweep_over_texts_ends_with_a_leaderboard(tmp_path: Path, ray_cluster: Any) -> None:
    [spec] = load_sweeps(tiny_text.write_world(tmp_path))
    results = run_sweep(spec, Progress())
    table = rank(read_rows(results), "normalized_mean")
    assert {"task_arithmetic", "finetuned", "pretrained"} <= set(table["study"])
    [path] = export_merge(results, "task_arithmetic", tmp_path / "export", "huggingface", Progress())
    family = find_family("flan_t5", str(path))
    assert set(family.rename(read_weights(path))) == set(read_weights(str(spec.models.base)))
    assert (path / "tokenizer.json").is_file()

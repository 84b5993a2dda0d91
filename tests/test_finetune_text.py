"""Fine-tuning of text models: teacher forcing, LoRA, a base from nothing with its own tokenizer, and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_text
import torch
from torch import Tensor

from merge_ray.checkpoints import is_adapter, read_finetuned, read_weights
from merge_ray.errors import SpecError
from merge_ray.families.flan_t5 import FlanT5Family
from merge_ray.finetune import FinetuneSpec, finetune_task, make_base, prepare_data, read_result, write_results
from merge_ray.finetune.texts import Answers, answer_loss
from merge_ray.spec_files import check_spec
from merge_ray.tasks import TaskSpec, open_task

TASKS = ("ants", "bees")
RECIPE = {"steps": 40, "batch_size": 16, "learning_rate": 0.01, "warmup_steps": 2, "weight_decay": 0.0}


def make_spec(folder: Path, output: str = "out", **changes: Any) -> FinetuneSpec:
    raw = {
        "name": "tiny",
        "output": str(folder / output),
        "family": "flan_t5",
        "architecture": str(folder / "models"),
        "pretrain": {**RECIPE, "steps": 4, "token_noise": 0.5},
        "tasks": [{"name": task, "parquet": str(folder / "data" / task)} for task in TASKS],
        "checkpoint_every": 5,
        **RECIPE,
        **changes,
    }
    return check_spec(FinetuneSpec, {key: value for key, value in raw.items() if value is not None}, "finetune.yaml")


@pytest.fixture
def world(tmp_path: Path) -> Path:
    tiny_text.write_architecture(tmp_path / "models", dropout_rate=0.1)
    for seed, task in enumerate(TASKS):
        tiny_text.write_texts(tmp_path / "data" / task, seed=seed)
    return tmp_path


class Killed(Exception):
    """Stands for the end of a process at the worst moment."""


def kill_at(step: int) -> Any:
    def progress(done: int, total: int) -> None:
        if done == step:
            raise Killed

    return progress


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return set(first) == set(second) and all(first[name].equal(second[name]) for name in first)


def test_full_training_gains_and_continues_after_a_kill(world: Path) -> None:
    spec, cache = make_spec(world), world / "cache"
    prepare_data(spec, cache)
    make_base(spec, cache)
    result = finetune_task(spec, "ants", cache)
    assert result.after > result.before + 0.3 and result.file == "ants.safetensors"
    assert finetune_task(spec, "ants", cache) == read_result(spec, "ants") == result
    again = make_spec(world, "again")
    with pytest.raises(Killed):
        make_base(again, cache, progress=kill_at(3))
    make_base(again, cache)
    with pytest.raises(Killed):
        finetune_task(again, "ants", cache, progress=kill_at(13))
    finetune_task(again, "ants", cache)
    for name in ("base", "ants"):
        assert same(*(read_weights(made.output / f"{name}.safetensors") for made in (spec, again)))


def test_a_lora_is_left_in_pefts_format(world: Path) -> None:
    spec, cache = make_spec(world, lora={"rank": 4, "alpha": 16}), world / "cache"
    make_base(spec, cache)
    results = [finetune_task(spec, task, cache) for task in TASKS]
    write_results(spec, results)
    assert results[0].file == "ants/adapter_model.safetensors" and results[0].after > results[0].before + 0.1
    assert is_adapter(spec.output / "ants")
    config = json.loads((spec.output / "ants" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 16.0, ["q", "v"])
    base = read_weights(spec.output / "base.safetensors")
    tuned = read_finetuned(spec.output / "ants", base)
    assert len(tuned) == 6 and not any(tensor.equal(base[name]) for name, tensor in tuned.items())
    # What it was scored as is what is read back.
    family = FlanT5Family(spec.architecture)
    split = family.open_split(open_task(spec.task("ants")), "val", cache)
    data = family.task_data(split, None, torch.device("cpu"), None)
    outcomes = data.outcomes_by(family.load({**base, **tuned}, "cpu").eval(), slice(0, len(data)))  # type: ignore[attr-defined]
    assert outcomes.float().mean().item() == pytest.approx(results[0].after)


def test_an_architecture_without_a_tokenizer_gets_one_from_the_texts(world: Path) -> None:
    bare = world / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps({**tiny_text.CONFIG, "vocab_size": 60}))
    spec = make_spec(world, architecture=str(bare / "config.json"))
    prepare_data(spec, world / "cache")
    family = FlanT5Family(str(spec.output))
    ids = family.encode(["a b deep blue"])[0]
    assert len(family.tokenizer) <= 60 and ids[-1] == 1 and 2 not in ids
    assert family.tokenizer.decode(ids, skip_special_tokens=True) == "a b deep blue"
    make_base(spec, world / "cache")
    assert read_weights(spec.output / "base.safetensors")["shared.weight"].shape == (60, 16)


def test_numbers_are_taught_as_the_nearest_word(world: Path) -> None:
    columns = {"sentence": ["a", "b", "c"], "label": [0.4, 1.4, 1.6]}
    for name in ("train", "val"):
        tiny_text.write_parquet(world / "numbers" / f"{name}.parquet", columns)
    spec = TaskSpec(name="n", parquet=str(world / "numbers"), prompt="{sentence}", classes=["0.0", "1.0", "2.0"])
    family = FlanT5Family(str(world / "models"))
    split = family.open_split(open_task(spec), "train", world / "cache")
    taught = Answers(split, family.tokenizer)
    assert taught.labels.tolist() == [0, 1, 2]
    assert taught.of(np.array([1])).tolist() == [[tiny_text.WORDS.index("1.0"), 1]]


def test_the_loss_is_the_mean_over_an_answers_tokens() -> None:
    logits, answers = torch.randn(2, 3, 5), torch.tensor([[1, 2, -100], [3, 4, 0]])
    likelihoods = -logits.log_softmax(-1)
    expected = (likelihoods[0, 0, 1] + likelihoods[0, 1, 2]) / 2
    expected += (likelihoods[1, 0, 3] + likelihoods[1, 1, 4] + likelihoods[1, 2, 0]) / 3
    torch.testing.assert_close(answer_loss(logits, answers, 0.0), expected)


def test_mistakes_are_explained(world: Path) -> None:
    with pytest.raises(SpecError, match="only flan_t5 is trained so, not clip"):
        make_spec(world, family="clip", architecture="ViT-B-32", lora={})
    spec = make_spec(world, lora={"targets": ["q", "query"]})
    make_base(spec, world / "cache")
    with pytest.raises(SpecError, match="no linear layer called query"):
        finetune_task(spec, "ants", world / "cache")

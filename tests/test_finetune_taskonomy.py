"""Training of Taskonomy networks: no common base, whole networks saved, losses that fall."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from merge_ray.checkpoints import read_weights
from merge_ray.errors import SpecError
from merge_ray.finetune import FinetuneSpec, finetune_task, write_results
from merge_ray.spec_files import check_spec
from merge_ray.tasks.builtin.rooms import render_building

FOLDERS = ("rgb", "depth_zbuffer", "normal", "segment_semantic")
TASKS = ("normal", "segment_semantic")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    rooms = render_building("alder", 16)
    for folder in FOLDERS:
        for index in range(16):
            directory = root / ("aspen" if index < 12 else "beech") / folder
            directory.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rooms[folder][index]).save(directory / f"point_{index}_view_0_domain_{folder}.png")
    return root


def make_spec(data: Path, output: Path, **changes: Any) -> FinetuneSpec:
    buildings = {"train": ["aspen"], "val": ["beech"]}
    raw = {
        "name": "tiny",
        "output": str(output),
        "family": "taskonomy",
        "architecture": "slim",
        "tasks": [{"name": task, "taskonomy": str(data), "buildings": buildings} for task in TASKS],
        "steps": 6,
        "batch_size": 6,
        "learning_rate": 0.003,
        "warmup_steps": 0,
    }
    return check_spec(FinetuneSpec, raw | changes, "test")


def test_networks_are_trained_apart(data: Path, tmp_path: Path) -> None:
    spec = make_spec(data, tmp_path / "out")
    results = [finetune_task(spec, task, tmp_path / "cache") for task in TASKS]
    assert all(result.metric == "loss" and result.after < result.before for result in results)
    assert json.loads(write_results(spec, results).read_text())["base"] is None
    normal, semantic = (read_weights(spec.output / f"{task}.safetensors") for task in TASKS)
    encoder = [name for name in normal if name.startswith("encoder.")]
    assert {name for name in semantic if name.startswith("encoder.")} == set(encoder)
    assert normal["decoder.decoder_output.0.weight"].shape[0] == 3
    first, second = normal["encoder.conv1.weight"].flatten(), semantic["encoder.conv1.weight"].flatten()
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.1
    assert int(normal["encoder.bn1.num_batches_tracked"]) == 6
    # A training of the same spec is the same training.
    again = make_spec(data, tmp_path / "again")
    finetune_task(again, "normal", tmp_path / "cache")
    repeated = read_weights(again.output / "normal.safetensors")
    assert all(torch.equal(tensor, repeated[name]) for name, tensor in normal.items())


def test_a_killed_training_goes_on(data: Path, tmp_path: Path) -> None:
    whole = make_spec(data, tmp_path / "whole", checkpoint_every=2)
    finetune_task(whole, "normal", tmp_path / "cache")
    killed = make_spec(data, tmp_path / "killed", checkpoint_every=2)

    def kill(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune_task(killed, "normal", tmp_path / "cache", progress=kill)
    finetune_task(killed, "normal", tmp_path / "cache")
    wanted = read_weights(whole.output / "normal.safetensors")
    for name, tensor in read_weights(killed.output / "normal.safetensors").items():
        torch.testing.assert_close(tensor, wanted[name])


def test_there_is_no_base(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="taskonomy models have no common base"):
        make_spec(data, tmp_path, base="base.safetensors")

"""A sweep over pairs of encoders without a common base: references, matching, batch norm, scaled performance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from merge_ray.families import find_family
from merge_ray.families.taskonomy import TaskonomyFamily
from merge_ray.families.taskonomy_network import TaskonomyNetwork
from merge_ray.leaderboard import rank, read_rows
from merge_ray.progress import Progress
from merge_ray.spec_files import load_sweeps
from merge_ray.sweep import run_sweep

pytestmark = pytest.mark.ray

TASKS = ("autoencoding", "depth_euclidean", "normal")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, ray_cluster: dict[str, Any]) -> Path:
    folder = tmp_path_factory.mktemp("rooms")
    family = find_family("taskonomy", "slim")
    assert isinstance(family, TaskonomyFamily)
    for seed, task in enumerate(TASKS):
        torch.manual_seed(seed)
        state = TaskonomyNetwork(family.encoder(), family.decoder(task)).state_dict()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / f"{task}.safetensors")
    sizes = {"val_size": 12, "test_size": 12}
    spec = {
        "name": "rooms",
        "results": str(folder / "results"),
        "models": {
            "family": "taskonomy",
            "architecture": "slim",
            "finetuned": str(folder / "{task}.safetensors"),
            "heads": str(folder / "{task}.safetensors"),
        },
        "tasks": [{"name": task, "taskonomy": "builtin:rooms", **sizes} for task in TASKS],
        "pairs": "all",
        "evaluation": {"shards": 1, "batch_size": 16, "calibration_samples": 16},
        "search": {"searcher": "grid"},
        "studies": {"weight_average": {}, "mudsc": {"space": {"suffix": ["_act_useperm", ""]}}},
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(spec))
    [loaded] = load_sweeps(folder / "sweep.yaml")
    return run_sweep(loaded, Progress())


def test_every_pair_is_merged_in_every_way(results: Path) -> None:
    rows = read_rows(results)
    assert set(rows["status"]) == {"complete"}
    counts = rows[rows["split"] == "val"].groupby("study").size().to_dict()
    assert counts == {"average_label": 1, "pretrained": 1, "finetuned": 1, "weight_average": 3, "mudsc": 6}
    pairs = {tuple(pair) for pair in rows.loc[rows["study"] == "mudsc", "pair"]}
    assert pairs == {(TASKS[0], TASKS[1]), (TASKS[0], TASKS[2]), (TASKS[1], TASKS[2])}


def test_scores_are_scaled_between_the_label_average_and_the_own_model(results: Path) -> None:
    table: dict[Any, Any] = rank(read_rows(results)).set_index("study").to_dict("index")
    assert table["finetuned"]["score"] == pytest.approx(1)
    assert table["average_label"]["score"] == pytest.approx(0, abs=1e-6)
    assert table["weight_average"]["pairs"] == "3 pairs"
    assert 0.5 < table["weight_average"]["storage_ratio"] < 0.6


def test_losses_are_kept_by_building(results: Path) -> None:
    rows = read_rows(results)
    [tasks] = rows.loc[(rows["study"] == "finetuned") & (rows["split"] == "test"), "tasks"]
    for score in tasks:
        losses = {part["domain"]: part["value"] for part in score["domains"]}
        assert len(losses) > 1 and score["metric"] == "loss"
        assert score["value"] == pytest.approx(sum(losses.values()) / len(losses))

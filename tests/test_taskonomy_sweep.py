"""A sweep over pairs of encoders without a common base: references, matching, batch norm, scaled performance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from test_sharded_sweep import Lines, needs
from torch import Tensor

from merge_ray.bank import Layout
from merge_ray.checkpoints import read_weights
from merge_ray.errors import LedgerError
from merge_ray.export import export_merge
from merge_ray.families import Family, find_family
from merge_ray.families.taskonomy import TaskonomyFamily
from merge_ray.families.taskonomy_network import TaskonomyNetwork
from merge_ray.leaderboard import rank, read_rows
from merge_ray.models import load_bank, open_task_data
from merge_ray.progress import Progress
from merge_ray.spec import HostsSpec, SweepSpec
from merge_ray.spec_files import check_spec, load_sweeps, read_yaml
from merge_ray.sweep import run_sweep
from merge_ray.tasks import cache_directory, open_task

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
        "hosts": {"count": 1, "threads": 1},
        "search": {"searcher": "grid"},
        "studies": {"weight_average": {}, "mudsc": {"space": {"suffix": ["_act_useperm", "_act_iws_fs"]}}},
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


def test_encoders_are_shared_by_a_group_of_hosts(results: Path, ray_cluster: dict[str, Any]) -> None:
    [spec] = load_sweeps(results / "sweep.yaml")
    bank, _ = load_bank(spec.models, spec.task_names, Progress())
    limit = needs(spec, bank.layout).device(1) - 1
    studies = {"weight_average": spec.studies["weight_average"]}
    shared = {"hosts": HostsSpec(threads=1, device_memory=limit), "studies": studies, "name": "shared"}
    lines = Lines()
    directory = run_sweep(spec.model_copy(update=shared), lines)
    assert "1 group of 2 hosts that share the models" in "".join(lines.lines)
    scores: list[dict[Any, Any]] = [
        rank(read_rows(place)).set_index("study")["score"].to_dict() for place in (results, directory)
    ]
    assert scores[1] == {study: score for study, score in scores[0].items() if study != "mudsc"}


def test_scores_are_scaled_between_the_label_average_and_the_own_model(results: Path) -> None:
    table: dict[Any, Any] = rank(read_rows(results)).set_index("study").to_dict("index")
    assert table["finetuned"]["score"] == pytest.approx(1)
    assert table["average_label"]["score"] == pytest.approx(0, abs=1e-6)
    assert table["weight_average"]["pairs"] == "3 pairs"
    assert 0.5 < table["weight_average"]["storage_ratio"] < 0.6


def test_models_as_published_are_scored_beside_those_after_batch_norm_is_reset(results: Path) -> None:
    table: dict[Any, Any] = rank(read_rows(results)).set_index("study").to_dict("index")
    assert table["pretrained"]["kind"] == "reference"
    family = find_family("taskonomy", "slim")
    state = read_weights(results.parents[1] / "normal.safetensors")
    loss = loss_of(family, state, results, "normal")
    assert table["pretrained"]["loss/normal"] == pytest.approx(loss, rel=1e-5)
    assert table["finetuned"]["loss/normal"] != pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("study", ["mudsc", "weight_average"])
def test_exported_merges_answer_as_the_sweep_found(results: Path, study: str, tmp_path: Path) -> None:
    paths = export_merge(results, study, tmp_path, "safetensors", Progress(), "normal+autoencoding")
    assert [path.stem for path in paths] == ["autoencoding", "normal"]
    table = rank(read_rows(results), by_pair=True)
    [row] = table[(table["study"] == study) & (table["pairs"] == "autoencoding+normal")].to_dict("records")
    family = find_family("taskonomy", "slim")
    for path in paths:
        loss = loss_of(family, read_weights(path), results, path.stem)
        assert loss == pytest.approx(row[f"loss/{path.stem}"], rel=1e-4)
    with pytest.raises(LedgerError, match=r"no confirmed merge of the pair 'normal\+depth'; did you mean"):
        export_merge(results, study, tmp_path, "safetensors", Progress(), "normal+depth")


def loss_of(family: Family, state: dict[str, Tensor], results: Path, task: str) -> float:
    """The test loss of a whole network, through a skeleton of its own."""
    spec = check_spec(SweepSpec, read_yaml(results / "sweep.yaml"), results)
    [named] = [item for item in spec.tasks if item.name == task]
    head = family.read_head(open_task(named), state)
    data = open_task_data(family, named, "test", head, spec.evaluation, torch.device("cpu"), cache_directory())
    encoder = family.rename(state)
    skeleton = family.assemble(Layout.of(encoder), {}, "cpu")
    skeleton.layout.flatten(encoder, skeleton.flat)
    with torch.inference_mode():
        return data.score(data.outcomes(skeleton, slice(0, len(data))).numpy())[0]


def test_losses_are_kept_by_building(results: Path) -> None:
    rows = read_rows(results)
    [tasks] = rows.loc[(rows["study"] == "finetuned") & (rows["split"] == "test"), "tasks"]
    for score in tasks:
        losses = {part["domain"]: part["value"] for part in score["domains"]}
        assert len(losses) > 1 and score["metric"] == "loss"
        assert score["value"] == pytest.approx(sum(losses.values()) / len(losses))

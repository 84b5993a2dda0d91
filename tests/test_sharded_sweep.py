"""A sweep whose models are shared by a group of hosts, against the same with all models on every host."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import tiny
import torch
from kills import killed

from merge_ray.bank import Layout
from merge_ray.cluster import group
from merge_ray.cluster.plan import Needs
from merge_ray.errors import MergeRayError
from merge_ray.export import export_merge
from merge_ray.leaderboard import rank, read_rows
from merge_ray.models import load_bank
from merge_ray.progress import Progress
from merge_ray.spec import SweepSpec
from merge_ray.spec_files import load_sweeps
from merge_ray.sweep import run_sweep

pytestmark = pytest.mark.ray

STUDIES = {
    "weight_average": {},
    "task_arithmetic": {"searcher": "grid", "space": {"scaling_coefficient": [0.2, 0.5]}},
    "ties": {"searcher": "grid", "space": {"density": [0.2, 0.7], "trim": ["model", "tensor"]}},
    "magnitude_mask": {"searcher": "grid", "space": {"density": [0.3]}},
    "tall_mask": {"parameters": {"mask_lambdas": [0.2, 0.5]}, "space": {"multi_task_vector": ["ties"]}},
    "consensus": {"searcher": "grid", "space": {"min_tasks": [1, 2]}, "parameters": {"mask_lambdas": [0.2, 0.5]}},
}
SCORED = ["objective", "curve", "resolved", "storage_bytes", "samples", "status"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.write_world(folder)
    return folder


def load(folder: Path, **changes: Any) -> SweepSpec:
    [spec] = load_sweeps(tiny.write_spec(folder, **{"studies": STUDIES, **changes}))
    return spec


def needs(spec: SweepSpec, layout: Layout, itemsize: int = 4) -> Needs:
    activations = spec.models.open_family().activation_bytes(spec.evaluation.batch_size)
    return Needs(len(spec.tasks), layout.size, itemsize, activations, 0, on_cpu=True)


def limited(world: Path, itemsize: int = 4) -> int:
    """As much device memory as is a byte too little for all models."""
    spec = load(world)
    bank, _ = load_bank(spec.models, spec.task_names, Progress())
    return needs(spec, bank.layout, itemsize).device(1) - 1


class Lines(Progress):
    """What a sweep says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def replicated(world: Path, ray_cluster: dict[str, Any]) -> Path:
    return run_sweep(load(world, name="replicated"), Progress())


def same_sweep(one: Path, other: Path) -> None:
    """The same leaderboards, and the same scores of every candidate, sample by sample."""
    tables = [rank(read_rows(directory)).drop(columns=["seconds"]) for directory in (one, other)]
    for column in ("study", "parameters", "identity", "score", "mean"):
        assert tables[0][column].tolist() == tables[1][column].tolist(), column
    first, second = (
        {(row["identity"], row["study"]): row for row in read_rows(directory).to_dict("records")}
        for directory in (one, other)
    )
    assert first.keys() == second.keys()
    for key, row in first.items():
        for column in SCORED:
            assert np.array_equal(row[column], second[key][column]), (row["study"], column)
        assert [score["correct"] for score in row["tasks"]] == [score["correct"] for score in second[key]["tasks"]]
        for mine, kept in zip(row["artifacts"], second[key]["artifacts"], strict=True):
            with np.load(one / mine) as masks, np.load(other / kept) as masks_in_slices:
                assert masks.files == masks_in_slices.files
                assert all(np.array_equal(masks[name], masks_in_slices[name]) for name in masks.files)


def test_shared_models_give_the_same_sweep(world: Path, replicated: Path) -> None:
    said = Lines()
    shared = run_sweep(load(world, name="shared", hosts={"device_memory": limited(world)}), said)
    assert "1 group of 2 hosts that share the models" in said.lines[0]
    same_sweep(replicated, shared)


def test_models_in_16_bits_are_shared_and_a_candidate_that_fails_leaves_no_host_waiting(
    world: Path, ray_cluster: dict[str, Any], tmp_path: Path
) -> None:
    models = {**load(world).models.model_dump(exclude_none=True), "dtype": "bfloat16"}
    (world / "broken.npz").write_bytes(b"no masks")
    broken = {"method": "tall_mask", "parameters": {"masks": str(world / "broken.npz")}, "space": {}}
    studies = {"broken": broken, "ties": {"searcher": "grid", "space": {"density": [0.2]}}}
    spec = load(world, name="half", models=models, studies=studies, hosts={"device_memory": limited(world, 2)})
    said = Lines()
    directory = run_sweep(spec, said)
    assert "1 group of 2 hosts that share the models" in said.lines[0]
    bank, _ = load_bank(spec.models, spec.task_names, Progress())
    assert bank.base.dtype == torch.bfloat16
    rows = read_rows(directory)
    assert set(rows["bank_fingerprint"]) == {bank.fingerprint}
    [failed] = rows[rows["status"] == "failed"].to_dict("records")
    assert failed["study"] == "broken" and "cannot be read as saved masks" in failed["error"]
    assert set(rows.loc[rows["study"] == "ties", "status"]) == {"complete"}
    assert export_merge(directory, "ties", tmp_path, "safetensors", Progress())


def test_what_cannot_be_shared_is_said_before_any_host_loads(world: Path, ray_cluster: dict[str, Any]) -> None:
    hosts = {"device_memory": limited(world)}
    with pytest.raises(MergeRayError, match=r"but adamerging, dawin cannot merge slices"):
        run_sweep(
            load(world, name="learned", studies={"adamerging": {}, "dawin": {}, "ties": {}}, hosts=hosts), Progress()
        )
    with pytest.raises(MergeRayError, match=r"shared in slices they need 2 devices, and 1 are used here"):
        run_sweep(load(world, name="alone", hosts={**hosts, "count": 1}), Progress())


@pytest.mark.slow
@pytest.mark.parametrize("actor", ["SliceHost", "Meeting", "ModelHost"])
def test_a_group_that_loses_a_process_starts_again(world: Path, replicated: Path, actor: str) -> None:
    spec = load(world, name=f"killed_{actor}", hosts={"device_memory": limited(world)})
    with killed(actor, spec.directory):
        run_sweep(spec, Progress())
    same_sweep(replicated, spec.directory)


def test_a_group_that_gets_no_room_says_so(ray_cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "PATIENCE", 1.0)
    setup: Any = SimpleNamespace(device="cpu", threads=99, ends=(0, 4, 8))
    with pytest.raises(MergeRayError, match="no room came for the other 1 of a group's hosts in 1 s"):
        group.Group(setup, [ray.put({}), ray.put({})])

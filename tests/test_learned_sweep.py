"""A sweep of a method that learns: what it leaves behind, and that a kill in the middle changes nothing of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import ray
import tiny
import torch

from merge_ray.bank import ModelBank
from merge_ray.candidate import Candidate, Fingerprints
from merge_ray.checkpoints import read_weights
from merge_ray.cluster.learned import Learned
from merge_ray.cluster.ledger import start_results_actor
from merge_ray.cluster.pool import HostPool
from merge_ray.cluster.tuning import run_studies
from merge_ray.export import export_merge
from merge_ray.leaderboard import rank, read_rows
from merge_ray.methods.base import MergeInputs, make_method
from merge_ray.models import load_bank
from merge_ray.progress import Progress
from merge_ray.report import write_report
from merge_ray.spec import StudySpec
from merge_ray.spec_files import load_sweeps
from merge_ray.study import Study
from merge_ray.sweep import run_sweep

pytestmark = pytest.mark.ray

ADAMERGING = {"method": "adamerging", "searcher": "grid"}
STUDIES: dict[str, Any] = {
    "layers": {
        **ADAMERGING,
        "parameters": {"steps": 150, "batch_size": 4},
        "space": {"learning_rate": [0.001, 0.1]},
        "scheduler": "asha",
    },
    "tasks": {**ADAMERGING, "parameters": {"steps": 12, "granularity": "task", "task_vectors": "ties"}},
}
COLUMNS = ["study", "parameters", "resolved", "identity", "score", "mean", "transductive"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.write_world(folder)
    return folder


def sweep(world: Path, **changes: Any) -> Path:
    [spec] = load_sweeps(tiny.write_spec(world, **{"studies": STUDIES, **changes}))
    return run_sweep(spec, Progress())


@pytest.fixture(scope="module")
def finished(world: Path, ray_cluster: dict[str, Any]) -> Path:
    return sweep(world, name="finished")


@pytest.fixture(scope="module")
def bank(world: Path) -> ModelBank:
    [spec] = load_sweeps(tiny.write_spec(world))
    return load_bank(spec.models, spec.task_names, Progress())[0]


def test_learning_reports_come_before_the_shards(finished: Path) -> None:
    rows = read_rows(finished)
    for row in rows[(rows["study"] == "layers") & (rows["split"] == "val")].to_dict("records"):
        complete = row["status"] == "complete"
        assert len(row["curve"]) == 5 + 2 if complete else len(row["curve"]) < 7
        assert len(row["losses"]) == min(5, len(row["curve"]))
        assert row["seconds_merge"] > 0
    assert list((finished / "learning").iterdir()) == []
    assert not rows["transductive"].any()


def test_what_was_learned_is_kept_and_gives_the_confirmed_weights(
    finished: Path, bank: ModelBank, tmp_path: Path
) -> None:
    for study, granularity, vectors in (("layers", "layer", "plain"), ("tasks", "task", "ties")):
        [row] = [row for row in rank(read_rows(finished)).to_dict("records") if row["study"] == study]
        assert "coefficients" not in json.loads(row["parameters"]) or not json.loads(row["parameters"])["coefficients"]
        [kept] = row["artifacts"]
        given = {"coefficients": str(finished / kept), "granularity": granularity, "task_vectors": vectors}
        weights = torch.empty_like(bank.base)
        make_method("adamerging", given).merge(MergeInputs(bank)).write("ants", weights)
        [path] = export_merge(finished, study, tmp_path / study, "safetensors", Progress())
        assert torch.equal(bank.layout.flatten(read_weights(path)), weights)
        with np.load(finished / kept) as file:
            assert {f"coefficient/{task}" for task in tiny.TASKS} <= set(file.files)
            if granularity == "layer":
                assert tuple(file["layers"]) == bank.layout.names
    assert "Learned coefficients" in write_report(finished).read_text()


def command(spec: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    with spec.with_name("output").open("w") as output:
        words = [sys.executable, "-m", "merge_ray", "sweep", str(spec)]
        return subprocess.Popen(words, env=environment, stdout=output, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_a_sweep_that_is_killed_while_it_learns_ends_as_if_it_had_not_been(world: Path, finished: Path) -> None:
    spec = tiny.write_spec(world, name="killed", studies=STUDIES)
    directory = world / "results" / "killed"
    process = command(spec)
    deadline = time.monotonic() + 120
    while not (saved := list((directory / "learning").glob("[!.]*.safetensors"))):
        assert time.monotonic() < deadline and process.poll() is None, spec.with_name("output").read_text()
        time.sleep(0.01)
    seen = Learned.read(saved[0]).step
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs([child for child in children if "Host" in child.name()], timeout=30)
    assert 0 < seen < 150
    process = command(spec)
    assert process.wait(timeout=240) == 0, spec.with_name("output").read_text()
    pd.testing.assert_frame_equal(rank(read_rows(directory))[COLUMNS], rank(read_rows(finished))[COLUMNS])
    columns = ["identity", "status", "objective", "resolved"]
    one, other = (read_rows(folder)[columns].sort_values("identity", ignore_index=True) for folder in
                  (directory, finished))  # fmt: skip
    pd.testing.assert_frame_equal(one, other)


@pytest.mark.slow
def test_transductive_sweeps_learn_on_the_test_inputs_and_say_so(world: Path, finished: Path) -> None:
    studies = {"tasks": STUDIES["tasks"]}
    evaluation = {"batch_size": 16, "shards": 2, "transductive": True}
    directory = sweep(world, name="transductive", studies=studies, evaluation=evaluation)
    rows = read_rows(directory)
    flagged = rows[rows["transductive"]]
    assert flagged[["study", "split"]].to_numpy().tolist() == [["tasks", "test"]]
    before = read_rows(finished)
    [inductive] = before[(before["study"] == "tasks") & (before["split"] == "test")]["resolved"]
    assert json.loads(flagged["resolved"].item())["coefficients"] != json.loads(inductive)["coefficients"]


@ray.remote
class StandIn:
    """A host on which the objective is the learning rate, and one learning rate gives no number."""

    def learn(self, candidate: Candidate, learned: Learned, steps: int) -> Learned:
        if candidate.parameters["learning_rate"] == 0.5:
            raise FloatingPointError("the entropy is not finite in step 3")
        return replace(learned, step=learned.step + steps, loss=1.0, state={"steps": np.array(learned.step + steps)})

    def score(self, candidate: Candidate, shard: int, references: Any, learned: Learned) -> dict[str, Any]:
        assert learned.step == 60 or shard == 0
        value = candidate.parameters["learning_rate"]
        return {"objective": value, "mean": value, "normalized_mean": value, "samples": learned.step}


def test_losers_are_stopped_while_they_learn_and_a_loss_without_a_number_fails_its_row_alone(
    tmp_path: Path, ray_cluster: dict[str, Any]
) -> None:
    fingerprints = Fingerprints("bank", {"val": "data", "test": "data"}, "protocol")
    method = make_method("adamerging", {"steps": 60})
    template = Candidate.of("stand-in", "study", method, 0, "val", fingerprints)
    rates = [0.3, 0.4, 0.5, 0.6, 0.1, 0.7]
    spec = StudySpec(name="study", method="adamerging", searcher="grid", scheduler="asha", parameters={"steps": 60},
                     space={"learning_rate": rates})  # fmt: skip
    study = Study(spec, template, ["ants"], 5 + 2, {}, 2)
    pool = HostPool([StandIn.remote()], [])  # type: ignore[attr-defined]
    ledger = start_results_actor(tmp_path, f"{tmp_path.name}/results")
    try:
        run_studies([study], pool, ledger, {"ants": 1.0}, 2, tmp_path, lambda: None)
    finally:
        pool.close()
        ray.kill(ledger)
    rows = {json.loads(row["parameters"])["learning_rate"]: row for row in read_rows(tmp_path).to_dict("records")}
    ends = {rate: rows[rate]["status"] for rate in rates}
    assert ends == {0.3: "complete", 0.4: "complete", 0.5: "failed", 0.6: "complete", 0.1: "pruned", 0.7: "complete"}
    assert rows[0.5]["error"] == "FloatingPointError: the entropy is not finite in step 3"
    assert [len(rows[rate]["curve"]) for rate in (0.1, 0.3)] == [1, 7]
    assert rows[0.1]["samples"] == 12
    assert len(list((tmp_path / "learning").iterdir())) == 4

"""A sweep of a method that learns: what it leaves behind, and that a kill in the middle changes nothing of it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
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
from merge_ray.cluster.errors import cause
from merge_ray.cluster.learned import Learned
from merge_ray.cluster.ledger import start_results_actor
from merge_ray.cluster.nodes import live_nodes
from merge_ray.cluster.pool import Host, HostPool
from merge_ray.cluster.tuning import run_studies
from merge_ray.errors import LedgerError
from merge_ray.export import export_merge
from merge_ray.leaderboard import rank, read_rows
from merge_ray.methods.base import MergeInputs, make_method
from merge_ray.models import load_bank
from merge_ray.progress import Progress
from merge_ray.report import write_report
from merge_ray.spec import EvaluationSpec, HostsSpec, StudySpec
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


MAPPING = {"method": "dict_fusion", "searcher": "grid", "space": {}}
LEARNING = {"feature_extractor": "base", "granularity": "layer", "learning_rate": 0.01, "batch_size": 4}
REPORTED = {"batch_size": 16, "shards": 2, "learning_reports": 3}


@pytest.fixture(scope="module")
def mapped(world: Path, ray_cluster: dict[str, Any]) -> Path:
    studies = {
        "mapping": {**MAPPING, "parameters": {**LEARNING, "steps": 60}},
        "coefficients": {**ADAMERGING, "parameters": {"steps": 60, "batch_size": 4}},
        "by_task": {"method": "dawin", "parameters": {"level": "task"}, "searcher": "grid", "space": {}},
    }
    return sweep(world, name="mapped", studies=studies, evaluation=REPORTED)


def scores(directory: Path) -> dict[tuple[str, str], Any]:
    """By study and split, each task's score and which of its samples are right."""
    rows = read_rows(directory).to_dict("records")
    return {(row["study"], row["split"]): [(task["value"], task["correct"]) for task in row["tasks"]] for row in rows}


@pytest.fixture(scope="module")
def exported(mapped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    paths = export_merge(mapped, "mapping", folder, "safetensors", Progress())
    assert [path.name for path in paths] == ["mapping.npz", "merge.json", "sweep.yaml"]
    return folder


@pytest.fixture(scope="module")
def alone(world: Path, mapped: Path, exported: Path) -> Path:
    """A sweep on one host of what was saved in another, and of as many steps."""
    steps = {name: str(mapped / "artifacts" / name / "step-40.safetensors") for name in ("mapping", "coefficients")}
    [spec] = load_sweeps(exported / "sweep.yaml")
    studies = {
        "mapping": {**MAPPING, "parameters": {**LEARNING, "steps": 60}},
        "exported": {**MAPPING, "parameters": spec.studies["mapping"].parameters},
        "mapping_alone": {**MAPPING, "parameters": {**LEARNING, "steps": 0, "mapping": steps["mapping"]}},
        "mapping_short": {**MAPPING, "parameters": {**LEARNING, "steps": 40}},
        "coefficients_alone": {**ADAMERGING, "parameters": {"coefficients": steps["coefficients"]}},
        "coefficients_short": {**ADAMERGING, "parameters": {"steps": 40, "batch_size": 4}},
    }
    return sweep(world, name="alone", studies=studies, evaluation=REPORTED, hosts={"count": 1, "threads": 1})


def arrays(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        return {name: file[name].tolist() for name in file.files}


def test_every_saved_step_is_kept_and_evaluated_alone(mapped: Path, alone: Path) -> None:
    found = scores(alone)
    for study in ("mapping", "coefficients"):
        saved = {path.name for path in (mapped / "artifacts" / study).iterdir()}
        assert saved == {f"step-{step}{suffix}" for step in (20, 40, 60) for suffix in (".json", ".safetensors")}
        about = json.loads((mapped / "artifacts" / study / "step-40.json").read_text())
        [row] = [row for row in read_rows(mapped).to_dict("records") if (row["study"], row["split"]) == (study, "val")]
        assert (about["step"], about["loss"]) == (40, row["losses"][1])
        for split in ("val", "test"):
            assert found[f"{study}_alone", split] == found[f"{study}_short", split]
        one, other = (arrays(alone / "artifacts" / f"{study}_{name}.npz") for name in ("alone", "short"))
        for part in (one, other):
            part.pop("mapping/about", None)
        assert one == other
        assert one != {
            name: value for name, value in arrays(mapped / "artifacts" / f"{study}.npz").items() if name in one
        }


def test_the_curve_of_learning_is_in_the_ledger_and_the_report(mapped: Path) -> None:
    rows = read_rows(mapped)
    for row in rows[(rows["split"] == "val") & rows["study"].isin(["mapping", "coefficients"])].to_dict("records"):
        assert row["steps"].tolist() == [20, 40, 60]
        assert len(row["losses"]) == 3 and len(row["curve"]) == 3 + 2
    assert write_report(mapped).read_text().count("Learning of the best candidate") == 2


def test_hosts_share_the_samples_of_a_candidate_and_find_the_same(mapped: Path, alone: Path) -> None:
    found, expected = scores(alone), scores(mapped)
    for split in ("val", "test"):
        assert found["mapping", split] == expected["mapping", split] == found["exported", split]


def test_a_merge_by_sample_is_exported_as_what_makes_it(mapped: Path, exported: Path) -> None:
    about = json.loads((exported / "merge.json").read_text())
    assert about["parameters"]["mapping"] == str(exported / "mapping.npz") and about["parameters"]["steps"] == 0
    base = Path(about["sources"]["base"]["location"])
    assert about["sources"]["base"]["sha256"] == hashlib.sha256(base.read_bytes()).hexdigest()
    assert set(about["sources"]) == {"base", *(f"finetuned/{task}" for task in tiny.TASKS)}
    with pytest.raises(LedgerError, match=r"--format huggingface: dict_fusion makes weights for every sample"):
        export_merge(mapped, "mapping", exported, "huggingface", Progress())


def test_coefficients_found_for_tasks_are_exported_as_models(mapped: Path, bank: ModelBank, tmp_path: Path) -> None:
    paths = export_merge(mapped, "by_task", tmp_path, "safetensors", Progress())
    assert [path.stem for path in paths] == list(bank.tasks)
    with np.load(mapped / "artifacts" / "by_task.npz") as file:
        expected = bank.base + torch.from_numpy(file["coefficients/bees"]) @ bank.task_vectors
    torch.testing.assert_close(bank.layout.flatten(read_weights(paths[1])), expected)


@ray.remote
class Sharer:
    """A host that says which shares it was asked for, and fails on one candidate's."""

    def outcomes(self, candidate: Candidate, learned: None, share: int, shares: int) -> dict[str, Any]:
        if candidate.parameters["scaling_coefficient"] == 0.5:
            raise FloatingPointError("the merged model's logits are not finite")
        return {"share": (share, shares)}

    def score(self, candidate: Candidate, shard: None, references: None, learned: None, *shares: Any) -> dict[str, Any]:
        return {"shares": [part["share"] for part in shares]}

    def artifacts(self) -> None:
        """Only asked for by who wants them."""


def test_idle_hosts_take_their_share_of_the_last_candidates(ray_cluster: dict[str, Any]) -> None:
    fingerprints = Fingerprints("bank", {"val": "data", "test": "data"}, "protocol")

    def ask(*coefficients: float) -> list[Any]:
        methods = [make_method("task_arithmetic", {"scaling_coefficient": value}) for value in coefficients]
        asked = [Candidate.of("sweep", "study", method, 0, "test", fingerprints) for method in methods]
        make = Sharer.options  # type: ignore[attr-defined]
        pool = HostPool("sharers", HostsSpec(count=1), lambda node, room, options: make(**options).remote())
        [node] = live_nodes()
        pool.hosts += [Host(f"sharer-{index}", Sharer.remote(), node, None) for index in range(4)]  # type: ignore[attr-defined]
        pool.wait_until_ready()
        try:
            return [report for _, report, _ in pool.score_all(asked, None, lambda candidate, host: None)]
        finally:
            pool.close()

    assert ask(0.1) == [{"shares": [(share, 5) for share in range(5)]}]
    assert sorted(len(report["shares"]) for report in ask(0.1, 0.2)) == [2, 3]
    [failed] = ask(0.5)
    assert cause(failed) == "FloatingPointError: the merged model's logits are not finite"


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
    make = StandIn.options  # type: ignore[attr-defined]
    pool = HostPool("learning", HostsSpec(count=1), lambda node, room, options: make(**options).remote())
    pool.wait_until_ready()
    ledger = start_results_actor(tmp_path, f"{tmp_path.name}/results")
    try:
        evaluation, ending = EvaluationSpec(shards=2), threading.Event()
        run_studies([study], pool, ledger, {"ants": {"": 1.0}}, evaluation, tmp_path, lambda: None, ending)
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

"""A sweep on a small cluster: what it writes, what it does again, and what it refuses."""

import errno
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray
import tiny
import torch
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from merge_ray.candidate import Candidate, Fingerprints
from merge_ray.checkpoints import read_weights
from merge_ray.cluster.ledger import start_results_actor
from merge_ray.cluster.pool import HostPool
from merge_ray.cluster.tuning import run_studies
from merge_ray.errors import CheckpointError, DataError, LedgerError, MergeRayError
from merge_ray.export import export_merge
from merge_ray.leaderboard import rank, read_rows
from merge_ray.methods.base import MergeInputs, make_method
from merge_ray.models import load_bank
from merge_ray.progress import Progress
from merge_ray.results import write_durably
from merge_ray.spec import EvaluationSpec, HostsSpec, StudySpec, SweepSpec
from merge_ray.spec_files import check_spec, load_sweeps, read_yaml
from merge_ray.study import Study
from merge_ray.sweep import run_sweep

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.write_world(folder)
    return folder


def sweep(folder: Path, **changes: Any) -> Path:
    [spec] = load_sweeps(tiny.write_spec(folder, **changes))
    return run_sweep(spec, Progress())


def ledger_files(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (directory / "trials").glob("*.parquet")}


@pytest.fixture(scope="module")
def finished(world: Path, ray_cluster: dict[str, Any]) -> Path:
    return sweep(world, hosts={"count": 2})


def test_a_sweep_leaves_a_row_for_every_candidate_and_a_confirmed_leaderboard(finished: Path) -> None:
    rows = read_rows(finished)
    validation = rows[(rows["split"] == "val") & (rows["status"] == "complete")]
    counts = {"finetuned": 1, "pretrained": 1, "task_arithmetic": 3, "ties": 4, "tall_mask": 1}
    assert validation.groupby("study").size().to_dict() == counts
    assert set(pd.read_parquet(finished / "leaderboard.parquet")["study"]) == set(counts)
    assert (finished / "report.html").exists()


def test_masks_are_kept_beside_the_leaderboard_and_give_the_same_scores(world: Path, finished: Path) -> None:
    rows = read_rows(finished)
    [row] = rows[(rows["study"] == "tall_mask") & (rows["split"] == "test")].to_dict("records")
    assert set(json.loads(row["resolved"])["mask_lambda"]) == set(tiny.TASKS)
    [masks] = row["artifacts"]
    [spec] = load_sweeps(tiny.write_spec(world))
    bank, _ = load_bank(spec.models, spec.task_names, Progress())
    made = make_method("tall_mask", json.loads(row["resolved"])).merge(MergeInputs(bank))
    read = make_method("tall_mask", {"masks": str(finished / masks)}).merge(MergeInputs(bank))
    for task in tiny.TASKS:
        weights = [torch.empty_like(bank.base), torch.empty_like(bank.base)]
        made.write(task, weights[0])
        read.write(task, weights[1])
        assert weights[0].equal(weights[1]) and not weights[0].equal(bank.base)


def test_tensorboard_finds_the_curve_and_the_parameters_of_every_trial(finished: Path) -> None:
    folders = [path.parent for path in (finished / "tune").rglob("events.out.tfevents*")]
    [folder, *_] = [path for path in folders if path.name.startswith("ties-")]
    events = EventAccumulator(str(folder)).Reload()
    assert len(events.Scalars("ray/tune/objective")) == 2
    assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")


@pytest.mark.parametrize("format", ["safetensors", "huggingface", "open_clip"])
def test_the_best_merge_is_exported_and_scores_as_it_did(finished: Path, tmp_path: Path, format: str) -> None:
    paths = export_merge(finished, "ties", tmp_path, format, Progress())
    assert len(paths) == 1
    spec = check_spec(SweepSpec, read_yaml(finished / "sweep.yaml"), "sweep.yaml")
    exported = spec.models.open_family().rename(read_weights(paths[0]))
    bank, base = load_bank(spec.models, spec.task_names, Progress())
    [row] = [row for row in rank(read_rows(finished)).to_dict("records") if row["study"] == "ties"]
    merged = make_method("ties", json.loads(row["resolved"])).merge(MergeInputs(bank))
    expected = torch.empty_like(bank.base)
    merged.write("ants", expected)
    torch.testing.assert_close(bank.layout.flatten(exported), expected, rtol=0, atol=1e-6)
    assert exported["token_embedding.weight"].equal(base["token_embedding.weight"])


def test_masked_merges_are_exported_one_model_a_task(finished: Path, tmp_path: Path) -> None:
    paths = export_merge(finished, "tall_mask", tmp_path, "safetensors", Progress())
    assert [path.name for path in paths] == [f"{task}.safetensors" for task in tiny.TASKS]
    with pytest.raises(LedgerError, match="no confirmed merge of study 'tise'; did you mean 'ties'"):
        export_merge(finished, "tise", tmp_path, "safetensors", Progress())


def test_rows_hold_scores_that_agree_with_each_other(finished: Path) -> None:
    for row in read_rows(finished).to_dict("records"):
        assert row["mean"] == pytest.approx(sum(score["value"] for score in row["tasks"]) / 3)
        assert row["samples"] == 3 * 48
        assert row["objective"] == row["normalized_mean"]
        if row["study"] == "ties":
            assert len(row["curve"]) == (2 if row["split"] == "val" else 1)
            assert row["curve"][-1] == row["objective"]
            assert 0 < row["storage_ratio"] < 1
            assert row["seconds_total"] > 0 and row["peak_memory_bytes"] > 0


def test_the_confirmed_candidate_is_the_best_on_validation_data(finished: Path) -> None:
    rows = read_rows(finished)
    for study in ("task_arithmetic", "ties"):
        of_study = rows[rows["study"] == study]
        best = of_study[of_study["split"] == "val"]["objective"].max()
        [confirmed] = of_study[of_study["split"] == "test"].to_dict("records")
        same = of_study[(of_study["split"] == "val") & (of_study["parameters"] == confirmed["parameters"])]
        assert same["objective"].item() == best


def test_the_same_command_again_scores_nothing(world: Path, finished: Path) -> None:
    before, board = ledger_files(finished), rank(read_rows(finished))
    assert sweep(world) == finished
    assert ledger_files(finished) == before
    pd.testing.assert_frame_equal(rank(read_rows(finished)), board)


def test_what_is_missing_is_scored_again_with_the_same_result(world: Path, finished: Path) -> None:
    undisturbed = read_rows(finished).set_index("identity")
    for path in sorted((finished / "trials").glob("*.parquet"))[::2]:
        path.unlink()
    sweep(world)
    again = read_rows(finished).set_index("identity")
    assert sorted(again.index) == sorted(undisturbed.index)
    columns = ["parameters", "resolved", "objective", "mean", "status"]
    pd.testing.assert_frame_equal(again[columns].sort_index(), undisturbed[columns].sort_index())


def test_more_trials_add_to_the_same_ledger(world: Path, finished: Path) -> None:
    before = set(ledger_files(finished))
    study = {"searcher": "grid", "space": {"scaling_coefficient": [0.1, 0.3, 0.5, 0.7]}}
    same = {"method": "task_arithmetic", "parameters": {"scaling_coefficient": 0.1}}
    sweep(world, studies={"task_arithmetic": study, "same": same})
    assert before < set(ledger_files(finished))
    rows = read_rows(finished)
    own = rows[(rows["study"] == "task_arithmetic") & (rows["split"] == "val")]
    assert len(own) == 4
    # A candidate of two studies is scored once, and is a row of both.
    [shared] = rows[(rows["study"] == "same") & (rows["split"] == "val")].to_dict("records")
    assert shared["identity"] in set(own["identity"])
    assert shared["seconds_total"] == 0
    assert {"task_arithmetic", "same"} <= set(rank(rows)["study"])


def test_asha_stops_losers_and_says_so(world: Path, ray_cluster: dict[str, Any]) -> None:
    study = {"method": "task_arithmetic", "searcher": "random", "scheduler": "asha", "trials": 10}
    directory = sweep(world, name="asha", studies={"halved": study}, evaluation={"shards": 4, "batch_size": 16})
    rows = read_rows(directory)
    pruned = rows[rows["status"] == "pruned"]
    assert len(pruned) > 0
    assert (pruned["samples"] < 3 * 48).all()
    assert all(len(curve) < 4 for curve in pruned["curve"])


def test_a_sweep_over_pairs_merges_two_models_at_a_time(world: Path, ray_cluster: dict[str, Any]) -> None:
    studies = {
        "task_arithmetic": {"searcher": "grid", "space": {"scaling_coefficient": [0.2, 0.5]}},
        "mean": {"method": "task_arithmetic", "parameters": {"scaling_coefficient": {"ants": 1, "bees": 0, "cats": 0}}},
    }
    directory = sweep(world, name="pairs", pairs="all", studies={**studies, "mean": {**studies["mean"], "space": {}}})
    rows = read_rows(directory)
    tried = rows[(rows["study"] == "task_arithmetic") & (rows["split"] == "val")]
    pairs = [("ants", "bees"), ("ants", "cats"), ("bees", "cats")]
    assert sorted(tuple(pair) for pair in tried["pair"]) == sorted([*pairs, *pairs])
    for _, row in tried.iterrows():
        assert {score["task"] for score in row["tasks"]} == set(row["pair"])
    [own] = rows[(rows["method"] == "finetuned") & (rows["split"] == "test")]["tasks"]
    reference = {score["task"]: score["value"] for score in own}
    [merged] = rows[(rows["study"] == "mean") & (rows["split"] == "test") & (rows["pair"].map(tuple) == pairs[0])][
        "tasks"
    ]
    assert {score["task"]: score["value"] for score in merged}["ants"] == reference["ants"]
    each, table = rank(rows, by_pair=True), rank(rows)
    line = table[table["study"] == "task_arithmetic"].iloc[0]
    scores = each.loc[each["study"] == "task_arithmetic", "score"]
    assert len(scores) == 3 and line["pairs"] == "3 pairs" and line["score"] == pytest.approx(scores.mean())
    assert len(pd.read_parquet(directory / "pairs.parquet")) == len(each)


def test_another_sweep_of_the_same_name_is_refused(
    world: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merge_ray.sweep.ray_session", None)
    with pytest.raises(LedgerError, match="holds a sweep over other data; choose another name"):
        sweep(world, tasks=[{"name": name, "val_size": 20} for name in tiny.TASKS])


def test_mistakes_are_found_before_ray_starts(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merge_ray.sweep.ray_session", None)
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors"):
        sweep(world, name="broken", models={
            "architecture": str(world / "models" / "config.json"),
            "base": str(world / "models" / "nothing.safetensors"),
            "finetuned": str(world / "models" / "{task}.safetensors"),
        })  # fmt: skip
    with pytest.raises(DataError, match="ants"):
        sweep(world, name="broken", task_defaults={"parquet": str(world / "data" / "none" / "{task}.parquet")})
    state = read_weights(world / "models" / "bees.safetensors")
    name = min(state)
    save_file({**state, name: torch.full_like(state[name], torch.nan)}, world / "models" / "wasps.safetensors")
    models = {
        "architecture": str(world / "models" / "config.json"),
        "base": str(world / "models" / "base.safetensors"),
        "finetuned": {**{task: str(world / "models" / f"{task}.safetensors") for task in tiny.TASKS},
                      "bees": str(world / "models" / "wasps.safetensors")},
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=r"bees: this model cannot be merged:\n.* values are NaN or infinite"):
        sweep(world, name="broken", models=models)
    monkeypatch.setattr("merge_ray.bank.available_memory", lambda: 1000)
    with pytest.raises(
        CheckpointError, match=r"are \S+ kB in float32, and this machine has 1 kB of memory left, .*too little: hold"
    ):
        sweep(world, name="broken")


def test_more_hosts_than_cores_are_refused(world: Path, ray_cluster: dict[str, Any]) -> None:
    with pytest.raises(MergeRayError, match="3 hosts need 3 CPU cores; the cluster has 2"):
        sweep(world, name="crowded", hosts={"count": 3})


def test_a_directory_is_used_by_one_sweep_at_a_time(world: Path, finished: Path) -> None:
    import fcntl

    with (finished / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LedgerError, match="is in use by process"):
            sweep(world)


@ray.remote(max_restarts=-1, max_task_retries=2)
class StandIn:
    """A host that fails, hangs or dies on some coefficients, and makes the ledger unwritable on another."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def score(
        self, candidate: Candidate, shard: int, references: dict[str, float], learned: None = None
    ) -> dict[str, Any]:
        coefficient = candidate.parameters["scaling_coefficient"]
        if coefficient == 0.2:
            raise FloatingPointError("the merged model's logits on 'ants' are not finite")
        if coefficient == 0.5:
            raise MemoryError("cannot allocate 7 GiB")
        if coefficient == 0.6:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when there is no memory left
        if coefficient == 0.7:
            time.sleep(1000)
        if coefficient == 0.9:
            (self.directory / "trials").rename(self.directory / "elsewhere")
        return {"objective": coefficient, "mean": coefficient, "normalized_mean": coefficient, "samples": 8}


def test_a_candidate_that_names_a_file_is_another_when_its_content_changes() -> None:
    def identity(mapping: str, content: str) -> str:
        files = {"a.npz": content, "b.npz": "of another candidate"}
        fingerprints = Fingerprints("bank", {"val": "data"}, "protocol", files)
        method = make_method("dict_fusion", {"mapping": mapping, "steps": 0})
        return Candidate.of("sweep", "study", method, 0, "val", fingerprints).identity

    assert identity("a.npz", "before") != identity("a.npz", "after")
    assert identity("c.npz", "before") == identity("c.npz", "after"), "a file that it does not name"


def run_stand_in(directory: Path, coefficients: list[float], **evaluation: Any) -> None:
    fingerprints = Fingerprints("bank", {"val": "data", "test": "data"}, "protocol")
    template = Candidate.of("stand-in", "study", make_method("task_arithmetic", {}), 0, "val", fingerprints)
    space = {"scaling_coefficient": coefficients}
    spec = StudySpec(name="study", method="task_arithmetic", searcher="grid", space=space)
    study = Study(spec, template, ["ants"], 1, {}, 4)
    make = StandIn.options  # type: ignore[attr-defined]
    pool = HostPool("stand-in", HostsSpec(count=1), lambda node, room, options: make(**options).remote(directory))
    pool.wait_until_ready()
    ledger = start_results_actor(directory, f"{directory.name}/results")
    try:
        run_studies(
            [study], pool, ledger, {"ants": {"": 1.0}}, EvaluationSpec(shards=1, **evaluation), directory, lambda: None
        )
    finally:
        pool.close()
        ray.kill(ledger)


def by_coefficient(directory: Path) -> dict[float, dict[str, Any]]:
    rows: list[Any] = read_rows(directory).to_dict("records")
    return {json.loads(row["parameters"])["scaling_coefficient"]: row for row in rows}


def test_a_failed_candidate_is_a_row_and_the_rest_goes_on(tmp_path: Path, ray_cluster: dict[str, Any]) -> None:
    run_stand_in(tmp_path, [0.1, 0.2, 0.4])
    rows = by_coefficient(tmp_path)
    assert {value: row["status"] for value, row in rows.items()} == {0.1: "complete", 0.2: "failed", 0.4: "complete"}
    assert rows[0.2]["error"] == "FloatingPointError: the merged model's logits on 'ants' are not finite"


def test_a_host_without_memory_fails_its_candidate_with_that_reason(
    tmp_path: Path, ray_cluster: dict[str, Any]
) -> None:
    run_stand_in(tmp_path, [0.5, 0.6, 0.4])
    rows = by_coefficient(tmp_path)
    assert {value: row["status"] for value, row in rows.items()} == {0.5: "failed", 0.6: "failed", 0.4: "complete"}
    assert rows[0.5]["error"] == "MemoryError: cannot allocate 7 GiB"
    assert rows[0.6]["error"].startswith("its host's process was killed each time that it was tried")


def test_a_trial_that_hangs_is_ended_and_its_host_goes_on(tmp_path: Path, ray_cluster: dict[str, Any]) -> None:
    run_stand_in(tmp_path, [0.7, 0.4], trial_seconds=4)
    rows = by_coefficient(tmp_path)
    assert {value: row["status"] for value, row in rows.items()} == {0.7: "failed", 0.4: "complete"}
    assert rows[0.7]["error"] == "it took longer than the 4 s of trial_seconds"


def test_a_ledger_that_cannot_be_written_stops_the_sweep_with_the_reason(
    tmp_path: Path, ray_cluster: dict[str, Any]
) -> None:
    with pytest.raises(LedgerError, match=r"cannot write .*run the same command again to go on"):
        run_stand_in(tmp_path, [0.1, 0.9, 0.3, 0.4])
    assert len(list((tmp_path / "elsewhere").glob("*.parquet"))) == 1


def test_a_full_disk_is_told_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "row.parquet"
    path.write_bytes(b"old")

    def fill(file: Any) -> None:
        file.write(b"new")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(LedgerError, match=r"cannot write .*row\.parquet: No space left on device; run the same"):
        write_durably(path, fill)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]

"""Kill anything at any moment: the same command again completes the work, nothing lost, nothing done twice."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import tiny
from kills import killed

from merge_ray.leaderboard import rank, read_rows
from merge_ray.progress import Progress
from merge_ray.spec_files import load_sweeps
from merge_ray.sweep import run_sweep

pytestmark = pytest.mark.ray

STUDIES = {
    "task_arithmetic": {"searcher": "optuna", "trials": 10},
    "ties": {"searcher": "optuna", "scheduler": "asha", "trials": 10},
}
TWO = {"count": 2}
HARNESS = Path(__file__).parents[1] / "benchmarks" / "faults.py"
# Tests that run in the background of a script ignore Ctrl-C, and what they start does.
START = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from merge_ray.cli import main
main()
"""
COLUMNS = ["study", "parameters", "identity", "score", "mean"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.write_world(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(world: Path, ray_cluster: dict[str, Any]) -> Path:
    [spec] = load_sweeps(tiny.write_spec(world, name="undisturbed", studies=STUDIES, hosts=TWO))
    return run_sweep(spec, Progress())


def ledger_files(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (directory / "trials").glob("*.parquet")}


def same_leaderboard(directory: Path, undisturbed: Path) -> None:
    expected = rank(read_rows(undisturbed))[COLUMNS]
    pd.testing.assert_frame_equal(rank(read_rows(directory))[COLUMNS], expected)


def command(spec: Path) -> subprocess.Popen[bytes]:
    """The sweep as a user starts it, on a Ray of its own; what it says goes to ``output`` beside the spec."""
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    words = [sys.executable, "-c", START, "sweep", str(spec)]
    with spec.with_name("output").open("w") as output:
        return subprocess.Popen(words, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def test_a_killed_driver_loses_nothing_and_repeats_nothing(world: Path, undisturbed: Path) -> None:
    spec = tiny.write_spec(world, name="killed", studies=STUDIES, hosts=TWO)
    directory, rows_before_the_kill = world / "results" / "killed", random.randint(1, 16)
    process = command(spec)
    deadline = time.monotonic() + 300
    while len(ledger_files(directory)) < rows_before_the_kill and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = [item for item in psutil.Process(process.pid).children(recursive=True) if "Host" in item.name()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    acknowledged = ledger_files(directory)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, "a killed driver leaves hosts behind"
    process = command(spec)
    assert process.wait(timeout=240) == 0, spec.with_name("output").read_text()
    assert ledger_files(directory).items() >= acknowledged.items()
    same_leaderboard(directory, undisturbed)


SLOW_ACTORS = [pytest.param(actor, marks=pytest.mark.slow) for actor in ("ResultsActor", "Trainable")]


@pytest.mark.parametrize("actor", ["ModelHost", *SLOW_ACTORS])
def test_a_killed_actor_is_replaced_and_its_trial_runs_again(world: Path, undisturbed: Path, actor: str) -> None:
    [spec] = load_sweeps(tiny.write_spec(world, name=f"killed_{actor}", studies=STUDIES, hosts=TWO))
    with killed(actor, spec.directory):
        run_sweep(spec, Progress())
    assert set(read_rows(spec.directory)["status"]) <= {"complete", "pruned"}
    same_leaderboard(spec.directory, undisturbed)


def interrupt(process: subprocess.Popen[bytes], directory: Path, rows: int, times: int) -> str:
    """Press Ctrl-C so many times once there are so many rows; returns what the command said."""
    deadline = time.monotonic() + 240
    while len(ledger_files(directory)) < rows:
        assert time.monotonic() < deadline and process.poll() is None, "the sweep is over, or does nothing"
        time.sleep(0.02)
    for _ in range(times):
        # A terminal signals all processes of the group, Ray's workers among them.
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.2)
    assert process.wait(timeout=120) == 130
    return " ".join((directory.parents[1] / "output").read_text().split())


@pytest.mark.slow
def test_ctrl_c_ends_a_sweep_in_order_and_twice_at_once(world: Path, undisturbed: Path) -> None:
    spec = tiny.write_spec(world, name="interrupted", studies=STUDIES, hosts=TWO)
    directory = world / "results" / "interrupted"
    assert "goes on from there" in interrupt(command(spec), directory, rows=6, times=2)
    acknowledged = ledger_files(directory)
    said = interrupt(command(spec), directory, rows=len(acknowledged) + 2, times=1)
    assert "best on validation" in said and "goes on from there" in said
    rows = read_rows(directory)
    assert set(rows["status"]) <= {"complete", "pruned"}
    assert set(rows[rows["split"] == "test"]["study"]) == {"pretrained", "finetuned"}
    process = command(spec)
    assert process.wait(timeout=240) == 0, spec.with_name("output").read_text()
    assert ledger_files(directory).items() >= acknowledged.items()
    same_leaderboard(directory, undisturbed)


@pytest.mark.slow
def test_the_fault_harness_finds_nothing(world: Path, undisturbed: Path) -> None:
    spec = tiny.write_spec(world, name="harness", studies=STUDIES, hosts=TWO)
    words = [sys.executable, str(HARNESS), str(spec), "--rounds", "3", "--seed", str(random.randrange(1000))]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

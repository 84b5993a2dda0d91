"""A sweep joins a Ray that `ray start` started, and runs as a submitted job."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from merge_ray.leaderboard import rank, read_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RAY = str(Path(sys.executable).with_name("ray"))

METHODS = {"pretrained", "finetuned", "task_arithmetic", "ties", "tall_mask"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """A head node of its own; gives the environment that finds it."""
    port, dashboard = free_port(), free_port()
    # A folder of its own, or this cluster would be found by later tests; short, for the sockets in it.
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    environment = {
        **os.environ,
        # Ray turns tokens on by default; an address that is named explicitly has to say so, too.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef",
        "RAY_ADDRESS": f"127.0.0.1:{port}",
    }
    words = [
        RAY,
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        f"--temp-dir={folder}",
        f"--port={port}",
        f"--dashboard-port={dashboard}",
    ]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([*words, "--disable-usage-stats"], env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 90
    while subprocess.run([RAY, "status"], env=environment, capture_output=True).returncode:
        assert time.monotonic() < deadline and server.poll() is None, (folder / "log").read_text()
        time.sleep(1)
    yield {**environment, "DASHBOARD": f"http://127.0.0.1:{dashboard}"}
    server.terminate()
    server.wait(60)


def run(words: list[str], environment: dict[str, str], folder: Path) -> str:
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def confirmed(directory: Path) -> set[str]:
    return set(rank(read_rows(directory))["study"])


def test_a_sweep_joins_a_running_ray_and_leaves_it_running(head: dict[str, str], tmp_path: Path) -> None:
    spec = tiny.write_world(tmp_path)
    output = run([sys.executable, "-m", "merge_ray", "sweep", str(spec)], head, tmp_path)
    assert confirmed(tmp_path / "results" / "tiny") == METHODS
    assert "merge-ray export" in output
    assert subprocess.run([RAY, "status"], env=head, capture_output=True).returncode == 0


def test_a_sweep_runs_as_a_job(head: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results"
    folder = tmp_path / "job"
    folder.mkdir()
    monkeypatch.chdir(folder)
    tiny.write_world(Path("."), results=str(results))
    words = [RAY, "job", "submit", "--address", head["DASHBOARD"], "--working-dir", ".", "--"]
    environment = {name: value for name, value in head.items() if name != "RAY_ADDRESS"}
    # A head takes jobs a while after it answers.
    deadline = time.monotonic() + 90
    while subprocess.run([*words, "true"], env=environment, capture_output=True).returncode:
        assert time.monotonic() < deadline
        time.sleep(1)
    output = run([*words, sys.executable, "-m", "merge_ray", "sweep", "sweep.yaml"], environment, folder)
    assert "succeeded" in output
    assert confirmed(results / "tiny") == METHODS

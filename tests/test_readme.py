"""What the README shows works: its spec is valid, its commands exist, and quickstart leaves what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from merge_ray.cli import app
from merge_ray.spec_files import load_sweeps

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [text for word, text in found if word == language]


def test_the_spec_in_the_readme_is_valid(tmp_path: Path) -> None:
    [text] = blocks("yaml")
    path = tmp_path / "my_sweep.yaml"
    path.write_text(text)
    [spec] = load_sweeps(path, ["search.trials=8"])
    assert set(spec.studies) == {"task_arithmetic", "ties", "tall_mask"}
    assert spec.studies["ties"].trials == 8


def test_every_command_of_the_readme_exists_with_its_options() -> None:
    lines = re.findall(r"^(?:.*-- )?merge-ray (\S+)([^#\n]*)", "\n".join(blocks("")), flags=re.MULTILINE)
    assert {command for command, _ in lines} >= {"sweep", "validate", "export", "merge"}
    for command, rest in lines:
        output = CliRunner().invoke(app, [command, "--help"]).output
        for option in re.findall(r"--[a-z-]+", rest):
            # A method's parameters are options of their own.
            assert option in output or (command == "merge" and option == "--density"), f"{command} {option}"


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^make (\S+)", "\n".join(blocks("")), flags=re.MULTILINE)) <= targets


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.readme
def test_quickstart_ends_with_a_leaderboard_that_the_readme_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_dir: Any
) -> None:
    words = [sys.executable, "-m", "merge_ray", "sweep", str(ROOT / "sweeps" / "quickstart.yaml")]
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "results/quickstart/leaderboard.parquet" in done.stdout
    monkeypatch.chdir(tmp_path)
    [_, snippet] = blocks("python")
    board: dict[str, Any] = {}
    exec(snippet.replace("pd.read_parquet", "board = pd.read_parquet"), board)
    assert board["board"]["score"].notna().all()

"""The commands as a user types them, on the tiny world, without Ray."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional
from typer.testing import CliRunner

from merge_ray.checkpoints import read_metadata
from merge_ray.cli import app, main
from merge_ray.errors import MergeRayError
from merge_ray.families import find_family
from merge_ray.families.taskonomy import TaskonomyFamily

runner = CliRunner()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.write_models(folder)
    return folder


def run(*words: str | Path) -> str:
    result = runner.invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def finetuned(models: Path) -> list[str]:
    return [f"{task}={models / task}.safetensors" for task in tiny.TASKS]


def test_merge_writes_the_merged_weights_with_their_origin(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged.safetensors"
    base = models / "base.safetensors"
    run("merge", "ties", "--base", base, "--finetuned", *finetuned(models), "--density", "0.2", "-o", output)
    merged, original = load_file(output), load_file(base)
    assert set(merged) == set(original)
    changed = [name for name in merged if not merged[name].equal(original[name])]
    assert changed and all(name.startswith("visual.") for name in changed)
    metadata = read_metadata(output)
    assert metadata["method"] == "ties"
    assert json.loads(metadata["parameters"])["density"] == 0.2


def test_merge_says_which_parameter_is_unknown(models: Path, tmp_path: Path) -> None:
    with pytest.raises(MergeRayError, match="ties has no parameter 'densty'; did you mean 'density'"):
        words = ["--base", str(models / "base.safetensors"), "--finetuned", *finetuned(models)]
        run("merge", "ties", *words, "--densty", "0.2", "-o", tmp_path / "merged.safetensors")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--finetuned", "just-a-file"], "write TASK=LOCATION"),
        (["--finetuned", "a=b", "--density"], "--density needs a value"),
    ],
)
def test_merge_says_what_is_wrong_with_its_words(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises(MergeRayError, match=said):
        run("merge", "ties", "--base", "base", "-o", tmp_path / "merged.safetensors", *words)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    family = find_family("taskonomy", "slim")
    assert isinstance(family, TaskonomyFamily)
    for seed, task in enumerate(("edges", "normal")):
        torch.manual_seed(seed)
        save_file(family.encoder().state_dict(), folder / f"{task}.safetensors")
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{task}.png")
    return folder


def test_merge_matches_channels_of_models_without_a_base(encoders: Path, tmp_path: Path) -> None:
    models = [f"{task}={encoders / task}.safetensors" for task in ("edges", "normal")]
    known: list[str | Path] = ["--family", "taskonomy", "--architecture", "slim"]
    output = tmp_path / "{task}.safetensors"
    run("merge", "git_rebasin", *known, "--finetuned", *models, "-o", output)
    merged = {task: load_file(tmp_path / f"{task}.safetensors") for task in ("edges", "normal")}
    assert set(merged["edges"]) == set(load_file(encoders / "edges.safetensors"))
    differ = {name for name in merged["edges"] if not merged["edges"][name].equal(merged["normal"][name])}
    assert differ and all(name.startswith("compress") for name in differ)
    images: list[str | Path] = ["--images", encoders, "--image-count", "2"]
    words: list[str | Path] = [*known, "--finetuned", *models, "--a", "0.3"]
    run("merge", "zipit", *words, *images, "-o", tmp_path / "zipped.safetensors", "--task", "normal")
    zipped = load_file(tmp_path / "zipped.safetensors")
    assert json.loads(read_metadata(tmp_path / "zipped.safetensors")["parameters"])["a"] == 0.3
    shown = torch.from_numpy(np.stack([np.asarray(Image.open(encoders / f"{t}.png")) for t in ("edges", "normal")]))
    channels = functional.conv2d(
        functional.pad(shown.movedim(3, 1) / 127.5 - 1, [3] * 4), zipped["conv1.weight"], stride=2
    )
    torch.testing.assert_close(zipped["bn1.running_mean"], channels.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    with pytest.raises(MergeRayError, match="this merge needs 'calibration' data"):
        run("merge", "zipit", *words, "-o", output)


def test_merge_says_what_matching_needs(tmp_path: Path) -> None:
    words: list[str | Path] = ["--finetuned", "a=a.pt", "b=b.pt", "-o", tmp_path / "merged.safetensors"]
    with pytest.raises(MergeRayError, match="zipit: to match channels, name the models' --family and --architecture"):
        run("merge", "zipit", *words)
    with pytest.raises(MergeRayError, match="--base: name the model that the others were fine-tuned from"):
        run("merge", "ties", *words)


def test_methods_teaches_every_method_and_one_in_full() -> None:
    listed = run("methods")
    for name in ("weight_average", "task_arithmetic", "ties", "tall_mask", "consensus", "magnitude_mask"):
        assert name in listed
    one = run("methods", "ties")
    assert "density" in one and "task_arithmetic" not in one and "elect" in one.lower()


def test_validate_names_the_tasks_and_searches(tmp_path: Path) -> None:
    tiny.write_models(tmp_path / "models")
    output = run("validate", tiny.write_spec(tmp_path), "--set", "name=renamed")
    assert "valid renamed: 3 tasks; studies: task_arithmetic (grid), ties (optuna)" in output.replace("\n", "")


def test_a_mistake_ends_in_one_message_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["merge-ray", "validate", str(tmp_path / "none.yaml")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "No such file or directory" in " ".join(capsys.readouterr().err.split())


def test_every_command_explains_itself() -> None:
    commands = ("sweep", "validate", "methods", "merge", "export", "leaderboard", "report", "finetune")
    for command in commands:
        assert "Usage:" in run(command, "--help")

"""Specs, merges and sweeps whose models, data and saved parts lie on S3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from s3_server import SECRETS, S3Server, s3_process, s3_server
from safetensors.torch import save_file
from tiny import TASKS, write_models, write_world
from typer.testing import CliRunner

from merge_ray.checkpoints import read_weights
from merge_ray.cli import app
from merge_ray.errors import CheckpointError, SpecError
from merge_ray.families import find_family
from merge_ray.leaderboard import read_rows
from merge_ray.merging import merge
from merge_ray.methods.adamerging import read_coefficients
from merge_ray.methods.coding import Codings, read_mapping
from merge_ray.methods.masking import MASK, read_masks
from merge_ray.progress import Progress
from merge_ray.relatedness import RelatednessSpec
from merge_ray.results import results_at
from merge_ray.s3 import client
from merge_ray.spec import SweepSpec
from merge_ray.spec_files import load_spec, load_sweeps
from merge_ray.sweep import run_sweep

__all__ = ["s3_process", "s3_server"]


@pytest.fixture
def bucket(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """A server with an empty bucket ``world``; the cache is empty."""
    client().create_bucket(Bucket="world", ACL="public-read")
    monkeypatch.setenv("MERGE_RAY_CACHE", str(tmp_path / "cache"))
    return s3_server


def upload(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            key, public = str(path.relative_to(folder)), {"ACL": "public-read"}
            client().upload_file(str(path), "world", key, ExtraArgs=public)


def remote_spec(folder: Path, **changes: Any) -> Path:
    """The tiny world's spec, its models and data in the bucket."""
    path = write_world(folder, **changes)
    upload(folder)
    raw = yaml.safe_load(path.read_text().replace(str(folder), "s3://world"))
    path.write_text(yaml.safe_dump({**raw, "results": str(folder / "results")}))
    return path


def test_merging_models_on_s3(bucket: S3Server, tmp_path: Path) -> None:
    write_models(tmp_path / "models", TASKS[:2])
    upload(tmp_path)
    places = {task: f"s3://world/models/{task}.safetensors" for task in TASKS[:2]}
    result = merge("task_arithmetic", base="s3://world/models/base.safetensors", finetuned=places)
    local = {task: tmp_path / "models" / f"{task}.safetensors" for task in places}
    expected = merge("task_arithmetic", base=tmp_path / "models" / "base.safetensors", finetuned=local)
    assert torch.equal(result.flat(), expected.flat())
    words = [
        "merge",
        "ties",
        "--base",
        "s3://world/models/base.safetensors",
        "-o",
        str(tmp_path / "merged.safetensors"),
    ]
    run = CliRunner().invoke(app, [*words, "--finetuned", *(f"{task}={place}" for task, place in places.items())])
    assert run.exit_code == 0 and read_weights(tmp_path / "merged.safetensors")
    assert b"s3://world/models/ants.safetensors" in (tmp_path / "merged.safetensors").read_bytes()


def test_the_text_tower_is_not_fetched_for_the_image_encoder(bucket: S3Server, tmp_path: Path) -> None:
    write_models(tmp_path)
    upload(tmp_path)
    family: Any = find_family("clip", "s3://world/config.json")
    state = read_weights("s3://world/base.safetensors", family.is_of_encoder)
    assert set(state) == set(family.tower(read_weights("s3://world/base.safetensors")))


def test_saved_parts_on_s3(bucket: S3Server, tmp_path: Path) -> None:
    write_models(tmp_path, TASKS[:2])
    models = {task: tmp_path / f"{task}.safetensors" for task in TASKS[:2]}
    masked = merge("tall_mask", base=tmp_path / "base.safetensors", finetuned=models, mask_lambda=0.4)
    arrays: dict[str, Any] = dict(masked.artifacts())
    np.savez(tmp_path / "masks.npz", **arrays)
    rows = {f"coefficient/{task}": torch.full((2,), 0.25) for task in models}
    save_file(rows, tmp_path / "coefficients.safetensors")
    (tmp_path / "coefficients.json").write_text('{"layers": ["a", "b"]}')
    save_file(rows, tmp_path / "alone.safetensors")
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    torch.save(network, tmp_path / "mapping.pt")
    (tmp_path / "mapping.json").write_text('{"tasks": ["bees", "ants"]}')
    upload(tmp_path)
    mapping = read_mapping("s3://world/mapping.pt", 4, "extractor", Codings(TASKS[:2], None))
    assert torch.equal(mapping(torch.ones(4)), network(torch.ones(4)).flip(0))
    masks = read_masks("s3://world/masks.npz", masked.bank)
    assert all((masks[task] == masked.artifacts()[MASK + task]).all() for task in models)
    assert read_coefficients("s3://world/coefficients.safetensors")[1] == ("a", "b")
    given, layers = read_coefficients("s3://world/alone.safetensors")
    assert layers is None and given["ants"].tolist() == [0.25, 0.25]
    with pytest.raises(CheckpointError, match=r"the nearest name is 'masks.npz'"):
        read_masks("s3://world/mask.npz", masked.bank)


def test_the_block_of_a_spec_holds_while_it_is_checked(
    bucket: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = remote_spec(tmp_path, s3={"endpoint": bucket.endpoint, "region": "us-east-1"})
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    [spec] = load_sweeps(path)
    assert spec.s3.endpoint == bucket.endpoint
    assert spec.s3.environment() == {"AWS_ENDPOINT_URL_S3": bucket.endpoint, "AWS_REGION": "us-east-1"}
    # Results that have one name at two endpoints have two copies.
    there = spec.model_copy(update={"results": "s3://world/results"})
    with spec.s3.applied():
        assert there.directory == results_at("s3://world/results/tiny").directory
    assert there.directory != results_at("s3://world/results/tiny").directory
    for changes, message in {
        ("s3.endpoint=localhost:9000",): r"s3: endpoint: an address http://host\[:port\]",
        ("s3.regoin=x",): r"s3.regoin: unknown key; did you mean 'region'\?",
        ("s3.endpoint=http://me:secret@localhost",): "s3.endpoint: an address with credentials in it",
        ("models.base=s3://AKIDX:secret@world/base.pt",): "models.base: an address with credentials in it",
        ("models.architecture=s3://world/models/confg.json",): "the nearest name is 'config.json'",
    }.items():
        with pytest.raises(SpecError, match=message) as raised:
            load_sweeps(path, changes)
        assert "secret" not in str(raised.value)


def test_relatedness_specs_have_the_block_too(bucket: S3Server, tmp_path: Path) -> None:
    write_models(tmp_path)
    upload(tmp_path)
    raw = {
        "name": "related",
        "architecture": "s3://world/config.json",
        "models": {task: f"s3://world/{task}.safetensors" for task in TASKS},
        "samples": {"tasks": ["digits"]},
        "s3": {"endpoint": bucket.endpoint},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(raw))
    assert load_spec(RelatednessSpec, tmp_path / "spec.yaml").s3.endpoint == bucket.endpoint


def test_folders_of_files_stay_on_this_machine(tmp_path: Path) -> None:
    raw = {"name": "x", "models": {}, "studies": {}, "tasks": [{"name": "t", "image_folder": "s3://world/images"}]}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(SpecError, match=r"s3://world/images.*are read from a directory on this machine"):
        load_sweeps(tmp_path / "spec.yaml")


@pytest.mark.ray
def test_a_sweep_over_s3(
    bucket: S3Server, tmp_path: Path, ray_cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hosts were given no environment: what they know of S3 is the spec's block."""
    settings = {"endpoint": bucket.endpoint, "region": "us-east-1", "anonymous": True}
    studies = {"task_arithmetic": {"searcher": "grid", "space": {"scaling_coefficient": [0.1, 0.3]}}}
    path = remote_spec(tmp_path, s3=settings, studies=studies, hosts={"count": 1})
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    [spec] = load_sweeps(path)
    assert isinstance(spec, SweepSpec)
    with Progress() as progress:
        directory = run_sweep(spec, progress)
    rows = read_rows(directory)
    assert set(rows["status"]) == {"complete"} and {"pretrained", "finetuned", "task_arithmetic"} <= set(rows["study"])
    for written in directory.rglob("*"):
        if written.is_file():
            assert not any(secret.encode() in written.read_bytes() for secret in SECRETS.values())

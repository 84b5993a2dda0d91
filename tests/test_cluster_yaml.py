"""The cluster files are what `ray up` accepts, and agree with the rest of the project."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent
GPU_INSTANCES = re.compile(r"^(g4dn|g5|g6|g6e|p3|p4d|p4de|p5|p5e)\.")


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return loaded


def fill(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` does first: fill in its defaults, then validate the whole."""
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    filled: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(filled)
    return filled


@pytest.fixture
def config() -> dict[str, Any]:
    return load("cluster.yaml")


def test_ray_accepts_the_file_for_aws(config: dict[str, Any]) -> None:
    workers = fill(config)["available_node_types"]["gpu_worker"]
    assert (workers["min_workers"], workers["max_workers"]) == (0, config["max_workers"])


def test_ray_accepts_the_file_for_machines_that_are_there() -> None:
    config = load("cluster-local.yaml")
    [(_, nodes)] = fill(config)["available_node_types"].items()
    assert nodes["min_workers"] == nodes["max_workers"] == len(config["provider"]["worker_ips"])


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster-local.yaml"])
def test_every_node_has_the_token_and_must_use_it(name: str) -> None:
    config = load(name)
    assert [source for source in config["file_mounts"].values() if source != "."] == ["~/.ray/auth_token"]
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        *_, start = config[commands]
        assert start.startswith("RAY_AUTH_MODE=token ") and "ray start " in start


def test_a_misspelt_key_would_be_noticed(config: dict[str, Any]) -> None:
    config["idle_timeout_minuts"] = 5
    with pytest.raises(jsonschema.ValidationError, match="'idle_timeout_minuts' was unexpected"):
        validate_config(prepare_config(config))


def test_the_head_has_no_gpu_and_the_workers_have(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert not GPU_INSTANCES.match(head["node_config"]["InstanceType"])
    assert all(GPU_INSTANCES.match(worker["node_config"]["InstanceType"]) for worker in types.values())
    assert sum(worker["max_workers"] for worker in types.values()) <= config["max_workers"]


def test_the_images_have_the_ray_of_the_constraints(config: dict[str, Any]) -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned
    images = [config["docker"][name] for name in ("head_image", "worker_image")]
    assert all(image.startswith(f"rayproject/ray:{pinned[1]}-py311") for image in images)


def test_what_it_mounts_and_installs_is_there(config: dict[str, Any]) -> None:
    [target] = [target for target, source in config["file_mounts"].items() if source == "."]
    setup = config["setup_commands"][0]
    assert f"cd {target} " in setup
    assert "constraints.txt" in setup and (ROOT / "constraints.txt").exists()

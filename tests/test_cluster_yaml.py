"""cluster.yaml is what `ray up` accepts, and agrees with the rest of the project."""

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


@pytest.fixture
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


def test_ray_accepts_the_file(config: dict[str, Any]) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    # What `ray up` does first: fill in its defaults, then validate the whole.
    filled = prepare_config(copy.deepcopy(config))
    validate_config(filled)
    assert filled["available_node_types"]["gpu_worker"]["min_workers"] == 2


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
    (target, source), *others = config["file_mounts"].items()
    assert (source, others) == (".", [])
    setup = config["setup_commands"][0]
    assert f"cd {target} " in setup
    assert "constraints.txt" in setup and (ROOT / "constraints.txt").exists()

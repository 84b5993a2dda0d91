"""The Taskonomy networks that ship with the package: small, better than the label average, made again by their spec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from merge_ray.checkpoints import open_location, read_metadata, read_weights
from merge_ray.families.taskonomy import TaskonomyFamily
from merge_ray.families.taskonomy_network import TaskonomyNetwork
from merge_ray.finetune import FinetuneSpec, read_result
from merge_ray.progress import Progress
from merge_ray.spec_files import load_spec, load_sweeps
from merge_ray.tasks import cache_directory, open_task

SWEEPS = Path(__file__).parent.parent / "sweeps"
MEGABYTE = 1_000_000
SAMPLES = 60


@pytest.fixture(scope="module")
def spec() -> FinetuneSpec:
    return load_spec(FinetuneSpec, SWEEPS / "quickstart_taskonomy_models.yaml")


def shipped(task: str) -> str:
    return f"builtin:quickstart_taskonomy/{task}.safetensors"


def test_the_shipped_files_are_small_and_those_of_both_specs(spec: FinetuneSpec) -> None:
    [sweep] = load_sweeps(SWEEPS / "quickstart_taskonomy.yaml")
    names = [task.name for task in spec.tasks]
    assert [task.name for task in sweep.tasks] == names
    assert sweep.models.finetuned == sweep.models.heads == shipped("{task}")
    paths = [open_location(shipped(name)) for name in names]
    assert sum(path.stat().st_size for path in paths) <= 4 * MEGABYTE
    for name in names:
        tensors = read_weights(shipped(name)).values()
        assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float16}


@torch.inference_mode()
def test_every_network_is_clearly_better_than_the_label_average(spec: FinetuneSpec) -> None:
    family = TaskonomyFamily(spec.architecture)
    for task in spec.tasks:
        opened, state = open_task(task), read_weights(shipped(task.name))
        split = family.open_split(opened, "test", cache_directory())
        data = family.task_data(split, family.read_head(opened, state), torch.device("cpu"), SAMPLES)
        network = TaskonomyNetwork(family.encoder(), family.decoder(task.name)).eval()
        network.load_state_dict(state)
        positions = np.arange(len(data))
        own, _ = data.score(data.outcomes_of(network(data.inputs(positions)), positions).numpy())
        average, _ = data.score(data.average_outcomes(SAMPLES))
        assert own < 0.6 * average, task.name


@pytest.mark.slow
@pytest.mark.ray
def test_the_spec_makes_the_shipped_networks_again(spec: FinetuneSpec, tmp_path: Path, ray_cluster: Any) -> None:
    from merge_ray.cluster.training import run_finetune

    again = spec.model_copy(update={"output": tmp_path})
    run_finetune(again, 1, Progress(Console(quiet=True)))
    # Other processors and libraries round differently, and training amplifies it.
    for task in spec.tasks:
        before = json.loads(read_metadata(open_location(shipped(task.name)))["result"])
        assert read_result(again, task.name).after == pytest.approx(before["after"], rel=0.15)

"""The Taskonomy family: reading weights, answering through a task's decoder, losses by building."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from merge_ray.bank import Layout
from merge_ray.checkpoints import read_weights
from merge_ray.errors import CheckpointError, SpecError
from merge_ray.families import find_family
from merge_ray.families.taskonomy import (
    MERGING_TASKS,
    RELATEDNESS_TASKS,
    SceneData,
    TaskonomyFamily,
    TaskonomySkeleton,
)
from merge_ray.families.taskonomy_network import TaskonomyNetwork
from merge_ray.tasks import Task, TaskSpec, open_task
from merge_ray.tasks.taskonomy_labels import TASK_LAYERS


@pytest.fixture
def family() -> TaskonomyFamily:
    found = find_family("taskonomy", "slim")
    assert isinstance(found, TaskonomyFamily)
    return found


def network(family: TaskonomyFamily, task: str) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return TaskonomyNetwork(family.encoder(), family.decoder(task)).state_dict()


def skeleton(family: TaskonomyFamily, state: dict[str, Tensor]) -> TaskonomySkeleton:
    encoder = family.rename(state)
    layout = Layout.of(encoder)
    made = family.assemble(layout, {}, "cpu")
    layout.flatten(encoder, made.flat)
    assert isinstance(made, TaskonomySkeleton)
    return made


def open_rooms(name: str, **settings: Any) -> Task:
    spec = {"name": name, "taskonomy": "builtin:rooms", "buildings": {"val": ["maple", "oak"]}, "val_size": 30}
    return open_task(TaskSpec.model_validate(spec | settings))


def scenes(family: TaskonomyFamily, name: str, cache: Path, state: dict[str, Tensor]) -> SceneData:
    task = open_rooms(name)
    split = family.open_split(task, "val", cache)
    return family.task_data(split, family.read_head(task, state), torch.device("cpu"), 20)


@pytest.mark.parametrize("name", ["normal", "segment_semantic", "denoising"])
def test_answers_and_losses(family: TaskonomyFamily, name: str, tmp_path: Path) -> None:
    state = network(family, name)
    data, made = scenes(family, name, tmp_path, state), skeleton(family, state)
    whole = TaskonomyNetwork(family.encoder(), family.decoder(name))
    whole.load_state_dict(state)
    with torch.inference_mode():
        wanted = whole.eval()(data.inputs(slice(0, 4)))
        torch.testing.assert_close(data.logits(made, data.inputs(slice(0, 4))), wanted)
        outcomes = torch.cat([data.outcomes(made, slice(0, 12)), data.outcomes(made, np.arange(12, 20))]).numpy()
    losses = data.losses(outcomes)
    assert set(losses) == {"maple", "oak"} and data.metric == "loss"
    value, error = data.score(outcomes)
    assert value == pytest.approx(np.mean([loss for loss, _ in losses.values()])) and 0 <= error < value
    average = data.average_outcomes(8)
    own = data.domains(outcomes)
    # Shares are of the label average over all samples; these outcomes are of all 20.
    assert data.normalize(average, own)[0] == pytest.approx(0, abs=1e-6)
    assert data.normalize(outcomes, own)[0] == pytest.approx(1)
    data.average = 8, True
    assert data.normalize(average, own)[0] != pytest.approx(0, abs=1e-6)
    assert data.normalize(data.average_outcomes(8, released=True), own)[0] == pytest.approx(0, abs=1e-6)


def test_average_label_is_of_each_building(family: TaskonomyFamily, tmp_path: Path) -> None:
    data = scenes(family, "normal", tmp_path, network(family, "normal"))
    rows = np.flatnonzero(data.labels.numpy() == 0)
    batch = data.split.batch(data.order[rows])
    assert batch.weights is not None
    errors = (batch.targets - batch.targets.mean(dim=0)).abs()
    wanted = (errors * batch.weights).sum() / batch.weights.expand_as(errors).sum()
    assert data.losses(data.average_outcomes(7))["maple"][0] == pytest.approx(float(wanted), rel=1e-5)
    # The released code's average is the last batch's share of the sum: nearer to zero, so another loss.
    assert data.losses(data.average_outcomes(7, released=True))["maple"][0] != pytest.approx(float(wanted), rel=1e-2)


def test_batch_norm_statistics_live_in_the_flat_buffer(family: TaskonomyFamily, tmp_path: Path) -> None:
    state = network(family, "normal")
    data, made = scenes(family, "normal", tmp_path, state), skeleton(family, state)
    images = data.inputs(slice(0, 8))
    before = made.flat.clone()
    with torch.no_grad():
        answers = data.logits(made, images)
        whole = data.network(made).train()
        whole(images)
        whole.eval()
    changed = made.layout.views(made.flat != before)
    assert {name for name, view in changed.items() if view.any()} == {name for name in changed if "running" in name}
    made.flat.copy_(before)
    assert not torch.equal(data.logits(made, images), answers)
    data.restore()
    assert torch.equal(data.logits(made, images), answers)


def test_official_files(family: TaskonomyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = network(family, "normal")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for part in ("encoder", "decoder"):
        tensors = {name.removeprefix(f"{part}."): tensor for name, tensor in state.items() if name.startswith(part)}
        torch.save({"state_dict": tensors, "epoch": 1}, folder / f"normal_{part}-f5e2c7ba.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    encoder = family.rename(read_weights("torchhub:normal_encoder-*.pth"))
    assert all(torch.equal(tensor, state[f"encoder.{name}"]) for name, tensor in encoder.items())
    head = family.read_head(open_rooms("normal"), read_weights(str(folder / "normal_decoder-f5e2c7ba.pth")))
    assert torch.equal(head, family.read_head(open_rooms("normal"), state))
    with pytest.raises(CheckpointError, match="matches no file, where one file is meant"):
        read_weights("torchhub:reshading_encoder-*.pth")
    with pytest.raises(CheckpointError, match=r"matches normal_decoder-f5e2c7ba[.]pth, normal_encoder-"):
        read_weights(f"{folder}/normal_*.pth")


def test_what_does_not_fit(family: TaskonomyFamily) -> None:
    with pytest.raises(SpecError, match="no Taskonomy network is called 'fulll'; did you mean 'full'"):
        find_family("taskonomy", "fulll")
    with pytest.raises(CheckpointError, match=r"decoder_output.0.weight is \(3, 8, 3, 3\), the architecture has \(17"):
        family.read_head(open_rooms("segment_semantic"), network(family, "normal"))


def test_the_papers_tasks() -> None:
    assert len(MERGING_TASKS) == 12 and len(RELATEDNESS_TASKS) == 17
    assert set(MERGING_TASKS) <= set(TASK_LAYERS) and set(MERGING_TASKS) <= set(RELATEDNESS_TASKS)

"""Scenes of Taskonomy's tasks: files on a disk and rendered rooms, prepared once for all tasks."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from merge_ray.errors import DataError
from merge_ray.tasks import SceneSplit, Task, TaskSpec, open_task, overlap, prepare_scenes
from merge_ray.tasks.builtin.rooms import BALL, BOX, FLOOR, OCCLUSION_JUMP, SIZE, UNITS_PER_METRE, VIEW, render_building
from merge_ray.tasks.taskonomy_labels import IMAGE

COUNT = 12
FOLDERS = ("rgb", "depth_zbuffer", "normal", "segment_semantic")
BUILDINGS = {"train": ["ihlen"], "val": ["mcdade"], "test": ["muleshoe"]}


@pytest.fixture(scope="module")
def rooms() -> dict[str, np.ndarray]:
    return render_building("ihlen", COUNT)


@pytest.fixture
def data(tmp_path: Path, rooms: dict[str, np.ndarray]) -> Path:
    for building in ("ihlen", "mcdade", "muleshoe"):
        for folder in FOLDERS:
            directory = tmp_path / "data" / building / folder
            directory.mkdir(parents=True)
            for index in range(3):
                file = f"point_{9 * index}_view_{index}_domain_{folder}.png"
                Image.fromarray(rooms[folder][index]).save(directory / file)
    return tmp_path / "data"


def task(data: Path | str, name: str = "normal", **settings: Any) -> Task:
    spec = {"name": name, "taskonomy": str(data), **({} if data == "builtin:rooms" else {"buildings": BUILDINGS})}
    return open_task(TaskSpec.model_validate(spec | settings))


def prepare(task: Task, split: str, cache: Path, size: int = SIZE, **options: Any) -> SceneSplit:
    return prepare_scenes(task, split, size, cache, **options)


def test_rooms_are_consistent(rooms: dict[str, np.ndarray]) -> None:
    again = render_building("ihlen", COUNT)
    assert all(np.array_equal(again[folder], images) for folder, images in rooms.items())
    classes, normals = rooms["segment_semantic"], rooms["normal"] / 127.5 - 1
    assert set(np.unique(classes)) <= set(range(1, 7))
    assert {BALL, BOX, FLOOR} <= set(np.unique(classes))
    assert np.abs(np.linalg.norm(normals, axis=-1) - 1).max() < 0.02
    depth = rooms["depth_zbuffer"] / UNITS_PER_METRE
    steps = ((np.arange(SIZE) + 0.5) / SIZE * 2 - 1) * VIEW
    length = np.sqrt(1 + steps**2 + steps[:, None] ** 2)
    assert np.abs(rooms["depth_euclidean"] / UNITS_PER_METRE - depth * length).max() < 0.01
    # A floor is a plane: its points, seen from the camera, lie on one that has the floor's normal.
    floor = classes[0] == FLOOR
    points = np.stack([steps * depth[0], -steps[:, None] * depth[0], -depth[0]], axis=-1)[floor]
    heights = points @ normals[0][floor].mean(axis=0)
    assert np.ptp(heights) < 0.05
    # Beyond an occlusion edge lies something that is farther away.
    edges = np.argwhere(rooms["edge_occlusion"] > 0)
    assert len(edges) > COUNT
    padded = np.pad(depth, ((0, 0), (1, 1), (1, 1)), mode="edge")
    for index, row, column in edges:
        around = padded[index, row : row + 3, column : column + 3]
        assert around.max() > depth[index, row, column] * (1 + OCCLUSION_JUMP) - 0.01


def test_scenes_from_files(data: Path, rooms: dict[str, np.ndarray], tmp_path: Path) -> None:
    opened = task(data)
    split = prepare(opened, "val", tmp_path / "cache")
    assert opened.splits == ("train", "val", "test")
    assert [split.classes[label] for label in split.labels] == ["mcdade"] * 3
    batch = split.batch(np.array([2, 0]))
    assert batch.weights is not None and batch.weights.shape == (2, 1, SIZE, SIZE)
    wanted = torch.from_numpy(rooms["rgb"][[2, 0]] / 127.5 - 1).permute(0, 3, 1, 2).float()
    assert torch.allclose(batch.images, wanted, atol=1e-6)
    assert torch.allclose(
        batch.targets[0], torch.from_numpy(rooms["normal"][2] / 127.5 - 1).permute(2, 0, 1).float(), atol=1e-3
    )
    again = pickle.loads(pickle.dumps(split))
    assert again.fingerprint == split.fingerprint and torch.equal(
        again.batch(np.array([1])).images, split.batch(np.array([1])).images
    )
    assert prepare(opened, "val", tmp_path / "cache", size=32).layers[IMAGE].shape == (3, 3, 32, 32)


def test_images_are_kept_once_for_all_tasks(data: Path, tmp_path: Path) -> None:
    first, second = (prepare(task(data, name), "val", tmp_path / "cache") for name in ("normal", "segment_semantic"))
    assert first.layers[IMAGE].filename == second.layers[IMAGE].filename
    assert first.fingerprint != second.fingerprint
    # The buildings of this test hold the same images.
    assert overlap(first, prepare(task(data), "test", tmp_path / "cache")) == 3


def test_images_alone(data: Path, tmp_path: Path) -> None:
    for folder in FOLDERS[1:]:
        for file in (data / "ihlen" / folder).iterdir():
            file.unlink()
    split = prepare(task(data), "train", tmp_path / "cache", labels=False)
    assert list(split.layers) == [IMAGE] and len(split) == 3


def test_rooms_as_a_task(tmp_path: Path) -> None:
    opened = task("builtin:rooms", "edge_occlusion", val_size=8, buildings={"val": ["oak"], "test": ["rowan"]})
    split = prepare(opened, "val", tmp_path)
    assert len(split) == 8 and opened.classes == ["oak", "rowan"]
    with pytest.raises(DataError, match="builtin:rooms has no data for 'keypoints2d'"):
        prepare(task("builtin:rooms", "keypoints2d", val_size=8, buildings={"val": ["oak"]}), "val", tmp_path)
    with pytest.raises(DataError, match=r"has no val building 'oka'; did you mean 'oak'"):
        task("builtin:rooms", buildings={"val": ["oka"]})


def test_unusable_data(data: Path, tmp_path: Path) -> None:
    def message(opened: Task, split: str = "val") -> str:
        with pytest.raises(DataError) as raised:
            prepare(opened, split, tmp_path / "cache")
        return str(raised.value)

    with pytest.raises(DataError, match="no directory at nowhere"):
        task("nowhere")
    with pytest.raises(DataError, match="buildings named twice: ihlen"):
        task(data, buildings={"val": ["ihlen"], "test": ["ihlen"]})
    assert "no data of the building 'mcdad'" in message(task(data, buildings={"val": ["mcdad"]}))
    assert "building 'mcdade' has no data for 'edge_texture'; Valid:" in message(task(data, "edge_texture"))
    assert "no labels are known for the task 'norml'; did you mean 'normal'" in message(task(data, "norml"))
    grey = data / "muleshoe" / "normal" / "point_9_view_1_domain_normal.png"
    Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save(grey)
    assert "muleshoe, point_9_view_1: normal is an 8-bit RGB image; found uint8" in message(task(data), "test")
    grey.write_bytes(b"nothing")
    assert "cannot be read" in message(task(data), "test")
    grey.unlink()
    assert "has no file for point_9_view_1, which is in rgb" in message(task(data), "test")

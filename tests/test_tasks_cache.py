"""The decoded-image cache: the pixels that CLIP sees, written once and whole, and clear errors."""

import os
import pickle
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from merge_ray.errors import DataError
from merge_ray.tasks import Task, TaskSpec, open_task, overlap


def write_image(path: Path, size: tuple[int, int] = (9, 7), mode: str = "RGB", seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, six training and four test images of odd sizes; one test image is also in train."""
    root = tmp_path / "pets"
    for index in range(6):
        write_image(root / "train" / ("cat", "dog")[index % 2] / f"{index}.png", (9 + index, 14 - index), seed=index)
    for index in range(3):
        write_image(root / "test" / ("cat", "dog")[index % 2] / f"{index}.png", seed=100 + index)
    write_image(root / "test" / "dog" / "again.png", (9, 14), seed=0)
    return root


def open_folder(root: Path) -> Task:
    return open_task(TaskSpec(name="pets", image_folder=str(root)))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(50, 33), (33, 50), (16, 16), (8, 31), (17, 16), (16, 17)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_torchvisions(tmp_path: Path, size: tuple[int, int], mode: str, interpolation: str) -> None:
    write_image(tmp_path / "data" / "test" / "a" / "0.png", size, mode)
    split = open_task(TaskSpec(name="one", image_folder=str(tmp_path / "data"))).cached(
        "test", 16, interpolation, tmp_path / "cache"
    )
    transform = Compose([Resize(16, InterpolationMode(interpolation)), CenterCrop(16)])
    with Image.open(tmp_path / "data" / "test" / "a" / "0.png") as image:
        expected = np.asarray(transform(image).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(split.images[0], expected)


def test_images_labels_and_progress(folder: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    task = open_folder(folder)
    split = task.cached("test", 8, "bicubic", tmp_path / "cache", lambda *call: calls.append(call))
    assert isinstance(split.images, np.memmap) and split.images.dtype == np.uint8
    assert split.images.shape == (4, 3, 8, 8)
    assert split.labels.tolist() == [0, 0, 1, 1] and split.labels.dtype == np.int64
    assert split.classes == ("cat", "dog")
    assert calls == [(4, 4, "decoding pets test")]
    task.cached("test", 8, "bicubic", tmp_path / "cache", lambda *call: calls.append(call))
    assert len(calls) == 1


def test_one_cache_per_size_and_interpolation(folder: Path, tmp_path: Path) -> None:
    task = open_folder(folder)
    kinds = [(8, "bicubic"), (8, "bilinear"), (12, "bicubic")]
    splits = [task.cached("test", *kind, tmp_path / "cache") for kind in kinds]
    assert len({split.directory for split in splits}) == 3
    assert len({split.fingerprint for split in splits}) == 1
    with pytest.raises(DataError, match="unknown interpolation 'bicubik': did you mean 'bicubic'"):
        task.cached("test", 8, "bicubik", tmp_path / "cache")


def test_a_pickled_split_is_a_path(folder: Path, tmp_path: Path) -> None:
    split = open_folder(folder).cached("test", 8, "bicubic", tmp_path / "cache")
    data = pickle.dumps(split)
    assert len(data) < 500
    again = pickle.loads(data)
    assert isinstance(again.images, np.memmap)
    assert np.array_equal(again.images, split.images) and again.fingerprint == split.fingerprint


def test_changed_data_are_decoded_anew(folder: Path, tmp_path: Path) -> None:
    before = open_folder(folder).cached("test", 8, "bicubic", tmp_path / "cache")
    write_image(folder / "test" / "cat" / "0.png", seed=7, size=(10, 10))
    after = open_folder(folder).cached("test", 8, "bicubic", tmp_path / "cache")
    assert after.fingerprint != before.fingerprint
    assert not np.array_equal(after.images, before.images)


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(folder: Path, tmp_path: Path) -> None:
    first = open_folder(folder).cached("test", 8, "bicubic", tmp_path / "cache")
    moved = folder.rename(tmp_path / "elsewhere")
    os.utime(moved / "test" / "cat" / "0.png", (1, 1))
    second = open_folder(moved).cached("test", 8, "bicubic", tmp_path / "cache")
    assert second.fingerprint == first.fingerprint
    (moved / "test" / "cat" / "0.png").rename(moved / "test" / "dog" / "0.png")
    assert open_folder(moved).cached("test", 8, "bicubic", tmp_path / "cache").fingerprint != first.fingerprint


def test_overlap_counts_identical_pictures(folder: Path, tmp_path: Path) -> None:
    task = open_folder(folder)
    train, val, test = (task.cached(split, 8, "bicubic", tmp_path / "cache") for split in ("train", "val", "test"))
    assert overlap(train, test) + overlap(val, test) == 1
    assert overlap(train, val) == 0


def test_several_at_once_decode_once(folder: Path, tmp_path: Path) -> None:
    task = open_folder(folder)
    calls: list[tuple[int, int, str]] = []

    def decode(_: int) -> list[int]:
        return task.cached("test", 8, "bicubic", tmp_path / "cache", lambda *call: calls.append(call)).labels.tolist()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(decode, range(4))) == [[0, 0, 1, 1]] * 4
    assert len(calls) == 1


def test_a_killed_process_leaves_no_cache_and_blocks_nobody(tmp_path: Path) -> None:
    code = f"""
import os, signal
from merge_ray.tasks import TaskSpec, open_task
die = lambda done, total, text: os.kill(os.getpid(), signal.SIGKILL)
open_task(TaskSpec.model_validate("digits")).cached("val", 32, "bicubic", {str(tmp_path)!r}, die)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == -signal.SIGKILL
    directories = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert [path.suffix for path in directories] == [".partial"]
    split = open_task(TaskSpec.model_validate("digits")).cached("val", 32, "bicubic", tmp_path)
    assert len(split.images) == 297
    assert not directories[0].exists()


def test_a_disk_without_room(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 700})())
    with pytest.raises(DataError, match=r"no room for the image cache of task 'pets', split 'test'.* 700 B free"):
        open_folder(folder).cached("test", 8, "bicubic", tmp_path / "cache")


def test_a_disk_that_fills_up(folder: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    try:
        with pytest.raises(DataError, match=r"cannot write the image cache of task 'pets', split 'test', at .*large"):
            open_folder(folder).cached("test", 8, "bicubic", tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(open_folder(folder).cached("test", 8, "bicubic", tmp_path / "cache")) == 4


def test_an_unreadable_image_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "test" / "dog" / "1.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"task 'pets', split 'test', row 2: the image cannot be read: .*dog/1\.png"):
        open_folder(folder).cached("test", 8, "bicubic", tmp_path / "cache")
    whole = (folder / "test" / "cat" / "0.png").read_bytes()
    write_image(folder / "test" / "dog" / "1.png")
    (folder / "test" / "cat" / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"row 0: the image cannot be read: .*cat/0\.png"):
        open_folder(folder).cached("test", 8, "bicubic", tmp_path / "cache")

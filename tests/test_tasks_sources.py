"""Where tasks come from: Parquet files, torchvision's data sets, image folders; and the spec that says so."""

import gzip
import inspect
import io
import json
import struct
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision.datasets
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from torch.utils.data import TensorDataset, random_split

from merge_ray.errors import DataError
from merge_ray.tasks import TASK_LISTS, Task, TaskSpec, open_task
from merge_ray.tasks.splits import select_rows
from merge_ray.tasks.torchvision_sets import TORCHVISION_SETS


def png(value: int, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (8, 8), value if mode == "L" else (value, value, value)).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(
    path: Path,
    values: Iterable[Any],
    labels: Any,
    names: Sequence[str] | None = ("cat", "dog"),
    plain: bool = False,
    columns: tuple[str, str] = ("image", "label"),
) -> Path:
    """One grey image of each value; row groups of three rows."""
    images = [png(value) if isinstance(value, int) else value for value in values]
    column = images if plain else [{"bytes": image, "path": f"{row}.png"} for row, image in enumerate(images)]
    table = pa.table({columns[0]: column, columns[1]: pa.array(labels)})
    if names:
        features = {columns[0]: {"_type": "Image"}, columns[1]: {"_type": "ClassLabel", "names": list(names)}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3)
    return path


def images_of(task: Task, split: str, cache: Path) -> list[int]:
    return task.cached(split, 8, "bicubic", cache).images[:, 0, 0, 0].tolist()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", range(0, 7), [0, 1] * 3 + [0])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", range(7, 10), [1, 1, 0])
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", range(20, 24), [0, 1, 0, 1])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", range(30, 35), [1, 1, 0, 1, 0])
    return tmp_path / "data"


@pytest.mark.parametrize(
    "location",
    ["{}", "{}/{{split}}-*.parquet", {split: f"{{}}/{split}*.parquet" for split in ("train", "val", "test")}],
)
def test_a_directory_a_placeholder_and_a_mapping_say_the_same(directory: Path, tmp_path: Path, location: Any) -> None:
    if isinstance(location, dict):
        location = {split: place.format(directory) for split, place in location.items()}
    else:
        location = location.format(directory)
    task = open_task(TaskSpec(name="pets", parquet=location))
    assert task.splits == ("train", "val", "test") and task.classes == ["cat", "dog"]
    assert task.templates == ["a photo of a {}.", "a photo of the {}."]
    assert images_of(task, "train", tmp_path) == list(range(10))
    assert images_of(task, "val", tmp_path) == list(range(20, 24))
    assert task.cached("train", 8, "bicubic", tmp_path).labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 1, 0]


def test_plain_bytes_and_other_columns(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", range(5), [0, 2, 1, 0, 1], None, True, ("img", "fine"))
    spec = TaskSpec(
        name="x", parquet={"test": str(path)}, image_column="img", label_column="fine", classes=["a", "b", "c"]
    )
    task = open_task(spec)
    assert task.splits == ("test",)
    assert images_of(task, "test", tmp_path) == list(range(5))
    with pytest.raises(DataError, match=r"has no image column 'image': .*'fine', 'img' \(set image_column"):
        open_task(spec.model_copy(update={"image_column": "image"})).cached("test", 8, "bicubic", tmp_path)
    with pytest.raises(DataError, match=r"has no label column 'label': .*\(set label_column"):
        open_task(spec.model_copy(update={"label_column": "label"})).cached("test", 8, "bicubic", tmp_path)


def test_caps_and_cuts_read_the_right_rows(directory: Path, tmp_path: Path) -> None:
    (directory / "validation-00000-of-00001.parquet").unlink()
    task = open_task(TaskSpec(name="pets", parquet=str(directory), val_size=3, train_size=4, test_size=2))
    train, val, test = (images_of(task, split, tmp_path) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (4, 3, 2)
    assert set(train).isdisjoint(val) and set(train + val) <= set(range(10)) and set(test) <= set(range(30, 35))
    labels = [0, 1] * 3 + [0, 1, 1, 0]
    assert task.cached("val", 8, "bicubic", tmp_path).labels.tolist() == [labels[value] for value in val]
    other_seed = open_task(TaskSpec(name="pets", parquet=str(directory), val_size=3, val_seed=5))
    assert images_of(other_seed, "val", tmp_path) != val


def test_an_undivided_file_is_divided(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "all.parquet", range(40), [0, 1] * 20)
    task = open_task(TaskSpec(name="pets", parquet=str(path)))
    splits = [images_of(task, split, tmp_path) for split in ("train", "val", "test")]
    assert [len(split) for split in splits] == [32, 4, 4]
    assert sorted(chain(*splits)) == list(range(40))
    with pytest.raises(DataError, match="val_size 20 and test_size 20 leave none of 40 images"):
        open_task(TaskSpec(name="x", parquet=str(path), val_size=20, test_size=20)).cached("val", 8, "bicubic", ".")


def test_remote_locations_are_opened_by_open_location(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import merge_ray.checkpoints

    opened = []

    def open_location(location: str) -> Path:
        opened.append(location)
        return directory

    monkeypatch.setattr(merge_ray.checkpoints, "open_location", open_location)
    task = open_task(TaskSpec(name="pets", parquet="hf://datasets/someone/pets/data/{split}-*.parquet"))
    assert opened == ["hf://datasets/someone/pets/data"]
    assert images_of(task, "test", tmp_path) == list(range(30, 35))


def test_missing_splits_and_files(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "only.parquet", range(4), [0, 1, 0, 1])
    task = open_task(TaskSpec(name="pets", parquet={"test": str(path)}))
    with pytest.raises(DataError, match=r"'pets' has no val split and no train split to cut it from: .*Valid: 'test'"):
        task.cached("val", 8, "bicubic", tmp_path)
    with pytest.raises(DataError, match="'pets' has no train split: "):
        task.cached("train", 8, "bicubic", tmp_path)
    with pytest.raises(DataError, match="'pets' has no tset split: did you mean 'test'"):
        task.cached("tset", 8, "bicubic", tmp_path)
    with pytest.raises(DataError, match=r"no Parquet file at .*nothing-\*\.parquet"):
        open_task(TaskSpec(name="pets", parquet=str(tmp_path / "nothing-*.parquet")))
    (tmp_path / "torn.parquet").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"torn\.parquet cannot be read as Parquet"):
        open_task(TaskSpec(name="pets", parquet=str(tmp_path / "torn.parquet")))


@pytest.mark.parametrize(
    "values, labels, message",
    [
        ([1, 2, 3, 4], [0, 1, 2, -1], r"part 'test', row 2: label 2 is out of range: there are 2 classes, so 0 to 1 "),
        ([1, 2, 3], [0, 1, None], "row 2: the label is missing"),
        ([1, 2], ["cat", "dog"], "'label' must hold integers, not string"),
        ([], pa.array([], pa.int64()), "task 'pets': the split 'test' is empty"),
        ([1, b"junk", 3], [0, 1, 1], r"split 'test', row 1: the image cannot be read: .*bad\.parquet, row 1 of"),
        ([1, 2, 3, None], [0, 1, 1, 1], "row 3: the image cannot be read: it has no bytes"),
    ],
)
def test_bad_rows(tmp_path: Path, values: Any, labels: Any, message: str) -> None:
    path = tmp_path / "bad.parquet"
    if not values:
        write_parquet(path, [1], [0])
        pq.write_table(pq.read_table(path).slice(0, 0), path)
    else:
        write_parquet(path, values, labels)
    with pytest.raises(DataError, match=message):
        open_task(TaskSpec(name="pets", parquet={"test": str(path)})).cached("test", 8, "bicubic", tmp_path)


def test_class_names_are_needed_and_must_fit(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", range(4), [0, 1, 0, 1], names=None)
    with pytest.raises(DataError, match="task 'x': the data do not name their classes: give 'classes'"):
        open_task(TaskSpec(name="x", parquet=str(path)))
    assert open_task(TaskSpec(name="PCAM", parquet=str(path))).classes[0] == "lymph node"
    named = write_parquet(tmp_path / "b.parquet", range(4), [0, 1, 0, 1])
    with pytest.raises(DataError, match="task 'x': 3 classes are given, but the data have 2: cat, dog"):
        open_task(TaskSpec(name="x", parquet=str(named), classes=["a", "b", "c"]))
    given = open_task(TaskSpec(name="x", parquet=str(named), classes=["a", "b"], templates=["see {}"]))
    assert given.classes == ["a", "b"] and given.templates == ["see {}"]


def test_undivided_image_folders(tmp_path: Path) -> None:
    for index in range(20):
        path = tmp_path / "root" / ("ant", "bee")[index % 2] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(index, "L"))
    task = open_task(TaskSpec(name="insects", image_folder=str(tmp_path / "root")))
    splits = [images_of(task, split, tmp_path) for split in ("train", "val", "test")]
    assert [len(split) for split in splits] == [16, 2, 2] and sorted(chain(*splits)) == list(range(20))
    assert task.classes == ["ant", "bee"]
    with pytest.raises(DataError, match=r"no directory at .*rot \(image_folder\)"):
        open_task(TaskSpec(name="x", image_folder=str(tmp_path / "rot")))
    with pytest.raises(DataError, match="has no directory per class: expected root/train/CLASS"):
        open_task(TaskSpec(name="x", image_folder=str(tmp_path / "root" / "ant")))


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.astype(np.uint8).tobytes())
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(b""))


def test_a_torchvision_set_by_its_bare_name(tmp_path: Path) -> None:
    for prefix, count in (("train", 30), ("t10k", 12)):
        images = np.arange(count)[:, None, None] * np.ones((1, 28, 28))
        write_idx(tmp_path / "MNIST" / "raw" / f"{prefix}-images-idx3-ubyte", images)
        write_idx(tmp_path / "MNIST" / "raw" / f"{prefix}-labels-idx1-ubyte", np.arange(count) % 10)
    spec = TaskSpec.model_validate("MNIST").model_copy(update={"root": str(tmp_path)})
    task = open_task(spec)
    assert task.classes == [str(digit) for digit in range(10)]
    assert task.templates == ['a photo of the number: "{}".']
    assert images_of(task, "test", tmp_path) == list(range(12))
    train, val = images_of(task, "train", tmp_path), images_of(task, "val", tmp_path)
    assert len(val) == 3 and sorted(train + val) == list(range(30))
    assert task.cached("val", 8, "bicubic", tmp_path).labels.tolist() == [value % 10 for value in val]


def test_a_torchvision_set_in_folders(tmp_path: Path) -> None:
    for part, values in {"train": (1, 2), "valid": (3, 4), "test": (5, 6)}.items():
        for name, value in zip(("negative", "positive"), values, strict=True):
            path = tmp_path / "rendered-sst2" / part / name / "0.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(png(value))
    task = open_task(TaskSpec(name="film", torchvision="RenderedSST2", root=str(tmp_path)))
    assert [images_of(task, split, tmp_path) for split in task.splits] == [[1, 2], [3, 4], [5, 6]]
    assert task.classes == ["negative", "positive"]


def test_a_torchvision_set_that_is_not_there(tmp_path: Path) -> None:
    task = open_task(TaskSpec(name="MNIST", torchvision="MNIST", root=str(tmp_path)))
    with pytest.raises(DataError, match=r"torchvision's MNIST cannot be opened in root .*set root to where it is, or"):
        task.cached("test", 8, "bicubic", tmp_path)


def test_torchvision_has_what_the_table_says() -> None:
    assert set(TASK_LISTS[20]) - set(TORCHVISION_SETS) == {"RESISC45"}
    for entry in TORCHVISION_SETS.values():
        signature = inspect.signature(getattr(torchvision.datasets, entry.class_name))
        for choice in entry.parts.values():
            signature.bind("root", **choice, **entry.options)


def test_validation_is_the_papers_cut_of_train() -> None:
    # the fact that the papers' code asserts of MNIST's 60,000 images: 36044 comes first in train
    spec = TaskSpec.model_validate("MNIST")
    train, val = (select_rows(spec, split, ["train", "test"], 60_000) for split in ("train", "val"))
    assert len(val) == 5000 and 36044 in train
    images = TensorDataset(torch.arange(60_000))
    expected = random_split(images, [55_000, 5000], generator=torch.Generator().manual_seed(0))
    assert val.tolist() == sorted(expected[1].indices)
    assert train.tolist() == sorted(expected[0].indices)


def test_undivided_sets_have_the_papers_sizes() -> None:
    spec = TaskSpec(name="EuroSAT", torchvision="EuroSAT")
    sizes = [len(select_rows(spec, split, ["all"], 27_000)) for split in ("train", "val", "test")]
    assert sizes == [21_600, 2700, 2700]


@pytest.mark.parametrize(
    "value, message",
    [
        ("digit", "unknown task 'digit': did you mean 'digits'"),
        ("RESISC45", "torchvision does not have RESISC45: give its parquet or image_folder"),
        ({"name": "x"}, "needs exactly one of builtin, parquet, torchvision, image_folder, taskonomy; found none"),
        ({"name": "x", "builtin": "digits", "parquet": "a"}, "found builtin and parquet"),
        ({"name": "x", "builtin": "digts"}, "unknown built-in task 'digts': did you mean 'digits'"),
        ({"name": "x", "torchvision": "MNISTT"}, "unknown torchvision data set 'MNISTT': did you mean 'MNIST'"),
        ({"name": "x", "parquet": {"validation": "a"}}, "parquet"),
        ({"name": "x", "parquet": {}}, "give the location of at least one split"),
        ({"name": "x", "builtin": "digits", "templates": ["no gap"]}, "found 'no gap'"),
        ({"name": "x", "builtin": "digits", "classes": ["a", "b", "a"]}, "given more than once: 'a'"),
        ({"name": "x", "builtin": "digits", "colour": 1}, "Extra inputs are not permitted"),
        ({"name": "x", "builtin": "digits", "val_size": 0}, "greater than 0"),
    ],
)
def test_specs_that_cannot_be(value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(TaskSpec).validate_python(value)

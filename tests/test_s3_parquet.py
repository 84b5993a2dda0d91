"""Parquet data sets that lie on S3 are read in place, through pyarrow."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from s3_server import SECRETS, S3Server, s3_process, s3_server

from merge_ray.checkpoints.s3 import client
from merge_ray.errors import CheckpointError, DataError
from merge_ray.tasks import TaskSpec, open_task, parquet_files, split_texts
from merge_ray.tasks.parquet_files import find_parts

__all__ = ["s3_process", "s3_server"]


@pytest.fixture
def bucket(s3_server: S3Server) -> S3Server:
    """A server with a bucket ``data`` of images."""
    client().create_bucket(Bucket="data")
    put_images("pets/train-00000-of-00002.parquet", 6)
    put_images("pets/train-00001-of-00002.parquet", 4, first=6)
    put_images("pets/test.parquet", 5, first=20)
    s3_server.requests.clear()
    return s3_server


def put(key: str, table: pa.Table, rows: int = 2) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=rows)
    client().put_object(Bucket="data", Key=key, Body=buffer.getvalue())


def put_images(key: str, count: int, first: int = 0) -> None:
    encoded = []
    for number in range(first, first + count):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    put(key, pa.table({"image": encoded, "label": [number % 2 for number in range(count)]}))


def spec(location: str) -> TaskSpec:
    return TaskSpec(name="pets", parquet=location, classes=["cat", "dog"], val_size=2)


@pytest.mark.parametrize(
    "location",
    ["s3://data/pets", "s3://data/pets/", "s3://data/pets/{split}*.parquet", "s3://data/**/{split}*.parquet"],
)
def test_images(bucket: S3Server, tmp_path: Path, location: str) -> None:
    task = open_task(spec(location))
    assert task.splits == ("train", "val", "test")
    cached = task.cached("test", 8, "bicubic", tmp_path)
    assert [int(image[0, 0, 0]) for image in cached.images] == [20, 21, 22, 23, 24]
    assert cached.labels.tolist() == [0, 1, 0, 1, 0]
    assert open_task(spec(location)).cached("test", 8, "bicubic", tmp_path).directory == cached.directory
    put_images("pets/test.parquet", 3, first=40)
    assert len(open_task(spec(location)).cached("test", 8, "bicubic", tmp_path).images) == 3


def test_which_files_a_location_means(bucket: S3Server) -> None:
    put_images("pets/more/test-1.parquet", 1)
    names = {
        "s3://data/pets/test.parquet": ["pets/test.parquet"],
        "s3://data/pets/*.parquet": ["pets/test.parquet", *(f"pets/train-0000{n}-of-00002.parquet" for n in (0, 1))],
        "s3://data/pets/more": ["pets/more/test-1.parquet"],
        "s3://data/**/test*.parquet": ["pets/more/test-1.parquet", "pets/test.parquet"],
        "s3://data/*/test*.parquet": ["pets/test.parquet"],
    }
    for location, keys in names.items():
        found = [str(file) for files in find_parts(location).values() for file in files]
        assert found == [f"s3://data/{key}" for key in keys]


def test_texts(bucket: S3Server) -> None:
    put("words/test.parquet", pa.table({"text": ["one", "two", "three"], "label": [0, 1, 0]}))
    put("words/train.parquet", pa.table({"text": ["a", "b"] * 9, "label": [0, 1] * 9}))
    task = open_task(TaskSpec(name="words", parquet="s3://data/words", classes=["odd", "even"], val_size=2))
    texts, labels = split_texts(task, "test")
    assert [text.splitlines()[0] for text in texts] == ["one", "two", "three"] and labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize("fault", ["error", "slow_down", "cut", "truncate"])
def test_a_fault_is_overcome(bucket: S3Server, tmp_path: Path, fault: str) -> None:
    task = open_task(spec("s3://data/pets"))
    bucket.fail(fault, fault, method="GET")
    assert len(task.cached("test", 8, "bicubic", tmp_path).images) == 5


def test_a_large_row_group_is_read_in_pieces(bucket: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_files, "BUFFER", 64 << 10)
    rng = np.random.default_rng(0)
    table = pa.table({"image": [rng.bytes(100_000) for _ in range(20)], "label": [0, 1] * 10})
    put("noise/test.parquet", table, rows=20)
    [file] = find_parts("s3://data/noise/test.parquet")["all"]
    bucket.requests.clear()
    batches = parquet_files.open_parquet(file).iter_batches(1, columns=["image"])
    assert next(batches).column(0)[0].as_py() == table.column("image")[0].as_py()
    asked = [item.headers["Range"] for item in bucket.requests if "Range" in item.headers]
    sizes = [int(end) - int(start) for start, end in (span.removeprefix("bytes=").split("-") for span in asked)]
    assert sum(sizes) < 1_000_000


def test_a_file_that_changes_during_reading(bucket: S3Server, tmp_path: Path) -> None:
    task = open_task(spec("s3://data/pets"))
    put_images("pets/test.parquet", 7, first=40)
    with pytest.raises(DataError, match=r"s3://data/pets/test.parquet changed while it was being read"):
        task.cached("test", 8, "bicubic", tmp_path)


def test_what_is_not_there(bucket: S3Server) -> None:
    client().put_object(Bucket="data", Key="torn/test.parquet", Body=b"PAR1 and no more")
    for location, error, message in [
        ("s3://data/pest", DataError, r"no Parquet file at s3://data/pest: .*the nearest name is 'pets'"),
        ("s3://data/pets/*.arrow", DataError, r"no Parquet file at s3://data/pets/\*.arrow"),
        ("s3://data/none/{split}.parquet", DataError, "no Parquet file at .* for train, val or test"),
        ("s3://date/pets", CheckpointError, "there is no bucket 'date'"),
        ("s3://data/torn", DataError, "s3://data/torn/test.parquet cannot be read as Parquet"),
    ]:
        with pytest.raises(error, match=message):
            open_task(spec(location))


def test_a_refusal_does_not_tell_credentials(bucket: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = open_task(spec("s3://data/pets"))
    bucket.fail(*["echo"] * 40)
    with pytest.raises((CheckpointError, DataError)) as raised:
        task.cached("test", 8, "bicubic", tmp_path)
    assert "s3://data/pets/test.parquet" in str(raised.value)
    assert not any(secret in str(raised.value) for secret in SECRETS.values())

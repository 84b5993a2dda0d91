"""Locations on S3: what is fetched, what is not, what is kept, and what goes wrong, over HTTP."""

from __future__ import annotations

import io
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from s3_server import SECRETS, S3Server, s3_process, s3_server

from merge_ray.checkpoints import find_beside, nothing, open_location, read_metadata, read_weights, s3, s3_files
from merge_ray.checkpoints.adapters import is_adapter
from merge_ray.checkpoints.s3 import S3Settings, client, find_object
from merge_ray.errors import CheckpointError, MissingError
from merge_ray.tasks.parquet_files import find_parts
from merge_ray.tasks.text_sources import read_columns

__all__ = ["s3_process", "s3_server"]


def weights(**values: float) -> bytes:
    return safetensors.torch.save({name: torch.full((1000,), value) for name, value in values.items()})


@pytest.fixture
def bucket(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """A server with a bucket ``models``; the cache is empty, waiting takes no time."""
    client().create_bucket(Bucket="models")
    monkeypatch.setenv("MERGE_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    s3_server.requests.clear()
    return s3_server


def put(key: str, content: bytes) -> None:
    client().put_object(Bucket="models", Key=key, Body=content)


def fetched(server: S3Server) -> list[str]:
    """The keys whose content was asked for, in order."""
    return [
        item.path.removeprefix("/models/")
        for item in server.requests
        if item.method == "GET" and item.path.startswith("/models/")
    ]


def test_a_file_is_fetched_once_and_anew_when_it_changes(bucket: S3Server) -> None:
    put("clip/base.safetensors", weights(a=1))
    assert read_weights("s3://models/clip/base.safetensors")["a"][0] == 1
    again = open_location("s3://models/clip/base.safetensors")
    assert fetched(bucket) == ["clip/base.safetensors"]
    assert again.name == "base.safetensors" and "models-clip-base" in again.parent.name
    put("clip/base.safetensors", weights(a=2))
    assert read_weights("s3://models/clip/base.safetensors")["a"][0] == 2


def test_a_large_file_comes_in_parts(bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_files, "PART", 1000)
    content = bytes(range(256)) * 20
    put("big.bin", content)
    assert open_location("s3://models/big.bin").read_bytes() == content
    parts = sorted(item.headers["Range"] for item in bucket.requests if "Range" in item.headers)
    assert parts[0] == "bytes=0-999" and "bytes=5000-5119" in parts and len(parts) == 6
    assert all("If-Match" in item.headers for item in bucket.requests if "Range" in item.headers)


def test_an_empty_file(bucket: S3Server) -> None:
    put("empty.json", b"")
    assert open_location("s3://models/empty.json").read_bytes() == b""


def test_a_hugging_face_folder(bucket: S3Server) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    files = {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-00001-of-00002.safetensors": weights(a=1),
        "model-00002-of-00002.safetensors": weights(b=2),
        "config.json": b"{}",
        "tf_model.h5": b"large",
        "pytorch_model.bin": b"large",
        "onnx/model.onnx": b"large",
    }
    for name, content in files.items():
        put(f"t5/{name}", content)
    state = read_weights("s3://models/t5")
    assert {name: float(tensor[0]) for name, tensor in state.items()} == {"a": 1, "b": 2}
    assert sorted(set(fetched(bucket))) == [f"t5/{name}" for name in sorted(files)[:4] if name != "tf_model.h5"]
    assert sorted(read_weights("s3://models/t5/model.safetensors.index.json")) == ["a", "b"]
    assert (open_location("s3://models/t5/") / "config.json").is_file()
    assert not is_adapter("s3://models/t5")


def test_a_folder_of_which_no_weights_are_wanted(bucket: S3Server) -> None:
    for name in ("config.json", "tokenizer.json", "ants.safetensors", "bees.safetensors"):
        put(f"clip/{name}", b"{}")
    assert sorted(path.name for path in open_location("s3://models/clip", nothing).iterdir()) == [
        "config.json",
        "tokenizer.json",
    ]
    assert not any("safetensors" in key for key in fetched(bucket))


@pytest.mark.slow
def test_an_outage_of_a_minute(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With real waits, by both of the ways that S3 is read."""
    monkeypatch.setenv("MERGE_RAY_CACHE", str(tmp_path))
    client().create_bucket(Bucket="models")
    put("a.safetensors", weights(a=3))
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["one"]}), buffer)
    put("texts.parquet", buffer.getvalue())
    [file] = find_parts("s3://models/texts.parquet")["all"]
    s3_server.down = True
    end = threading.Timer(60, lambda: setattr(s3_server, "down", False))
    end.start()
    with ThreadPoolExecutor() as pool:
        model = pool.submit(read_weights, "s3://models/a.safetensors")
        texts = pool.submit(read_columns, file, ["text"])
        assert model.result()["a"][0] == 3 and texts.result()["text"].to_pylist() == ["one"]
    assert not end.is_alive()


def test_the_only_match_and_the_file_beside(bucket: S3Server) -> None:
    put("normal_encoder-1.pth", b"x")
    put("depth_encoder-2.pth", b"x")
    put("mapping.pth", b"x")
    put("mapping.json", b"{}")
    assert open_location("s3://models/normal_encoder-*.pth").name == "normal_encoder-1.pth"
    with pytest.raises(CheckpointError, match=r"s3://models/\*_encoder-\*.pth: matches depth_encoder-2.pth, normal_"):
        open_location("s3://models/*_encoder-*.pth")
    beside = find_beside("s3://models/mapping.pth", ".json")
    assert beside is not None and beside.read_bytes() == b"{}"
    assert find_beside("s3://models/normal_encoder-1.pth", ".json") is None


def test_only_wanted_tensors_are_fetched(bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_files, "GAP", 0)
    state = {name: torch.full((50_000,), float(number)) for number, name in enumerate("abcdef")}
    put("all.safetensors", safetensors.torch.save(state, {"kind": "test"}))
    some = read_weights("s3://models/all.safetensors", wanted=lambda name: name in "bf")
    assert {name: (tensor.shape, float(tensor.mean())) for name, tensor in some.items()} == {
        "b": ((50_000,), 1.0),
        "f": ((50_000,), 5.0),
    }
    ranges = [
        item.headers["Range"].removeprefix("bytes=").split("-") for item in bucket.requests if item.method == "GET"
    ]
    asked = sum(int(last) - int(first) + 1 for first, last in ranges)
    assert asked < 2 * 200_000 + 2 * s3_files.HEADER
    assert read_metadata("s3://models/all.safetensors") == {"kind": "test"}
    # What was fetched in part is never taken for the whole.
    assert all(
        bool((read_weights("s3://models/all.safetensors")[name] == tensor).all()) for name, tensor in state.items()
    )
    with pytest.raises(CheckpointError, match="none that are wanted"):
        read_weights("s3://models/all.safetensors", wanted=lambda name: name == "z")


def test_only_the_shards_of_wanted_tensors_are_fetched(bucket: S3Server) -> None:
    put("sharded/model.safetensors.index.json", b'{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    put("sharded/1.safetensors", weights(a=1))
    put("sharded/2.safetensors", weights(b=2))
    assert list(read_weights("s3://models/sharded", wanted=lambda name: name == "b")) == ["b"]
    assert "sharded/1.safetensors" not in fetched(bucket)


@pytest.mark.parametrize("fault", ["error", "slow_down", "cut", "truncate", "timeout"])
def test_a_fault_is_overcome(bucket: S3Server, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.patience = 1.5
    monkeypatch.setattr(s3, "READ_SECONDS", 1)
    monkeypatch.setattr(s3_files, "PART", 2500)
    monkeypatch.setenv("AWS_EXECUTION_ENV", fault)  # another environment, another client
    put("a.safetensors", weights(a=3))
    bucket.fail(fault, fault, method="GET")
    if fault != "truncate":
        bucket.fail(fault, method="HEAD")
    assert bool((read_weights("s3://models/a.safetensors")["a"] == 3).all())


def test_an_outage_is_sat_out_where_the_server_had_answered(bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    put("a.safetensors", weights(a=3))
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        bucket.down = len(waits) < 8

    monkeypatch.setattr("time.sleep", wait)
    bucket.down = True
    assert bool((read_weights("s3://models/a.safetensors")["a"] == 3).all())
    assert len(waits) == 8
    # The waits of all attempts, which the standard mode draws from 0 to min(2^n, 20) seconds.
    assert sum(min(2**n, 20) / 2 for n in range(s3.ATTEMPTS - 1)) > 100


def test_many_parts_at_once_sit_out_an_outage(bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they retry more often than boto3's quota of 500, at 5 a retry, would let one client."""
    monkeypatch.setattr(s3_files, "PART", 150)
    put("a.safetensors", weights(a=3))
    found = find_object("models", "a.safetensors")
    assert found is not None
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        bucket.down = len(waits) < 110
        threading.Event().wait(0.1)  # so that all threads get their turn

    monkeypatch.setattr("time.sleep", wait)
    bucket.down = True
    assert s3_files.fetch(found).read_bytes() == weights(a=3)
    assert len(waits) >= 110


def test_an_outage_without_end(bucket: S3Server) -> None:
    put("a.safetensors", weights(a=3))
    with (
        bucket.outage(),
        pytest.raises(CheckpointError, match=r"s3://models/a.safetensors: .*(cannot be reached|fails)"),
    ):
        read_weights("s3://models/a.safetensors")
    assert read_weights("s3://models/a.safetensors")


def test_a_download_that_was_killed_is_not_taken_for_a_whole_one(
    bucket: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("a.safetensors", weights(a=3))
    whole = s3_files._read

    def killed(found: Any, start: int, end: int, write: Any) -> None:
        write(b"half", 0)
        raise KeyboardInterrupt

    monkeypatch.setattr(s3_files, "_read", killed)
    with pytest.raises(KeyboardInterrupt):
        open_location("s3://models/a.safetensors")
    monkeypatch.setattr(s3_files, "_read", whole)
    assert bool((read_weights("s3://models/a.safetensors")["a"] == 3).all())


def test_an_object_that_changes_during_reading(bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_files, "PART", 1000)
    monkeypatch.setattr(s3_files, "CONNECTIONS", 1)
    put("a.safetensors", weights(a=3))
    whole = s3_files._read

    def changing(found: Any, start: int, end: int, write: Any) -> None:
        whole(found, start, end, write)
        put("a.safetensors", weights(a=4))

    monkeypatch.setattr(s3_files, "_read", changing)
    with pytest.raises(CheckpointError, match=r"s3://models/a.safetensors: it changed while it was being read"):
        open_location("s3://models/a.safetensors")
    monkeypatch.setattr(s3_files, "_read", whole)
    assert bool((read_weights("s3://models/a.safetensors")["a"] == 4).all())


def test_what_is_not_there(bucket: S3Server) -> None:
    put("clip/base.safetensors", weights(a=1))
    put("docs/README.md", b"x")
    put("both/a.pt", b"x")
    put("both/b.pt", b"x")
    for location, message in {
        "s3://models/clip/bass.safetensors": r"in s3://models/clip/ the nearest name is 'base.safetensors'",
        "s3://models/clop": r"no such object or folder; in s3://models/ the nearest name is 'clip'",
        "s3://models/none/base": r"in s3://models/none/ there is nothing$",
        "s3://modles/clip/base.safetensors": r"there is no bucket 'modles' at http://127.0.0.1:\d+; check its name",
    }.items():
        with pytest.raises(MissingError, match=message):
            open_location(location)
    for location, message in {
        "s3://models/docs": "a folder without weights or configuration; it holds README.md",
        "s3://models/both": "holds several weight files, name one of them: a.pt, b.pt",
        "s3:///key": "'' is no name of a bucket; expected s3://bucket/key",
        "s4://models/x": r"did you mean 's3'\?",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            open_location(location)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("denied", r"no permission \(AccessDenied\): these credentials may not read it, or it does not exist"),
        ("bad_key", r"the credentials are not valid \(InvalidAccessKeyId\); renew them, or choose others with s3.prof"),
        ("redirect", r"the bucket is in region 'eu-central-1', not in 'us-east-1'; set s3.region"),
        ("html", r"what answers at http://127.0.0.1:\d+ does not speak S3; check s3.endpoint"),
    ],
)
def test_refusals(bucket: S3Server, fault: str, message: str) -> None:
    name = fault.replace("_", "-")  # a bucket of its own, whose region boto3 remembers
    client().create_bucket(Bucket=name)
    client().put_object(Bucket=name, Key="a.safetensors", Body=weights(a=3))
    bucket.fail(*[fault] * 8)
    with pytest.raises(CheckpointError, match=rf"s3://{name}/a.safetensors: {message}"):
        open_location(f"s3://{name}/a.safetensors")


def test_a_server_that_never_recovers(bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    put("a.safetensors", weights(a=3))
    bucket.fail(*["slow_down"] * 8, method="GET")
    with pytest.raises(CheckpointError, match=r"answers SlowDown \(503\) again and again; given up, run again later"):
        open_location("s3://models/a.safetensors")


def test_settings_that_lead_nowhere(bucket: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for settings, message in {
        S3Settings(endpoint="http://127.0.0.1:9"): r"http://127.0.0.1:9 cannot be reached \(EndpointConnectionError\)",
        S3Settings(profile="tset"): r"there is no profile 'tset' in ~/.aws; did you mean 'test'\?",
    }.items():
        config = tmp_path / "config"
        config.write_text("[profile test]\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
        with settings.applied(), pytest.raises(CheckpointError, match=f"s3://models/a: {message}"):
            open_location("s3://models/a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost 9000")
    with pytest.raises(CheckpointError, match="the endpoint in AWS_ENDPOINT_URL is not an address"):
        open_location("s3://models/a")


def test_no_credentials(bucket: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in SECRETS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(CheckpointError, match=r"there are no credentials: set AWS_PROFILE or s3.profile, or s3.anonym"):
        open_location("s3://models/a")
    bucket.requests.clear()
    with S3Settings(anonymous=True).applied():
        bucket.fail("denied", "denied")
        with pytest.raises(CheckpointError, match=r"no permission \(AccessDenied\): anonymous access may not read it"):
            open_location("s3://models/a")
    assert bucket.requests and all("Authorization" not in item.headers for item in bucket.requests)


def test_settings_hold_inside_their_block_only(
    bucket: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    credentials = tmp_path / "credentials"
    credentials.write_text("[work]\naws_access_key_id = AKIDWORK\naws_secret_access_key = x\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    settings = S3Settings(endpoint=bucket.endpoint, region="eu-west-1", profile="work")
    with settings.applied():
        client().list_buckets()
    request = bucket.requests[-1].headers["Authorization"]
    assert "AKIDWORK" in request and "eu-west-1" in request
    assert client().meta.endpoint_url == "http://127.0.0.1:9" and client().meta.region_name == "us-east-1"


def test_credentials_are_never_told(
    bucket: S3Server, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever a server writes back, and whatever is written into a location."""
    caplog.set_level(logging.INFO)
    put("a.safetensors", weights(a=3))
    texts = []
    for faults, location in [
        (["echo"] * 8, "s3://models/a.safetensors"),
        ([], f"s3://AKIDOTHER:{SECRETS['AWS_SECRET_ACCESS_KEY']}@models/a.safetensors"),
    ]:
        bucket.fail(*faults)
        with pytest.raises(CheckpointError) as raised:
            open_location(location)
        assert raised.value.__cause__ is None and raised.value.__suppress_context__ == bool(faults)
        texts.append(str(raised.value))
    written = capfd.readouterr()
    for secret in (*SECRETS.values(), "AKIDOTHER"):
        assert not any(secret in text for text in (*texts, caplog.text, written.out, written.err))


def test_an_endpoint_with_credentials_is_refused_without_telling_them() -> None:
    with pytest.raises(ValueError, match="without credentials") as raised:
        S3Settings(endpoint="http://someone:secret@localhost:9000")
    assert "secret" not in str(raised.value)

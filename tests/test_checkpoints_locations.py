"""Locations: local paths, files that ship, and the Hugging Face hub, spoken to by a small server."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from checkpoint_hub import SHA, Hub, HubServer

from merge_ray.checkpoints import locations, open_location, read_weights
from merge_ray.errors import CheckpointError


def tensors(**values: float) -> bytes:
    return safetensors.torch.save({name: torch.full((2,), value) for name, value in values.items()})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a few repositories; the cache is empty."""
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    whole = {"config.json": b"{}", "model.safetensors": tensors(a=1), "pytorch_model.bin": b"x", "README.md": b"x"}
    hub = Hub(
        {
            ("models", "tanganke/clip-vit"): {**whole, "checkpoint-5/model.safetensors": tensors(a=5)},
            ("models", "big/sharded"): {
                "model.safetensors.index.json": json.dumps(index).encode(),
                "model-00001-of-00002.safetensors": tensors(a=1),
                "model-00002-of-00002.safetensors": tensors(b=2),
                "tf_model.h5": b"x",
            },
            ("models", "meta/gated"): whole,
            ("models", "only/words"): {"README.md": b"x"},
            ("datasets", "tanganke/digits"): {
                "README.md": b"x",
                "data/train-0.parquet": b"1",
                "data/test-0.parquet": b"2",
            },
        },
        gated={"meta/gated"},
    )
    server = HubServer(hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> str:
    """An endpoint where nobody listens; give it to HF_ENDPOINT to go offline."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "finetuned.pt").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_location(tmp_path / "finetuned.pt") == tmp_path / "finetuned.pt"
    assert open_location("~/finetuned.pt") == tmp_path / "finetuned.pt"
    assert open_location(str(tmp_path)) == tmp_path
    with pytest.raises(
        CheckpointError, match=r"finetune\.pt: no such file .* nearest name in that folder is 'finetuned\.pt'"
    ):
        open_location(tmp_path / "finetune.pt")
    with pytest.raises(CheckpointError, match=r"its folder .*/nowhere does not exist"):
        open_location(tmp_path / "nowhere" / "finetuned.pt")


def test_a_path_that_the_system_will_not_open() -> None:
    with pytest.raises(CheckpointError, match=r"cannot be opened \(File name too long\)"):
        open_location("a" * 5000)


@pytest.mark.parametrize(
    ("location", "near"), [("gs://bucket/a.pt", ""), ("hff://a/b", "'hf'"), ("builtins:a", "'builtin'")]
)
def test_other_schemes(location: str, near: str) -> None:
    with pytest.raises(CheckpointError, match=f"starts with a known scheme, not .*{near}.*Valid: 'builtin', 'hf'"):
        open_location(location)


def test_builtin_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "assets" / "quickstart").mkdir(parents=True)
    shipped = tmp_path / "assets" / "quickstart" / "base.safetensors"
    shipped.touch()
    (tmp_path / "secret").touch()
    monkeypatch.setattr(locations.resources, "files", lambda package: tmp_path)
    assert open_location("builtin:quickstart/base.safetensors") == shipped
    with pytest.raises(CheckpointError, match=r"did you mean 'quickstart/base\.safetensors'"):
        open_location("builtin:quickstart/bas.safetensors")
    with pytest.raises(CheckpointError, match="does not ship with merge-ray"):
        open_location("builtin:../secret")


def test_a_model_repository_fetches_only_what_is_read(hub: Hub) -> None:
    path = open_location("hf://tanganke/clip-vit")
    assert path.is_dir()
    assert sorted(hub.fetched) == ["config.json", "model.safetensors"]
    assert torch.equal(read_weights("hf://tanganke/clip-vit")["a"], torch.ones(2))
    assert len(hub.fetched) == 2  # the second time comes from the cache


@pytest.mark.parametrize(
    ("location", "value"),
    [
        ("hf://tanganke/clip-vit/model.safetensors", 1.0),
        ("hf://tanganke/clip-vit/checkpoint-5/model.safetensors", 5.0),
        ("hf://tanganke/clip-vit/checkpoint-5", 5.0),
        ("hf://tanganke/clip-vit@v1/checkpoint-5/", 5.0),
        ("hf://tanganke/clip-vit@refs%2Fpr%2F1", 1.0),
        (f"hf://tanganke/clip-vit@{SHA}", 1.0),
    ],
)
def test_files_folders_and_revisions(hub: Hub, location: str, value: float) -> None:
    assert torch.equal(read_weights(location)["a"], torch.full((2,), value))


@pytest.mark.parametrize("location", ["hf://big/sharded", "hf://big/sharded/model.safetensors.index.json"])
def test_a_sharded_repository(hub: Hub, location: str) -> None:
    assert list(read_weights(location)) == ["a", "b"]
    assert "tf_model.h5" not in hub.fetched


def test_data_sets(hub: Hub) -> None:
    assert open_location("hf://datasets/tanganke/digits/data/test-0.parquet").read_bytes() == b"2"
    folder = open_location("hf://datasets/tanganke/digits/data")
    assert sorted(path.name for path in folder.iterdir()) == ["test-0.parquet", "train-0.parquet"]
    assert (open_location("hf://datasets/tanganke/digits") / "README.md").is_file()


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("hf://tanganke/clip-vot", "no such model on the hub, or it is private"),
        ("hf://datasets/tanganke/clip-vit", "no such dataset on the hub"),
        ("hf://tanganke/clip-vit@v9", "has no revision 'v9'"),
        ("hf://tanganke/clip-vit/model.safetensor", "no such file or folder; did you mean 'model.safetensors'"),
        ("hf://only/words", "a folder without weights; it holds README.md"),
        ("hf://meta/gated", "the repository is gated: ask for access"),
        ("hf://clip-vit", "expected hf://owner/name"),
        ("hf://bad--/na..me", "hf://bad--/na..me"),
    ],
)
def test_what_the_hub_does_not_have(hub: Hub, location: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        open_location(location)
    assert location.split("@")[0].split("/model")[0] in str(raised.value)


def test_offline_without_a_cached_copy(hub: Hub, offline: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", offline)
    with pytest.raises(CheckpointError, match=f"the hub at {offline} cannot be reached .* go online once"):
        open_location("hf://tanganke/clip-vit")


@pytest.mark.parametrize("inside", ["", "/model.safetensors", "/checkpoint-5"])
def test_offline_with_a_cached_copy(hub: Hub, inside: str, offline: str, monkeypatch: pytest.MonkeyPatch) -> None:
    online = read_weights(f"hf://tanganke/clip-vit{inside}")
    monkeypatch.setenv("HF_ENDPOINT", offline)
    assert torch.equal(read_weights(f"hf://tanganke/clip-vit{inside}")["a"], online["a"])
    with pytest.raises(CheckpointError, match="cannot be reached"):
        open_location("hf://tanganke/clip-vit/other.safetensors")

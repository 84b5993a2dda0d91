"""What is written can be loaded by its readers, and a failed write leaves nothing behind."""

from __future__ import annotations

import errno
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from merge_ray.checkpoints import (
    read_metadata,
    read_weights,
    write_huggingface,
    write_open_clip,
    write_safetensors,
)
from merge_ray.errors import CheckpointError

WRITERS = {
    "model.safetensors": write_safetensors,
    "model.pt": write_open_clip,
    "open_clip_model.safetensors": write_open_clip,
}
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1},
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", WRITERS)
def test_any_tensors_are_written(name: str, tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    shared = torch.randn(3, 4, requires_grad=True)
    state = {"a": shared, "tied": shared, "view": flat[2:6], "transposed": flat.view(3, 4).t(), "step": torch.tensor(3)}
    path = WRITERS[name](tmp_path / "new" / name, state)
    read = read_weights(path)
    assert set(read) == set(state)
    for key, tensor in state.items():
        assert torch.equal(read[key], tensor.detach())
        assert read[key].dtype == tensor.dtype
    assert names(path.parent) == [name]
    assert shared.requires_grad


@pytest.mark.parametrize("name", WRITERS)
def test_the_umask_decides_who_may_read(name: str, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    path = WRITERS[name](tmp_path / name, {"a": torch.zeros(3)})
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_view_is_written_without_what_it_views(tmp_path: Path) -> None:
    path = write_open_clip(tmp_path / "model.pt", {"a": torch.zeros(1_000_000)[:10]})
    assert path.stat().st_size < 10_000


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_open_clip_loads_its_checkpoint(name: str, tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(1)
    written = open_clip.CLIP(**CLIP)
    path = write_open_clip(tmp_path / name, written.state_dict(), {"method": "ties"})
    torch.manual_seed(2)
    loaded = open_clip.CLIP(**CLIP)
    open_clip.load_checkpoint(loaded, str(path))
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in written.state_dict().items())
    assert torch.load(path, weights_only=True)["metadata"] == {"method": "ties"} if path.suffix == ".pt" else True


def test_transformers_loads_its_directory(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    model = CLIPVisionModel(config)
    model.save_pretrained(tmp_path / "source")
    state = {name: tensor + 1 for name, tensor in read_weights(tmp_path / "source").items()}
    (tmp_path / "source" / "preprocessor_config.json").write_text("{}")
    (tmp_path / "source" / "notes.md").write_text("no")
    (tmp_path / "source" / "model.safetensors.index.json").write_text("{}")
    directory = write_huggingface(
        tmp_path / "merged", state, source=tmp_path / "source", metadata={"method": "task_arithmetic"}
    )
    assert names(directory) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert read_metadata(directory / "model.safetensors") == {"format": "pt", "method": "task_arithmetic"}
    loaded = CLIPVisionModel.from_pretrained(directory).state_dict()
    assert all(torch.equal(loaded[name], tensor + 1) for name, tensor in model.state_dict().items())


def test_a_config_of_its_own(tmp_path: Path) -> None:
    directory = write_huggingface(tmp_path, {"a": torch.ones(2)}, {"model_type": "clip"})
    assert json.loads((directory / "config.json").read_text()) == {"model_type": "clip"}
    with pytest.raises(CheckpointError, match=r"needs a config, or a source directory that has a config\.json"):
        write_huggingface(tmp_path, {"a": torch.ones(2)})


@pytest.mark.parametrize("write", WRITERS.values())
def test_what_cannot_be_written(write: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="there are no tensors to write"):
        write(path, {})
    with pytest.raises(CheckpointError, match="these are no tensors: 'b'"):
        write(path, {"a": torch.ones(2), "b": 3})
    with pytest.raises(CheckpointError, match="metadata must be text; not so: 'density'"):
        write(path, {"a": torch.ones(2)}, {"method": "ties", "density": 0.2})
    assert names(tmp_path) == []


def test_suffixes_that_open_clip_loads(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"open_clip loads files named \.safetensors, \.pt, \.pth, \.bin"):
        write_open_clip(tmp_path / "model.npz", {"a": torch.ones(2)})


@contextmanager
def file_size_limit(count: int) -> Iterator[None]:
    """Let writes fail beyond `count` bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", WRITERS)
def test_a_write_that_fails_halfway_keeps_the_old_file(name: str, tmp_path: Path) -> None:
    path = WRITERS[name](tmp_path / name, {"a": torch.ones(2)})
    with file_size_limit(100_000), pytest.raises(CheckpointError, match=r"cannot be written .* what it held before"):
        WRITERS[name](path, {"a": torch.zeros(1_000_000)})
    assert names(tmp_path) == [name]
    assert torch.equal(read_weights(path)["a"], torch.ones(2))


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be written .*No space left on device"):
        write_safetensors(tmp_path / "model.safetensors", {"a": torch.ones(2)})
    assert names(tmp_path) == []


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "merged").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_safetensors(tmp_path / "merged" / "model.safetensors", {"a": torch.ones(2)})

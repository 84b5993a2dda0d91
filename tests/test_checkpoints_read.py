"""Reading every published layout gives the tensors that were saved, and damage is named."""

from __future__ import annotations

import json
import pickle
import random
import sys
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import pytest
import torch
from checkpoint_files import modeling, rewrite_zip, swap_bytes
from safetensors.torch import save_file

from merge_ray.checkpoints import fingerprint_file, read_metadata, read_weights, write_safetensors
from merge_ray.errors import CheckpointError

FORMATS = ("zip", "legacy")


def save(content: object, path: Path, form: str) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path


def assert_same(read: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(read) == list(expected)
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype, name
        assert read[name].shape == tensor.shape, name
        assert torch.equal(read[name], tensor), name


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    shared = torch.randn(3, 4)
    return {
        "weight": shared,
        "tied": shared,
        "transposed": torch.randn(4, 6).t(),
        "part": torch.randn(20)[5:9],
        "expanded": torch.randn(1, 3).expand(4, 3),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "half": torch.randn(3).half(),
        "steps": torch.arange(5),
        "mask": torch.tensor([True, False]),
        "bytes": torch.tensor([1, 255], dtype=torch.uint8),
        "words": torch.tensor([1, 65535], dtype=torch.uint16),
        "complex": torch.randn(3, dtype=torch.complex64),
    }


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "nest",
    [
        lambda state: state,
        lambda state: OrderedDict(state),
        lambda state: {"epoch": 3, "best": torch.tensor(0.9), "state_dict": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model": {"state_dict": state}, "optimizer": {"weight": torch.zeros(3)}},
        lambda state: {"surrogate": state, "log": [1, 2], "name": "run"},
        lambda state: {"epoch": 1, **state},
        lambda state: defaultdict(torch.Tensor, state),
    ],
)
def test_state_dicts_wherever_they_are_nested(state, nest, form: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert_same(read_weights(save(nest(state), tmp_path / "model.pt", form)), state)


@pytest.mark.parametrize("form", FORMATS)
def test_shared_memory_stays_shared_and_the_file_unchanged(state, form: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = save(state, tmp_path / "model.pt", form)
    before = path.read_bytes()
    read = read_weights(path)
    read["weight"].fill_(7.0)
    assert torch.equal(read["tied"], torch.full((3, 4), 7.0))
    assert path.read_bytes() == before


def test_zip_tensors_own_no_more_than_their_storage(state, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = save(state, tmp_path / "model.pt", "zip")
    assert read_weights(path)["weight"].untyped_storage().nbytes() == 3 * 4 * 4


def test_the_other_byte_order(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 2), "b": torch.arange(4), "c": torch.randn(2, dtype=torch.complex64)}
    swap_bytes(state, tmp_path / "model.pt")
    assert_same(read_weights(tmp_path / "model.pt"), state)


@pytest.mark.parametrize("form", FORMATS)
def test_whole_modules_of_classes_that_are_gone(form: str, tmp_path: Path) -> None:
    with modeling(tmp_path) as module:
        encoder = module.ImageEncoder(torch.nn.Sequential(module.Block(), torch.nn.Linear(4, 2, bias=False)))
        save(encoder, tmp_path / "finetuned.pt", form)
        head = module.ClassificationHead(True, torch.randn(3, 4))
        save(head, tmp_path / "head_MNIST.pt", form)
        expected, expected_head = encoder.state_dict(), head.state_dict()
    (tmp_path / "src" / "modeling.py").write_text("raise RuntimeError('imported')")
    read = read_weights(tmp_path / "finetuned.pt")
    assert "model.0.mask" not in read
    assert read["model.0.tied.out_proj.weight"].data_ptr() == read["model.0.attn.out_proj.weight"].data_ptr()
    assert_same(read, expected)
    assert_same(read_weights(tmp_path / "head_MNIST.pt"), expected_head)
    assert "src.modeling" not in sys.modules


@pytest.mark.parametrize("protocol", [1, 3, 4, 5])
def test_modules_of_other_pickle_protocols(protocol: int, tmp_path: Path) -> None:
    with modeling(tmp_path) as module:
        encoder = module.ImageEncoder(module.Block())
        torch.save(encoder, tmp_path / "finetuned.pt", pickle_protocol=protocol)
        expected = encoder.state_dict()
    assert_same(read_weights(tmp_path / "finetuned.pt"), expected)


def test_a_module_inside_a_checkpoint(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save({"epoch": 2, "model": model}, tmp_path / "model.pt")
    assert_same(read_weights(tmp_path / "model.pt"), model.state_dict())


@pytest.mark.parametrize("form", FORMATS)
def test_a_whole_open_clip_model(form: str, tmp_path: Path) -> None:
    import open_clip

    clip = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        text_cfg={"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1},
    )
    with modeling(tmp_path) as module:
        encoder = module.ImageEncoder(clip)
        save(encoder, tmp_path / "zeroshot.pt", form)
    read = read_weights(tmp_path / "zeroshot.pt")
    assert "model.visual.transformer.resblocks.1.attn.in_proj_weight" in read
    assert_same(read, encoder.state_dict())


def test_safetensors_with_metadata(state, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = write_safetensors(tmp_path / "model.safetensors", state, {"method": "ties"})
    read = read_weights(path)
    assert set(read) == set(state)
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    assert read_metadata(path) == {"method": "ties"}
    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors")
    assert read_metadata(tmp_path / "plain.safetensors") == {}


def test_files_are_known_by_their_content(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "weights.bin")
    torch.save({"b": torch.ones(2)}, tmp_path / "weights")
    assert list(read_weights(tmp_path / "weights.bin")) == ["a"]
    assert list(read_weights(tmp_path / "weights")) == ["b"]


def write_shards(folder: Path, form: str) -> Path:
    suffix, stem = (".safetensors", "model") if form == "safetensors" else (".bin", "pytorch_model")
    files = {"a": f"{stem}-00001-of-00002{suffix}", "b": f"{stem}-00002-of-00002{suffix}"}
    for value, (name, file) in enumerate(files.items()):
        tensors = {name: torch.full((2, 2), float(value))}
        if form == "safetensors":
            save_file(tensors, folder / file)
        else:
            torch.save(tensors, folder / file)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return index


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shards(form: str, tmp_path: Path) -> None:
    index = write_shards(tmp_path, form)
    expected = {"a": torch.zeros(2, 2), "b": torch.ones(2, 2)}
    assert_same(read_weights(index), expected)
    assert_same(read_weights(tmp_path), expected)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_missing_shards_and_tensors_are_named(form: str, tmp_path: Path) -> None:
    index = write_shards(tmp_path, form)
    table = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**table, "c": table["a"]}}))
    with pytest.raises(CheckpointError, match=r"1 tensors are not in their shards: c \(in .*00001-of"):
        read_weights(index)
    (tmp_path / table["b"]).unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 shards are missing: .*-00002-of-00002"):
        read_weights(tmp_path)


@pytest.mark.parametrize("content", ["not json", "[]", '{"weight_map": [1]}', "{}"])
def test_a_bad_index(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="not a shard index"):
        read_weights(tmp_path)


def test_an_index_reads_only_its_own_folder(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"shards outside its own folder: \.\./other"):
        read_weights(index)


def test_a_hugging_face_directory_prefers_safetensors(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    torch.save({"b": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    torch.save({"c": torch.ones(2)}, tmp_path / "optimizer.pt")
    assert list(read_weights(str(tmp_path))) == ["a"]


def test_directories_without_one_clear_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a directory without weights"):
        read_weights(tmp_path)
    (tmp_path / "MNIST").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "MNIST" / "finetuned.safetensors")
    with pytest.raises(CheckpointError, match="there are weights in its folders MNIST"):
        read_weights(tmp_path)
    for name in ("finetuned.pt", "zeroshot.pt"):
        torch.save({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"name one of them: finetuned\.pt, zeroshot\.pt"):
        read_weights(tmp_path)


def test_several_sets_of_weights(tmp_path: Path) -> None:
    torch.save({"teacher": {"a": torch.ones(2)}, "student": {"a": torch.ones(2)}}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"several sets of weights \('teacher', 'student'\)"):
        read_weights(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no tensors"),
        ({"state_dict": {}}, "holds no tensors"),
        (torch.ones(2), "holds a single tensor, where a state dict or a module is expected"),
        ([torch.ones(2)], "holds an instance of list"),
        ({0: torch.ones(2)}, "not named by text, but by 0"),
        (torch.nn.Sequential(torch.nn.ReLU()), "holds no tensors"),
        (torch.nn.ParameterDict({"a": torch.eye(2).to_sparse()}), "call torch._utils._rebuild_sparse_tensor"),
    ],
)
def test_files_without_weights(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message) as raised:
        read_weights(tmp_path / "model.pt")
    assert "model.pt" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", b"", "an empty file"),
        ("a.safetensors", b"", "an empty file"),
        ("a.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        ("a.safetensors", b"<!DOCTYPE html><html>", "a web page, not weights"),
        ("a.pt", b"abc" + bytes(254) + b"ustar" + bytes(300), "a tar archive"),
        ("a.txt", b"hello", "a file of unknown kind; read are safetensors"),
        ("a.pt", b"hello", "truncated or damaged"),
        ("a.safetensors", b"hello", "truncated or damaged safetensors file"),
    ],
)
def test_files_of_other_kinds(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / name)


def test_other_zip_archives(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"not one that torch\.save wrote"):
        read_weights(path)
    torch.save({"a": torch.ones(2)}, path)
    rewrite_zip(path, {"constants.pkl": pickle.dumps(())})
    with pytest.raises(CheckpointError, match="a TorchScript archive, which holds code"):
        read_weights(path)
    torch.save({"a": torch.ones(2)}, path)
    rewrite_zip(path, {}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"entries are compressed, which torch\.save never does"):
        read_weights(path)


@pytest.mark.parametrize("form", [*FORMATS, "safetensors"])
@pytest.mark.parametrize("cut", [1, 5, 9, 30, 0.2, 0.4, 0.6, 0.8, 0.95, -1])
def test_truncated_files(form: str, cut: float, state, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pt")
    if form == "safetensors":
        write_safetensors(path, state)
    else:
        save(state, path, form)
    content = path.read_bytes()
    path.write_bytes(content[: int(cut * len(content)) if isinstance(cut, float) else cut])
    with pytest.raises(CheckpointError, match="truncated") as raised:
        read_weights(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("form", FORMATS)
def test_flipped_bytes_never_escape_as_other_errors(form: str, tmp_path: Path) -> None:
    path = save(torch.nn.Sequential(torch.nn.Linear(3, 2)), tmp_path / "model.pt", form)
    content = path.read_bytes()
    draw = random.Random(0)
    failed = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[draw.randrange(min(len(damaged), 1500))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            read_weights(path)
        except CheckpointError:
            failed += 1
    assert failed > 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data/0": bytes(8)}, "the storage '0' has 8 bytes where 48 are expected"),
        ({"data/0": b""}, "the storage '0' has 0 bytes where 48 are expected"),
    ],
)
def test_storages_that_are_too_short(change: dict[str, bytes], message: str, tmp_path: Path) -> None:
    torch.save({"a": torch.randn(3, 4)}, tmp_path / "model.pt")
    rewrite_zip(tmp_path / "model.pt", change)
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / "model.pt")


@pytest.mark.skipif(sys.platform != "linux", reason="a file of Linux")
def test_a_file_that_the_system_will_not_read() -> None:
    with pytest.raises(CheckpointError, match=r"/proc/self/mem: cannot be read \(.*Input/output error"):
        read_weights("/proc/self/mem")


def test_a_tensor_beyond_its_storage(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a": torch.randn(3, 4)}, path)
    with zipfile.ZipFile(path) as archive:
        content = archive.read("model/data.pkl")
    assert content.count(b"K\x03K\x04\x86") == 1  # the shape (3, 4)
    rewrite_zip(path, {"data.pkl": content.replace(b"K\x03K\x04\x86", b"K\x04K\x04\x86")})
    with pytest.raises(CheckpointError, match=r"'a' of shape \[4, 4\] reaches beyond its storage of 12 elements"):
        read_weights(path)


def test_fingerprints_follow_the_content(tmp_path: Path) -> None:
    index = write_shards(tmp_path, "safetensors")
    before = fingerprint_file(index)
    assert fingerprint_file(tmp_path) == before
    shard = tmp_path / "model-00002-of-00002.safetensors"
    one = fingerprint_file(shard)
    assert len(one) == 64
    save_file({"b": torch.zeros(2, 2)}, shard)
    assert fingerprint_file(shard) != one
    assert fingerprint_file(index) != before
    with pytest.raises(CheckpointError, match=r"no such file or directory; the nearest name .* 'model-00001"):
        fingerprint_file(tmp_path / "model-00001-of-00003.safetensors")


def test_metadata_of_a_file_that_is_no_safetensors_file(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_metadata(tmp_path / "model.pt")

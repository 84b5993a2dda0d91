"""Read weights from any of the published layouts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

import safetensors
import torch

from merge_ray.checkpoints.collect import collect_weights
from merge_ray.checkpoints.containers import Container, damage_reported, open_pickled, open_zip
from merge_ray.checkpoints.locations import open_location
from merge_ray.checkpoints.s3_files import Wanted, nothing
from merge_ray.checkpoints.weight_files import PICKLED, SAFETENSORS, SHARD_INDEX, read_weight_map, weight_files
from merge_ray.errors import CheckpointError

KINDS = "safetensors; torch state dicts and modules (.pt, .pth, .bin); a directory or a shard index of such files"


def read_weights(location: str | Path, wanted: Wanted | None = None) -> dict[str, torch.Tensor]:
    """Read the tensors at a location, on the CPU, in the file's dtypes and under the file's names.

    The location is a file, a shard index or a directory, in any form that `open_location` takes. ``wanted(name)`` says
    which tensors to read, by default all; of safetensors on S3, the others are not fetched. Tensors are views of
    the memory-mapped file where the format allows; writing to them does not change the file. Raises CheckpointError
    where there is nothing to read, the file is damaged, or reading it would take running code.
    """
    path = open_location(location, wanted)
    return _read_file(_weight_file(path) if path.is_dir() else path, wanted or (lambda name: True))


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the text metadata of a safetensors file; empty where it has none. Raises CheckpointError."""
    path = open_location(path, nothing)
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error


def fingerprint_file(path: str | Path) -> str:
    """SHA-256 of a weight file, in hex; of a directory or shard index, over the hashes of the index and its shards.

    Raises CheckpointError where there is no such file.
    """
    path = open_location(path)
    path = _weight_file(path) if path.is_dir() else path
    digest = _file_digest(path)
    if not path.name.endswith(SHARD_INDEX):
        return digest
    shards = sorted(set(read_weight_map(path).values()))
    parts = [digest, *(_file_digest(shard) for shard in _shard_paths(path, shards))]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    try:
        with path.open("rb") as stream:
            yield stream
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def _file_digest(path: Path) -> str:
    with _opened(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _weight_file(directory: Path) -> Path:
    names = [entry.name for entry in directory.iterdir() if entry.is_file()]
    files = weight_files(names)
    if not files:
        below = sorted({str(path.parent.relative_to(directory)) for path in directory.glob(f"*/*{SAFETENSORS}")})
        hint = f"; there are weights in its folders {', '.join(below)}" if below else ""
        raise CheckpointError(f"{directory}: a directory without weights (read are {KINDS}){hint}")
    if len(files) > 1:
        raise CheckpointError(f"{directory}: holds several weight files, name one of them: {', '.join(files)}")
    return directory / files[0]


def _read_file(path: Path, wanted: Wanted) -> dict[str, torch.Tensor]:
    if path.name.endswith(SHARD_INDEX):
        return _read_shards(path, wanted)
    read = _read_safetensors if _is_safetensors(path) else _read_torch
    state = read(path, wanted)
    if not state:
        raise CheckpointError(f"{path}: holds no tensors, or none that are wanted")
    return state


def _head(path: Path) -> bytes:
    with _opened(path) as stream:
        return stream.read(512)


def _is_safetensors(path: Path) -> bool:
    """By content: the header's length in 8 bytes, of which the last are zero, then JSON."""
    head = _head(path)
    return (path.suffix == SAFETENSORS and not _foreign(head)) or (head[8:9] == b"{" and head[4:8] == bytes(4))


def _foreign(head: bytes) -> str | None:
    """What a file that holds no weights is, where that is plain to see."""
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"
    if head.lstrip()[:9].lower() == b"<!doctype" or head.lstrip()[:5].lower() == b"<html":
        return "a web page, not weights: the download went wrong"
    if head[257:262] == b"ustar":
        return "a tar archive, which torch wrote before version 0.2: load it with such a version and save it again"
    return None


def _read_safetensors(path: Path, wanted: Wanted) -> dict[str, torch.Tensor]:
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.offset_keys() if wanted(name)}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or damaged safetensors file ({error})") from error


def _open_torch(path: Path) -> Container:
    head = _head(path)
    if foreign := _foreign(head):
        raise CheckpointError(f"{path}: {foreign}")
    if head.startswith(b"PK"):
        return open_zip(path)
    if head.startswith(b"\x80") or path.suffix in PICKLED:
        return open_pickled(path)
    raise CheckpointError(f"{path}: a file of unknown kind; read are {KINDS}")


def _read_torch(path: Path, wanted: Wanted) -> dict[str, torch.Tensor]:
    container = _open_torch(path)
    with damage_reported(container.path):
        records = collect_weights(container.root, container.path)
        return {name: container.tensor(record, name) for name, record in records.items() if wanted(name)}


def _shard_paths(index: Path, shards: Iterable[str]) -> list[Path]:
    paths = [index.parent / shard for shard in shards]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise CheckpointError(f"{index}: {len(missing)} of {len(paths)} shards are missing: {', '.join(missing)}")
    return paths


def _read_shards(index: Path, wanted: Wanted) -> dict[str, torch.Tensor]:
    weight_map = {name: file for name, file in read_weight_map(index).items() if wanted(name)}
    paths = _shard_paths(index, sorted(set(weight_map.values())))
    shards = {path.name: _read_file(path, wanted) for path in paths}
    if absent := [f"{name} (in {file})" for name, file in weight_map.items() if name not in shards[file]]:
        raise CheckpointError(f"{index}: {len(absent)} tensors are not in their shards: {', '.join(absent[:5])}")
    return {name: shards[file][name] for name, file in weight_map.items()}

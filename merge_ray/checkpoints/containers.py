"""The two file formats of torch.save: where in the file the pickle and the storages lie."""

from __future__ import annotations

import io
import mmap
import struct
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch

from merge_ray.checkpoints.records import StorageRecord, TensorRecord
from merge_ray.checkpoints.unpickle import unpickle
from merge_ray.errors import CheckpointError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
ZIP_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # the last two: lengths of the name and of the extra field


@contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Turn whatever reading damaged bytes raises into a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: truncated or damaged ({type(error).__name__}: {error})") from error


class Container:
    """An opened checkpoint: the pickle's root, and the tensors on request, as views of the memory-mapped file.

    `spans` gives (first byte, number of bytes) of each storage; `swapped` says that the elements' bytes are in the
    order that this machine does not use. The mapping is private: writing to a tensor does not change the file.
    """

    def __init__(
        self, path: Path, content: mmap.mmap, root: object, spans: Mapping[str, tuple[int, int]], swapped: bool
    ) -> None:
        self.path, self.root = path, root
        self._content, self._spans, self._swapped = content, spans, swapped
        self._storages: dict[str, torch.Tensor] = {}

    def tensor(self, record: TensorRecord, name: str) -> torch.Tensor:
        """Read one tensor; tensors that shared memory when saved share it again."""
        flat = self._elements(record.storage, record.dtype)
        shape, stride, offset = _integers(record.shape), _integers(record.stride), _integers((record.offset,))
        if shape is None or stride is None or offset is None or len(shape) != len(stride):
            raise CheckpointError(f"{self.path}: damaged: the tensor {name!r} has no valid shape")
        last = offset[0] + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if 0 not in shape and last >= flat.numel():
            raise CheckpointError(
                f"{self.path}: damaged: the tensor {name!r} of shape {list(shape)} reaches beyond its storage "
                f"of {flat.numel()} elements"
            )
        return flat.as_strided(shape, stride, offset[0] if 0 not in shape else 0)

    def _elements(self, storage: StorageRecord, dtype: torch.dtype) -> torch.Tensor:
        """The storage as a flat tensor [length]."""
        counts = _integers((storage.start, storage.length))
        if counts is None or storage.key not in self._spans:
            raise CheckpointError(f"{self.path}: truncated or damaged: the storage {storage.key!r} is missing")
        first, count = (number * storage.dtype.itemsize for number in counts)
        whole = self._bytes(storage.key, dtype)
        if first + count > whole.numel():
            raise CheckpointError(
                f"{self.path}: truncated or damaged: the storage {storage.key!r} has {whole.numel()} bytes "
                f"where {first + count} are expected"
            )
        return whole[first : first + count].view(dtype)

    def _bytes(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        """The storage's bytes, uint8, in this machine's order for elements of `dtype`."""
        if key not in self._storages:
            start, count = self._spans[key]
            if start < 0 or start + count > len(self._content):
                raise CheckpointError(f"{self.path}: truncated: the storage {key!r} lies beyond the end of the file")
            if count == 0:
                return torch.empty(0, dtype=torch.uint8)
            content = torch.frombuffer(self._content, dtype=torch.uint8, count=count, offset=start)
            if self._swapped:
                width = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
                content = content.view(-1, width).flip(1).view(-1)
            # Old files align nothing, and torch wants elements aligned.
            self._storages[key] = content.clone() if content.data_ptr() % 16 else content
        return self._storages[key]


def _integers(values: object) -> tuple[int, ...] | None:
    """`values` as natural numbers, or None where they are anything else."""
    if not isinstance(values, tuple | list) or any(type(value) is not int or value < 0 for value in values):
        return None
    return tuple(values)


def _mapped(stream: IO[bytes]) -> mmap.mmap:
    return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)


def open_zip(path: Path) -> Container:
    """Open what torch.save has written since version 1.6.

    Raises CheckpointError for a damaged file, a TorchScript archive, another kind of zip.
    """
    with damage_reported(path), path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl" and name.count("/") <= 1]
        if len(pickles) != 1:
            raise CheckpointError(f"{path}: a zip archive, but not one that torch.save wrote (it has no data.pkl)")
        prefix = pickles[0].removesuffix("data.pkl")
        if f"{prefix}constants.pkl" in entries:
            raise CheckpointError(
                f"{path}: a TorchScript archive, which holds code; save the weights of the model that it was "
                "made from with torch.save(model.state_dict())"
            )
        if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
            raise CheckpointError(
                f"{path}: its entries are compressed, which torch.save never does; pack it without compression"
            )
        content = _mapped(stream)
        root, _ = unpickle(io.BytesIO(archive.read(pickles[0])), path)
        order = archive.read(f"{prefix}byteorder") if f"{prefix}byteorder" in entries else b"little"
        spans = {
            name.removeprefix(f"{prefix}data/"): _span(content, info)
            for name, info in entries.items()
            if name.startswith(f"{prefix}data/")
        }
    return Container(path, content, root, spans, swapped=_is_swapped(order == b"little"))


def _span(content: mmap.mmap, entry: zipfile.ZipInfo) -> tuple[int, int]:
    *_, name_length, extra_length = ZIP_LOCAL_HEADER.unpack_from(content, entry.header_offset)
    return entry.header_offset + ZIP_LOCAL_HEADER.size + name_length + extra_length, entry.file_size


def open_pickled(path: Path) -> Container:
    """Open what torch.save wrote before version 1.6: five pickles, then the storages; or one bare pickle.

    Raises CheckpointError for a damaged file.
    """
    with damage_reported(path), path.open("rb") as stream:
        first, _ = unpickle(stream, path)
        if first != LEGACY_MAGIC:
            return Container(path, _mapped(stream), first, {}, swapped=False)
        protocol, _ = unpickle(stream, path)
        if protocol != LEGACY_PROTOCOL:
            raise CheckpointError(f"{path}: of torch's file protocol {protocol!r}; known is {LEGACY_PROTOCOL}")
        system, _ = unpickle(stream, path)
        little = bool(system["little_endian"])
        root, element_sizes = unpickle(stream, path)
        keys, _ = unpickle(stream, path)
        content = _mapped(stream)
        spans = _legacy_spans(content, stream.tell(), keys, element_sizes)
    return Container(path, content, root, spans, swapped=_is_swapped(little))


def _legacy_spans(
    content: mmap.mmap, position: int, keys: Iterable[object], element_sizes: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """Each storage is its number of elements (8 bytes) and then its bytes."""
    spans = {}
    for key in map(str, keys):
        (length,) = struct.unpack_from("<q", content, position)
        spans[key] = (position + 8, length * element_sizes[key])
        position += 8 + length * element_sizes[key]
    if position > len(content):
        raise EOFError(f"{len(content)} bytes where {position} are expected")
    return spans


def _is_swapped(little: bool) -> bool:
    return little != (sys.byteorder == "little")

"""The cache of decoded images: one directory per task, split and preprocessing, memory-mapped by its readers.

A directory holds ``images.npy`` (uint8 [N, 3, S, S]), ``labels.npy`` (int64 [N]), ``hashes.npy`` (uint8 [N, 16], of
all pixels before scaling) and ``meta.json``. It is written aside and then renamed: what has its final name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from merge_ray.caches import write_once
from merge_ray.errors import DataError
from merge_ray.tasks.decode import PIXEL_HASH_BYTES, Decoded, decode
from merge_ray.tasks.source import ImagePart, Payload

Progress = Callable[[int, int, str], None]
BATCH = 256
MOST_THREADS = 16


@dataclass(frozen=True)
class PreparedSplit:
    """One split as a model takes it, in a directory of the cache.

    labels: [N]. hashes: uint8 [N, 16], one a sample, equal for equal samples. fingerprint: of all that the split
    holds; the same on every machine. classes: the words of the labels, in their order.
    """

    directory: Path
    labels: np.ndarray
    hashes: np.ndarray
    fingerprint: str
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class CachedSplit(PreparedSplit):
    """One split, decoded. Pickled as its directory and opened again by whoever unpickles it.

    ``images`` is a read-only memory map, uint8 [N, 3, S, S]; ``labels`` int64 [N]. The ``fingerprint`` covers the
    source's bytes (pixels, where the source has no files), the labels and the split's name; it is the same for every
    input size.
    """

    images: np.memmap

    @classmethod
    def open(cls, directory: Path, classes: Sequence[str]) -> CachedSplit:
        """Map a finished cache directory."""
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        images = np.load(directory / "images.npy", mmap_mode="r")
        labels, hashes = np.load(directory / "labels.npy"), np.load(directory / "hashes.npy")
        return cls(directory, labels, hashes, meta["fingerprint"], tuple(classes), images)

    def __reduce__(self) -> tuple[object, tuple[Path, tuple[str, ...]]]:
        return CachedSplit.open, (self.directory, self.classes)


def overlap(first: PreparedSplit, second: PreparedSplit) -> int:
    """How many samples of ``second`` are also in ``first``: images pixel for pixel as decoded, texts by character."""
    key = f"V{PIXEL_HASH_BYTES}"
    known = np.ascontiguousarray(first.hashes).view(key).ravel()
    return int(np.isin(np.ascontiguousarray(second.hashes).view(key).ravel(), known).sum())


@dataclass(frozen=True)
class DecodeJob:
    """What is to be decoded: ``rows`` (ascending) of a part, for the named task and split."""

    task: str
    split: str
    part: ImagePart
    rows: np.ndarray
    size: int
    interpolation: str

    @property
    def text(self) -> str:
        """What a progress bar says."""
        return f"decoding {self.task} {self.split}"


def ensure_cached(directory: Path, find_job: Callable[[], DecodeJob], progress: Progress | None) -> None:
    """See that ``directory`` holds a whole cache. One process decodes; others that want the same wait for it.

    Raises DataError for an image that cannot be read, and where the cache cannot be written.
    """
    if directory.exists():
        return
    job = find_job()
    needed = len(job.rows) * 3 * job.size**2
    what = f"the image cache of task {job.task!r}, split {job.split!r},"
    write_once(directory, what, needed, lambda aside: _write(aside, job, progress))


def _write(directory: Path, job: DecodeJob, progress: Progress | None) -> None:
    labels = job.part.labels[job.rows]
    hashes = np.empty((len(labels), PIXEL_HASH_BYTES), np.uint8)
    digest = hashlib.sha256(job.split.encode() + labels.astype("<i8").tobytes())
    with open(directory / "images.npy", "wb") as file:
        _write_header(file, (len(labels), 3, job.size, job.size))
        for index, decoded in enumerate(_decode_all(job)):
            # Written, not mapped: a full disk is then an error and not a killed process.
            file.write(decoded.pixels.tobytes())
            hashes[index] = np.frombuffer(decoded.pixel_hash, np.uint8)
            digest.update(decoded.source_hash)
            if progress is not None and ((index + 1) % BATCH == 0 or index + 1 == len(labels)):
                progress(index + 1, len(labels), job.text)
    np.save(directory / "labels.npy", labels)
    np.save(directory / "hashes.npy", hashes)
    meta = {
        "task": job.task,
        "split": job.split,
        "size": job.size,
        "interpolation": job.interpolation,
        "count": len(labels),
        "fingerprint": digest.hexdigest(),
    }
    (directory / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _decode_all(job: DecodeJob) -> Iterator[Decoded]:
    """Decode in threads (Pillow lets go of the interpreter lock), a batch in memory at a time, in the rows' order."""

    def decode_row(row: int, load: Callable[[], Payload]) -> Decoded:
        try:
            return decode(load, job.size, job.interpolation)
        except Exception as error:  # Pillow raises many kinds for broken files
            raise DataError(
                f"task {job.task!r}, split {job.split!r}, row {row}: the image cannot be read: {error} "
                f"({job.part.where(row)})"
            ) from error

    with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS)) as pool:
        loads = job.part.read(job.rows)
        for rows in _batches(job.rows.tolist()):
            yield from pool.map(decode_row, rows, islice(loads, len(rows)))


def _batches(rows: Sequence[int]) -> Iterable[Sequence[int]]:
    return (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))

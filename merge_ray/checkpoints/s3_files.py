"""Files and folders of S3 in the cache on this machine.

An object lies in the cache under the hash of its bucket, key, ETag and size, so that what has changed is fetched anew.
It is fetched in parallel parts into a folder aside that is renamed when all are there. Each part is asked for with the
ETag that the object had at first: one that changes meanwhile is an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from botocore.exceptions import BotoCoreError, ClientError

from merge_ray.caches import cache_directory, write_once
from merge_ray.checkpoints.s3 import (
    CONNECTIONS,
    S3Object,
    absent,
    client,
    explained,
    find_object,
    is_transient,
    list_objects,
    most_attempts,
    split_location,
    wait_before,
)
from merge_ray.checkpoints.weight_files import SAFETENSORS, SHARD_INDEX, SMALL_FILES, read_weight_map, weight_files
from merge_ray.errors import CheckpointError

PART = 16 << 20
CHUNK = 1 << 20
HEADER = 1 << 18
GAP = 1 << 20
"""Tensors that lie closer together than this many bytes are fetched in one piece."""
LABEL = 120

Wanted = Callable[[str], bool]
"""Says by its name whether a tensor is needed."""
Span = tuple[int, int]


def nothing(name: str) -> bool:
    """What is wanted where no tensor is: of a folder only the small files are fetched then, of a file its header."""
    return False


def open_s3(location: str, wanted: Wanted | None = None) -> Path:
    """Fetch what ``s3://bucket/key`` means, unless it is in the cache already, and give its local path.

    It means an object (of a shard index, the shards come with it), the only one that matches ``*`` in its name, or a
    folder: of that the weights that would be read and the small files beside them are fetched. Of safetensors only the
    tensors that are ``wanted`` are fetched: the file is whole to look at, but holds zeros in place of the others.
    Raises MissingError where there is nothing, CheckpointError for what else goes wrong.
    """
    bucket, key = split_location(location)
    if "*" in PurePosixPath(key).name:
        return fetch(_only_match(bucket, key), wanted)
    found = find_object(bucket, key) if key and not key.endswith("/") else None
    if found is None:
        return _open_folder(bucket, key, wanted)
    if found.name.endswith(SHARD_INDEX):
        folder = list_objects(bucket, key.removesuffix(found.name))
        return _gather([found, *_shards(found, folder, wanted)], wanted) / found.name
    return fetch(found, wanted)


def fetch(found: S3Object, wanted: Wanted | None = None) -> Path:
    """The object as a local file; see :func:`open_s3`."""
    whole = _place([found])
    spans = None
    if wanted is not None and found.name.endswith(SAFETENSORS) and not whole.exists():
        spans = _wanted_spans(found, wanted)
    directory = whole if spans is None else _place([found], spans)
    spans = spans or [(0, found.size)]
    size = sum(end - start for start, end in spans)

    def download(aside: Path) -> None:
        with explained(found.bucket, found.key):
            _download(found, spans, aside / found.name)

    write_once(directory, f"the copy of {found}", size, download, CheckpointError)
    return directory / found.name


def _only_match(bucket: str, pattern: str) -> S3Object:
    below = list_objects(bucket, pattern.partition("*")[0])
    found = [item for item in below if fnmatchcase(item.key, pattern)]
    if len(found) != 1:
        named = ", ".join(item.name for item in found) or "no object"
        raise CheckpointError(f"s3://{bucket}/{pattern}: matches {named}, where one object is meant")
    return found[0]


def _open_folder(bucket: str, key: str, wanted: Wanted | None) -> Path:
    prefix = f"{key.rstrip('/')}/" if key else ""
    here = list_objects(bucket, prefix)
    if not here:
        raise absent(bucket, key)
    weights = [] if wanted is nothing else weight_files(item.name for item in here)
    if len(weights) > 1:
        raise CheckpointError(
            f"s3://{bucket}/{key}: holds several weight files, name one of them: {', '.join(weights)}"
        )
    chosen = [item for item in here if item.name in weights]
    shards = [shard for index in chosen if index.name.endswith(SHARD_INDEX) for shard in _shards(index, here, wanted)]
    small = [item for item in here if item.name.endswith(SMALL_FILES) and not item.name.endswith(SHARD_INDEX)]
    if not chosen and not small:
        held = ", ".join(item.name for item in here)
        raise CheckpointError(f"s3://{bucket}/{key}: a folder without weights or configuration; it holds {held}")
    return _gather([*chosen, *shards, *small], wanted)


def _shards(index: S3Object, folder: Iterable[S3Object], wanted: Wanted | None) -> list[S3Object]:
    """The shards of an index that hold something wanted, as far as they are there."""
    weight_map = read_weight_map(fetch(index))
    files = {file for name, file in weight_map.items() if wanted is None or wanted(name)}
    return [item for item in folder if item.name in files]


def _gather(items: Sequence[S3Object], wanted: Wanted | None) -> Path:
    """A folder in which the objects lie side by side."""
    files = [fetch(item, wanted) for item in items]
    directory = _place(items, [str(file) for file in files])

    def link(aside: Path) -> None:
        for file in files:
            (aside / file.name).symlink_to(file)

    write_once(directory, f"the copy of the folder of {items[0]}", 0, link, CheckpointError)
    return directory


def _place(items: Sequence[S3Object], *more: object) -> Path:
    """The cache's directory for these objects as they are; its name is for people."""
    parts = [client().meta.endpoint_url, [[item.bucket, item.key, item.etag, item.size] for item in items], *more]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    label = re.sub(r"[^\w.-]+", "-", f"{items[0].bucket}-{items[0].key}")[:LABEL]
    return cache_directory().absolute() / "s3" / f"{label}-{digest[:16]}"


def _download(found: S3Object, spans: Iterable[Span], path: Path) -> None:
    """Write the bytes of ``spans`` to their places in ``path``, a file of the object's size."""
    parts = [(first, min(first + PART, end)) for start, end in spans for first in range(start, end, PART)]
    with path.open("wb") as file, ThreadPoolExecutor(min(CONNECTIONS, max(len(parts), 1))) as pool:
        file.truncate(found.size)

        def fill(part: Span) -> None:
            _read(found, *part, lambda piece, position: os.pwrite(file.fileno(), piece, position))

        list(pool.map(fill, parts))


def _read(found: S3Object, start: int, end: int, write: Callable[[bytes, int], object]) -> None:
    """Give the bytes from ``start`` to ``end`` to ``write(bytes, position)``, piece by piece.

    A transfer that breaks off goes on where it was; boto3's own retries are for whole requests. Raises what boto3
    raises, and CheckpointError for an answer that is not the part that was asked for.
    """
    failures = 0
    while start < end:
        span, before = f"bytes={start}-{end - 1}", start
        try:
            answer = client(attempts=1).get_object(Bucket=found.bucket, Key=found.key, IfMatch=found.etag, Range=span)
            if answer.get("ContentRange") != f"bytes {start}-{end - 1}/{found.size}":
                raise CheckpointError(f"{found}: the server does not answer with the part that was asked for")
            with closing(answer["Body"]) as body:
                for piece in body.iter_chunks(CHUNK):
                    write(piece, start)
                    start += len(piece)
        except (BotoCoreError, ClientError) as error:
            failures = 1 if start > before else failures + 1
            if not is_transient(error) or failures == most_attempts():
                raise
            wait_before(failures)


def _wanted_spans(found: S3Object, wanted: Wanted) -> list[Span] | None:
    """Where the header and the wanted tensors of a safetensors file lie; None where that is all of it, or it is none.

    The file is the header's length N (8 bytes, little-endian), N bytes of JSON, and the tensors, whose places are
    counted from the end of the header.
    """
    header = _head(found, HEADER)
    length = int.from_bytes(header[:8], "little")
    if len(header) < 9 or header[8:9] != b"{" or 8 + length > found.size:
        return None
    if 8 + length > len(header):
        header = _head(found, 8 + length)
    try:
        entries = json.loads(header[8 : 8 + length])
        places = [(entry["data_offsets"], wanted(name)) for name, entry in entries.items() if name != "__metadata__"]
        tensors = sorted((8 + length + first, 8 + length + last) for (first, last), needed in places if needed)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # what is wrong with the file is told by who reads it
    spans = [(0, 8 + length)]
    for start, end in tensors:
        if start - spans[-1][1] <= GAP:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return None if spans == [(0, found.size)] else spans


def _head(found: S3Object, length: int) -> bytes:
    pieces: list[bytes] = []
    with explained(found.bucket, found.key):
        _read(found, 0, min(length, found.size), lambda piece, _: pieces.append(piece))
    return b"".join(pieces)

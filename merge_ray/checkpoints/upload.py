"""Writing to S3 what is made as a file or a directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from merge_ray.checkpoints.s3 import client, explained, split_location


@contextmanager
def destination(location: str | Path) -> Iterator[Path]:
    """The path to write at for a location: itself, or for ``s3://bucket/key`` one aside, which is put there at the end.

    What is there may be a file or a directory. Raises CheckpointError where S3 does not take it.
    """
    if isinstance(location, Path) or not location.startswith("s3://"):
        yield Path(location)
        return
    bucket, key = split_location(location.rstrip("/"))
    with TemporaryDirectory() as folder:
        path = Path(folder) / Path(key).name
        yield path
        for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
            target = key if file == path else f"{key}/{file.relative_to(path).as_posix()}"
            with explained(bucket, target), file.open("rb") as content:
                client().upload_fileobj(content, bucket, target)

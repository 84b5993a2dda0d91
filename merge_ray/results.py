"""A results directory: a folder, or a place on S3 with a copy in a folder here, which is read like any other.

What is written to S3 lies there before it appears in the copy, so that the copy never knows more than S3.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from botocore.exceptions import ClientError, HTTPClientError, IncompleteReadError
from filelock import FileLock
from pydantic import BeforeValidator

from merge_ray.caches import cache_directory
from merge_ray.checkpoints.s3 import ATTEMPTS, CONNECTIONS, S3Object, client, explained, list_objects, split_location
from merge_ray.errors import CheckpointError, LedgerError
from merge_ray.lock import BEAT_SECONDS, LEASE_SECONDS, check_lock, hold_lock
from merge_ray.progress import Progress

FOLDERS = ("trials", "artifacts", "learning")
"""The folders that lie on S3; Ray Tune's own files stay on the driver's machine."""
LOCK, OWNER, REFRESHING = ".lock", ".owner", ".refreshing"
ROUNDS = 8
"""How often S3 is listed again while what was listed changes or comes in parts only."""
MOST_REMOVED = 1000
"""Objects that one request removes at most, by S3's interface."""


def _not_on_s3(value: object) -> object:
    if str(value).startswith("s3:"):
        raise ValueError("this is written to a local directory only, which can be copied to S3 afterwards")
    return value


LocalDirectory = Annotated[Path, BeforeValidator(_not_on_s3)]
"""A directory of a spec that cannot be on S3."""


@dataclass(frozen=True)
class Results:
    """A results directory that is open.

    location: as it is called in messages. directory: the folder to read. bucket, prefix: where it lies on S3, if there.
    owner: the token of the lock of the driver that writes, see :func:`own_results`; without it no lock is looked at.
    """

    location: str
    directory: Path
    bucket: str = ""
    prefix: str = ""
    owner: str = ""

    @property
    def on_s3(self) -> bool:
        """Whether ``directory`` is a copy."""
        return bool(self.bucket)

    def write(self, name: str, write: Callable[[Any], object]) -> Path:
        """Write a file in one step, to S3 first, and return its path here; raises :class:`LedgerError`."""
        path = self.directory / name
        write_durably(path, write, lambda aside: self._put({name: aside}))
        return path

    def move(self, folder: str, target: str) -> None:
        """Put a folder of files in another's place, if there is one."""
        source = self.directory / folder
        if source.exists():
            self.remove(target)
            files = {file.name: file for file in source.iterdir()}
            self._put({f"{target}/{name}": file for name, file in files.items()})
            source.rename(self.directory / target)
            self._delete([f"{folder}/{name}" for name in files])

    def remove(self, *names: str) -> None:
        """Remove files and folders, those that there are."""
        paths = [self.directory / name for name in names]
        files = [file for path in paths for file in (path.iterdir() if path.is_dir() else [path])]
        self._delete([self._name(file) for file in files])
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def refresh(self, part: str = "") -> None:
        """Bring the copy, or what has names that begin with ``part``, up to date; raises :class:`LedgerError`."""
        if not self.on_s3:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._says("cannot read"), FileLock(self.directory / REFRESHING):
            # A sweep of this machine keeps the copy up to date, and knows more than a list that was made before.
            if not self.owner and _in_use(self.directory):
                return
            for rest in reversed(range(ROUNDS)):
                if self._fetch_changes(part, last=not rest):
                    return

    def files(self) -> Iterator[Path]:
        """The files that are on S3 too, and what a process that was killed has left among them."""
        yield from (file for file in self.directory.glob("*") if file.is_file() and not file.name.startswith("."))
        for folder in FOLDERS:
            yield from (file for file in (self.directory / folder).rglob("*") if file.is_file())

    def _fetch_changes(self, part: str, last: bool) -> bool:
        """List and fetch; False if something changed meanwhile or went away, as what is compacted does, or was cut."""
        objects = list_objects(self.bucket, f"{self.prefix}/{part}", recursive=True)
        listed = {item.key.removeprefix(f"{self.prefix}/"): item for item in objects}
        listed = {name: item for name, item in listed.items() if _is_copied(name)}
        here = {name: file for file in self.files() if (name := self._name(file)).startswith(part)}
        changed = [name for name, item in listed.items() if not (name in here and _is_same(here[name], item))]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            whole = all(list(pool.map(lambda name: self._fetch(name, listed[name], last), changed)))
        if whole:
            for name in here.keys() - listed.keys():
                here[name].unlink()
        return whole

    def _fetch(self, name: str, item: S3Object, last: bool) -> bool:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            body = client().get_object(Bucket=item.bucket, Key=item.key, IfMatch=item.etag)["Body"]
            write_durably(path, lambda file: shutil.copyfileobj(body, file))
        except (ClientError, IncompleteReadError, HTTPClientError) as error:
            if last or (isinstance(error, ClientError) and error.response["Error"]["Code"] not in _CHANGED):
                raise
            return False
        return True

    def _put(self, files: Mapping[str, Path]) -> None:
        """Put files on S3 by name; where the directory does not lie there, nothing is to be done."""
        if self.on_s3 and files:
            with self._says("cannot write"):
                self._check_lock()
                for name, file in files.items():
                    with file.open("rb") as body:
                        client(ATTEMPTS).put_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}", Body=body)

    def _delete(self, names: Sequence[str]) -> None:
        if self.on_s3 and names:
            with self._says("cannot remove from"):
                self._check_lock()
                for start in range(0, len(names), MOST_REMOVED):
                    keys = [{"Key": f"{self.prefix}/{name}"} for name in names[start : start + MOST_REMOVED]]
                    answer = client(ATTEMPTS).delete_objects(Bucket=self.bucket, Delete={"Objects": keys})
                    for refused in answer.get("Errors", ()):
                        raise LedgerError(f"cannot remove s3://{self.bucket}/{refused['Key']}: {refused['Code']}")

    def _check_lock(self) -> None:
        if self.owner:
            check_lock(self.bucket, f"{self.prefix}/{LOCK}", self.owner)

    @contextmanager
    def _says(self, failed: str) -> Iterator[None]:
        try:
            with explained(self.bucket, self.prefix):
                yield
        except CheckpointError as error:
            again = "; run the same command again to go on" if self.owner else ""
            raise LedgerError(f"{failed} {error}{again}") from None

    def _name(self, file: Path) -> str:
        return file.relative_to(self.directory).as_posix()


_CHANGED = ("404", "NoSuchKey", "412", "PreconditionFailed")


def results_at(location: str | Path) -> Results:
    """The results directory at a path or an ``s3://`` location; nothing is read yet. Raises CheckpointError."""
    if isinstance(location, Path) or not location.startswith("s3://"):
        return Results(str(location), Path(location))
    bucket, prefix = split_location(location.rstrip("/"))
    with explained(bucket, prefix):
        place = hashlib.sha256(f"{client().meta.endpoint_url} {bucket} {prefix}".encode()).hexdigest()[:16]
    directory = cache_directory() / "results" / f"{Path(prefix).name}-{place}"
    return Results(f"s3://{bucket}/{prefix}", directory, bucket, prefix)


def open_results(location: str | Path | Results, part: str = "") -> Results:
    """A results directory to read, or the part of it whose names begin with ``part``; raises :class:`LedgerError`."""
    if isinstance(location, Results):
        return location
    results = results_at(location)
    results.refresh(part)
    if results.on_s3 and not any(results.files()):
        raise LedgerError(f"{location} is not a results directory: there is nothing at that place")
    return results


@contextmanager
def own_results(
    location: str, progress: Progress, beat: float = BEAT_SECONDS, lease: float = LEASE_SECONDS
) -> Iterator[Results]:
    """Hold a results directory for this process alone, up to date; it may be written for the time of the block.

    beat, lease: see :func:`merge_ray.lock.hold_lock`. Raises :class:`LedgerError`, with the holder's name, when another
    process has it.
    """
    results = results_at(location)
    with ExitStack() as held:
        if not results.on_s3:
            held.enter_context(_own_directory(results))
            yield results
            return
        results.directory.mkdir(parents=True, exist_ok=True)
        with FileLock(results.directory / REFRESHING):
            held.enter_context(_own_directory(results))
        # Who held this copy before is dead, or would hold it still.
        former = results.directory / OWNER
        known = former.read_text() if former.exists() else ""
        owner = held.enter_context(hold_lock(results.bucket, f"{results.prefix}/{LOCK}", known, progress, beat, lease))
        former.write_text(owner)
        results = replace(results, owner=owner)
        results.refresh()
        yield results


@contextmanager
def _own_directory(results: Results) -> Iterator[None]:
    """Hold a folder for this process alone; the lock goes with the process, however it ends."""
    directory = results.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / LOCK).open("a+")
    except OSError as error:
        raise LedgerError(f"cannot write to the results directory {directory}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise LedgerError(
                f"{results.location} is in use by process {lock.read().strip()}; wait for it or end it"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def write_durably(
    path: Path, write: Callable[[Any], object], publish: Callable[[Path], object] = lambda aside: None
) -> None:
    """Write a file aside, force it to the disk, ``publish`` it, and move it into place in one step.

    Raises :class:`LedgerError` when there is no room or no permission; the old file, if any, stays.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        publish(aside)
        aside.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise LedgerError(
            f"cannot write {path}: {error.strerror or error}; run the same command again to go on"
        ) from None
    finally:
        aside.unlink(missing_ok=True)


def _in_use(directory: Path) -> bool:
    """Whether a sweep of this machine holds the folder."""
    try:
        with (directory / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _is_copied(name: str) -> bool:
    folder, slash, _ = name.partition("/")
    return folder in FOLDERS if slash else not name.startswith(".")


def _is_same(file: Path, item: S3Object) -> bool:
    """Whether a file is the listed object. The ETag of what was put at once is its MD5; what has another comes anew."""
    if file.stat().st_size != item.size:
        return False
    with file.open("rb") as content:
        return hashlib.file_digest(content, "md5").hexdigest() == item.etag.strip('"')

"""One driver at a time for results on S3: a lock object that its holder renews, and that outlives nobody.

Conditional puts decide who holds it: ``If-None-Match`` where there is none, ``If-Match`` with the ETag of the one that
was seen. Whether a holder lives is seen from the ETag, which every renewal changes, by the looker's own monotonic
clock: no two clocks are ever compared, and none that is set does harm.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from botocore.exceptions import ClientError

from merge_ray.checkpoints.s3 import ATTEMPTS, FIRST_ATTEMPTS, client, explained
from merge_ray.errors import CheckpointError, LedgerError
from merge_ray.progress import Progress

BEAT_SECONDS = 10.0
"""How often a holder renews its lock."""
LEASE_SECONDS = 60.0
"""A lock that was not renewed for so long is anybody's."""
ANYBODY = "anybody"


@contextmanager
def hold_lock(
    bucket: str,
    key: str,
    former: str,
    progress: Progress,
    beat: float = BEAT_SECONDS,
    lease: float = LEASE_SECONDS,
) -> Iterator[str]:
    """Hold the lock object of this key for the time of a ``with`` block; yields the owner's token.

    former: the token of an owner that is known to be dead, whose lock is taken over at once; that of another only
    after ``lease`` seconds without a renewal. Raises LedgerError, with the holder's name, when it renews its lock.
    """
    lock = _Lock(bucket, key, progress, beat, lease)
    try:
        lock.acquire(former)
    except CheckpointError as error:
        raise LedgerError(f"cannot lock {error}") from None
    ended = threading.Event()
    beats = threading.Thread(target=lock.renew_until, args=(ended,), daemon=True)
    beats.start()
    try:
        yield lock.owner
    finally:
        ended.set()
        beats.join()
        # Whoever cannot say that it has ended is found dead after a lease.
        with suppress(CheckpointError):
            lock.put(ANYBODY)


def check_lock(bucket: str, key: str, owner: str) -> None:
    """Raise LedgerError unless ``owner`` still holds the lock: one who has lost it must not write on.

    A takeover may come between this check and the write. That does no harm: objects with rows are named by their
    content, so that a late put replaces nothing and a late removal takes nothing but what lies in a larger object.
    """
    try:
        holder = client(ATTEMPTS).head_object(Bucket=bucket, Key=key)["Metadata"].get("owner")
    except ClientError as error:
        if _status(error) != 404:
            raise
        holder = None
    if holder != owner:
        raise LedgerError(
            f"s3://{bucket}/{key} is another's now: this sweep could not renew it for too long, or it was removed"
        )


class _Lock:
    def __init__(self, bucket: str, key: str, progress: Progress, beat: float, lease: float) -> None:
        self.bucket, self.key, self.progress, self.beat, self.lease = bucket, key, progress, beat, lease
        self.owner = uuid.uuid4().hex
        self.about = {"host": socket.gethostname(), "process": os.getpid(), "since": f"{datetime.now(UTC):%F %T} UTC"}
        self.renewals = 0
        self.etag: str | None = None

    def acquire(self, former: str) -> None:
        """Take the lock, where it is free or its holder is dead."""
        while not self.put(self.owner):
            self.etag = self._abandoned(former)

    def put(self, owner: str) -> bool:
        """Write the lock over the one with the ETag that is known, or where there is none; whether it is ours then."""
        self.renewals += 1
        content = json.dumps({"owner": owner, "renewals": self.renewals, **self.about})
        expected = {"IfMatch": self.etag} if self.etag else {"IfNoneMatch": "*"}
        with explained(self.bucket, self.key):
            try:
                answer = client(FIRST_ATTEMPTS).put_object(
                    Bucket=self.bucket, Key=self.key, Body=content, Metadata={"owner": owner}, **expected
                )
            except ClientError as error:
                if _status(error) not in (409, 412) and _code(error) != "NoSuchKey":
                    raise
                answer = None
        if answer is None:
            # An earlier try may have been written and only its answer lost.
            etag, holder = self._read()
            if holder.get("owner") != self.owner:
                return False
            self.etag = etag
            return self.put(owner)
        self.etag = answer["ETag"]
        return True

    def renew_until(self, ended: threading.Event) -> None:
        """Renew the lock again and again; an outage is told and waited for."""
        silent = False
        while not ended.wait(self.beat):
            try:
                if not self.put(self.owner):
                    self.progress.warn(f"s3://{self.bucket}/{self.key} is another's now; this sweep writes no more")
                    return
            except CheckpointError as error:
                if not silent:
                    self.progress.warn(f"{error}; trying again")
                silent = True
            else:
                if silent:
                    self.progress.line(f"s3://{self.bucket}/{self.key}: S3 answers again")
                silent = False

    def _abandoned(self, former: str) -> str | None:
        """The ETag of a lock whose holder is dead, None where there is none; raises LedgerError if it lives."""
        etag, holder = first, _ = self._read()
        since = time.monotonic()
        with self.progress.step(f"see whether {_name(holder)} lives"):
            while holder.get("owner", ANYBODY) not in (ANYBODY, former):
                if etag != first:
                    raise LedgerError(
                        f"s3://{self.bucket}/{self.key} is held by {_name(holder)}; wait for it or end it"
                    )
                if time.monotonic() - since >= self.lease:
                    break
                time.sleep(self.beat / 2)
                asked = time.monotonic()
                etag, holder = self._read()
                if time.monotonic() - asked > self.beat:
                    # While S3 does not answer, a holder cannot renew its lock either.
                    since = time.monotonic()
        return etag

    def _read(self) -> tuple[str | None, dict[str, Any]]:
        """The lock's ETag and what it says; None and nothing where there is none."""
        with explained(self.bucket, self.key):
            try:
                answer = client(FIRST_ATTEMPTS).get_object(Bucket=self.bucket, Key=self.key)
                return answer["ETag"], json.loads(answer["Body"].read())
            except ClientError as error:
                if _code(error) != "NoSuchKey":
                    raise
                return None, {}


def _status(error: ClientError) -> int:
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def _code(error: ClientError) -> str:
    return str(error.response["Error"]["Code"])


def _name(holder: Mapping[str, Any]) -> str:
    return f"process {holder.get('process')} on {holder.get('host')} since {holder.get('since')}"

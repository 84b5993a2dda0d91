"""S3, and what speaks like it, through boto3: settings, the client, objects and listings, and what errors mean.

Errors are told by their codes alone: what a server or a library writes about a refused request may repeat keys.
"""

from __future__ import annotations

import difflib
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
)
from botocore.parsers import ResponseParserError
from botocore.session import Session
from pydantic import BaseModel, ConfigDict, model_validator

from merge_ray.errors import CheckpointError, MergeRayError, MissingError, choose_from

CONNECTIONS = 16
CONNECT_SECONDS, READ_SECONDS = 10, 30
FIRST_ATTEMPTS, ATTEMPTS = 4, 16
"""Attempts until an endpoint has answered once, so that a wrong one is soon told, and from then on: with the backoff of
boto3's standard mode, up to 20 s a wait, an outage of a minute passes. ``AWS_MAX_ATTEMPTS`` replaces both."""
_NO_S3 = "what answers at {} does not speak S3; check s3.endpoint (or AWS_ENDPOINT_URL)"
BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")

_answered: set[str] = set()
_lock = threading.Lock()


class S3Settings(BaseModel):
    """The block ``s3`` of a spec: what it says replaces what the environment says. Credentials have no place in it."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    endpoint: str | None = None
    """The address of a server that is not Amazon's, such as ``http://localhost:9000``."""
    region: str | None = None
    profile: str | None = None
    """A profile of ``~/.aws/config``; it counts for more than keys in the environment."""
    anonymous: bool = False
    """Do not sign requests: for public buckets."""

    @model_validator(mode="after")
    def _endpoint_is_an_address(self) -> S3Settings:
        # Checked on the whole, because a mistake in the field would be told with what was given.
        parts = urlsplit(self.endpoint or "http://none")
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ValueError("endpoint: an address http://host[:port] or https://host[:port], without credentials")
        return self

    def environment(self) -> dict[str, str]:
        """The variables that say the same to :func:`client`."""
        settings = {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_REGION": self.region,
            "AWS_PROFILE": self.profile,
            "AWS_DEFAULT_PROFILE": self.profile,
            "AWS_ACCESS_KEY_ID": None if self.profile is None else "",
            "AWS_NO_SIGN_REQUEST": "true" if self.anonymous else None,
        }
        return {name: value for name, value in settings.items() if value is not None}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Make the settings hold for this process, until the end of the block."""
        before = {name: os.environ.get(name) for name in self.environment()}
        os.environ.update(self.environment())
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@dataclass(frozen=True)
class S3Object:
    """An object as it was when it was listed: its ETag changes whenever its content does."""

    bucket: str
    key: str
    etag: str
    size: int

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


def client(attempts: int | None = None) -> Any:
    """The boto3 client of S3 for what the environment says now: call it anew for each request, or few of them.

    Endpoint, region, profile and credentials are found as boto3 finds them (``AWS_ENDPOINT_URL``, ``AWS_PROFILE``,
    ...); ``AWS_REGION`` counts too, and ``AWS_NO_SIGN_REQUEST=true`` means anonymous access. Threads may share it.

    attempts: how often a request is made, where that is not to depend on whether the endpoint has answered yet. Many
    threads that sit out an outage want 1 and a loop of their own: boto3's quota of retries is one for the client.
    """
    with _lock:
        if attempts is not None:
            return _client(_environment(), attempts)
        patient = _client(_environment(), most_attempts())
        if patient.meta.endpoint_url in _answered:
            return patient
        return _client(_environment(), min(FIRST_ATTEMPTS, most_attempts()))


def most_attempts() -> int:
    """How often a request is made that finds no answer, or that the server cannot take now."""
    return int(os.environ.get("AWS_MAX_ATTEMPTS", ATTEMPTS))


def is_transient(error: Exception) -> bool:
    """Whether the same request may do better later: no answer, half an answer, a server's error, throttling."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status == 429 or _code(error) in ("SlowDown", "RequestTimeout", "Throttling")
    return isinstance(error, ConnectionError | HTTPClientError | IncompleteReadError)


def wait_before(attempt: int) -> None:
    """Sleep before the ``attempt``-th retry, as boto3's standard mode does: 0 to 2^n seconds, at most 20."""
    time.sleep(random.uniform(0, min(2 ** (attempt - 1), 20)))


def _environment() -> tuple[tuple[str, str], ...]:
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))


@cache
def _session(environment: tuple[tuple[str, str], ...]) -> Any:
    return boto3.Session(region_name=dict(environment).get("AWS_REGION"))


@cache
def _client(environment: tuple[tuple[str, str], ...], attempts: int) -> Any:
    config = Config(
        signature_version=UNSIGNED if _is_anonymous() else None,
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        max_pool_connections=CONNECTIONS,
    )
    made = _session(environment).client("s3", config=config)

    def note_answer(exception: Exception | None = None, **_: object) -> None:
        if exception is None:
            _answered.add(made.meta.endpoint_url)

    made.meta.events.register("response-received.s3", note_answer)
    return made


def _is_anonymous() -> bool:
    return os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "true", "yes")


def arrow_filesystem() -> Any:
    """pyarrow's file system of S3 with the settings and credentials of :func:`client`; its paths are bucket/key."""
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    meta = client().meta
    endpoint = urlsplit(meta.endpoint_url)
    settings: dict[str, Any] = {"region": meta.region_name, "anonymous": _is_anonymous()}
    if not (endpoint.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn")):
        settings |= {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
    credentials = None if _is_anonymous() else _session(_environment()).get_credentials()
    if credentials is not None:
        frozen = credentials.get_frozen_credentials()
        settings |= {
            "access_key": frozen.access_key,
            "secret_key": frozen.secret_key,
            "session_token": frozen.token,
        }
    return S3FileSystem(
        connect_timeout=CONNECT_SECONDS,
        request_timeout=READ_SECONDS,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=most_attempts()),
        **settings,
    )


def split_location(location: str) -> tuple[str, str]:
    """Bucket and key of ``s3://bucket/key``; raises CheckpointError where it is none."""
    bucket, _, key = location.removeprefix("s3:").removeprefix("//").partition("/")
    if "@" in bucket or ":" in bucket:
        raise CheckpointError("s3://...: a location is s3://bucket/key, without credentials; these belong in ~/.aws")
    if not BUCKET.fullmatch(bucket):
        raise CheckpointError(f"s3://{bucket}/{key}: {bucket!r} is no name of a bucket; expected s3://bucket/key")
    return bucket, key


def find_object(bucket: str, key: str) -> S3Object | None:
    """The object, or None where there is none of that key (or no such bucket); raises CheckpointError."""
    with explained(bucket, key):
        try:
            answer = client().head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if _code(error) in ("404", "NoSuchKey"):
                return None
            # The answer to a HEAD has no body; that to a GET says why.
            client().get_object(Bucket=bucket, Key=key, Range="bytes=0-0")["Body"].close()
            raise
    if "ETag" not in answer:
        raise CheckpointError(f"s3://{bucket}/{key}: {_NO_S3.format(_endpoint())}")
    return S3Object(bucket, key, answer["ETag"], answer["ContentLength"])


def list_objects(bucket: str, prefix: str, recursive: bool = False) -> list[S3Object]:
    """The objects whose keys begin with ``prefix``, by key; those with a further slash only where ``recursive``.

    Raises MissingError where there is no such bucket, CheckpointError for what else goes wrong.
    """
    with explained(bucket, prefix):
        pages = client().get_paginator("list_objects_v2")
        asked = {"Bucket": bucket, "Prefix": prefix, **({} if recursive else {"Delimiter": "/"})}
        return [
            S3Object(bucket, entry["Key"], entry["ETag"], entry["Size"])
            for page in pages.paginate(**asked)
            for entry in page.get("Contents", ())
            if not entry["Key"].endswith("/")
        ]


def absent(bucket: str, key: str) -> MissingError:
    """The error for a key that is not there, with the nearest one of its folder."""
    folder, _, name = key.rstrip("/").rpartition("/")
    prefix = f"{folder}/" if folder else ""
    with explained(bucket, key):
        page = client().list_objects_v2(Bucket=bucket, Prefix=prefix, Delimiter="/")
    names = [entry["Key"].removeprefix(prefix) for entry in page.get("Contents", ())]
    names += [entry["Prefix"].removeprefix(prefix).rstrip("/") for entry in page.get("CommonPrefixes", ())]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    found = f"the nearest name is {near[0]!r}" if near else "there is nothing like it" if names else "there is nothing"
    return MissingError(f"s3://{bucket}/{key}: no such object or folder; in s3://{bucket}/{prefix} {found}")


@contextmanager
def explained(bucket: str, key: str = "") -> Iterator[None]:
    """What goes wrong with S3 inside is a CheckpointError that names the object, and says what to do."""
    location = f"s3://{bucket}/{key}"
    try:
        yield
    except ClientError as error:
        kind = MissingError if _code(error) in ("NoSuchBucket", "404") else CheckpointError
        raise kind(f"{location}: {_refusal(error, bucket)}") from None
    except BotoCoreError as error:
        raise CheckpointError(f"{location}: {_failure(error)}") from None
    except ResponseParserError:
        raise CheckpointError(f"{location}: {_NO_S3.format(_endpoint())}") from None
    except MergeRayError:
        raise
    except ValueError:  # the only sign of an endpoint that is no address
        raise CheckpointError(f"{location}: the endpoint in AWS_ENDPOINT_URL is not an address http://host") from None


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _endpoint() -> str:
    """The endpoint as messages show it: without what may be secret in an address."""
    address = urlsplit(client().meta.endpoint_url)
    return f"{address.scheme}://{address.netloc.rpartition('@')[2]}"


def _refusal(error: ClientError, bucket: str) -> str:
    """What a server's refusal means."""
    code = _code(error)
    answer = error.response.get("ResponseMetadata", {})
    status = answer.get("HTTPStatusCode")
    region = answer.get("HTTPHeaders", {}).get("x-amz-bucket-region") or error.response.get("Error", {}).get("Region")
    if code in ("NoSuchBucket", "404"):
        return f"there is no bucket {bucket!r} at {_endpoint()}; check its name and s3.endpoint (or AWS_ENDPOINT_URL)"
    if code == "NoSuchKey":
        return "it is no longer there: it was deleted while it was being read"
    if code in ("412", "PreconditionFailed"):
        return "it changed while it was being read; run again once nothing writes to it"
    if code in ("301", "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        found = f"the bucket is in region {region!r}" if region else "the bucket is in another region"
        return f"{found}, not in {client().meta.region_name!r}; set s3.region (or AWS_REGION)"
    if code in ("401", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
        return f"the credentials are not valid ({code}); renew them, or choose others with s3.profile (or AWS_PROFILE)"
    if status == 403:
        who, instead = "these credentials", "; choose others with s3.profile (or AWS_PROFILE), or s3.anonymous: true"
        if _is_anonymous():
            who, instead = "anonymous access", "; leave out s3.anonymous to use credentials"
        return (
            f"no permission ({code}): {who} may not read it, or it does not exist, which is not told without the "
            f"permission to list the bucket{instead}"
        )
    if status is not None and status >= 500:
        return f"{_endpoint()} answers {code} ({status}) again and again; given up, run again later"
    return f"{_endpoint()} refuses the request ({code}, {status})"


def _failure(error: BotoCoreError) -> str:
    """What it means that there was no answer, or no request."""
    kind = type(error).__name__
    if isinstance(error, ProfileNotFound):
        profile = os.environ.get("AWS_DEFAULT_PROFILE") or os.environ.get("AWS_PROFILE")
        return f"there is no profile {profile!r} in ~/.aws; {choose_from(profile, Session().available_profiles)}"
    if isinstance(error, NoCredentialsError):
        return "there are no credentials: set AWS_PROFILE or s3.profile, or s3.anonymous: true for a public bucket"
    if isinstance(error, EndpointConnectionError | ConnectTimeoutError):
        return f"{_endpoint()} cannot be reached ({kind}); check s3.endpoint (or AWS_ENDPOINT_URL) and the network"
    if isinstance(error, ReadTimeoutError):
        return f"{_endpoint()} does not answer ({kind}); check s3.endpoint (or AWS_ENDPOINT_URL), or run again later"
    return f"reading from {_endpoint()} fails ({kind})"

"""Objects of S3, and of what speaks like it, through boto3."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import boto3
from botocore import UNSIGNED
from botocore.config import Config

CONNECTIONS = 16
CONNECT_SECONDS, READ_SECONDS = 10, 30
FIRST_ATTEMPTS, ATTEMPTS = 4, 16
"""Attempts until an endpoint has answered once, so that a wrong one is soon told, and from then on: with the backoff of
boto3's standard mode, up to 20 s a wait, an outage of a minute passes. ``AWS_MAX_ATTEMPTS`` replaces both."""

_answered: set[str] = set()


def client() -> Any:
    """The boto3 client of S3 for what the environment says now: call it anew for each request, or few of them.

    Endpoint, region, profile and credentials are found as boto3 finds them (``AWS_ENDPOINT_URL``, ``AWS_PROFILE``, ...);
    ``AWS_REGION`` counts too, and ``AWS_NO_SIGN_REQUEST=true`` means anonymous access. Threads may share a client.
    """
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    patient = _client(environment, ATTEMPTS)
    return patient if patient.meta.endpoint_url in _answered else _client(environment, FIRST_ATTEMPTS)


@cache
def _client(environment: tuple[tuple[str, str], ...], attempts: int) -> Any:
    settings = dict(environment)
    config = Config(
        signature_version=UNSIGNED if is_anonymous() else None,
        retries={"mode": "standard", "total_max_attempts": int(settings.get("AWS_MAX_ATTEMPTS", attempts))},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        max_pool_connections=CONNECTIONS,
    )
    made = boto3.Session(region_name=settings.get("AWS_REGION")).client("s3", config=config)

    def note_answer(exception: Exception | None = None, **_: object) -> None:
        if exception is None:
            _answered.add(made.meta.endpoint_url)

    made.meta.events.register("response-received.s3", note_answer)
    return made


def is_anonymous() -> bool:
    """Whether requests go unsigned, for public buckets."""
    return os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "true", "yes")

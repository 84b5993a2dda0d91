"""What went wrong on the other side of a Ray call, in words."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    GetTimeoutError,
    RayError,
    RayTaskError,
)

from merge_ray.errors import MergeRayError

PATIENCE = 60.0
"""Seconds in which Ray has restarted a process that was killed, or found that its node is gone."""


def _root(error: BaseException) -> BaseException:
    return error.cause if isinstance(error, RayTaskError) and error.cause else error


def cause(error: BaseException) -> str:
    """The text of what really went wrong, without Ray's wrapping."""
    inner = _root(error)
    if isinstance(inner, MergeRayError):
        return str(inner)
    if isinstance(inner, ActorUnavailableError):
        return "its host's process was killed each time that it was tried; is there too little memory?"
    lines = str(inner).strip().splitlines()
    if isinstance(inner, ActorDiedError) and "creation task" in lines[0]:
        # A traceback as text, whose last line is the error of the actor's constructor.
        return lines[-1].removeprefix("merge_ray.errors.")
    return f"{type(inner).__name__}: {lines[0]}" if lines else type(inner).__name__


def is_lost(error: BaseException, *actors: Any) -> bool:
    """Whether an actor that took part is gone for good, as it is when its node is: another may do what it was asked.

    An actor whose process was killed is unavailable at first, whatever became of its node: this waits until Ray knows.
    """
    if isinstance(_root(error), ActorUnavailableError):
        return any(map(_is_gone, actors))
    return isinstance(_root(error), (ActorDiedError, ActorUnschedulableError))


def _is_gone(actor: Any) -> bool:
    until = time.monotonic() + PATIENCE
    while (left := until - time.monotonic()) > 0:
        try:
            ray.get(actor.__ray_ready__.remote(), timeout=left)
            return False
        except ActorUnavailableError:
            time.sleep(0.5)
        except GetTimeoutError:
            break
        except RayError as error:
            return is_lost(error)
    return False

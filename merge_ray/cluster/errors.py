"""What went wrong on the other side of a Ray call, in words."""

from __future__ import annotations

from ray.exceptions import ActorDiedError, ActorUnavailableError, ActorUnschedulableError, RayTaskError

from merge_ray.errors import MergeRayError


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


def is_lost(error: BaseException) -> bool:
    """Whether an actor is gone for good, as it is when its node is: another may do what it was asked."""
    return isinstance(_root(error), (ActorDiedError, ActorUnschedulableError))

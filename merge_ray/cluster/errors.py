"""What went wrong on the other side of a Ray call, in words."""

from __future__ import annotations

from ray.exceptions import RayTaskError

from merge_ray.errors import MergeRayError


def cause(error: BaseException) -> str:
    """The text of what really went wrong, without Ray's wrapping."""
    inner = error.cause if isinstance(error, RayTaskError) and error.cause else error
    if isinstance(inner, MergeRayError):
        return str(inner)
    lines = str(inner).strip().splitlines()
    return f"{type(inner).__name__}: {lines[0]}" if lines else type(inner).__name__

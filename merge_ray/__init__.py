"""Find the best way to merge fine-tuned models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merge_ray.merging import MergeResult, merge

__all__ = ["MergeResult", "merge"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: torch and numba take seconds that `merge-ray --help` should not.
    if name in __all__:
        from merge_ray import merging

        return getattr(merging, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

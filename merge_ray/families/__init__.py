"""What an architecture needs, one module per family; :mod:`merge_ray.families.base` says what that is."""

from merge_ray.families.base import Family, ImageEncoder, Preprocessing, Skeleton, find_family, head_from_state

__all__ = ["Family", "ImageEncoder", "Preprocessing", "Skeleton", "find_family", "head_from_state"]

"""What an architecture needs, one module per family; :mod:`merge_ray.families.base` says what that is."""

from merge_ray.families.base import Family, Positions, Skeleton, TaskData, find_family
from merge_ray.families.images import ImageEncoder, ImageFamily, Preprocessing, find_image_family, head_from_state

__all__ = [
    "Family",
    "ImageEncoder",
    "ImageFamily",
    "Positions",
    "Preprocessing",
    "Skeleton",
    "TaskData",
    "find_family",
    "find_image_family",
    "head_from_state",
]

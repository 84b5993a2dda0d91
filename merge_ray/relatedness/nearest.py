"""What ``merge-ray relatedness`` has found of some models: their distances, and those nearest to one."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from merge_ray.checkpoints import open_location
from merge_ray.relatedness.correlation import find_reference

DISTANCES = "distances.parquet"


def read_distances(location: str, names: Sequence[str]) -> pd.DataFrame:
    """The distances ``[T, T]`` between the models ``names``, small where they are related.

    location: the results directory of ``merge-ray relatedness``, or a file as :func:`find_reference` reads it.
    Raises :class:`MergeRayError` where there is none, or it knows other models.
    """
    path = open_location(location)
    return find_reference(str(path / DISTANCES if path.is_dir() else path), names)


def nearest(distances: pd.DataFrame, to: str, count: int) -> list[str]:
    """The ``count`` models with the smallest distances to the model ``to``, nearest first."""
    return list(distances[to].drop(to).sort_values(kind="stable").index[:count])

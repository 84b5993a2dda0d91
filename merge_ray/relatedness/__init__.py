"""How related models are: gradient fields, their distances, correlation with known affinities. Knows nothing of Ray."""

from merge_ray.relatedness.jobs import FieldJob, Relatedness, compute_here, relate
from merge_ray.relatedness.spec import RelatednessSpec

__all__ = ["FieldJob", "Relatedness", "RelatednessSpec", "compute_here", "relate"]

"""Matching the channels of models that were trained apart: groups, similarities, assignment and zipping."""

from merge_ray.matching.assignment import Matched, assign, identity, optimal, permute
from merge_ray.matching.membership import Membership
from merge_ray.matching.similarity import correlation, correlation_of, cosine, paired_products
from merge_ray.matching.zipping import ZipRule, zip_channels

__all__ = [
    "Matched",
    "Membership",
    "ZipRule",
    "assign",
    "correlation",
    "correlation_of",
    "cosine",
    "identity",
    "optimal",
    "paired_products",
    "permute",
    "zip_channels",
]

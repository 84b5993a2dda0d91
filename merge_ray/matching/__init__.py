"""Matching the channels of models that were trained apart: groups, similarities, assignment and zipping."""

from merge_ray.matching.assignment import Matched, assign, identity, optimal, permute
from merge_ray.matching.derive import derive_groups
from merge_ray.matching.groups import Group, Member, Memberships, PermutationGroups
from merge_ray.matching.membership import Membership
from merge_ray.matching.similarity import correlation, correlation_of, cosine, paired_products
from merge_ray.matching.weight_space import (
    match_in_weight_space,
    match_weights,
    weight_matching_similarity,
    weight_rows,
)
from merge_ray.matching.zipping import ZipRule, zip_channels

__all__ = [
    "Group",
    "Matched",
    "Member",
    "Membership",
    "Memberships",
    "PermutationGroups",
    "ZipRule",
    "assign",
    "correlation",
    "correlation_of",
    "cosine",
    "derive_groups",
    "identity",
    "match_in_weight_space",
    "match_weights",
    "optimal",
    "paired_products",
    "permute",
    "weight_matching_similarity",
    "weight_rows",
    "zip_channels",
]

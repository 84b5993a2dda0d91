"""The ledger's schema, and the leaderboard made from it: read, rank, compare, render."""

from merge_ray.leaderboard.published import add_published, published_rows
from merge_ray.leaderboard.ranking import REFERENCES, best_candidates, rank, write_leaderboard
from merge_ray.leaderboard.rendering import (
    describe_parameters,
    display_columns,
    legend,
    render,
    render_search,
    task_names,
)
from merge_ray.leaderboard.rows import ROW_SCHEMA, read_rows, task_scores, widen
from merge_ray.leaderboard.writing import RowWriter

__all__ = [
    "REFERENCES",
    "ROW_SCHEMA",
    "RowWriter",
    "add_published",
    "best_candidates",
    "describe_parameters",
    "display_columns",
    "legend",
    "published_rows",
    "rank",
    "read_rows",
    "render",
    "render_search",
    "task_names",
    "task_scores",
    "widen",
    "write_leaderboard",
]

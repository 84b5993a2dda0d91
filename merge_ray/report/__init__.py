"""The HTML report and its plots."""

from merge_ray.report.page import leaderboard_plot, write_report

__all__ = ["leaderboard_plot", "write_report"]

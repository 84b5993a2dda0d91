"""A clock that jumps: rows that say they are from before their predecessors change neither ranks nor what is known."""

import datetime
from pathlib import Path

import pandas as pd
from rows import demo_rows, make_row, write_rows

from merge_ray.leaderboard import rank, read_rows
from merge_ray.sweep import _rows_by_identity


def test_a_leaderboard_does_not_depend_on_the_clock(tmp_path: Path) -> None:
    rows = demo_rows()
    write_rows(tmp_path / "steady", rows)
    for index, row in enumerate(rows):
        row["time"] -= datetime.timedelta(hours=index**2)
    write_rows(tmp_path / "jumping", rows)
    assert read_rows(tmp_path / "steady")["identity"].tolist() != read_rows(tmp_path / "jumping")["identity"].tolist()
    steady, jumping = (rank(read_rows(tmp_path / name)).drop(columns="time") for name in ("steady", "jumping"))
    pd.testing.assert_frame_equal(jumping, steady)


def test_a_complete_row_answers_for_one_cut_short_whatever_the_clock_says(tmp_path: Path) -> None:
    complete = make_row("ties", {"ants": 0.8}, minute=1)
    cut_short = {**make_row("ties", {"ants": 0.7}, study="ties_asha", status="pruned", minute=2), "identity": "x"}
    write_rows(tmp_path / "a", [{**complete, "identity": "x"}])
    write_rows(tmp_path / "b", [cut_short])
    (tmp_path / "b" / "trials" / "x.parquet").rename(tmp_path / "a" / "trials" / "x-other.parquet")
    assert _rows_by_identity(tmp_path / "a")["x"]["status"] == "complete"

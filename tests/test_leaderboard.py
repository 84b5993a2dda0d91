"""Reading, ranking, comparing and showing the ledger."""

from __future__ import annotations

import io
import json
import re
import runpy
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import REFERENCE, demo_rows, make_row, write_rows

from merge_ray.errors import LedgerError
from merge_ray.leaderboard import (
    ROW_SCHEMA,
    add_published,
    best_candidates,
    published_rows,
    rank,
    read_rows,
    render,
    widen,
    write_leaderboard,
)

README = Path(__file__).parent.parent / "results" / "README.md"
TWENTY = [f"task_{index:02d}" for index in range(20)]


def ledger(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows as they are read back from a results directory."""
    read = pa.Table.from_pylist(rows, schema=ROW_SCHEMA).to_pandas()
    return read.assign(pair=[tuple(pair or ()) for pair in read["pair"]])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "demo", demo_rows())


# Reading


def test_rows_come_back_as_written_oldest_first(results: Path) -> None:
    rows = read_rows(results)
    assert len(rows) == len(demo_rows())
    assert rows["time"].is_monotonic_increasing
    assert set(rows.columns) == set(ROW_SCHEMA.names)
    assert [score["task"] for score in rows["tasks"].iloc[0]] == ["digits", "glyphs", "shapes", "textures"]


def test_files_that_are_still_being_written_are_ignored(results: Path) -> None:
    before = len(read_rows(results))
    (results / "trials" / ".half.parquet").write_bytes(b"PAR1")
    (results / "trials" / "half.parquet.tmp").write_bytes(b"PAR1")
    assert len(read_rows(results)) == before


@pytest.mark.parametrize("content", [b"", b"PAR1 and then nothing"])
def test_a_corrupt_row_is_named(results: Path, content: bytes) -> None:
    (results / "trials" / "broken.parquet").write_bytes(content)
    with pytest.raises(LedgerError, match=r"trials/broken\.parquet is not a readable row .* remove it"):
        read_rows(results)


def test_a_directory_without_a_ledger_is_named(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="elsewhere is not a results directory: it has no folder 'trials'"):
        read_rows(tmp_path / "elsewhere")


def test_an_empty_ledger_has_the_columns_and_no_rows(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    assert read_rows(tmp_path).columns.tolist() == ROW_SCHEMA.names
    with pytest.raises(LedgerError, match="no candidate has been scored on the test split yet"):
        rank(read_rows(tmp_path))


def test_parameters_and_tasks_get_columns_of_their_own() -> None:
    rows = [
        make_row("tall_mask", {"a": 0.8, "b": 0.6}, {"mask_lambda": "validation", "scaling_coefficient": 0.3}),
        make_row("tall_mask", {"a": 0.8, "b": 0.6}, {"mask_lambda": 0.4, "scaling_coefficient": {"a": 0.1, "b": 0.2}}),
    ]
    wide = widen(ledger(rows))
    assert wide["parameter/mask_lambda"].tolist() == ["validation", "0.4"]
    assert wide["parameter/scaling_coefficient/b"].tolist()[1] == 0.2
    assert wide["accuracy/a"].tolist() == [0.8, 0.8]
    error = np.sqrt(0.8 * 0.2 / 200 + 0.6 * 0.4 / 200) / 2
    assert wide["mean_standard_error"].iloc[0] == pytest.approx(error)
    assert wide["normalized_standard_error"].iloc[0] == pytest.approx(error / REFERENCE)


# Ranking


def test_each_study_is_ranked_by_the_test_score_of_its_best_on_validation(results: Path) -> None:
    table = rank(read_rows(results)).set_index("study")
    assert table["rank"].dropna().to_dict() == {"task_arithmetic": 1, "ties": 2}
    assert table.index.tolist() == ["finetuned", "task_arithmetic", "ties", "pretrained"]
    assert table["kind"].to_dict()["pretrained"] == "reference"
    assert table.loc["task_arithmetic", "parameter/scaling_coefficient"] == 0.3
    counts = table[["candidates", "failed", "pruned"]].to_dict("index")
    assert counts["ties"] == {"candidates": 4, "failed": 1, "pruned": 0}
    assert table.loc["task_arithmetic", "validation_score"] == pytest.approx((0.8 - 0.015) / REFERENCE)
    assert table.loc["task_arithmetic", "score"] == pytest.approx((0.79 - 0.015) / REFERENCE)
    assert table.loc["ties", "seconds"] == pytest.approx(5 * 0.25)


def test_a_lucky_test_score_does_not_make_a_candidate_the_best() -> None:
    rows = demo_rows()
    rows.append(make_row("ties", dict.fromkeys("abcd", 0.94), {"density": 0.1}, split="test", study="ties"))
    assert rank(ledger(rows)).set_index("study").loc["ties", "parameter/density"] == 0.2


def test_pruned_and_failed_candidates_are_never_chosen() -> None:
    rows = [
        make_row("ties", {"a": 0.9}, {"density": 0.1}, status="pruned"),
        make_row("ties", {"a": 0.5}, {"density": 0.2}),
        make_row("ties", None, {"density": 0.3}),
    ]
    assert best_candidates(ledger(rows))["parameters"].tolist() == ['{"density": 0.2}']


def test_a_candidate_confirmed_with_its_resolved_parameters_is_found() -> None:
    resolved = {"mask_lambda": {"a": 0.4}}
    rows = [
        make_row("tall_mask", {"a": 0.8}, {"mask_lambda": "validation"}, resolved=json.dumps(resolved)),
        make_row("tall_mask", {"a": 0.7}, resolved, split="test"),
    ]
    assert rank(ledger(rows))["score"].tolist() == pytest.approx([0.7 / REFERENCE])


def test_ties_in_score_do_not_depend_on_the_order_of_rows() -> None:
    rows = [make_row("ties", {"a": 0.8}, {"density": density}) for density in (0.1, 0.2, 0.3)]
    chosen = {best_candidates(ledger(order))["identity"].item() for order in (rows, rows[::-1])}
    assert len(chosen) == 1


def test_other_objectives_rank_too_and_less_is_better_for_costs() -> None:
    rows = demo_rows()
    for row in rows:
        if row["method"] == "ties":
            row["storage_ratio"] = 0.1
    table = rank(ledger(rows), "storage_ratio")
    assert table.loc[table["rank"] == 1, "study"].tolist() == ["ties"]
    assert table["within_noise_of_best"].isna().all()
    assert rank(ledger(rows), "accuracy/glyphs")["score"].max() == pytest.approx(0.95)


def test_an_unknown_objective_gets_the_nearest_match() -> None:
    with pytest.raises(LedgerError, match=r"called 'normalised_mean'; did you mean 'normalized_mean'\?"):
        rank(ledger(demo_rows()), "normalised_mean")


def test_nothing_confirmed_says_what_there_is() -> None:
    rows = [make_row("ties", {"a": 0.5}), make_row("ties", None, {"density": 0.9})]
    expected = r"\(on validation data: 1 complete, 1 failed\); the first error: RuntimeError: out of memory; run"
    with pytest.raises(LedgerError, match=expected):
        rank(ledger(rows))


# Noise


def pair(first: dict[str, Any], second: dict[str, Any]) -> list[bool]:
    """Whether each of two confirmed candidates is within noise of the better one."""
    rows = [make_row("one", split="test", **first), make_row("two", split="test", **second)]
    return rank(ledger(rows))["within_noise_of_best"].tolist()


def test_small_differences_are_seen_where_the_samples_are_paired() -> None:
    better, worse = {"accuracies": {"a": 0.80}}, {"accuracies": {"a": 0.77}}
    assert pair(better, worse) == [True, False]
    # The same figures on other samples could be luck: their standard errors are 2.9 points each.
    assert pair(better, worse | {"data_fingerprint": "other"}) == [True, True]


def test_a_difference_of_one_sample_is_noise() -> None:
    assert pair({"accuracies": {"a": 0.80}}, {"accuracies": {"a": 0.795}}) == [True, True]


def test_equal_predictions_are_within_noise_and_other_tasks_cannot_be_compared() -> None:
    assert pair({"accuracies": {"a": 0.8}}, {"accuracies": {"a": 0.8}}) == [True, True]
    assert pair({"accuracies": {"a": 0.8}}, {"accuracies": {"b": 0.8}})[1] is pd.NA


def test_the_paired_test_agrees_with_its_textbook_form() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.random(400) < 0.8, rng.random(400) < 0.74
    difference = first.astype(float) - second
    expected = abs(difference.mean()) <= 1.96 * difference.std() / np.sqrt(400)
    rows = []
    for study, correct in (("one", first), ("two", second)):
        row = make_row(study, {"a": correct.mean()}, split="test", count=400)
        row["tasks"][0]["correct"] = np.packbits(correct).tobytes()
        rows.append(row)
    table = rank(ledger(rows), "accuracy/a").set_index("study")
    assert table.loc["two", "within_noise_of_best"] == expected


# Showing


@pytest.mark.parametrize("width", [60, 80, 100, 160])
@pytest.mark.parametrize("count", [1, 5, 8, 20])
def test_the_table_keeps_to_its_width_and_names_every_study(width: int, count: int) -> None:
    text = render(rank(ledger(demo_rows(TWENTY[:count]))), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert all(name in text for name in ("task_arithmetic", "ties", "pretrained", "finetuned"))


def test_single_tasks_are_shown_where_they_fit() -> None:
    names = ["digits", "glyphs", "photos", "shapes", "textures"]
    narrow = render(rank(ledger(demo_rows(names))), width=100)
    assert all(name in narrow.splitlines()[0] for name in names)
    many = render(rank(ledger(demo_rows(TWENTY))), width=100).splitlines()
    assert "lowest" in many[0] and "task_05" not in many[0]
    assert any("task_19 60.0" in line and "task_00 79.0" in line for line in many)


def test_the_table_says_what_its_marks_mean() -> None:
    lines = render(rank(ledger(demo_rows(["digits"]))), width=100).splitlines()
    assert lines[3].split()[:5] == ["1", "task_arithmetic", "83.2", "±", "3.0"]
    assert lines[4].split()[:2] == ["≈2", "ties"]
    assert any(line.startswith("ref  pretrained") for line in lines)
    assert "≈: not distinguishable from the best merged model (95 %)." in lines
    assert any(re.match(r"≈2 +ties +density=0.2, disjoint=mean, scaling_coefficient=1$", line) for line in lines)


def test_several_sweeps_are_told_apart(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "one", demo_rows())
    second = write_rows(tmp_path / "two", [row | {"sweep": "second"} for row in demo_rows()])
    table = rank(read_rows([first, second]))
    assert len(table) == 8
    assert table["rank"].dropna().tolist() == [1, 2, 3, 4]
    assert re.search(r"^ *#  sweep +study ", render(table, width=100))


def test_csv_json_and_markdown_hold_the_same_figures() -> None:
    table = rank(ledger(demo_rows()))
    assert pd.read_csv(io.StringIO(render(table, "csv")))["score"].tolist() == pytest.approx(table["score"].tolist())
    records = json.loads(render(table, "json"))
    assert [record["study"] for record in records] == table["study"].tolist()
    assert records[0]["time"].startswith("2026-01-01T")
    markdown = render(table, "markdown").splitlines()
    assert markdown[1].startswith("| ---: | :--- |")
    assert markdown[3].startswith("| 1 | task_arithmetic | 81.6 ± 1.6 | 77.5 | 79.0 |")


def test_an_unknown_format_gets_the_nearest_match() -> None:
    with pytest.raises(LedgerError, match="cannot be shown as 'mardown'; did you mean 'markdown'"):
        render(rank(ledger(demo_rows())), "mardown")


# Published tables

PUBLISHED = """model,num_tasks,method,variant,dataset,metric,value,source
ViT-B,2,Averaging,,Digits,accuracy,0.70,paper A
ViT-B,2,Averaging,,Glyphs,accuracy,0.60,paper A
ViT-B,2,Stated,x=1,Digits,accuracy,0.80,paper B
ViT-B,2,Stated,x=1,AVERAGE,average_as_stated,0.75,paper B
ViT-L,2,Averaging,,Digits,accuracy,0.90,paper A
"""


@pytest.fixture
def published(tmp_path: Path) -> Path:
    path = tmp_path / "published.csv"
    path.write_text(PUBLISHED)
    return path


def test_published_rows_have_their_means_stated_or_taken(published: Path) -> None:
    table = published_rows(published, model="ViT-B", num_tasks=2)
    assert table["method"].tolist() == ["Stated", "Averaging"]
    assert table["mean"].tolist() == pytest.approx([0.75, 0.65])
    assert set(table["kind"]) == {"published"}
    incomplete = published_rows(published, model="ViT-L")
    assert incomplete["mean"].isna().all() and incomplete["accuracy/Digits"].tolist() == [0.9]


def test_published_rows_are_labelled_and_never_ranked(published: Path) -> None:
    table = add_published(rank(ledger(demo_rows(["digits", "glyphs"]))), published_rows(published, model="ViT-B"))
    added = table[table["kind"] == "published"]
    assert added["rank"].isna().all() and added["score"].isna().all()
    assert added["accuracy/digits"].tolist() == [0.8, 0.7], "tasks are matched whatever their case"
    lines = render(table, width=100).splitlines()
    assert any(re.match(r"pub +Averaging +65.0 +70.0 +60.0$", line) for line in lines)
    assert any(re.match(r"pub +Averaging +paper A$", line) for line in lines)
    assert "pub: published figures, not measured here; not ranked." in lines
    assert "| pub | Stated |  | 75.0 | 80.0 |" in render(table, "markdown")


def test_published_files_that_do_not_fit_are_explained(published: Path, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"no line with model 'ViT-X'; did you mean 'ViT-[BL]'\?"):
        published_rows(published, model="ViT-X")
    bad = tmp_path / "bad.csv"
    bad.write_text("model,method,value\na,b,1\n")
    with pytest.raises(LedgerError, match=r"lack the columns \['num_tasks', 'variant', 'dataset', 'metric', "):
        published_rows(bad)
    with pytest.raises(LedgerError, match=r"cannot be read: .*No such file"):
        published_rows(tmp_path / "none.csv")


# The files


def test_the_leaderboard_file_is_written_in_one_step_and_read_by_duckdb(results: Path) -> None:
    path = write_leaderboard(results)
    assert path == results / "leaderboard.parquet"
    assert sorted(item.name for item in results.iterdir()) == ["leaderboard.parquet", "trials"]
    query = f"select study from '{path}' where rank is not null order by rank"
    assert duckdb.connect().execute(query).fetchall() == [("task_arithmetic",), ("ties",)]
    query = f"select error from '{results}/trials/*.parquet' where status = 'failed'"
    assert len(duckdb.connect().execute(query).fetchall()) == 1


def test_the_readme_documents_every_column(results: Path) -> None:
    documented = set(re.findall(r"`([a-z_]+)`", README.read_text()))
    task_fields = {field.name for field in ROW_SCHEMA.field("tasks").type.value_type}
    board = {name for name in pq.read_schema(write_leaderboard(results)).names if "/" not in name}
    assert (set(ROW_SCHEMA.names) | task_fields | board) - documented == set()


def test_the_examples_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_leaderboard(write_rows(tmp_path / "results" / "quickstart", demo_rows()))
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        script = tmp_path / "example.py"
        script.write_text(example)
        runpy.run_path(str(script))

"""The leaderboard as people read it: a table for the terminal, Markdown, CSV, JSON."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass

import pandas as pd
from rich import box
from rich.console import Console, JustifyMethod, RenderableType
from rich.markup import escape
from rich.table import Table

from merge_ray.errors import LedgerError, choose_from
from merge_ray.leaderboard.ranking import best_candidates

FORMATS = ("table", "csv", "json", "markdown")
SHOWN_PUBLISHED = 12
"""Published methods that the terminal's table shows; the other formats have every published row."""

LOSS = "loss"
"""The metric of which less is better."""
_NOISE = "≈"
_KINDS = {"reference": "ref", "published": "pub"}
_FRACTIONS = ("mean", "normalized_mean", "worst")
_GAP = 2
_STUDY_WIDTH = 30


@dataclass(frozen=True)
class Column:
    """A displayed column: its heading, its cells, and whether they are figures (aligned right, never wrapped)."""

    heading: str
    cells: list[str]
    figures: bool = True

    @property
    def width(self) -> int:
        """The characters that the column takes, with the gap beside it; text is wrapped at ``_STUDY_WIDTH``."""
        width = max(map(len, [self.heading, *self.cells]))
        return _GAP + (width if self.figures else min(width, _STUDY_WIDTH))


def render(table: pd.DataFrame, format: str = "table", width: int | None = None) -> str:
    """The leaderboard as text: ``table`` (for a terminal of ``width`` characters), ``csv``, ``json``, ``markdown``.

    CSV and JSON have every column; the others show the ranks, scores (in per cent) with standard errors and
    parameters. The terminal's table shows single tasks only where all of them fit.
    """
    if format == "csv":
        return table.to_csv(index=False)
    if format == "json":
        return table.to_json(orient="records", date_format="iso", indent=2)
    if format == "markdown":
        return _markdown(display_columns(table)) + "\n" + "\n".join(f"- {line}" for line in legend(table)) + "\n"
    if format == "table":
        return _terminal(table, width or shutil.get_terminal_size((100, 24)).columns)
    raise LedgerError(f"a leaderboard cannot be shown as {format!r}; {choose_from(format, FORMATS)}")


def render_search(rows: pd.DataFrame) -> str:
    """The best validation score of every study so far, for a sweep that has not confirmed them, best first.

    rows: the ledger's; see :func:`read_rows`.
    """
    best = best_candidates(rows).sort_values("objective", ascending=False)
    scored = rows[rows["split"] == "val"].groupby(["study", "pair"]).size()
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, show_edge=False)
    for heading in ("study", "best on validation", "candidates", "parameters"):
        grid.add_column(heading, justify="right" if heading in ("best on validation", "candidates") else "left")
    for row in best.to_dict("records"):
        name = " ".join([row["study"], "+".join(row["pair"])]).strip()
        counted, parameters = str(scored[row["study"], row["pair"]]), describe_parameters(row["parameters"])
        grid.add_row(*map(escape, (name, f"{row['objective']:.4f}", counted, parameters)))
    return _printed(shutil.get_terminal_size((100, 24)).columns, grid)


def display_columns(table: pd.DataFrame) -> list[Column]:
    """The columns that people read: ranks, scores, every task, storage, parameters."""
    return [*_front(table), *_tasks(table), *_back(table), _parameters(table)]


def task_names(table: pd.DataFrame) -> dict[str, str]:
    """The tasks of a leaderboard and their metric's column, such as ``{"digits": "accuracy/digits"}``.

    Of losses, which are of different units, it is the normalised score's.
    """
    other = ("standard_error", "normalized", "parameter")
    parts = [name.partition("/") for name in table.columns if "/" in name]
    return {
        task: f"{'normalized' if metric == LOSS else metric}/{task}" for metric, _, task in parts if metric not in other
    }


def describe_parameters(text: str) -> str:
    """Parameters for people: ``density=0.2, disjoint=mean``; a value per task is written ``name={a: 1, b: 2}``."""
    return ", ".join(f"{name}={_value(value)}" for name, value in json.loads(text).items() if value is not None)


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_value(item)}" for key, item in value.items()) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _percent(value: float) -> str:
    return "" if pd.isna(value) else f"{100 * value:.1f}"


def _front(table: pd.DataFrame) -> list[Column]:
    """Rank (or what the row is instead), sweep where there are several, study, score with its error, mean."""
    columns = [Column("#", [_place(row) for _, row in table.iterrows()])]
    if table["sweep"].nunique() > 1:
        columns.append(Column("sweep", table["sweep"].fillna("").tolist(), figures=False))
    columns.append(Column("study", [_name(row) for _, row in table.iterrows()], figures=False))
    objective = table["ranked_by"].dropna().iloc[0]
    scores = [_score(row["score"], row["score_standard_error"], objective) for _, row in table.iterrows()]
    columns.append(Column("normalised" if objective == "normalized_mean" else objective, scores))
    if objective != "mean" and not any(name.startswith(f"{LOSS}/") for name in table.columns):
        columns.append(Column("mean", [_percent(value) for value in table["mean"]]))
    return columns


def _place(row: pd.Series) -> str:
    """The rank, marked if the row cannot be told from the first; ``ref`` or ``pub`` for rows without a rank."""
    if row["kind"] != "merged":
        return _KINDS[row["kind"]]
    near = row["rank"] != 1 and row["within_noise_of_best"] is not pd.NA and bool(row["within_noise_of_best"])
    return f"{_NOISE if near else ''}{row['rank']}"


def _name(row: pd.Series) -> str:
    if row["kind"] == "published":
        return str(row["method"])
    name = row["study"] if row["study"] == row["method"] else f"{row['study']} ({row['method']})"
    return f"{name}, {row['pairs']}" if row["pairs"] else str(name)


def _score(value: float, error: float, objective: str) -> str:
    if pd.isna(value):
        return ""
    if objective not in _FRACTIONS and "/" not in objective:
        return f"{value:.4g}"
    return _percent(value) + ("" if pd.isna(error) else f" ± {100 * error:.1f}")


def _tasks(table: pd.DataFrame) -> list[Column]:
    return [Column(task, [_percent(value) for value in table[name]]) for task, name in task_names(table).items()]


def _extremes(table: pd.DataFrame) -> list[Column]:
    """The lowest and the highest of the tasks' scores, for tables too narrow for all of them."""
    names = task_names(table)
    scores = table[list(names.values())].rename(columns={column: task for task, column in names.items()})
    columns = []
    known = [row.dropna() for _, row in scores.iterrows()]
    for heading, pick, value in (("lowest", "idxmin", "min"), ("highest", "idxmax", "max")):
        cells = ["" if row.empty else f"{row.agg(pick)} {_percent(row.agg(value))}" for row in known]
        columns.append(Column(heading, cells))
    return columns


def _back(table: pd.DataFrame) -> list[Column]:
    ratios = ["" if pd.isna(value) else f"{value:.2f}" for value in table["storage_ratio"]]
    return [Column("storage", ratios)]


def _parameters(table: pd.DataFrame) -> Column:
    """Each row's parameters; of a published row, its variant and source."""
    cells = [describe_parameters(text) if isinstance(text, str) else "" for text in table["parameters"]]
    if "source" in table:
        cited = table["variant"].fillna("") + "; " + table["source"].fillna("")
        cells = [text or citation.strip("; ") for text, citation in zip(cells, cited, strict=True)]
    return Column("parameters", cells, figures=False)


def legend(table: pd.DataFrame) -> list[str]:
    """The lines that explain the displayed columns and marks."""
    objective = table["ranked_by"].dropna().iloc[0]
    ranked = "mean normalised score" if objective == "normalized_mean" else objective
    lines = [f"Ranked by {ranked} on the test split; scores in per cent, ± one standard error."]
    lines.append("storage: bytes to keep, as a ratio to all the fine-tuned models.")
    places = [_place(row) for _, row in table.iterrows()]
    if any(place.startswith(_NOISE) for place in places):
        lines.append(f"{_NOISE}: not distinguishable from the best merged model (95 %).")
    if "ref" in places:
        lines.append("ref: references, not merged.")
    if "pub" in places:
        lines.append("pub: published figures, not measured here; not ranked.")
    return lines


def _markdown(columns: list[Column]) -> str:
    lines = [[column.heading for column in columns], ["---:" if column.figures else ":---" for column in columns]]
    lines += [list(cells) for cells in zip(*(column.cells for column in columns), strict=True)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _terminal(table: pd.DataFrame, width: int) -> str:
    """A table of at most ``width`` characters; text that is too long for its column is wrapped, never cut."""
    # Published tables list a method many times over: the first is the one with the highest mean.
    published = table["kind"] == "published"
    first = published & ~table.duplicated(["kind", "method"])
    others = published & ~(first & (first.cumsum() <= SHOWN_PUBLISHED))
    shown = table[~others]
    front, back = _front(shown), _back(shown)
    room = width - sum(column.width for column in [*front, *back])
    middle = next((some for some in (_tasks(shown), _extremes(shown)) if sum(one.width for one in some) <= room), [])
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, show_edge=False)
    columns = [*front, *middle, *back]
    for column in columns:
        justify: JustifyMethod = "right" if column.figures else "left"
        grid.add_column(
            column.heading, justify=justify, overflow="fold", no_wrap=column.figures, max_width=column.width
        )
    for cells in zip(*(column.cells for column in columns), strict=True):
        grid.add_row(*map(escape, cells))
    notes = Table.grid(padding=(0, _GAP))
    for _ in range(3):
        notes.add_column(overflow="fold")
    for place, (_, row), note in zip(front[0].cells, shown.iterrows(), _parameters(shown).cells, strict=True):
        if note:
            notes.add_row(place, escape(_name(row)), escape(note))
    told = legend(shown)
    if others.any():
        told.append(
            f"Of each published method its highest mean is shown; --format csv has the other {others.sum()} rows."
        )
    return _printed(width, grid, "", notes, "", "\n".join(told))


def _printed(width: int, *parts: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    for part in parts:
        console.print(part)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"

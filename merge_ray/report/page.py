"""The report of a sweep: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from importlib.resources import files
from operator import methodcaller
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from merge_ray.leaderboard import (
    REFERENCES,
    describe_parameters,
    display_columns,
    legend,
    rank,
    read_rows,
    task_scores,
    widen,
)
from merge_ray.relatedness.pictures import draw_heat_map, draw_tree
from merge_ray.report import plots
from merge_ray.results import Results, open_results


@dataclass(frozen=True)
class Plot:
    """A plot in the page: its caption, the words for those who cannot see it, and the image as a data address."""

    caption: str
    description: str
    source: str


def write_report(results: str | Path | Results, objective: str = "normalized_mean") -> Path:
    """Write ``report.html`` into a results directory, replacing it in one step; returns its path (on S3, here).

    Raises :class:`merge_ray.errors.LedgerError` while no candidate is confirmed on the test split.
    """
    opened = open_results(results)
    directory = opened.directory
    rows = read_rows(opened)
    table = rank(rows, objective)
    strict = jinja2.StrictUndefined
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=strict)
    template = environment.from_string(files("merge_ray").joinpath("assets/report.html").read_text("utf-8"))
    spec = directory / "sweep.yaml"
    page = template.render(
        title=str(table["sweep"].iloc[0]),
        facts=_facts(rows),
        columns=display_columns(table),
        kinds=table["kind"].tolist(),
        legend=legend(table),
        plots=_plots(rows, table),
        studies=_study_plots(rows, table) + _learning_plots(rows, table) + _coefficient_plots(directory, table),
        relatedness=_relatedness_plots(directory, rows, objective),
        failures=_failures(rows),
        directory=opened.location,
        spec=spec.read_text("utf-8") if spec.exists() else None,
        versions=json.loads(rows["versions"].iloc[-1]),
        fingerprints={name: rows[f"{name}_fingerprint"].iloc[-1] for name in ("bank", "data")},
    )
    return opened.write("report.html", methodcaller("write", page.encode()))


def leaderboard_plot(results: str | Path, path: str | Path, objective: str = "normalized_mean") -> Path:
    """Save the bar plot of a sweep's leaderboard as an image whose kind is the path's suffix; returns the path."""
    plots.plot_scores(rank(read_rows(results), objective)).savefig(path, dpi=150)
    return Path(path)


def _facts(rows: pd.DataFrame) -> dict[str, str]:
    """The sweep in a few lines: name and value."""
    search = rows[(rows["split"] == "val") & ~rows["method"].isin(REFERENCES)]
    counts = search["status"].value_counts()
    tests = rows[(rows["split"] == "test") & (rows["status"] == "complete")]["tasks"]
    samples = {score["task"]: score["count"] for scores in tests for score in task_scores(scores)}
    return {
        "Tasks": ", ".join(f"{task} ({count} test samples)" for task, count in samples.items()),
        "Studies": ", ".join(sorted(search["study"].unique())),
        "Candidates": f"{len(search)} ({', '.join(f'{count} {name}' for name, count in counts.items())})",
        "Time": f"{rows['seconds_total'].sum():.1f} s of trials, from {rows['time'].min():%Y-%m-%d %H:%M:%S} UTC",
        "Devices": ", ".join(sorted(rows["device"].dropna().unique())),
    }


def _plots(rows: pd.DataFrame, table: pd.DataFrame) -> list[Plot]:
    """The plots that compare studies."""
    merged = table[table["kind"] == "merged"]
    if merged.empty:
        return []
    label = plots.score_label(table)
    best = merged.iloc[0]
    lowest = merged.iloc[-1]
    searched = _candidates(rows, merged["study"].tolist())
    styles = plots.style_of(sorted(merged["study"]))
    over_pairs = merged["pairs"].fillna("").any()
    compared = f"from {lowest['study']} ({lowest['score']:.3f}) to {best['study']} ({best['score']:.3f})"
    return [
        _plot(plots.plot_scores(table), "Merged models, ± one standard error", f"Bar plot: {label}, {compared}."),
        _plot(
            plots.plot_tasks(table),
            "Normalised score of every task: 100 is as good as the task's own fine-tuned model",
            f"Heat map of studies and tasks. The best one's worst task is {best['worst_task']} ({best['worst']:.3f}).",
        ),
        _pairs_plot(rows, table)
        if over_pairs
        else _plot(
            plots.plot_progress(searched, styles),
            "The best candidate so far of every study",
            "Step plot of the best objective on validation data over the number of candidates.",
        ),
        _plot(
            plots.plot_storage(table),
            "What the scores cost in storage",
            f"Scatter plot: {label} against storage. {best['study']} needs {best['storage_ratio']:.2f} of the bytes.",
        ),
    ]


def _pairs_plot(rows: pd.DataFrame, table: pd.DataFrame) -> Plot:
    """Every pair of a sweep over pairs. Their searches are of their own: there is no best so far of a study."""
    pairs = rank(rows, str(table["ranked_by"].iloc[0]), by_pair=True)
    description = f"Heat map of {len(set(pairs['pairs']) - {''})} pairs and the studies."
    return _plot(plots.plot_pairs(pairs), "Normalised score of every pair of models", description)


def _study_plots(rows: pd.DataFrame, table: pd.DataFrame) -> list[tuple[str, Plot]]:
    """For every study with numeric parameters, its objective against them."""
    studies = table.loc[table["kind"] == "merged", "study"].tolist()
    styles = plots.style_of(sorted(studies))
    candidates = _candidates(rows, studies)
    found = []
    for study in studies:
        own = candidates[(candidates["study"] == study) & candidates["objective"].notna()]
        names = [name.removeprefix("parameter/") for name in plots.numeric_parameters(own)]
        if names:
            best = describe_parameters(own.loc[own["objective"].idxmax(), "parameters"])
            caption = f"Objective on validation data; the ring is the best: {best}"
            description = f"{study}: objective against {', '.join(names)}; the best candidate has {best}."
            found.append((study, _plot(plots.plot_parameters(own, styles[study]), caption, description)))
    return found


def _learning_plots(rows: pd.DataFrame, table: pd.DataFrame) -> list[tuple[str, Plot]]:
    """For every study whose best candidate has learned, its objective against the steps."""
    merged = table[table["kind"] == "merged"]
    styles = plots.style_of(sorted(merged["study"]))
    learned = rows[[steps is not None and len(steps) > 0 for steps in rows["steps"]]]
    learned = learned.drop_duplicates("identity").set_index("identity")
    found = []
    for study, identity in zip(merged["study"], merged["validation_identity"], strict=True):
        if identity in learned.index:
            row = learned.loc[identity]
            caption = "Learning of the best candidate: its objective on the first shard, and (dashed) its loss"
            description = (
                f"{study}: objective from {row['curve'][0]:.3f} after {row['steps'][0]} steps to "
                f"{row['curve'][len(row['steps']) - 1]:.3f} after {row['steps'][-1]}."
            )
            found.append((study, _plot(plots.plot_learning(row, styles[study]), caption, description)))
    return found


def _coefficient_plots(directory: Path, table: pd.DataFrame) -> list[tuple[str, Plot]]:
    """For every study whose confirmed merge has learned coefficients, these by layer and task."""
    found = []
    for _, row in table[table["artifacts"].map(len) > 0].iterrows():
        with np.load(directory / row["artifacts"][0]) as file:
            arrays = {name: file[name] for name in file.files}
        coefficients = {
            name.removeprefix("coefficient/"): value
            for name, value in arrays.items()
            if name.startswith("coefficient/")
        }
        if coefficients:
            layers = [str(name) for name in arrays.get("layers", ["all layers"])]
            low = min(float(value.min()) for value in coefficients.values())
            high = max(float(value.max()) for value in coefficients.values())
            caption = "Learned coefficients of the confirmed merge, by layer and task"
            description = f"Heat map of {len(layers)} layers and {len(coefficients)} tasks, {low:.3f} to {high:.3f}."
            found.append((row["study"], _plot(plots.plot_coefficients(coefficients, layers), caption, description)))
    return found


def _relatedness_plots(directory: Path, rows: pd.DataFrame, objective: str) -> list[Plot]:
    """How related the sweep's models are, where that is known, and whether related pairs merge better."""
    path = directory / "relatedness.parquet"
    if not path.exists():
        return []
    distances = pd.read_parquet(path)
    models = f"{len(distances)} models"
    drawn = [
        _plot(draw_heat_map(distances, "distance"), "Distances between the models, related ones side by side",
              f"Heat map of the distances between {models}."),
        _plot(draw_tree(distances, "distance"), "The similarity tree: models join at the mean distance of their groups",
              f"Dendrogram of {models}."),
    ]  # fmt: skip
    table = rank(rows, objective, by_pair=True)
    if (table["pairs"] == "").all():
        return drawn
    caption = "Every pair's score against the distance between its models; in brackets, Spearman's correlation"
    return [_plot(plots.plot_relatedness(table, distances), caption, "Scatter plot of scores over distances."), *drawn]


def _candidates(rows: pd.DataFrame, studies: list[str]) -> pd.DataFrame:
    """The candidates of the studies that were scored on all validation samples, with parameters in columns."""
    wide = widen(rows)
    return wide[(wide["split"] == "val") & (wide["status"] == "complete") & wide["study"].isin(studies)]


def _failures(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The failed candidates: study, parameters, the last line of the error, and all of it."""
    return [
        {
            "study": row["study"],
            "parameters": describe_parameters(row["parameters"]),
            "reason": str(row["error"]).strip().splitlines()[-1],
            "error": str(row["error"]).strip(),
        }
        for _, row in rows[rows["status"] == "failed"].iterrows()
    ]


def _plot(figure: Figure, caption: str, description: str) -> Plot:
    """A figure as an SVG within a data address; the same figure gives the same text."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "merge-ray"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Plot(caption, description, "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode())

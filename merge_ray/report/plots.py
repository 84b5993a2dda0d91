"""The report's plots, each a matplotlib figure made from the leaderboard or the ledger."""

from __future__ import annotations

from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import spearmanr

from merge_ray.leaderboard import task_names

WIDTH = 9.0
"""The width of a figure in inches."""

# Okabe and Ito's colours, told apart with any colour vision; markers tell the rest.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "os^DvP"
_GREY = "#767676"
_REFERENCE_MARKERS = {"average_label": "X", "pretrained": "X", "finetuned": "*"}
_LABELS = {
    "normalized_mean": "mean normalised score",
    "mean": "mean score",
    "worst": "normalised score of the worst task",
}
_ANNOTATED_TASKS = 12
_LAYER_HEIGHT = 0.14


def style_of(studies: list[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for every study, the same in all plots."""
    pairs = zip(cycle(_COLOURS), cycle(_MARKERS), strict=False)
    return dict(zip(studies, pairs, strict=False))


def score_label(table: pd.DataFrame) -> str:
    """What the leaderboard's score is, in words."""
    name = str(table["ranked_by"].iloc[0])
    return _LABELS.get(name, name)


def plot_scores(table: pd.DataFrame) -> Figure:
    """Bars of the merged models' scores, ± one standard error, between lines for the references."""
    merged = table[table["kind"] == "merged"].iloc[::-1]
    styles = style_of(sorted(merged["study"]))
    figure, axes = _single(height=1.1 + 0.38 * len(merged))
    errors = merged["score_standard_error"].fillna(0)
    bars = axes.barh(
        merged["study"], merged["score"], xerr=errors, color=[styles[name][0] for name in merged["study"]],
        height=0.62, error_kw={"ecolor": "#333333", "capsize": 3, "elinewidth": 1},
    )  # fmt: skip
    for bar, score, error in zip(bars, merged["score"], errors, strict=True):
        text = f"{score:.3g}" if _is_cost(table) else f"{100 * score:.1f}"
        side = -1 if score < 0 else 1
        axes.annotate(
            text, (score + side * error, bar.get_y() + bar.get_height() / 2), (5 * side, 0),
            textcoords="offset points", va="center", ha="right" if score < 0 else "left",
        )  # fmt: skip
    _reference_lines(axes, table)
    _percent(axes, table, "x")
    axes.set_xlabel(f"{score_label(table)} on the test split")
    axes.margins(x=0.12)
    if merged["score"].min() >= 0:
        axes.set_xlim(left=0)
    return figure


def plot_tasks(table: pd.DataFrame) -> Figure:
    """A heat map of studies × tasks: normalised scores on the test split, in per cent."""
    tasks = list(task_names(table))
    shown = table[table["method"] != "finetuned"]
    values = 100 * shown[[f"normalized/{task}" for task in tasks]].to_numpy(dtype=float)
    return _heat_map(pd.DataFrame(values, shown["study"].tolist(), tasks))


def plot_pairs(table: pd.DataFrame) -> Figure:
    """A heat map of pairs × studies of the leaderboard by pair, best pairs first: normalised scores, in per cent."""
    merged = table[table["kind"] == "merged"]
    values = 100 * merged.pivot(index="pairs", columns="study", values="normalized_mean")
    best = values.mean().sort_values(ascending=False).index
    return _heat_map(values.loc[values.mean(axis=1).sort_values(ascending=False).index, best])


def _heat_map(scores: pd.DataFrame) -> Figure:
    """Normalised scores in per cent; below 0, where the label average is better, all are as dark."""
    values, columns = scores.to_numpy(), list(scores.columns)
    figure, axes = _single(height=1.3 + 0.36 * len(scores))
    low = min(max(np.nanmin(values), 0), 50)
    image = axes.imshow(values, aspect="auto", cmap="cividis", vmin=low, vmax=100)
    slanted = len(columns) > 6
    axes.set_xticks(range(len(columns)), columns, rotation=30 if slanted else 0, ha="right" if slanted else "center")
    axes.set_yticks(range(len(scores)), list(scores.index))
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if len(columns) <= _ANNOTATED_TASKS:
        for (row, column), value in np.ndenumerate(values):
            luminance = np.dot(image.to_rgba(np.array([value]))[0, :3], (0.299, 0.587, 0.114))
            colour = "black" if luminance > 0.5 else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour)
    figure.colorbar(image, ax=axes, label="normalised score (%)", pad=0.02)
    return figure


def numeric_parameters(candidates: pd.DataFrame) -> list[str]:
    """The ``parameter/...`` columns in which a study's candidates take at least two numbers."""
    names = [name for name in candidates.columns if name.startswith("parameter/")]
    return [name for name in names if candidates[name].dtype.kind == "f" and candidates[name].nunique() > 1]


def plot_parameters(candidates: pd.DataFrame, style: tuple[str, str], columns: int = 3) -> Figure:
    """One study's objective on validation data against each of its numeric parameters; the best is ringed."""
    names = numeric_parameters(candidates)
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(WIDTH * columns / 3, 0.4 + 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    best = candidates.loc[[candidates["objective"].idxmax()]]
    for axes, name in zip(grid.flat, names, strict=False):
        ordered = candidates.sort_values(name)
        line = "-" if len(names) == 1 and ordered[name].is_unique else ""
        look = {"marker": style[1], "color": style[0], "linestyle": line, "markersize": 5, "alpha": 0.75}
        axes.plot(ordered[name], ordered["objective"], **look)
        axes.plot(best[name], best["objective"], "o", mfc="none", mec="black", mew=1.5, markersize=11)
        axes.set_xlabel(name.removeprefix("parameter/"))
        values = ordered[name].dropna()
        if values.min() > 0 and values.max() / values.min() > 50:
            axes.set_xscale("log")
        _tidy(axes)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("objective (validation)")
    return figure


def plot_coefficients(coefficients: dict[str, np.ndarray], layers: list[str]) -> Figure:
    """A heat map of layers × tasks: learned merging coefficients ``[L]`` by task, from 0 to 1."""
    height = _LAYER_HEIGHT if len(layers) > _ANNOTATED_TASKS else 0.36
    figure, axes = _single(height=1.3 + height * len(layers))
    image = axes.imshow(np.stack(list(coefficients.values()), axis=1), aspect="auto", cmap="cividis", vmin=0, vmax=1)
    slanted = len(coefficients) > 6
    axes.set_xticks(
        range(len(coefficients)),
        list(coefficients),
        rotation=30 if slanted else 0,
        ha="right" if slanted else "center",
    )
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="merging coefficient", pad=0.02)
    return figure


def plot_learning(row: pd.Series, style: tuple[str, str]) -> Figure:
    """A candidate's objective, and the loss that it learned to lower, against the steps that it had learned."""
    figure, axes = _single(height=3.2)
    steps = row["steps"]
    axes.plot(steps, row["curve"][: len(steps)], color=style[0], marker=style[1])
    axes.set_xlabel("learning steps")
    axes.set_ylabel("objective (validation)", color=style[0])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    losses = axes.twinx()
    losses.plot(steps, row["losses"], color=_GREY, linestyle="--")
    losses.set_ylabel("loss: entropy (nats)", color=_GREY)
    losses.spines[["top", "left"]].set_visible(False)
    return figure


def plot_progress(candidates: pd.DataFrame, styles: dict[str, tuple[str, str]]) -> Figure:
    """The best objective so far of every study, over the candidates in the order they were recorded."""
    figure, axes = _single(height=3.2)
    for study, group in candidates.groupby("study", sort=True):
        best = group.sort_values(["time", "identity"])["objective"].cummax().ffill()
        colour, marker = styles[str(study)]
        numbers = np.arange(1, len(best) + 1)
        axes.step(numbers, best, where="post", color=colour, linewidth=1.6, label=study)
        axes.plot(numbers[-1:], best.iloc[-1:], marker=marker, color=colour, markersize=7)
    axes.set_xlabel("candidates of the study")
    axes.set_ylabel("best objective (validation)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def plot_storage(table: pd.DataFrame) -> Figure:
    """Score against the storage that answering every task needs, as a ratio to all the fine-tuned models."""
    styles = style_of(sorted(table.loc[table["kind"] == "merged", "study"]))
    figure, axes = _single(height=3.4)
    for _, row in table[table["storage_ratio"].notna()].iterrows():
        colour, marker = styles.get(row["study"]) or (_GREY, _REFERENCE_MARKERS[row["method"]])
        axes.errorbar(
            row["storage_ratio"], row["score"], yerr=np.nan_to_num(row["score_standard_error"]), color=colour,
            marker=marker, markersize=8, capsize=3, linestyle="", label=row["study"],
        )  # fmt: skip
    _percent(axes, table, "y")
    axes.set_xlabel("storage, as a ratio to all the fine-tuned models")
    axes.set_ylabel(score_label(table))
    axes.set_xlim(left=0)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def plot_relatedness(table: pd.DataFrame, distances: pd.DataFrame) -> Figure:
    """The score of every merged pair against the distance between its models, by study, with Spearman's correlation.

    table: the leaderboard by pair. distances: ``[T, T]``.
    """
    merged = table[table["kind"] == "merged"]
    figure, axes = _single(height=4.2)
    for study, (colour, marker) in style_of(sorted(merged["study"].unique())).items():
        own = merged[merged["study"] == study]
        apart = [distances.loc[tuple(pair.split("+"))] for pair in own["pairs"]]
        label = study
        if len(set(apart)) > 2 and own["score"].nunique() > 1:
            label += f" ({spearmanr(apart, own['score']).statistic:.2f})"
        axes.plot(apart, own["score"], marker, color=colour, markersize=6, alpha=0.8, label=label)
    _percent(axes, table, "y")
    axes.set_xlabel("distance between the two models")
    axes.set_ylabel(score_label(table))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _single(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    _tidy(axes)
    return figure, axes


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _is_cost(table: pd.DataFrame) -> bool:
    """Whether the score is seconds or bytes rather than a fraction."""
    return str(table["ranked_by"].iloc[0]).startswith(("seconds", "storage", "peak_memory"))


def _percent(axes: Axes, table: pd.DataFrame, axis: str) -> None:
    if not _is_cost(table):
        chosen = axes.xaxis if axis == "x" else axes.yaxis
        chosen.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")


def _reference_lines(axes: Axes, table: pd.DataFrame) -> None:
    for _, row in table[table["kind"] == "reference"].iterrows():
        axes.axvline(row["score"], color=_GREY, linestyle="--", linewidth=1.2, zorder=0)
        axes.annotate(
            row["study"], (row["score"], 1.0), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="center", color="#555555",
        )  # fmt: skip

"""Pictures of the distances between models: a heat map ordered by similarity, and the tree of that order."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from scipy.cluster import hierarchy

ANNOTATED = 20
"""Up to so many models the numbers stand in the heat map."""


def similarity_linkage(distances: pd.DataFrame) -> np.ndarray:
    """scipy's linkage of the models, average linkage, leaves in the order that puts similar ones side by side."""
    upper = distances.to_numpy()[np.triu_indices(len(distances), k=1)]
    return np.asarray(hierarchy.linkage(upper, method="average", optimal_ordering=True))


def draw_heat_map(distances: pd.DataFrame, label: str) -> Figure:
    """A heat map of the distances ``[T, T]``, related models dark and side by side; the diagonal is left out.

    The colours part the pairs into tenths: distances of unrelated models crowd near their maximum.
    """
    order = hierarchy.leaves_list(similarity_linkage(distances))
    names, values = distances.index[order], distances.to_numpy()[np.ix_(order, order)].copy()
    np.fill_diagonal(values, np.nan)
    side = 2.2 + 0.45 * len(names)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    bounds = np.unique(np.nanquantile(values, np.linspace(0, 1, 11)))
    image = axes.imshow(values, cmap="cividis", norm=BoundaryNorm(bounds, 256) if len(bounds) > 1 else None)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(values if len(names) <= ANNOTATED else values[:0]):
        if row != column:
            luminance = np.dot(image.to_rgba(np.array([value]))[0, :3], (0.299, 0.587, 0.114))
            colour = "black" if luminance > 0.5 else "white"
            axes.text(column, row, f"{value:.4g}", ha="center", va="center", color=colour, fontsize=6)
    figure.colorbar(image, ax=axes, label=label, shrink=0.8)
    return figure


def draw_tree(distances: pd.DataFrame, label: str) -> Figure:
    """The similarity tree: models join where the mean distance between their groups lies."""
    figure = Figure(figsize=(7.0, 1.2 + 0.32 * len(distances)), layout="constrained")
    axes = figure.subplots()
    linkage = similarity_linkage(distances)
    hierarchy.dendrogram(
        linkage, labels=list(distances.index), orientation="left", ax=axes,
        color_threshold=0, above_threshold_color="#0072B2", leaf_font_size=9,
    )  # fmt: skip
    low, high = linkage[0, 2], linkage[-1, 2]
    # Where all models are far apart, an axis from zero would show a comb.
    start = low - 0.15 * (high - low) if 0.5 * high < low < high else 0.0
    axes.set_xlim(high + 0.03 * (high - start), start)
    axes.set_xlabel(f"mean {label}")
    axes.spines[["top", "left", "right"]].set_visible(False)
    return figure

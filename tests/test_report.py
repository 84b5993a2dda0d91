"""The HTML report: complete, self-contained, and true to the ledger."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rows import demo_rows, make_row, write_rows

from merge_ray.errors import LedgerError
from merge_ray.leaderboard import rank, read_rows, widen
from merge_ray.report import leaderboard_plot, write_report
from merge_ray.report.plots import (
    numeric_parameters,
    plot_pairs,
    plot_parameters,
    plot_progress,
    plot_relatedness,
    plot_scores,
    style_of,
)


class Page(HTMLParser):
    """The parts of a page that tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == [], f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [value for key, value in attrs if key in ("src", "href") and value]
        self.ids += [values["id"] or ""] if "id" in values else []
        if tag == "img":
            self.images.append(values)
        if tag not in ("img", "meta"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data


@pytest.fixture
def results(tmp_path: Path) -> Path:
    directory = write_rows(tmp_path / "demo", demo_rows())
    (directory / "sweep.yaml").write_text("name: demo\nstudies: [ties]\n")
    return directory


def test_the_page_needs_nothing_from_elsewhere(results: Path) -> None:
    path = write_report(results)
    page = Page(path.read_text())
    assert path == results / "report.html"
    assert all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in page.links)
    assert "<script" not in path.read_text() and "@import" not in path.read_text()
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_every_plot_is_an_image_with_words_for_it(results: Path) -> None:
    images = Page(write_report(results).read_text()).images
    assert len(images) == 6, "four that compare the studies, one for each study's parameters"
    for image in images:
        assert len(image["alt"] or "") > 40
        svg = base64.b64decode((image["src"] or "").partition(",")[2])
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert "from ties (0.811) to task_arithmetic (0.816)" in (images[0]["alt"] or "")


def test_the_page_says_what_was_found_and_how_to_make_it_again(results: Path) -> None:
    text = re.sub(r"\s+", " ", Page(write_report(results).read_text()).text)
    assert "ref finetuned 100.0 ± 0.8 95.0 95.0 95.0 95.0 95.0 1.00" in text
    assert "1 task_arithmetic 81.6 ± 1.6 77.5 79.0 78.0 77.0 76.0 0.25 scaling_coefficient=0.3" in text
    assert "Candidates9 (8 complete, 1 failed)" in text
    assert "ties density=0.9, disjoint=sum, scaling_coefficient=1 RuntimeError: out of memory" in text
    assert f"merge-ray sweep {results}/sweep.yaml" in text
    assert "torch 2.15.0" in text and "studies: [ties]" in text


def test_what_the_ledger_says_is_never_taken_for_markup(tmp_path: Path) -> None:
    rows = [*demo_rows(["<b>bold</b>"]), make_row("ties", None, {"density": 0.7}, error="<script>alert(1)</script>")]
    page = write_report(write_rows(tmp_path, rows)).read_text()
    assert "<script" not in page and "<b>" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_a_sweep_of_references_alone_has_a_report(tmp_path: Path) -> None:
    rows = [row for row in demo_rows() if row["method"] in ("pretrained", "finetuned")]
    text = Page(write_report(write_rows(tmp_path, rows)).read_text()).text
    assert "No merged model is confirmed on the test split." in text


def test_an_unfinished_sweep_is_explained_and_leaves_no_page(tmp_path: Path) -> None:
    write_rows(tmp_path, [make_row("ties", {"a": 0.5})])
    with pytest.raises(LedgerError, match="no candidate has been scored on the test split yet"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("objective", ["mean", "worst", "accuracy/digits", "storage_ratio"])
def test_other_rankings_have_reports_too(results: Path, objective: str) -> None:
    assert "task_arithmetic" in write_report(results, objective).read_text()


def test_the_leaderboard_is_saved_as_an_image(results: Path, tmp_path: Path) -> None:
    path = leaderboard_plot(results, tmp_path / "plot.png")
    with Image.open(path) as image:
        assert image.size[0] == 9 * 150
        assert len(image.convert("RGB").getcolors(1_000_000) or []) > 10


def test_bars_show_the_scores_with_the_best_on_top(results: Path) -> None:
    axes = plot_scores(rank(read_rows(results))).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ties", "task_arithmetic"]
    assert [round(patch.get_width(), 4) for patch in axes.patches] == [0.8105, 0.8158]  # type: ignore[attr-defined]
    assert {text.get_text() for text in axes.texts} >= {"81.6", "81.1", "pretrained", "finetuned"}


def test_the_best_so_far_never_falls(results: Path) -> None:
    wide = widen(read_rows(results))
    search = wide[(wide["split"] == "val") & (wide["study"] == "task_arithmetic")]
    line = plot_progress(search, style_of(["task_arithmetic"])).axes[0].lines[0]
    values = np.asarray(line.get_ydata(), dtype=float)
    assert len(values) == 5 and (np.diff(values) >= 0).all()
    assert values[-1] == search["objective"].max()


def test_only_parameters_that_vary_are_plotted(results: Path) -> None:
    wide = widen(read_rows(results))
    ties = wide[(wide["study"] == "ties") & (wide["split"] == "val") & (wide["status"] == "complete")]
    assert numeric_parameters(ties) == ["parameter/density"]
    axes = plot_parameters(ties, ("#000000", "o")).axes[0]
    ring = axes.lines[1]
    assert (ring.get_xdata()[0], axes.get_xlabel()) == (0.2, "density")  # type: ignore[index]


def test_pairs_are_shown_over_the_distance_between_their_models(tmp_path: Path) -> None:
    tasks, scores = ["edges", "normals", "depth"], {("edges", "normals"): 0.8, ("depth", "edges"): 0.6}
    scores[("depth", "normals")] = 0.7
    rows = [make_row("finetuned", dict.fromkeys(tasks, 0.95), split=split) for split in ("val", "test")]
    for study in ("zipit", "mudsc"):
        for pair, score in scores.items():
            for split in ("val", "test"):
                changes: dict[str, Any] = {"pair": list(pair), "study": study, "identity": f"{study}{pair}{split}"}
                rows.append(make_row(study, dict.fromkeys(pair, score), split=split, **changes))
    directory = write_rows(tmp_path / "pairs", rows)
    page = Page(write_report(directory).read_text("utf-8"))
    assert "Relatedness" not in page.text and "The best candidate so far" not in page.text
    assert all(f"{task} (200 test samples)" in page.text for task in tasks)
    pairs = plot_pairs(rank(read_rows(directory), by_pair=True)).axes[0]
    assert [label.get_text() for label in pairs.get_yticklabels()] == ["edges+normals", "depth+normals", "depth+edges"]
    distances = pd.DataFrame([[0, 0.2, 0.8], [0.2, 0, 0.5], [0.8, 0.5, 0]], tasks, tasks)
    distances.to_parquet(directory / "relatedness.parquet")
    page = Page(write_report(directory).read_text("utf-8"))
    assert "relatedness" in page.ids and "The similarity tree" in page.text
    figure = plot_relatedness(rank(read_rows(directory), by_pair=True), distances)
    [axes] = figure.axes
    legend = axes.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["mudsc (-1.00)", "zipit (-1.00)"]
    assert np.sort(np.asarray(axes.lines[0].get_xdata())).tolist() == [0.2, 0.5, 0.8]

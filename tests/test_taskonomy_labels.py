"""Taskonomy's labels, losses and scaled performance against recorded numbers (tests/golden)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from test_goldens import GOLDEN, Case, load

from merge_ray.errors import DataError
from merge_ray.tasks.taskonomy_labels import LAYERS, SEMANTIC_CLASSES, Batch, layers_of, make_batch
from merge_ray.tasks.taskonomy_losses import average_label, mean_loss, sample_losses, scaled_performance

LABELS = sorted(path.name for path in (GOLDEN / "taskonomy_metrics").glob("label_*"))


def prepare(task: str, raw: Mapping[str, np.ndarray], size: tuple[int, int], weights: Any = None) -> Batch:
    layers = {name: LAYERS[name].prepare(raw[LAYERS[name].folder], size) for name in layers_of(task)}
    kept = {name: layer.astype(np.uint8 if layer.dtype == np.uint8 else np.float32) for name, layer in layers.items()}
    return make_batch(task, {name: torch.from_numpy(layer)[None] for name, layer in kept.items()}, weights)


@pytest.mark.parametrize("name", LABELS)
def test_labels(name: str) -> None:
    case = load(f"taskonomy_metrics/{name}")
    for key in case.keys("label/"):
        index = key.partition("/")[2]
        raw = {key.split("/")[1]: value.numpy() for key, value in case.inputs.items() if key.endswith(f"/{index}")}
        weights = case.inputs["prior_factor"].tolist() if "prior_factor" in case.inputs else None
        batch = prepare(case.parameters["task"], raw, tuple(case.parameters["target_size"]), weights)
        # The published evaluation calls the noisy image the label, and exchanges the two later.
        image, label = batch.images[0], batch.targets[0]
        if case.parameters["task"] == "denoising":
            image, label = label, image
        case.check(key, label)
        if not case.parameters.get("no_image"):
            case.check(f"image/{index}", image)
        want = case.expected[f"weight/{index}"]
        weight = torch.ones(1) if batch.weights is None else batch.weights[0]
        case.check(f"weight/{index}", weight.expand(want.shape))


def shown(case: Case, task: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    targets = case.inputs["image" if task == "denoising" else f"label/{task}"]
    return targets, case.inputs.get(f"weight/{task}")


def loss(task: str, answers: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return torch.tensor([mean_loss(sample_losses(task, answers, targets, weights).numpy())[0]], dtype=torch.float64)


def test_losses() -> None:
    case = load("taskonomy_metrics/losses")
    for task in case.parameters["tasks"]:
        case.check(f"loss/{task}", loss(task, case.inputs[f"prediction/{task}"], *shown(case, task)))


def test_released_average_label() -> None:
    case = load("taskonomy_metrics/average_estimator")
    for task in case.parameters["tasks"]:
        targets, weights = shown(case, task)
        estimate = average_label(task, targets.split(case.parameters["batch_size"]), released=True)
        case.check(f"estimate/{task}", estimate)
        case.check(f"loss/{task}", loss(task, estimate.expand(len(targets), *estimate.shape), targets, weights))


def test_average_label() -> None:
    targets = torch.rand(7, 3, 4, 5)
    assert torch.allclose(average_label("normal", targets.split(3)), targets.mean(dim=0))
    classes = torch.randint(SEMANTIC_CLASSES, (7, 4, 5))
    estimate = average_label("segment_semantic", classes.split(3))
    assert estimate.shape == (SEMANTIC_CLASSES, 4, 5)
    assert torch.allclose(estimate[2], (classes == 2).float().mean(dim=0))


def test_scaled_performance() -> None:
    case = load("taskonomy_metrics/scaled_performance")
    merged, estimator, pretrained = (case.inputs[key].numpy() for key in ("merged", "estimator", "pretrained"))
    pairs = scaled_performance(merged, estimator, pretrained)
    partners = ~np.eye(len(pairs), dtype=bool)
    np.testing.assert_allclose(pairs[partners], case.expected["scaled_pairs"].numpy()[partners], rtol=1e-9)
    case.check("scaled_mean", np.where(partners, pairs, 0).sum(axis=0) / partners.sum(axis=0))


def test_standard_error_is_that_of_a_mean_where_weights_are_equal() -> None:
    values = np.random.default_rng(0).normal(size=400)
    mean, error = mean_loss(np.stack([values, np.full(400, 3.0)], axis=1))
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(values.std() / 20)
    assert np.isnan(mean_loss(np.zeros((2, 2)))[0])


RAW: dict[str, Any] = {
    "rgb": np.zeros((8, 8, 3), np.uint8),
    "depth_zbuffer": np.zeros((8, 8), np.uint16),
    "normal": np.zeros((8, 8, 3), np.uint8),
    "segment_semantic": np.zeros((8, 8), np.uint8),
}


@pytest.mark.parametrize(
    ("task", "wrong", "message"),
    [
        ("normal", {"normal": np.zeros((8, 8), np.uint8)}, r"normal is an 8-bit RGB image; found uint8 \[8, 8\]"),
        ("depth_zbuffer", {"depth_zbuffer": np.zeros((8, 8), np.uint8)}, "depth_zbuffer is a 16-bit image"),
        ("segment_semantic", {"segment_semantic": np.full((8, 8), 18, np.uint8)}, r"to 17; found 18"),
        ("segment_semantic", {"segment_semantic": np.zeros((16, 16), np.uint8)}, "it is 16x16, needed 8x8"),
        ("normals", {}, "'normals'; did you mean 'normal'"),
    ],
)
def test_labels_of_the_wrong_kind(task: str, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(task, RAW | wrong, (8, 8))


def test_a_map_without_labels_counts_for_nothing() -> None:
    weights = prepare("segment_semantic", RAW, (8, 8)).weights
    assert weights is not None and not weights.any()

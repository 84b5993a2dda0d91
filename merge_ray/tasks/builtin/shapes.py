"""A drawn task: which of ten shapes is it."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from merge_ray.tasks.builtin.drawing import SIZE, balanced_labels, colourise, generator

COUNTS = {"train": 3000, "val": 600, "test": 900}
OVERSAMPLING = 4
Point = tuple[float, float]


def _regular(corners: int, inner: float = 1.0) -> list[Point]:
    """A regular polygon, or with ``inner`` < 1 a star whose inner corners lie at that radius."""
    radii = [1.0] if inner == 1.0 else [1.0, inner]
    total = corners * len(radii)
    angles = [2 * math.pi * index / total for index in range(total)]
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)]


def _arc(centre: Point, radius: float, start: float, end: float) -> list[Point]:
    """Points on a circle from ``start`` to ``end`` degrees."""
    angles = np.radians(np.linspace(start, end, 48))
    return [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles]


_BAR = 0.33
SHAPES: dict[str, list[Point]] = {
    "circle": _arc((0, 0), 0.9, 0, 360),
    "triangle": _regular(3),
    "square": _regular(4),
    "pentagon": _regular(5),
    "hexagon": _regular(6),
    "star": _regular(5, inner=0.42),
    "cross": [
        (-1, -_BAR), (-_BAR, -_BAR), (-_BAR, -1), (_BAR, -1), (_BAR, -_BAR), (1, -_BAR),
        (1, _BAR), (_BAR, _BAR), (_BAR, 1), (-_BAR, 1), (-_BAR, _BAR), (-1, _BAR),
    ],
    "crescent": _arc((0, 0), 1.0, 50, 310) + _arc((0.45, 0), 0.79, 284, 76),
    "half disc": _arc((-0.4, 0), 1.0, -90, 90),
    "arrow": [(1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3), (-1, -0.3), (0.1, -0.3), (0.1, -0.8)],
}  # fmt: skip


def make_shapes(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Shapes of random size, turn, squeeze and place, in random colours: uint8 [N, 32, 32, 3], labels int64 [N]."""
    rng = generator("shapes", split)
    labels = balanced_labels(rng, COUNTS[split], len(SHAPES))
    outlines = [np.array(outline) for outline in SHAPES.values()]
    masks = np.stack([_draw(rng, outlines[label]) for label in labels])
    return colourise(rng, masks, contrast=0.4, noise=0.05), labels


def _draw(rng: np.random.Generator, outline: np.ndarray) -> np.ndarray:
    """One filled outline as a mask, uint8 [32, 32]."""
    radius = rng.uniform(10.0, 14.0)
    squeeze = np.array([1.0, rng.uniform(0.85, 1.0)])
    angle = rng.uniform(-math.pi / 5, math.pi / 5)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    centre = SIZE / 2 + rng.uniform(-1.5, 1.5, size=2)
    points = ((outline * squeeze) @ turn.T * radius + centre) * OVERSAMPLING
    canvas = Image.new("L", (SIZE * OVERSAMPLING, SIZE * OVERSAMPLING))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in points.tolist()], fill=255)
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX))

"""A small Taskonomy that needs no download: furnished rooms, ray-cast with their true geometry.

Every building has a style of its own (colours, room sizes, how much stands in a room); every image is a new room of its
building, seen by a new camera. What a scan of it would hold is known: depth, normals, classes, edges, shading.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import gaussian_gradient_magnitude

SIZE = 64
BATCH = 8
"""Images rendered together; few, so that what is computed of them stays in the processor's cache."""
VIEW = 0.8
"""The tangent of half the field of view."""
UNITS_PER_METRE = 512
"""Of depths, as in Taskonomy."""
OCCLUSION_JUMP = 0.08
"""An object's outline is an occlusion edge where the depth beside it is larger by this share."""
EDGE = 1230
TEXTURE_EDGES = 32000

BUILDINGS: dict[str, dict[str, int]] = {
    "train": dict.fromkeys(
        ("alder", "ash", "birch", "cedar", "cherry", "elm", "fir", "hazel", "larch", "linden", "pine", "yew"), 200
    ),
    "val": dict.fromkeys(("maple", "oak"), 150),
    "test": dict.fromkeys(("poplar", "rowan", "willow"), 150),
}
"""The images of each building, by split."""

ROOM_CLASSES = ("wall", "floor", "ceiling", "picture", "ball", "box")
"""Numbered from 1 in the class maps."""
WALL, FLOOR, CEILING, PICTURE, BALL, BOX = range(1, 7)
BALLS, BOXES = 3, 4
Array = np.ndarray


@dataclass(frozen=True)
class _Rooms:
    """N rooms with their cameras; lengths in metres, x to the right, y up, z ahead."""

    size: Array  # [N, 3]
    eye: Array  # [N, 3]
    axes: Array  # [N, 3, 3]: the camera's right, up and forward
    balls: Array  # [N, BALLS, 4]: centre and radius, 0 for none
    boxes: Array  # [N, BOXES, 7]: centre, half sizes (0 for none) and turn about y
    picture: Array  # [N, 5]: which wall (0 to 3), left, bottom, width, height
    colours: Array  # [N, 1 + surfaces, 2, 3]: each surface's two colours, by number
    pattern: Array  # [N, 1 + surfaces]: the length of a pattern's tile
    lights: Array  # [N, 2, 3]


SURFACES = PICTURE + BALLS + BOXES
"""Surfaces are numbered from 1: wall, floor, ceiling, picture, then the balls and the boxes."""
CLASS_OF = np.array([0, WALL, FLOOR, CEILING, PICTURE, *[BALL] * BALLS, *[BOX] * BOXES], np.uint8)
USUAL_COLOURS = np.array(
    [[0, 0, 0], [0.8, 0.75, 0.6], [0.5, 0.35, 0.2], [0.9, 0.9, 0.9], [0.3, 0.6, 0.7], [0.8, 0.3, 0.3], [0.35, 0.5, 0.3]]
)
"""By class; a building's own are drawn about these, so that classes can be told in buildings never seen before."""


def render_building(name: str, count: int) -> dict[str, Array]:
    """``count`` images of a building as the files of Taskonomy's folders hold them; the same at every call.

    rgb, normal, reshading: uint8 ``[N, 64, 64, 3]``. depth_zbuffer, depth_euclidean, edge_occlusion, edge_texture:
    uint16 ``[N, 64, 64]``. segment_semantic: uint8 ``[N, 64, 64]``.
    """
    rng = np.random.default_rng([*name.encode()])
    style = USUAL_COLOURS[CLASS_OF, None] + rng.uniform(-0.2, 0.2, (1 + SURFACES, 2, 3))
    scale = rng.uniform(0.8, 1.3)
    parts: dict[str, list[Array]] = {}
    for start in range(0, count, BATCH):
        rooms = _furnish(rng, style, scale, min(BATCH, count - start))
        for folder, images in _render(rng, rooms):
            parts.setdefault(folder, []).append(images)
    return {folder: np.concatenate(images) for folder, images in parts.items()}


def _furnish(rng: np.random.Generator, style: Array, scale: float, count: int) -> _Rooms:
    def draw(low: ArrayLike, high: ArrayLike, *shape: int) -> Array:
        low, high = np.asarray(low), np.asarray(high)
        return (low + (high - low) * rng.random((count, *shape))).astype(np.float32)

    size = draw([2.5, 2.4, 3.0], [9.0, 3.2, 11.0], 3) * np.array([scale, 1, scale], np.float32)
    eye = draw([0.3, 1.4, 0.04], [0.7, 1.7, 0.12], 3) * size ** np.array([1, 0, 1])
    turn, pitch = draw(-0.8, 0.8), draw(-0.4, 0.1)
    zero = np.zeros_like(turn)
    right = np.stack([np.cos(turn), zero, -np.sin(turn)], axis=1)
    forward = np.stack([np.sin(turn) * np.cos(pitch), np.sin(pitch), np.cos(turn) * np.cos(pitch)], axis=1)
    axes = np.stack([right, np.cross(forward, right), forward], axis=1)

    spread = np.array([0.85, 1, 0.6], np.float32)
    radius = draw(0.2, 0.55, BALLS) * (draw(0, 1, BALLS) < 0.8)
    ground = (draw(-0.5, 0.5, BALLS, 3) * spread + [0.5, 0, 0.6]) * size[:, None]
    balls = np.concatenate([ground[..., :1], radius[..., None], ground[..., 2:], radius[..., None]], axis=-1)
    half = draw([0.15, 0.2, 0.15], [0.6, 0.8, 0.6], BOXES, 3) * (draw(0, 1, BOXES, 1) < 0.8)
    ground = (draw(-0.5, 0.5, BOXES, 3) * spread + [0.5, 0, 0.6]) * size[:, None]
    centre = np.stack([ground[..., 0], half[..., 1], ground[..., 2]], axis=-1)
    boxes = np.concatenate([centre, half, draw(0, np.pi, BOXES, 1)], axis=-1)

    picture = np.concatenate([rng.integers(0, 4, (count, 1)), draw([0.5, 1, 0.6, 0.5], [3, 1.4, 1.6, 1.1], 4)], axis=1)
    colours = np.clip(style + draw(-0.1, 0.1, 1 + SURFACES, 2, 3), 0.05, 1)
    lights = draw([0.1, 0.8, 0.1], [0.9, 0.98, 0.9], 2, 3) * size[:, None]
    parts = (size, eye, axes, balls, boxes, picture, colours, draw(0.25, 1.2, 1 + SURFACES), lights)
    return _Rooms(*(part.astype(np.float32) for part in parts))


def _render(rng: np.random.Generator, rooms: _Rooms) -> Iterator[tuple[str, Array]]:
    steps = ((np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE * 2 - 1) * VIEW
    across, down = np.meshgrid(steps, -steps)
    pixels = np.stack([across, down, np.ones_like(across)]).reshape(3, -1)
    # A ray's parameter is then the depth along the camera's axis.
    rays = rooms.axes.transpose(0, 2, 1) @ pixels
    depth, normal, surface = _trace(rooms, rays)
    points = rooms.eye[..., None] + rays * depth[:, None]

    def picture(values: Array, kind: type) -> Array:
        whole = np.rint(values).astype(kind).reshape(*values.shape[:-1], SIZE, SIZE)
        return whole if values.ndim == 2 else whole.transpose(0, 2, 3, 1)

    length = np.linalg.norm(pixels, axis=0)
    shades = np.maximum((normal * -rays).sum(1), 0) / length
    rgb = _colour(rooms, points, normal, surface) + rng.normal(0, 0.01, points.shape)
    image = picture(rgb.clip(0, 1) * 255, np.uint8)
    seen = rooms.axes @ normal * np.array([[1], [1], [-1]], np.float32)
    zbuffer = picture(depth * UNITS_PER_METRE, np.uint16)
    yield "rgb", image
    yield "depth_zbuffer", zbuffer
    yield "depth_euclidean", picture(depth * length * UNITS_PER_METRE, np.uint16)
    yield "normal", picture((seen.clip(-1, 1) + 1) * 127.5, np.uint8)
    yield "reshading", picture(np.repeat(shades[:, None] * 255, 3, axis=1), np.uint8)
    yield "segment_semantic", picture(CLASS_OF[surface], np.uint8)
    yield "edge_occlusion", (_occlusions(zbuffer, picture(surface, np.uint8)) * EDGE).astype(np.uint16)
    edges = gaussian_gradient_magnitude(image.mean(axis=-1) / 255, sigma=1, axes=(1, 2))
    yield "edge_texture", np.rint(edges * TEXTURE_EDGES).astype(np.uint16)


def _trace(rooms: _Rooms, rays: Array) -> tuple[Array, Array, Array]:
    """What rays ``[N, 3, P]`` from the eye hit: depth ``[N, P]``, normal ``[N, 3, P]``, the number of the surface."""
    rays = _tilted(rays)
    eye = rooms.eye[..., None]
    exits = np.where(rays > 0, rooms.size[..., None] - eye, -eye) / rays
    axis, depth = exits.argmin(axis=1), exits.min(axis=1)
    normal = -np.sign(rays) * _along(axis)
    upward = np.take_along_axis(rays, axis[:, None], axis=1)[:, 0] > 0
    surface = np.where(axis == 1, np.where(upward, CEILING, FLOOR), WALL)
    surface[_in_picture(rooms, eye + rays * depth[:, None], axis, upward)] = PICTURE
    for index in range(BALLS):
        centre, radius = rooms.balls[:, index, :3, None], rooms.balls[:, index, 3:]
        hit = _ball(eye - centre, rays, radius)
        near = hit < depth
        depth, surface = np.where(near, hit, depth), np.where(near, PICTURE + 1 + index, surface)
        outward = (eye + rays * depth[:, None] - centre) / np.maximum(radius, 1e-6)[..., None]
        normal = np.where(near[:, None], outward, normal)
    for index in range(BOXES):
        hit, outward = _box(eye, rays, rooms.boxes[:, index])
        near = hit < depth
        depth, normal = np.where(near, hit, depth), np.where(near[:, None], outward, normal)
        surface = np.where(near, PICTURE + 1 + BALLS + index, surface)
    return depth, normal, surface


def _tilted(rays: Array) -> Array:
    """The rays, none of them parallel to an axis."""
    return np.where(np.abs(rays) < 1e-6, np.float32(1e-6), rays)


def _along(axis: Array) -> Array:
    """Unit vectors ``[N, 3, P]`` along the axes with the numbers ``[N, P]``."""
    return axis[:, None] == np.arange(3)[:, None]


def _in_picture(rooms: _Rooms, points: Array, axis: Array, upward: Array) -> Array:
    wall, left, bottom, width, height = rooms.picture.T[..., None]
    along, above = np.where(axis == 0, points[:, 2], points[:, 0]) - left, points[:, 1] - bottom
    inside = (along > 0) & (along < width) & (above > 0) & (above < height)
    return inside & (axis != 1) & (axis + upward == wall)


def _ball(offset: Array, rays: Array, radius: Array) -> Array:
    """Where the rays enter a ball ``[N, P]``, infinite where they miss it."""
    a, b = (rays**2).sum(1), (offset * rays).sum(1)
    root = b**2 - a * ((offset**2).sum(1) - radius**2)
    hit = (-b - np.sqrt(np.maximum(root, 0))) / a
    return np.where((root > 0) & (hit > 0.05) & (radius > 0), hit, np.inf)


def _box(eye: Array, rays: Array, box: Array) -> tuple[Array, Array]:
    """Where the rays enter a box that is turned about y, and the face's normal there."""
    cos, sin = np.cos(box[:, 6]), np.sin(box[:, 6])
    zero, one = np.zeros_like(cos), np.ones_like(cos)
    turn = np.stack([cos, zero, sin, zero, one, zero, -sin, zero, cos], axis=1).reshape(-1, 3, 3)
    half = box[:, 3:6, None]
    start, ahead = turn @ (eye - box[:, :3, None]), _tilted(turn @ rays)
    reach = np.abs(half / ahead)
    enters, leaves = -start / ahead - reach, -start / ahead + reach
    hit = enters.max(axis=1)
    face = -np.sign(ahead) * _along(enters.argmax(axis=1))
    meets = (hit < leaves.min(axis=1)) & (hit > 0.05) & (half[:, 0] > 0)
    return np.where(meets, hit, np.inf), turn.transpose(0, 2, 1) @ face


def _colour(rooms: _Rooms, points: Array, normal: Array, surface: Array) -> Array:
    """Checked surfaces under two lamps and some light from everywhere."""
    tile = np.take_along_axis(rooms.pattern, surface, axis=1)[:, None]
    checks = np.floor(points / tile + 0.01).astype(np.int32).sum(axis=1) % 2
    albedo = rooms.colours[np.arange(len(points))[:, None], surface, checks].transpose(0, 2, 1)
    light = np.full(surface.shape, 0.25, np.float32)
    for index in range(rooms.lights.shape[1]):
        way = rooms.lights[:, index, :, None] - points
        far = np.sqrt((way**2).sum(1)) + 0.1
        light += 0.9 * np.maximum((way * normal).sum(1) / far, 0) / (1 + 0.1 * far**2)
    return albedo * light[:, None]


def _occlusions(depth: Array, surface: Array) -> Array:
    """Where a ball or box ends before what is farther away: bool ``[N, H, W]``, on the nearer side."""
    edges = np.zeros(depth.shape, bool)
    far = depth.astype(np.float32)
    for axis in (1, 2):
        for step in (1, -1):
            other, beside = np.roll(far, step, axis), np.roll(surface, step, axis)
            jump = (surface > PICTURE) & (beside != surface) & (other > far * (1 + OCCLUSION_JUMP))
            border = [slice(None)] * 3
            border[axis] = slice(0, 1) if step == 1 else slice(-1, None)
            jump[tuple(border)] = False
            edges |= jump
    return edges

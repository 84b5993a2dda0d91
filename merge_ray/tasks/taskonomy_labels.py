"""From the raw images of a Taskonomy sample to what a network is shown, and what it should answer.

Conventions of the Taskonomy models (Zamir et al., Taskonomy, arXiv:1804.08328) as the evaluation of training-free
merging uses them (Xu et al., arXiv:2403.01753).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.transform import resize

from merge_ray.errors import DataError, choose_from

RGB = "rgb"
MASK_FROM = "depth_zbuffer"
FARTHEST = 64500
"""Depths from here on (of 65535) are holes in the scan."""
WHOLE = 0.99
"""A scaled mask counts where at least so much of it does."""
SEMANTIC_CLASSES = 17
OBJECT_CLASSES = 1000
SEMANTIC_TOTAL = 256 * 256
NOISE = 0.1
Size = tuple[int, int]


CONTENTS = {
    "rgb": "an 8-bit RGB image",
    "grey16": "a 16-bit image of one channel",
    "grey8": "an 8-bit image of one channel",
    "vector": f"a vector of {OBJECT_CLASSES} floats",
}
"""What label files hold: uint8 ``[H, W, 3]``, uint16 ``[H, W]``, uint8 ``[H, W]``, float ``[1000]``."""


@dataclass(frozen=True)
class LabelKind:
    """How the label files of a task are read.

    folder: where they lie. content: one of ``CONTENTS``. masked: whether holes in the scan do not count. transform:
    from a raw image to a label ``[C, height, width]`` of the given size.
    """

    folder: str
    content: str
    masked: bool
    transform: Callable[[np.ndarray, Size], np.ndarray]


@dataclass(frozen=True)
class Sample:
    """One sample of a task.

    image: what the network sees, float32 ``[3, H, W]`` in [-1, 1]. target: what it should answer, float32
    ``[C, H, W]``; classes int64 ``[H, W]`` for segment_semantic; probabilities float32 ``[1000]`` for class_object.
    weight: of each pixel, float32 ``[1, H, W]`` (``[H, W]`` for segment_semantic), or None where all count alike.
    """

    image: np.ndarray
    target: np.ndarray
    weight: np.ndarray | None


def _resize(values: np.ndarray, size: Size) -> np.ndarray:
    """``values`` ``[H, W, ...]`` linearly at ``size``, smoothed before shrinking."""
    if values.shape[:2] == size:
        return values
    resized: np.ndarray = resize(values.astype(np.float64), size, order=1, preserve_range=True)
    return resized


def _planes(values: np.ndarray) -> np.ndarray:
    """``[H, W]`` or ``[H, W, C]`` as ``[C, H, W]``."""
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def _colours(raw: np.ndarray, size: Size) -> np.ndarray:
    return _planes(_resize(raw / 255, size)) * 2 - 1


def _shading(raw: np.ndarray, size: Size) -> np.ndarray:
    return _planes(_resize(raw / 255 @ np.array([0.2125, 0.7154, 0.0721]), size)) * 2 - 1


def _curvature(raw: np.ndarray, size: Size) -> np.ndarray:
    centred = _resize(raw[:, :, :2].astype(np.float64), size) - (123.572, 120.1)
    return _planes(centred / (31.922, 21.658))


def _log_depth(raw: np.ndarray, size: Size) -> np.ndarray:
    return _planes(_resize(np.log(1.0 + raw) / math.log(2**16), size))


def _clipped(limit: float) -> Callable[[np.ndarray, Size], np.ndarray]:
    def transform(raw: np.ndarray, size: Size) -> np.ndarray:
        return _planes(_resize(raw / 65535, size).clip(0, limit) / limit * 2 - 1)

    return transform


def _occlusion_edges(raw: np.ndarray, size: Size) -> np.ndarray:
    """Not clipped: strong edges are above 1 before they are blurred."""
    return _planes(gaussian_filter(_resize(raw / 65535, size) / 0.00625 * 2 - 1, sigma=4))


def _classes(raw: np.ndarray, size: Size) -> np.ndarray:
    if raw.shape != size:
        raise DataError(
            f"a class map cannot be scaled: it is {raw.shape[0]}x{raw.shape[1]}, needed {size[0]}x{size[1]}"
        )
    if raw.max(initial=0) > SEMANTIC_CLASSES:
        raise DataError(f"a class map holds 0 (unlabelled) to {SEMANTIC_CLASSES}; found {raw.max()}")
    return np.maximum(raw.astype(np.int64) - 1, 0)


LABEL_KINDS = {
    "autoencoding": LabelKind(RGB, "rgb", False, _colours),
    "class_object": LabelKind("class_object", "vector", False, lambda raw, size: raw),
    "curvature": LabelKind("principal_curvature", "rgb", True, _curvature),
    "denoising": LabelKind(RGB, "rgb", False, _colours),
    "depth_euclidean": LabelKind("depth_euclidean", "grey16", True, _log_depth),
    "depth_zbuffer": LabelKind("depth_zbuffer", "grey16", True, _log_depth),
    "edge_occlusion": LabelKind("edge_occlusion", "grey16", True, _occlusion_edges),
    "edge_texture": LabelKind("edge_texture", "grey16", False, _clipped(0.08)),
    "keypoints2d": LabelKind("keypoints2d", "grey16", True, _clipped(0.005)),
    "keypoints3d": LabelKind("keypoints3d", "grey16", True, _clipped(1.0)),
    "normal": LabelKind("normal", "rgb", True, _colours),
    "reshading": LabelKind("reshading", "rgb", True, _shading),
    "segment_semantic": LabelKind("segment_semantic", "grey8", False, _classes),
}
"""The tasks whose labels are known."""


def find_label_kind(task: str) -> LabelKind:
    """How the labels of ``task`` are read; raises :class:`DataError` with the nearest match."""
    if task not in LABEL_KINDS:
        raise DataError(f"no labels are known for the task {task!r}; {choose_from(task, LABEL_KINDS)}")
    return LABEL_KINDS[task]


def needed_folders(task: str) -> tuple[str, ...]:
    """The folders that a sample of ``task`` is made from."""
    kind = find_label_kind(task)
    return tuple(dict.fromkeys([RGB, kind.folder, *([MASK_FROM] if kind.masked else [])]))


def prepare_sample(
    task: str, raw: Mapping[str, np.ndarray], size: Size, class_weights: Sequence[float] | None = None
) -> Sample:
    """The sample of ``task`` at ``size`` from the raw contents of :func:`needed_folders`.

    class_weights: ``[17]``, how much the pixels of each class count in segment_semantic; all alike without them.
    Images that denoising is shown have Gaussian noise of deviation 0.1 (of the range [0, 1]), the same in every sample,
    as in the published evaluation. Raises :class:`DataError` for raw images of the wrong kind.
    """
    kind = find_label_kind(task)
    for folder in needed_folders(task):
        check_content(folder, raw[folder], content_of(task, folder))
    image, target = _colours(raw[RGB], size), kind.transform(raw[kind.folder], size)
    weight = None
    if task == "denoising":
        noise = np.random.default_rng(0).normal(0, NOISE, (*size, 3))
        image = ((image + 1) / 2 + _planes(noise)).clip(0, 1) * 2 - 1
    elif task == "segment_semantic":
        factors = np.ones(SEMANTIC_CLASSES) if class_weights is None else np.asarray(class_weights)
        weight = (raw[kind.folder] > 0) * factors[target]
        weight *= SEMANTIC_TOTAL / max(weight.sum(), 1e-12)
    elif kind.masked:
        mask = _resize((raw[MASK_FROM] < FARTHEST).astype(np.float64), size)
        weight = _planes(np.where(mask < WHOLE, 0, mask))
    exact = target if target.dtype == np.int64 else target.astype(np.float32)
    return Sample(image.astype(np.float32), exact, None if weight is None else weight.astype(np.float32))


def content_of(task: str, folder: str) -> str:
    """Which of ``CONTENTS`` the files of one of a task's folders hold."""
    return {RGB: "rgb", MASK_FROM: "grey16"}.get(folder) or find_label_kind(task).content


def check_content(folder: str, raw: np.ndarray, content: str) -> None:
    """Raise :class:`DataError` where a raw image is not what its folder should hold."""
    fits = {
        "rgb": raw.dtype == np.uint8 and raw.ndim == 3 and raw.shape[2] == 3,
        "grey16": raw.dtype in (np.uint16, np.int32) and raw.ndim == 2,
        "grey8": raw.dtype == np.uint8 and raw.ndim == 2,
        "vector": raw.dtype.kind == "f" and raw.shape == (OBJECT_CLASSES,),
    }[content]
    if not fits:
        raise DataError(f"{folder} is {CONTENTS[content]}; found {raw.dtype} {list(raw.shape)}")

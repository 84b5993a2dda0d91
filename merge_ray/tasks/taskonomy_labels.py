"""From the raw images of a Taskonomy sample to what a network is shown, and what it should answer.

Conventions of the Taskonomy models (Zamir et al., Taskonomy, arXiv:1804.08328) as the evaluation of training-free
merging uses them (Xu et al., arXiv:2403.01753).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from skimage.transform import resize
from torch import Tensor

from merge_ray.errors import DataError, choose_from

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
class Layer:
    """One kind of image of a scene, as it is kept for the tasks that need it.

    folder: where its files lie. content: one of ``CONTENTS``. transform: from a raw image to an array ``[C, height,
    width]`` of the given size (without ``C`` for class maps, ``[1000]`` for class_object). dtype: what it is kept in.
    """

    folder: str
    content: str
    transform: Callable[[np.ndarray, Size], np.ndarray]
    dtype: str = "float16"

    def prepare(self, raw: np.ndarray, size: Size) -> np.ndarray:
        """The transformed raw image, before it is rounded to ``dtype``; raises :class:`DataError` for a wrong kind."""
        fits = {
            "rgb": raw.dtype == np.uint8 and raw.ndim == 3 and raw.shape[2] == 3,
            "grey16": raw.dtype in (np.uint16, np.int32) and raw.ndim == 2,
            "grey8": raw.dtype == np.uint8 and raw.ndim == 2,
            "vector": raw.dtype.kind == "f" and raw.shape == (OBJECT_CLASSES,),
        }[self.content]
        if not fits:
            raise DataError(f"{self.folder} is {CONTENTS[self.content]}; found {raw.dtype} {list(raw.shape)}")
        return self.transform(raw, size)


@dataclass(frozen=True)
class Batch:
    """Samples of a task.

    images: what the network sees, float32 ``[B, 3, H, W]`` in [-1, 1]. targets: what it should answer, float32
    ``[B, C, H, W]``; classes int64 ``[B, H, W]`` for segment_semantic; probabilities float32 ``[B, 1000]`` for
    class_object. weights: of each pixel, float32 ``[B, 1, H, W]`` (``[B, H, W]`` for segment_semantic), or None where
    all count alike.
    """

    images: Tensor
    targets: Tensor
    weights: Tensor | None


def resize_linearly(values: np.ndarray, size: Size) -> np.ndarray:
    """``values`` ``[H, W, ...]`` at ``size``, linearly, smoothed before shrinking; float64 where they change."""
    if values.shape[:2] == size:
        return values
    resized: np.ndarray = resize(values.astype(np.float64), size, order=1, preserve_range=True)
    return resized


def _planes(values: np.ndarray) -> np.ndarray:
    """``[H, W]`` or ``[H, W, C]`` as ``[C, H, W]``."""
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def _colours(raw: np.ndarray, size: Size) -> np.ndarray:
    return _planes(resize_linearly(raw / 255, size)) * 2 - 1


def _shading(raw: np.ndarray, size: Size) -> np.ndarray:
    return _planes(resize_linearly(raw / 255 @ np.array([0.2125, 0.7154, 0.0721]), size)) * 2 - 1


def _curvature(raw: np.ndarray, size: Size) -> np.ndarray:
    centred = resize_linearly(raw[:, :, :2].astype(np.float64), size) - (123.572, 120.1)
    return _planes(centred / (31.922, 21.658))


def _log_depth(raw: np.ndarray, size: Size) -> np.ndarray:
    return _planes(resize_linearly(np.log(1.0 + raw) / math.log(2**16), size))


def _clipped(limit: float) -> Callable[[np.ndarray, Size], np.ndarray]:
    def transform(raw: np.ndarray, size: Size) -> np.ndarray:
        return _planes(resize_linearly(raw / 65535, size).clip(0, limit) / limit * 2 - 1)

    return transform


def _occlusion_edges(raw: np.ndarray, size: Size) -> np.ndarray:
    """Not clipped: strong edges are above 1 before they are blurred."""
    return _planes(gaussian_filter(resize_linearly(raw / 65535, size) / 0.00625 * 2 - 1, sigma=4))


def _class_map(raw: np.ndarray, size: Size) -> np.ndarray:
    if raw.shape != size:
        raise DataError(
            f"a class map cannot be scaled: it is {raw.shape[0]}x{raw.shape[1]}, needed {size[0]}x{size[1]}"
        )
    if raw.max(initial=0) > SEMANTIC_CLASSES:
        raise DataError(f"a class map holds 0 (unlabelled) to {SEMANTIC_CLASSES}; found {raw.max()}")
    return raw


def _mask(raw: np.ndarray, size: Size) -> np.ndarray:
    mask = resize_linearly((raw < FARTHEST).astype(np.float64), size)
    return _planes(np.where(mask < WHOLE, 0, mask))


IMAGE, MASK = "image", "mask"
LAYERS = {
    IMAGE: Layer("rgb", "rgb", _colours, "uint8"),
    MASK: Layer("depth_zbuffer", "grey16", _mask),
    "class_object": Layer("class_object", "vector", lambda raw, size: raw, "float32"),
    "curvature": Layer("principal_curvature", "rgb", _curvature),
    "depth_euclidean": Layer("depth_euclidean", "grey16", _log_depth),
    "depth_zbuffer": Layer("depth_zbuffer", "grey16", _log_depth),
    "edge_occlusion": Layer("edge_occlusion", "grey16", _occlusion_edges),
    "edge_texture": Layer("edge_texture", "grey16", _clipped(0.08)),
    "keypoints2d": Layer("keypoints2d", "grey16", _clipped(0.005)),
    "keypoints3d": Layer("keypoints3d", "grey16", _clipped(1.0)),
    "normal": Layer("normal", "rgb", _colours),
    "reshading": Layer("reshading", "rgb", _shading),
    "segment_semantic": Layer("segment_semantic", "grey8", _class_map, "uint8"),
}
"""The images, the holes of the scan, and each task's labels."""

_UNMASKED = ("class_object", "edge_texture", "segment_semantic")
TASK_LAYERS = {
    "autoencoding": (IMAGE,),
    "denoising": (IMAGE,),
    **{task: (IMAGE, task) for task in _UNMASKED},
    **{task: (IMAGE, task, MASK) for task in LAYERS if task not in (IMAGE, MASK, *_UNMASKED)},
}
"""What each task's samples are made of."""


def layers_of(task: str) -> tuple[str, ...]:
    """The layers that samples of ``task`` are made of; raises :class:`DataError` with the nearest match."""
    if task not in TASK_LAYERS:
        raise DataError(f"no labels are known for the task {task!r}; {choose_from(task, TASK_LAYERS)}")
    return TASK_LAYERS[task]


def make_batch(task: str, layers: Mapping[str, Tensor], class_weights: Sequence[float] | None = None) -> Batch:
    """Samples of ``task`` from its layers ``[B, ...]``, images as float32 in [-1, 1].

    class_weights: ``[17]``, how much the pixels of each class count in segment_semantic; all alike without them.
    Images that denoising is shown have Gaussian noise of deviation 0.1 (of the range [0, 1]), the same in every sample,
    as in the published evaluation.
    """
    images = layers[IMAGE]
    if task == "autoencoding":
        return Batch(images, images, None)
    if task == "denoising":
        noise = _planes(np.random.default_rng(0).normal(0, NOISE, (*images.shape[2:], 3)))
        noisy = (images + 2 * torch.from_numpy(noise).to(images)).clamp(-1, 1)
        return Batch(noisy, images, None)
    labels = layers[task]
    if task == "segment_semantic":
        classes = (labels.long() - 1).clamp(min=0)
        weights = (labels > 0).float()
        if class_weights is not None:
            weights *= torch.tensor(class_weights, device=labels.device)[classes]
        weights *= SEMANTIC_TOTAL / weights.sum(dim=(1, 2), keepdim=True).clamp(min=1e-12)
        return Batch(images, classes, weights)
    return Batch(images, labels.float(), layers[MASK].float() if MASK in layers else None)

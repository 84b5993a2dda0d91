"""From an encoded image to the pixels that a model of one input size sees, and to its hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image

from merge_ray.tasks.source import Payload

INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Decoded(NamedTuple):
    """One image: pixels uint8 [3, S, S]; a hash of all its pixels; a hash of what the source holds."""

    pixels: np.ndarray
    pixel_hash: bytes
    source_hash: bytes


PIXEL_HASH_BYTES = 16


def decode(load: Callable[[], Payload], size: int, interpolation: str) -> Decoded:
    """Load, decode, scale and crop one image. Raises whatever Pillow raises on broken images."""
    payload = load()
    if isinstance(payload, bytes):
        image = Image.open(BytesIO(payload)).convert("RGB")
    elif isinstance(payload, Image.Image):
        image = payload.convert("RGB")
    else:
        image = Image.fromarray(payload).convert("RGB")
    pixels = f"{image.size}".encode() + image.tobytes()
    pixel_hash = hashlib.blake2b(pixels, digest_size=PIXEL_HASH_BYTES).digest()
    source_hash = hashlib.sha256(payload if isinstance(payload, bytes) else pixels).digest()
    return Decoded(_to_model_size(image, size, interpolation), pixel_hash, source_hash)


def _to_model_size(image: Image.Image, size: int, interpolation: str) -> np.ndarray:
    """Scale the shorter side to ``size`` and crop the middle, to the pixel as torchvision's Resize and CenterCrop."""
    short = min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), INTERPOLATIONS[interpolation])
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)

"""Tasks made of real pictures: scikit-learn's digits, and patches of photographs shipped with the dependencies."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
from PIL import Image

from merge_ray.tasks.builtin.drawing import SIZE, balanced_labels, generator

DIGIT_COUNTS = {"train": 1000, "val": 297, "test": 500}
TEXTURE_COUNTS = {"train": 3000, "val": 600, "test": 900}
# material -> (package, file). All files lie inside the wheels: nothing is downloaded.
PHOTOGRAPHS = {
    "a brick wall": ("skimage.data", "brick.png"),
    "a lawn": ("skimage.data", "grass.png"),
    "loose gravel": ("skimage.data", "gravel.png"),
    "the surface of the moon": ("skimage.data", "moon.png"),
    "stained tissue": ("skimage.data", "ihc.png"),
    "cat fur": ("skimage.data", "chelsea.png"),
    "ancient coins": ("skimage.data", "coins.png"),
    "distant galaxies": ("skimage.data", "hubble_deep_field.jpg"),
    "a coffee table": ("skimage.data", "coffee.png"),
    "a motorcycle workshop": ("skimage.data", "motorcycle_left.png"),
    "a chinese temple": ("sklearn.datasets.images", "china.jpg"),
    "a dahlia flower": ("sklearn.datasets.images", "flower.jpg"),
}
# A photograph is a 5 x 5 grid of blocks; block (row, column) belongs to entry (row + 2 * column) % 5 here, so
# that each split sees every part of a photograph, and no pixel is seen by two splits.
BLOCK_OWNERS = ("train", "val", "train", "test", "train")
LEAST_DEVIATION = 5.0  # of a patch's pixels, in its liveliest channel: the sky and the night are no texture


def make_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1797 handwritten digits (8 x 8, UCI), scaled up: uint8 [N, 32, 32, 3], labels int64 [N]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = generator("digits", "train").permutation(len(bunch.target))
    start = {"train": 0, "val": DIGIT_COUNTS["train"], "test": DIGIT_COUNTS["train"] + DIGIT_COUNTS["val"]}[split]
    rows = order[start : start + DIGIT_COUNTS[split]]
    grey = np.rint(bunch.images[rows] * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for image in grey]
    return np.repeat(np.stack(large)[..., None], 3, axis=-1), bunch.target[rows].astype(np.int64)


def make_textures(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Square patches of twelve photographs: uint8 [N, 32, 32, 3], labels int64 [N].

    Patches are mirrored, turned by quarters, and darkened a little.
    """
    rng = generator("textures", split)
    photographs = [_photograph(*source) for source in PHOTOGRAPHS.values()]
    labels = balanced_labels(rng, TEXTURE_COUNTS[split], len(photographs))
    patches = np.stack([_patch(rng, photographs[label], split) for label in labels]).astype(np.float32)
    exposure = rng.uniform(0.6, 1.0, size=(len(labels), 1, 1, 1))
    return np.clip(np.rint(patches * exposure), 0, 255).astype(np.uint8), labels


def _photograph(package: str, file: str) -> Image.Image:
    with files(package).joinpath(file).open("rb") as stream:
        return Image.open(stream).convert("RGB")


def _patch(rng: np.random.Generator, photograph: Image.Image, split: str) -> np.ndarray:
    """A patch of 40 to 56 pixels from one block of ``split``, as uint8 [32, 32, 3]; not a nearly empty one."""
    blocks = [(row, column) for row in range(5) for column in range(5) if BLOCK_OWNERS[(row + 2 * column) % 5] == split]
    width, height = photograph.width // 5, photograph.height // 5
    patch = np.zeros((SIZE, SIZE, 3), np.uint8)
    while patch.std(axis=(0, 1)).max() < LEAST_DEVIATION:
        row, column = blocks[rng.integers(len(blocks))]
        side = min(int(rng.integers(40, 57)), width, height)
        left = column * width + int(rng.integers(width - side + 1))
        top = row * height + int(rng.integers(height - side + 1))
        box = (left, top, left + side, top + side)
        patch = np.asarray(photograph.crop(box).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    patch = np.rot90(patch, int(rng.integers(4)))
    return patch[:, ::-1] if rng.random() < 0.5 else patch

"""Tasks made of real glyphs: the font files that matplotlib ships, rendered by Pillow.

``letters`` and ``greek`` ask which letter it is; their three splits use different font files.
``typefaces`` asks which typeface it is; its three splits use different pairs of letters.
"""

from __future__ import annotations

import html
import string
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from merge_ray.tasks.builtin.drawing import SIZE, balanced_labels, colourise, generator

# Every font file below holds the letters that its task draws. The files of one split cover upright, slanted,
# light and bold faces, so that no split is a style of its own.
LATIN_FONTS = {
    "train": (
        "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-BoldOblique",
        "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralBolIta", "cmr10",
        "cmtt10", "cmmi10",
    ),
    "val": ("DejaVuSans-BoldOblique", "DejaVuSansMono-Bold", "STIXGeneralItalic", "cmb10"),
    "test": ("DejaVuSansMono-Oblique", "DejaVuSerif-Italic", "STIXGeneralBol", "cmss10", "cmti10"),
}  # fmt: skip
GREEK_FONTS = {
    "train": (
        "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-BoldOblique",
        "DejaVuSerif", "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralItalic",
    ),
    "val": ("DejaVuSans-BoldOblique", "DejaVuSerif-Bold", "STIXGeneralBolIta"),
    "test": ("DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSerif-Italic", "STIXGeneralBol"),
}  # fmt: skip
GREEK_LETTERS = (
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi",
    "pi", "rho", "sigma", "tau", "phi", "chi", "psi", "omega",
)  # fmt: skip
TYPEFACES = {
    "plain sans-serif": "DejaVuSans",
    "bold sans-serif": "DejaVuSans-Bold",
    "bold wide serif": "DejaVuSerif-Bold",
    "light book serif": "cmr10",
    "italic newspaper serif": "STIXGeneralItalic",
    "typewriter": "cmtt10",
}
# The pair of the i-th and the j-th of these belongs to the split at (i + j) % 5.
PAIR_LETTERS = "abdefghknpqrtuyABDEGHKNPQRSTU"
PAIR_OWNERS = ("train", "train", "val", "train", "test")
COUNTS = {"train": 4000, "val": 800, "test": 1000}


def make_letters(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Capital letters A to Z in the fonts of ``split``: images uint8 [N, 32, 32, 3], labels int64 [N]."""
    return _make_characters("letters", string.ascii_uppercase, LATIN_FONTS[split], split)


def make_greek(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Small Greek letters in the fonts of ``split``: images uint8 [N, 32, 32, 3], labels int64 [N]."""
    characters = [html.unescape(f"&{name};") for name in GREEK_LETTERS]
    return _make_characters("greek", characters, GREEK_FONTS[split], split)


def make_typefaces(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of letters of ``split`` in six typefaces: images uint8 [N, 32, 32, 3], labels int64 [N]."""
    rng = generator("typefaces", split)
    labels = balanced_labels(rng, COUNTS[split], len(TYPEFACES))
    numbered = list(enumerate(PAIR_LETTERS))
    pairs = [a + b for i, a in numbered for j, b in numbered if PAIR_OWNERS[(i + j) % 5] == split]
    fonts = list(TYPEFACES.values())
    masks = [_draw(rng, str(rng.choice(pairs)), fonts[label], (17, 19), shift=1.0, degrees=0.0) for label in labels]
    return colourise(rng, np.stack(masks), contrast=0.5, noise=0.03), labels


def _make_characters(
    task: str, characters: Sequence[str], fonts: Sequence[str], split: str
) -> tuple[np.ndarray, np.ndarray]:
    rng = generator(task, split)
    labels = balanced_labels(rng, COUNTS[split], len(characters))
    chosen = rng.choice(fonts, size=len(labels))
    masks = [
        _draw(rng, characters[label], font, (22, 27), shift=1.5, degrees=8.0)
        for label, font in zip(labels, chosen, strict=True)
    ]
    return colourise(rng, np.stack(masks), contrast=0.4, noise=0.04), labels


def _draw(
    rng: np.random.Generator, text: str, font_name: str, sizes: tuple[int, int], shift: float, degrees: float
) -> np.ndarray:
    """A text as a mask, uint8 [32, 32]: of a random size, up to ``shift`` pixels off the middle, turned a little."""
    font = _font(font_name, int(rng.integers(sizes[0], sizes[1] + 1)))
    off = rng.uniform(-shift, shift, size=2)
    canvas = Image.new("L", (SIZE, SIZE))
    draw = ImageDraw.Draw(canvas)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font, anchor="ls")
    place = ((SIZE - left - right) / 2 + off[0], (SIZE - top - bottom) / 2 + off[1])
    draw.text(place, text, font=font, anchor="ls", fill=255)
    return np.asarray(canvas.rotate(rng.uniform(-degrees, degrees), Image.Resampling.BICUBIC))


@lru_cache(maxsize=512)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # only its data path is used, and importing it is slow

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)

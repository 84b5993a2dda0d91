"""The tasks that need no download: 32 x 32 pictures made from what the dependencies ship, and sentences made by rule.

They are the quickstarts' tasks. Every split is made from a fixed seed; train, val and test share no font file,
no region of a photograph, no letter pair, no sentence or no draw, as each task says.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from merge_ray.tasks.builtin.drawing import SPLITS
from merge_ray.tasks.builtin.glyphs import GREEK_LETTERS, TYPEFACES, make_greek, make_letters, make_typefaces
from merge_ray.tasks.builtin.pictures import PHOTOGRAPHS, make_digits, make_textures
from merge_ray.tasks.builtin.sentences import (
    DAYS,
    make_agreement,
    make_comparison,
    make_sentiment,
    make_weekdays,
)
from merge_ray.tasks.builtin.shapes import SHAPES, make_shapes

__all__ = ["BUILTIN_TASKS", "SPLITS", "TEXT_TASKS", "BuiltinTask", "BuiltinTextTask", "recipe"]


@dataclass(frozen=True)
class BuiltinTask:
    """A task made on the spot.

    ``make(split)`` returns images uint8 [N, 32, 32, 3] and labels int64 [N], the same at every call.
    """

    classes: tuple[str, ...]
    templates: tuple[str, ...]
    make: Callable[[str], tuple[np.ndarray, np.ndarray]]


BUILTIN_TASKS: dict[str, BuiltinTask] = {
    "digits": BuiltinTask(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        ("a handwritten {}", "the digit {} written by hand", "a scan of the handwritten number {}"),
        make_digits,
    ),
    "letters": BuiltinTask(
        tuple(f"letter {letter}" for letter in string.ascii_uppercase),
        ("the {}", "a printed {}", "the capital {} in some font"),
        make_letters,
    ),
    "greek": BuiltinTask(
        tuple(f"greek {name}" for name in GREEK_LETTERS),
        ("the {}", "a printed {} sign", "the symbol {} in a formula"),
        make_greek,
    ),
    "typefaces": BuiltinTask(
        tuple(TYPEFACES),
        ("two letters in a {} typeface", "text set in {}", "a {} font"),
        make_typefaces,
    ),
    "textures": BuiltinTask(
        tuple(PHOTOGRAPHS),
        ("a texture of {}", "a close photo of {}", "a small patch of {}"),
        make_textures,
    ),
    "shapes": BuiltinTask(
        tuple(SHAPES),
        ("a drawing of a {}", "a filled {}", "a {} on a plain background"),
        make_shapes,
    ),
}


@dataclass(frozen=True)
class BuiltinTextTask:
    """A text task made on the spot.

    ``make(split)`` returns what is asked [N] and labels int64 [N], the same at every call.
    """

    classes: tuple[str, ...]
    make: Callable[[str], tuple[list[str], np.ndarray]]


TEXT_TASKS: dict[str, BuiltinTextTask] = {
    "sentiment": BuiltinTextTask(("negative", "positive"), make_sentiment),
    "agreement": BuiltinTextTask(("wrong", "right"), make_agreement),
    "comparison": BuiltinTextTask(("false", "true"), make_comparison),
    "weekdays": BuiltinTextTask(DAYS, make_weekdays),
}


def recipe() -> str:
    """A hash of all that decides what is made: this package's code and the versions of the libraries that draw."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    for library in ("matplotlib", "numpy", "pillow", "scikit-image", "scikit-learn"):
        digest.update(f"{library}=={version(library)}".encode())
    return digest.hexdigest()

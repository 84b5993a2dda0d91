"""The built-in tasks: right in form, the same at every call, and with splits that share nothing."""

import hashlib
import html
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font

from merge_ray.tasks import TaskSpec, open_task, overlap
from merge_ray.tasks.builtin import BUILTIN_TASKS, SPLITS, glyphs, pictures

Made = dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]


@pytest.fixture(scope="module")
def made() -> Made:
    return {name: {split: task.make(split) for split in SPLITS} for name, task in BUILTIN_TASKS.items()}


@pytest.mark.parametrize("name", BUILTIN_TASKS)
def test_every_split_is_whole(made: Made, name: str) -> None:
    classes = len(BUILTIN_TASKS[name].classes)
    for split, (images, labels) in made[name].items():
        assert images.dtype == np.uint8 and images.shape == (len(labels), 32, 32, 3)
        assert labels.dtype == np.int64 and set(labels.tolist()) == set(range(classes))
        assert len(labels) >= (297 if split == "val" else 500)
        # every picture shows something
        assert images.reshape(len(images), -1).std(axis=1).min() > 1


@pytest.mark.parametrize("name", BUILTIN_TASKS)
def test_no_picture_is_in_two_splits_or_twice_in_one(made: Made, name: str) -> None:
    digests = [hashlib.sha256(image.tobytes()).digest() for split in SPLITS for image in made[name][split][0]]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("name", BUILTIN_TASKS)
def test_the_same_at_every_call(made: Made, name: str) -> None:
    images, labels = BUILTIN_TASKS[name].make("val")
    assert np.array_equal(images, made[name]["val"][0])
    assert np.array_equal(labels, made[name]["val"][1])


@pytest.mark.parametrize("name", BUILTIN_TASKS)
def test_classes_differ_and_templates_have_one_gap(name: str) -> None:
    task = BUILTIN_TASKS[name]
    assert len(set(task.classes)) == len(task.classes)
    assert 2 <= len(task.templates) <= 5
    assert all(template.count("{}") == 1 for template in task.templates)


@pytest.mark.parametrize(
    "fonts, characters",
    [
        (glyphs.LATIN_FONTS, string.ascii_uppercase),
        (glyphs.GREEK_FONTS, [html.unescape(f"&{name};") for name in glyphs.GREEK_LETTERS]),
        ({"all": tuple(glyphs.TYPEFACES.values())}, glyphs.PAIR_LETTERS),
    ],
)
def test_fonts_have_their_characters_and_one_split(
    fonts: dict[str, tuple[str, ...]], characters: Sequence[str]
) -> None:
    files = [file for split in fonts.values() for file in split]
    assert len(set(files)) == len(files)
    for file in files:
        known = FT2Font(f"{get_data_path()}/fonts/ttf/{file}.ttf").get_charmap()
        assert all(ord(character) in known for character in characters), file


def test_the_blocks_of_a_photograph_are_shared_out() -> None:
    owners = [pictures.BLOCK_OWNERS[(row + 2 * column) % 5] for row in range(5) for column in range(5)]
    assert {split: owners.count(split) for split in SPLITS} == {"train": 15, "val": 5, "test": 5}


def test_a_builtin_task_opens_and_caches(tmp_path: Path) -> None:
    task = open_task(TaskSpec.model_validate("digits"))
    assert task.name == "digits" and task.classes[3] == "three" and task.splits == ("train", "val", "test")
    val, test = (task.cached(split, 32, "bicubic", tmp_path) for split in ("val", "test"))
    images, labels = BUILTIN_TASKS["digits"].make("val")
    assert np.array_equal(val.images, images.transpose(0, 3, 1, 2))
    assert np.array_equal(val.labels, labels)
    assert overlap(val, test) == 0
    assert overlap(val, val) == len(val) == 297

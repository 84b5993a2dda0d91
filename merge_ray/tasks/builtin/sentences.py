"""Text tasks made by rule: sentences put together from small word lists.

A sentence belongs to one split for good, by its checksum, so that no split shares a sentence with another.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from merge_ray.tasks.builtin.drawing import balanced_labels, generator

COUNTS = {"train": 3000, "val": 400, "test": 600}
OWNERS = ("train", "train", "train", "train", "val", "test")
Rng = np.random.Generator
Write = Callable[[Rng, int], str]

THINGS = (
    "soup", "film", "book", "song", "room", "beach", "train", "teacher", "garden", "phone",
    "coffee", "museum", "bread", "window", "chair", "story", "hotel", "market", "bridge", "game",
)  # fmt: skip
GOOD = ("good", "lovely", "great", "bright", "tasty", "pleasant", "clever", "fresh", "charming", "superb")
BAD = ("bad", "awful", "dull", "ugly", "stale", "noisy", "boring", "broken", "dreadful", "poor")
DEGREES = ("", "very ", "rather ", "really ")
NOUNS = ("dog", "cat", "boy", "girl", "doctor", "bird", "horse", "driver", "farmer", "singer", "nurse", "king")
VERBS = ("sleep", "run", "wait", "smile", "sing", "work", "eat", "jump", "walk", "laugh")
LINKS = ("near", "behind", "beside", "with", "above")
WHEN = ("today", "at home", "every day", "in spring", "all night", "again")
NUMBERS = (
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
)  # fmt: skip
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


def make_sentiment(split: str) -> tuple[list[str], np.ndarray]:
    """Is an opinion positive? A negation turns it round, and of two opinions the one after ``but`` counts."""
    return _make("sentiment", split, 2, _opinion)


def make_agreement(split: str) -> tuple[list[str], np.ndarray]:
    """Does the verb agree with its subject, whatever noun stands between them?"""
    return _make("agreement", split, 2, _clause)


def make_comparison(split: str) -> tuple[list[str], np.ndarray]:
    """Is the first of two numbers, in words, larger?"""
    return _make("comparison", split, 2, _comparison)


def make_weekdays(split: str) -> tuple[list[str], np.ndarray]:
    """Which day of the week is it, so many days before or after another?"""
    return _make("weekdays", split, len(DAYS), _day)


def _make(task: str, split: str, classes: int, write: Write) -> tuple[list[str], np.ndarray]:
    """The texts and labels of one split: no text twice, and none that another split may have."""
    rng = generator(task, split)
    labels = balanced_labels(rng, COUNTS[split], classes)
    texts: dict[str, None] = {}
    for label in labels.tolist():
        text = write(rng, label)
        while text in texts or OWNERS[zlib.crc32(text.encode()) % len(OWNERS)] != split:
            text = write(rng, label)
        texts[text] = None
    return list(texts), labels


def _pick(rng: Rng, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def _opinion(rng: Rng, label: int) -> str:
    def judge(positive: bool) -> str:
        negated = bool(rng.integers(2))
        word = _pick(rng, GOOD if positive != negated else BAD)
        return f"{'not ' if negated else ''}{_pick(rng, DEGREES)}{word}"

    thing = _pick(rng, THINGS)
    if rng.integers(2):
        return f"is it praise : the {thing} was {judge(bool(label))}"
    return f"is it praise : the {thing} was {judge(bool(rng.integers(2)))} but {judge(bool(label))}"


def _clause(rng: Rng, label: int) -> str:
    subject, other = rng.choice(NOUNS, 2, replace=False)
    plural, other_plural = rng.integers(2, size=2).tolist()
    verb = _pick(rng, VERBS) + ("" if plural == label else "s")
    between = f" {_pick(rng, LINKS)} the {other}{'s' * other_plural}" if rng.integers(2) else ""
    return f"is it grammar : the {subject}{'s' * plural}{between} {verb} {_pick(rng, WHEN)}"


def _comparison(rng: Rng, label: int) -> str:
    low, high = sorted(rng.choice(len(NUMBERS), 2, replace=False).tolist())
    first, second = (high, low) if label else (low, high)
    things = rng.choice(NOUNS, 2, replace=False)
    return f"is it so : {NUMBERS[first]} {things[0]}s are more than {NUMBERS[second]} {things[1]}s"


def _day(rng: Rng, label: int) -> str:
    count, sign = int(rng.integers(1, len(DAYS))), int(rng.choice([-1, 1]))
    start = DAYS[(label - sign * count) % len(DAYS)]
    many = f"{NUMBERS[count - 1]} day{'s' * (count > 1)} {'after' if sign > 0 else 'before'} {start}"
    return f"what day : the {_pick(rng, NOUNS)} will {_pick(rng, VERBS)} {many}"

"""What a task's data look like before they are prepared: parts, with labels at once and samples on request."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from merge_ray.errors import DataError
from merge_ray.tasks.builtin import BUILTIN_TASKS, SPLITS, TEXT_TASKS, recipe

Split = Literal["train", "val", "test"]
Payload = bytes | Image.Image | np.ndarray
UNDIVIDED = "all"
SPLIT_WORDS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}


class Part(ABC):
    """A division of a source: ``train``, ``val``, ``test``, or ``all`` of a set that has no divisions."""

    @abstractmethod
    def stamp(self) -> str:
        """Changes whenever the data may have changed; cheap, and valid on this machine only."""

    @abstractmethod
    def load_labels(self) -> np.ndarray:
        """The labels of all rows, integers [N]."""

    @abstractmethod
    def where(self, row: int) -> str:
        """Where a row is, for messages."""

    @cached_property
    def labels(self) -> np.ndarray:
        """The labels of all rows: int64 [N], or float64 where they are numbers to be told."""
        labels = np.asarray(self.load_labels())
        return labels.astype(np.float64 if labels.dtype.kind == "f" else np.int64)


class ImagePart(Part):
    """A division whose samples are images."""

    @abstractmethod
    def read(self, rows: np.ndarray) -> Iterator[Callable[[], Payload]]:
        """For each of ``rows`` (ascending), a function that gives its image: encoded bytes, or pixels."""


class TextPart(Part):
    """A division whose samples are texts."""

    @abstractmethod
    def texts(self, rows: np.ndarray, options: str) -> list[str]:
        """What a model is asked about each of ``rows`` (ascending); ``options`` are the answers, as words."""


@dataclass(frozen=True)
class Source:
    """The parts of a task's data by name, and its own names of the classes where it knows them."""

    parts: Mapping[str, Part]
    class_names: tuple[str, ...] | None


def stamp_files(paths: Iterable[Path]) -> str:
    """A hash of the paths, sizes and modification times of files."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        status = path.stat()
        digest.update(f"{path}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class BuiltinPart(Part):
    """One split of a task that ``make`` makes on the spot."""

    def __init__(self, name: str, split: str, make: Callable[[str], tuple[Any, np.ndarray]]) -> None:
        self.name, self.split, self.make = name, split, make

    def stamp(self) -> str:
        return recipe()

    @cached_property
    def made(self) -> tuple[Any, np.ndarray]:
        """The samples and their labels."""
        return self.make(self.split)

    def load_labels(self) -> np.ndarray:
        return self.made[1]

    def where(self, row: int) -> str:
        return f"built-in task {self.name!r}"


class BuiltinImagePart(BuiltinPart, ImagePart):
    """One split of images."""

    def read(self, rows: np.ndarray) -> Iterator[Callable[[], Payload]]:
        for row in rows:
            yield partial(self.made[0].__getitem__, row)


class BuiltinTextPart(BuiltinPart, TextPart):
    """One split of texts."""

    def texts(self, rows: np.ndarray, options: str) -> list[str]:
        return [self.made[0][row] for row in rows.tolist()]


def builtin_source(name: str) -> Source:
    """The three splits of a built-in task."""
    if name in TEXT_TASKS:
        texts = TEXT_TASKS[name]
        return Source({split: BuiltinTextPart(name, split, texts.make) for split in SPLITS}, texts.classes)
    images = BUILTIN_TASKS[name]
    return Source({split: BuiltinImagePart(name, split, images.make) for split in SPLITS}, images.classes)


IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class FolderPart(ImagePart):
    """Images in one directory per class."""

    def __init__(self, directory: Path, class_names: tuple[str, ...]) -> None:
        self.directory = directory
        self.files: list[tuple[Path, int]] = [
            (path, label)
            for label, name in enumerate(class_names)
            for path in sorted((directory / name).rglob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES
        ]

    def stamp(self) -> str:
        return stamp_files(path for path, _ in self.files)

    def load_labels(self) -> np.ndarray:
        return np.array([label for _, label in self.files], dtype=np.int64)

    def read(self, rows: np.ndarray) -> Iterator[Callable[[], Payload]]:
        for row in rows:
            yield self.files[row][0].read_bytes

    def where(self, row: int) -> str:
        return str(self.files[row][0])


def folder_source(location: str) -> Source:
    """Images in ``root/{train,val,test}/class/`` or, undivided, in ``root/class/``; labels follow the sorted names."""
    root = Path(location).expanduser()
    if not root.is_dir():
        raise DataError(f"no directory at {root} (image_folder)")
    directories = {
        split: root / word for split, words in SPLIT_WORDS.items() for word in words if (root / word).is_dir()
    } or {UNDIVIDED: root}
    entries = (entry for directory in directories.values() for entry in directory.iterdir() if entry.is_dir())
    class_names = tuple(sorted({entry.name for entry in entries if not entry.name.startswith(".")}))
    if not class_names:
        raise DataError(f"{root} has no directory per class: expected root/train/CLASS/*.png or root/CLASS/*.png")
    return Source({part: FolderPart(path, class_names) for part, path in directories.items()}, class_names)

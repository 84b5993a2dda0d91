"""Where Taskonomy's scenes come from: ``<root>/<building>/<folder>/`` on a disk, or rooms made on the spot."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from merge_ray.errors import DataError, choose_from
from merge_ray.tasks.builtin import recipe
from merge_ray.tasks.builtin.rooms import BUILDINGS as ROOM_BUILDINGS
from merge_ray.tasks.builtin.rooms import render_building
from merge_ray.tasks.source import Part, Source, Split, stamp_files

ROOMS = "builtin:rooms"
RGB = "rgb"
BUILDINGS: dict[str, tuple[str, ...]] = {
    "train": ("allensville", "beechwood", "benevolence", "coffeen", "cosmos", "forkland", "hanson", "hiteman"),
    "val": ("collierville", "corozal", "darden", "markleeville", "wiconisco"),
    "test": ("ihlen", "mcdade", "muleshoe", "noxapater", "uvalda"),
}
"""Taskonomy's buildings: those whose images batch norm is reset on and those that are scored, as in the evaluation of
training-free merging (arXiv:2403.01753); for validation those of Taskonomy's small split."""
BROKEN = {("muleshoe", "point_399_view_5")}
"""A sample whose files are damaged; the published evaluation leaves it out."""


class ScenePart(Part):
    """A division whose samples are scenes; the label of each is its building.

    buildings: this part's. every: the buildings of all parts, in the labels' order.
    """

    def __init__(self, buildings: Sequence[str], every: Sequence[str]) -> None:
        self.buildings, self.every = buildings, every

    @abstractmethod
    def stamp_of(self, folder: str) -> str:
        """Changes whenever what a folder holds may have changed; cheap, and valid on this machine only."""

    def stamp(self) -> str:
        return self.stamp_of(RGB)

    @abstractmethod
    def counts(self) -> list[int]:
        """How many scenes each of the part's buildings has."""

    @abstractmethod
    def raw(self, folder: str, rows: np.ndarray) -> list[Callable[[], np.ndarray]]:
        """For each of ``rows``, a function that gives what its file in ``folder`` holds.

        Raises :class:`DataError` where a building has no such folder, or it lacks a file.
        """

    def load_labels(self) -> np.ndarray:
        return np.repeat([self.every.index(building) for building in self.buildings], self.counts())


class FolderScenes(ScenePart):
    """Buildings as Taskonomy ships them: ``<root>/<building>/<folder>/point_<i>_view_<j>_domain_<name>.<suffix>``."""

    def __init__(self, root: Path, buildings: Sequence[str], every: Sequence[str]) -> None:
        super().__init__(buildings, every)
        self.root = root
        self._files = cache(self._find)

    def _find(self, building: str, folder: str) -> dict[str, Path]:
        """The files of a building's folder by what their names say before ``_domain``, in the order of its numbers."""
        directory = self.root / building / folder
        if not (self.root / building).is_dir():
            there = [path.name for path in self.root.iterdir() if path.is_dir()]
            raise DataError(f"no data of the building {building!r} in {self.root}; {choose_from(building, there)}")
        if not directory.is_dir():
            there = [path.name for path in directory.parent.iterdir() if path.is_dir()]
            raise DataError(f"the building {building!r} has no data for {folder!r}; {choose_from(folder, there)}")
        files = {path.name.partition("_domain")[0]: path for path in directory.iterdir() if path.is_file()}
        if not files:
            raise DataError(f"{directory} is empty")
        return {view: files[view] for view in sorted(files, key=_numbers) if (building, view) not in BROKEN}

    def stamp_of(self, folder: str) -> str:
        return stamp_files(path for building in self.buildings for path in self._files(building, folder).values())

    def counts(self) -> list[int]:
        return [len(self._files(building, RGB)) for building in self.buildings]

    @cached_property
    def _views(self) -> list[tuple[str, str]]:
        return [(building, view) for building in self.buildings for view in self._files(building, RGB)]

    def raw(self, folder: str, rows: np.ndarray) -> list[Callable[[], np.ndarray]]:
        loads: list[Callable[[], np.ndarray]] = []
        for building, view in (self._views[row] for row in rows):
            path = self._files(building, folder).get(view)
            if path is None:
                raise DataError(f"{self.root / building / folder} has no file for {view}, which is in {RGB}")
            loads.append(partial(read_raw, path))
        return loads

    def where(self, row: int) -> str:
        building, view = self._views[row]
        return f"{self.root / building}, {view}"


def _numbers(name: str) -> tuple[list[int], str]:
    return [int(number) for number in re.findall(r"\d+", name)], name


def read_raw(path: Path) -> np.ndarray:
    """The pixels of an image in its own depth, without an alpha channel, or the array of an ``.npy`` file.

    Raises :class:`DataError` for a file that cannot be read.
    """
    try:
        if path.suffix == ".npy":
            loaded: np.ndarray = np.load(path, allow_pickle=False)
            return loaded
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB") if image.mode in ("RGBA", "P") else image)
        return pixels.astype(np.uint8) if pixels.dtype == bool else pixels
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three for broken files
        raise DataError(f"{path}: cannot be read ({error})") from error


class RoomScenes(ScenePart):
    """The rooms of :mod:`merge_ray.tasks.builtin.rooms`."""

    def __init__(self, split: str, buildings: Sequence[str], every: Sequence[str]) -> None:
        super().__init__(buildings, every)
        self._images = ROOM_BUILDINGS[split]

    def stamp_of(self, folder: str) -> str:
        return recipe()

    def counts(self) -> list[int]:
        return [self._images[building] for building in self.buildings]

    def raw(self, folder: str, rows: np.ndarray) -> list[Callable[[], np.ndarray]]:
        rendered = _render(tuple(self.buildings), tuple(self.counts()))
        if folder not in rendered:
            raise DataError(f"{ROOMS} has no data for {folder!r}; {choose_from(folder, rendered)}")
        return [partial(rendered[folder].__getitem__, row) for row in rows]

    def where(self, row: int) -> str:
        return f"{ROOMS}, image {row}"


@lru_cache(maxsize=3)
def _render(buildings: tuple[str, ...], counts: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The buildings of a split one after the other; several tasks ask for them in turn."""
    made = [render_building(building, count) for building, count in zip(buildings, counts, strict=True)]
    return {folder: np.concatenate([part[folder] for part in made]) for folder in made[0]}


def scene_source(location: str, buildings: Mapping[Split, Sequence[str]] | None) -> Source:
    """The scenes of the buildings of every split: of ``builtin:rooms``, or in a directory.

    buildings: of each split; where None, the rooms' own, or ``BUILDINGS``. Raises :class:`DataError` where there is no
    such directory, for a building that is not one of the rooms', and for one that is in two splits.
    """
    usual: Mapping[str, Sequence[str]] = BUILDINGS
    if location == ROOMS:
        usual = {split: tuple(named) for split, named in ROOM_BUILDINGS.items()}
    elif not Path(location).expanduser().is_dir():
        raise DataError(f"no directory at {location} (taskonomy); `merge-ray fetch taskonomy` downloads the data")
    chosen = {str(split): list(named) for split, named in (buildings or usual).items()}
    every = [building for named in chosen.values() for building in named]
    if doubled := sorted({building for building in every if every.count(building) > 1}):
        raise DataError(f"buildings named twice: {', '.join(doubled)}")
    if location != ROOMS:
        root = Path(location).expanduser()
        return Source({split: FolderScenes(root, named, every) for split, named in chosen.items()}, tuple(every))
    for split, named in chosen.items():
        for building in named:
            if building not in usual[split]:
                raise DataError(f"{ROOMS} has no {split} building {building!r}; {choose_from(building, usual[split])}")
    return Source({split: RoomScenes(split, named, every) for split, named in chosen.items()}, tuple(every))

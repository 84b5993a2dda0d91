"""Those of the papers' twenty data sets that torchvision has (all but RESISC45)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from merge_ray.errors import DataError
from merge_ray.tasks.source import UNDIVIDED, ImagePart, Payload, Source, stamp_files

_BY_FLAG: Mapping[str, Mapping[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_TWO: Mapping[str, Mapping[str, Any]] = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE: Mapping[str, Mapping[str, Any]] = {**_TWO, "val": {"split": "val"}}
_NONE: Mapping[str, Mapping[str, Any]] = {UNDIVIDED: {}}


@dataclass(frozen=True)
class TorchvisionSet:
    """A class of ``torchvision.datasets``, the files that it keeps below the root (a glob), and what picks a part."""

    class_name: str
    files: str
    parts: Mapping[str, Mapping[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)


TORCHVISION_SETS: dict[str, TorchvisionSet] = {
    "SUN397": TorchvisionSet("SUN397", "SUN397/**/*", _NONE),
    "Cars": TorchvisionSet("StanfordCars", "stanford_cars/**/*", _TWO),
    "EuroSAT": TorchvisionSet("EuroSAT", "eurosat/2750/**/*", _NONE),
    "SVHN": TorchvisionSet("SVHN", "*_32x32.mat", _TWO),
    "GTSRB": TorchvisionSet("GTSRB", "gtsrb/**/*", _TWO),
    "MNIST": TorchvisionSet("MNIST", "MNIST/raw/*", _BY_FLAG),
    "DTD": TorchvisionSet("DTD", "dtd/**/*", _THREE),
    "CIFAR100": TorchvisionSet("CIFAR100", "cifar-100-python/*", _BY_FLAG),
    "STL10": TorchvisionSet("STL10", "stl10_binary/*", _TWO),
    "Flowers102": TorchvisionSet("Flowers102", "flowers-102/**/*", _THREE),
    "OxfordIIITPet": TorchvisionSet(
        "OxfordIIITPet", "oxford-iiit-pet/**/*", {"train": {"split": "trainval"}, "test": {"split": "test"}}
    ),
    "PCAM": TorchvisionSet("PCAM", "pcam/*", _THREE),
    "FER2013": TorchvisionSet("FER2013", "fer2013/*", _TWO),
    "EMNIST": TorchvisionSet("EMNIST", "EMNIST/raw/*digits*", _BY_FLAG, {"split": "digits"}),
    "CIFAR10": TorchvisionSet("CIFAR10", "cifar-10-batches-py/*", _BY_FLAG),
    "Food101": TorchvisionSet("Food101", "food-101/**/*", _TWO),
    "FashionMNIST": TorchvisionSet("FashionMNIST", "FashionMNIST/raw/*", _BY_FLAG),
    "RenderedSST2": TorchvisionSet("RenderedSST2", "rendered-sst2/**/*", _THREE),
    "KMNIST": TorchvisionSet("KMNIST", "KMNIST/raw/*", _BY_FLAG),
}


class TorchvisionPart(ImagePart):
    """One part of a torchvision data set; it is opened only when its labels or images are asked for."""

    def __init__(self, name: str, part: str, root: Path, download: bool) -> None:
        self.name = name
        self.part = part
        self.root = root
        self.download = download

    def stamp(self) -> str:
        files = self._files()
        if not files and self.download:
            _ = self.dataset  # downloads them
            files = self._files()
        return stamp_files(files)

    def _files(self) -> list[Path]:
        return [path for path in self.root.glob(TORCHVISION_SETS[self.name].files) if path.is_file()]

    @cached_property
    def dataset(self) -> Any:
        """The torchvision data set."""
        import torchvision.datasets  # slow to import

        recipe = TORCHVISION_SETS[self.name]
        make = getattr(torchvision.datasets, recipe.class_name)
        # FER2013 has no download switch
        download = {"download": True} if self.download else {}
        try:
            return make(str(self.root), **recipe.parts[self.part], **recipe.options, **download)
        except (RuntimeError, OSError, TypeError) as error:
            raise DataError(
                f"torchvision's {recipe.class_name} cannot be opened in root {self.root}: {error} "
                "(set root to where it is, or download: true)"
            ) from error

    def load_labels(self) -> np.ndarray:
        for attribute in ("targets", "labels", "_labels"):
            labels = getattr(self.dataset, attribute, None)
            if labels is not None:
                return np.asarray(labels)
        samples = getattr(self.dataset, "_samples", None)
        if samples is not None:
            return np.array([label for _, label in samples])
        return np.array([self.dataset[row][1] for row in range(len(self.dataset))])

    def read(self, rows: np.ndarray) -> Iterator[Callable[[], Payload]]:
        for row in rows.tolist():
            yield partial(self._image, row)

    def _image(self, row: int) -> Payload:
        return self.dataset[row][0]

    def where(self, row: int) -> str:
        return f"torchvision's {TORCHVISION_SETS[self.name].class_name} in {self.root}, part {self.part!r}"


def torchvision_source(name: str, root: str, download: bool) -> Source:
    """The parts that torchvision has of one of the papers' data sets; its class order is that of the facts."""
    place = Path(root).expanduser()
    parts = {part: TorchvisionPart(name, part, place, download) for part in TORCHVISION_SETS[name].parts}
    return Source(parts, None)

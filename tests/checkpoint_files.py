"""Checkpoints in the published layouts, and pickles that mean harm, for the tests of `merge_ray.checkpoints`."""

from __future__ import annotations

import importlib
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

LEGACY_START = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})

MODELING = '''
"""Classes as the authors of the task-arithmetic line of work pickled them."""
import argparse
import enum
import functools
import logging
import pathlib
import torch

class Interpolation(enum.Enum):
    BICUBIC = "bicubic"

def convert_to_rgb(image):
    return image

class Compose:
    def __init__(self, steps):
        self.steps = steps

class Settings(dict):
    pass

class ImageEncoder(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.train_preprocess = Compose([convert_to_rgb, functools.partial(torch.flatten, start_dim=1)])
        self.interpolation = Interpolation.BICUBIC
        self.arguments = argparse.Namespace(lr=1e-5, save=pathlib.PurePosixPath("checkpoints"), size=torch.Size([2, 3]))
        self.settings = Settings(alpha=0.3, dtype=torch.float16)
        self.logger = logging.getLogger("modeling")
        self.activation = torch.nn.functional.gelu

class ClassificationHead(torch.nn.Linear):
    def __init__(self, normalize, weights):
        classes, width = weights.shape
        super().__init__(width, classes)
        self.normalize = normalize
        self.weight = torch.nn.Parameter(weights.clone())

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(4, 2)
        self.norm = torch.nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1), persistent=False)
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_parameter("absent", None)
        self.tied = self.attn
'''


@contextmanager
def modeling(folder: Path) -> Iterator[ModuleType]:
    """Give a module `src.modeling` that can be imported inside this block; importing it afterwards raises."""
    package = folder / "src"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "modeling.py").write_text(MODELING)
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module("src.modeling")
    finally:
        sys.path.remove(str(folder))
        for name in ("src", "src.modeling"):
            sys.modules.pop(name, None)


def rewrite_zip(path: Path, changes: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Write the archive anew, with some entries (named without the archive's own folder) replaced or added."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    folder = next(iter(entries)).partition("/")[0]
    entries |= {f"{folder}/{name}": content for name, content in changes.items()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def write_pickle(path: Path, content: bytes, container: str) -> None:
    """Put a ready pickle into one of the containers: bare, zip or legacy."""
    if container == "bare":
        path.write_bytes(content)
    elif container == "zip":
        torch.save({"weight": torch.zeros(2)}, path)
        rewrite_zip(path, {"data.pkl": content})
    else:
        start = b"".join(pickle.dumps(part, 2) for part in LEGACY_START)
        path.write_bytes(start + content + pickle.dumps([], 2))


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __call__(self, *arguments: object) -> None:
        """Pickle takes only what can be called as the function of another call."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def swap_bytes(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Save as a machine of the other byte order would."""
    torch.save(dict(state), path)
    with zipfile.ZipFile(path) as archive:
        stored = {name.partition("/")[2]: archive.read(name) for name in archive.namelist() if "/data/" in name}
    widths = [t.element_size() // (2 if t.is_complex() else 1) for t in state.values()]
    changes = {}
    for (name, content), width in zip(sorted(stored.items()), widths, strict=True):
        chunks = [content[start : start + width][::-1] for start in range(0, len(content), width)]
        changes[name] = b"".join(chunks)
    other = b"big" if sys.byteorder == "little" else b"little"
    rewrite_zip(path, {**changes, "byteorder": other})

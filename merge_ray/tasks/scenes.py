"""The cache of prepared scenes: one directory per layer of a split, memory-mapped and shared by the tasks that need it.

A directory holds ``layer.npy`` ``[N, ...]``, ``hashes.npy`` (uint8 [N, 16], of what the files hold) and ``meta.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from merge_ray.caches import write_once
from merge_ray.errors import DataError
from merge_ray.tasks.cache import MOST_THREADS, PreparedSplit, Progress
from merge_ray.tasks.decode import PIXEL_HASH_BYTES
from merge_ray.tasks.scene_sources import ScenePart
from merge_ray.tasks.task import Task
from merge_ray.tasks.taskonomy_labels import IMAGE, LAYERS, Batch, layers_of, make_batch


@dataclass(frozen=True)
class SceneSplit(PreparedSplit):
    """One split of a Taskonomy task. Pickled as its directories and opened again by whoever unpickles it.

    labels: int64 [N], the building of each scene, a number of ``classes``. task: whose labels these are. layers:
    read-only memory maps ``[N, ...]`` by name, as :data:`merge_ray.tasks.taskonomy_labels.LAYERS` says, images uint8
    ``[N, 3, S, S]`` among them. class_weights: of segment_semantic.
    """

    task: str
    layers: Mapping[str, np.memmap]
    class_weights: tuple[float, ...] | None

    @classmethod
    def open(
        cls,
        task: str,
        directories: Mapping[str, Path],
        labels: np.ndarray,
        classes: Sequence[str],
        class_weights: tuple[float, ...] | None,
    ) -> SceneSplit:
        """Map finished cache directories, one a layer."""
        layers = {name: np.load(path / "layer.npy", mmap_mode="r") for name, path in directories.items()}
        parts = [json.loads((path / "meta.json").read_text())["fingerprint"] for path in directories.values()]
        fingerprint = hashlib.sha256(json.dumps([task, class_weights, labels.tolist(), parts]).encode()).hexdigest()
        first = directories[IMAGE]
        hashes = np.load(first / "hashes.npy")
        return cls(first, labels, hashes, fingerprint, tuple(classes), task, layers, class_weights)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        directories = {name: Path(str(layer.filename)).parent for name, layer in self.layers.items()}
        return SceneSplit.open, (self.task, directories, self.labels, self.classes, self.class_weights)

    def images(self, rows: np.ndarray, task: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """What a network of ``task`` is shown of the samples ``rows``; no labels are needed."""
        shown = to_floats(torch.from_numpy(self.layers[IMAGE][rows]).to(device))
        return make_batch(task if task == "denoising" else "autoencoding", {IMAGE: shown}).images

    def batch(self, rows: np.ndarray, device: torch.device | str = "cpu") -> Batch:
        """The samples ``rows`` on ``device``."""
        layers = {name: torch.from_numpy(layer[rows]).to(device) for name, layer in self.layers.items()}
        layers[IMAGE] = to_floats(layers[IMAGE])
        return make_batch(self.task, layers, self.class_weights)


def to_floats(images: torch.Tensor) -> torch.Tensor:
    """Images uint8 as a network takes them, float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def prepare_scenes(
    task: Task, split: str, size: int, cache_dir: Path, progress: Progress | None = None, labels: bool = True
) -> SceneSplit:
    """A split's scenes at ``size`` x ``size``, made now or by an earlier call with the same data.

    labels: without them only the images are needed, as for resetting batch norm. Raises :class:`DataError` for a task
    without scenes or without known labels, a building without data, and label images of the wrong kind.
    """
    part_name = task.part_of(split)
    part = task.source.parts[part_name]
    if not isinstance(part, ScenePart):
        raise DataError(f"task {task.name!r} has no scenes; this family of models takes 'taskonomy' data")
    kind = task.spec.label or task.name
    needed, rows = layers_of(kind) if labels else (IMAGE,), task.rows(split, part_name)
    directories = {name: _ensure_layer(part, name, rows, size, cache_dir.expanduser(), progress) for name in needed}
    weights = None if task.spec.class_weights is None else tuple(task.spec.class_weights)
    return SceneSplit.open(kind, directories, part.labels[rows], task.classes, weights)


def _ensure_layer(
    part: ScenePart, name: str, rows: np.ndarray, size: int, cache_dir: Path, progress: Progress | None
) -> Path:
    layer = LAYERS[name]
    decisive = [part.stamp_of(layer.folder), name, rows.tolist(), size]
    key = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]
    directory = cache_dir / f"scenes-{name}-{size}-{key}"
    if directory.exists():
        return directory
    loads = part.raw(layer.folder, rows)

    def prepare(index: int) -> tuple[np.ndarray, bytes]:
        try:
            raw = loads[index]()
            kept = layer.prepare(raw, (size, size))
        except DataError as error:
            raise DataError(f"{part.where(int(rows[index]))}: {error}") from error
        kept = np.rint((kept + 1) * 127.5) if name == IMAGE else kept
        content = f"{raw.shape}{raw.dtype}".encode() + raw.tobytes()
        return kept.astype(layer.dtype), hashlib.blake2b(content, digest_size=PIXEL_HASH_BYTES).digest()

    def write(aside: Path) -> None:
        kept = np.lib.format.open_memmap(aside / "layer.npy", "w+", layer.dtype, (len(rows), *first.shape))
        hashes = np.empty((len(rows), PIXEL_HASH_BYTES), np.uint8)
        with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS)) as pool:
            for index, (array, digest) in enumerate(pool.map(prepare, range(len(rows)))):
                kept[index], hashes[index] = array, np.frombuffer(digest, np.uint8)
                if progress is not None:
                    progress(index + 1, len(rows), f"preparing {name}")
        kept.flush()
        np.save(aside / "hashes.npy", hashes)
        meta = {"layer": name, "size": size, "fingerprint": hashlib.sha256(hashes.tobytes()).hexdigest()}
        (aside / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")

    first, _ = prepare(0)
    write_once(directory, f"the cache of {name}", first.nbytes * len(rows), write)
    return directory

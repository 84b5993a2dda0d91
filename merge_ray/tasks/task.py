"""A task: a data set of images or texts with its splits, class names and prompt templates."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from merge_ray.errors import DataError, choose_from
from merge_ray.tasks.builtin import BUILTIN_TASKS
from merge_ray.tasks.cache import CachedSplit, DecodeJob, Progress, ensure_cached
from merge_ray.tasks.decode import INTERPOLATIONS
from merge_ray.tasks.facts import DEFAULT_TEMPLATES, Facts, find_facts, words_for
from merge_ray.tasks.parquet import parquet_source
from merge_ray.tasks.parquet_files import find_parts
from merge_ray.tasks.scene_sources import ScenePart, scene_source
from merge_ray.tasks.source import ImagePart, Source, TextPart, builtin_source, folder_source
from merge_ray.tasks.spec import TaskSpec
from merge_ray.tasks.splits import available_splits, part_of, select_rows
from merge_ray.tasks.text_sources import text_source
from merge_ray.tasks.torchvision_sets import torchvision_source


class Task:
    """An opened task. Nothing is decoded before :meth:`cached` is called, and no text tokenized."""

    def __init__(self, spec: TaskSpec, source: Source, classes: Sequence[str], templates: Sequence[str]) -> None:
        self.spec = spec
        self.source = source
        self.classes = list(classes)
        self.templates = list(templates)
        self.splits = available_splits(source.parts)

    @property
    def name(self) -> str:
        """The name that the spec gives."""
        return self.spec.name

    def cached(
        self, split: str, size: int, interpolation: str, cache_dir: Path | str, progress: Progress | None = None
    ) -> CachedSplit:
        """A split's images at ``size`` x ``size``, decoded now or by an earlier call with the same data.

        Args:
            split: ``train``, ``val`` or ``test``.
            size: The side of the model's input, in pixels.
            interpolation: ``bicubic`` or ``bilinear``.
            cache_dir: Where caches are kept; made if need be.
            progress: Called as ``progress(done, total, text)`` while images are decoded.

        Raises:
            DataError: There is no such split, or it is empty; a label is out of range; an image cannot be read; the
                cache cannot be written.
        """
        part_name = self.part_of(split)
        if interpolation not in INTERPOLATIONS:
            raise DataError(f"unknown interpolation {interpolation!r}: {choose_from(interpolation, INTERPOLATIONS)}")
        part = self.source.parts[part_name]
        if not isinstance(part, ImagePart):
            held = "scenes" if isinstance(part, ScenePart) else "texts"
            raise DataError(f"task {self.name!r} holds {held}; this family of models takes images")
        # Everything that decides which images are in the cache and how they look; cheap to find out.
        decisive = {
            "spec": self.spec.model_dump(exclude={"classes", "templates", "download", "prompt", "answer"}),
            "classes": len(self.classes),
            "parts": sorted(self.source.parts),
            "stamp": part.stamp(),
            "split": split,
            "size": size,
            "interpolation": interpolation,
        }
        key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
        label = re.sub(r"[^A-Za-z0-9_-]+", "-", self.name)
        directory = Path(cache_dir).expanduser() / f"{label}-{split}-{size}-{interpolation}-{key}"

        def find_job() -> DecodeJob:
            return DecodeJob(self.name, split, part, self.rows(split, part_name), size, interpolation)

        ensure_cached(directory, find_job, progress)
        return CachedSplit.open(directory, self.classes)

    def part_of(self, split: str) -> str:
        """The part of the source that a split is taken from; raises DataError where there is none."""
        try:
            return part_of(split, self.source.parts)
        except KeyError:
            lack = " and no train split to cut it from" if split == "val" else ""
            raise DataError(
                f"task {self.name!r} has no {split} split{lack}: {choose_from(split, self.splits)}"
            ) from None

    def rows(self, split: str, part_name: str) -> np.ndarray:
        """The rows of ``split`` within its part, ascending; raises DataError for none, and for labels out of range."""
        part = self.source.parts[part_name]
        labels = part.labels
        if not len(labels):
            raise DataError(f"task {self.name!r}: the split {split!r} is empty")
        if labels.dtype.kind == "f":
            return select_rows(self.spec, split, self.source.parts, len(labels))
        wrong = np.flatnonzero((labels < 0) | (labels >= len(self.classes)))
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"task {self.name!r}, part {part_name!r}, row {row}: label {labels[row]} is out of range: there are "
                f"{len(self.classes)} classes, so 0 to {len(self.classes) - 1} ({part.where(row)}; {len(wrong)} such "
                "rows in all)"
            )
        return select_rows(self.spec, split, self.source.parts, len(labels))


def open_task(spec: TaskSpec) -> Task:
    """Find a task's data and its class names; no image is read.

    The words for the prompts are the spec's, or else those known for the papers' twenty sets (by the task's name), or
    else the data set's own names of its classes. Raises DataError where the data are not there or nothing names the
    classes.
    """
    source = _find_source(spec)
    facts = find_facts(spec.torchvision or spec.name)
    return Task(spec, source, _choose_classes(spec, source, facts), _choose_templates(spec, facts))


def _find_source(spec: TaskSpec) -> Source:
    if spec.builtin is not None:
        return builtin_source(spec.builtin)
    if spec.torchvision is not None:
        return torchvision_source(spec.torchvision, spec.root, spec.download)
    if spec.parquet is not None:
        paths = find_parts(spec.parquet)
        return text_source(spec, paths) or parquet_source(paths, spec.image_column, spec.label_column)
    if spec.taskonomy is not None:
        return scene_source(spec.taskonomy, spec.buildings)
    assert spec.image_folder is not None  # TaskSpec has exactly one source
    return folder_source(spec.image_folder)


def _choose_classes(spec: TaskSpec, source: Source, facts: Facts | None) -> list[str]:
    own = source.class_names
    if spec.classes is not None:
        if own is not None and len(own) != len(spec.classes):
            raise DataError(
                f"task {spec.name!r}: {len(spec.classes)} classes are given, but the data have {len(own)}: "
                f"{', '.join(own[:10])}{', ...' if len(own) > 10 else ''}"
            )
        return spec.classes
    if own is not None and (
        spec.builtin is not None or isinstance(next(iter(source.parts.values())), (TextPart, ScenePart))
    ):
        return list(own)
    if own is not None:
        return words_for(own, facts)
    if facts is not None:
        return list(facts.classes)
    raise DataError(f"task {spec.name!r}: the data do not name their classes: give 'classes', in the labels' order")


def _choose_templates(spec: TaskSpec, facts: Facts | None) -> Sequence[str]:
    if spec.templates is not None:
        return spec.templates
    if spec.builtin is not None:
        return BUILTIN_TASKS[spec.builtin].templates if spec.builtin in BUILTIN_TASKS else ()
    return facts.templates if facts is not None else DEFAULT_TEMPLATES

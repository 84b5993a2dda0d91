"""The cache of tokenized texts: one directory per task, split and tokenizer, memory-mapped by its readers.

A directory holds ``tokens.npy`` (int32, all samples one after the other), ``offsets.npy`` (int64 [N + 1], where each
begins), ``labels.npy`` ([N]), ``hashes.npy`` (uint8 [N, 16], of each text) and ``meta.json``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from merge_ray.caches import write_once
from merge_ray.errors import DataError
from merge_ray.tasks.cache import PreparedSplit, Progress
from merge_ray.tasks.source import TextPart
from merge_ray.tasks.task import Task

BATCH = 1024
HASH_BYTES = 16
Encode = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class TextSplit(PreparedSplit):
    """One split, tokenized. Pickled as its directory and opened again by whoever unpickles it.

    labels: int64 [N], numbers of ``classes``; or float64 [N], the numbers themselves, which ``classes`` say in words.
    tokens: a read-only memory map, int32, of all samples. offsets: int64 [N + 1]. answer: ``score`` or ``generate``.
    The ``fingerprint`` covers texts, labels, classes, the tokenizer and how answers are taken.
    """

    tokens: np.memmap
    offsets: np.ndarray
    answer: str

    @classmethod
    def open(cls, directory: Path) -> TextSplit:
        """Map a finished cache directory."""
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        labels, hashes, offsets = (np.load(directory / f"{name}.npy") for name in ("labels", "hashes", "offsets"))
        tokens = np.load(directory / "tokens.npy", mmap_mode="r")
        classes = tuple(meta["classes"])
        return cls(directory, labels, hashes, meta["fingerprint"], classes, tokens, offsets, meta["answer"])

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return TextSplit.open, (self.directory,)

    @property
    def numeric(self) -> bool:
        """Whether the labels are numbers to be told, not classes."""
        return self.labels.dtype.kind == "f"


def split_texts(task: Task, split: str) -> tuple[list[str], np.ndarray]:
    """What a split asks [N], and its labels [N].

    Raises :class:`DataError` for a task without texts, and as :meth:`Task.cached` does.
    """
    part_name = task.part_of(split)
    part = task.source.parts[part_name]
    if not isinstance(part, TextPart):
        raise DataError(f"task {task.name!r} holds images; this family of models takes texts")
    rows = task.rows(split, part_name)
    *others, last = task.classes
    return part.texts(rows, f"{', '.join(others)} or {last}" if others else last), part.labels[rows]


def prepare_text(
    task: Task, split: str, tokenizer: str, encode: Encode, cache_dir: Path, progress: Progress | None = None
) -> TextSplit:
    """A split's token ids, made now or by an earlier call with the same data and tokenizer.

    tokenizer: a hash of all that decides what ``encode`` gives. Raises :class:`DataError` as :func:`split_texts` does.
    """
    decisive = {
        "spec": task.spec.model_dump(exclude={"templates", "download"}),
        "classes": task.classes,
        "parts": sorted(task.source.parts),
        "stamp": task.source.parts[task.part_of(split)].stamp(),
        "split": split,
        "tokenizer": tokenizer,
    }
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
    directory = cache_dir.expanduser() / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', task.name)}-{split}-text-{key}"
    if not directory.exists():
        texts, labels = split_texts(task, split)
        meta = {"task": task.name, "split": split, "classes": task.classes, "answer": task.spec.answer}

        def write(aside: Path) -> None:
            _write(aside, meta, texts, labels, tokenizer, encode, progress)

        needed = sum(map(len, texts)) * 4  # a token is at least a character
        write_once(directory, f"the token cache of task {task.name!r}, split {split!r},", needed, write)
    return TextSplit.open(directory)


def _write(
    directory: Path,
    meta: Mapping[str, object],
    texts: Sequence[str],
    labels: np.ndarray,
    tokenizer: str,
    encode: Encode,
    progress: Progress | None,
) -> None:
    digest = hashlib.sha256(json.dumps([meta, tokenizer], sort_keys=True).encode())
    digest.update(labels.astype("<f8").tobytes())
    hashes = np.empty((len(texts), HASH_BYTES), np.uint8)
    samples: list[np.ndarray] = []
    for start in range(0, len(texts), BATCH):
        batch = list(texts[start : start + BATCH])
        samples += [np.array(ids, np.int32) for ids in encode(batch)]
        for row, text in enumerate(batch, start):
            digest.update(hashlib.sha256(text.encode()).digest())
            hashes[row] = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).digest(), np.uint8)
        if progress is not None:
            progress(start + len(batch), len(texts), f"tokenizing {meta['task']} {meta['split']}")
    np.save(directory / "tokens.npy", np.concatenate(samples))
    np.save(directory / "offsets.npy", np.cumsum([0, *map(len, samples)], dtype=np.int64))
    np.save(directory / "labels.npy", labels)
    np.save(directory / "hashes.npy", hashes)
    described = {**meta, "count": len(texts), "fingerprint": digest.hexdigest()}
    (directory / "meta.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

"""The jobs of a fine-tuning run: make or fetch the base, fine-tune one task, write the table of results.

Each job leaves a file in the spec's output whose metadata say what it was made from; a job whose file is
there is done, and one that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from merge_ray.checkpoints import fingerprint_file, read_metadata, read_weights, write_safetensors
from merge_ray.errors import CheckpointError, SpecError
from merge_ray.families import Family, ImageEncoder, find_family, find_image_family
from merge_ray.families.clip import IMAGE_TOWER, ClipFamily
from merge_ray.finetune.pretraining import Captioned, PairStream, contrastive_loss
from merge_ray.finetune.spec import FinetuneSpec, PretrainSpec
from merge_ray.finetune.trainer import ALONE, Trainer, Workers, batch_rows
from merge_ray.tasks import CachedSplit, open_task

Progress = Callable[[int, int], None]
BASE = "base.safetensors"
TRAINING = "training"
EVALUATION_BATCH = 256


@dataclass(frozen=True)
class TaskResult:
    """How fine-tuning on a task went: validation accuracy of the base and of the fine-tuned model."""

    task: str
    file: str
    steps: int
    samples: int
    before: float
    after: float
    seconds: float


def make_base(spec: FinetuneSpec, cache: Path, device: str = "cpu", progress: Progress | None = None) -> Path:
    """Put the base's weights (native names) into the output; returns the file.

    They are pre-trained or read from ``spec.base``. ``progress(done, total)`` counts pre-training steps.
    Raises :class:`CheckpointError` when the output holds a base that was made otherwise.
    """
    family = find_family(spec.family, spec.architecture)
    path = spec.output / BASE
    if spec.pretrain is None:
        identity = _identity(spec, base=fingerprint_file(str(spec.base)))
        if not _is_done(path, identity):
            state = family.rename(read_weights(str(spec.base)))
            _write(path, state, spec, {"identity": identity, "source": str(spec.base)})
        return path
    if not isinstance(family, ClipFamily):
        raise SpecError(f"pretrain: the family {family.name!r} has no contrastive training")
    tasks = [Captioned(_split(spec, name, "train", family, cache), *_words(spec, name)) for name in _names(spec)]
    identity = _identity(
        spec,
        recipe=spec.pretrain.model_dump(),
        data=[task.split.fingerprint for task in tasks],
        words=[[list(task.classes), list(task.templates)] for task in tasks],
        architecture=family.open_clip_config(),
    )
    if not _is_done(path, identity):
        state = _pretrain(spec, spec.pretrain, family, tasks, identity, device, progress)
        _write(path, state, spec, {"identity": identity, "source": "pretrained"})
        _checkpoint(spec, "base").unlink()
    return path


def _pretrain(
    spec: FinetuneSpec,
    recipe: PretrainSpec,
    family: ClipFamily,
    tasks: Sequence[Captioned],
    identity: str,
    device: str,
    progress: Progress | None,
) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = family.build().to(device)
    encoder = ImageEncoder(model.visual, family.preprocessing, device, IMAGE_TOWER)
    stream = PairStream(tasks, recipe, spec.seed)
    steps = recipe.count_steps(len(stream))
    trainer = Trainer(model, recipe, steps, _checkpoint(spec, "base"), identity, spec.checkpoint_every)
    for step in trainer.run(contrastive_loss(model, encoder, family.tokenize, stream)):
        if progress is not None:
            progress(step, steps)
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def finetune_task(
    spec: FinetuneSpec,
    name: str,
    cache: Path,
    device: str = "cpu",
    workers: Workers = ALONE,
    progress: Progress | None = None,
) -> TaskResult:
    """Fine-tune the image tower on the task ``name``, its zero-shot head frozen; writes ``<task>.safetensors``.

    The base must be there (:func:`make_base`). Only worker 0 writes. ``progress(done, total)`` counts steps.
    """
    family = find_image_family(spec.family, spec.architecture)
    train, validation = (_split(spec, name, split, family, cache) for split in ("train", "val"))
    classes, templates = _words(spec, name)
    base_path, path = spec.output / BASE, spec.output / f"{name}.safetensors"
    recipe = spec.recipe(name)
    identity = _identity(
        spec,
        recipe=recipe.model_dump(),
        base=fingerprint_file(base_path),
        data=[train.fingerprint, validation.fingerprint],
        words=[classes, templates],
    )
    if _is_done(path, identity):
        return read_result(spec, name)
    started = time.perf_counter()
    base = read_weights(base_path)
    head = family.head(base, classes, templates).to(device)
    encoder = family.image_encoder(base, device)
    before = accuracy(encoder, validation, head)
    steps = recipe.count_steps(len(train.labels))
    checkpoint = _checkpoint(spec, name)
    trainer = Trainer(encoder, recipe, steps, checkpoint, identity, spec.checkpoint_every, workers)

    def loss(step: int) -> Tensor:
        rows = workers.share(batch_rows(len(train.labels), recipe.batch_size, step, spec.seed))
        logits = encoder(torch.from_numpy(train.images[rows])) @ head.T
        labels = torch.from_numpy(train.labels[rows]).to(logits.device)
        total = functional.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing, reduction="sum")
        return total / recipe.batch_size

    for step in trainer.run(loss):
        if progress is not None:
            progress(step, steps)
    after = accuracy(encoder, validation, head)
    result = TaskResult(
        name, path.name, steps, len(train.labels), before, after, round(time.perf_counter() - started, 2)
    )
    if workers.rank == 0:
        _write(path, encoder.native_state(), spec, {"identity": identity, "result": json.dumps(asdict(result))})
        checkpoint.unlink()
    return result


@torch.inference_mode()
def accuracy(encoder: ImageEncoder, split: CachedSplit, head: Tensor) -> float:
    """The share of a split's images whose largest logit is that of their label."""
    hits = 0
    for start in range(0, len(split.labels), EVALUATION_BATCH):
        rows = slice(start, start + EVALUATION_BATCH)
        logits = encoder(torch.from_numpy(np.array(split.images[rows]))) @ head.T
        hits += int((logits.argmax(dim=1).cpu() == torch.from_numpy(split.labels[rows])).sum())
    return hits / len(split.labels)


def write_results(spec: FinetuneSpec, results: Sequence[TaskResult]) -> Path:
    """Write ``finetune.json``, the table of results, into the output and clear what training left; returns the file."""
    path = spec.output / "finetune.json"
    training = spec.output / TRAINING
    if training.is_dir():
        shutil.rmtree(training)
    content = {"name": spec.name, "base": BASE, "tasks": [asdict(result) for result in results]}
    aside = path.with_suffix(".json.part")
    aside.write_text(json.dumps(content, indent=2) + "\n")
    aside.replace(path)
    return path


def read_result(spec: FinetuneSpec, name: str) -> TaskResult:
    """What :func:`finetune_task` reported for a task that is done; raises :class:`CheckpointError` if it is not."""
    return TaskResult(**json.loads(read_metadata(spec.output / f"{name}.safetensors")["result"]))


def prepare_data(spec: FinetuneSpec, cache: Path, progress: Progress | None = None) -> None:
    """Decode every task's training and validation images into the cache; ``progress(done, total)`` counts splits.

    Raises :class:`merge_ray.errors.DataError` for data that cannot be used.
    """
    family = find_family(spec.family, spec.architecture)
    splits = [(task.name, split) for task in spec.tasks for split in ("train", "val")]
    for done, (name, split) in enumerate(splits, start=1):
        _split(spec, name, split, family, cache)
        if progress is not None:
            progress(done, len(splits))


def _names(spec: FinetuneSpec) -> list[str]:
    return [task.name for task in spec.tasks]


def _split(spec: FinetuneSpec, name: str, split: str, family: Family, cache: Path) -> Any:
    return family.open_split(open_task(spec.task(name)), split, cache)


def _words(spec: FinetuneSpec, name: str) -> tuple[list[str], list[str]]:
    task = open_task(spec.task(name))
    return list(task.classes), list(task.templates)


def _checkpoint(spec: FinetuneSpec, name: str) -> Path:
    return spec.output / TRAINING / f"{name}.safetensors"


def _identity(spec: FinetuneSpec, **parts: Any) -> str:
    """A hash of what a job's result is determined by."""
    everything = {"family": spec.family, "seed": spec.seed, "dtype": spec.dtype, **parts}
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def _is_done(path: Path, identity: str) -> bool:
    if not path.exists():
        return False
    if read_metadata(path).get("identity") != identity:
        raise CheckpointError(
            f"{path} was made with other settings, data or base; remove it to make it anew, or choose another output"
        )
    return True


def _write(path: Path, state: Mapping[str, Tensor], spec: FinetuneSpec, metadata: Mapping[str, str]) -> None:
    dtype = getattr(torch, spec.dtype)
    saved = {name: tensor.to(dtype=dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, saved, {"name": spec.name, "architecture": spec.architecture, **metadata})

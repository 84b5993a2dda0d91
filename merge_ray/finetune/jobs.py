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

import torch
from torch import Tensor

from merge_ray.checkpoints import fingerprint_file, read_metadata, read_weights, write_safetensors
from merge_ray.errors import CheckpointError, SpecError
from merge_ray.families import Family, ImageEncoder, ImageFamily, find_family
from merge_ray.families.clip import IMAGE_TOWER, ClipFamily
from merge_ray.families.flan_t5 import FlanT5Family
from merge_ray.families.taskonomy import TaskonomyFamily
from merge_ray.finetune.images import ImagePupil
from merge_ray.finetune.pretraining import Captioned, PairStream, contrastive_loss
from merge_ray.finetune.pupil import Pupil, as_saved
from merge_ray.finetune.scenes import ScenePupil
from merge_ray.finetune.spec import FinetuneSpec, PretrainSpec
from merge_ray.finetune.texts import LoraPupil, TextPupil, make_tokenizer, noisy_loss
from merge_ray.finetune.trainer import ALONE, Trainer, Workers, batch_rows
from merge_ray.tasks import open_task, split_texts

Progress = Callable[[int, int], None]
BASE = "base.safetensors"
ADAPTER = "adapter_model.safetensors"
TRAINING = "training"


@dataclass(frozen=True)
class TaskResult:
    """How fine-tuning on a task went: the validation metric before (of the base) and after."""

    task: str
    file: str
    steps: int
    samples: int
    before: float
    after: float
    seconds: float
    metric: str = "accuracy"


def make_base(spec: FinetuneSpec, cache: Path, device: str = "cpu", progress: Progress | None = None) -> Path:
    """Put the base's weights (native names) into the output; returns the file.

    They are pre-trained or read from ``spec.base``. ``progress(done, total)`` counts pre-training steps.
    Raises :class:`CheckpointError` when the output holds a base that was made otherwise.
    """
    family = open_family(spec)
    path = spec.output / BASE
    if spec.pretrain is None:
        identity = _identity(spec, base=fingerprint_file(str(spec.base)))
        if not _is_done(path, identity):
            state = family.rename(read_weights(str(spec.base)))
            _write(path, state, spec, {"identity": identity, "source": str(spec.base)})
        return path
    if isinstance(family, FlanT5Family):
        return _make_text_base(spec, spec.pretrain, family, cache, device, progress)
    if not isinstance(family, ClipFamily):
        raise SpecError(f"pretrain: the family {family.name!r} has no training from nothing")
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


def _make_text_base(
    spec: FinetuneSpec,
    recipe: PretrainSpec,
    family: FlanT5Family,
    cache: Path,
    device: str,
    progress: Progress | None,
) -> Path:
    path = spec.output / BASE
    tasks = [_split(spec, name, "train", family, cache) for name in _names(spec)]
    identity = _identity(
        spec,
        recipe=recipe.model_dump(),
        data=[task.fingerprint for task in tasks],
        architecture=[family.config, family.tokenizer_key],
    )
    if _is_done(path, identity):
        return path
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = family.build().to(device)
    steps = recipe.count_steps(sum(map(len, tasks)))
    trainer = Trainer(model, recipe, steps, _checkpoint(spec, "base"), identity, spec.checkpoint_every)
    for step in trainer.run(noisy_loss(model, family.tokenizer, tasks, recipe, spec.seed)):
        if progress is not None:
            progress(step, steps)
    _write(path, family.native_names(model), spec, {"identity": identity, "source": "pretrained"})
    _checkpoint(spec, "base").unlink()
    return path


def finetune_task(
    spec: FinetuneSpec,
    name: str,
    cache: Path,
    device: str = "cpu",
    workers: Workers = ALONE,
    progress: Progress | None = None,
) -> TaskResult:
    """Fine-tune the image tower (its zero-shot head frozen), the text model or a Taskonomy network on ``name``.

    Writes ``<task>.safetensors``, or peft's directory ``<task>/`` of a LoRA. The base must be there
    (:func:`make_base`), where the family has one. Only worker 0 writes. ``progress(done, total)`` counts steps.
    """
    family = open_family(spec)
    train, validation = (_split(spec, name, split, family, cache) for split in ("train", "val"))
    classes, templates = _words(spec, name)
    base_path, path = spec.output / BASE, _result_path(spec, name)
    recipe = spec.recipe(name)
    identity = _identity(
        spec,
        recipe=recipe.model_dump(),
        base=fingerprint_file(base_path) if family.has_base else None,
        data=[train.fingerprint, validation.fingerprint],
        words=[classes, templates],
        **({"lora": spec.lora.model_dump()} if spec.lora else {}),
    )
    if _is_done(path, identity):
        return read_result(spec, name)
    started = time.perf_counter()
    pupil = _make_pupil(spec, family, name, (train, validation), device)
    before = pupil.score()
    steps = recipe.count_steps(len(train.labels))
    checkpoint = _checkpoint(spec, name)
    trainer = Trainer(pupil.module, recipe, steps, checkpoint, identity, spec.checkpoint_every, workers)

    def loss(step: int) -> Tensor:
        rows = workers.share(batch_rows(len(train.labels), recipe.batch_size, step, spec.seed))
        return pupil.loss(rows, step) / recipe.batch_size

    for step in trainer.run(loss):
        if progress is not None:
            progress(step, steps)
    after = pupil.score()
    file, seconds = str(path.relative_to(spec.output)), round(time.perf_counter() - started, 2)
    result = TaskResult(name, file, steps, len(train.labels), before, after, seconds, pupil.metric)
    if workers.rank == 0:
        metadata = _metadata(spec, {"identity": identity, "result": json.dumps(asdict(result))})
        pupil.write(path, getattr(torch, spec.dtype), metadata)
        checkpoint.unlink()
    return result


def _make_pupil(spec: FinetuneSpec, family: Family, name: str, splits: tuple[Any, Any], device: str) -> Pupil:
    if isinstance(family, TaskonomyFamily):
        return ScenePupil(family, *splits, spec.seed, device)
    base, smoothing = read_weights(spec.output / BASE), spec.recipe(name).label_smoothing
    if isinstance(family, ImageFamily):
        return ImagePupil(family, base, open_task(spec.task(name)), *splits, smoothing, device)
    assert isinstance(family, FlanT5Family)
    if spec.lora is not None:
        return LoraPupil(spec.lora, spec.output / BASE, family, base, *splits, smoothing, spec.seed, device)
    return TextPupil(family, base, *splits, smoothing, spec.seed, device)


def open_family(spec: FinetuneSpec) -> Family:
    """The family that is trained; its architecture is in the output once a tokenizer was made there."""
    made = (spec.output / "tokenizer.json").exists()
    return find_family(spec.family, str(spec.output) if made else spec.architecture)


def write_results(spec: FinetuneSpec, results: Sequence[TaskResult]) -> Path:
    """Write ``finetune.json``, the table of results, into the output and clear what training left; returns the file."""
    path = spec.output / "finetune.json"
    training = spec.output / TRAINING
    if training.is_dir():
        shutil.rmtree(training)
    base = BASE if open_family(spec).has_base else None
    content = {"name": spec.name, "base": base, "tasks": [asdict(result) for result in results]}
    aside = path.with_suffix(".json.part")
    aside.write_text(json.dumps(content, indent=2) + "\n")
    aside.replace(path)
    return path


def read_result(spec: FinetuneSpec, name: str) -> TaskResult:
    """What :func:`finetune_task` reported for a task that is done; raises :class:`CheckpointError` if it is not."""
    return TaskResult(**json.loads(read_metadata(_result_path(spec, name))["result"]))


def prepare_data(spec: FinetuneSpec, cache: Path, progress: Progress | None = None) -> None:
    """Prepare every task's training and validation split in the cache; ``progress(done, total)`` counts splits.

    A text model that is to be made from nothing gets its tokenizer before.

    Raises :class:`merge_ray.errors.DataError` for data that cannot be used.
    """
    _ensure_tokenizer(spec)
    family = open_family(spec)
    splits = [(task.name, split) for task in spec.tasks for split in ("train", "val")]
    for done, (name, split) in enumerate(splits, start=1):
        _split(spec, name, split, family, cache)
        if progress is not None:
            progress(done, len(splits))


def _ensure_tokenizer(spec: FinetuneSpec) -> None:
    family = open_family(spec)
    if spec.pretrain is None or not isinstance(family, FlanT5Family) or family.has_tokenizer:
        return
    texts: list[str] = []
    for task in map(open_task, spec.tasks):
        asked, labels = split_texts(task, "train")
        answers = [] if labels.dtype.kind == "f" else [task.classes[label] for label in labels]
        texts += [*asked, *task.classes, *answers]
    spec.output.mkdir(parents=True, exist_ok=True)
    (spec.output / "config.json").write_text(json.dumps(family.config, indent=2) + "\n")
    make_tokenizer(texts, family.config["vocab_size"], spec.output)


def _result_path(spec: FinetuneSpec, name: str) -> Path:
    return spec.output / (f"{name}.safetensors" if spec.lora is None else f"{name}/{ADAPTER}")


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
    write_safetensors(path, as_saved(state, getattr(torch, spec.dtype)), _metadata(spec, metadata))


def _metadata(spec: FinetuneSpec, metadata: Mapping[str, str]) -> dict[str, str]:
    return {"name": spec.name, "architecture": spec.architecture, **metadata}

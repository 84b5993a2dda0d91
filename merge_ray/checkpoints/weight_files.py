"""Which of a directory's files hold its weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePath

from merge_ray.errors import CheckpointError

SAFETENSORS = ".safetensors"
PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
SHARD_INDEX = ".index.json"
SMALL_FILES = (".json", ".txt", ".model")  # configurations and vocabularies

# The first that is there counts, whatever else lies beside it.
USUAL_NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
# What trainers leave beside the weights.
NO_WEIGHTS = ("optimizer", "scheduler", "rng_state", "training_args", "trainer_state", "scaler")


def weight_files(names: Iterable[str]) -> list[str]:
    """The one file to read among a directory's file names; several where none is clearly meant, or none.

    A shard index stands for its shards.
    """
    names = sorted(names)
    for usual in USUAL_NAMES:
        if usual in names:
            return [usual]
    indexes = [name for name in names if name.endswith(SHARD_INDEX)]
    if len(indexes) == 1:
        return indexes
    weights = [
        name
        for name in names
        if PurePath(name).suffix in (SAFETENSORS, *PICKLED) and not name.startswith((*NO_WEIGHTS, "."))
    ]
    # The same weights often lie there in both formats.
    return [name for name in weights if name.endswith(SAFETENSORS)] or weights


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as a shard index states it; raises CheckpointError."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a shard index: a JSON object with 'weight_map' is expected") from error
    if outside := sorted({file for file in files.values() if Path(file).name != file}):
        raise CheckpointError(f"{index}: names shards outside its own folder: {', '.join(outside)}")
    return files

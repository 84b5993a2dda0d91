"""A world small enough for tests: a CLIP of a few thousand weights, models fine-tuned by noise, and tiny images."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from merge_ray.families import find_family

TASKS = ("ants", "bees", "cats")
COLOURS = ("red", "green", "blue")
VOCABULARY = ["a", "photo", "of", *COLOURS]
CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": len(VOCABULARY) + 3, "width": 16, "heads": 2, "layers": 1},
    "merge_ray": {"vocabulary": VOCABULARY},
}


def write_models(folder: Path, tasks: Sequence[str] = TASKS, seed: int = 0) -> None:
    """``config.json``, ``base.safetensors`` and one ``<task>.safetensors`` (image tower only) in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(seed)
    family = find_family("clip", str(folder / "config.json"))
    base = {name: tensor.clone().contiguous() for name, tensor in family.build().state_dict().items()}  # type: ignore[attr-defined]
    save_file(base, folder / "base.safetensors")
    for task in tasks:
        tower = family.tower(base)
        tuned = {name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in tower.items()}
        save_file(tuned, folder / f"{task}.safetensors")


def write_images(folder: Path, count: int = 48, seed: int = 0) -> None:
    """``train``, ``val`` and ``test.parquet`` of noisy single-coloured images in the Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(COLOURS)}}
    for split in ("train", "val", "test"):
        labels = np.arange(count) % len(COLOURS)
        rows = []
        for row, label in enumerate(labels):
            pixels = generator.integers(0, 120, (16, 16, 3))
            pixels[:, :, label] += 100
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="PNG")
            rows.append({"bytes": buffer.getvalue(), "path": f"{split}-{row}.png"})
        table = pa.table({"image": rows, "label": pa.array(labels, pa.int64())})
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(table.replace_schema_metadata(metadata), folder / f"{split}.parquet")


def write_world(folder: Path, **changes: Any) -> Path:
    """Models, images and a sweep spec with ``changes`` in ``folder``; returns the spec's path."""
    write_models(folder / "models")
    for seed, task in enumerate(TASKS):
        write_images(folder / "data" / task, seed=seed)
    return write_spec(folder, **changes)


def write_spec(folder: Path, **changes: Any) -> Path:
    """A sweep spec over the world in ``folder``, with top-level ``changes``; returns its path."""
    spec = {
        "name": "tiny",
        "results": str(folder / "results"),
        "models": {
            "architecture": str(folder / "models" / "config.json"),
            "base": str(folder / "models" / "base.safetensors"),
            "finetuned": str(folder / "models" / "{task}.safetensors"),
        },
        "tasks": list(TASKS),
        "task_defaults": {"parquet": str(folder / "data" / "{task}" / "{split}.parquet")},
        "evaluation": {"batch_size": 16, "shards": 2},
        # One host, for each takes ten seconds to start.
        "hosts": {"count": 1, "threads": 1},
        "studies": {
            "task_arithmetic": {"searcher": "grid", "space": {"scaling_coefficient": [0.1, 0.3, 0.5]}},
            "ties": {"searcher": "optuna", "trials": 4},
            "tall_mask": {"parameters": {"mask_lambdas": [0.2, 0.5], "multi_task_vector": "task_arithmetic"}},
        },
        **changes,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in spec.items() if value is not None}, sort_keys=False))
    return path

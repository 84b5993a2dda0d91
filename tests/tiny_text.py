"""A world of texts small enough for tests: a T5 of a few thousand weights with its own tokenizer, and tiny tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from merge_ray.checkpoints import write_safetensors
from merge_ray.families.flan_t5 import FlanT5Family

TASKS = ("ants", "bees", "cats")
CLASSES = ("red", "green", "deep blue")
WORDS = ["<pad>", "</s>", "<unk>", "red", "green", "deep", "blue", "a", "b", "c", "which", "of", "these", "is", "it",
         "or", "the", ":", "?", ",", "0.0", "1.0", "2.0"]  # fmt: skip
CONFIG = {
    "model_type": "t5", "vocab_size": len(WORDS), "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1,
    "num_decoder_layers": 1, "num_heads": 2, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
    "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "tie_word_embeddings": False, "pad_token_id": 0,
    "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip


def write_architecture(folder: Path, **changes: Any) -> FlanT5Family:
    """``config.json`` and a tokenizer of whole words in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(r"[:?,]", "isolated")]
    )
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    fast.save_pretrained(folder)
    return FlanT5Family(str(folder))


def make_state(family: FlanT5Family, seed: int = 0) -> dict[str, Tensor]:
    """Random weights, large enough that a misplaced tensor shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = family.native_names(family.build())
        return {name: torch.randn(tensor.shape) * 0.5 for name, tensor in state.items()}


def write_models(folder: Path, tasks: Sequence[str] = TASKS) -> FlanT5Family:
    """The architecture, ``base.safetensors`` and one ``<task>.safetensors`` in ``folder``."""
    family = write_architecture(folder)
    base = make_state(family)
    write_safetensors(folder / "base.safetensors", base)
    for seed, task in enumerate(tasks):
        torch.manual_seed(seed)
        tuned = {name: tensor + 0.2 * torch.randn_like(tensor) for name, tensor in base.items()}
        write_safetensors(folder / f"{task}.safetensors", tuned)
    return family


def write_parquet(path: Path, columns: dict[str, Any], names: Sequence[str] | None = None) -> None:
    """A Parquet file; with ``names``, its column ``label`` has a ClassLabel in the Hugging Face schema."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if names is not None:
        features = {"label": {"_type": "ClassLabel", "names": list(names)}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


def write_texts(folder: Path, count: int = 24, seed: int = 0) -> None:
    """``train``, ``val`` and ``test.parquet`` of short texts with one word that says the class."""
    generator = np.random.default_rng(seed)
    for split in ("train", "val", "test"):
        labels = np.arange(count) % len(CLASSES)
        fillers = [" ".join(generator.choice(list("abc"), int(generator.integers(2, 9)))) for _ in labels]
        texts = [f"{filler} {CLASSES[label]}" for filler, label in zip(fillers, labels, strict=True)]
        write_parquet(folder / f"{split}.parquet", {"text": texts, "label": labels}, CLASSES)


def write_world(folder: Path, **changes: Any) -> Path:
    """Models, texts and a sweep spec with ``changes`` in ``folder``; returns the spec's path."""
    write_models(folder / "models")
    for seed, task in enumerate(TASKS):
        write_texts(folder / "data" / task, seed=seed)
    spec = {
        "name": "tiny_text",
        "results": str(folder / "results"),
        "models": {
            "family": "flan_t5",
            "architecture": str(folder / "models"),
            "base": str(folder / "models" / "base.safetensors"),
            "finetuned": str(folder / "models" / "{task}.safetensors"),
        },
        "tasks": list(TASKS),
        "task_defaults": {"parquet": str(folder / "data" / "{task}" / "{split}.parquet")},
        "evaluation": {"batch_size": 16, "shards": 2},
        "hosts": {"count": 1, "threads": 1},
        "studies": {"task_arithmetic": {"searcher": "grid", "space": {"scaling_coefficient": [0.1, 0.3]}}},
        **changes,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    return path

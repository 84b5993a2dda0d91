"""LoRA adapters (arXiv:2106.09685) in the file format of peft, as full weights of the modules that they change."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from merge_ray.checkpoints.locations import open_location
from merge_ray.checkpoints.read import read_weights
from merge_ray.checkpoints.write import write_safetensors
from merge_ray.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight")
LISTED = 5


def is_adapter(location: str | Path) -> bool:
    """Whether a location is a directory that peft saved an adapter in."""
    path = open_location(location)
    return path.is_dir() and (path / CONFIG).is_file()


def read_finetuned(location: str | Path, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights at a location; of an adapter, those that it changes, merged into ``base``.

    An adapted matrix is ``W + s B A`` in the base's dtype, with ``s = alpha / r`` (``alpha / sqrt(r)`` for rsLoRA), and
    the adapter's modules must be among the base's names. Raises :class:`CheckpointError` for an adapter of another
    kind, for other modules or for a base of other shapes, naming them.
    """
    if not is_adapter(location):
        return read_weights(location)
    path = open_location(location)
    config = _read_config(path)
    factors = _factors(path)
    absent = sorted(module for module in factors if f"{module}.weight" not in base)
    if absent:
        raise CheckpointError(f"{path}: a LoRA for other modules; the base has no {_list(absent)}")
    merged, misfits = {}, []
    for module, (a, b) in factors.items():
        weight = base[f"{module}.weight"]
        rank = a.shape[0]
        scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if b.shape[1] != rank or (b.shape[0], a.shape[1]) != tuple(weight.shape):
            misfits.append(f"{module} ({b.shape[0]} x {a.shape[1]}, in the base {' x '.join(map(str, weight.shape))})")
            continue
        merged[f"{module}.weight"] = (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)
    if misfits:
        raise CheckpointError(f"{path}: a LoRA for another base; the shapes differ in {_list(misfits)}")
    return merged


def write_adapter(
    directory: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    alpha: float,
    base: str,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write an adapter as peft does and give the path of its weights.

    factors: A ``[r, in]`` and B ``[out, r]`` by module. base: what the config says that it was trained from.
    """
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": max(a.shape[0] for a, _ in factors.values()),
        "lora_alpha": alpha,
        "target_modules": sorted({module.rpartition(".")[2] for module in factors}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": "SEQ_2_SEQ_LM",
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {
        f"{PREFIX}{module}.lora_{name}.weight": factor
        for module, pair in factors.items()
        for name, factor in zip("AB", pair, strict=True)
    }
    return write_safetensors(directory / WEIGHTS, tensors, metadata)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        kind = config.get("peft_type")
        float(config["lora_alpha"]) if kind == "LORA" else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path / CONFIG}: not the config of a LoRA ({error!r})") from error
    if kind != "LORA":
        raise CheckpointError(f"{path}: a {kind} adapter; only LORA can be merged into weights")
    refused = [name for name in ("use_dora", "fan_in_fan_out", "alpha_pattern", "modules_to_save") if config.get(name)]
    if config.get("bias", "none") != "none":
        refused.append("bias")
    if refused:
        raise CheckpointError(f"{path}: a LoRA with {', '.join(refused)}, which cannot be merged here")
    return dict(config)


def _factors(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A ``[r, in]`` and B ``[out, r]`` by module, named as in the base."""
    found: dict[str, dict[str, Tensor]] = {}
    others = []
    for name, tensor in read_weights(path).items():
        match = FACTOR.fullmatch(name.removeprefix(PREFIX))
        if match is None or tensor.ndim != 2:
            others.append(name)
        else:
            found.setdefault(match["module"], {})[match["factor"]] = tensor
    others += [f"{module} without its other factor" for module, pair in found.items() if len(pair) < 2]
    if others:
        raise CheckpointError(f"{path}: holds what is no LoRA of matrices: {_list(sorted(others))}")
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}


def _list(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more

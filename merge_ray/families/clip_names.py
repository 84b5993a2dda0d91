"""CLIP weights under other names: task_vectors' modules and transformers' models, to and from open_clip.

The open_clip layout is native: ``visual.*`` for the image tower, the text tower at the top level. Between
it and transformers the tensors differ in three ways: names; attention projections (one ``in_proj`` against
``q``, ``k`` and ``v``); and the two final projections, which are transposed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from merge_ray.errors import CheckpointError, choose_from

WRAPPERS = ("module.", "image_encoder.", "model.")
"""Prefixes that modules around an open_clip model put before its names (DataParallel, task_vectors)."""

TEXT = (
    *("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", "logit_scale"),
    *("text.", "text_model."),
)
"""How the names of the text side begin: open_clip's, and transformers'."""

CONSTANTS = ("attn_mask", "position_ids")
"""Buffers that older versions saved and that follow from the architecture; the mask holds infinities."""

_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_VISION = {
    "embeddings.class_embedding": "visual.class_embedding",
    "embeddings.patch_embedding.weight": "visual.conv1.weight",
    "embeddings.position_embedding.weight": "visual.positional_embedding",
    "pre_layrnorm.weight": "visual.ln_pre.weight",
    "pre_layrnorm.bias": "visual.ln_pre.bias",
    "post_layernorm.weight": "visual.ln_post.weight",
    "post_layernorm.bias": "visual.ln_post.bias",
}
_TEXT = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_PROJECTIONS = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
_TOWERS = {
    "vision_model.": (_VISION, "visual.transformer.resblocks."),
    "text_model.": (_TEXT, "transformer.resblocks."),
}
HUGGINGFACE_MODELS = ("CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection")


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` in open_clip's layout; see :data:`HUGGINGFACE_MODELS` and :data:`WRAPPERS` for what it may be.

    Raises :class:`CheckpointError` for a transformers tensor without a counterpart.
    """
    plain = {_unwrap(name): tensor for name, tensor in state.items() if not name.endswith(CONSTANTS)}
    if any(name.startswith(("embeddings.", "encoder.layers.")) for name in plain):
        # transformers 5 saves a CLIPVisionModel without the tower's own prefix.
        plain = {f"vision_model.{name}": tensor for name, tensor in plain.items()}
    if not any(name.startswith(tuple(_TOWERS)) for name in plain):
        # task_vectors' ImageClassifier holds its head beside the encoder.
        return {name: tensor for name, tensor in plain.items() if not name.startswith("classification_head.")}
    return _from_huggingface(plain)


def is_of_text(name: str) -> bool:
    """Whether a tensor of this name, in any layout that :func:`to_open_clip` takes, is of the text side alone."""
    return _unwrap(name).startswith(TEXT)


def to_huggingface(state: Mapping[str, Tensor], model: str = "CLIPModel") -> dict[str, Tensor]:
    """``state`` (open_clip layout) under the names of transformers' ``model``, one of :data:`HUGGINGFACE_MODELS`.

    Tensors of towers that ``model`` lacks are left out. Raises :class:`CheckpointError` for other models
    and for tensors without a counterpart in transformers.
    """
    if model not in HUGGINGFACE_MODELS:
        raise CheckpointError(f"no export to {model!r}; {choose_from(model, HUGGINGFACE_MODELS)}")
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        result |= _to_huggingface(name, tensor)
    if model == "CLIPModel":
        return result
    kept = ("vision_model.", "visual_projection.") if model.endswith("WithProjection") else ("vision_model.",)
    return {name: tensor for name, tensor in result.items() if name.startswith(kept)}


def _unwrap(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def _from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    attention: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name == "logit_scale":
            result[name] = tensor
        elif name in _PROJECTIONS:
            result[_PROJECTIONS[name]] = tensor.T.contiguous()
        else:
            new, part = _from_tower(name)
            if part is None:
                result[new] = tensor
            else:
                attention.setdefault(new, {})[part] = tensor
    for name, parts in attention.items():
        if set(parts) != set("qkv"):
            raise CheckpointError(f"{name}: of the query, key and value projections only {sorted(parts)} are there")
        result[name] = torch.cat([parts[part] for part in "qkv"])
    return result


def _from_tower(name: str) -> tuple[str, str | None]:
    """The open_clip name of a tower's tensor, and which of q, k, v it is there, if it is one."""
    tower, _, rest = name.partition(".")
    top, blocks = _TOWERS.get(tower + ".", ({}, ""))
    if rest in top:
        return top[rest], None
    if top and rest.startswith("encoder.layers."):
        index, _, inner = rest.removeprefix("encoder.layers.").partition(".")
        module, _, kind = inner.rpartition(".")
        if module in _LAYER:
            return f"{blocks}{index}.{_LAYER[module]}.{kind}", None
        if module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            return f"{blocks}{index}.attn.in_proj_{kind}", module[len("self_attn.")]
    raise CheckpointError(f"{name!r} is not a tensor of a transformers CLIP model")


def _to_huggingface(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name == "logit_scale":
        return {name: tensor}
    for theirs, ours in _PROJECTIONS.items():
        if name == ours:
            return {theirs: tensor.T.contiguous()}
    for tower, (top, blocks) in _TOWERS.items():
        for theirs, ours in top.items():
            if name == ours:
                return {tower + theirs: tensor}
        if name.startswith(blocks):
            index, _, inner = name.removeprefix(blocks).partition(".")
            layer = f"{tower}encoder.layers.{index}."
            if inner.startswith("attn.in_proj_"):
                kind = inner.removeprefix("attn.in_proj_")
                parts = zip("qkv", tensor.chunk(3), strict=True)
                return {f"{layer}self_attn.{part}_proj.{kind}": chunk.contiguous() for part, chunk in parts}
            module, _, kind = inner.rpartition(".")
            for theirs, ours in _LAYER.items():
                if module == ours:
                    return {f"{layer}{theirs}.{kind}": tensor}
    raise CheckpointError(f"{name!r} has no counterpart in transformers' CLIP models")

"""Frozen feature extractors: published models that describe an image or a text by a vector of numbers."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merge_ray.checkpoints import nothing, open_location, read_weights
from merge_ray.errors import CheckpointError, DataError

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
MAX_TOKENS = 512
"""Where neither the tokenizer nor the model says how long a text may be."""


class Extractor(ABC):
    """A frozen model that gives features ``[B, F]`` float32, on the device that it was opened on.

    size: how many features (``F``).
    """

    size: int

    @abstractmethod
    def __call__(self, inputs: Any) -> Tensor:
        """The features ``[B, F]`` of samples, without a graph; raises :class:`DataError` for another kind of them."""


def open_extractor(location: str, device: torch.device | str = "cpu") -> Extractor:
    """Open the extractor at ``location``: a directory, ``hf://owner/name``, or a hub's ``owner/name`` for short.

    A directory with a ``preprocessor_config.json`` describes images, one with a tokenizer texts. Only tensors are
    read, by merge-ray's own reader, into a model that transformers builds from ``config.json``. Raises
    :class:`CheckpointError` where the directory lacks what is needed, or its weights do not fit its configuration.
    """
    directory = _open_directory(location)
    if (directory / "preprocessor_config.json").is_file():
        return ImageExtractor(location, directory, device)
    if any((directory / name).is_file() for name in TOKENIZERS):
        return TextExtractor(location, directory, device, _sentence_modules(location, directory))
    raise CheckpointError(
        f"{directory}: not a feature extractor: it has neither a preprocessor_config.json (for images) nor a "
        f"tokenizer (for texts: one of {', '.join(TOKENIZERS)})"
    )


class ImageExtractor(Extractor):
    """An image model of transformers, such as ``microsoft/resnet-18``: its pooled output."""

    def __init__(self, location: str, directory: Path, device: torch.device | str) -> None:
        from transformers import AutoImageProcessor

        self._model = _load_model(location, directory, device)
        self._directory, self._device = directory, device
        self._processor = AutoImageProcessor.from_pretrained(directory, trust_remote_code=False)
        config = self._model.config
        self.size = config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else config.hidden_size

    @torch.no_grad()
    def __call__(self, inputs: Any) -> Tensor:
        """Features ``[B, F]`` of images uint8 ``[B, 3, S, S]``, resized and normalised as the extractor asks."""
        if not isinstance(inputs, Tensor):
            raise DataError(f"{self._directory}: an extractor for images; these samples are texts")
        pixels = self._processor(inputs, return_tensors="pt")["pixel_values"]
        return self._model(pixels.to(self._device)).pooler_output.flatten(1)


class TextExtractor(Extractor):
    """A sentence encoder: the mean (or the first) of its tokens' last states, scaled to length one where it says so.

    ``modules`` are those of sentence-transformers' layout: ``pooling`` (``mean`` or ``cls``) and ``normalize``.
    """

    def __init__(self, location: str, directory: Path, device: torch.device | str, modules: Mapping[str, Any]) -> None:
        from transformers import AutoTokenizer

        # The pooling layer of BERT is not used, and not always saved.
        self._model = _load_model(location, directory, device, unused=("pooler.",))
        self._directory, self._device = directory, device
        self._tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        self._modules = modules
        config = self._model.config
        self.size = config.hidden_size
        limits = (self._tokenizer.model_max_length, getattr(config, "max_position_embeddings", MAX_TOKENS))
        self._length = modules.get("max_seq_length") or min(*limits)

    @torch.no_grad()
    def __call__(self, inputs: Any) -> Tensor:
        """Features ``[B, F]`` of texts."""
        if isinstance(inputs, Tensor):
            raise DataError(f"{self._directory}: an extractor for texts; these samples are images")
        tokens = self._tokenizer(
            list(inputs), padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        ).to(self._device)
        states = self._model(**tokens).last_hidden_state
        if self._modules["pooling"] == "cls":
            features = states[:, 0]
        else:
            mask = tokens["attention_mask"].unsqueeze(-1)
            features = (states * mask).sum(1) / mask.sum(1)
        return nn.functional.normalize(features, dim=1) if self._modules["normalize"] else features


def _open_directory(location: str) -> Path:
    """The local directory of an extractor."""
    path = open_location(_full_location(location), nothing)
    if not path.is_dir():
        raise CheckpointError(f"{location}: a feature extractor is a directory with a config.json and weights")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: not a feature extractor: it has no config.json")
    return path


def _full_location(location: str) -> str:
    """``owner/name`` means the hub where there is no such path."""
    return f"hf://{location}" if HUB_NAME.fullmatch(location) and not Path(location).exists() else location


def _load_model(location: str, directory: Path, device: torch.device | str, unused: tuple[str, ...] = ()) -> Any:
    """The bare model of a directory, frozen; heads in its weights are left out, ``unused`` parts may be missing."""
    # Here and not above: whoever lists the methods would wait for it.
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        model = AutoModel.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{directory}: transformers cannot build a model from its config.json ({error})"
        ) from error
    prefix = f"{model.base_model_prefix}."
    own = model.state_dict()
    read = read_weights(_full_location(location), lambda name: name.removeprefix(prefix) in own)
    weights = {name.removeprefix(prefix): tensor for name, tensor in read.items()}
    problems = [f"{name} is missing" for name in own if name not in weights and not name.startswith(unused)]
    problems += [
        f"{name} is {list(weights[name].shape)}, its config.json makes it {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        lines = [*problems[:12], *([f"... and {len(problems) - 12} more"] if len(problems) > 12 else [])]
        raise CheckpointError("\n  ".join([f"{directory}: the extractor's weights do not fit:", *lines]))
    model.load_state_dict({name: weights[name] for name in own if name in weights}, strict=False)
    return model.float().to(device).eval().requires_grad_(False)


def _sentence_modules(location: str, directory: Path) -> dict[str, Any]:
    """What a directory in sentence-transformers' layout does with the tokens' states; else their mean."""
    modules: dict[str, Any] = {"pooling": "mean", "normalize": False}
    if not (directory / "modules.json").is_file():
        return modules
    for module in _read_json(directory / "modules.json"):
        kind = module["type"].rpartition(".")[2]
        if kind == "Pooling":
            modules["pooling"] = _pooling(open_location(f"{_full_location(location)}/{module['path']}/config.json"))
        elif kind == "Normalize":
            modules["normalize"] = True
        elif kind != "Transformer":
            raise CheckpointError(
                f"{directory}: its modules.json has a {kind}, which is not supported; "
                "supported are Transformer, Pooling and Normalize"
            )
    if (settings := directory / "sentence_bert_config.json").is_file():
        modules["max_seq_length"] = _read_json(settings).get("max_seq_length")
    return modules


def _pooling(path: Path) -> str:
    """``mean`` or ``cls``, as the pooling module's configuration has it."""
    modes = {name.removeprefix("pooling_mode_") for name, value in _read_json(path).items() if value is True}
    modes -= {"include_prompt"}
    for name, words in {"mean": {"mean_tokens"}, "cls": {"cls_token"}}.items():
        if modes == words:
            return name
    raise CheckpointError(f"{path}: pooling by {', '.join(sorted(modes))} is not supported; supported are mean and cls")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error

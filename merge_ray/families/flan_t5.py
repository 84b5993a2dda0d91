"""Flan-T5: any of transformers' T5 models with a language head, asked in text and answering in text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merge_ray.bank import Layout
from merge_ray.checkpoints import nothing, open_location
from merge_ray.errors import CheckpointError, SpecError, choose_from
from merge_ray.families.base import Family, Skeleton, TaskData, fit_weights, register_family
from merge_ray.families.text_data import TextData
from merge_ray.tasks import PreparedSplit, Task, TextSplit, prepare_text

EMBEDDINGS = "shared.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
HEAD = "lm_head.weight"
MOST_TOKENS = 512
"""Inputs are cut to what T5 was trained on."""


@register_family("flan_t5")
class FlanT5Family(Family):
    """A T5 model (arXiv:1910.10683; Flan, arXiv:2210.11416), native in transformers' names.

    architecture: the location of a directory with ``config.json`` and a tokenizer, or of its ``config.json``. One on
    the hub (``hf://google/flan-t5-base``) is fetched when it is first used.

    The embeddings have one name, ``shared.weight``; the output layer ``lm_head.weight`` is a tensor of its own where
    the config says ``tie_word_embeddings: false``, as in Flan-T5, and the embeddings otherwise.

    Raises :class:`SpecError` where a local architecture is none of T5.
    """

    huggingface_model = "T5ForConditionalGeneration"

    def __init__(self, architecture: str) -> None:
        super().__init__(architecture)
        if "://" not in architecture:
            _ = self.config

    @cached_property
    def directory(self) -> Path:
        """Where the config and the tokenizer are, on this machine."""
        path = open_location(self.architecture, nothing)
        return path if path.is_dir() else path.parent

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        try:
            path = self.directory / "config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
        except CheckpointError as error:
            raise SpecError(f"the architecture {error}") from None
        except OSError:
            raise SpecError(f"{self.architecture}: no config.json in this directory") from None
        except ValueError as error:
            raise SpecError(f"{self.architecture}: not a JSON file: {error}") from None
        if config.get("model_type") != "t5":
            found = config.get("model_type")
            raise SpecError(f"{self.architecture}: model_type {found!r} is not T5; {choose_from(found, ['t5'])}")
        return config

    @property
    def tied(self) -> bool:
        """Whether the embeddings are the output layer, too (then its input is scaled by ``d_model ** -0.5``)."""
        # transformers 5 writes configs that say scale_decoder_outputs instead.
        return bool(self.config.get("scale_decoder_outputs", self.config.get("tie_word_embeddings", True)))

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the directory; raises :class:`SpecError` where there is none."""
        from transformers import AutoTokenizer

        # transformers would make an empty one.
        if not self.has_tokenizer:
            raise SpecError(f"{self.architecture}: no tokenizer in {self.directory} (tokenizer.json, spiece.model)")
        try:
            return AutoTokenizer.from_pretrained(self.directory, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise SpecError(f"{self.architecture}: its tokenizer cannot be read: {error}") from error

    @cached_property
    def tokenizer_key(self) -> str:
        """A hash of all that decides how texts become token ids."""
        parts = [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in self._tokenizer_files()]
        return hashlib.sha256(json.dumps([MOST_TOKENS, parts]).encode()).hexdigest()

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer in the directory."""
        return bool(self._tokenizer_files())

    def _tokenizer_files(self) -> list[Path]:
        names = ("tokenizer", "special_tokens", "added_tokens", "spiece.model")
        return sorted(path for path in self.directory.iterdir() if path.name.startswith(names))

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, ended by the end of the sequence, at most :data:`MOST_TOKENS`."""
        ids: list[list[int]] = self.tokenizer(texts, truncation=True, max_length=MOST_TOKENS)["input_ids"]
        return ids

    def build(self) -> Any:
        """A new model with random weights from torch's generator, on the CPU."""
        from transformers import T5Config, T5ForConditionalGeneration

        model = T5ForConditionalGeneration(T5Config.from_dict({**self.config, "tie_word_embeddings": self.tied}))
        if not self.tied:
            # transformers 5 ties the output layer whatever the config says.
            model.lm_head.weight = nn.Parameter(model.shared.weight.detach().clone())
        return model

    def load(self, state: Mapping[str, Tensor], device: torch.device | str) -> Any:
        """A model with the tensors of ``state`` (native names), shared where they are float32 on ``device``.

        Raises :class:`CheckpointError` listing what is missing or has another shape.
        """
        with torch.device("meta"):
            model = self.build()
        model.load_state_dict(fit_weights(self.native_names(model), state, device), strict=False, assign=True)
        for stack in (model.encoder, model.decoder):
            stack.embed_tokens.weight = model.shared.weight
        if self.tied:
            model.lm_head.weight = model.shared.weight
        return model

    def native_names(self, model: Any) -> dict[str, Tensor]:
        """The tensors of a model, each under its one native name."""
        left_out = (*COPIES, HEAD) if self.tied else COPIES
        return {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in left_out}

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``state`` with one name for the embeddings, and with ``lm_head.weight`` where it is not tied.

        transformers writes tied tensors under one or more of their names, and leaves out an output layer that it has
        tied. Raises :class:`CheckpointError` for names that differ where they must be one tensor.
        """
        found = {name: tensor for name, tensor in state.items() if name not in COPIES}
        tied_names = (*COPIES, HEAD) if self.tied else COPIES
        for name in tied_names:
            if name not in state:
                continue
            first = found.setdefault(EMBEDDINGS, state[name])
            if state[name].shape != first.shape or not torch.equal(state[name], first):
                raise CheckpointError(f"{name} differs from {EMBEDDINGS}; in {self.architecture} they are one tensor")
        if self.tied:
            found.pop(HEAD, None)
        elif EMBEDDINGS in found and HEAD not in found:
            found[HEAD] = found[EMBEDDINGS].clone()
        return found

    def tower(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors: text in, text out."""
        return dict(state)

    def activation_bytes(self, batch_size: int) -> int:
        """Float32 of a block of the encoder at full length: scores of all heads twice, three MLPs' and six widths'."""
        config = self.config
        widths = 6 * config["d_model"] + 3 * config["d_ff"] + 2 * config["num_heads"] * MOST_TOKENS
        return int(4 * batch_size * (MOST_TOKENS * widths + config["vocab_size"]))

    def assemble(self, layout: Layout, extras: Mapping[str, Tensor], device: torch.device | str) -> Skeleton:
        """The whole model over a zeroed flat buffer."""
        return T5Skeleton(self, layout, extras, device)

    def open_split(
        self, task: Task, split: str, cache: Path, progress: Callable[[int, int, str], None] | None = None
    ) -> TextSplit:
        """See :meth:`Family.open_split`: texts as token ids of this family's tokenizer."""
        return prepare_text(task, split, self.tokenizer_key, self.encode, cache, progress)

    def task_data(
        self, split: PreparedSplit, head: Tensor | None, device: torch.device, max_samples: int | None
    ) -> TaskData:
        """See :meth:`Family.task_data`."""
        assert isinstance(split, TextSplit)
        return TextData(split, self.tokenizer, device, max_samples)

    def export_huggingface(self, state: Mapping[str, Tensor], model: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and ``config.json`` of transformers' ``T5ForConditionalGeneration`` from native weights."""
        if model != self.huggingface_model:
            raise CheckpointError(f"no export for {model!r}; {choose_from(model, [self.huggingface_model])}")
        config = {**self.config, "architectures": [model], "tie_word_embeddings": self.tied}
        config.pop("scale_decoder_outputs", None)
        return dict(state), config

    def companions(self) -> Path:
        """The architecture's directory."""
        return self.directory


class T5Skeleton(Skeleton):
    """A T5 whose merged parameters live in one flat buffer; see :class:`merge_ray.families.images.ImageSkeleton`.

    model: transformers' ``T5ForConditionalGeneration``.
    """

    def __init__(
        self, family: FlanT5Family, layout: Layout, extras: Mapping[str, Tensor], device: torch.device | str
    ) -> None:
        super().__init__()
        self.layout = layout
        self.flat = torch.zeros(layout.size, device=device)
        self.model = family.load({**extras, **layout.views(self.flat)}, device).eval().requires_grad_(False)
        self.native_names = family.native_names

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``[B, V]`` of the first token of the answers to ``ids`` ``[B, S]``, padded on the right."""
        config = self.model.config
        start = torch.full((len(ids), 1), config.decoder_start_token_id, device=ids.device)
        output = self.model(
            input_ids=ids, attention_mask=ids != config.pad_token_id, decoder_input_ids=start, use_cache=False
        )
        logits: Tensor = output.logits[:, 0]
        return logits

    def native_state(self) -> dict[str, Tensor]:
        """The model's tensors under the family's native names."""
        return self.native_names(self.model)

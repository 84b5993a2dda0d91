"""A word-level tokenizer for small text towers, whose vocabulary is a list in the model's JSON config."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from merge_ray.errors import SpecError


class WordTokenizer:
    """Text to tokens: one per known word; a word that is not in the vocabulary is spelled, one token per character.

    vocabulary: words and single characters, lower case, without repetition. context_length: tokens per text,
    start and end included; longer texts are cut. Token 0 pads, 1 starts a text, and the last one ends it: the
    end has the highest number because open_clip reads a text's features where that number is.

    Raises :class:`SpecError` when the vocabulary repeats itself.
    """

    START = 1
    SPECIAL = 3  # padding, start, end

    def __init__(self, vocabulary: Sequence[str], context_length: int) -> None:
        if repeated := sorted({word for word in vocabulary if vocabulary.count(word) > 1}):
            raise SpecError(f"the vocabulary repeats {repeated}")
        self.context_length = context_length
        self.end = len(vocabulary) + self.SPECIAL - 1
        self._tokens = {word: index + 2 for index, word in enumerate(vocabulary)}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Tokens int64 ``[len(texts), context_length]``."""
        result = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in zip(result, texts, strict=True):
            tokens = [self.START, *self._encode(text)[: self.context_length - 2], self.end]
            row[: len(tokens)] = torch.tensor(tokens)
        return result

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = []
        for word in re.findall(r"\w+", text.lower()):
            pieces = [word] if word in self._tokens else word
            tokens.extend(self._tokens[piece] for piece in pieces if piece in self._tokens)
        return tokens

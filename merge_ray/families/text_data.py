"""Text tasks as a text-to-text model is scored on them: by the likeliest class, or by what it writes."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from merge_ray.errors import DataError
from merge_ray.families.base import Positions, Skeleton, TaskData, evaluation_order
from merge_ray.tasks import TextSplit

MOST_SCORED = 256
"""Data with more classes than this are answered by writing."""
STRIPPED = string.whitespace + string.punctuation


class TextData(TaskData):
    """Token ids with labels ``[N]``, and the words that answer.

    Answers are taken as the split says. ``score``: the class with the highest log-likelihood of its tokens; the end
    of the sequence is one of them where a class begins another one. ``generate``: greedy decoding, compared after
    stripping spaces and punctuation.

    Of numbers (STS-B) the outcomes are the numbers told, and the metric is Spearman's correlation with the labels. What
    is written and is no number counts as 0.
    """

    def __init__(self, split: TextSplit, tokenizer: Any, device: torch.device, max_samples: int | None) -> None:
        self.order = evaluation_order(len(split), max_samples)
        self.labels = torch.from_numpy(split.labels[self.order]).to(device)
        self.split, self.tokenizer, self.device = split, tokenizer, device
        self.answers = answer_tokens(tokenizer, split.classes)
        self.numeric = split.numeric
        self.metric = "spearman" if split.numeric else "accuracy"
        if split.answer == "score" and len(split.classes) > MOST_SCORED:
            raise DataError(
                f"{split.directory.name}: there are {len(split.classes)} different answers, too many to score each "
                f"(at most {MOST_SCORED}); set answer: generate"
            )
        if self.numeric:
            self.values = torch.tensor([_number(word) for word in split.classes], dtype=torch.float64, device=device)

    def inputs(self, positions: Positions) -> Tensor:
        """Token ids int64 ``[B, S]``, padded on the right to the longest of them."""
        rows = self.order[positions.cpu().numpy() if isinstance(positions, Tensor) else positions]
        return pad(self.split, rows, self.tokenizer.pad_token_id).to(self.device)

    def samples(self, positions: Positions) -> list[str]:
        """What the model is asked at ``positions``, in words."""
        texts: list[str] = self.tokenizer.batch_decode(self.inputs(positions), skip_special_tokens=True)
        return texts

    def logits(self, skeleton: Skeleton, inputs: Tensor) -> Tensor:
        """Logits ``[B, V]`` of the first token of the answers, over the whole vocabulary."""
        logits: Tensor = skeleton(inputs)
        return logits

    def outcomes(self, skeleton: Skeleton, positions: Positions) -> Tensor:
        """Whether each answer is right, bool ``[B]``; of numbers, the number told, float64 ``[B]``."""
        return self.outcomes_by(skeleton.model, positions)

    def outcomes_by(self, model: Any, positions: Positions) -> Tensor:
        """The outcomes of the answers of transformers' ``model``."""
        inputs = self.inputs(positions)
        if self.split.answer == "score":
            return self._chosen(score_answers(model, inputs, self.answers), positions)
        texts = self._write(model, inputs)
        if self.numeric:
            return torch.tensor([_number(text) for text in texts], dtype=torch.float64, device=self.device)
        wanted = [self.split.classes[label].strip(STRIPPED) for label in self.labels[positions].tolist()]
        right = [text.strip(STRIPPED) == word for text, word in zip(texts, wanted, strict=True)]
        return torch.tensor(right, device=self.device)

    def outcomes_of(self, logits: Tensor, positions: Positions) -> Tensor:
        """The outcomes of the answers' first tokens' logits ``[B, V]``: of the class whose first token is likeliest.

        Raises :class:`DataError` where classes share their first token.
        """
        first = [answer[0] for answer in self.answers]
        if len(set(first)) < len(first):
            raise DataError(f"{self.split.directory.name}: the first token does not tell all classes apart")
        return self._chosen(logits[:, first], positions)

    def score(self, outcomes: np.ndarray) -> tuple[float, float]:
        """Accuracy, or Spearman's correlation; its standard error is that of Fisher's z as Bonett and Wright (2000,
        Psychometrika 65) have it for ranks, taken back: (1 - r²) sqrt((1 + r² / 2) / (n - 3))."""
        if not self.numeric:
            return super().score(outcomes)
        count = len(outcomes)
        value = spearman(outcomes, self.labels[:count].cpu().numpy())
        return value, (1 - value**2) * math.sqrt((1 + value**2 / 2) / max(count - 3, 1))

    def _chosen(self, scores: Tensor, positions: Positions) -> Tensor:
        if not bool(torch.isfinite(scores).all()):
            raise FloatingPointError("the merged model's logits are not finite")
        best = scores.argmax(dim=1)
        return self.values[best] if self.numeric else best == self.labels[positions]

    def _write(self, model: Any, inputs: Tensor) -> list[str]:
        ids = model.generate(
            input_ids=inputs,
            attention_mask=inputs != model.config.pad_token_id,
            # One more than the longest answer, to see whether it ends there.
            max_new_tokens=max(map(len, self.answers)) + 1,
            num_beams=1,
            do_sample=False,
        )
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts


def pad(split: TextSplit, rows: np.ndarray, padding: int) -> Tensor:
    """The token ids of ``rows``, int64 ``[B, S]``, filled up on the right."""
    starts, ends = split.offsets[rows], split.offsets[rows + 1]
    ids = torch.full((len(rows), int((ends - starts).max(initial=1))), padding)
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        ids[row, : end - start] = torch.from_numpy(np.array(split.tokens[start:end]))
    return ids


def answer_tokens(tokenizer: Any, classes: Sequence[str]) -> list[list[int]]:
    """The token ids of every class, with the end of the sequence where one class begins another."""
    answers: list[list[int]] = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in classes]
    if empty := [word for word, ids in zip(classes, answers, strict=True) if not ids]:
        raise DataError(f"the tokenizer has no token for the class {empty[0]!r}")
    begins = any(one != other and other[: len(one)] == one for one in answers for other in answers)
    return [[*answer, tokenizer.eos_token_id] for answer in answers] if begins else answers


def score_answers(model: Any, inputs: Tensor, answers: Sequence[Sequence[int]]) -> Tensor:
    """The log-likelihood ``[B, C]`` of every answer's tokens to ``inputs`` ``[B, S]``.

    The input is read once, and the first tokens of all answers are scored by one step of the decoder; only answers of
    several tokens take one more each, over the keys and values that are there.
    """
    mask = inputs != model.config.pad_token_id
    start = torch.full((len(inputs), 1), model.config.decoder_start_token_id, device=inputs.device)
    encoded = model.encoder(input_ids=inputs, attention_mask=mask)
    several = any(len(answer) > 1 for answer in answers)
    first = model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=start, use_cache=several)
    scores = first.logits[:, 0].log_softmax(dim=-1)[:, [answer[0] for answer in answers]]
    for column, answer in enumerate(answers):
        if len(answer) == 1:
            continue
        ids = torch.tensor(answer, device=inputs.device)
        rest = model(
            encoder_outputs=encoded,
            attention_mask=mask,
            decoder_input_ids=ids[:-1].expand(len(inputs), -1),
            past_key_values=first.past_key_values,
            use_cache=True,
        )
        scores[:, column] += (
            rest.logits.log_softmax(dim=-1).gather(2, ids[1:].expand(len(inputs), -1)[..., None]).sum((1, 2))
        )
        first.past_key_values.self_attention_cache.crop(1 - len(answer))
    return scores


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation, in [-1, 1]; 0 where all of one are equal."""
    ranks = np.stack([rankdata(first), rankdata(second)]) - (len(first) + 1) / 2
    norms = np.linalg.norm(ranks, axis=1)
    return float(np.clip(ranks[0] @ ranks[1] / (norms[0] * norms[1]), -1, 1)) if norms.all() else 0.0


def _number(text: str) -> float:
    try:
        value = float(text.strip())
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0

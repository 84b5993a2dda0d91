"""Train text-to-text models by teacher forcing on the words of the labels: in full, as LoRA, or from nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from merge_ray.checkpoints import write_adapter
from merge_ray.errors import SpecError
from merge_ray.families.flan_t5 import FlanT5Family
from merge_ray.families.text_data import TextData, pad
from merge_ray.finetune.pupil import Pupil
from merge_ray.finetune.spec import LoraSpec, PretrainSpec
from merge_ray.finetune.trainer import batch_rows
from merge_ray.tasks import TextSplit

EVALUATION_BATCH = 256
IGNORED = -100
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


class Answers:
    """The label words of a split as the decoder is to write them: token ids with the end of the sequence."""

    def __init__(self, split: TextSplit, tokenizer: Any) -> None:
        words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in split.classes]
        longest = max(map(len, words)) + 1
        rows = [[*ids, tokenizer.eos_token_id, *[IGNORED] * (longest - 1 - len(ids))] for ids in words]
        self.ids = torch.tensor(rows)
        labels = split.labels
        if split.numeric:
            # A number is taught as the nearest that has a word.
            values = np.array([float(word) for word in split.classes])
            labels = np.abs(labels[:, None] - values).argmin(axis=1)
        self.labels = torch.from_numpy(labels)

    def of(self, rows: np.ndarray) -> Tensor:
        """The ids ``[B, L]`` of the answers to ``rows``, filled up with :data:`IGNORED`."""
        ids = self.ids[self.labels[rows]]
        return ids[:, : int((ids != IGNORED).sum(dim=1).max())]


def answer_loss(logits: Tensor, answers: Tensor, label_smoothing: float) -> Tensor:
    """The sum over samples of the mean cross entropy of their answers' tokens, ``[B, L, V]`` against ``[B, L]``."""
    answers = answers.to(logits.device)
    losses = functional.cross_entropy(
        logits.transpose(1, 2), answers, ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="none"
    )
    return (losses.sum(dim=1) / (answers != IGNORED).sum(dim=1)).sum()


class TextPupil(Pupil):
    """All weights of a model on a task."""

    def __init__(
        self,
        family: FlanT5Family,
        base: Mapping[str, Tensor],
        train: TextSplit,
        validation: TextSplit,
        label_smoothing: float,
        seed: int,
        device: str,
    ) -> None:
        self.family, self.train, self.label_smoothing, self.seed = family, train, label_smoothing, seed
        self.model = family.load({name: tensor.clone() for name, tensor in base.items()}, device).eval()
        self.module: nn.Module = self.model
        self.answers = Answers(train, family.tokenizer)
        self.validation = TextData(validation, family.tokenizer, torch.device(device), None)

    def loss(self, rows: np.ndarray, step: int) -> Tensor:
        """See :meth:`Pupil.loss`; dropout is drawn anew for every step, from the seed."""
        answers = self.answers.of(rows)
        ids = pad(self.train, rows, self.model.config.pad_token_id).to(self.model.device)
        self.model.train()
        with _dropout_of(step, self.seed, ids.device):
            logits = self.ask(ids, answers.clamp(min=0).to(ids.device))
        self.model.eval()
        return answer_loss(logits, answers, self.label_smoothing)

    def ask(self, ids: Tensor, answers: Tensor) -> Tensor:
        """Logits ``[B, L, V]`` of the tokens of ``answers`` ``[B, L]``, each after those before it."""
        logits: Tensor = self.model(**_question(self.model, ids, answers)).logits
        return logits

    @torch.inference_mode()
    def score(self) -> float:
        """See :meth:`Pupil.score`."""
        count = len(self.validation)
        batches = [slice(start, min(start + EVALUATION_BATCH, count)) for start in range(0, count, EVALUATION_BATCH)]
        outcomes = [self.validation.outcomes_by(self.model, positions) for positions in batches]
        return self.validation.score(torch.cat(outcomes).cpu().numpy())[0]

    def native_state(self) -> dict[str, Tensor]:
        """See :meth:`Pupil.native_state`."""
        return {name: tensor.cpu() for name, tensor in self.family.native_names(self.model).items()}


class LoraPupil(TextPupil):
    """A LoRA of a model on a task; the base's weights stay."""

    def __init__(self, lora: LoraSpec, base_path: Path, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.lora, self.base_path = lora, base_path
        self.model.requires_grad_(False)
        self.module = self.factors = LoraFactors(self.model, lora, self.seed)

    def ask(self, ids: Tensor, answers: Tensor) -> Tensor:
        """See :meth:`TextPupil.ask`."""
        weights = self.factors.weights()
        output = torch.func.functional_call(self.model, weights, kwargs=_question(self.model, ids, answers))
        logits: Tensor = output.logits
        return logits

    def score(self) -> float:
        """See :meth:`Pupil.score`."""
        with torch.no_grad():
            for name, weight in self.factors.weights().items():
                self.model.get_parameter(name).copy_(weight)
        return super().score()

    def write(self, path: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
        """Save the factors as peft does."""
        factors = {}
        for module in self.factors.frozen:
            a, b = self.factors.pair(module)
            factors[module] = (a.detach().to(dtype), b.detach().to(dtype))
        write_adapter(path.parent, factors, self.lora.alpha, str(self.base_path), metadata)


class LoraFactors(nn.Module):
    """The factors A ``[r, in]``, drawn as peft draws them, and B ``[out, r]``, zero, of the target modules."""

    def __init__(self, model: nn.Module, lora: LoraSpec, seed: int) -> None:
        super().__init__()
        self.scale = lora.alpha / lora.rank
        self.frozen = {
            name: layer.weight.detach().clone()
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in lora.targets
        }
        missing = set(lora.targets) - {name.rpartition(".")[2] for name in self.frozen}
        if missing:
            raise SpecError(f"lora.targets: the model has no linear layer called {', '.join(sorted(missing))}")
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.frozen.items():
            out, into = weight.shape
            a = torch.empty(lora.rank, into)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            self.register_parameter(f"A/{name}".replace(".", "/"), nn.Parameter(a.to(weight.device)))
            self.register_parameter(
                f"B/{name}".replace(".", "/"), nn.Parameter(torch.zeros(out, lora.rank, device=weight.device))
            )

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """A and B of a module."""
        a, b = (self.get_parameter(f"{factor}/{module}".replace(".", "/")) for factor in "AB")
        return a, b

    def weights(self) -> dict[str, Tensor]:
        """The adapted weights by their names in the model."""
        adapted = {}
        for module, weight in self.frozen.items():
            a, b = self.pair(module)
            adapted[f"{module}.weight"] = weight + self.scale * (b @ a)
        return adapted


def noisy_loss(
    model: Any, tokenizer: Any, tasks: Sequence[TextSplit], recipe: PretrainSpec, seed: int
) -> Callable[[int], Tensor]:
    """The loss of a step on all tasks together, a share of the inputs' tokens replaced by random ones."""
    rows_of = np.concatenate(
        [np.stack([np.full(len(task), index), np.arange(len(task))], axis=1) for index, task in enumerate(tasks)]
    )
    answers = [Answers(task, tokenizer) for task in tasks]

    def loss(step: int) -> Tensor:
        chosen = rows_of[batch_rows(len(rows_of), recipe.batch_size, step, seed)]
        asked: list[Tensor] = []
        wanted: list[Tensor] = []
        for index in np.unique(chosen[:, 0]):
            rows = chosen[chosen[:, 0] == index, 1]
            asked += pad(tasks[index], rows, model.config.pad_token_id).unbind()
            wanted += answers[index].of(rows).unbind()
        ids = pad_sequence(asked, batch_first=True, padding_value=model.config.pad_token_id)
        targets = pad_sequence(wanted, batch_first=True, padding_value=IGNORED)
        ids = _disturb(ids, recipe.token_noise, np.random.default_rng((seed, 1, step)), tokenizer).to(model.device)
        with _dropout_of(step, seed, ids.device):
            logits = model(**_question(model, ids, targets.clamp(min=0).to(ids.device))).logits
        return answer_loss(logits, targets, recipe.label_smoothing) / recipe.batch_size

    return loss


@contextmanager
def _dropout_of(step: int, seed: int, device: torch.device) -> Iterator[None]:
    """What is dropped inside depends on the step and the seed alone."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))
        yield


def _disturb(ids: Tensor, noise: float, rng: np.random.Generator, tokenizer: Any) -> Tensor:
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    random = torch.from_numpy(rng.integers(len(tokenizer), size=ids.shape))
    replaced = torch.from_numpy(rng.random(ids.shape) < noise) & ~special
    return torch.where(replaced, random, ids)


def _question(model: Any, ids: Tensor, answers: Tensor) -> dict[str, Any]:
    """What transformers' model takes: the input, and the answers shifted to the right."""
    start = torch.full((len(ids), 1), model.config.decoder_start_token_id, device=ids.device)
    decoder = torch.cat([start, answers[:, :-1]], dim=1)
    mask = ids != model.config.pad_token_id
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder, "use_cache": False}


def make_tokenizer(texts: Iterable[str], size: int, directory: Path) -> None:
    """Write a byte-pair tokenizer of at most ``size`` pieces of ``texts`` to ``directory``, for transformers."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = list(SPECIAL.values())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    end = SPECIAL["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, special.index(end))]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(directory)

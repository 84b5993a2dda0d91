"""The entropy of models' predictions on unlabelled samples, computed once for a bank and a split."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_ray.methods.base import MergeInputs, TaskModel


def entropy(logits: Tensor) -> Tensor:
    """The entropy in nats ``[...]`` of the softmax of ``logits`` ``[..., C]``."""
    log_probabilities = logits.log_softmax(dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)


def model_entropy(inputs: MergeInputs, model: TaskModel, expert: str | None, temperature: float = 1.0) -> Tensor:
    """The entropy ``[N]`` (on the CPU) of a model of the bank on all samples of ``model``, shared between candidates.

    expert: the task of a fine-tuned model, or None for the base. It answers through the head of the samples' task.
    Overwrites ``model.flat`` when it computes. Raises :class:`FloatingPointError` for logits that are not finite.
    """

    def compute() -> Tensor:
        bank = inputs.bank
        if expert is None:
            model.flat.copy_(bank.base)
        else:
            torch.add(bank.base, bank.task_vectors[bank.tasks.index(expert)], out=model.flat)
        logits = model.all_logits()
        if not bool(torch.isfinite(logits).all()):
            who = "the base model" if expert is None else f"the model fine-tuned on {expert!r}"
            raise FloatingPointError(f"{who} has logits that are not finite on {model.task!r} ({model.split})")
        return entropy(logits.float() / temperature).cpu()

    return inputs.cached(("entropy", model.task, model.split, len(model), expert, temperature), compute)


def expert_entropies(inputs: MergeInputs, model: TaskModel) -> Tensor:
    """The entropies ``[N, T]`` of all fine-tuned models: see :func:`model_entropy`."""
    return torch.stack([model_entropy(inputs, model, task) for task in inputs.bank.tasks], dim=1)

"""One forward pass for samples that each have weights of their own.

The weights of sample ``i`` are ``theta_0 + sum_t c_it tau_t``. Layer by layer, one of two things is combined for all
samples at once. Where a weight meets few positions of a sample, its outputs: the whole batch goes through the base's
weight and every task vector's, and the results are summed per sample. Where it meets many, the weights: one matrix
product of the coefficients with the task vectors' rows reads the bank once for all samples, and every sample goes
through its own. Beyond the bank it needs activations, and one layer's weights for each sample of a part of the batch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map

from merge_ray.bank import Entry, ModelBank
from merge_ray.methods.base import TaskModel

LINEAR: Mapping[Callable[..., Any], tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    F.conv1d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    F.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    F.embedding: ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
}
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
QUESTIONS = (Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.size, Tensor.dim)  # type: ignore[attr-defined]
"""What asks a weight for its kind, not its values."""
FEW = 8
"""Positions of a sample up to which outputs are combined: ``T + 1`` products each cost less than moving a weight."""
WEIGHTS_AT_ONCE = 1.0
"""How many models' worth of weights may be merged at once, one layer's for each sample of a part of the batch."""
ATTENTION = inspect.signature(F.multi_head_attention_forward)


def shared_logits(bank: ModelBank, model: TaskModel, inputs: Any, coefficients: Tensor) -> Tensor:
    """``model.logits`` ``[B, C]`` of ``inputs``, sample ``i`` with the weights of ``coefficients[i]``.

    coefficients: ``[B, T]`` or ``[B, T, L]``. The samples are vectorised with :func:`torch.vmap`, so the skeleton's
    forward pass must not branch on values. Raises what torch raises where the forward pass cannot be vectorised.
    """
    places = weights_in_layout(bank, model.skeleton)

    def answer(sample: Any, of_sample: Tensor) -> Tensor:
        with PerSampleWeights(bank, places, of_sample):
            return model.logits(tree_map(lambda tensor: tensor[None], sample))[0]

    largest = max(entry.size for _, entry in places.values())
    at_once = max(1, int(WEIGHTS_AT_ONCE * bank.layout.size / largest))
    return torch.vmap(answer, chunk_size=at_once)(inputs, coefficients.to(bank.base.device))


def weights_in_layout(bank: ModelBank, skeleton: nn.Module) -> dict[int, tuple[int, Entry]]:
    """The skeleton's parameters and buffers that lie in its flat vector: their place in the layout, by ``id``."""
    flat, entries = skeleton.flat, bank.layout.entries
    assert isinstance(flat, Tensor)
    places = {flat.data_ptr() + entry.offset * flat.element_size(): place for place, entry in enumerate(entries)}
    found = {}
    for tensor in [*skeleton.parameters(), *skeleton.buffers()]:
        place = places.get(tensor.data_ptr())
        if place is not None and tensor.shape == entries[place].shape:
            found[id(tensor)] = (place, entries[place])
    return found


class PerSampleWeights(TorchFunctionMode):
    """Inside this context, a weight of the layout acts as this sample's merged weight.

    coefficients: ``[T]`` or ``[T, L]``, of one sample inside :func:`torch.vmap`.
    """

    def __init__(self, bank: ModelBank, places: Mapping[int, tuple[int, Entry]], coefficients: Tensor) -> None:
        super().__init__()
        self.bank, self.places, self.coefficients = bank, places, coefficients

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in QUESTIONS or not tree_any(self._is_weight, (args, kwargs)):
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._attention(ATTENTION.bind(*args, **kwargs).arguments)
        if func in LINEAR:
            named = dict(zip(LINEAR[func], args, strict=False)) | kwargs
            if self._is_weight(named["weight"]):
                return self._linear(func, **named)
        if func in PRODUCTS and self._is_weight(args[1]) and not self._is_weight(args[0]):
            return self._combine(args[1], lambda weight: func(args[0], weight), args[0].numel() // args[1].shape[0])
        args, kwargs = tree_map(self._merged, (args, kwargs))
        return func(*args, **kwargs)

    def _is_weight(self, value: Any) -> bool:
        return isinstance(value, Tensor) and id(value) in self.places

    def _parts(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The base's tensor, the task vectors' ``[T, ...]``, and this sample's coefficients ``[T]``."""
        place, entry = self.places[id(weight)]
        columns = slice(entry.offset, entry.offset + entry.size)
        base, rows = self.bank.base[columns].float().view(entry.shape), self.bank.task_vectors[:, columns]
        coefficients = self.coefficients if self.coefficients.ndim == 1 else self.coefficients[:, place]
        return base, rows.unflatten(1, entry.shape) if entry.shape else rows[:, 0], coefficients

    def _merged(self, value: Any) -> Any:
        """This sample's merged weight; anything else as it is."""
        if not self._is_weight(value):
            return value
        base, rows, coefficients = self._parts(value)
        return torch.tensordot(coefficients, rows, dims=1).add_(base)

    def _combine(self, weight: Tensor, apply: Callable[[Tensor], Tensor], positions: int) -> Tensor:
        """``apply`` of the merged weight, where ``apply`` is linear and uses the weight at so many positions."""
        if positions > FEW:
            merged: Tensor = apply(self._merged(weight))
            return merged
        base, rows, coefficients = self._parts(weight)
        result = apply(base)
        for row, coefficient in zip(rows, coefficients, strict=True):
            result = result + coefficient * apply(row)
        return result

    def _linear(self, func: Callable[..., Tensor], weight: Tensor, bias: Tensor | None = None, **rest: Any) -> Tensor:
        # A lookup costs the same for any weight.
        positions = 1 if func is F.embedding else rest["input"].numel() // math.prod(weight.shape[1:])
        result = self._combine(weight, lambda part: func(weight=part, **rest), positions)
        if bias is None:
            return result
        # A convolution's channels come before its space.
        channels = (-1,) + (1,) * (weight.ndim - 2)
        return result + self._merged(bias).view(channels)

    def _attention(self, given: Mapping[str, Any]) -> tuple[Tensor, None]:
        """Self-attention as ``nn.MultiheadAttention`` asks for it, time first: ``[S, 1, E]``."""
        unknown = ("bias_k", "bias_v", "add_zero_attn", "key_padding_mask", "use_separate_proj_weight", "need_weights")
        x = given["query"]
        if any(given.get(name) is not None and given[name] is not False for name in unknown) or x is not given["value"]:
            raise RuntimeError("attention other than plain self-attention has no shared forward pass")
        length, batch, width = x.shape
        heads = given["num_heads"]
        projected = self._linear(F.linear, given["in_proj_weight"], given["in_proj_bias"], input=x)
        query, key, value = projected.view(length, batch * 3 * heads, width // heads).transpose(0, 1).chunk(3)
        scores = query @ key.transpose(1, 2) / math.sqrt(width // heads)
        if (mask := given.get("attn_mask")) is not None:
            scores = scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        mixed = (scores.softmax(-1) @ value).transpose(0, 1).reshape(length, batch, width)
        return self._linear(F.linear, given["out_proj_weight"], given["out_proj_bias"], input=mixed), None

"""The gradient field of a model, integrated gradients step by step (ModelGiF, Song et al., arXiv:2309.11013)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from merge_ray.errors import SpecError

Quadrature = Literal["gauss_legendre", "riemann_left", "riemann_right", "riemann_middle", "trapezoid"]
Target = Literal["map_maxima", "best_channel", "all_outputs"]

Maps = Callable[[Tensor], Tensor]
"""A model: inputs ``[B, C, H, W]`` to feature maps ``[B, K, h, w]``, or to features ``[B, K]``, maps of one position.

A sample's maps must not depend on the rest of its batch."""


class FieldSpec(BaseModel):
    """How the gradient field of a model is computed; see :func:`attributions`. The defaults are the paper's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: Target = "map_maxima"
    top: int = Field(1, ge=1)
    """``map_maxima``: the number of largest positions in each feature map."""
    steps: int = Field(50, ge=1)
    quadrature: Quadrature = "gauss_legendre"
    baseline: Literal["paired_image", "zero"] = "paired_image"
    """Where paths start: at another sample, or at the zero input (mid grey where inputs are in [-1, 1])."""
    seed: int = Field(0, ge=0)
    """The seed of the pairing."""
    cumulative: bool = True
    """Whether a step's field is the integral up to it, or that step's part alone."""


def quadrature(rule: Quadrature, steps: int) -> tuple[Tensor, Tensor]:
    """The points, ascending, and weights of a quadrature rule on [0, 1]: float64 ``[steps]`` each.

    ``trapezoid`` has ``steps`` points from 0 to 1, and the weights 1/steps, halved at both ends, as in captum.
    """
    if rule == "gauss_legendre":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return torch.from_numpy((1 + nodes) / 2), torch.from_numpy(weights / 2)
    sizes = torch.full((steps,), 1 / steps, dtype=torch.float64)
    count = torch.arange(steps, dtype=torch.float64)
    if rule == "trapezoid":
        sizes[[0, -1]] /= 2
        return torch.linspace(0, 1, steps, dtype=torch.float64), sizes
    offsets = {"riemann_left": 0.0, "riemann_middle": 0.5, "riemann_right": 1.0}
    return (count + offsets[rule]) / steps, sizes


def pair_samples(count: int, seed: int) -> Tensor:
    """Another sample for each of ``count``, as its baseline: int64 ``[count]``.

    The indices are shuffled by Python's generator, again and again until none is in its own place.
    """
    if count < 2:
        raise SpecError("paired baselines need two samples or more")
    order, generator = list(range(count)), random.Random(seed)
    while any(place == index for place, index in enumerate(order)):
        generator.shuffle(order)
    return torch.tensor(order)


def select_outputs(maps: Tensor, target: Target, top: int = 1) -> Tensor:
    """Which outputs make up the scalar whose gradient is taken: ones and zeros, shaped as ``maps`` ``[B, K, h, w]``.

    ``map_maxima``: the ``top`` largest positions of each feature map. ``best_channel``: the largest channel at each
    position. ``all_outputs``: all. Raises :class:`SpecError` for more maxima than a map has positions.
    """
    if target == "all_outputs":
        return torch.ones_like(maps)
    if target == "best_channel":
        return torch.zeros_like(maps).scatter_(1, maps.argmax(dim=1, keepdim=True), 1)
    flat = maps.flatten(2)
    if top > flat.shape[2]:
        raise SpecError(f"top: {top} maxima are asked for, a feature map has {flat.shape[2]} positions")
    return torch.zeros_like(flat).scatter_(2, flat.topk(top, dim=2).indices, 1).view_as(maps)


def attributions(model: Maps, inputs: Tensor, baselines: Tensor, spec: FieldSpec, batch_size: int) -> Tensor:
    """Gradients along straight paths from ``baselines`` to ``inputs`` (both ``[N, C, H, W]``): ``[N, steps, C, H, W]``.

    At step s: the sum over all steps up to s (``cumulative``; else that step alone) of the quadrature's weight times
    the gradient, at the step's point, of the sum of the outputs that are selected at the *input*; times input minus
    baseline. The last cumulative step is plain integrated gradients. The network sees ``batch_size`` points at once.
    """
    alphas, weights = (part.to(inputs) for part in quadrature(spec.quadrature, spec.steps))
    difference = inputs - baselines
    with torch.no_grad():
        selected = torch.cat(
            [select_outputs(_maps(model, part), spec.target, spec.top) for part in inputs.split(batch_size)]
        )
    found = torch.empty(len(inputs), spec.steps, *inputs.shape[1:], dtype=inputs.dtype, device=inputs.device)
    flat = found.flatten(0, 1)
    for points in torch.arange(len(flat), device=inputs.device).split(batch_size):
        sample, step = points // spec.steps, points % spec.steps
        along = (baselines[sample] + alphas[step].view(-1, 1, 1, 1) * difference[sample]).requires_grad_()
        (gradient,) = torch.autograd.grad((_maps(model, along) * selected[sample]).sum(), along)
        flat[points] = gradient * weights[step].view(-1, 1, 1, 1)
    return (found.cumsum(1) if spec.cumulative else found).mul_(difference.unsqueeze(1))


def gradient_field(model: Maps, prepare: Maps, images: Tensor, spec: FieldSpec, batch_size: int) -> Iterator[Tensor]:
    """The field of ``images`` ``[N, 3, H, W]``, some images at a time and in order: ``[n, steps, H*W]`` float32.

    It is the mean of the attributions over the colour channels. ``prepare`` makes inputs of images; ``model`` is used
    as it is (in evaluation mode, its parameters without gradients). At most about twice ``batch_size`` points, or one
    image with all its steps, are in memory.
    """
    partners = pair_samples(len(images), spec.seed) if spec.baseline == "paired_image" else None
    for rows in torch.arange(len(images)).split(max(1, batch_size // spec.steps)):
        inputs = prepare(images[rows])
        baselines = torch.zeros_like(inputs) if partners is None else prepare(images[partners[rows]])
        yield attributions(model, inputs, baselines, spec, batch_size).mean(2).flatten(2).float().cpu()


def _maps(model: Maps, inputs: Tensor) -> Tensor:
    output = model(inputs)
    if output.ndim not in (2, 4):
        raise SpecError(
            f"the model answers with {tuple(output.shape)}; feature maps [B, K, h, w] or features [B, K] are wanted"
        )
    return output if output.ndim == 4 else output[:, :, None, None]

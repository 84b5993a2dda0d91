"""Taskonomy: encoders that are merged, each task with a decoder of its own (Zamir et al., arXiv:1804.08328)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from merge_ray.bank import Layout
from merge_ray.errors import CheckpointError, SpecError, choose_from
from merge_ray.families.base import (
    Family,
    Positions,
    Skeleton,
    TaskData,
    evaluation_order,
    fit_weights,
    register_family,
)
from merge_ray.families.images import ImageEncoder, Preprocessing
from merge_ray.families.taskonomy_network import SIZES, TaskonomyEncoder, TaskonomyNetwork, make_decoder
from merge_ray.matching import PermutationGroups, derive_groups
from merge_ray.statistics import reset_batch_norm
from merge_ray.tasks import PreparedSplit, SceneSplit, Task, prepare_scenes
from merge_ray.tasks.scenes import to_floats
from merge_ray.tasks.taskonomy_losses import average_label, mean_loss, sample_losses, scaled_performance

MERGING_TASKS = (
    "class_object", "segment_semantic", "depth_zbuffer", "depth_euclidean", "edge_occlusion", "edge_texture",
    "keypoints2d", "keypoints3d", "reshading", "normal", "autoencoding", "denoising",
)  # fmt: skip
"""The tasks of the paper on training-free merging (Xu et al., arXiv:2403.01753)."""

RELATEDNESS_TASKS = (
    "autoencoding", "curvature", "denoising", "edge_texture", "edge_occlusion", "keypoints2d", "keypoints3d",
    "reshading", "depth_zbuffer", "depth_euclidean", "normal", "room_layout", "segment_unsup25d", "segment_unsup2d",
    "vanishing_point", "segment_semantic", "class_object",
)  # fmt: skip
"""The tasks of the paper on relatedness (ModelGiF), in its order."""

ENCODER, DECODER = "encoder.", "decoder."
COUNTER = "num_batches_tracked"
COMPRESSION = "compress"
"""What the names of the encoder's last convolution and batch norm begin with."""


@register_family("taskonomy")
class TaskonomyFamily(Family):
    """Taskonomy's networks, native in the published names of the encoder.

    architecture: ``full``, the published size (images of 256 x 256), or ``slim``, for the rendered rooms (64 x 64).

    Weights are the encoder's, as the official ``<task>_encoder-<hash>.pth`` hold them
    (``torchhub:{task}_encoder-*.pth``), or whole networks with ``encoder.`` and ``decoder.`` before the names. A task's
    head is its decoder, from ``<task>_decoder-<hash>.pth`` or a whole network.

    Raises :class:`SpecError` for another architecture.
    """

    huggingface_model = ""
    needs_heads = True
    has_base = False
    own_tensors = frozenset({"compress1.weight"})

    def __init__(self, architecture: str) -> None:
        super().__init__(architecture)
        if architecture not in SIZES:
            raise SpecError(f"no Taskonomy network is called {architecture!r}; {choose_from(architecture, SIZES)}")
        self.widths = SIZES[architecture]

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The encoder's tensors, of an encoder or of a whole network."""
        return _part(state, ENCODER)

    def tower(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors: the skeleton uses the whole encoder."""
        return dict(state)

    def activation_bytes(self, batch_size: int) -> int:
        """Float32 of four maps at the full size, as wide as the decoder's last layers or the stem is there."""
        return 4 * batch_size * 4 * max(self.widths.stem // 4, *self.widths.upsampling[-2:]) * self.widths.image_size**2

    def assemble(self, layout: Layout, extras: Mapping[str, Tensor], device: torch.device | str) -> Skeleton:
        """The encoder over a zeroed flat buffer, its running statistics included."""
        return TaskonomySkeleton(self.encoder(), layout, extras, device)

    def permutation_groups(self, skeleton: Skeleton) -> PermutationGroups:
        """See :meth:`Family.permutation_groups`: every task keeps the compression after matching."""
        assert isinstance(skeleton, TaskonomySkeleton)
        example = torch.zeros(1, 3, self.widths.image_size, self.widths.image_size, device=skeleton.flat.device)
        own = [name for name in skeleton.layout.names if name.startswith(COMPRESSION)]
        return derive_groups(skeleton.encoder, example, path="encoder.", own=own)

    def shown(self, images: Tensor) -> Tensor:
        """See :meth:`Family.shown`: float32, in [-1, 1]."""
        return to_floats(images)

    def encoder(self) -> TaskonomyEncoder:
        """A new encoder of this size with random weights."""
        return TaskonomyEncoder(self.widths)

    @property
    def preprocessing(self) -> Preprocessing:
        """Images of this size, in [-1, 1]."""
        half = (0.5, 0.5, 0.5)
        return Preprocessing(self.widths.image_size, "bilinear", half, half)

    def image_encoder(self, state: Mapping[str, Tensor], device: torch.device | str) -> ImageEncoder:
        """The encoder with the weights of ``state``; it answers with codes, as the decoders take them."""
        return ImageEncoder(_filled(self.encoder(), state, device), self.preprocessing, device, "")

    def decoder(self, task: str) -> nn.Module:
        """A new decoder of this size for ``task``, with random weights."""
        return make_decoder(task, self.widths)

    def read_head(self, task: Task, state: Mapping[str, Tensor]) -> Tensor:
        """The decoder's floating-point tensors as one vector, in the order of their names."""
        with torch.device("meta"):
            wanted = self.decoder(task.spec.label or task.name).state_dict()
        tensors = {name: tensor for name, tensor in wanted.items() if tensor.is_floating_point()}
        return Layout.of(tensors).flatten(fit_weights(tensors, _part(state, DECODER), "cpu"))

    def open_split(
        self, task: Task, split: str, cache: Path, progress: Callable[[int, int, str], None] | None = None
    ) -> SceneSplit:
        """See :meth:`Family.open_split`: scenes at this size with the task's labels."""
        return prepare_scenes(task, split, self.widths.image_size, cache, progress)

    def open_images(
        self, task: Task, split: str, cache: Path, progress: Callable[[int, int, str], None] | None = None
    ) -> SceneSplit:
        """A split's images alone, which need no labels: those that batch norm is reset on."""
        return prepare_scenes(task, split, self.widths.image_size, cache, progress, labels=False)

    def task_data(
        self, split: PreparedSplit, head: Tensor | None, device: torch.device, max_samples: int | None
    ) -> SceneData:
        """See :meth:`Family.task_data`."""
        assert head is not None and isinstance(split, SceneSplit)
        return SceneData(split, self.decoder(split.task), head, device, max_samples)

    def export_huggingface(self, state: Mapping[str, Tensor], model: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Not there: transformers has no such model."""
        raise CheckpointError("transformers has no Taskonomy network; export safetensors")


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under ``prefix`` where the state is of a whole network, or all of them."""
    if any(name.startswith((ENCODER, DECODER)) for name in state):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return dict(state)


def _filled(encoder: TaskonomyEncoder, state: Mapping[str, Tensor], device: torch.device | str) -> TaskonomyEncoder:
    """``encoder`` with the tensors of ``state``, shared where that can be; counters of batches may be missing."""
    wanted = encoder.state_dict()
    counters = {name: tensor for name, tensor in wanted.items() if name.endswith(COUNTER)}
    encoder.load_state_dict(fit_weights(wanted, {**counters, **state}, device), assign=True)
    return encoder.eval().requires_grad_(False)


class TaskonomySkeleton(Skeleton):
    """An encoder whose merged parameters and running statistics live in one flat buffer; see :class:`Skeleton`."""

    def __init__(
        self, encoder: TaskonomyEncoder, layout: Layout, extras: Mapping[str, Tensor], device: torch.device | str
    ) -> None:
        super().__init__()
        self.layout = layout
        self.flat = torch.zeros(layout.size, device=device)
        self.encoder = _filled(encoder, {**extras, **layout.views(self.flat)}, device)

    def forward(self, images: Tensor) -> Tensor:
        """Codes ``[B, code, h, w]`` of images float32 ``[B, 3, S, S]`` in [-1, 1]."""
        codes: Tensor = self.encoder(images)
        return codes

    def native_state(self) -> dict[str, Tensor]:
        """The encoder's tensors."""
        return self.encoder.state_dict()


class SceneData(TaskData):
    """Scenes of some buildings with one task's labels and its decoder; the lower the score, the better.

    labels: int64 ``[N]``, numbers of ``buildings``. Outcomes are each sample's loss and how much it counts, float64
    ``[N, 2]``. The score is the mean of the buildings' losses.
    """

    metric = "loss"

    def __init__(
        self, split: SceneSplit, decoder: nn.Module, head: Tensor, device: torch.device, max_samples: int | None
    ) -> None:
        self.split, self.device = split, device
        self.order = evaluation_order(len(split), max_samples)
        self.labels = torch.from_numpy(split.labels[self.order])
        self.buildings = split.classes
        self.decoder = decoder.to(device).requires_grad_(False).eval()
        self._head = head.to(device)
        self._averages: dict[tuple[int, bool], np.ndarray] = {}
        self.restore()

    def restore(self) -> None:
        """See :meth:`TaskData.restore`: give the decoder its saved weights and statistics of batch norm."""
        state = self.decoder.state_dict()
        for name, view in Layout.of(state).views(self._head).items():
            state[name].copy_(view)

    def network(self, skeleton: Skeleton) -> TaskonomyNetwork:
        """The skeleton's encoder and this task's decoder; what is done to it is done to them."""
        assert isinstance(skeleton, TaskonomySkeleton)
        return TaskonomyNetwork(skeleton.encoder, self.decoder)

    def state(self, skeleton: Skeleton) -> dict[str, Tensor]:
        """See :meth:`TaskData.state`: those of the whole network."""
        return {name: tensor.clone() for name, tensor in self.network(skeleton).state_dict().items()}

    def inputs(self, positions: Positions) -> Tensor:
        """What the network is shown, float32 ``[B, 3, S, S]`` in [-1, 1]."""
        return self.split.batch(self._rows(positions), self.device).images

    def logits(self, skeleton: Skeleton, inputs: Tensor) -> Tensor:
        """The decoder's answers ``[B, C, S, S]``, or ``[B, 1000]``."""
        answers: Tensor = self.decoder(skeleton(inputs))
        return answers

    def outcomes_of(self, logits: Tensor, positions: Positions) -> Tensor:
        """Losses and weights ``[B, 2]`` of answers; raises :class:`FloatingPointError` where they are not finite."""
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("the merged model's answers are not finite")
        batch = self.split.batch(self._rows(positions), self.device)
        return sample_losses(self.split.task, logits, batch.targets, batch.weights)

    def domains(self, outcomes: np.ndarray) -> dict[str, float]:
        """See :meth:`TaskData.domains`: the loss in each building."""
        return {building: loss for building, (loss, _) in self.losses(outcomes).items()}

    def normalize(self, outcomes: np.ndarray, reference: Mapping[str, float]) -> tuple[float | None, float]:
        """See :meth:`TaskData.normalize`: the scaled performance, 1 for the task's own model, 0 for the label average.

        The paper's figure, see :func:`merge_ray.tasks.taskonomy_losses.scaled_performance`.
        """
        average = self.domains(self.average_outcomes(*self.average)[: len(outcomes)])
        rows = [[part[building] for building in average] for part in (self.domains(outcomes), average)]
        own = np.array([reference[building] for building in average])
        losses, estimator = map(np.array, rows)
        return float(scaled_performance(losses, estimator, own)), float(np.mean(estimator - own))

    def calibration_batches(self, batch_size: int, samples: int) -> Iterator[Tensor]:
        """See :meth:`TaskData.calibration_batches`: images of the buildings that batch norm is reset on."""
        assert isinstance(self.calibration, SceneSplit)
        rows = evaluation_order(len(self.calibration), samples)
        for start in range(0, len(rows), batch_size):
            part = np.sort(rows[start : start + batch_size])
            yield self.calibration.images(part, self.split.task, self.device)

    def settle(self, skeleton: Skeleton, batch_size: int, samples: int) -> None:
        """See :meth:`TaskData.settle`: batch norm of the encoder and of the decoder is reset."""
        self.restore()
        reset_batch_norm([self.network(skeleton)], self.calibration_batches(batch_size, samples))

    def losses(self, outcomes: np.ndarray) -> dict[str, tuple[float, float]]:
        """Every building's loss and its standard error, from the outcomes of the first samples of the order."""
        labels = self.labels[: len(outcomes)].numpy()
        return {self.buildings[label]: mean_loss(outcomes[labels == label]) for label in np.unique(labels)}

    def score(self, outcomes: np.ndarray) -> tuple[float, float]:
        """The mean of the buildings' losses and its standard error."""
        means, errors = np.array(list(self.losses(outcomes).values())).T
        return float(means.mean()), float(np.linalg.norm(errors)) / len(errors)

    def average_outcomes(self, batch_size: int, released: bool = False) -> np.ndarray:
        """The outcomes ``[N, 2]`` of answering every building's scenes with the average of its labels, made once.

        batch_size, released: see :func:`merge_ray.tasks.taskonomy_losses.average_label`.
        """
        if (batch_size, released) not in self._averages:
            self._averages[batch_size, released] = self._answer_averages(batch_size, released)
        return self._averages[batch_size, released]

    def _answer_averages(self, batch_size: int, released: bool) -> np.ndarray:
        outcomes = np.empty((len(self), 2))
        for label in self.labels.unique():
            rows = np.sort(np.flatnonzero(self.labels.numpy() == int(label)))
            parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
            batches = (self.split.batch(self.order[part], self.device).targets for part in parts)
            estimate = average_label(self.split.task, batches, released)
            for part in parts:
                outcomes[part] = self.outcomes_of(estimate.expand(len(part), *estimate.shape), part).cpu().numpy()
        return outcomes

    def _rows(self, positions: Positions) -> np.ndarray:
        rows: np.ndarray = self.order[positions.cpu().numpy() if isinstance(positions, Tensor) else positions]
        return rows

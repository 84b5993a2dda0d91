"""What an architecture supplies so that flat merging methods can be scored on it."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from merge_ray.bank import Layout, ModelBank
from merge_ray.errors import CheckpointError, SpecError, choose_from


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the model sees it.

    ``size`` and ``interpolation`` (the shorter side is resized, then the centre cropped) are applied once,
    when a task's images are decoded into the cache; ``mean`` and ``std``, of pixels scaled to [0, 1], are
    applied on the device.
    """

    size: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def key(self) -> str:
        """What names a cache of decoded images: only what changes the cached bytes."""
        return f"{self.size}-{self.interpolation}"


class ImageEncoder(nn.Module):
    """An image tower with its preprocessing: from cached images to features.

    prefix: what the family's native names put before the tower's own.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, tower: nn.Module, preprocessing: Preprocessing, device: torch.device | str, prefix: str) -> None:
        super().__init__()
        self.tower = tower.to(device)
        self.prefix = prefix
        mean = torch.tensor(preprocessing.mean, device=device).view(1, 3, 1, 1)
        std = torch.tensor(preprocessing.std, device=device).view(1, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, D]`` of length one for ``images`` uint8 ``[B, 3, S, S]``, on any device."""
        pixels = images.to(self.scale.device, non_blocking=True).float().mul_(self.scale).add_(self.shift)
        return nn.functional.normalize(self.tower(pixels), dim=-1)

    def native_state(self) -> dict[str, Tensor]:
        """The tower's tensors under the family's native names."""
        return {self.prefix + name: tensor.detach() for name, tensor in self.tower.state_dict().items()}


class Skeleton(ImageEncoder):
    """An image encoder whose merged parameters live in one flat buffer.

    ``flat`` ``[P]`` float32 is laid out by ``layout``: writing into it changes the model at once, without
    a state dict. Tensors of the tower that the layout lacks come from ``extras``. Tensors of the layout
    that the tower lacks (a text tower) only take their place in ``flat``.

    Raises :class:`CheckpointError` when a tensor of the tower is in neither, or has another shape.
    """

    def __init__(
        self,
        tower: nn.Module,
        preprocessing: Preprocessing,
        layout: Layout,
        extras: Mapping[str, Tensor],
        device: torch.device | str,
        prefix: str,
    ) -> None:
        flat = torch.zeros(layout.size, device=device)
        views = layout.views(flat)
        load_tower(tower, {**extras, **views}, prefix, device)
        super().__init__(tower.eval().requires_grad_(False), preprocessing, device, prefix)
        self.layout = layout
        self.flat = flat


def load_tower(tower: nn.Module, state: Mapping[str, Tensor], prefix: str, device: torch.device | str) -> None:
    """Give ``tower`` the tensors of ``state`` whose names are its own after ``prefix``.

    Tensors that are on ``device`` in the tower's dtype are shared, not copied. Raises :class:`CheckpointError`
    that lists the tensors that are missing or have another shape.
    """
    chosen, problems = {}, []
    for name, tensor in tower.state_dict().items():
        source = state.get(prefix + name)
        if source is None:
            problems.append(f"{prefix}{name} {tuple(tensor.shape)} is missing")
        elif source.shape != tensor.shape:
            problems.append(f"{prefix}{name} is {tuple(source.shape)}, the architecture has {tuple(tensor.shape)}")
        else:
            chosen[name] = source.to(device=device, dtype=tensor.dtype)
    if problems:
        raise CheckpointError("the weights do not fit the architecture:\n" + "\n".join(problems))
    tower.load_state_dict(chosen, assign=True)


class Family(ABC):
    """A kind of architecture: how its weights are named, built and asked.

    name: as in specs. architecture: which member of the family, in the family's own words.
    """

    name: ClassVar[str]

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    @property
    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """How images are prepared for this architecture."""

    @abstractmethod
    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``state`` in the family's native names and shapes, whichever known layout it comes in."""

    @abstractmethod
    def assemble(self, layout: Layout, extras: Mapping[str, Tensor], device: torch.device | str) -> Skeleton:
        """An image encoder over a zeroed flat buffer of ``layout``, the rest from ``extras``."""

    @abstractmethod
    def image_encoder(self, state: Mapping[str, Tensor], device: torch.device | str) -> ImageEncoder:
        """An image encoder with weights of its own, copied from ``state`` (native names), to be trained."""

    @abstractmethod
    def image_tower(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of ``state`` (native names) that the image encoder uses."""

    @abstractmethod
    def head(
        self,
        base_state: Mapping[str, Tensor],
        classes: Sequence[str],
        templates: Sequence[str],
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """A zero-shot head ``[C, D]`` float32: logits are ``features @ head.T``.

        ``progress(done, total)`` counts prompts.
        """

    @abstractmethod
    def export_huggingface(self, state: Mapping[str, Tensor], model: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weights of ``state`` (native names) and the ``config.json`` of transformers' class ``model``."""

    def skeleton(self, bank: ModelBank, device: torch.device | str) -> Skeleton:
        """An image encoder on ``device`` that holds the bank's base model until other weights are written."""
        skeleton = self.assemble(bank.layout, bank.extras, device)
        skeleton.flat.copy_(bank.base)
        return skeleton


AnyFamily = TypeVar("AnyFamily", bound=type[Family])
_families: dict[str, type[Family]] = {}


def register_family(name: str) -> Callable[[AnyFamily], AnyFamily]:
    """Make a :class:`Family` known under ``name``."""

    def add(cls: AnyFamily) -> AnyFamily:
        cls.name = name
        _families[name] = cls
        return cls

    return add


def find_family(name: str, architecture: str) -> Family:
    """The family ``name`` for ``architecture``; raises :class:`SpecError` with the nearest match."""
    import merge_ray.families as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    if name not in _families:
        raise SpecError(f"unknown family {name!r}; {choose_from(name, _families)}")
    return _families[name](architecture)


def head_from_state(state: Mapping[str, Tensor]) -> Tensor:
    """The head ``[C, D]`` float32 in the weights of a saved one (task_vectors' ``head_<Dataset>.pt``).

    Raises :class:`CheckpointError` when there is not exactly one matrix, or a bias that is not zero.
    """
    matrices = [name for name, tensor in state.items() if tensor.ndim == 2]
    if len(matrices) != 1:
        raise CheckpointError(f"a saved head has one weight matrix [classes, features]; this one has {matrices}")
    biases = [name for name, tensor in state.items() if name.endswith("bias") and tensor.count_nonzero()]
    if biases:
        raise CheckpointError(f"a zero-shot head has no bias; {biases[0]!r} of this one is not zero")
    return state[matrices[0]].float()

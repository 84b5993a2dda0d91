"""The networks of the Taskonomy models: a ResNet-50 whose last layer is compressed to a code, and decoders of codes.

Modules and parameters are named as in the published weights (Sax et al., "Learning to Navigate Using Mid-Level Visual
Priors", arXiv:1912.11121, visualpriors).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from merge_ray.errors import SpecError, choose_from

EXPANSION = 4

OUTPUT_CHANNELS = {
    "autoencoding": 3,
    "class_object": 1000,
    "class_scene": 63,
    "colorization": 1,
    "curvature": 2,
    "denoising": 3,
    "depth_euclidean": 1,
    "depth_zbuffer": 1,
    "edge_occlusion": 1,
    "edge_texture": 1,
    "inpainting": 3,
    "keypoints2d": 1,
    "keypoints3d": 1,
    "normal": 3,
    "reshading": 1,
    "segment_semantic": 17,
    "segment_unsup25d": 64,
    "segment_unsup2d": 64,
}
"""The channels (or classes) that each task's decoder answers with."""

FULLY_CONNECTED = ("class_object", "class_scene", "room_layout", "vanishing_point")
"""The tasks whose answers are vectors; all others' are images."""

LOGITS = ("segment_semantic",)
"""The tasks whose images are logits, not values between -1 and 1."""


@dataclass(frozen=True)
class Widths:
    """The size of a Taskonomy network.

    stem, planes, blocks, strides: the encoder's first convolution, and per layer the narrow width of its bottlenecks,
    their number and the stride of the last one. code: the channels of the compressed code.
    plain, upsampling: the widths of the convolutional decoder's layers before the first up-sampling and from it on,
    where every other layer doubles height and width. hidden: the width of the fully connected decoder; code_size: the
    height and width of the codes that it takes. image_size: those of the images.
    """

    stem: int = 64
    planes: tuple[int, ...] = (64, 128, 256, 512)
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    strides: tuple[int, ...] = (2, 2, 1, 1)
    code: int = 8
    plain: tuple[int, ...] = (1024, 1024, 512, 256, 256, 128)
    upsampling: tuple[int, ...] = (64, 64, 32, 32, 16, 32, 16)
    hidden: int = 2048
    code_size: int = 16
    image_size: int = 256


FULL = Widths()
"""The published networks."""

SLIM = Widths(
    stem=16,
    planes=(16, 24, 32, 48),
    blocks=(1, 2, 1, 1),
    strides=(1, 2, 1, 1),
    plain=(64,),
    upsampling=(32, 32, 16, 16, 8),
    hidden=128,
    code_size=8,
    image_size=64,
)
"""Networks for the rendered rooms, small enough to be trained on a laptop."""

SIZES = {"full": FULL, "slim": SLIM}


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1 around a shortcut: ``[B, C, H, W]`` to ``[B, 4 planes, H/s, W/s]``."""

    def __init__(self, channels: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * EXPANSION, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * EXPANSION)
        self.relu = nn.ReLU()
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        out: Tensor = self.relu(self.bn3(self.conv3(x)) + shortcut)
        return out


def _layer(channels: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    """The first block changes the width and the last one the resolution, unlike in other ResNets."""
    if stride != 1 and blocks < 2:
        raise SpecError(f"a layer of stride {stride} needs two blocks or more, not {blocks}: its last block strides")
    wide = planes * EXPANSION
    project = nn.Sequential(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide))
    layer = [Bottleneck(channels, planes, 1, project)]
    for index in range(1, blocks):
        last = stride if index == blocks - 1 else 1
        layer.append(Bottleneck(wide, planes, last, nn.MaxPool2d(1, last) if last != 1 else None))
    return nn.Sequential(*layer)


class TaskonomyEncoder(nn.Module):
    """Images ``[B, 3, H, W]`` in [-1, 1] to codes ``[B, code, H/16, W/16]``.

    normalize: divide out mean and deviation of every channel of a code (the published encoder's last step, which the
    decoders do without).
    """

    def __init__(self, widths: Widths = FULL, *, normalize: bool = False) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d(3)
        self.conv1 = nn.Conv2d(3, widths.stem, 7, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths.stem)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        channels = widths.stem
        self._layers = [f"layer{index}" for index in range(1, len(widths.planes) + 1)]
        for name, planes, blocks, stride in zip(
            self._layers, widths.planes, widths.blocks, widths.strides, strict=True
        ):
            self.add_module(name, _layer(channels, planes, blocks, stride))
            channels = planes * EXPANSION
        self.compress1 = nn.Conv2d(channels, widths.code, 3, padding=1, bias=False)
        self.compress_bn = nn.BatchNorm2d(widths.code)
        self.groupnorm = nn.GroupNorm(8, widths.code, affine=False) if normalize else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.pad(images)))))
        for name in self._layers:
            x = self.get_submodule(name)(x)
        codes: Tensor = self.groupnorm(self.relu(self.compress_bn(self.compress1(x))))
        return codes


class _DropFirst(nn.Module):
    """All but the first row and column."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 1:, 1:]


def _convolution(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.LeakyReLU(0.2))


def _up_convolution(channels: int, out: int) -> nn.Sequential:
    """Doubles height and width, aligned as TensorFlow aligns a transposed convolution."""
    return nn.Sequential(
        nn.ZeroPad2d((1, 0, 1, 0)),
        nn.ConvTranspose2d(channels, out, 3, stride=2, padding=1, bias=False),
        _DropFirst(),
        nn.BatchNorm2d(out),
        nn.LeakyReLU(0.2),
    )


class ConvolutionalDecoder(nn.Module):
    """Codes ``[B, code, h, w]`` to images ``[B, channels, 16 h, 16 w]``: in [-1, 1], or logits without ``tanh``."""

    def __init__(self, channels: int, widths: Widths = FULL, *, tanh: bool = True) -> None:
        super().__init__()
        self._layers: list[str] = []
        width = widths.code
        for index, out in enumerate((*widths.plain, *widths.upsampling)):
            up = index >= len(widths.plain) and (index - len(widths.plain)) % 2 == 0
            self._layers.append(f"{'deconv' if up else 'conv'}{index + 2}")
            self.add_module(self._layers[-1], _up_convolution(width, out) if up else _convolution(width, out))
            width = out
        output = nn.Conv2d(width, channels, 3, padding=1)
        self.decoder_output = nn.Sequential(output, nn.Tanh()) if tanh else nn.Sequential(output)

    def forward(self, codes: Tensor) -> Tensor:
        """See the class."""
        for name in self._layers:
            codes = self.get_submodule(name)(codes)
        images: Tensor = self.decoder_output(codes)
        return images


class FullyConnectedDecoder(nn.Module):
    """Codes ``[B, code, code_size, code_size]`` to logits ``[B, channels]``."""

    def __init__(self, channels: int, widths: Widths = FULL) -> None:
        super().__init__()
        self.fc0 = nn.Linear(widths.code * widths.code_size**2, widths.hidden, bias=False)
        self.bn0 = nn.BatchNorm1d(widths.hidden)
        self.dropout = nn.Dropout()
        self.fc2 = nn.Linear(widths.hidden, channels)

    def forward(self, codes: Tensor) -> Tensor:
        """See the class."""
        # The published weights count a code's channels last.
        flat = codes.permute(0, 2, 3, 1).flatten(1)
        logits: Tensor = self.fc2(self.dropout(torch.relu(self.bn0(self.fc0(flat)))))
        return logits


def make_decoder(task: str, widths: Widths = FULL, channels: int | None = None) -> nn.Module:
    """A new decoder for ``task``, with as many output channels as is usual for it, or ``channels``.

    Raises :class:`SpecError` for a task without a usual number.
    """
    if channels is None:
        if task not in OUTPUT_CHANNELS:
            raise SpecError(f"no output channels are known for the task {task!r}; {choose_from(task, OUTPUT_CHANNELS)}")
        channels = OUTPUT_CHANNELS[task]
    if task in FULLY_CONNECTED:
        return FullyConnectedDecoder(channels, widths)
    return ConvolutionalDecoder(channels, widths, tanh=task not in LOGITS)


class TaskonomyNetwork(nn.Module):
    """One task's whole model: images ``[B, 3, H, W]`` to the decoder's answers."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        answers: Tensor = self.decoder(self.encoder(images))
        return answers

"""The Taskonomy networks: the published names and shapes, and a recorded forward pass (tests/golden)."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from test_goldens import GOLDEN, load
from torch import Tensor, nn

from merge_ray.errors import SpecError
from merge_ray.families.taskonomy_network import (
    OUTPUT_CHANNELS,
    FullyConnectedDecoder,
    TaskonomyEncoder,
    Widths,
    make_decoder,
)

PARAMETERS: dict[str, Any] = json.loads((GOLDEN / "taskonomy_architecture" / "parameters.json").read_text())


def fill(module: nn.Module, salt: int) -> nn.Module:
    """``module`` with weights from the integer formula of the golden case's notes."""
    for entry, (name, tensor) in enumerate(module.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        k = np.uint32((entry + 1) * 40503 + salt * 97)
        h = np.arange(1, tensor.numel() + 1, dtype=np.uint32) * np.uint32(2654435761) + k
        h = (h ^ (h >> np.uint32(15))) * np.uint32(2246822519)
        h = (h ^ (h >> np.uint32(13))) * np.uint32(3266489917)
        u = (h ^ (h >> np.uint32(16))).astype(np.float64) / 2**32
        if tensor.dim() > 1:
            values = (2 * u - 1) * math.sqrt(6 / math.prod(tensor.shape[1:]))
        elif name.endswith("running_var"):
            values = 0.5 + u
        else:
            values = 0.3 + 0.5 * u if name.endswith("weight") else 0.4 * (u - 0.5)
        tensor.copy_(torch.from_numpy(values.astype(np.float32)).view(tensor.shape))
    return module.eval()


def entries(module: nn.Module) -> list[list[Any]]:
    return [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in module.state_dict().items()]


def test_entries_are_the_published_ones() -> None:
    with torch.device("meta"):
        assert entries(TaskonomyEncoder()) == PARAMETERS["encoder"]
        assert entries(make_decoder("normal")) == PARAMETERS["decoder_convolutional_3_channels"]
        assert entries(make_decoder("class_object")) == PARAMETERS["decoder_fully_connected_1000"]
        for task in PARAMETERS["convolutional_tasks"]:
            output = make_decoder(task).get_submodule("decoder_output")
            assert len(output.state_dict()["0.bias"]) == PARAMETERS["output_channels"][task]
            has_tanh = any(isinstance(module, nn.Tanh) for module in output.children())
            assert has_tanh == (task not in PARAMETERS["without_tanh"])
        for task in PARAMETERS["fully_connected_tasks"]:
            decoder = make_decoder(task, channels=PARAMETERS["output_channels"].get(task, 9))
            assert isinstance(decoder, FullyConnectedDecoder)
    assert {task: PARAMETERS["output_channels"][task] for task in OUTPUT_CHANNELS} == OUTPUT_CHANNELS


@torch.no_grad()
def test_forward() -> None:
    case = load("taskonomy_architecture/forward")
    salt, image = case.parameters["salt"], case.inputs["image"]
    encoder = fill(TaskonomyEncoder(), salt)
    for name, values in case.parameters["first_three_filled_values"].items():
        assert encoder.state_dict()[name].flatten()[:3].tolist() == values
    stages: dict[str, Tensor] = {}
    for key in case.keys("stage/"):
        keep = lambda module, args, output, key=key: stages.__setitem__(key, output)  # noqa: E731
        encoder.get_submodule(key.removeprefix("stage/")).register_forward_hook(keep)
    code = encoder(image)
    for key, stage in {**stages, "code": code}.items():
        case.check(key, stage)
    case.check("code_group_normalised", fill(TaskonomyEncoder(normalize=True), salt)(image))
    for task in case.parameters["decoder_tasks"]:
        decoder = fill(make_decoder(task), salt + 1)
        codes = case.inputs["flat_code"] if isinstance(decoder, FullyConnectedDecoder) else code
        case.check(f"decoded/{task}", decoder(codes))


def test_slim_network_is_named_like_the_full_one() -> None:
    widths = Widths(8, (4, 4, 6, 8), (1, 2, 1, 1), (1, 2, 1, 1), plain=(6,), upsampling=(5, 5, 4))
    encoder, decoder = TaskonomyEncoder(widths), make_decoder("segment_semantic", widths)
    shapes = {name: tuple(tensor.shape) for name, tensor in (encoder.state_dict() | decoder.state_dict()).items()}
    assert shapes["layer2.1.conv1.weight"] == (4, 16, 1, 1)
    assert shapes["compress1.weight"] == (8, 32, 3, 3)
    assert {"conv2.0.weight", "deconv3.1.weight", "conv4.0.weight", "deconv5.3.bias"} <= shapes.keys()
    code = encoder(torch.zeros(2, 3, 24, 24))
    assert code.shape == (2, 8, 3, 3)
    assert decoder(code).shape == (2, 17, 12, 12)


def test_what_cannot_be_built() -> None:
    with pytest.raises(SpecError, match="stride 2 needs two blocks or more, not 1"):
        TaskonomyEncoder(Widths(blocks=(1, 4, 6, 3)))
    with pytest.raises(SpecError, match="'normals'; did you mean 'normal'"):
        make_decoder("normals")

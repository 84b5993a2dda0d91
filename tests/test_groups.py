"""Permutation groups that are followed through a model: permuting along them changes nothing that it computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import tiny
import torch
import torchvision.models as vision
from safetensors.torch import load_file
from torch import Tensor, nn

from merge_ray.bank import ModelBank
from merge_ray.errors import CheckpointError, SpecError
from merge_ray.families import Family, find_family
from merge_ray.families.flan_t5 import FlanT5Family
from merge_ray.families.taskonomy import TaskonomyFamily
from merge_ray.families.taskonomy_network import TaskonomyEncoder, Widths
from merge_ray.matching import Membership, PermutationGroups, derive_groups
from merge_ray.statistics import ActivationStatistics, observed

SLIM = Widths(stem=8, planes=(4, 6), blocks=(2, 2), strides=(2, 1), code=8)


def open_clip_tower(**options: Any) -> nn.Module:
    return open_clip.transformer.VisionTransformer(32, 16, 16, 2, 4, 2.0, output_dim=12, **options)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "taskonomy": (lambda: TaskonomyEncoder(SLIM), 11),
    "torchvision resnet18": (vision.resnet18, 12),
    "torchvision resnet18 with GroupNorm": (lambda: vision.resnet18(norm_layer=partial(nn.GroupNorm, 32)), 12),
    "torchvision vit": (lambda: vision.VisionTransformer(32, 16, 2, 4, 16, 32), 5),
    "timm resnet18": (lambda: timm.create_model("resnet18"), 12),
    "timm resnet26 with GroupNorm": (lambda: timm.create_model("resnet26", norm_layer="groupnorm"), 21),
    "timm vit": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24), 5),
    "open_clip vit": (open_clip_tower, 5),
    "open_clip vit with its options": (
        lambda: open_clip_tower(ls_init_value=0.1, act_layer=open_clip.transformer.QuickGELU, pool_type="avg"),
        5,
    ),
}


def randomize(model: nn.Module) -> nn.Module:
    """Weights that tell all channels apart, norms and biases too."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.is_floating_point():
            deviation = (2 / max(1, tensor[0].numel())) ** 0.5 if tensor.dim() > 1 else 1.0
            tensor.normal_(0, deviation, generator=generator)
    return model.eval()


def permuted(groups: PermutationGroups, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every group permuted at random, heads as wholes."""
    memberships = {}
    for group in groups:
        size = group.size // group.heads
        order = torch.cat([torch.randperm(size) + size * head for head in torch.randperm(group.heads)])
        memberships[group.name] = Membership(order[None], group.size, epsilon=0.0)
    return {name: groups.carry(name, tensor, 0, memberships) for name, tensor in state.items()}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_permuting_changes_nothing(name: str) -> None:
    build, count = MODELS[name]
    model, images = randomize(build()), torch.randn(2, 3, 32, 32)
    groups = derive_groups(model, images)
    assert len(groups) == count
    groups.check({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()})
    before = model(images)
    state = permuted(groups, model.state_dict())
    first = next(iter(groups)).members[0].tensor
    assert not torch.equal(state[first], model.state_dict()[first])
    model.load_state_dict(state)
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


@pytest.mark.parametrize("name", ["torchvision resnet18 with GroupNorm", "timm vit", "open_clip vit"])
@torch.no_grad()
def test_what_is_observed_are_the_groups_channels(name: str) -> None:
    model, images = randomize(MODELS[name][0]()), torch.randn(2, 3, 32, 32)
    groups = derive_groups(model, images)
    with observed(model, {group.activation for group in groups}) as seen:
        model(images)
    for group in groups:
        assert len(seen[group.activation]) == group.size
        assert seen[group.activation].std() > 0


@torch.no_grad()
def test_the_input_of_attentions_output_layer_is_observed() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    tokens = torch.randn(3, 5, 8)
    with observed(Wrapped(attention), ["inner.out_proj"]) as seen:
        output, _ = attention(tokens, tokens, tokens)
    torch.testing.assert_close(attention.out_proj(seen["inner.out_proj"].T).view(3, 5, 8), output)


def test_heads_and_groups_are_known() -> None:
    groups = derive_groups(MODELS["open_clip vit"][0](), torch.zeros(1, 3, 32, 32))
    assert [group.heads for group in groups] == [1, 4, 1, 4, 1]
    groups = derive_groups(MODELS["torchvision resnet18 with GroupNorm"][0](), torch.zeros(1, 3, 32, 32))
    assert {group.heads for group in groups} == {32}


class Branches(nn.Module):
    """Does what its data say."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        images = self.conv(images)
        return images if images.sum() > 0 else -images


class Wrapped(nn.Module):
    """A module around another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.inner(images)
        return result


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (vision.resnext50_32x4d, r"layer1\.0\.conv2 \(Conv2d\) is in the way: it convolves 32 groups"),
        (vision.vgg11, r"the model \(VGG\) is in the way: it takes 512 channels apart"),
        (lambda: timm.create_model("convnext_atto"), r"stem\.1 \(LayerNorm2d\) is in the way: it does not normalise"),
        (lambda: Wrapped(Branches()), r"inner cannot be traced"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.PixelShuffle(2)), r"1 \(PixelShuffle\) is in the way: pixel_sh"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 1)),
            r"the channels of 0\.weight come in groups of different numbers, \[2, 4\]",
        ),
    ],
)
def test_a_model_that_cannot_be_followed_says_where(model: Callable[[], nn.Module], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        derive_groups(model(), torch.zeros(1, 3, 64, 64))


@torch.no_grad()
def test_families_know_their_groups(tmp_path: Path) -> None:
    tiny.write_models(tmp_path)
    clip = find_family("clip", str(tmp_path / "config.json"))
    states = {"clip": load_file(tmp_path / "base.safetensors")}
    taskonomy = find_family("taskonomy", "slim")
    assert isinstance(taskonomy, TaskonomyFamily)
    states["taskonomy"] = randomize(taskonomy.encoder()).state_dict()
    images = {"clip": torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), "taskonomy": torch.randn(2, 3, 64, 64)}
    for family in (clip, taskonomy):
        bank = ModelBank.build(None, {"a": family.tower(states[family.name])})
        skeleton = family.skeleton(bank, "cpu")
        groups = family.permutation_groups(skeleton)
        skeleton.flat.copy_(bank.task_vectors[0])
        before = skeleton(images[family.name])
        bank.layout.flatten(permuted(groups, bank.layout.views(bank.task_vectors[0])), out=skeleton.flat)
        torch.testing.assert_close(skeleton(images[family.name]), before, rtol=1e-3, atol=1e-4)
        statistics = ActivationStatistics(skeleton, skeleton.flat, bank, groups, [images[family.name]])
        assert statistics.correlation(groups.groups[0]).shape == (groups.groups[0].size,) * 2
        assert groups.own == {name for name in bank.layout.names if name.startswith("compress")}
    with pytest.raises(SpecError, match="the family 'flan_t5' has no permutation groups"):
        Family.permutation_groups(FlanT5Family.__new__(FlanT5Family), skeleton)

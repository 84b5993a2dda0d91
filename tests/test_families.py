"""The CLIP family: skeletons over a flat buffer, zero-shot heads, and the names of other libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

from merge_ray.bank import Layout
from merge_ray.errors import CheckpointError, SpecError
from merge_ray.families import Family, Skeleton, find_family, head_from_state
from merge_ray.families.clip import ClipFamily
from merge_ray.families.words import WordTokenizer

WORDS = ["a", "photo", "of", "red", "blue", "b", "i", "r", "d"]
VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
TEXT = {"context_length": 8, "vocab_size": len(WORDS) + 3, "width": 16, "heads": 2, "layers": 1}
CONFIG = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT, "merge_ray": {"vocabulary": WORDS}}


@pytest.fixture
def config(tmp_path: Path) -> str:
    """The location of a tiny architecture."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


@pytest.fixture
def family(config: str) -> ClipFamily:
    return ClipFamily(config)


@pytest.fixture
def huggingface() -> CLIPModel:
    """A tiny transformers CLIP with weights large enough that a misplaced tensor shows."""
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**width, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49, "projection_dim": 24}
    vision = {**width, "image_size": 16, "patch_size": 8, "projection_dim": 24}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model


def fill(family: Family, state: dict[str, Tensor], names: set[str] | None = None) -> Skeleton:
    """A skeleton with ``state`` in its flat buffer, or only ``names`` of it and the rest as extras."""
    merged = {name: tensor for name, tensor in state.items() if names is None or name in names}
    layout = Layout.of(merged)
    extras = {name: tensor for name, tensor in state.items() if name not in merged}
    skeleton = family.assemble(layout, extras, "cpu")
    skeleton.flat.copy_(layout.flatten(merged))
    return skeleton


def images(count: int = 3, size: int = 16) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def normalize(batch: Tensor) -> Tensor:
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    return (batch / 255 - mean) / std


def test_skeleton_gives_the_features_of_open_clip(family: ClipFamily) -> None:
    model = family.build().eval()
    batch = images()
    expected = model.encode_image(normalize(batch), normalize=True)
    torch.testing.assert_close(fill(family, family.tower(model.state_dict()))(batch), expected, atol=1e-6, rtol=0)


def test_writing_into_flat_changes_the_model_at_once(family: ClipFamily) -> None:
    first, second = (family.tower(family.build().state_dict()) for _ in range(2))
    skeleton, batch = fill(family, first), images()
    before = skeleton(batch)
    skeleton.flat.copy_(skeleton.layout.flatten(second))
    assert (skeleton(batch) - before).abs().max() > 0.01
    torch.testing.assert_close(skeleton(batch), fill(family, second)(batch), atol=0, rtol=0)


def test_a_text_tower_in_the_layout_only_takes_its_place(family: ClipFamily) -> None:
    state, batch = dict(family.build().state_dict()), images()
    skeleton = fill(family, state)
    assert skeleton.flat.numel() == sum(tensor.numel() for tensor in state.values())
    torch.testing.assert_close(skeleton(batch), fill(family, family.tower(state))(batch))


def test_tensors_outside_the_layout_come_from_the_extras(family: ClipFamily) -> None:
    state, batch = family.tower(family.build().state_dict()), images()
    part = fill(family, {**state, "visual.proj": state["visual.proj"].half().float()}, set(state) - {"visual.proj"})
    assert part.flat.numel() == sum(tensor.numel() for tensor in state.values()) - 32 * 24
    torch.testing.assert_close(part(batch), fill(family, state)(batch), atol=1e-3, rtol=0)


def test_weights_that_do_not_fit_are_listed(family: ClipFamily) -> None:
    state = family.tower(family.build().state_dict())
    state["visual.ln_post.bias"] = torch.zeros(31)
    del state["visual.proj"]
    with pytest.raises(CheckpointError) as error:
        fill(family, state)
    assert "visual.proj (32, 24) is missing" in str(error.value)
    assert "visual.ln_post.bias is (31,), the architecture has (32,)" in str(error.value)


def test_image_encoder_has_weights_of_its_own(family: ClipFamily) -> None:
    state, batch = family.build().state_dict(), images()
    encoder = family.image_encoder(state, "cpu")
    torch.testing.assert_close(encoder(batch), fill(family, family.tower(state))(batch), atol=1e-6, rtol=0)
    before = state["visual.proj"].clone()
    encoder.tower.get_parameter("proj").data.add_(1)
    assert state["visual.proj"].equal(before)


def test_head_is_the_scaled_mean_of_the_prompts(family: ClipFamily) -> None:
    model = family.build().eval()
    templates = ["a photo of a {}", "a {}"]
    head = family.head(model.state_dict(), ["red", "blue"], templates)
    rows = []
    for name in ("red", "blue"):
        tokens = family.tokenize([template.format(name) for template in templates])
        mean = model.encode_text(tokens, normalize=True).mean(dim=0)
        rows.append(mean / mean.norm() * model.logit_scale.exp())
    torch.testing.assert_close(head, torch.stack(rows), atol=1e-5, rtol=0)
    assert head.shape == (2, 24) and not head.requires_grad


def test_head_needs_the_text_tower(family: ClipFamily) -> None:
    with pytest.raises(CheckpointError, match="zero-shot heads need the text tower"):
        family.head(family.tower(family.build().state_dict()), ["red"], ["{}"])


def test_words_outside_the_vocabulary_are_spelled() -> None:
    tokens = WordTokenizer(WORDS, context_length=8)(["A photo, of a bird?", "a a a a a a a a a"])
    end = len(WORDS) + 2
    assert tokens[0].tolist() == [1, 2, 3, 4, 2, 7, 8, end]
    assert tokens[1].tolist() == [1, 2, 2, 2, 2, 2, 2, end]


def test_saved_heads_are_read() -> None:
    weight = torch.randn(4, 6)
    assert head_from_state({"weight": weight.half(), "bias": torch.zeros(4)}).dtype == torch.float32
    with pytest.raises(CheckpointError, match="'bias' of this one is not zero"):
        head_from_state({"weight": weight, "bias": torch.ones(4)})
    with pytest.raises(CheckpointError, match=r"this one has \['a', 'b'\]"):
        head_from_state({"a": weight, "b": weight})


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16", "ViT-L-14"])
def test_named_architectures_build_without_weights(name: str) -> None:
    family = find_family("clip", name)
    assert isinstance(family, ClipFamily)
    with torch.device("meta"):
        model = family.build()
    tower = family.tower(model.state_dict())
    skeleton_size = {"ViT-B-32": 87_849_216, "ViT-B-16": 86_192_640, "ViT-L-14": 303_966_208}
    assert sum(tensor.numel() for tensor in tower.values()) == skeleton_size[name.removesuffix("-quickgelu")]
    assert family.preprocessing.key == "224-bicubic"
    tokens = family.tokenize(["a photo of a cat."])
    assert tokens[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 269, 49407]


def test_wrappers_and_constant_buffers_are_removed(family: ClipFamily) -> None:
    state = family.build().state_dict()
    wrapped: dict[str, Any] = {f"image_encoder.model.{name}": tensor for name, tensor in state.items()}
    wrapped["image_encoder.model.attn_mask"] = torch.full((8, 8), float("-inf"))
    wrapped["classification_head.weight"] = torch.zeros(2, 24)
    assert set(family.rename(wrapped)) == set(state)


def test_transformers_models_give_the_same_features(huggingface: CLIPModel, tmp_path: Path) -> None:
    huggingface.save_pretrained(tmp_path)
    family = ClipFamily(str(tmp_path))
    state = family.rename(huggingface.state_dict())
    batch, tokens = images(), torch.tensor([[48, 3, 5, 7, 49, 0, 0, 0], [48, 30, 2, 49, 0, 0, 0, 0]])
    with torch.no_grad():
        expected = huggingface(input_ids=tokens, pixel_values=normalize(batch))
    torch.testing.assert_close(fill(family, state)(batch), expected.image_embeds, atol=1e-5, rtol=0)
    text = family.load(state).encode_text(tokens, normalize=True)
    torch.testing.assert_close(text, expected.text_embeds, atol=1e-5, rtol=0)


def test_transformers_weights_survive_the_round_trip(huggingface: CLIPModel, tmp_path: Path) -> None:
    huggingface.save_pretrained(tmp_path)
    family = ClipFamily(str(tmp_path))
    weights, config = family.export_huggingface(family.rename(huggingface.state_dict()), "CLIPModel")
    again = CLIPModel(CLIPConfig.from_dict(config))
    again.load_state_dict(weights, strict=True)
    for name, tensor in huggingface.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, atol=0, rtol=0)
    assert config["vision_config"]["hidden_act"] == "quick_gelu"
    assert config["text_config"]["eos_token_id"] == 49


@pytest.mark.parametrize("model", [CLIPVisionModel, CLIPVisionModelWithProjection])
def test_vision_only_transformers_models_load_what_was_exported(
    huggingface: CLIPModel, tmp_path: Path, model: type[Any]
) -> None:
    huggingface.save_pretrained(tmp_path / "both")
    family = ClipFamily(str(tmp_path / "both"))
    state, batch = family.rename(huggingface.state_dict()), images()
    weights, config = family.export_huggingface(state, model.__name__)
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(weights, tmp_path / "vision" / "model.safetensors", {"format": "pt"})
    loaded, report = model.from_pretrained(tmp_path / "vision", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    vision_family = ClipFamily(str(tmp_path / "vision"))
    back = vision_family.rename(loaded.state_dict())
    # A model without a projection takes the base's.
    skeleton = fill(vision_family, {"visual.proj": state["visual.proj"], **back}, set(back))
    torch.testing.assert_close(skeleton(batch), fill(family, state)(batch), atol=1e-6, rtol=0)


def test_exports_say_what_they_cannot_name(family: ClipFamily, huggingface: CLIPModel) -> None:
    with pytest.raises(CheckpointError, match="did you mean 'CLIPVisionModel'"):
        family.export_huggingface({}, "ClipVisionModel")
    with pytest.raises(CheckpointError, match=r"'visual\.gate' has no counterpart in transformers"):
        family.export_huggingface({"visual.gate": torch.zeros(1)}, "CLIPModel")
    state = dict(huggingface.state_dict())
    with pytest.raises(CheckpointError, match=r"'vision_model\.gate' is not a tensor of a transformers CLIP model"):
        family.rename({**state, "vision_model.gate": torch.zeros(1)})
    del state["vision_model.encoder.layers.0.self_attn.k_proj.bias"]
    with pytest.raises(CheckpointError, match=r"in_proj_bias: of the query, key and value .* only \['q', 'v'\]"):
        family.rename(state)


def test_the_exported_open_clip_config_builds_the_same_architecture(family: ClipFamily, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps(family.open_clip_config()))
    again = ClipFamily(str(tmp_path))
    assert again.tokenize(["a bird"]).equal(family.tokenize(["a bird"]))
    state = family.build().state_dict()
    again.load(state)


def test_mistakes_in_an_architecture_are_explained(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="unknown family 'clipp'; did you mean 'clip'"):
        find_family("clipp", "ViT-B-32")
    with pytest.raises(SpecError, match=r"unknown CLIP architecture 'ViT-B32'.* did you mean 'ViT-B-32'"):
        find_family("clip", "ViT-B32")
    path = tmp_path / "config.json"
    for config, message in [
        ("{", "not a JSON file"),
        (json.dumps({"embed_dim": 3}), "it has no 'vision_cfg'"),
        (json.dumps({**CONFIG, "merge_ray": {"vocabulary": ["a"]}}), "the vocabulary of 1 words needs 4"),
        (json.dumps({"model_type": "bert"}), "model_type 'bert' is not CLIP"),
    ]:
        path.write_text(config)
        with pytest.raises(SpecError, match=message):
            find_family("clip", str(path))

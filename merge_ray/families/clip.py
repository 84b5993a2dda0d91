"""CLIP: open_clip's architectures, by name or by config, and transformers' CLIP models."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from merge_ray.bank import Layout
from merge_ray.checkpoints import nothing, open_location
from merge_ray.errors import CheckpointError, SpecError, choose_from
from merge_ray.families.base import Skeleton, register_family
from merge_ray.families.clip_names import is_of_text, to_huggingface, to_open_clip
from merge_ray.families.images import ImageEncoder, ImageFamily, ImageSkeleton, Preprocessing, load_tower
from merge_ray.families.words import WordTokenizer

IMAGE_TOWER = "visual."
PROMPTS_PER_BATCH = 256
ACTIVATIONS = {"quick_gelu": True, "gelu": False}


@register_family("clip")
class ClipFamily(ImageFamily):
    """A CLIP model, native in open_clip's layout.

    architecture: one of open_clip's names (``ViT-B-32``; OpenAI's weights need ``ViT-B-32-quickgelu``), or the
    location of a JSON config: open_clip's (with or without ``model_cfg`` and ``preprocess_cfg`` around it), or
    the ``config.json`` of a transformers CLIP model, or a directory that holds one of them.
    A config may carry ``"merge_ray": {"vocabulary": [words]}`` to use :class:`WordTokenizer` instead of CLIP's
    own tokenizer; ``text_cfg.vocab_size`` is then three more than the words.

    Nothing is downloaded for an architecture. Raises :class:`SpecError` when it is unknown or does not fit.
    """

    huggingface_model = "CLIPModel"

    def __init__(self, architecture: str) -> None:
        super().__init__(architecture)
        config = _read_config(architecture)
        self._model: dict[str, Any] = config.get("model_cfg", config)
        self._preprocess: dict[str, Any] = config.get("preprocess_cfg", {})
        self._vocabulary: list[str] | None = config.pop("merge_ray", {}).get("vocabulary")
        for part in ("embed_dim", "vision_cfg", "text_cfg"):
            if part not in self._model:
                raise SpecError(f"{architecture}: not a CLIP config; it has no {part!r}")
        size = self._model["text_cfg"].get("vocab_size")
        if self._vocabulary is not None and size != len(self._vocabulary) + WordTokenizer.SPECIAL:
            raise SpecError(
                f"{architecture}: text_cfg.vocab_size is {size}; "
                f"the vocabulary of {len(self._vocabulary)} words needs {len(self._vocabulary) + WordTokenizer.SPECIAL}"
            )

    @property
    def preprocessing(self) -> Preprocessing:
        """open_clip's: resize and centre crop, bicubic, and OpenAI's mean and std unless the config has others."""
        return Preprocessing(
            size=int(self._model["vision_cfg"].get("image_size", 224)),
            interpolation=self._preprocess.get("interpolation", "bicubic"),
            mean=tuple(self._preprocess.get("mean", open_clip.OPENAI_DATASET_MEAN)),
            std=tuple(self._preprocess.get("std", open_clip.OPENAI_DATASET_STD)),
        )

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :func:`merge_ray.families.clip_names.to_open_clip`."""
        return to_open_clip(state)

    def is_of_encoder(self, name: str) -> bool:
        """All but the text tower."""
        return not is_of_text(name)

    def tower(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under ``visual.``."""
        return {name: tensor for name, tensor in state.items() if name.startswith(IMAGE_TOWER)}

    def activation_bytes(self, batch_size: int) -> int:
        """Float32 images twice; and of a block of the tower what is there at once: its MLP's, six of its width."""
        vision, size = self._model["vision_cfg"], self.preprocessing.size
        images, width = 2 * 3 * size**2, vision.get("width", 768)
        if isinstance(vision.get("layers", 12), list):
            # A residual network: four maps after the stem, at half the size.
            return 4 * batch_size * (images + 4 * width * (size // 2) ** 2)
        tokens = (size // vision.get("patch_size", 16)) ** 2 + 1
        return 4 * batch_size * (images + int(tokens * width * (2 * vision.get("mlp_ratio", 4.0) + 6)))

    def assemble(self, layout: Layout, extras: Mapping[str, Tensor], device: torch.device | str) -> Skeleton:
        """The image tower over a zeroed flat buffer; no text tower is built."""
        return ImageSkeleton(self._tower(), self.preprocessing, layout, extras, device, prefix=IMAGE_TOWER)

    def image_encoder(self, state: Mapping[str, Tensor], device: torch.device | str) -> ImageEncoder:
        """The image tower with a copy of the weights under ``visual.``."""
        encoder = self._tower()
        copies = {name: tensor.clone() for name, tensor in self.tower(state).items()}
        load_tower(encoder, copies, IMAGE_TOWER, device)
        return ImageEncoder(encoder, self.preprocessing, device, IMAGE_TOWER)

    def _tower(self) -> nn.Module:
        with _UninitializedWeights():
            tower: nn.Module = self.build().visual
        return tower

    def build(self) -> Any:
        """A new model of both towers, with random weights from torch's generator, on the CPU."""
        config = copy.deepcopy(self._model)
        config["vision_cfg"].pop("timm_model_pretrained", None)
        if "hf_model_name" in config["text_cfg"]:
            config["text_cfg"]["hf_model_pretrained"] = False
        custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
        return open_clip.CustomTextCLIP(**config) if custom else open_clip.CLIP(**config)

    def load(self, state: Mapping[str, Tensor]) -> Any:
        """A model of both towers with the weights of ``state`` (native names), float32.

        Raises :class:`CheckpointError` naming what is missing, such as the text tower of a vision-only model.
        """
        with _UninitializedWeights():
            model = self.build()
        wanted = model.state_dict()
        missing = [name for name in wanted if name not in state]
        if missing:
            raise CheckpointError(
                f"the base weights lack {len(missing)} of the {len(wanted)} tensors of {self.architecture}, such as "
                f"{', '.join(missing[:3])}; zero-shot heads need the text tower (saved heads can be given instead)"
            )
        model.load_state_dict({name: state[name].to(wanted[name].dtype) for name in wanted}, assign=True)
        return model.eval().requires_grad_(False)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokens int64 ``[len(texts), context]``, with the config's vocabulary or CLIP's own."""
        text = self._model["text_cfg"]
        context = text.get("context_length", 77)
        if self._vocabulary is not None:
            return WordTokenizer(self._vocabulary, context)(texts)
        if open_clip.get_model_config(self.architecture) is not None:
            return open_clip.get_tokenizer(self.architecture)(list(texts))
        tokenizer = open_clip.SimpleTokenizer(context_length=context)
        if text.get("vocab_size", tokenizer.vocab_size) != tokenizer.vocab_size:
            raise SpecError(
                f"{self.architecture}: its text tower knows {text['vocab_size']} tokens, CLIP's tokenizer "
                f"{tokenizer.vocab_size}; the config needs a vocabulary of its own (merge_ray.vocabulary)"
            )
        return tokenizer(list(texts))

    @torch.no_grad()
    def head(
        self,
        base_state: Mapping[str, Tensor],
        classes: Sequence[str],
        templates: Sequence[str],
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """The zero-shot head ``[C, D]`` of CLIP (arXiv:2103.00020, section 3.1.4), scaled by its temperature.

        A class's row is the normalised mean, over ``templates`` (``"a photo of a {}."``), of the normalised
        text features, times ``exp(logit_scale)``.
        """
        model = self.load(base_state)
        tokens = self.tokenize([template.format(name) for name in classes for template in templates])
        tokens = _shorten(model, tokens)
        features = []
        for start in range(0, len(tokens), PROMPTS_PER_BATCH):
            features.append(model.encode_text(tokens[start : start + PROMPTS_PER_BATCH], normalize=True))
            if progress is not None:
                progress(min(start + PROMPTS_PER_BATCH, len(tokens)), len(tokens))
        means = torch.cat(features).view(len(classes), len(templates), -1).mean(dim=1)
        return functional.normalize(means, dim=-1) * model.logit_scale.exp()

    def open_clip_config(self) -> dict[str, Any]:
        """The content of an ``open_clip_config.json`` that goes with this architecture's weights."""
        config = {"model_cfg": self._model, "preprocess_cfg": self._preprocess}
        if self._vocabulary is not None:
            config["merge_ray"] = {"vocabulary": self._vocabulary}
        return copy.deepcopy(config)

    def export_huggingface(self, state: Mapping[str, Tensor], model: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and ``config.json`` of transformers' ``model`` (such as ``CLIPModel``) from native weights."""
        activation = "quick_gelu" if self._model.get("quick_gelu") else "gelu"
        vision, text = self._model["vision_cfg"], self._model["text_cfg"]
        vision_config = _huggingface_tower(vision, 768, activation) | {
            "num_attention_heads": vision.get("width", 768) // vision.get("head_width", 64),
            "image_size": self.preprocessing.size,
            "patch_size": vision.get("patch_size", 16),
            "projection_dim": self._model["embed_dim"],
        }
        text_config = _huggingface_tower(text, 512, activation) | {
            "num_attention_heads": text.get("heads", 8),
            "max_position_embeddings": text.get("context_length", 77),
            "vocab_size": text.get("vocab_size", 49408),
            "projection_dim": self._model["embed_dim"],
            "eos_token_id": text.get("vocab_size", 49408) - 1,
        }
        weights = to_huggingface(state, model)
        if model == "CLIPModel":
            towers = {"vision_config": vision_config, "text_config": text_config}
            config = {"model_type": "clip", "projection_dim": self._model["embed_dim"], **towers}
        else:
            config = {"model_type": "clip_vision_model", **vision_config}
        return weights, {"architectures": [model], **config}


class _UninitializedWeights(TorchFunctionMode):
    """Leaves out the random numbers of new modules, which are most of the time of building a large one.

    What modules compute without drawing (masks, sinusoidal tables) stays, unlike on the meta device.
    """

    DRAWS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _shorten(model: Any, tokens: Tensor) -> Tensor:
    """Cut padding off ``tokens``, and the model to fit: causal attention never looks at what follows the end.

    Other text towers (bidirectional, or pooling elsewhere) are left as they are.
    """
    if not isinstance(model, open_clip.CLIP) or model.attn_mask is None or model.text_pool_type != "argmax":
        return tokens
    length = int(tokens.argmax(dim=1).max()) + 1
    model.positional_embedding = nn.Parameter(model.positional_embedding[:length], requires_grad=False)
    model.attn_mask = model.attn_mask[:length, :length]
    return tokens[:, :length]


def _read_config(architecture: str) -> dict[str, Any]:
    """The JSON config that ``architecture`` names, in open_clip's terms."""
    named = open_clip.get_model_config(architecture)
    if named is not None:
        return {"model_cfg": named}
    is_location = architecture.endswith(".json") or "://" in architecture or architecture.startswith("builtin:")
    if not is_location and not Path(architecture).exists():
        names = open_clip.list_models()
        near = difflib.get_close_matches(architecture, names, n=8, cutoff=0.3) or names
        valid = choose_from(architecture, near)
        raise SpecError(f"unknown CLIP architecture {architecture!r}, nor is there such a file; {valid}")
    path = open_location(architecture, nothing)
    if path.is_dir():
        files = [path / name for name in ("open_clip_config.json", "config.json") if (path / name).exists()]
        if not files:
            raise SpecError(f"{architecture}: no open_clip_config.json or config.json in this directory")
        path = files[0]
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise SpecError(f"{architecture}: not a JSON file: {error}") from error
    return _from_transformers(architecture, config) if "model_type" in config else config


def _from_transformers(architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    """open_clip's config for a transformers CLIP model's; a vision-only one gets open_clip's default text tower."""
    from transformers import CLIPConfig, CLIPVisionConfig

    vision: Any
    text: Any
    if config["model_type"] == "clip":
        both = CLIPConfig.from_dict(config)
        vision, text, embed_dim = both.vision_config, both.text_config, both.projection_dim
    elif config["model_type"] == "clip_vision_model":
        vision, text = CLIPVisionConfig.from_dict(config), None
        embed_dim = vision.projection_dim
    else:
        raise SpecError(
            f"{architecture}: model_type {config['model_type']!r} is not CLIP; "
            f"{choose_from(config['model_type'], ['clip', 'clip_vision_model'])}"
        )
    if vision.hidden_act not in ACTIVATIONS:
        valid = choose_from(vision.hidden_act, ACTIVATIONS)
        raise SpecError(f"{architecture}: no hidden_act {vision.hidden_act!r} here; {valid}")
    vision_cfg = _open_clip_tower(vision) | {
        "head_width": vision.hidden_size // vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
    }
    text_cfg = {}
    if text is not None:
        text_cfg = _open_clip_tower(text) | {
            "heads": text.num_attention_heads,
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
        }
    model = {"embed_dim": embed_dim, "quick_gelu": ACTIVATIONS[vision.hidden_act]}
    return {"model_cfg": {**model, "vision_cfg": vision_cfg, "text_cfg": text_cfg}}


def _open_clip_tower(config: Any) -> dict[str, Any]:
    return {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "norm_kwargs": {"eps": config.layer_norm_eps},
    }


def _huggingface_tower(config: Mapping[str, Any], default_width: int, activation: str) -> dict[str, Any]:
    width = config.get("width", default_width)
    return {
        "hidden_size": width,
        "intermediate_size": int(width * config.get("mlp_ratio", 4.0)),
        "num_hidden_layers": config.get("layers", 12),
        "hidden_act": activation,
        "layer_norm_eps": (config.get("norm_kwargs") or {}).get("eps", 1e-5),
    }

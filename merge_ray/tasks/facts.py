"""What is known beforehand about the papers' twenty data sets: class names, prompt templates, lists of tasks.

Those of the text tasks of GLUE (Wang et al. 2019) are in ``names/glue.json``: ``prompt``, over the columns of the
data set's files on the Hugging Face hub, and ``classes``, the answers in the order of the labels; STS-B's similarities
are answered in steps of 0.2, as T5 does.

The facts of images are data, one JSON file per data set in ``names/``: ``classes``, the words that the papers put
into the prompts, in the order of the labels; ``labels``, the data set's own names of the same classes, where they
differ; and ``templates``. They are those of CLIP (Radford et al. 2021) as used by the task-arithmetic line of work.
CLIP gives FER2013 several words per class; here it is the first one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

# AdaMerging's eight, and what the TALL-mask paper adds to them for its fourteen and twenty.
_EIGHT = ("SUN397", "Cars", "RESISC45", "EuroSAT", "SVHN", "GTSRB", "MNIST", "DTD")
_FOURTEEN = (*_EIGHT, "CIFAR100", "STL10", "Flowers102", "OxfordIIITPet", "PCAM", "FER2013")
_TWENTY = (*_FOURTEEN, "EMNIST", "CIFAR10", "Food101", "FashionMNIST", "RenderedSST2", "KMNIST")
GLUE_TASKS = ("CoLA", "MNLI", "MRPC", "QNLI", "QQP", "RTE", "SST-2", "STS-B")
TASK_LISTS: dict[int | str, tuple[str, ...]] = {8: _EIGHT, 14: _FOURTEEN, 20: _TWENTY, "glue": GLUE_TASKS}
PAPER_TASKS = _TWENTY

DEFAULT_TEMPLATES = ("a photo of a {}.", "a photo of the {}.")


@dataclass(frozen=True)
class Facts:
    """The classes (words for prompts, in label order), their own labels in the data set, and the templates."""

    classes: tuple[str, ...]
    labels: tuple[str, ...]
    templates: tuple[str, ...]


@cache
def find_facts(name: str) -> Facts | None:
    """The facts of one of the twenty data sets, or None for any other name."""
    if name not in PAPER_TASKS:
        return None
    fields = json.loads(files(__package__).joinpath("names", f"{name}.json").read_text(encoding="utf-8"))
    classes = tuple(fields["classes"])
    return Facts(classes, tuple(fields.get("labels", classes)), tuple(fields["templates"]))


@dataclass(frozen=True)
class TextFacts:
    """What a text task of GLUE asks: a prompt over the columns of its files, and the answers in label order."""

    prompt: str
    classes: tuple[str, ...]


@cache
def find_text_facts(name: str) -> TextFacts | None:
    """The facts of one of GLUE's tasks (``SST-2``, also as ``sst2`` or ``glue-sst2``), or None for any other name."""
    key = _squeeze(name).removeprefix("glue")
    task = next((task for task in GLUE_TASKS if _squeeze(task) == key), None)
    if task is None:
        return None
    facts = json.loads(files(__package__).joinpath("names", "glue.json").read_text(encoding="utf-8"))[task]
    return TextFacts(facts["prompt"], tuple(facts["classes"]))


def words_for(own_names: Sequence[str], facts: Facts | None) -> list[str]:
    """The words for the prompts, in the order in which a data set lists its classes.

    A data set's own names are looked up among the facts (labels and words, whatever the case and the punctuation).
    Where every name is found, the facts' words are taken in the data set's order; where its names are mere numbers,
    or at least half are found and all those in the facts' order, they are taken in the facts' order. Otherwise the data
    set's own names are used, with underscores as spaces.
    """
    own_words = [name.replace("_", " ") for name in own_names]
    if facts is None or len(own_names) != len(facts.classes):
        return own_words
    known = {_squeeze(name): word for name, word in zip(facts.classes, facts.classes, strict=True)}
    known |= {_squeeze(name): word for name, word in zip(facts.labels, facts.classes, strict=True)}
    found = [known.get(_squeeze(name)) for name in own_names]
    words = [word for word in found if word is not None]
    if len(set(words)) == len(own_names):
        return words
    in_order = all(word in (None, fact) for word, fact in zip(found, facts.classes, strict=True))
    numbered = list(own_names) == [str(label) for label in range(len(own_names))]
    if numbered or (in_order and 2 * len(words) >= len(own_names)):
        return list(facts.classes)
    return own_words


def _squeeze(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())

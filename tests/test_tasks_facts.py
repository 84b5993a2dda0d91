"""The facts about the papers' twenty data sets, and how they meet a data set's own class names."""

import pytest

from merge_ray.tasks import TASK_LISTS
from merge_ray.tasks.facts import PAPER_TASKS, Facts, find_facts, words_for

COUNTS = {
    "SUN397": 397, "Cars": 196, "RESISC45": 45, "EuroSAT": 10, "SVHN": 10, "GTSRB": 43, "MNIST": 10, "DTD": 47,
    "CIFAR100": 100, "STL10": 10, "Flowers102": 102, "OxfordIIITPet": 37, "PCAM": 2, "FER2013": 7, "EMNIST": 10,
    "CIFAR10": 10, "Food101": 101, "FashionMNIST": 10, "RenderedSST2": 2, "KMNIST": 10,
}  # fmt: skip


def facts_of(name: str) -> Facts:
    facts = find_facts(name)
    assert facts is not None
    return facts


def test_the_papers_lists() -> None:
    assert TASK_LISTS[20] == tuple(COUNTS)
    assert TASK_LISTS[14] == tuple(COUNTS)[:14]
    assert TASK_LISTS[8] == tuple(COUNTS)[:8]


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_counts_and_templates(name: str) -> None:
    facts = facts_of(name)
    assert len(facts.classes) == len(set(facts.classes)) == len(set(facts.labels)) == COUNTS[name]
    assert all(word == word.strip() and "_" not in word for word in facts.classes)
    assert facts.templates and all(template.count("{}") == 1 for template in facts.templates)


@pytest.mark.parametrize("name", ["SUN397", "DTD", "CIFAR100", "Food101", "RESISC45"])
def test_data_sets_that_number_their_classes_alphabetically(name: str) -> None:
    own = [word.replace(" ", "_") for word in facts_of(name).classes]
    assert own == sorted(own)


@pytest.mark.parametrize(
    "name, label, word",
    [
        ("SUN397", 0, "abbey"), ("SUN397", 396, "youth hostel"), ("Cars", 195, "smart fortwo Convertible 2012"),
        ("GTSRB", 14, "stop"), ("EuroSAT", 9, "lake or sea"), ("Flowers102", 0, "pink primrose"),
        ("OxfordIIITPet", 33, "Sphynx"), ("CIFAR100", 99, "worm"), ("DTD", 46, "zigzagged"), ("Food101", 76, "pizza"),
        ("FashionMNIST", 9, "Ankle boot"), ("KMNIST", 9, "wo"), ("FER2013", 3, "happy"), ("STL10", 7, "monkey"),
    ],
)  # fmt: skip
def test_known_labels(name: str, label: int, word: str) -> None:
    assert facts_of(name).classes[label] == word


def test_no_facts_for_other_names() -> None:
    assert find_facts("mnist") is None


def test_words_follow_the_data_sets_own_order() -> None:
    facts = facts_of("EuroSAT")
    own = list(reversed(facts.labels))
    assert words_for(own, facts) == list(reversed(facts.classes))


def test_numbers_mean_the_facts_order() -> None:
    facts = facts_of("GTSRB")
    assert words_for([str(label) for label in range(43)], facts) == list(facts.classes)


def test_half_of_the_names_in_order_is_enough() -> None:
    facts = facts_of("EuroSAT")
    own = [*facts.classes[:6], "w", "x", "y", "z"]
    assert words_for(own, facts) == list(facts.classes)
    swapped = [own[1], own[0], *own[2:]]
    assert words_for(swapped, facts) == swapped


def test_unknown_names_stay() -> None:
    facts = facts_of("STL10")
    own = [f"thing_{label}" for label in range(10)]
    assert words_for(own, facts) == [f"thing {label}" for label in range(10)]
    assert words_for(["tabby_cat", "dog"], None) == ["tabby cat", "dog"]

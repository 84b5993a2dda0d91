"""Whole merges of models without a common base, and batch-norm statistics, against recorded numbers (tests/golden)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from test_goldens import Case, load
from torch import Tensor, nn

from merge_ray.bank import ModelBank
from merge_ray.families.taskonomy_network import TaskonomyEncoder, Widths
from merge_ray.matching import (
    Group,
    Memberships,
    PermutationGroups,
    derive_groups,
    match_weights,
    weight_matching_similarity,
)
from merge_ray.matching.weight_space import visiting_orders
from merge_ray.methods.base import MergeCache, Merged, MergeInputs, make_method
from merge_ray.methods.mudsc import Mudsc
from merge_ray.statistics import ActivationStatistics

BRIEF: dict[str, dict[str, Any]] = {
    "pair_activation_zip": {"similarity": "activation"},
    "pair_weight_alignment": {"similarity": "weight", "matching": "permute"},
    "pair_dual_zip_fix_rate_03": {"fix_rate": 0.3},
    "pair_dual_zip_fix_rate_04": {"fix_rate": 0.4},
    "pair_dual_alignment_fix_rate_03": {"matching": "permute", "fix_rate": 0.3},
    "pair_dual_zip_low_a": {"a": 1e-4},
    "pair_dual_zip_cosine": {"weight_similarity": "cosine"},
    "pair_dual_zip_running_stats": {"running_statistics": "plain"},
    "pair_weight_zip_scaled_means": {"similarity": "weight", "running_statistics": "scaled_means"},
    "pair_dual_zip_no_input_side": {"input_side": False},
    "pair_no_matching": {"similarity": "weight", "matching": "identity"},
    "triple_activation_zip": {"similarity": "activation"},
    "triple_dual_zip": {},
    "triple_dual_alignment": {"matching": "permute"},
}
PUBLISHED = {
    "pair_activation_alignment": "_act_useperm",
    "pair_weight_zip": "",
    "pair_dual_alignment": "_act_iws_fs_useperm",
    "pair_dual_zip": "_act_iws_fs",
}
MUDSC: dict[str, dict[str, Any]] = {**BRIEF, **{name: {"suffix": suffix} for name, suffix in PUBLISHED.items()}}
ZIPIT: dict[str, dict[str, Any]] = {
    "pair_zip": {},
    "pair_zip_script": {"budget_owner": "following"},
    "pair_zip_small_budget": {"a": 0.3, "b": 0.125, "reduction": 0.5},
    "pair_permute": {"matching": "permute"},
    "pair_identity": {"matching": "identity"},
    "triple_zip": {"reduction": 2 / 3},
}


def widths(network: dict[str, Any]) -> Widths:
    planes, blocks, strides = (tuple(network[name]) for name in ("planes", "blocks", "strides"))
    return Widths(network["stem"], planes, blocks, strides, network["compress"])


@dataclass
class World:
    """The encoders of a case in a bank, and what matching them needs."""

    case: Case
    bank: ModelBank
    groups: PermutationGroups
    calibration: ActivationStatistics
    batches: list[Tensor]

    @classmethod
    def of(cls, case: Case) -> World:
        models: dict[str, dict[str, Tensor]] = {}
        for key, tensor in case.inputs.items():
            model, _, name = key.partition("/")
            if name.startswith("encoder."):
                models.setdefault(model, {})[name.removeprefix("encoder.")] = tensor
        encoder = TaskonomyEncoder(widths(case.parameters["network"]))
        own = [name for name in encoder.state_dict() if "compress" in name]
        groups = derive_groups(encoder, torch.zeros(1, 3, 32, 32), own=own)
        bank = ModelBank.build(None, models)
        batches = [case.inputs[key] for key in sorted(case.inputs) if key.startswith("images/")]
        flat = torch.zeros(bank.layout.size)
        for name, view in bank.layout.views(flat).items():
            path, _, leaf = name.rpartition(".")
            module = encoder.get_submodule(path)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(view, requires_grad=False)
            else:
                module._buffers[leaf] = view
        return cls(case, bank, groups, ActivationStatistics(encoder, flat, bank, groups, batches), batches)

    def inputs(self, cache: MergeCache | None = None, seed: int = 0) -> MergeInputs:
        resources = {"permutation_groups": self.groups, "calibration": self.calibration}
        return MergeInputs(self.bank, seed, cache=cache, resources=resources)

    def check_final(self, merged: Merged) -> None:
        """Every task's encoder; what later ones share with the first is recorded once."""
        first: dict[str, Tensor] = {}
        for index, task in enumerate(self.bank.tasks):
            out = torch.zeros(self.bank.layout.size)
            merged.write(task, out)
            got = self.bank.layout.unflatten(out)
            prefix = f"final/encoder{index}/"
            recorded = {key.removeprefix(prefix) for key in self.case.keys(prefix)}
            for name, tensor in got.items():
                if name in recorded:
                    self.case.check(prefix + name, tensor)
                else:
                    assert torch.equal(tensor, first[name]), name
            first = first or got
        for name, tensor in self.bank.extras.items():
            if not name.startswith("compress"):
                self.case.check(f"final/encoder0/{name}", tensor)

    def check_memberships(self, memberships: Memberships, prefix: str = "") -> None:
        for name, membership in memberships.items():
            assert torch.equal(membership.unmerge(), self.case.expected[f"{prefix}unmerge/{name}"]), name
            self.case.check(f"{prefix}merge/{name}", membership.merge())


@pytest.mark.parametrize("name", ["mudsc/pair_dual_zip", "zipit/triple_zip", "git_rebasin/pair"])
def test_groups_are_those_of_the_published_code(name: str) -> None:
    world = World.of(load(name))
    about = world.case.parameters.get("groups")
    if about is None:
        about = load("mudsc/triple_dual_zip").parameters["groups"]
    assert [group.name for group in world.groups] == list(about)
    for group in world.groups:
        members = about[group.name]["members"] if isinstance(about[group.name], dict) else about[group.name]
        assert {(m.axis, m.tensor) for m in group.members} == {(axis, tensor) for axis, tensor, *_ in members}
        if isinstance(about[group.name], dict):
            assert {(m.tensor, m.side) for m in group.members} == {(tensor, side) for _, tensor, side in members}


@pytest.mark.parametrize("name", MUDSC)
def test_mudsc(name: str) -> None:
    world = World.of(load(f"mudsc/{name}"))
    method, inputs = make_method("mudsc", MUDSC[name]), world.inputs()
    assert isinstance(method, Mudsc)
    if "act_corr/0" in world.case.expected:
        for group in world.groups:
            world.case.check(f"act_corr/{group.name}", world.calibration.correlation(group))
    memberships = method.memberships(inputs)
    world.check_memberships(memberships)
    world.check_final(method.merge(inputs))


@pytest.mark.parametrize("name", [name for name in MUDSC if "activation" not in name])
def test_mudsc_search(name: str) -> None:
    world = World.of(load(f"mudsc/{name}"))
    method, inputs = make_method("mudsc", MUDSC[name]), world.inputs()
    assert isinstance(method, Mudsc)
    first: dict[str, Tensor] = {}
    visits: list[int] = []
    similar = method.weights_similarity(inputs)

    def recorded(group: Group, memberships: Memberships) -> Tensor:
        visits.append(int(group.name))
        similarity = similar(group, memberships)
        first.setdefault(group.name, similarity)
        return similarity

    memberships, values = method.search(inputs, recorded)
    world.check_memberships(memberships)
    world.case.check("newL", np.array(values))
    world.case.check("iter_order", np.array(visits).reshape(len(values), -1))
    for group, similarity in first.items():
        if f"iter0_weight_corr/{group}" in world.case.expected:
            world.case.check(f"iter0_weight_corr/{group}", similarity)


@pytest.mark.parametrize("name", ZIPIT)
def test_zipit(name: str) -> None:
    world = World.of(load(f"zipit/{name}"))
    world.check_final(make_method("zipit", ZIPIT[name]).merge(world.inputs()))


def test_plain_average() -> None:
    world = World.of(load("mudsc/pair_plain_average"))
    out = torch.zeros(world.bank.layout.size)
    make_method("weight_average", {}).merge(world.inputs()).write("model0", out)
    for name, tensor in world.bank.layout.unflatten(out).items():
        # The family keeps compress1 per task.
        if name != "compress1.weight":
            world.case.check(f"final/encoder0/{name}", tensor)


@pytest.mark.parametrize("name", ["pair", "match_near_copies", "match_unrelated", "match_unrelated_seed3"])
def test_git_rebasin(name: str) -> None:
    world = World.of(load(f"git_rebasin/{name}"))
    case, seed = world.case, world.case.parameters["random_state"]
    first, second = (world.bank.layout.views(row) for row in world.bank.task_vectors)
    permutations, objectives = match_weights(first, second, world.groups, seed)
    for key, permutation in permutations.items():
        case.check(f"perm/{key}", permutation)
    orders = [order for order, _ in zip(visiting_orders(len(world.groups), seed), objectives, strict=False)]
    case.check("iter_order", np.array(orders))
    case.check("objective_old_new", np.array(objectives[:-1]))
    if "iter0_similarity/0" in case.expected:
        group = world.groups.groups[orders[0][0]]
        similarity = weight_matching_similarity(first, second, world.groups, group, {})
        case.check(f"iter0_similarity/{group.name}", similarity)
    if name == "pair":
        world.check_final(make_method("git_rebasin", {}).merge(world.inputs(seed=seed)))

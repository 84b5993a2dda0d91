"""Whole merges of models without a common base, and batch-norm statistics, against recorded numbers (tests/golden)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_goldens import Case, load
from torch import Tensor, nn

from merge_ray.bank import ModelBank
from merge_ray.errors import CheckpointError, DataError, ParameterError
from merge_ray.families.taskonomy_network import FullyConnectedDecoder, TaskonomyEncoder, TaskonomyNetwork, Widths
from merge_ray.matching import (
    Group,
    Member,
    Membership,
    Memberships,
    PermutationGroups,
    derive_groups,
    match_weights,
    weight_matching_similarity,
)
from merge_ray.matching.weight_space import visiting_orders
from merge_ray.merging import merge
from merge_ray.methods.base import (
    Merged,
    MergeInputs,
    check_parameter,
    find_method,
    make_method,
    parameter_fields,
)
from merge_ray.methods.merge_cache import MergeCache
from merge_ray.methods.mudsc import SUFFIXES, Mudsc
from merge_ray.statistics import ActivationStatistics, reset_batch_norm

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


@cache
def groups_of(network: Widths) -> PermutationGroups:
    encoder = TaskonomyEncoder(network)
    own = [name for name in encoder.state_dict() if "compress" in name]
    return derive_groups(encoder, torch.zeros(1, 3, 32, 32), own=own)


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
        network = widths(case.parameters["network"])
        encoder, groups = TaskonomyEncoder(network), groups_of(network)
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


@pytest.mark.parametrize(
    "name", ["pair_weight_zip", "pair_dual_alignment", "pair_dual_zip", "pair_no_matching", "triple_dual_zip"]
)
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


class Decoder(nn.Module):
    """The small decoder of the recorded networks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.LeakyReLU(0.2))
        self.decoder_output = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        answers: Tensor = self.decoder_output(self.conv2(codes))
        return answers


def networks(case: Case) -> list[TaskonomyNetwork]:
    about, models = case.parameters, []
    network = widths(about["network"])
    for index in range(about["n_models"]):
        decoder: nn.Module = Decoder()
        if about["mlp"]:
            decoder = FullyConnectedDecoder(5, replace(network, hidden=10, code_size=about["side"]))
        model = TaskonomyNetwork(TaskonomyEncoder(network), decoder).eval()
        prefix = f"model{index}/"
        state = {key.removeprefix(prefix): tensor for key, tensor in case.inputs.items() if key.startswith(prefix)}
        model.load_state_dict(
            {key if "coder." in key else f"decoder.{key}": tensor.clone() for key, tensor in state.items()}
        )
        models.append(model)
    return models


@pytest.mark.parametrize(
    "name", ["one_model", "two_models", "merged_models", "without_clearing", "fully_connected_decoder"]
)
def test_batch_norm_statistics_are_made_again(name: str) -> None:
    case = load(f"reset_bn/{name}")
    models = networks(case)
    batches = [case.inputs[key] for key in sorted(case.inputs) if key.startswith("images/")]

    def check_outputs(when: str) -> None:
        for index, model in enumerate(models):
            with torch.no_grad():
                case.check(f"output_{when}/{index}", model(batches[0]))

    check_outputs("before")
    reset_batch_norm(models, batches, clear=case.parameters["reset"])
    check_outputs("after")
    for index, model in enumerate(models):
        state = model.state_dict()
        for key in case.keys(f"model{index}/"):
            name = key.removeprefix(f"model{index}/")
            case.check(key, state[name if name in state else f"decoder.{name}"])
        assert not model.training
        assert {norm.momentum for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)} == {0.1}


class Calls:
    """Batches that say how often they were gone through."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches, self.count = batches, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.count += 1
        return iter(self.batches)


def test_the_networks_run_once_for_all_candidates() -> None:
    world, cache = World.of(load("mudsc/pair_dual_zip")), MergeCache(1 << 20)
    calls = Calls(world.batches)
    candidates: list[tuple[str, dict[str, Any]]] = [("mudsc", {"fix_rate": 0.3}), ("mudsc", {"fix_rate": 0.2})]
    candidates += [("zipit", {}), ("mudsc", {"suffix": "_act_useperm"})]
    world.calibration._batches = calls
    for name, parameters in candidates:
        make_method(name, parameters).merge(world.inputs(cache))
    assert calls.count == 1


MATCHING = ("mudsc", "zipit", "git_rebasin", "align_then_merge")


def merge_of(world: World, inputs: MergeInputs, name: str) -> Tensor:
    out = torch.zeros(world.bank.layout.size)
    make_method(name, {}).merge(inputs).write(world.bank.tasks[1], out)
    return out


def test_what_one_host_has_matched_another_need_not_match_again(tmp_path: Path) -> None:
    world = World.of(load("mudsc/pair_dual_zip"))
    wanted = {name: merge_of(world, world.inputs(MergeCache(1 << 20, tmp_path)), name) for name in MATCHING}
    world.calibration = ActivationStatistics(nn.Identity(), torch.zeros(0), world.bank, world.groups, [])
    for name in MATCHING:
        assert torch.equal(merge_of(world, world.inputs(MergeCache(1 << 20, tmp_path)), name), wanted[name])


@pytest.mark.parametrize("name", MATCHING)
def test_a_merge_is_made_again_from_its_artifacts(name: str) -> None:
    world = World.of(load("mudsc/pair_dual_zip"))
    artifacts = make_method(name, {}).merge(world.inputs()).artifacts()
    columns = {key.removeprefix("columns/"): value for key, value in artifacts.items() if key.startswith("columns/")}
    given = MergeInputs(world.bank, resources={"permutation_groups": world.groups, "columns": columns})
    assert torch.equal(merge_of(world, given, name), merge_of(world, world.inputs(), name))


@pytest.mark.gpu
@pytest.mark.parametrize("name", MATCHING)
def test_matching_on_a_gpu(name: str) -> None:
    world = World.of(load("mudsc/pair_dual_zip"))
    wanted = merge_of(world, world.inputs(), name)
    on_gpu = World.of(load("mudsc/pair_dual_zip"))
    on_gpu.bank = on_gpu.bank.to("cuda")
    calibration = {group.name: world.calibration.correlation(group).cuda() for group in world.groups}
    on_gpu.calibration.correlation = lambda group: calibration[group.name]  # type: ignore[method-assign]
    on_gpu.calibration.moments = world.calibration.moments
    torch.testing.assert_close(merge_of(on_gpu, on_gpu.inputs(), name), wanted, rtol=1e-4, atol=1e-5)


def test_both_ways_to_name_a_setting_are_one_candidate() -> None:
    for suffix, (similarity, matching) in SUFFIXES.items():
        named = make_method("mudsc", {"suffix": suffix})
        assert named == make_method("mudsc", {"similarity": similarity, "matching": matching})
        assert named == make_method("mudsc", named.parameters())
    assert make_method("mudsc", {}) == make_method("mudsc", {"suffix": "_act_iws_fs"})
    with pytest.raises(ParameterError, match="'_act_useperm' means activation and permute, not weight and perm"):
        make_method("mudsc", {"suffix": "_act_useperm", "similarity": "weight"})


def test_other_reductions_do_not_fit_the_architecture() -> None:
    world = World.of(load("zipit/pair_zip"))
    with pytest.raises(ParameterError, match=r"12 merged channels are left in group 0 of 8; .* a reduction of 1 - 1/2"):
        make_method("zipit", {"reduction": 0.25}).merge(world.inputs())


def test_no_activations_at_all_is_an_error() -> None:
    world = World.of(load("git_rebasin/pair"))
    world.calibration._batches = []
    with pytest.raises(DataError, match="there are no samples to observe activations on"):
        make_method("zipit", {}).merge(world.inputs())


def test_few_activations_leave_a_note() -> None:
    world = World.of(load("zipit/pair_zip"))
    world.calibration._batches = [world.batches[0][:1]]
    (note,) = make_method("zipit", {}).merge(world.inputs()).notes
    assert "too few activation samples in" in note and "the 32 channels that compress1 reads have 9 values" in note


def test_a_group_that_does_not_close_names_the_tensors() -> None:
    world = World.of(load("zipit/pair_zip"))
    broken = [
        Group("9", 8, (Member("conv1.weight", 0, "out"), Member("bn1.scale", 0, "out")), "conv1"),
        Group("10", 6, (Member("compress1.weight", 0, "in"), Member("conv1.weight", 0, "out")), "conv1"),
        Group("11", 9, (Member("bn1.weight", 0, "out"),), "conv1"),
    ]
    world.groups = PermutationGroups(tuple(broken))
    with pytest.raises(CheckpointError) as error:
        make_method("git_rebasin", {}).merge(world.inputs())
    assert "group 9: there is no tensor bn1.scale" in str(error.value)
    assert "group 10: axis 0 of conv1.weight is in group 9 too" in str(error.value)
    assert "group 11: bn1.weight [8] does not have its 9 channels along axis 0" in str(error.value)


def test_models_without_a_base_are_compared_with_each_other() -> None:
    first = {"x": torch.ones(2), "steps": torch.tensor(3)}
    bank = ModelBank.build(None, {"a": first, "b": {"x": torch.zeros(2), "steps": torch.tensor(6)}})
    assert not bank.base.any()
    assert bank.extras["steps"] == 4 and bank.extras["steps"].dtype == torch.int64
    with pytest.raises(CheckpointError, match=r"(?s)b: this model cannot be merged.*x: shape \[3\], in 'a' \[2\]"):
        ModelBank.build(None, {"a": first, "b": {"x": torch.zeros(3), "steps": torch.tensor(3)}})


ALIGNED: list[tuple[str, dict[str, Any]]] = [
    ("git_rebasin", {}),
    ("zipit", {"matching": "optimal"}),
    ("mudsc", {}),
    ("align_then_merge", {"similarity": "both"}),
    ("align_then_merge", {"method": "magnitude_mask", "options": {"density": 0.5}}),
]


def written(merged: Merged, bank: ModelBank) -> list[Tensor]:
    outs = [torch.zeros(bank.layout.size) for _ in bank.tasks]
    for task, out in zip(bank.tasks, outs, strict=True):
        merged.write(task, out)
    return outs


@pytest.mark.parametrize(("name", "parameters"), ALIGNED)
def test_matching_methods_keep_the_contracts(name: str, parameters: dict[str, Any]) -> None:
    world = World.of(load("zipit/pair_zip"))
    before, method, cache = world.bank.task_vectors.clone(), make_method(name, parameters), MergeCache(1 << 20)
    merged = method.merge(world.inputs(cache))
    first = written(merged, world.bank)
    for again in (method.merge(world.inputs(cache)), merged.resolved.merge(world.inputs())):
        assert all(torch.equal(one, two) for one, two in zip(first, written(again, world.bank), strict=True))
    assert torch.equal(world.bank.task_vectors, before)
    views = [world.bank.layout.views(out) for out in first]
    differing = {tensor for tensor in views[0] if not torch.equal(views[0][tensor], views[1][tensor])}
    if parameters.get("method") != "magnitude_mask":
        assert differing == {tensor for tensor in world.groups.own if tensor in views[0]}
        assert world.bank.model_bytes < merged.storage_bytes() < 2 * world.bank.model_bytes
    assert not merged.shared
    assert "columns/0" in merged.artifacts()


@pytest.mark.parametrize(("name", "parameters"), [*ALIGNED[:1], *ALIGNED[2:]])
def test_a_model_alone_stays_as_it_is(name: str, parameters: dict[str, Any]) -> None:
    world = World.of(load("zipit/pair_zip"))
    row = world.bank.task_vectors[:1].clone()
    world.bank.task_vectors, world.bank.tasks = row, ("model0",)
    (got,) = written(make_method(name, parameters).merge(world.inputs()), world.bank)
    torch.testing.assert_close(got, row[0], rtol=1e-4, atol=1e-6)


def test_aligned_copies_are_merged_into_the_first() -> None:
    world = World.of(load("git_rebasin/match_near_copies"))
    bank, generator = world.bank, torch.Generator().manual_seed(0)
    world.calibration._batches = [torch.randn(8, 3, 48, 48, generator=generator)]
    first = bank.layout.views(bank.task_vectors[0])
    shuffled = {
        group.name: Membership(torch.randperm(group.size, generator=generator)[None], group.size, epsilon=0.0)
        for group in world.groups
    }
    bank.layout.flatten(
        {name: world.groups.carry(name, tensor, 0, shuffled) for name, tensor in first.items()}, bank.task_vectors[1]
    )
    for similarity in ("weight", "activation", "both"):
        for method in ("weight_average", "ties"):
            aligned = make_method("align_then_merge", {"method": method, "similarity": similarity})
            (got, _) = written(aligned.merge(world.inputs()), bank)
            torch.testing.assert_close(got, bank.task_vectors[0], rtol=1e-4, atol=1e-5)


def test_a_flat_method_that_does_not_exist_or_needs_data_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"align_then_merge: method='adamerging' is not in \{finetuned"):
        make_method("align_then_merge", {"method": "adamerging"})
    with pytest.raises(ParameterError, match=r"ties has no parameter 'densty'"):
        make_method("align_then_merge", {"method": "ties", "options": {"densty": 0.2}})


@pytest.mark.parametrize("name", ["git_rebasin", "zipit", "mudsc", "align_then_merge"])
def test_defaults_and_searched_values_are_valid(name: str) -> None:
    method = find_method(name)
    for key, field in parameter_fields(method).items():
        assert check_parameter(method, key, field.default) is None
        for value in field.metadata["search"].grid() if field.metadata["search"] else []:
            assert check_parameter(method, key, value) is None


def test_merging_without_a_sweep() -> None:
    world = World.of(load("git_rebasin/pair"))
    models = dict(zip(world.bank.tasks, map(world.bank.layout.views, world.bank.task_vectors), strict=True))
    with pytest.raises(ParameterError, match="needs 'permutation_groups' data, and there is none here"):
        merge("git_rebasin", base=None, finetuned=models)
    result = merge("git_rebasin", base=None, finetuned=models, permutation_groups=world.groups)
    (want, _) = written(make_method("git_rebasin", {}).merge(world.inputs()), world.bank)
    assert torch.equal(result.flat("model0"), want)

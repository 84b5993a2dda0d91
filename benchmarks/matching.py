"""Matching channels: zipping against the published procedure, wide zips, and a whole MuDSC merge at full size."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from merge_ray.bank import ModelBank
from merge_ray.families import find_family
from merge_ray.families.taskonomy import TaskonomyFamily
from merge_ray.matching import ZipRule, correlation, zip_channels
from merge_ray.methods.base import MergeInputs, make_method
from merge_ray.statistics import ActivationStatistics


def naive_zip(similarity: Tensor, a: float = 0.5) -> Tensor:
    """Zip two models as the published code does, the whole matrix scanned and copied for every merge; ``[2 C, C]``."""
    matrix = similarity.clone().fill_diagonal_(-torch.inf)
    members = torch.eye(len(matrix))
    while members.shape[1] > len(similarity) // 2:
        i, j = sorted(divmod(int(matrix.argmax()), len(matrix)))
        members[:, i] += members[:, j]
        members = torch.cat([members[:, :j], members[:, j + 1 :]], dim=1)
        matrix[:, i] = torch.minimum(matrix[:, i], matrix[:, j]) * a
        matrix = torch.cat([matrix[:, :j], matrix[:, j + 1 :]], dim=1)
        matrix[i] = torch.minimum(matrix[i], matrix[j]) * a
        matrix = torch.cat([matrix[:j], matrix[j + 1 :]])
    return members


def similarity_of(channels: int) -> Tensor:
    """Correlations ``[2 C, 2 C]`` of the channels of two models that are half alike."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(channels, 500, generator=generator)
    second = first[torch.randperm(channels, generator=generator)] + torch.randn(channels, 500, generator=generator)
    return correlation(torch.cat([first, second]))


def seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """The shortest of a few runs."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def zips() -> None:
    """Print the times of zips, and of the naive one as a multiple."""
    # One thread: the published figures are of one core, and small operations do not gain from more.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # Within-model merges are never used up with b = 1, so the naive code leaves out their budget.
    rule = ZipRule()
    zip_channels(similarity_of(16), 2, rule)
    similarity = similarity_of(512)
    assert torch.equal(zip_channels(similarity, 2, rule)[0].unmerge(), naive_zip(similarity))
    naive = seconds(lambda: naive_zip(similarity), 1)
    ours = seconds(lambda: zip_channels(similarity, 2, rule))
    print(
        f"zip of 2 x 512: {1000 * ours:.1f} ms, the published way {naive:.2f} s: {naive / ours:.0f} times (bound: 100)"
    )
    for channels in (1024, 2048):
        similarity = similarity_of(channels)
        print(f"zip of 2 x {channels}: {seconds(partial(zip_channels, similarity, 2, rule)):.2f} s")
    torch.set_num_threads(threads)


def whole_merge(batches: int) -> None:
    """Print the time of MuDSC's dual zip of two Taskonomy encoders with random weights."""
    family = find_family("taskonomy", "full")
    assert isinstance(family, TaskonomyFamily)
    torch.manual_seed(0)
    bank = ModelBank.build(None, {name: family.encoder().state_dict() for name in "ab"})
    skeleton = family.skeleton(bank, "cpu")
    started = time.perf_counter()
    groups = family.permutation_groups(skeleton)
    print(f"groups: {len(groups)} in {time.perf_counter() - started:.1f} s")
    images = [torch.randn(4, 3, 256, 256) for _ in range(batches)]
    calibration = ActivationStatistics(skeleton, skeleton.flat, bank, groups, images)
    started = time.perf_counter()
    _ = calibration.moments
    observed = time.perf_counter() - started
    for suffix in ("_act_iws_fs", "_act_iws_fs_useperm"):
        started = time.perf_counter()
        resources = {"permutation_groups": groups, "calibration": calibration}
        make_method("mudsc", {"suffix": suffix}).merge(MergeInputs(bank, resources=resources))
        merged = time.perf_counter() - started
        print(
            f"MuDSC {suffix}: {merged:.0f} s, after {observed:.0f} s for the activations of {4 * batches} images "
            f"(bound: 300 s together)"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=8, help="batches of four images to observe activations on")
    arguments = parser.parse_args()
    zips()
    whole_merge(arguments.batches)

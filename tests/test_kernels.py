"""The compiled kernels against plain torch, and against the chunked path that accelerators take."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from merge_ray import kernels
from merge_ray.kernels import chunked, cpu, threads, thresholds


@pytest.fixture(params=["float", "grid", "sparse", "zero"])
def rows(request: pytest.FixtureRequest) -> Tensor:
    """Three tasks of 5001 columns: more than two blocks, and not a multiple of eight."""
    values = 0.01 * torch.randn(3, 5001) / torch.rand(3, 5001).sqrt()
    if request.param == "grid":
        values = (values * 256).round() / 256
    if request.param == "sparse":
        values[torch.rand(3, 5001) < 0.9] = 0
    return values * (request.param != "zero")


@pytest.fixture(params=[None, (0, 1, 1, 700, 2049, 5000, 5001)], ids=["model", "tensor"])
def bounds(request: pytest.FixtureRequest) -> np.ndarray | None:
    return None if request.param is None else np.array(request.param)


def published_threshold(row: Tensor, density: float) -> float:
    rank = len(row) - int(len(row) * density)
    return 0.0 if rank == 0 else float(row.abs().kthvalue(rank).values)


def published_ties(rows: Tensor, disjoint: str, positive_tie: bool) -> Tensor:
    """Elect and merge, of rows that are trimmed already, in a few lines of torch."""
    signs = rows.sum(0).sign()
    majority = signs.sum().sign()
    signs[signs == 0] = 1 if majority == 0 and positive_tie else majority
    chosen = torch.where(signs > 0, rows.clamp_min(0), rows.clamp_max(0))
    if disjoint == "max":
        return chosen.abs().amax(0) * signs
    return chosen.sum(0) / ((chosen != 0).sum(0).clamp_min(1) if disjoint == "mean" else 1)


def test_thresholds_are_exact(rows: Tensor, bounds: np.ndarray | None) -> None:
    ends = [0, rows.shape[1]] if bounds is None else bounds.tolist()
    spans = list(itertools.pairwise(ends))
    for density in (0.0, 0.001, 0.05, 0.2, 0.29, 0.57, 0.9, 1.0):
        want = torch.tensor([[published_threshold(row[start:stop], density) for start, stop in spans] for row in rows])
        assert torch.equal(kernels.trim_thresholds(rows, density, bounds), want)
        ranks = [kernels.threshold_rank(stop - start, density) for start, stop in spans]
        assert torch.equal(chunked.kth_magnitudes(rows, np.array(ends), ranks), want)


def test_rank_multiplies_in_double_precision() -> None:
    assert kernels.threshold_rank(100, 0.29) == 72  # 100 * 0.29 is 28.999999999999996
    assert kernels.threshold_rank(5, 1.0) == 0
    assert kernels.threshold_rank(5, 0.0) == 5


@pytest.mark.parametrize("kind", ["float", "grid", "half zero", "constant", "periodic", "two values"])
def test_thresholds_of_large_tensors_are_exact(kind: str) -> None:
    size = 3 * thresholds.SMALL
    row = torch.randn(size)
    if kind == "grid":
        row = (row * 32).round() / 32
    elif kind == "half zero":
        row[torch.rand(size) < 0.5] = 0
    elif kind == "constant":
        row = torch.full((size,), -0.5)
    elif kind == "periodic":
        # What the sample sees is not what there is: its stride always meets the small values.
        stride = round(0.7 * size ** (1 / 3)) | 1
        row[torch.arange(size) % stride == 0] *= 1e-3
    elif kind == "two values":
        row = torch.where(torch.rand(size) < 0.3, -1.0, 2.0)
    for density in (0.0, 0.001, 0.2, 0.5, 0.9, 0.999):
        want = published_threshold(row, density)
        assert float(kernels.trim_thresholds(row[None], density)) == want
        assert chunked.kth_magnitude(row, kernels.threshold_rank(size, density)) == want


def test_a_bracket_that_misses_or_overflows_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    row = torch.randn(2 * thresholds.SMALL)
    want = published_threshold(row, 0.2)
    for low, high in ((0.0, 1.0), (2.0, 3.0), (0.0, np.inf)):
        bracket = (np.float32(low), np.float32(high))
        monkeypatch.setattr(thresholds, "_bracket", lambda values, rank, bracket=bracket: bracket)
        assert float(kernels.trim_thresholds(row[None], 0.2)) == want


def test_trim_keeps_ties_and_everything_at_threshold_zero(rows: Tensor, bounds: np.ndarray | None) -> None:
    assert torch.equal(kernels.trim(rows, 1.0, bounds), rows)
    tied = torch.tensor([[1.0, -1.0, 0.5, 1.0, 0.0]])
    assert kernels.trim(tied, 0.2).tolist() == [[1.0, -1.0, 0.0, 1.0, 0.0]]


@pytest.mark.parametrize("disjoint", ["mean", "sum", "max"])
def test_disjoint_merge(
    rows: Tensor, bounds: np.ndarray | None, disjoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for density, positive_tie in itertools.product((0.0, 0.2, 0.9, 1.0), (False, True)):
        limits = kernels.trim_thresholds(rows, density, bounds)
        want = published_ties(kernels.trim(rows, density, bounds), disjoint, positive_tie)
        got = kernels.disjoint_merge(rows, limits, disjoint, kernels.vector(rows), bounds, positive_tie)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "_backend", lambda tensor: chunked)
            other = kernels.disjoint_merge(rows, limits, disjoint, torch.empty_like(got), bounds, positive_tie)
        assert torch.equal(got, other)


def test_the_number_of_threads_does_not_show() -> None:
    rows = torch.randn(3, 40 * threads.BLOCK + 5)
    base, merged, results = rows[0] * 2, rows.sum(0), []
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        limits = kernels.trim_thresholds(rows, 0.2)
        ties = kernels.disjoint_merge(rows, limits, "mean", kernels.vector(rows))
        sums = kernels.weighted_sum(rows, [0.3, 0.1, 0.2], kernels.vector(rows), base)
        bits = kernels.mask_bits("tall", [0.2, 0.3, 0.4], base, rows, merged)
        results.append([limits, ties, sums, bits])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("majority", "merged"), [(-1.0, -3.0), (1.0, 3.0)])
def test_columns_that_cancel_follow_the_majority(majority: float, merged: float) -> None:
    rows = torch.zeros(2, 6000)
    rows[0, 5990:5995] = majority
    rows[:, 3] = torch.tensor([3.0, -3.0])
    limits = torch.zeros(2, 1)
    out = kernels.disjoint_merge(rows, limits, "sum", torch.full((6000,), 9.0))
    assert float(out[3]) == merged
    signs = kernels.elect_sign(rows, limits)
    assert signs.dtype == torch.int8
    assert bool((signs == majority).all())
    selected = kernels.select_elected(rows, limits, signs)
    assert torch.equal(selected.sum(0), out)


def test_smallest_numbers_are_entries_too() -> None:
    rows = torch.tensor([[1e-45, -1e-45, 0.0], [1e-45, 0.0, 0.0], [1e-45, 0.0, 0.0]])
    out = kernels.disjoint_merge(rows, torch.zeros(3, 1), "mean", torch.empty(3))
    assert torch.equal(out, torch.tensor([1e-45, -1e-45, 0.0]))


def test_weighted_sums(rows: Tensor) -> None:
    base, weights = torch.randn(5001), [0.5, -1.0, 0.25]
    want = base + 0.7 * (torch.tensor(weights)[:, None] * rows).sum(0)
    for backend in (cpu, chunked):
        out = torch.empty(5001)
        backend.weighted_sum(rows, torch.tensor(weights), out, base, 0.7)
        torch.testing.assert_close(out, want)
        backend.weighted_sum(rows, torch.tensor([0.0, 1.0, 0.0]), out, None, 2.0)
        assert torch.equal(out, 2 * rows[1])


@pytest.mark.parametrize("rule", ["tall", "magnitude"])
def test_masks(rows: Tensor, rule: kernels.MaskRule) -> None:
    base, merged = torch.randn(5001), rows.sum(0)
    limits = [0.3, 0.5, 0.01]
    column = torch.tensor(limits)[:, None]
    gap = ((base + merged) - (base + rows)).abs()
    want = rows.abs() > column * gap if rule == "tall" else rows.abs() >= column
    bits = kernels.mask_bits(rule, limits, base, rows, merged)
    assert np.array_equal(bits.numpy(), np.packbits(want.numpy(), axis=1))
    assert np.array_equal(kernels.unpack(bits, 5001), want.numpy())
    other = torch.empty_like(bits)
    chunked.mask_bits(rule, torch.tensor(limits), base, rows, merged, other)
    assert torch.equal(bits, other)
    for min_tasks in (0, 1, 2, 3, 4):
        agreed = want.sum(0) >= min_tasks
        expected = base + 0.4 * merged * agreed
        out = kernels.apply_masks(rule, limits, base, rows, merged, torch.empty(5001), min_tasks, 0.4)
        torch.testing.assert_close(out, expected)
        chunked.apply_masks(rule, torch.tensor(limits), base, rows, merged, out, min_tasks, 0.4)
        torch.testing.assert_close(out, expected)
        packed = kernels.consensus_bits(bits, min_tasks)
        assert np.array_equal(kernels.unpack(packed, 5001), agreed.numpy())
        for backend in (cpu, chunked):
            backend.apply_bits(torch.from_numpy(packed), base, merged, out, 0.4)
            torch.testing.assert_close(out, expected)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, bounds = torch.randn(3, 5001), np.array([0, 3, 3250, 5001])
    monkeypatch.setattr(kernels, "_backend", lambda tensor: chunked)
    whole = _everything_chunked(rows, bounds)
    monkeypatch.setattr(chunked, "CHUNK", threads.BLOCK)
    for one, other in zip(whole, _everything_chunked(rows, bounds), strict=True):
        assert torch.equal(one, other)


def _everything_chunked(rows: Tensor, bounds: np.ndarray) -> list[Tensor]:
    base, merged, size = rows[0] * 2, rows.sum(0), rows.shape[1]
    limits = chunked.kth_magnitudes(rows, bounds, [1, 500, 200])
    signs = chunked.elect_sign(rows, limits, bounds, False)
    sums, ties, masked, unpacked = (torch.empty(size) for _ in range(4))
    bits = torch.empty(3, kernels.packed_size(size), dtype=torch.uint8)
    chunked.weighted_sum(rows, torch.ones(3), sums, base, 0.5)
    kernels.disjoint_merge(rows, limits, "mean", ties, bounds)
    chunked.mask_bits("tall", torch.tensor([0.2, 0.3, 0.4]), base, rows, merged, bits)
    chunked.apply_masks("tall", torch.tensor([0.2, 0.3, 0.4]), base, rows, merged, masked, 2, 0.3)
    chunked.apply_bits(bits[0], base, merged, unpacked, 0.3)
    consensus = torch.from_numpy(kernels.consensus_bits(bits, 2))
    trimmed, selected = chunked.trim(rows, limits, bounds), chunked.select_elected(rows, limits, signs, bounds)
    return [limits, signs, sums, ties, masked, unpacked, bits, consensus, trimmed, selected]


@pytest.mark.gpu
def test_a_gpu_gives_the_same() -> None:
    rows = torch.randn(3, 100_001)
    limits = kernels.trim_thresholds(rows, 0.2)
    assert torch.equal(kernels.trim_thresholds(rows.cuda(), 0.2).cpu(), limits)
    for disjoint in ("mean", "sum", "max"):
        want = kernels.disjoint_merge(rows, limits, disjoint, kernels.vector(rows))
        got = kernels.disjoint_merge(rows.cuda(), limits.cuda(), disjoint, kernels.vector(rows.cuda()))
        torch.testing.assert_close(got.cpu(), want)
    base, merged = torch.randn(100_001), rows.sum(0)
    bits = kernels.mask_bits("tall", [0.3] * 3, base, rows, merged)
    assert torch.equal(kernels.mask_bits("tall", [0.3] * 3, base.cuda(), rows.cuda(), merged.cuda()).cpu(), bits)

"""The plan: what a sweep needs of devices and nodes, and whether its hosts share the models."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from merge_ray.cluster import session
from merge_ray.cluster.plan import Machine, Needs, Plan, make_plan
from merge_ray.errors import MergeRayError, format_bytes
from merge_ray.kernels import SLICE_STEP
from merge_ray.methods.base import find_method

GB = 10**9
FLAT = [find_method(name) for name in ("ties", "tall_mask", "finetuned", "pretrained")]
NEEDS = Needs(tasks=7, size=GB, itemsize=4, activations=2 * GB, data=GB, on_cpu=False)
"""The bank 32 GB, the skeleton 4, the merge 4 and 7 / 8 of one for masks, and 3 beside."""
NODE = Machine("gpus", 4, 80 * GB, 100 * GB, 100 * GB, driver=True)


def plan(needs: Needs = NEEDS, node: Machine = NODE, limit: int | None = None, count: int | None = None) -> Plan:
    return make_plan(needs, [node], count, limit, FLAT)


def test_what_is_added_up() -> None:
    assert (NEEDS.bank, NEEDS.skeleton, NEEDS.merge) == (32 * GB, 4 * GB, 4 * GB + 7 * GB // 8)
    assert NEEDS.device(1) == NEEDS.bank + NEEDS.merge + NEEDS.skeleton + 3 * GB
    assert NEEDS.device(2) == (NEEDS.bank + NEEDS.merge) // 2 + NEEDS.skeleton + 3 * GB


def test_models_that_fit_are_held_by_every_host() -> None:
    chosen = plan()
    assert chosen.slices == 1
    assert chosen.text == (
        "4 hosts, each with all models: 43.9 GB of a device's 80 GB "
        "(bank 32 GB, skeleton 4 GB, merge 4.88 GB, activations 2 GB, data 1 GB)"
    )
    assert plan(limit=NEEDS.device(1)).slices == 1


def test_models_that_do_not_fit_are_shared_by_as_few_hosts_as_do() -> None:
    assert plan(limit=NEEDS.device(1) - 1).slices == 2
    assert plan(limit=NEEDS.device(2)).slices == 2
    chosen = plan(limit=NEEDS.device(2) - 1)
    assert chosen.slices == 3
    assert chosen.text.startswith("1 group of 3 hosts that share the models, for all are 43.9 GB and a device has 25.4")
    assert "a slice takes 19.3 GB where the model is scored" in chosen.text


@pytest.mark.parametrize("slices", [1, 2, 3])
def test_slices_cover_all_columns_and_are_about_equal(slices: int) -> None:
    chosen = Plan(slices, "")
    for size in (1, SLICE_STEP + 1, 100 * SLICE_STEP + 7):
        ends = chosen.ends(size)
        assert len(ends) == slices + 1 and (ends[0], ends[-1]) == (0, size)
        assert all(end % SLICE_STEP == 0 for end in ends[:-1])
        assert all(0 <= stop - start <= size / slices + SLICE_STEP for start, stop in pairwise(ends))


def test_on_cpus_the_bank_is_in_shared_memory_and_only_a_limit_limits_a_host() -> None:
    needs, node = replace(NEEDS, on_cpu=True, data=0), replace(NODE, device_memory=None, memory=200 * GB)
    assert plan(needs, node).slices == 1
    assert "42.9 GB of memory" in plan(needs, node).text
    assert plan(needs, node, limit=30 * GB).slices == 2
    with pytest.raises(MergeRayError) as error:
        plan(needs, replace(node, memory=40 * GB))
    assert str(error.value) == (
        "node gpus: 4 hosts of 10.9 GB each need 43.5 GB; 40 GB are left there, 3.5 GB too little: hosts.count: 3 "
        "would fit, or add nodes"
    )


def test_what_fits_no_way_says_by_how_much_and_what_would_help() -> None:
    with pytest.raises(
        MergeRayError,
        match=r"are 43\.9 GB on a device of 15 GB, 28\.9 GB too much; shared in slices they need 5 devices, and 4 are "
        r"used here: add nodes or devices \(or raise hosts\.count\), hold the models in 16 bits \(models\.dtype",
    ):
        plan(limit=15 * GB)
    with pytest.raises(MergeRayError, match=r"activations and data alone are 7 GB: use a smaller evaluation\.b"):
        plan(limit=7 * GB)
    with pytest.raises(MergeRayError) as error:
        plan(replace(NEEDS, itemsize=2), limit=12 * GB)
    assert "16 bits" not in str(error.value)


def test_methods_that_need_all_models_on_a_device_are_named() -> None:
    methods = [*FLAT, *map(find_method, ("zipit", "adamerging", "dawin"))]
    assert make_plan(NEEDS, [NODE], None, None, methods).slices == 1
    with pytest.raises(
        MergeRayError, match=r"groups of 2 hosts, but adamerging, dawin, zipit cannot merge slices .* leave them out"
    ):
        make_plan(NEEDS, [NODE], None, 40 * GB, methods)


def test_an_object_store_that_would_spill_is_refused_before() -> None:
    assert plan(node=replace(NODE, object_store=40 * GB)).slices == 1
    with pytest.raises(MergeRayError) as error:
        plan(node=replace(NODE, object_store=39 * GB))
    assert str(error.value) == (
        "node gpus: the models are 32 GB, and Ray's object store would spill them to disk from 31.2 GB on, 800 MB too "
        "much: models.dtype: bfloat16 halves them; or give Ray more shared memory there (ray start "
        "--object-store-memory 40000000000)"
    )
    # A head without devices takes the models in; another node holds what its hosts share.
    head, worker = replace(NODE, name="head", devices=0), replace(NODE, driver=False, object_store=30 * GB)
    with pytest.raises(MergeRayError, match="node gpus: the models are 32 GB"):
        make_plan(NEEDS, [head, worker], None, None, FLAT)
    workers = [replace(worker, name=name, devices=1) for name in ("one", "two")]
    assert make_plan(NEEDS, [head, *workers], None, 30 * GB, FLAT).slices == 2
    with pytest.raises(MergeRayError, match="node head: the models are 32 GB"):
        make_plan(NEEDS, [replace(head, object_store=GB), *workers], None, 30 * GB, FLAT)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (8 * GB, "8 GB"), (5 * 10**15, "5e+03 TB")]
)
def test_sizes_read_as_people_write_them(size: int, text: str) -> None:
    assert format_bytes(size) == text


def test_a_ray_that_is_started_here_has_an_object_store_for_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "available_memory", lambda: 100 * 10**9)
    # Ray's own would be 30 GB, which spills from 24 GB on.
    assert session._store_size(23 * 10**9) is None
    assert session._store_size(40 * 10**9) == 50 * 10**9

"""What a sweep needs of the cluster's memory, and whether its hosts hold all models each or share them in groups.

Decided before any host loads them, by adding up

* the bank: all models in the dtype that they are held in, once a device, or on CPUs once a node in Ray's object store;
* the skeleton: the scored model in float32;
* the merge: one vector in float32 (what candidates share and the merge in progress take turns in it), and packed masks;
* activations: an estimate, see :meth:`merge_ray.families.Family.activation_bytes`;
* data: what tasks keep on an accelerator.

Of the bank and the merge a host that shares them has its part. What libraries take is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from merge_ray.errors import MergeRayError, format_bytes
from merge_ray.kernels import SLICE_STEP
from merge_ray.methods.base import Method

SPILLS_FROM = 0.8
"""The share of the object store from which Ray spills it to disk, unless it is configured otherwise."""


@dataclass(frozen=True)
class Machine:
    """A node as far as memory goes, in bytes.

    devices: how many hosts it has devices (or cores) for. device_memory: of one device; None for CPUs, which have no
    memory of their own. memory: what is left for processes. driver: whether all models go into its object store.
    """

    name: str
    devices: int
    device_memory: int | None
    memory: int
    object_store: int
    driver: bool = False


@dataclass(frozen=True)
class Needs:
    """What a sweep over ``tasks`` models of ``size`` weights needs, in bytes.

    itemsize: of a weight in the bank. activations: of a batch. data: on a device. on_cpu: whether hosts use the bank
    where Ray keeps it.
    """

    tasks: int
    size: int
    itemsize: int
    activations: int
    data: int
    on_cpu: bool

    @property
    def bank(self) -> int:
        """The base and all fine-tuned models."""
        return (self.tasks + 1) * self.size * self.itemsize

    @property
    def skeleton(self) -> int:
        """The scored model."""
        return 4 * self.size

    @property
    def merge(self) -> int:
        """What merging takes beside the result."""
        return 4 * self.size + self.tasks * math.ceil(self.size / 8)

    @property
    def scoring(self) -> int:
        """What is where the model is scored."""
        return self.skeleton + self.activations + self.data

    def device(self, slices: int) -> int:
        """What the first host of a group has on its device, or any host where there is one slice."""
        return math.ceil((self.bank + self.merge) / slices) + self.scoring

    def store(self, here: int, slices: int) -> int:
        """What so many hosts of a node have in Ray's object store; merged slices on their way are in it, too."""
        parts = math.ceil(self.bank * min(here, slices) / slices)
        return parts + (self.skeleton * math.ceil(here / slices) if slices > 1 else 0)

    def process(self, slices: int) -> int:
        """What hosts of a group have on average in memory of their own, beside the bank in shared memory."""
        merged = math.ceil(self.skeleton / slices) if slices > 1 else 0
        return merged + (math.ceil((self.merge + self.scoring) / slices) if self.on_cpu else 0)


@dataclass(frozen=True)
class Plan:
    """What was chosen: each host holds the whole bank (``slices`` is 1), or groups of ``slices`` hosts share it.

    text: the choice and its reason, for people.
    """

    slices: int
    text: str

    def ends(self, size: int) -> tuple[int, ...]:
        """Where the slices of ``size`` columns start and end: about equal, cut where kernels can work on them."""
        blocks = math.ceil(size / SLICE_STEP)
        return tuple(min(size, blocks * place // self.slices * SLICE_STEP) for place in range(self.slices + 1))


def make_plan(
    needs: Needs, machines: Sequence[Machine], count: int | None, limit: int | None, methods: Sequence[type[Method]]
) -> Plan:
    """Choose between whole banks and slices.

    count: the hosts that are asked for; None for as many as there are devices. limit: a device's memory where less is
    to be used than there is, and for CPUs, whose memory is not limited otherwise. methods: those that will run.

    Raises :class:`MergeRayError` where it fits neither way: by how much, and what would help; and where it would only
    fit in slices, but a method needs the whole bank on one device.
    """
    hosts = count or sum(machine.devices for machine in machines)
    limits = [size for machine in machines if machine.devices and (size := machine.device_memory) is not None]
    device = min([*limits, *([limit] if limit else [])], default=None)
    slices = _slices(needs, device, hosts, methods)
    hosts -= hosts % slices
    _check_machines(needs, machines, slices, hosts)
    parts = {name: getattr(needs, name) for name in ("bank", "skeleton", "merge", "activations", "data")}
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
    if slices == 1:
        place = "memory" if device is None else f"a device's {format_bytes(device)}"
        text = f"{_count(hosts, 'host')}, each with all models: {format_bytes(needs.device(1))} of {place} ({listed})"
    else:
        text = (
            f"{_count(hosts // slices, 'group')} of {slices} hosts that share the models, for all are "
            f"{format_bytes(needs.device(1))} and a device has {format_bytes(device or 0)} ({listed}); a slice takes "
            f"{format_bytes(needs.device(slices))} where the model is scored"
        )
    return Plan(slices, text)


def _slices(needs: Needs, device: int | None, hosts: int, methods: Sequence[type[Method]]) -> int:
    """The fewest slices of the bank with which every device has room."""
    if device is None or needs.device(1) <= device:
        return 1
    missing = f"{format_bytes(needs.device(1))} on a device of {format_bytes(device)}"
    whole = f"all models and what scoring takes are {missing}, {format_bytes(needs.device(1) - device)} too much"
    room = device - needs.scoring
    if room <= 0:
        raise MergeRayError(
            f"{whole}; the scored model, its activations and data alone are {format_bytes(needs.scoring)}: "
            "use a smaller evaluation.batch_size, or larger devices"
        )
    slices = math.ceil((needs.bank + needs.merge) / room)
    smaller = ", hold the models in 16 bits (models.dtype: bfloat16)" if needs.itemsize > 2 else ""
    if needing := sorted({method.name for method in methods if not method.by_columns}):
        raise MergeRayError(
            f"{whole}; they would have to be shared by groups of {slices} hosts, but {', '.join(needing)} cannot merge "
            f"slices (they learn, look at samples, or match channels): leave them out{smaller}, or use larger devices"
        )
    if slices > hosts:
        raise MergeRayError(
            f"{whole}; shared in slices they need {slices} devices, and {hosts} are used here: "
            f"add nodes or devices (or raise hosts.count){smaller}, or merge fewer models"
        )
    return slices


def _check_machines(needs: Needs, machines: Sequence[Machine], slices: int, hosts: int) -> None:
    """Raise :class:`MergeRayError` where a node's object store or the rest of its memory is too small."""
    smaller = "models.dtype: bfloat16 halves them; " if needs.itemsize > 2 else ""
    spread = hosts
    for machine in machines:
        here = min(spread, machine.devices)
        spread -= here
        # The driver puts all models into its node's object store; other nodes get what their hosts hold.
        stored = max(needs.store(here, slices), needs.bank if machine.driver else 0)
        room = int(SPILLS_FROM * machine.object_store)
        if (here or machine.driver) and stored > room:
            wanted = math.ceil(stored / SPILLS_FROM)
            raise MergeRayError(
                f"node {machine.name}: the models are {format_bytes(stored)}, and Ray's object store would spill them "
                f"to disk from {format_bytes(room)} on, {format_bytes(stored - room)} too much: {smaller}or give Ray "
                f"more shared memory there (ray start --object-store-memory {wanted})"
            )
        each = needs.process(slices)
        if (missing := here * each - machine.memory) > 0:
            fit = machine.memory // each
            fewer = f"hosts.count: {fit} would fit" if fit > 0 else "a node with more memory is needed"
            raise MergeRayError(
                f"node {machine.name}: {_count(here, 'host')} of {format_bytes(each)} each need "
                f"{format_bytes(here * each)}; {format_bytes(machine.memory)} are left there, {format_bytes(missing)} "
                f"too little: {fewer}, or add nodes"
            )


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"

"""How much memory is left."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
CONTAINERS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""A container's limit, its use, and what of that the kernel can take back (control groups 2 and 1)."""


def available_memory() -> int:
    """The bytes that can still be taken: of this machine's, or of this container's where its limit leaves less."""
    return min(psutil.virtual_memory().available, *map(_left, CONTAINERS))


def _left(files: tuple[str, str, str, str]) -> float:
    limit, used, statistics, reclaimable = files
    try:
        most, taken = (CGROUPS / limit).read_text().strip(), int((CGROUPS / used).read_text())
        details = dict(line.split() for line in (CGROUPS / statistics).read_text().splitlines())
    except OSError:
        return float("inf")
    return float("inf") if most == "max" else max(0, int(most) - taken + int(details[reclaimable]))

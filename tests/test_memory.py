"""The memory that is left on a machine or in a container."""

from pathlib import Path

import psutil
import pytest

from merge_ray import memory


@pytest.mark.parametrize(
    ("limit", "used", "name"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_a_container_has_what_its_limit_leaves(
    limit: str, used: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = psutil.virtual_memory()._replace(available=10_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    assert memory.available_memory() == 10_000
    (tmp_path / "memory").mkdir()
    (tmp_path / used).write_text("700\n")
    (tmp_path / used).with_name("memory.stat").write_text(f"anon 1\n{name} 200\n")
    for most, left in {"1000": 500, "600": 100, "100": 0, "99999": 10_000}.items():
        (tmp_path / limit).write_text(f"{most}\n")
        assert memory.available_memory() == left


def test_a_container_without_a_limit_has_the_machine_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    for name, text in {"memory.max": "max", "memory.current": "700", "memory.stat": "inactive_file 200"}.items():
        (tmp_path / name).write_text(text)
    assert 0 < memory.available_memory() <= psutil.virtual_memory().total
